"""Loading a base model and its tokenizer as the recipe says: dtype, quantization, attention."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from finetune.console import say
from finetune.errors import ModelError, first_line
from finetune.kernels import attention
from finetune.kernels.products import multiply_in_fp32
from finetune.machine import is_out_of_memory, naming_out_of_memory
from finetune.models.attention import loadable_attention
from finetune.models.progress import library_bars
from finetune.models.sources import ModelSource, unreachable
from finetune.recipe.schema import QUANTIZED_4BIT, ModelSection

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRECISION_DTYPES = {"32-true": "fp32", "bf16-true": "bf16", "bf16-mixed": "bf16", "16-mixed": "fp16"}
LESS_FOR_LOADING = (
    "model.quantization: nf4 takes about a quarter of the memory of unquantized weights; over several GPUs, "
    "distributed.strategy: fsdp splits them. `finetune check RECIPE` says what a run needs."
)


def quiet_libraries() -> None:
    """Keep progress bars and advice of the libraries off the screen; our own messages say what matters."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Importing Lightning sets its own loggers' levels again, but not those of the modules below.
    modules = ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.distributed")
    for name in ("pytorch", "fabric", *modules):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    logging.getLogger("lightning").setLevel(logging.WARNING)
    # Its one message is why it kills this process: another rank's end, by which signal or code.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # the same that the base has
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def load_tokenizer(model: ModelSection, source: ModelSource) -> Any:
    """The tokenizer; where it has no pad token, one that is never a label takes its place, else EOS.

    Raises:
        ModelError: if there is none, or it has no end-of-sequence token.
    """
    location = model.tokenizer or source.location
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            location,
            revision=None if model.tokenizer else source.revision,
            trust_remote_code=model.trust_remote_code,
        )
    except Exception as error:
        raise _tokenizer_error(location, error) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model.tokenizer: {location} has no end-of-sequence token, so a model could never stop")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_error(location: str, error: Exception) -> ModelError:
    return ModelError(
        f"model.tokenizer: cannot load a tokenizer from {location}: {first_line(error).rstrip(': ')}\n"
        "  Name one with model.tokenizer, a hub id or a directory that holds tokenizer.json."
    )


def load_config(model: ModelSection, source: ModelSource) -> Any:
    """The model's configuration, without weights."""
    try:
        return AutoConfig.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:
        raise unreachable(source.name, error) from error


def context_length(config: Any) -> int | None:
    """How many tokens the model was made for, with what its rotary positions are stretched by; None: no limit is told.

    Learned positions end there; rotary ones go on, but say nothing that was trained. ALiBi and the state of RWKV have
    no end, though their configurations hold a number; XLNet's is -1.
    """
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    endless = getattr(text, "alibi", False) or text.model_type.startswith("rwkv")
    if not isinstance(longest, int) or longest <= 0 or endless:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or longest
    return max(longest, int(original * (rope.get("factor") or 1)))


def base_dtype(model: ModelSection, precision: str) -> torch.dtype:
    """Dtype of unquantized base weights: the recipe's, else what the precision computes in."""
    return DTYPES[PRECISION_DTYPES[precision] if model.dtype == "auto" else model.dtype]


def compute_dtype(model: ModelSection, precision: str) -> str:
    """The recipe's name of the dtype that 4-bit weights are expanded to."""
    if model.compute_dtype != "auto":
        return model.compute_dtype
    return "fp16" if precision == "16-mixed" else "bf16"


def stored_as(model: ModelSection, precision: str) -> str:
    """How the base's weights are kept, for a reader: `nf4`, `bfloat16`."""
    dtype = str(base_dtype(model, precision)).removeprefix("torch.")
    return dtype if model.quantization == "none" else model.quantization


def quantization_config(model: ModelSection, precision: str, *, shardable: bool) -> BitsAndBytesConfig | None:
    """bitsandbytes' settings; `shardable` stores 4-bit weights as bf16 words, which FSDP can split."""
    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if model.quantization in QUANTIZED_4BIT:
        import finetune.models.four_bit  # noqa: F401

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=model.quantization,
            bnb_4bit_use_double_quant=model.double_quant,
            bnb_4bit_compute_dtype=DTYPES[compute_dtype(model, precision)],
            bnb_4bit_quant_storage=torch.bfloat16 if shardable else torch.uint8,
        )
    return None


@naming_out_of_memory("while the base was loaded", LESS_FOR_LOADING)
def load_base(
    model: ModelSection,
    source: ModelSource,
    *,
    precision: str,
    attention_name: str,
    device: torch.device | str = "cpu",
    shardable: bool = False,
    announce: bool = True,
) -> torch.nn.Module:
    """The base model on `device`, frozen, in training mode, its key-value cache off.

    Raises:
        ModelError: if it cannot be found or its files are damaged.
        OutOfMemory: if it does not fit.
    """
    register_attention()
    use_plain_linears()
    if torch.device(device).type == "cpu":
        multiply_in_fp32()
    if announce:
        say(f"loading {source.name} ({stored_as(model, precision)})")
    attention_name = loadable_attention(load_config(model, source), attention_name)
    settings = quantization_config(model, precision, shardable=shardable)
    try:
        with library_bars():
            base = AutoModelForCausalLM.from_pretrained(
                source.location,
                revision=source.revision,
                dtype=base_dtype(model, precision),
                **({} if settings is None else {"quantization_config": settings}),  # None: not even the base's own
                attn_implementation=attention_name,
                device_map={"": device},
                trust_remote_code=model.trust_remote_code,
                use_safetensors=None,
            )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if is_out_of_memory(RuntimeError(_noted_by_loader(error))):
            raise MemoryError from error
        raise unreachable(source.name, error) from error
    _require_quantized(base, model)
    if model.quantization != "none" and not shardable:  # processes share the file of a sharded base
        _let_go_of_files(base)
    # from_pretrained returns eval mode; in it, bitsandbytes repacks 4-bit weights on CPU for inference only.
    base.train()
    base.requires_grad_(False)
    base.config.use_cache = False
    loaded: torch.nn.Module = base
    return loaded


def _noted_by_loader(error: BaseException) -> str:
    """What transformers has noted of errors in quantizing weights: it raises another, which does not say them."""
    trace = error.__traceback__
    while trace is not None:
        noted = getattr(trace.tb_frame.f_locals.get("loading_info"), "conversion_errors", None)
        if noted:
            return "\n".join(str(each) for each in noted.values())
        trace = trace.tb_next
    return ""


def _let_go_of_files(base: Any) -> None:
    """Copy what was not quantized: one tensor that lies in a mapped file keeps the whole unquantized file resident."""
    for parameter in base.parameters():
        if type(parameter) is torch.nn.Parameter and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def fit_vocabulary(base: Any, tokenizer: Any, *, seed: int) -> None:
    """Give `base` a row for every token of `tokenizer`; rows are never removed."""
    resize_vocabulary(base, max(len(tokenizer), base.get_input_embeddings().weight.shape[0]), seed=seed)


def resize_vocabulary(base: Any, rows: int, *, seed: int) -> None:
    """Give embedding and head so many rows.

    New rows are drawn around the mean of the old ones: from `seed`, on the CPU, so that a resumed or reloaded run has
    the same on any device.
    """
    weight = base.get_input_embeddings().weight
    if rows != weight.shape[0]:
        device = weight.device
        _move_vocabulary(base, torch.device("cpu"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            base.resize_token_embeddings(rows)
        _move_vocabulary(base, device)


def _move_vocabulary(base: Any, device: torch.device) -> None:
    for part in (base.get_input_embeddings(), base.get_output_embeddings()):
        part.to(device)


def register_attention() -> None:
    """Make `segments` known to transformers, and to Falcon, which has a table of its own."""
    from finetune.models import falcon

    attention.register()
    falcon.register()


def use_plain_linears() -> None:
    """Let Falcon build torch's Linear: only that exact class is quantized, and its own has the same forward."""
    from transformers.models.falcon import modeling_falcon

    modeling_falcon.FalconLinear = torch.nn.Linear


def _require_quantized(base: Any, model: ModelSection) -> None:
    """Refuse a model of which a layer that should be quantized is not: it would take four times the memory.

    Raises:
        ModelError: naming such a layer.
    """
    if model.quantization == "none":
        return
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    kept = set(base.hf_quantizer.modules_to_not_convert or ())
    for name, module in base.named_modules():
        if not isinstance(module, torch.nn.Linear) or isinstance(module, Linear4bit | Linear8bitLt):
            continue
        if module is not base.get_output_embeddings() and not any(part in name for part in kept):
            raise ModelError(
                f"model.quantization: {model.quantization} did not reach the layer {name} "
                f"({type(module).__name__}); use model.quantization: none for this model"
            )
