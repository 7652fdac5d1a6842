"""FinetuneModule: the model as Lightning sees it, and the training step: one optimizer step per call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from peft import PeftModel

from finetune.console import say
from finetune.data.batches import MicroBatch, empty_batch
from finetune.errors import FinetuneError
from finetune.inference.mode import inference_mode
from finetune.kernels import native
from finetune.kernels.attention import packed_row
from finetune.kernels.lora import unchanged_adapters
from finetune.kernels.offload import offloaded
from finetune.machine import is_out_of_memory, naming_out_of_memory, release_freed_memory
from finetune.models.adapters import attach_adapter, load_adapter, trainable_parameters
from finetune.models.attention import packs
from finetune.models.compiled import compile_layers, make_traceable
from finetune.models.fused import forget_pending, fuse
from finetune.models.heads import check_head, checkpoint_layers, decoder_layers, supervised_loss
from finetune.models.isolation import check_isolation, hidden_states
from finetune.models.load import LESS_FOR_LOADING, fit_vocabulary, load_base
from finetune.models.shared import mapped_source
from finetune.models.sources import ModelSource
from finetune.models.start import Start
from finetune.recipe.schema import Recipe
from finetune.training.optimizer import GradientBuffer, build_optimizer, learning_rate
from finetune.training.out_of_memory import LESS_FOR_OPTIMIZER, Halving, out_of_memory_message
from finetune.training.steps import StepBatch, seed_micro_step
from finetune.training.strategy import Placement, move_replicated, shard_base
from finetune.training.turns import in_turn


class LossModel(torch.nn.Module):
    """The adapted model with its loss: its forward is what a training step differentiates."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, micro: MicroBatch) -> torch.Tensor:
        """Summed cross-entropy (fp32 scalar) over the micro-batch's supervised tokens."""
        causal_lm = self.model.get_base_model()
        hidden = hidden_states(causal_lm, micro.input_ids, micro.position_ids, micro.layout)
        return supervised_loss(causal_lm, hidden, micro.loss_positions, micro.targets)


@dataclass
class StepResult:
    """What a step leaves on the device; reading a value waits for it."""

    loss: torch.Tensor  # mean over the supervised tokens of the whole step
    grad_norm: torch.Tensor  # before clipping
    lr: float
    micro_losses: list[torch.Tensor]
    overflowed: bool = False  # a loss scaler has left the step out


class FinetuneModule(L.LightningModule):
    """Trains an adapter. `step` counts the optimizer steps done over the whole run, resumed parts included."""

    def __init__(
        self,
        recipe: Recipe,
        source: ModelSource,
        tokenizer: Any,
        placement: Placement,
        attention: str,
        num_steps: int,
        start: Start | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.recipe = recipe
        self.source = source
        self.tokenizer = tokenizer
        self.placement = placement
        self.attention = attention
        self.num_steps = num_steps
        self.start = start
        self.step = 0
        self.num_skipped_steps = 0
        self._has_said_overflow = False
        self.last: StepResult | None = None
        self.last_batch: StepBatch | None = None
        self.halving: Halving | None = None

    @property
    def model(self) -> PeftModel:
        """The adapted model."""
        return self.loss_model.model

    @property
    def device(self) -> torch.device:
        """This rank's own. Lightning notes one where it moves the module itself, which `AdapterStrategy` leaves out."""
        device: torch.device = self.trainer.strategy.root_device
        return device

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler of 16-mixed."""
        scaler: torch.amp.GradScaler | None = getattr(self.trainer.precision_plugin, "scaler", None)
        return scaler

    @naming_out_of_memory("while the model was loaded", LESS_FOR_LOADING)
    def configure_model(self) -> None:
        """Load, quantize, adapt and (for FSDP) shard. Called by Lightning in every process."""
        if hasattr(self, "loss_model"):
            return
        recipe, device, sharded = self.recipe, self.trainer.strategy.root_device, self.placement.sharded
        training = recipe.training
        with in_turn():
            source = mapped_source(
                recipe.model,
                self.source,
                precision=training.precision,
                on_cpu=device.type == "cpu",
                sharded=sharded,
            )
        base = load_base(
            recipe.model,
            source,
            precision=training.precision,
            attention_name=self.attention,
            device="cpu" if sharded else device,
            shardable=sharded or source is not self.source,
        )
        fit_vocabulary(base, self.tokenizer, seed=training.seed)
        with inference_mode(base):  # dropout would draw other masks for each of the two passes
            check_head(base, self.source.name)
            if packs(base.config, self.attention, recipe.data):
                with self.trainer.precision_plugin.forward_context():
                    check_isolation(base, self.source.name)
        assert training.gradient_checkpointing != "auto", "prepare_job settles it"
        checkpoint_layers(base, training.gradient_checkpointing)
        model = attach_adapter(base, recipe.adapter, self.tokenizer, seed=training.seed)
        if self.start is not None and self.start.folder is not None:
            load_adapter(model, self.start.folder)
        # Not the converted copy that was loaded: what is saved has to say which model another machine needs.
        for config in model.peft_config.values():
            config.base_model_name_or_path, config.revision = self.source.location, self.source.revision
        computes_on_cpu = torch.device(device).type == "cpu"
        fused = make_traceable(model) if training.compile else fuse(model, on_cpu=computes_on_cpu)
        if fused.left_to_peft:
            say(f"{fused.left_to_peft} adapter layers run PEFT's own forward: dropout, DoRA and int8 are not fused")
        if computes_on_cpu and training.precision.startswith("bf16") and (reason := native.why_missing()) is not None:
            say(f"no native kernels, torch's instead: {reason}")
        self.loss_model = LossModel(model)
        if sharded:
            layers = list(decoder_layers(model))
            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
            shard_base(self.loss_model, layers, mesh, cpu_offload=self.placement.cpu_offload)
            move_replicated(self.loss_model, device)
            # FSDP takes the module that is called first for the root: a layer, if generation came before a step.
            with torch.no_grad():
                self.loss_of(empty_batch(self.tokenizer.pad_token_id).to(device))
            # On a CPU what was gathered for it would stay with the process.
            release_freed_memory()
        else:
            self.loss_model.to(device)
        if training.compile and (left := compile_layers(model)):
            say(f"{left} decoder layers run uncompiled: training.gradient_checkpointing does not go with compile")
        release_freed_memory()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recipe's optimizer over the trainable parameters, their gradients in one flat buffer."""
        parameters = trainable_parameters(self.loss_model)
        self.gradients = GradientBuffer(parameters)
        training = self.recipe.training
        return build_optimizer(parameters, training.optimizer, scaled=training.precision == "16-mixed")

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within this, the model may be called from outside the training step, generation included, by all ranks alike.

        Under FSDP what is in no layer (embeddings, head) is gathered by `LossModel`'s forward, which others pass by.
        """
        if not self.placement.sharded:
            yield
            return
        root: Any = self.loss_model
        root.unshard()
        try:
            yield
        finally:
            root.reshard()

    def loss_of(self, micro: MicroBatch) -> torch.Tensor:
        """Summed loss of one micro-batch on the device, without gradients."""
        with packed_row(micro.layout):
            loss: torch.Tensor = self.loss_model(micro)
        return loss

    def transfer_batch_to_device(self, batch: StepBatch, device: torch.device, dataloader_idx: int) -> StepBatch:
        """Start the copies of all micro-batches of the step."""
        micros = [micro.to(device) for micro in batch.micro_batches]
        return StepBatch(batch.step, micros, batch.num_supervised, batch.num_real_tokens)

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """One optimizer step: the loss is the sum over all ranks and micro-batches / supervised tokens of the step."""
        training = self.recipe.training
        optimizer = self.optimizers()
        lr = learning_rate(training.schedule, training.optimizer.lr, self.step, self.num_steps)
        for group in optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = lr
        self.gradients.attach()
        with unchanged_adapters():
            batch, micro_losses = self._forward_backward(batch if self.halving is None else self.halving.split(batch))
        total = torch.stack(micro_losses).sum()
        if self.placement.world_size > 1:
            dist.all_reduce(total)
            self.gradients.all_reduce()
        self.last_batch = batch
        self.last = StepResult(total, torch.zeros_like(total), lr, micro_losses)
        if training.on_non_finite == "skip" and not self._is_finite():
            self.num_skipped_steps += 1
        else:
            with naming_out_of_memory(f"in the optimizer's step {self.step + 1}", LESS_FOR_OPTIMIZER):
                optimizer.step()  # type: ignore[union-attr]
            if self.last.overflowed:
                self._count_overflow()
        self.gradients.zero()
        self.step += 1

    def _forward_backward(self, batch: StepBatch) -> tuple[StepBatch, list[torch.Tensor]]:
        """Add the gradients of all micro-batches; their parts of the step's loss, and the batch as it was computed.

        Raises:
            FinetuneError: if memory runs out and nothing is to be, or can be, split.
        """
        training = self.recipe.training
        losses: list[torch.Tensor] = []
        for index, micro in enumerate(batch.micro_batches):
            # Dropout may be the adapter's or the base model's own.
            seed_micro_step(training.seed, self.step, index, self.global_rank)
            try:
                losses.append(self._micro_loss(micro, batch.num_supervised))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.halving is None or len(micro.samples) < 2:
                    sharded = self.placement.sharded
                    raise FinetuneError(out_of_memory_message(self.step + 1, micro, sharded=sharded)) from error
                break
        else:
            return batch, losses
        # Out of the handler: the error held every activation.
        forget_pending(self.model)
        self.gradients.zero()
        self.halving.shrink(self.step + 1, micro)
        return self._forward_backward(self.halving.split(batch))

    def _micro_loss(self, micro: MicroBatch, num_supervised: int) -> torch.Tensor:
        """Add one micro-batch's gradients; its part of the step's loss, detached."""
        offload = self.recipe.training.activation_offload and self.device.type == "cuda"
        with packed_row(micro.layout):
            with offloaded() if offload else nullcontext():
                loss: torch.Tensor = self.loss_model(micro) / max(1, num_supervised)
            self.manual_backward(loss)
        return loss.detach()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure and clip: here a loss scaler has unscaled the gradients already."""
        assert self.last is not None
        self.last.grad_norm = self.gradients.norm()
        # The scaler waits for the same look at the gradients.
        self.last.overflowed = self.scaler is not None and not bool(torch.isfinite(self.last.grad_norm))
        if self.recipe.training.max_grad_norm is not None:
            self.gradients.clip(self.last.grad_norm, self.recipe.training.max_grad_norm)

    def _is_finite(self) -> bool:
        assert self.last is not None
        finite = torch.isfinite(self.last.loss)
        if self.scaler is None:  # with one, gradients are still scaled, and an overflow is the scaler's to see
            finite = finite & torch.isfinite(self.gradients.norm())
        return bool(finite)

    def _count_overflow(self) -> None:
        """Count a step that the loss scaler has left out for gradients too large for fp16; every rank counts alike.

        Raises:
            FinetuneError: if the loss is finite and the scale so small by now that it is not the scale's fault.
        """
        assert self.last is not None and self.scaler is not None
        self.num_skipped_steps += 1
        if not bool(torch.isfinite(self.last.loss)):
            return  # `NonFiniteStop` says so
        scale, step = self.scaler.get_scale(), self.step + 1
        if scale < 1:
            raise FinetuneError(
                f"step {step}: the gradients do not fit fp16 at any scale: under training.precision: 16-mixed the loss "
                f"scale has fallen to {scale:g} by steps that were left out, one after the other.\n"
                "  Use training.precision: bf16-mixed (32-true on a GPU without bf16), or lower training.optimizer.lr; "
                "go on from an earlier checkpoint by --resume and --accept-changes, or start anew by --fresh."
            )
        if not self._has_said_overflow:
            self._has_said_overflow = True
            say(
                f"step {step}: left out, its gradients overflowed fp16; the loss scale is {scale:g} now. "
                "Ordinary under 16-mixed; skipped_steps in metrics.csv counts such steps"
            )
