"""Whether a merged model does what its adapter did, on held-out samples of the run's own data.

Models come one after the other; of each, only log-probabilities at some supervised positions are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from finetune.console import progress_bar
from finetune.data.dataset import TokenDataset
from finetune.data.prepare import prepare_data, prepare_test
from finetune.data.template import ChatTemplate, encode_prompt
from finetune.errors import DataError, first_line
from finetune.models.heads import decoder_of, head_logits
from finetune.recipe.schema import MergeSection, Recipe

MAX_SAMPLES = 16
# Of one sample, evenly spread: 512 rows of log-probabilities are 0.3 GB for a vocabulary of 150,000.
MAX_POSITIONS = 32
MAX_BATCH_TOKENS = 8192
# Where the run's data is gone, the check falls back on these.
_TEXTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three fruits.",
    "Explain why the sky is blue.",
)


@dataclass(frozen=True)
class CheckSample:
    """A sample and the positions whose next token is looked at."""

    input_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [P]


@dataclass(frozen=True)
class Drift:
    """How far a model is from another."""

    kl: float  # mean KL divergence over the positions, nats
    agreement: float  # share of positions where both hold the same token for the most likely


@dataclass(frozen=True)
class MergeCheck:
    """What the check has found."""

    rows: str  # where the samples come from
    num_samples: int
    num_positions: int
    base: str  # what the adapter was added to
    base_is_trained_on: bool  # whether that is what it was trained on
    merged: Drift  # the merged model, against the adapter on the base that it was trained on
    bare: Drift  # that base without the adapter, against the same
    other_base: str | None = None
    other: Drift | None = None  # what merging into the other base would have given

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def held_out_samples(recipe: Recipe, tokenizer: Any, template: ChatTemplate) -> tuple[list[CheckSample], str]:
    """Samples of the run's data, and where they come from.

    Validation rows, else evaluation rows, else the last training rows; where the data cannot be read any more,
    a few built-in questions.
    """
    try:
        dataset, rows = _held_out_data(recipe, tokenizer, template)
    except DataError as error:
        reason = f"the run's data cannot be read: {first_line(error)}"
        if recipe.is_derived:
            reason = "another program trained the adapter"
        prompts = [encode_prompt(tokenizer, template, [{"role": "user", "content": text}]) for text in _TEXTS]
        samples = [CheckSample(torch.tensor(ids), torch.arange(len(ids))) for ids in prompts]
        return samples, f"built-in questions, because {reason}"
    order = range(len(dataset))
    chosen = list(order[-MAX_SAMPLES:] if rows.startswith("training") else order[:MAX_SAMPLES])
    samples = [sample for index in chosen if (sample := _sample(*dataset[index])) is not None]
    return samples, rows


def _held_out_data(recipe: Recipe, tokenizer: Any, template: ChatTemplate) -> tuple[TokenDataset, str]:
    data, seed = recipe.data, recipe.training.seed
    if recipe.is_derived:
        raise DataError("no rows are known")
    source = recipe.evaluation.source
    if source is not None and not data.validation.has_rows:
        return prepare_test(source, data, tokenizer, template, seed=seed), "evaluation rows"
    prepared = prepare_data(data, tokenizer, template, seed=seed)
    if prepared.validation is not None and len(prepared.validation):
        return prepared.validation, "validation rows"
    return prepared.train, "training rows (none are held out)"


def _sample(input_ids: Any, supervised: Any) -> CheckSample | None:
    ids = torch.as_tensor(input_ids, dtype=torch.int64)
    # The token at t is predicted at t - 1; the first token of a sample is predicted by nothing.
    positions = torch.as_tensor(supervised).nonzero()[:, 0] - 1
    positions = positions[positions >= 0]
    if not len(positions):
        return None
    if len(positions) > MAX_POSITIONS:
        positions = positions[torch.linspace(0, len(positions) - 1, MAX_POSITIONS).round().long()]
    return CheckSample(ids, positions)


def log_probs(causal_lm: Any, samples: Sequence[CheckSample]) -> Iterator[torch.Tensor]:
    """Log-probabilities (fp32 [P, V] on the CPU) of each sample's positions; the caller sets the model's mode."""
    calls = forward_passes(causal_lm, samples, causal_lm.get_input_embeddings().weight.device)
    with progress_bar("comparing on held-out rows", len(calls), line=False) as bar:
        for call in calls:
            yield from head_log_probs(causal_lm, call())
            bar.advance()


def forward_passes(
    causal_lm: Any, samples: Sequence[CheckSample], device: torch.device
) -> list[Callable[[], list[torch.Tensor]]]:
    """One call a batch; it gives the last hidden states ([P, D]) of each of its samples."""

    @torch.no_grad()
    def forward(batch: list[CheckSample]) -> list[torch.Tensor]:
        # Padded at the end, where causal attention lets nobody look.
        ids = torch.nn.utils.rnn.pad_sequence([sample.input_ids for sample in batch], batch_first=True)
        hidden = decoder_of(causal_lm)(input_ids=ids.to(device), use_cache=False).last_hidden_state
        return [row[sample.positions.to(row.device)] for row, sample in zip(hidden, batch, strict=True)]

    return [partial(forward, batch) for batch in _batches(samples)]


@torch.no_grad()
def head_log_probs(causal_lm: Any, hidden: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Log-probabilities (fp32 [P, V] on the CPU) of last hidden states [P, D]."""
    for rows in hidden:
        yield torch.log_softmax(head_logits(causal_lm, rows).float(), dim=-1).cpu()


def _batches(samples: Sequence[CheckSample]) -> Iterator[list[CheckSample]]:
    """Neighbours that make at most MAX_BATCH_TOKENS together, padding included."""
    batch: list[CheckSample] = []
    for sample in samples:
        width = max(len(each.input_ids) for each in (*batch, sample))
        if batch and width * (len(batch) + 1) > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(sample)
    yield batch


def measure_drift(reference: Iterable[torch.Tensor], model: Iterable[torch.Tensor]) -> Drift:
    """KL(reference || model) and top-1 agreement of two models' log-probabilities on the same samples."""
    total = agreed = 0.0
    count = 0
    for wanted, given in zip(reference, model, strict=True):
        total += (wanted.exp() * (wanted - given)).sum(-1).clamp(min=0).sum(dtype=torch.float64).item()
        agreed += float((wanted.argmax(-1) == given.argmax(-1)).sum())
        count += len(wanted)
    return Drift(total / count, agreed / count)


def find_fault(check: MergeCheck, bounds: MergeSection) -> str | None:
    """Why the merged model must not be used; None if it may.

    Measured on SmolLM2-135M, NF4, rank 16: 4e-4 nats is what rounding to bf16 costs, 0.04 what the original base
    costs, 0.03 and 0.09 an update of half and of twice its size. So the bound for the base that the adapter was
    trained on is tight, and a merge into the original weights must meet it on that base first.
    """
    drift = check.merged
    if not drift.kl < check.bare.kl:
        if check.bare.kl < 1e-9:
            return "the adapter changes nothing: with and without it the model gives the same probabilities"
        return (
            f"the merged model is as far from the adapter (KL {drift.kl:.2e}) as the bare base is "
            f"({check.bare.kl:.2e}), so the adapter is not in it"
        )
    # Comparisons are written so that NaN fails.
    if check.base_is_trained_on:
        if not drift.kl <= bounds.max_kl:
            return f"KL to the adapter is {drift.kl:.4f}, above merge.max_kl {bounds.max_kl}"
    else:
        if check.other is not None and not check.other.kl <= bounds.max_kl:
            return (
                f"even on the {check.other_base} base, KL to the adapter is {check.other.kl:.4f}, above "
                f"merge.max_kl {bounds.max_kl}"
            )
        if not drift.kl <= bounds.max_kl_original:
            return (
                f"KL to the adapter is {drift.kl:.4f}, above merge.max_kl_original {bounds.max_kl_original}; "
                "merge into what it was trained on: --base dequantized"
            )
    if not drift.agreement >= bounds.min_agreement:
        todo = "" if check.base_is_trained_on else "; merge into what it was trained on: --base dequantized"
        return f"top-1 agreement is {drift.agreement:.1%}, below merge.min_agreement {bounds.min_agreement:.1%}{todo}"
    return None
