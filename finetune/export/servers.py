"""Linters: whether vLLM and Text Generation Inference (TGI) serve an adapter as it is, and the command that does.

Both read less of an adapter than PEFT writes, and some of what they do not read they drop without an error. A
linter reads the adapter's two files and names every reason to refuse it. Sources: vLLM, vllm/config/lora.py,
vllm/lora/peft_helper.py, vllm/lora/lora_model.py and the table of supported models; TGI,
server/text_generation_server/utils/adapter.py and adapters/lora.py.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from finetune.errors import BadInputError, ModelError
from finetune.models.adapters import CONFIG_NAME, WEIGHTS_NAME, init_off_the_base
from finetune.models.sources import find_model
from finetune.recipe.schema import ModelSection

# Values that --max-lora-rank takes; an adapter's own rank may be any up to it.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Its fast kernels end here; a larger rank is served by a loop over adapters.
TGI_MAX_RANK = 128

_DECODER_LAYERS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
_FUSED_LAYERS = frozenset({"qkv_proj", "o_proj", "gate_up_proj", "down_proj"})
# Model types whose layers are known; others are not refused for their layers, but pointed out.
VLLM_LAYERS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _DECODER_LAYERS),
    "phi3": _FUSED_LAYERS,
}
VLLM_WITHOUT_LORA = frozenset({"falcon", "gpt2", "gpt_neox", "gptj", "bloom", "mpt"})
TGI_MODELS = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"})

_MERGE = "serve the merged model instead: finetune merge {run}"


@dataclass(frozen=True)
class AdapterFacts:
    """What a server can know of an adapter before it loads it."""

    settings: dict[str, Any]  # adapter_config.json
    ranks: dict[str, int]  # adapted module -> rank of its matrices
    others: tuple[str, ...]  # names of tensors that are no LoRA matrix of a linear layer
    model_type: str  # of the base; empty where that is not known
    num_layers: int  # of the base

    @property
    def layers(self) -> set[str]:
        """Short names of the adapted modules."""
        return {module.rpartition(".")[2] for module in self.ranks}


@dataclass(frozen=True)
class Finding:
    """Why a server does not take an adapter; `remedy` is what helps besides merging."""

    what: str
    remedy: str = ""


def read_facts(adapter: Path, model_config: Any) -> AdapterFacts:
    """The facts of an adapter's directory, from its configuration and the header of its weights.

    Without `model_config`, nothing is known of the base.

    Raises:
        ModelError: a file is missing or damaged.
    """
    ranks: dict[str, int] = {}
    others = []
    try:
        settings = json.loads((adapter / CONFIG_NAME).read_text(encoding="utf-8"))
        with safe_open(adapter / WEIGHTS_NAME, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                bare = name.removeprefix("base_model.model.")
                if bare.endswith(".lora_A.weight"):
                    ranks[bare.removesuffix(".lora_A.weight")] = int(file.get_slice(name).get_shape()[0])
                elif not bare.endswith(".lora_B.weight"):
                    others.append(bare)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{adapter}: cannot be read as an adapter: {error}") from error
    if model_config is None:
        return AdapterFacts(settings, ranks, tuple(others), "", 0)
    text = model_config.get_text_config()
    return AdapterFacts(settings, ranks, tuple(others), text.model_type, text.num_hidden_layers)


def config_at_hand(model: ModelSection) -> Any | None:
    """The configuration of a base that this machine has; None where it would have to be downloaded or trusted."""
    from transformers import AutoConfig

    if model.gguf_file is not None and not Path(model.name).expanduser().is_dir():
        return None
    try:
        source = find_model(model)
        return AutoConfig.from_pretrained(source.location, revision=source.revision, local_files_only=True)
    except Exception:  # whatever the library raises for what is not there
        return None


def lint_vllm(facts: AdapterFacts) -> list[Finding]:
    """Every reason for which vLLM refuses the adapter, or serves something else than was trained."""
    findings = [*_lint_kind(facts), *_lint_parts(facts), *_lint_scales(facts)]
    if facts.model_type in VLLM_WITHOUT_LORA:
        findings.append(Finding(f"vLLM serves {facts.model_type} models without adapters only"))
    findings += _lint_layers(facts, VLLM_LAYERS.get(facts.model_type))
    if facts.ranks and max(facts.ranks.values()) > VLLM_RANKS[-1]:
        rank = max(facts.ranks.values())
        findings.append(
            Finding(f"rank {rank} is above vLLM's largest, {VLLM_RANKS[-1]}", "train with a smaller adapter.rank")
        )
    return findings


def lint_tgi(facts: AdapterFacts) -> list[Finding]:
    """Every reason for which TGI refuses the adapter, or leaves parts of it out with a warning in its log."""
    findings = [*_lint_kind(facts), *_lint_parts(facts), *_lint_scales(facts)]
    if facts.model_type not in TGI_MODELS:
        known = ", ".join(sorted(TGI_MODELS))
        findings.append(Finding(f"TGI serves {facts.model_type} models without adapters; with them {known}"))
        return findings
    findings += _lint_layers(facts, _DECODER_LAYERS)
    findings += _lint_uniform(facts)
    if facts.ranks and max(facts.ranks.values()) > TGI_MAX_RANK:
        rank = max(facts.ranks.values())
        findings.append(
            Finding(
                f"rank {rank} is above {TGI_MAX_RANK}, where TGI's kernels end", "train with a smaller adapter.rank"
            )
        )
    return findings


def vllm_rank(facts: AdapterFacts) -> int:
    """The smallest --max-lora-rank that the adapter fits in."""
    return next(step for step in VLLM_RANKS if step >= max(facts.ranks.values()))


def vllm_command(base: str, revision: str | None, name: str, adapter: Path, facts: AdapterFacts) -> str:
    """The command that serves base and adapter with vLLM, in the chat template that was trained with."""
    parts = ["vllm", "serve", base, *(["--revision", revision] if revision else []), "--enable-lora"]
    if (adapter / "tokenizer_config.json").is_file():
        parts += ["--tokenizer", str(adapter.absolute())]  # else the base's own template is filled
    parts += ["--lora-modules", f"{name}={adapter.absolute()}", "--max-lora-rank", str(vllm_rank(facts))]
    return shlex.join(parts)


def tgi_command(base: str, revision: str | None, name: str, adapter: Path, facts: AdapterFacts) -> str:
    """The command that serves base and adapter with TGI; requests then name it as `adapter_id`."""
    parts = ["text-generation-launcher", "--model-id", base, *(["--revision", revision] if revision else [])]
    return shlex.join([*parts, "--lora-adapters", f"{name}={adapter.absolute()}"])


def require_clean(server: str, adapter: Path, run: str, findings: list[Finding]) -> None:
    """Refuse an adapter with findings.

    Raises:
        BadInputError: there are any; the message holds each with its remedy, and the one that helps always.
    """
    if not findings:
        return
    lines = [f"  - {finding.what}" + (f"; {finding.remedy}" if finding.remedy else "") for finding in findings]
    merge = _MERGE.format(run=shlex.quote(run))
    raise BadInputError("\n".join([f"{adapter}: {server} cannot serve this adapter:", *lines, f"  {merge}"]))


def _lint_kind(facts: AdapterFacts) -> list[Finding]:
    """What the configuration says: kinds of adapters that neither server knows."""
    settings = facts.settings
    kind = settings.get("peft_type")
    if kind != "LORA":
        return [Finding(f"peft_type {kind} is not LORA")]
    checks: list[tuple[Any, str]] = [
        (settings.get("use_dora"), "it is a DoRA adapter (use_dora)"),
        (settings.get("modules_to_save"), f"modules_to_save: {_listed(settings.get('modules_to_save'))} trained whole"),
        (settings.get("trainable_token_indices"), "trainable_token_indices: embeddings of single tokens"),
        (settings.get("bias", "none") != "none", f"bias: {settings.get('bias')} changes biases of the base"),
        (settings.get("lora_bias"), "lora_bias: its matrices have biases"),
        (settings.get("fan_in_fan_out"), "fan_in_fan_out: its layers store their weights transposed"),
        (settings.get("layer_replication"), "layer_replication: the base's layers are repeated"),
        (settings.get("alora_invocation_tokens"), "alora_invocation_tokens: it is an activated LoRA"),
    ]
    if init := init_off_the_base(settings):
        what = (
            f"init_lora_weights: {init} took its initial values off the base's weights, which are served as published"
        )
        checks.append((True, what))
    return [Finding(what) for is_set, what in checks if is_set]


def _lint_parts(facts: AdapterFacts) -> list[Finding]:
    """What the weights hold besides LoRA matrices of inner layers."""
    findings = []
    head = sorted(facts.layers & {"lm_head", "embed_tokens"})
    if head or any("lora_embedding" in name for name in facts.others):
        layers = " and ".join(head) or "embed_tokens"
        findings.append(
            Finding(f"it adapts {layers}", f"train with adapter.exclude_modules: [{', '.join(head) or 'embed_tokens'}]")
        )
    known = ("lora_embedding", "lora_magnitude_vector", "token_adapter", ".base_layer.")
    whole = facts.settings.get("modules_to_save")
    strange = [name for name in facts.others if not any(part in name for part in known)]
    if strange and not whole:
        findings.append(Finding(f"its weights hold {len(strange)} tensors that are no LoRA matrices ({strange[0]})"))
    if not facts.ranks:
        findings.append(Finding("its weights hold no LoRA matrices"))
    return findings


def _lint_scales(facts: AdapterFacts) -> list[Finding]:
    """Servers scale every layer by the configuration's one alpha and r; patterns must come out the same."""
    settings = facts.settings
    if settings.get("peft_type") != "LORA" or not (settings.get("rank_pattern") or settings.get("alpha_pattern")):
        return []
    from finetune.export.gguf_lora import module_scale

    rank = settings["r"]
    served = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    wrong = [
        module for module, own in facts.ranks.items() if not math.isclose(module_scale(settings, module, own), served)
    ]
    if not wrong:
        return []
    return [
        Finding(
            f"rank_pattern and alpha_pattern scale {len(wrong)} layers apart ({wrong[0]}), "
            f"and the server would scale all by {served:g}",
            "train with an alpha_pattern that keeps alpha / rank the same",
        )
    ]


def _lint_layers(facts: AdapterFacts, known: frozenset[str] | None) -> list[Finding]:
    if known is None:
        return []
    unknown = sorted(facts.layers - known - {"lm_head", "embed_tokens"})
    if not unknown:
        return []
    accepted = ", ".join(sorted(known))
    return [Finding(f"it adapts {', '.join(unknown)}; known layers of {facts.model_type} are {accepted}")]


def _lint_uniform(facts: AdapterFacts) -> list[Finding]:
    """TGI stacks a kind of layer over the model: each must be adapted in all layers, with one rank."""
    by_layer: dict[str, list[int]] = {}
    for module, rank in facts.ranks.items():
        by_layer.setdefault(module.rpartition(".")[2], []).append(rank)
    findings = []
    for layer, ranks in sorted(by_layer.items()):
        if layer in _DECODER_LAYERS and len(ranks) != facts.num_layers:
            findings.append(
                Finding(
                    f"{layer} is adapted in {len(ranks)} of {facts.num_layers} layers, and TGI then drops all of them",
                    "train without layers_to_transform or patterns of layer numbers",
                )
            )
        elif len(set(ranks)) > 1:
            findings.append(
                Finding(f"{layer} has ranks {_listed(sorted(set(ranks)))}", "give each kind of layer one rank")
            )
    return findings


def _listed(values: Any) -> str:
    return ", ".join(map(str, values or []))


Linter = Callable[[AdapterFacts], list[Finding]]
Command = Callable[[str, "str | None", str, Path, AdapterFacts], str]
SERVERS: dict[str, tuple[str, Linter, Command]] = {
    "vllm": ("vLLM", lint_vllm, vllm_command),
    "tgi": ("Text Generation Inference", lint_tgi, tgi_command),
}
