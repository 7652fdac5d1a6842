"""Optimizers, learning-rate schedules and the flat gradient buffer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from finetune.recipe.schema import OptimizerSection, ScheduleSection

Params = list[dict[str, object]]


def build_optimizer(
    parameters: Sequence[torch.nn.Parameter], section: OptimizerSection, *, scaled: bool
) -> torch.optim.Optimizer:
    """The recipe's optimizer. `scaled`: a loss scaler unscales the gradients, which a fused AdamW would do itself."""
    groups: Params = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return OPTIMIZERS[section.name](groups, section, scaled)


def _adamw(groups: Params, section: OptimizerSection, scaled: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=not scaled)


def _paged_adamw_8bit(groups: Params, section: OptimizerSection, scaled: bool) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.PagedAdamW8bit(groups, lr=section.lr, betas=section.betas, eps=section.eps)


def _lion(groups: Params, section: OptimizerSection, scaled: bool) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.Lion(groups, lr=section.lr, betas=section.betas)


def _paged_lion_8bit(groups: Params, section: OptimizerSection, scaled: bool) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.PagedLion8bit(groups, lr=section.lr, betas=section.betas)


def _adafactor(groups: Params, section: OptimizerSection, scaled: bool) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=section.lr)


OPTIMIZERS: dict[str, Callable[[Params, OptimizerSection, bool], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "paged_adamw_8bit": _paged_adamw_8bit,
    "lion": _lion,
    "paged_lion_8bit": _paged_lion_8bit,
    "adafactor": _adafactor,
}


def num_warmup_steps(schedule: ScheduleSection, num_steps: int) -> int:
    """Warm-up steps of a run of `num_steps`."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    return math.ceil(schedule.warmup_share * num_steps)


def learning_rate(schedule: ScheduleSection, peak: float, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based): a function of the step alone, so it has no state to save."""
    warmup = num_warmup_steps(schedule, num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    floor = schedule.min_lr_share
    return peak * (floor + (1.0 - floor) * SCHEDULES[schedule.name](min(progress, 1.0)))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}


class GradientBuffer:
    """All gradients as one flat fp32 tensor; each parameter's `.grad` is a view of it.

    So they are reduced over the ranks by one call, measured by one norm and cleared by one fill, without copies.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters = list(parameters)
        device = self.parameters[0].device
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), dtype=torch.float32, device=device)
        sizes = [parameter.numel() for parameter in self.parameters]
        self._views = [
            view.view_as(parameter) for view, parameter in zip(self.flat.split(sizes), self.parameters, strict=True)
        ]

    def attach(self) -> None:
        """Make every `.grad` the view again: whoever set it to None would split the gradients from the buffer."""
        for parameter, view in zip(self.parameters, self._views, strict=True):
            if parameter.grad is not view:
                assert parameter.grad is None, "a gradient was accumulated outside the buffer"
                parameter.grad = view

    def all_reduce(self) -> None:
        """Sum over all ranks: once per optimizer step."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.flat)

    def norm(self) -> torch.Tensor:
        """Euclidean norm of all gradients, on the device."""
        return torch.linalg.vector_norm(self.flat)

    def clip(self, norm: torch.Tensor, max_norm: float) -> None:
        """Scale so that the norm is at most `max_norm`, without a look at its value on the host."""
        self.flat.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))

    def zero(self) -> None:
        """Ready for the next step. The views stay: set_to_none would give up the flat buffer."""
        self.flat.zero_()
