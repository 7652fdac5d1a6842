"""How much memory a process of a run will take, by part, before anything is loaded. Formulas: docs/memory.md."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from finetune.kernels.cross_entropy import chunk_tokens
from finetune.kernels.layout import Group
from finetune.models.attention import choose_attention, packs
from finetune.models.footprint import Footprint, ForwardPass, between, measure_pass
from finetune.models.skeleton import adapt_skeleton, build_skeleton, target_counts
from finetune.models.weights import WeightBytes, count_weights, optimizer_bytes
from finetune.recipe.schema import Recipe

# A process that has imported what training imports, and has run one step on nothing; torch 2.13 on Linux.
LIBRARIES_BYTES = 580e6
# What the driver and torch's libraries take of a GPU before the first tensor. Not counted by torch's own peak.
CUDA_CONTEXT_BYTES = 500e6
# What the allocator holds beyond the tensors that are alive: on CUDA a share of a step's peak; on a CPU one of what a
# forward pass allocates and gives back, below the size that glibc maps by itself. torch asks for memory that begins a
# line of 64 bytes; glibc 2.36 takes no hole of just the size for that, and keeps it.
ALLOCATOR_SHARE = {"cpu": 0.2, "cuda": 0.05}
# Under FSDP: the layer that computes, and the next one, which is gathered meanwhile.
GATHERED_LAYERS = 2


@dataclass(frozen=True)
class Spread:
    """How a run is spread: `single`, `ddp` or `fsdp` over `world_size` processes of one kind."""

    strategy: str
    world_size: int
    accelerator: str  # cpu or cuda
    cpu_offload: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """One process of a run at its peak, in bytes; `parts` add up to `total`."""

    parts: dict[str, int]
    footprint: Footprint
    weights: WeightBytes
    step: ForwardPass
    spread: Spread

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Planner:
    """Estimates of one model under varied recipes; what they share is computed once."""

    config: Any

    def estimate(self, recipe: Recipe, spread: Spread, step: ForwardPass | None = None) -> MemoryEstimate:
        """The estimate for `recipe`; `step` is its largest forward pass, by default the largest that it allows.

        Raises:
            ModelError: if the model or the adapter's targets cannot be built without weights.
        """
        attention = choose_attention(self.config, recipe.model, recipe.data)
        step = step or largest_pass(self.config, recipe, attention)
        weights = self.weights(recipe)
        footprint = self._footprint(recipe, attention, step, on_cpu=spread.accelerator == "cpu")
        parts = parts_of(weights, footprint, recipe, spread)
        if spread.accelerator == "cpu" and recipe.model.quantization != "none":
            # The unquantized file stays mapped until the last layer is quantized; adapter and step come after it.
            loading = weights.num_parameters * _file_itemsize(self.config)
            loading += parts["quantization constants"] + parts["libraries"] + weights.base
            parts["loading, beyond a step"] = max(0, loading - sum(parts.values()))
        return MemoryEstimate(parts, footprint, weights, step, spread)

    @cached_property
    def _known(self) -> dict[str, Any]:
        return {}

    def weights(self, recipe: Recipe) -> WeightBytes:
        """Bytes of the weights and sizes of what is trained.

        Raises:
            ModelError: if a target is not in the model; the message lists what is.
        """
        return self._adapted(recipe)[0]

    def targets(self, recipe: Recipe) -> dict[str, int]:
        """The layers that the adapter reaches: how many of each short name."""
        return self._adapted(recipe)[1]

    def _adapted(self, recipe: Recipe) -> tuple[WeightBytes, dict[str, int]]:
        key = f"weights {recipe.model!r} {recipe.adapter!r} {recipe.training.precision}"
        if key not in self._known:
            base = build_skeleton(self.config, recipe.model, precision=recipe.training.precision)
            adapter = recipe.adapter.model_copy(update={"trainable_tokens": []})
            adapted = adapt_skeleton(base, adapter, None)
            self._known[key] = count_weights(adapted, recipe.model), target_counts(adapted)
        found: tuple[WeightBytes, dict[str, int]] = self._known[key]
        return found

    def _footprint(self, recipe: Recipe, attention: str, step: ForwardPass, on_cpu: bool) -> Footprint:
        wanted = recipe.training.gradient_checkpointing
        if wanted == "auto":
            wanted = True  # what takes the least, until it is settled
        if isinstance(wanted, bool):
            return self._measured(recipe, attention, step, on_cpu, wanted)
        kept, recomputed = (self._measured(recipe, attention, step, on_cpu, every) for every in (False, True))
        return between(kept, recomputed, min(1.0, wanted / self.num_layers))

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.config.get_text_config().num_hidden_layers)

    def _measured(
        self, recipe: Recipe, attention: str, step: ForwardPass, on_cpu: bool, checkpointing: bool
    ) -> Footprint:
        chosen = (recipe.model, recipe.adapter, recipe.training.precision, checkpointing, step, on_cpu)
        key = repr(chosen)
        if key not in self._known:
            self._known[key] = measure_pass(
                self.config,
                recipe.model,
                recipe.adapter,
                precision=recipe.training.precision,
                checkpointing=checkpointing,
                attention_name=attention,
                step=step,
                on_cpu=on_cpu,
            )
        found: Footprint = self._known[key]
        return found


def parts_of(weights: WeightBytes, footprint: Footprint, recipe: Recipe, spread: Spread) -> dict[str, int]:
    """Bytes by part for one process. Frozen weights are sharded under FSDP; everything else is on every device."""
    trained = 4 * weights.num_trainable
    on_cpu = spread.accelerator == "cpu"
    sharded = spread.strategy == "fsdp"
    offloaded = sharded and spread.cpu_offload and not on_cpu
    shards = spread.world_size if sharded else 1
    parts = {
        "base": 0 if offloaded else weights.base // shards,
        "quantization constants": weights.constants,
    }
    if sharded:
        layers = min(GATHERED_LAYERS, weights.num_blocks) * weights.largest_block
        parts["gathered layers"] = layers + weights.rest if shards > 1 or offloaded else 0
    parts |= {
        "adapter": trained,
        "gradients": trained,
        "optimizer state": optimizer_bytes(weights.trainable, recipe.training.optimizer),
        "activations": 0 if recipe.training.activation_offload and not on_cpu else int(footprint.kept),
        "temporaries": int(footprint.peak - footprint.kept + footprint.scratch),
        "allocator": int(ALLOCATOR_SHARE[spread.accelerator] * (footprint.passing if on_cpu else footprint.peak)),
    }
    parts["libraries" if on_cpu else "CUDA context"] = int(LIBRARIES_BYTES if on_cpu else CUDA_CONTEXT_BYTES)
    return parts


def _file_itemsize(config: Any) -> int:
    dtype = getattr(config, "dtype", None)
    return int(getattr(dtype, "itemsize", 2))


def largest_pass(config: Any, recipe: Recipe, attention: str) -> ForwardPass:
    """The largest forward pass that the recipe's keys allow, every token supervised; real data has less."""
    data, training = recipe.data, recipe.training
    if packs(config, attention, data):
        tokens = data.max_tokens or training.micro_batch_size * data.max_seq_len
        full, left = divmod(tokens, data.max_seq_len)
        lengths = (data.max_seq_len,) * full + ((left,) if left else ())
        return ForwardPass(1, tokens, tokens, (Group(0, lengths),))
    rows = training.micro_batch_size
    return ForwardPass(rows, data.max_seq_len, rows * data.max_seq_len)


def chunk_bytes(vocab_size: int, num_supervised: int, device_type: str) -> int:
    """fp32 logits of one chunk of the loss on a device of that type."""
    return 4 * vocab_size * min(num_supervised, chunk_tokens(vocab_size, device_type))


def format_bytes(count: float) -> str:
    """GB with one decimal, MB below one."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
