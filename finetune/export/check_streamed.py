"""The models that a merge's check compares, read from disk layer by layer, so that no more of them is in memory.

The adapter and its bare base go through the layers together: each layer is read, and quantized, once for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from finetune.console import progress_bar
from finetune.export.check_merge import CheckSample, Drift, forward_passes, head_log_probs, measure_drift
from finetune.export.merge import Base, Merge
from finetune.export.merge_files import BaseFiles
from finetune.export.merge_plan import stored_names
from finetune.models.load import load_config
from finetune.models.skeleton import build_skeleton
from finetune.models.sources import find_model
from finetune.models.streamed import SavedAdapter, StreamedModel, build_streamed
from finetune.recipe.schema import ModelSection


def stream_adapter(merge: Merge, *, attention_name: str, device: torch.device) -> StreamedModel:
    """The merge's adapter on the base that it was trained on.

    Raises:
        NotStreamableError: the model has to be loaded whole.
    """
    recipe, precision = merge.recipe, merge.recipe.training.precision
    skeleton = build_skeleton(merge.config, recipe.model, precision=precision, attention_name=attention_name)
    stored = {
        parameter: partial(merge.files.read, name) for name, parameter in stored_names(merge.files, skeleton).items()
    }
    adapter = SavedAdapter(merge.adapter, merge.tokenizer, recipe.training.seed)
    return build_streamed(skeleton, recipe.model, stored, precision=precision, device=device, adapter=adapter)


def stream_merged(
    merge: Merge, section: ModelSection, *, attention_name: str, device: torch.device, base: Base
) -> StreamedModel:
    """The merged model that `section` names; on another base than the merge's, what merging into that would give.

    Raises:
        NotStreamableError: the model has to be loaded whole.
    """
    source, precision = find_model(section), merge.recipe.training.precision
    files = BaseFiles(source)
    skeleton = build_skeleton(load_config(section, source), section, precision=precision, attention_name=attention_name)
    stored: dict[str, Callable[[], torch.Tensor]]
    stored = {parameter: partial(files.read, name) for name, parameter in stored_names(files, skeleton).items()}
    if base != merge.base:
        for weight in merge.plan.weights:
            if weight.quantized and weight.parameter is not None:
                stored[weight.parameter] = partial(merge.tensor, weight, base)
    return build_streamed(skeleton, section, stored, precision=precision, device=device)


def measure_adapter(streamed: StreamedModel, samples: Sequence[CheckSample]) -> tuple[list[torch.Tensor], Drift]:
    """Log-probabilities with the adapter, and how far the bare base is from them; the caller sets the mode."""
    adapted, bare = _hidden(streamed, samples, (True, False))
    wanted = list(_head(streamed, adapted, enabled=True))
    return wanted, measure_drift(wanted, _head(streamed, bare, enabled=False))


def measure_streamed(
    reference: Sequence[torch.Tensor], streamed: StreamedModel, samples: Sequence[CheckSample]
) -> Drift:
    """How far a streamed model is from `reference`; the caller sets the mode."""
    (hidden,) = _hidden(streamed, samples, (True,))
    return measure_drift(reference, _head(streamed, hidden, enabled=True))


def _hidden(
    streamed: StreamedModel, samples: Sequence[CheckSample], variants: Sequence[bool]
) -> list[list[torch.Tensor]]:
    """Hidden states of all samples, for adapters on or off as `variants` says."""
    calls = forward_passes(streamed.causal_lm, samples, streamed.device)
    adapted = [variant for variant in variants for _ in calls]
    with progress_bar("comparing on held-out rows", streamed.num_units, line=False) as bar:
        found = streamed.run(calls * len(variants), adapted, bar.advance)
    parts = [found[start : start + len(calls)] for start in range(0, len(found), len(calls))]
    return [[rows for batch in part for rows in batch] for part in parts]


def _head(streamed: StreamedModel, hidden: Sequence[torch.Tensor], *, enabled: bool) -> Iterator[torch.Tensor]:
    streamed.set_adapters(enabled)
    yield from head_log_probs(streamed.causal_lm, hidden)
    streamed.set_adapters(True)
