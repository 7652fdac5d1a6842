"""The recipe: every key, its type and its default. Nothing else in the project holds a default.

Pydantic v2, strict and frozen; never imports torch, so that `--help`, `schema` and editors stay fast.
The description of a field is what users read in the README's table and in their editor.
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

NonEmpty = Annotated[str, Field(min_length=1)]
PositiveInt = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Precision = Literal["32-true", "bf16-true", "bf16-mixed", "16-mixed"]


def _no_number(value: Any) -> Any:
    """pydantic takes a number for seconds since 1970."""
    if isinstance(value, datetime.date) or re.match(r"\d{4}-", str(value)):
        return value
    raise ValueError("no date")


Day = Annotated[datetime.date, Field(strict=False), BeforeValidator(_no_number)]

QUANTIZED_4BIT = ("nf4", "fp4")


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values are not coerced, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)

    def differs(self, key: str) -> bool:
        """Whether a key's value is another than its default."""
        return bool(getattr(self, key) != type(self).model_fields[key].default)


class ModelSection(Section):
    """The base model and how it is loaded."""

    name: NonEmpty = Field(
        description="Hub id (org/name), local directory, a .gguf file, or package://PACKAGE/FILE.gguf for a "
        "file that an installed Python package carries."
    )
    revision: NonEmpty | None = Field(None, description="Branch, tag or commit of a hub model.")
    gguf_file: NonEmpty | None = Field(None, description="The GGUF file to take from a hub id or directory.")
    tokenizer: NonEmpty | None = Field(None, description="Hub id or directory of the tokenizer, if not the model's.")
    quantization: Literal["nf4", "fp4", "int8", "none"] = Field(
        "none", description="How the frozen base is stored while training: nf4 is QLoRA."
    )
    double_quant: bool = Field(True, description="Quantize the 4-bit scales too (saves 0.4 bits a weight).")
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="The dtype that 4-bit weights are expanded to for a product; "
        "auto is fp16 under training.precision 16-mixed, else bf16.",
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Dtype of unquantized base weights; auto follows training.precision."
    )
    attention: Literal["auto", "segments", "sdpa", "eager", "flash_attention_2", "flex_attention"] = Field(
        "auto", description="Attention implementation; auto picks the fastest that can isolate packed samples."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that the model's repository carries.")


class LoraSection(Section):
    """LoRA (Hu et al. 2021) as PEFT stores it."""

    method: Literal["lora"] = Field("lora", description="The adapter's kind.")
    rank: PositiveInt = Field(16, description="Rank r of every update.")
    alpha: Annotated[float, Field(gt=0)] = Field(32, description="The update is scaled by alpha / rank.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout on the adapter's input.")
    target_modules: Literal["all-linear"] | list[NonEmpty] = Field(
        "all-linear", description="all-linear, or names of linear layers such as query_key_value."
    )
    exclude_modules: list[NonEmpty] = Field([], description="Names left out of target_modules.")
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (Kalajdzievski 2023).")
    use_dora: bool = Field(False, description="Train magnitude and direction apart (Liu et al. 2024).")
    init: (
        Literal["default", "gaussian", "orthogonal", "pissa", "olora"]
        | Annotated[str, Field(pattern=r"^pissa_niter_\d+$")]
    ) = Field("default", description="Initial values, by PEFT's names; pissa and olora need an unquantized base.")
    start_from: NonEmpty | None = Field(
        None,
        description="An adapter to go on from with new data, instead of fresh values: the directory of an adapter, a "
        "finished run or a checkpoint, or hf://ORG/NAME. Rank and scale must be its own.",
    )
    modules_to_save: list[NonEmpty] = Field([], description="Modules trained whole and saved with the adapter.")
    trainable_tokens: list[NonEmpty | int] = Field(
        [], description="Tokens (text or id) whose embeddings are trained; unknown text is added as a new token."
    )
    rank_pattern: dict[NonEmpty, PositiveInt] = Field({}, description="Module name (regex) to its own rank.")
    alpha_pattern: dict[NonEmpty, Annotated[float, Field(gt=0)]] = Field(
        {}, description="Module name (regex) to its own alpha."
    )

    @property
    def rewrites_base(self) -> bool:
        """Whether the initial values are taken off the base's weights, so that switching it off gives no base."""
        return self.init.startswith(("pissa", "olora"))


# Further adapters (IA3, prefix, LLaMA-Adapter) join as a union discriminated by `method`.
AdapterSection = LoraSection


class SourceSection(Section):
    """Where rows come from and what their columns mean."""

    path: NonEmpty = Field(
        description="A json, jsonl, csv, tsv, parquet or txt file, a folder or glob of them, or a hub data set's id. "
        "A relative path is relative to the recipe."
    )
    name: NonEmpty | None = Field(None, description="Configuration of a hub data set.")
    revision: NonEmpty | None = Field(None, description="Branch, tag or commit of a hub data set.")
    split: NonEmpty = Field("train", description="Split of a hub data set.")
    format: Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion", "text"] = Field(
        "auto", description="The rows' shape; auto tells it from the columns and says so."
    )
    columns: dict[str, str] = Field(
        {}, description="The format's field to your column, e.g. {instruction: question, output: answer}."
    )
    weight: Annotated[float, Field(gt=0, le=100_000)] = Field(
        1.0, description="Passes over this source per epoch: 2.0 shows each row twice, 0.5 a seeded half."
    )
    max_rows: PositiveInt | None = Field(None, description="Only the first rows.")


class ValidationSection(Section):
    """Held-out rows for validation loss and best checkpoints."""

    source: SourceSection | None = Field(None, description="A source of its own; else rows are split off.")
    size: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Rows split off training data: a share below 1, a count from 1; 0 for none."
    )

    @property
    def has_rows(self) -> bool:
        """Whether any rows are held out."""
        return self.source is not None or self.size > 0


class DataSection(Section):
    """Training data: sources, how they are rendered and masked, how they are packed."""

    sources: Annotated[list[SourceSection], Field(min_length=1)] = Field(description="One or several sources.")
    template: str = Field(
        "auto", description="auto: the tokenizer's own chat template; else alpaca, chatml, plain, or a .jinja file."
    )
    template_variables: dict[str, bool | int | float | str] = Field(
        {}, description="What the chat template asks for, e.g. {enable_thinking: false}; kept in the saved template."
    )
    system: str | None = Field(None, description="System prompt for rows that carry none.")
    date: Day | None = Field(
        None, description="The day that a chat template which prints the date prints; default the run's first."
    )
    train_on: Literal["last_assistant", "all_assistant", "everything"] = Field(
        "all_assistant", description="Which tokens carry loss; an assistant turn includes its end-of-turn token."
    )
    max_seq_len: PositiveInt = Field(1024, description="Longest sample, in tokens.")
    over_length: Literal["drop", "truncate", "error"] = Field(
        "drop", description="What happens to longer samples; text rows are split in any case."
    )
    packing: Literal["auto", "none", "isolated", "shared_prefix"] = Field(
        "auto",
        description="Rows of several samples that cannot see each other; shared_prefix also computes a "
        "common beginning once. auto: shared_prefix where the data gains from it, else isolated; none where a model "
        "cannot isolate.",
    )
    max_tokens: PositiveInt | None = Field(
        None, description="Tokens of a packed row; default micro_batch_size x max_seq_len."
    )
    row_multiple: PositiveInt = Field(
        32,
        description="Packed rows are padded to a multiple of this. A CPU compiles and keeps kernels for every "
        "length: fewer lengths take less memory and time, more padding costs work.",
    )
    validation: ValidationSection = Field(ValidationSection(), description="Held-out rows.")
    max_rejected_share: Share = Field(0.0, description="Stop if more than this share of rows is malformed.")
    max_over_length_share: Share = Field(0.2, description="Stop if more than this share is over length.")
    num_workers: Annotated[int, Field(ge=0, le=1024)] | None = Field(
        None, description="Processes that render and tokenize; default one per core."
    )


class OptimizerSection(Section):
    """The optimizer of the trainable parameters."""

    name: Literal["adamw", "paged_adamw_8bit", "lion", "paged_lion_8bit", "adafactor"] = Field(
        "adamw", description="adamw is fused, adafactor is torch's, the others are bitsandbytes'."
    )
    lr: Annotated[float, Field(gt=0)] = Field(2e-4, description="Peak learning rate.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Decoupled weight decay.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Moment decay rates.", strict=False)
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Added to the denominator.")


class ScheduleSection(Section):
    """The learning rate over optimizer steps."""

    name: Literal["linear", "cosine", "constant"] = Field("cosine", description="Shape after the warm-up.")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(None, description="Steps of linear warm-up.")
    warmup_share: Share = Field(0.03, description="Warm-up as a share of all steps, if warmup_steps is not set.")
    min_lr_share: Share = Field(0.0, description="Final learning rate as a share of the peak.")


class TrainingSection(Section):
    """How long, how large, how precise."""

    epochs: Annotated[float, Field(gt=0, le=100_000)] | None = Field(None, description="Passes over the data.")
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps; with epochs, whichever ends first.")
    global_batch_size: PositiveInt = Field(16, description="Samples per optimizer step, over all devices.")
    micro_batch_size: PositiveInt = Field(4, description="Samples per forward pass; changes speed, not the result.")
    auto_micro_batch: bool = Field(
        False,
        description="Find the largest forward pass that a GPU's memory takes (samples, or tokens of a packed row).",
    )
    precision: Precision = Field(
        "bf16-mixed", description="Compute precision; trained parameters are fp32 in all of them."
    )
    optimizer: OptimizerSection = Field(OptimizerSection(), description="The optimizer.")
    schedule: ScheduleSection = Field(ScheduleSection(), description="The learning-rate schedule.")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(1.0, description="Clip gradients to this norm.")
    gradient_checkpointing: bool | Literal["auto"] | PositiveInt = Field(
        False,
        description="Recompute activations in the backward pass: less memory, slower. "
        "A number: of the first so many decoder layers. auto: of as few as the memory estimate lets fit.",
    )
    activation_offload: bool = Field(
        False, description="Keep activations in host memory until the backward pass: less GPU memory, slower."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Order, initial adapter and dropout follow from it."
    )
    compile: bool = Field(False, description="Compile the decoder layers, each for itself, with torch.compile.")
    on_non_finite: Literal["stop", "skip"] = Field("stop", description="What a NaN or infinite loss does.")
    on_out_of_memory: Literal["stop", "halve"] = Field(
        "stop", description="halve: redo the step in forward passes half as large, and keep to them."
    )
    num_workers: Annotated[int, Field(ge=0, le=256)] = Field(0, description="Processes that assemble batches.")


class DistributedSection(Section):
    """Devices and how the work is spread over them."""

    strategy: Literal["auto", "single", "ddp", "fsdp"] = Field(
        "auto", description="fsdp shards the frozen base and replicates the adapter."
    )
    accelerator: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is any.")
    devices: Annotated[int, Field(gt=0, le=256)] | Literal["auto"] = Field(
        "auto", description="Processes per machine; auto: every GPU."
    )
    num_nodes: PositiveInt = Field(1, description="Machines; torchrun and SLURM set it themselves.")
    cpu_offload: bool = Field(False, description="fsdp: keep the sharded base in host memory.")


class CheckpointSection(Section):
    """When work is saved and what is kept."""

    every_steps: PositiveInt | None = Field(100, description="Save every n optimizer steps.")
    every_minutes: Annotated[float, Field(gt=0)] | None = Field(None, description="Save every n minutes as well.")
    keep_last: PositiveInt = Field(2, description="Newest checkpoints kept.")
    keep_best: Annotated[int, Field(ge=0)] = Field(
        1, description="Best by validation loss, saved where they are met and kept besides."
    )
    final: Literal["auto", "best", "last"] = Field(
        "auto",
        description="Whose weights the final adapter has: last, or best by validation loss; "
        "auto is best with evaluation.early_stopping, else last.",
    )
    grace_seconds: Annotated[float, Field(gt=0, le=86_400)] = Field(
        30.0, description="Time to finish the step after a signal; then the run ends with its last checkpoint."
    )


class EarlyStoppingSection(Section):
    """Stop when validation loss no longer falls."""

    patience: PositiveInt = Field(3, description="Validations without improvement before stopping.")
    min_delta: Annotated[float, Field(ge=0)] = Field(0.0, description="What counts as an improvement.")


class EvaluationSection(Section):
    """Validation while training, and task metrics before and after."""

    every_steps: PositiveInt | None = Field(None, description="Validation loss and samples every n steps.")
    early_stopping: EarlyStoppingSection | None = Field(None, description="Stop early on validation loss.")
    source: SourceSection | None = Field(None, description="Test rows for the metrics; default: validation rows.")
    metrics: list[Literal["perplexity", "exact_match", "valid_json", "token_f1", "gsm8k_answer"]] = Field(
        ["perplexity"], description="Measured before and after training."
    )
    before: bool = Field(True, description="Measure the bare base as well.")
    max_rows: PositiveInt | None = Field(None, description="Only the first test rows.")
    batch_size: PositiveInt = Field(32, description="Prompts generated at once.")
    max_new_tokens: PositiveInt = Field(128, description="Longest completion.")
    num_samples: Annotated[int, Field(ge=0)] = Field(3, description="Completions shown side by side.")

    @property
    def task_metrics(self) -> list[str]:
        """The metrics that compare completions with answers."""
        return [name for name in self.metrics if name != "perplexity"]


class MergeSection(Section):
    """Adapter and base as one model, and how far it may be from the adapter."""

    base: Literal["auto", "original", "dequantized"] = Field(
        "auto",
        description="What the adapter is added to: the published weights, or what a quantized base stood for. "
        "auto: what the adapter was trained on.",
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Dtype of the merged weights; auto is that of the base in training."
    )
    max_kl: Annotated[float, Field(ge=0)] = Field(
        0.01, description="Largest mean KL divergence (nats) from the adapter, on held-out rows."
    )
    max_kl_original: Annotated[float, Field(ge=0)] = Field(
        0.1, description="The same for a quantized run that is merged into the published weights."
    )
    min_agreement: Share = Field(0.9, description="Smallest share of positions with the adapter's most likely token.")


class LoggingSection(Section):
    """Where numbers go; metrics.csv is always written."""

    every_steps: PositiveInt = Field(10, description="Log every n optimizer steps.")
    trackers: list[Literal["wandb", "tensorboard", "trackio"]] = Field(
        [], description="Any of them, besides metrics.csv; wandb is offline without a key, the others are local."
    )
    project: NonEmpty = Field("finetune", description="The tracker's project.")
    tags: list[str] = Field([], description="The tracker's tags.")
    log_adapter: bool = Field(False, description="Hand the final adapter to wandb and trackio as an artifact.")


class HubSection(Section):
    """Where the adapter is published."""

    repo_id: NonEmpty | None = Field(None, description="org/name on the Hub.")
    push: bool = Field(False, description="Push at the end; access is tried before the first step.")
    private: bool = Field(True, description="Create the repository as private.")


class Recipe(Section):
    """One fine-tuning run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="The run's name; its directory is output_dir / name."
    )
    output_dir: str = Field("runs", description="Parent of run directories, relative to the working directory.")
    model: ModelSection = Field(description="The base model.")
    adapter: AdapterSection = Field(LoraSection(), description="What is trained.")
    data: DataSection = Field(description="What it is trained on.")
    training: TrainingSection = Field(description="How it is trained.")
    distributed: DistributedSection = Field(DistributedSection(), description="Devices.")
    checkpoint: CheckpointSection = Field(CheckpointSection(), description="Saved work.")
    evaluation: EvaluationSection = Field(EvaluationSection(), description="Measurements.")
    merge: MergeSection = Field(MergeSection(), description="Merging the adapter into the base.")
    logging: LoggingSection = Field(LoggingSection(), description="Trackers.")
    hub: HubSection = Field(HubSection(), description="Publishing.")

    @property
    def is_derived(self) -> bool:
        """Whether it stands for an adapter of another program, of whose data nothing is known."""
        return not self.data.sources

    @property
    def ends_with_best(self) -> bool:
        """Whether the final adapter is that of the lowest validation loss."""
        if self.checkpoint.final == "auto":
            return self.evaluation.early_stopping is not None
        return self.checkpoint.final == "best"

    @property
    def num_best_kept(self) -> int:
        """Checkpoints that are kept for their validation loss."""
        return max(self.checkpoint.keep_best, int(self.ends_with_best))

    @property
    def run_path(self) -> Path:
        """The run's directory."""
        return Path(self.output_dir) / self.name
