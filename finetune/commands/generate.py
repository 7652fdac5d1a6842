"""`finetune generate`: completions of prompts on stdout, by a run's model or by several adapters on one base."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.arguments import not_negative, positive, seed, share, unused_sampling
from finetune.console import say, warn
from finetune.errors import EXIT_OK, BadInputError, DataError

if TYPE_CHECKING:
    from finetune.data.formats import Conversation
    from finetune.inference.generate import Completion
    from finetune.inference.load import LoadedRun


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run", metavar="RUN", nargs="?", help="a run's directory, an adapter's, or hf://ORG/NAME")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="RUN",
        help="answer with this adapter instead, on RUN's base; repeatable: the base is loaded once, and each "
        "answers every prompt",
    )
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a user's message; repeatable")
    parser.add_argument(
        "--file",
        type=Path,
        help="one prompt per line of a text file; or rows of a .jsonl, .ndjson, .json, .csv, .tsv or .parquet file: "
        'strings, {"prompt": …}, or {"messages": […]}, which may have "tools": […] and whose last answer is left out',
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: the recipe's)")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="default: the recipe's")
    parser.add_argument("--temperature", type=not_negative, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-p", type=share, default=1.0, metavar="P", help="sample from this mass (default: 1)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of sampling (default: 0)")
    parser.add_argument("--base", action="store_true", help="the base model without the adapter")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt")


def run(arguments: argparse.Namespace) -> int:
    """Complete every prompt and print the completions in order."""
    from finetune.data.formats import Conversation, RowError, check_unicode
    from finetune.data.prompts import read_prompts

    try:
        check_unicode(arguments.system, "--system")
        check_unicode(arguments.prompt, "--prompt")
    except RowError as error:
        raise BadInputError(str(error)) from None
    prompts = [Conversation([{"role": "user", "content": text}]) for text in arguments.prompt]
    if arguments.file is not None:
        prompts += read_prompts(arguments.file)
    if not prompts:
        raise BadInputError("nothing to complete; give --prompt TEXT or --file FILE")

    if arguments.base and arguments.adapter:
        raise BadInputError("--base: is the base without an adapter; leave out one of --base and --adapter")

    if (unused := unused_sampling(arguments)) is not None:
        warn(unused)
    models = _load(arguments)
    start = time.perf_counter()
    answers = [_complete(loaded, prompts, arguments) for loaded in models]
    seconds = time.perf_counter() - start
    _print(prompts, answers, arguments.adapter, as_json=arguments.json)
    _say_speed([completion for completions in answers for completion in completions], seconds)
    return EXIT_OK


def _load(arguments: argparse.Namespace) -> list[LoadedRun]:
    """The run's model, or one for each --adapter, which share theirs."""
    from finetune.models.startup import importing_libraries

    with importing_libraries():
        from finetune.export.places import find_place
        from finetune.inference.load import load_run
        from finetune.inference.several import load_adapters

    if not arguments.adapter:
        if arguments.run is None:
            raise BadInputError("name a run: finetune generate RUN --prompt TEXT, or adapters by --adapter RUN")
        return [load_run(find_place(arguments.run).folder, base_only=arguments.base)]
    on = None if arguments.run is None else (arguments.run, find_place(arguments.run).folder)
    return load_adapters([(given, find_place(given).folder) for given in arguments.adapter], on)


def _complete(loaded: LoadedRun, prompts: list[Conversation], arguments: argparse.Namespace) -> list[Completion]:
    from finetune.data.template import encode_prompt
    from finetune.inference.generate import Sampling, generate

    evaluation = loaded.recipe.evaluation
    system = loaded.recipe.data.system if arguments.system is None else arguments.system
    loaded.activate()
    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens or evaluation.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    ids = [encode_prompt(loaded.tokenizer, loaded.template, each.messages, system, each.tools) for each in prompts]
    _check_room(loaded, ids)
    stops = loaded.template.stop_token_ids
    return generate(loaded.model, loaded.tokenizer, ids, stops, sampling, batch_size=evaluation.batch_size)


def _check_room(loaded: LoadedRun, prompts: list[list[int]]) -> None:
    from finetune.inference.mode import base_of
    from finetune.models.load import context_length

    longest = context_length(base_of(loaded.model).config)
    for number, ids in enumerate(prompts, 1):
        if longest is not None and len(ids) >= longest:
            raise DataError(f"prompt {number} has {len(ids)} tokens, the model's context holds {longest}; shorten it")


def _print(prompts: list[Conversation], answers: list[list[Completion]], adapters: list[str], *, as_json: bool) -> None:
    """Every prompt with its completion, or with those of each adapter in the order given."""
    labels: list[str | None] = [*adapters] if adapters else [None]
    for conversation, *completions in zip(prompts, *answers, strict=True):
        prompt = str(conversation.messages[-1]["content"])
        if not as_json and (len(prompts) > 1 or len(labels) > 1):
            print(f">>> {prompt}")
        for label, completion in zip(labels, completions, strict=True):
            if as_json:
                row = {
                    **({} if label is None else {"adapter": label}),
                    "prompt": prompt,
                    "completion": completion.text,
                    "num_tokens": len(completion.token_ids),
                    "stopped": completion.stopped,
                }
                print(json.dumps(row, ensure_ascii=False))
            else:
                print(f"[{label}] {completion.text}" if len(labels) > 1 else completion.text)
        if not as_json and len(prompts) > 1:
            print()


def _say_speed(completions: list[Completion], seconds: float) -> None:
    from finetune.machine import peak_memory_bytes

    tokens = sum(len(completion.token_ids) for completion in completions)
    cut = sum(not completion.stopped for completion in completions)
    line = f"{tokens:,} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):,.1f} tokens/s), "
    line += f"peak memory {peak_memory_bytes() / 1e9:.2f} GB"
    say(f"{line}, {cut} cut at --max-new-tokens" if cut else line)
