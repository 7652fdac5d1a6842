"""`finetune chat`: talk to a run's model on the terminal; answers appear as they are written."""

from __future__ import annotations

import argparse
import io
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from finetune.arguments import not_negative, positive, seed, share, unused_sampling
from finetune.console import say, warn
from finetune.errors import EXIT_OK, BadInputError, DataError

if TYPE_CHECKING:
    import torch

    from finetune.inference.load import LoadedRun

Message = dict[str, Any]

# What the first bytes of a character are decoded to.
_UNFINISHED = "\ufffd"

HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /exit or Ctrl-D ends"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run", metavar="RUN", help="a run's directory, an adapter's, or hf://ORG/NAME")
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: the recipe's)")
    parser.add_argument(
        "--compare", action="store_true", help="the bare base answers too, in a conversation of its own"
    )
    parser.add_argument("--base", action="store_true", help="the base model without the adapter")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=512, metavar="N", help="longest answer (default: 512)"
    )
    parser.add_argument("--temperature", type=not_negative, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-p", type=share, default=1.0, metavar="P", help="sample from this mass (default: 1)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of sampling (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Answer every line of standard input until it ends."""
    if arguments.base and arguments.compare:
        raise BadInputError("--compare shows the base beside the adapter; leave --base out")

    if (unused := unused_sampling(arguments)) is not None:
        warn(unused)

    from finetune.models.startup import importing_libraries

    with importing_libraries():
        from finetune.export.places import find_place
        from finetune.inference.load import load_run

    loaded = load_run(find_place(arguments.run).folder, base_only=arguments.base)
    if arguments.compare and loaded.recipe.adapter.rewrites_base:
        raise BadInputError(
            f"--compare: adapter.init {loaded.recipe.adapter.init} took its initial values off the base's weights, so "
            "switching the adapter off gives no base; talk to the base alone: --base"
        )
    system = loaded.recipe.data.system if arguments.system is None else arguments.system
    speakers = [Speaker("adapter", system)]
    if arguments.compare:
        speakers.insert(0, Speaker("base", system, bare=True))
    say(HELP)
    with ExitStack() as stack:
        if not arguments.compare:
            # Once for the whole conversation; with two models in turn, once for every answer.
            stack.enter_context(dense(loaded, bare=False))
        for line in read_lines():
            if not handle(line, speakers, loaded, arguments):
                break
    return EXIT_OK


@dataclass
class Speaker:
    """One of those who answer, with a conversation of its own."""

    name: str
    system: str | None
    bare: bool = False  # the base without the adapter
    messages: list[Message] = field(default_factory=list)

    def conversation(self) -> list[Message]:
        """What the model is shown."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.messages


def handle(line: str, speakers: list[Speaker], loaded: LoadedRun, arguments: argparse.Namespace) -> bool:
    """Obey a command, or answer a message; False ends the conversation."""
    if line.startswith("/"):
        return _command(line, speakers)
    for speaker in speakers:
        if len(speakers) > 1:
            print(f"{speaker.name}> ", end="", flush=True)
        speaker.messages.append({"role": "user", "content": line})
        try:
            answer = _answer(loaded, speaker, arguments, alone=len(speakers) == 1)
        except DataError as error:  # a template may refuse a conversation, as one with a system prompt
            speaker.messages.pop()
            warn(str(error))
            continue
        if answer is None:
            speaker.messages.pop()
        else:
            speaker.messages.append({"role": "assistant", "content": answer})
    return True


def _command(line: str, speakers: list[Speaker]) -> bool:
    word, _, rest = line.partition(" ")
    if word in ("/exit", "/quit"):
        return False
    if word == "/reset":
        for speaker in speakers:
            speaker.messages.clear()
        say("forgotten")
    elif word == "/system":
        for speaker in speakers:
            speaker.system = rest.strip() or None
            speaker.messages.clear()
        say(f"system prompt: {rest.strip() or 'none'}; the conversation starts anew")
    else:
        say(HELP if word == "/help" else f"unknown command {word}; {HELP}")
    return True


def _answer(loaded: LoadedRun, speaker: Speaker, arguments: argparse.Namespace, *, alone: bool) -> str | None:
    """Print an answer as it is written and return it; None if the user interrupted it."""
    answer = ""
    interrupted = False
    with nullcontext() if alone else dense(loaded, bare=speaker.bare):
        stream = stream_answer(loaded, speaker.conversation(), arguments)
        try:
            for text in stream:
                print(text[len(answer) :], end="", flush=True)
                answer = text
        except KeyboardInterrupt:
            interrupted = True
        finally:
            stream.close()
    print(flush=True)
    if interrupted:
        say("interrupted; this question and its answer are left out of the conversation")
        return None
    return answer


@contextmanager
def dense(loaded: LoadedRun, *, bare: bool) -> Iterator[None]:
    """Within this, the model is ready to decode: with its adapter, or as the bare base."""
    from finetune.inference.dense import dense_weights
    from finetune.inference.mode import decoding

    model: Any = loaded.model
    with ExitStack() as stack:
        if bare:
            stack.enter_context(model.disable_adapter())
        stack.enter_context(decoding(model))
        stack.enter_context(dense_weights(model))
        yield


def stream_answer(
    loaded: LoadedRun, messages: list[Message], arguments: argparse.Namespace
) -> Generator[str, None, None]:
    """The model's answer so far, again whenever it has grown; closing the iterator stops the model.

    Raises:
        DataError: the chat template refuses the conversation, or it is longer than the model's context.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    from finetune.inference.cache import empty_cache
    from finetune.inference.mode import base_of

    stop = threading.Event()

    class Stopped(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device)

    causal_lm = base_of(loaded.model)
    device = causal_lm.get_input_embeddings().weight.device
    prompt, room = _prompt_ids(loaded, messages)
    ids = torch.tensor([prompt], device=device)
    cache = empty_cache(causal_lm)
    arriving: SimpleQueue[list[int] | None] = SimpleQueue()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            torch.manual_seed(arguments.seed)
            causal_lm.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=_generation_config(loaded, arguments, room),
                stopping_criteria=StoppingCriteriaList([Stopped()]),
                streamer=_Streamer(arriving),
                **({} if cache is None else {"past_key_values": cache}),
            )
        except BaseException as error:
            errors.append(error)
            arriving.put(None)

    yield from _texts(loaded, _token_ids(arriving, work, stop))
    if errors:
        raise errors[0]


class _Streamer:
    """What `generate` streams to: lists of token ids, the prompt's first, and None at the end."""

    def __init__(self, arriving: SimpleQueue[list[int] | None]) -> None:
        self._arriving = arriving

    def put(self, token_ids: torch.Tensor) -> None:
        """Take the next ids."""
        self._arriving.put(token_ids.flatten().tolist())

    def end(self) -> None:
        """Say that there are no more."""
        self._arriving.put(None)


def _token_ids(
    arriving: SimpleQueue[list[int] | None], work: Callable[[], None], stop: threading.Event
) -> Generator[list[int], None, None]:
    """The new token ids while `work` generates them in a thread, which closing the iterator ends."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        if arriving.get() is not None:  # the prompt; None where generating fails before it
            yield from iter(arriving.get, None)
    finally:
        stop.set()
        thread.join()


def _texts(loaded: LoadedRun, arriving: Generator[list[int], None, None]) -> Iterator[str]:
    """The text of all ids so far, whenever it has grown, and at last in full.

    Decoded from the first id on each time: a decoder such as Llama 2's takes a space off the beginning of what it is
    given, which is that of the answer and not of a later line.
    """
    ids: list[int] = []
    shown = ""

    def decode() -> str:
        text: str = loaded.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    with closing(arriving):
        for some in arriving:
            ids += (token for token in some if token not in loaded.template.stop_token_ids)
            text = decode().rstrip(_UNFINISHED)
            if len(text) > len(shown) and text.startswith(shown):
                shown = text
                yield shown
    yield decode()


def _prompt_ids(loaded: LoadedRun, messages: list[Message]) -> tuple[list[int], int]:
    """The conversation's tokens, and how many more the model's context holds."""
    from finetune.data.template import encode_prompt
    from finetune.inference.mode import base_of

    ids = encode_prompt(loaded.tokenizer, loaded.template, messages)
    longest = getattr(base_of(loaded.model).config.get_text_config(), "max_position_embeddings", sys.maxsize)
    if len(ids) >= longest:
        raise DataError(f"the conversation has {len(ids)} tokens, the model's context holds {longest}; /reset it")
    return ids, longest - len(ids)


def _generation_config(loaded: LoadedRun, arguments: argparse.Namespace, room: int) -> Any:
    from transformers import GenerationConfig

    stops = list(loaded.template.stop_token_ids)
    pad = loaded.tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=min(arguments.max_new_tokens, room),
        eos_token_id=stops,
        pad_token_id=stops[0] if pad is None else pad,
        use_cache=True,
        do_sample=arguments.temperature > 0,
    )
    if arguments.temperature > 0:
        config.update(temperature=arguments.temperature, top_p=arguments.top_p, top_k=0)
    return config


def read_lines() -> Iterator[str]:
    """The user's lines, asked for on a terminal; empty ones are passed over."""
    is_terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the answer to such a line says what is wrong with it
    if is_terminal:
        import readline  # noqa: F401 - line editing and history for input()
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        if line:
            yield line
