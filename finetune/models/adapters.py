"""Adapters: attaching them to a base model, finding their targets, reading and writing them in PEFT's format."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from finetune.console import warn
from finetune.errors import ModelError
from finetune.models.heads import decoder_of
from finetune.models.whole_modules import cast_whole_modules
from finetune.recipe.schema import LoraSection

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"

TRAINED_ROWS = "trainable_tokens_delta"
_INIT = {"default": True}
# PEFT's initial values that are taken off the base's weights; saved as they are, they fit only that changed base.
# An adapter that PEFT has converted (`path_initial_model_for_weight_conversion`) says true instead.
_OFF_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Models whose fused kernels read out_proj's weight and pass its forward by, so that PEFT refuses an adapter there.
# Source: PEFT, `peft.tuners.tuners_utils._check_lora_target_modules_mamba`.
_PASS_OUT_PROJ_BY = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")


def attach_adapter(base: Any, adapter: LoraSection, tokenizer: Any, *, seed: int) -> PeftModel:
    """Wrap `base` with a fresh adapter: fp32, the only trainable parameters, the same values for the same seed.

    Raises:
        ModelError: if a target is not in the model; the message lists what is. Or if PEFT refuses the combination.
    """
    config = build_config(base, adapter, tokenizer)
    head = base.get_output_embeddings()
    linears = [name for name, module in base.named_modules() if _is_linear(module) and module is not head]
    try:
        model = wrap_base(base, config, seed=seed)
    except (ValueError, AttributeError) as error:  # the latter of initial values off weights that experts lack
        raise ModelError(
            f"adapter: PEFT does not train {base.config.model_type} so: {error}\n"
            "  Choose other layers by adapter.target_modules or exclude_modules, or leave out what it names."
        ) from error
    _warn_of_passed_over(model, adapter, linears)
    return model


def wrap_base(base: Any, config: LoraConfig, *, seed: int) -> PeftModel:
    """`attach_adapter` by PEFT's own configuration.

    Raises:
        ValueError, AttributeError: PEFT refuses it for this model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base, config)
    for parameter in trainable_parameters(model):
        parameter.data = parameter.data.float()
    cast_whole_modules(model)
    model.train()
    return model


def _warn_of_passed_over(model: PeftModel, adapter: LoraSection, linears: list[str]) -> None:
    """PEFT takes names such as gate_proj for those of experts where there are any, and passes linear layers by."""
    parameters = model.peft_config["default"].target_parameters
    wanted = None if adapter.target_modules == "all-linear" else adapter.target_modules
    left = [
        name
        for name in linears
        if not isinstance(model.get_base_model().get_submodule(name), LoraLayer)
        and (wanted is None or any(_is_named(name, target) for target in wanted))
        and not any(_is_named(name, target) for target in adapter.exclude_modules)
    ]
    if parameters and left:
        warn(
            f"adapter.target_modules: PEFT trains the experts of this model ({', '.join(sorted(parameters))}) in place "
            f"of linear layers that are named as theirs: {len(left)} have no adapter, such as {left[0]}"
        )


def build_config(base: Any, adapter: LoraSection, tokenizer: Any) -> LoraConfig:
    """PEFT's configuration for the recipe's adapter, its targets checked against the model's modules."""
    names = [name for name, _ in base.named_modules()]
    if adapter.target_modules != "all-linear":
        _require_modules("adapter.target_modules", adapter.target_modules, names, linear_names(base))
    _require_modules("adapter.modules_to_save", adapter.modules_to_save, names, _top_names(names))
    indices = token_indices(adapter, tokenizer)
    num_rows = base.get_input_embeddings().weight.shape[0]
    for index in indices:
        if not 0 <= index < num_rows:
            raise ModelError(
                f"adapter.trainable_tokens: {index} is no token of the model, which has {num_rows:,}; "
                "write the token's text, or an id below that"
            )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=text_targets(base, adapter.target_modules),
        exclude_modules=adapter.exclude_modules or None,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        init_lora_weights=_INIT.get(adapter.init, adapter.init),
        modules_to_save=adapter.modules_to_save or None,
        trainable_token_indices=indices or None,
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
    )


def init_off_the_base(settings: Mapping[str, Any]) -> str | None:
    """The initial values of an adapter's configuration, if the base's published weights are not those it needs."""
    init = settings.get("init_lora_weights")
    return init if isinstance(init, str) and init.startswith(_OFF_THE_BASE) else None


def text_targets(base: Any, wanted: Literal["all-linear"] | list[str]) -> Literal["all-linear"] | list[str]:
    """The adapter's targets: full names where PEFT would reach more, as images' encoders and routers of experts."""
    routes = wanted == "all-linear" and any(_is_of_its_own_kind(module) for module in base.modules())
    passed_by = wanted == "all-linear" and base.config.model_type in _PASS_OUT_PROJ_BY
    if base.config.get_text_config() is base.config and not routes and not passed_by:
        return wanted
    head = base.get_output_embeddings()
    inner = {id(module) for module in decoder_of(base).modules()} | {id(head)}
    modules = [(name, module) for name, module in base.named_modules() if id(module) in inner]
    if wanted == "all-linear":
        found = [name for name, module in modules if _is_linear(module) and module is not head]
        return [name for name in found if not passed_by or not _is_named(name, "out_proj")]
    return [name for name, _ in modules if any(_is_named(name, target) for target in wanted)] or wanted


def linear_names(base: Any) -> list[str]:
    """Short names of the linear layers that an adapter can target, output head excepted."""
    return _top_names(_linear_layers(base))


def _linear_layers(base: Any) -> list[str]:
    """Full names of what all-linear stands for."""
    targets = text_targets(base, "all-linear")
    if targets != "all-linear":
        return targets
    head = base.get_output_embeddings()
    return [name for name, module in base.named_modules() if _is_linear(module) and module is not head]


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear | Conv1D) and not _is_of_its_own_kind(module)


def _is_of_its_own_kind(module: torch.nn.Module) -> bool:
    """Whether a model's own class makes more of a linear layer than its product, as routers that choose experts do."""
    kind = type(module)
    if not isinstance(module, torch.nn.Linear) or kind.forward is torch.nn.Linear.forward:
        return False
    # Quantized layers are a library's; Falcon's own computes the same (`load.use_plain_linears`).
    is_a_models = kind.__module__.startswith(("transformers.models.", "transformers_modules."))
    return is_a_models and kind.__name__ != "FalconLinear"


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _top_names(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names if name and not name.rpartition(".")[2].isdigit()})


def _require_modules(key: str, wanted: Iterable[str], names: list[str], candidates: list[str]) -> None:
    for target in wanted:
        if not any(_is_named(name, target) for name in names):
            raise _no_module(key, target, candidates)


def _no_module(key: str, target: str, candidates: list[str]) -> ModelError:
    near = difflib.get_close_matches(target, candidates, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "."
    return ModelError(f"{key}: the model has no module {target}{hint} It has: {', '.join(candidates)}")


def require_names(base: Any, adapter: LoraSection) -> None:
    """Look for what `adapter` names, exclusions and patterns included, which PEFT passes over where they match nothing.

    Raises:
        ModelError: if something is not in the model; the message lists what is.
    """
    build_config(base, adapter.model_copy(update={"trainable_tokens": []}), None)
    names, candidates = [name for name, _ in base.named_modules()], linear_names(base)
    _require_modules("adapter.exclude_modules", adapter.exclude_modules, names, candidates)
    _require_layers("adapter.exclude_modules", adapter.exclude_modules, base)
    _require_tokens_of_their_own(base, adapter)
    for key, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        if patterns:
            _require_matches(f"adapter.{key}", patterns, names, candidates, _targeted(base, adapter))


def _require_layers(key: str, wanted: Iterable[str], base: Any) -> None:
    """PEFT leaves out a module of just that name: what it holds keeps its adapters."""
    for target in wanted:
        found = [module for name, module in base.named_modules() if _is_named(name, target)]
        if all(list(module.children()) for module in found):
            layers = [f"{target}.{name}" for name, module in found[0].named_modules() if _is_linear(module)]
            raise ModelError(
                f"{key}: {target} is no layer but holds some, and would leave none of them out; "
                f"name the layers: {', '.join(layers)}"
            )


def _targeted(base: Any, adapter: LoraSection) -> list[str]:
    """Names of the modules that get an adapter; of experts all, whose parameters PEFT may take for layers."""
    targets = text_targets(base, adapter.target_modules)
    if targets == "all-linear":
        targets = _linear_layers(base)
    return [
        name
        for name, module in base.named_modules()
        if any(_is_named(name, target) for target in targets)
        or any(parameter.ndim > 2 for parameter in module.parameters(recurse=False))
        if not any(_is_named(name, excluded) for excluded in adapter.exclude_modules)
    ]


def _require_tokens_of_their_own(base: Any, adapter: LoraSection) -> None:
    """PEFT trains tokens in a tied head too, which it cannot where the head is trained whole."""
    head = base.get_output_embeddings()
    if head is None or head.weight is not base.get_input_embeddings().weight:
        return
    name = next(name for name, module in base.named_modules() if module is head)
    if adapter.trainable_tokens and any(_is_named(name, target) for target in adapter.modules_to_save):
        raise ModelError(
            f"adapter.trainable_tokens: the model's {name} is its embedding (their weights are tied), and "
            "adapter.modules_to_save trains it whole; remove it there, or remove trainable_tokens"
        )


def _require_matches(
    key: str, patterns: Iterable[str], names: list[str], candidates: list[str], targeted: list[str]
) -> None:
    """As PEFT matches them: the end of a name, from a dot on; it passes over a pattern that matches no target."""
    for pattern in patterns:
        try:
            matched = {name for name in names if re.match(rf"(.*\.)?({pattern})$", name)}
        except re.error as error:
            raise ModelError(f"{key}: {pattern} is no regular expression: {error}") from error
        if not matched:
            raise _no_module(key, pattern, candidates)
        if matched.isdisjoint(targeted):
            raise ModelError(
                f"{key}: {pattern} matches no layer that has an adapter (adapter.target_modules less exclude_modules); "
                f"those that have one: {', '.join(_top_names(targeted))}"
            )


def token_indices(adapter: LoraSection, tokenizer: Any) -> list[int]:
    """Ids of the recipe's trainable tokens; text that is no token yet is added to the tokenizer."""
    indices = []
    for token in adapter.trainable_tokens:
        if isinstance(token, int):
            indices.append(token)
            continue
        if token not in tokenizer.get_vocab():
            tokenizer.add_tokens([token], special_tokens=False)
        indices.append(tokenizer.convert_tokens_to_ids(token))
    return indices


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that training changes, in a fixed order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's live tensors under PEFT's names, where they are."""
    # The whole model's state would be collected otherwise, and that of a 4-bit base packed layer by layer.
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(model, trained, save_embedding_layers=False)
    return tensors


def adapter_state(model: PeftModel, name: str = "default") -> dict[str, torch.Tensor]:
    """An adapter's tensors under PEFT's names, on the CPU."""
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: tensor.detach().to("cpu").contiguous() for key, tensor in state.items()}


def save_adapter(model: PeftModel, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write the adapter as PEFT does: weights and configuration. `state` is what `adapter_state` returned."""
    save_weights(adapter_state(model) if state is None else state, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(config_text(model), encoding="utf-8")


def save_weights(state: dict[str, torch.Tensor], path: Path) -> None:
    """Write what `adapter_state` returned."""
    save_file(state, path, metadata={"format": "pt"})


def config_text(model: PeftModel) -> str:
    """The adapter's configuration as PEFT writes it."""
    config = model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    config["peft_version"] = peft.__version__
    # In the order given: PEFT takes the first of several rank patterns that match.
    return json.dumps(config, indent=2, default=_jsonable) + "\n"


def _jsonable(value: Any) -> Any:
    if isinstance(value, set):
        return sorted(value)
    return getattr(value, "value", str(value))


def load_adapter(model: PeftModel, folder: Path, name: str = "default") -> None:
    """Fill the attached adapter from `folder`, every key matched.

    Raises:
        ModelError: if a tensor is missing, unknown or of another shape (PEFT alone would only warn).
    """
    path = folder / WEIGHTS_NAME
    try:
        state = load_file(path)
    except Exception as error:
        raise ModelError(f"{path}: cannot be read as an adapter: {error}") from error
    own = adapter_state(model, name)
    state = _without_repeats(model, state, own)
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or unknown or shapes:
        raise ModelError(
            f"{path}: does not fit the model: {len(missing)} tensors missing ({', '.join(missing[:2])}), "
            f"{len(unknown)} unknown ({', '.join(unknown[:2])}), {len(shapes)} of another shape "
            f"({', '.join(sorted(shapes)[:2])})"
        )
    set_peft_model_state_dict(model, state, adapter_name=name)


def _without_repeats(model: PeftModel, state: dict[str, torch.Tensor], own: Iterable[str]) -> dict[str, torch.Tensor]:
    """`state` less what PEFT may save besides an adapter: values that the base has, and second names of its tensors."""
    more = state.keys() - set(own)
    of_base = {name: value for name, value in model.named_parameters(remove_duplicate=False) if name in more}
    rows = [state[name] for name in own if name.endswith(TRAINED_ROWS) and name in state]
    kept = dict(state)
    for name in more:
        twins = rows if name.endswith(TRAINED_ROWS) else [of_base.get(name)]  # rows of a tied head
        if ".modules_to_save." in name:
            twins = [state.get(name.replace(".modules_to_save.", "."))]
        if any(twin is not None and torch.equal(kept[name].to(twin), twin) for twin in twins):
            del kept[name]
    return kept
