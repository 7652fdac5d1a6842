"""Schedules, optimizers and the flat gradient buffer."""

from __future__ import annotations

import pytest
import torch

from finetune.recipe.schema import OptimizerSection, ScheduleSection
from finetune.training.optimizer import OPTIMIZERS, GradientBuffer, build_optimizer, learning_rate, num_warmup_steps


def lrs(num_steps: int, **schedule: object) -> list[float]:
    section = ScheduleSection.model_validate(schedule)
    return [learning_rate(section, 1.0, step, num_steps) for step in range(num_steps)]


def test_linear_warms_up_and_falls_to_its_floor() -> None:
    got = lrs(10, name="linear", warmup_steps=2, min_lr_share=0.5)
    assert got == pytest.approx([0.5, 1.0] + [1.0 - 0.5 * k / 8 for k in range(8)])


def test_cosine_passes_its_middle() -> None:
    got = lrs(9, name="cosine", warmup_steps=1)
    assert got[0] == 1.0 and got[5] == pytest.approx(0.5) and got == sorted(got, reverse=True)


def test_constant_stays() -> None:
    assert lrs(5, name="constant", warmup_steps=1) == [1.0] * 5


def test_warm_up_is_a_share_of_the_run() -> None:
    assert num_warmup_steps(ScheduleSection(warmup_share=0.03), 100) == 3
    assert num_warmup_steps(ScheduleSection(warmup_share=0.0), 100) == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_the_parameters_and_resumes_exactly(name: str) -> None:
    def start() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 8192).view(64, 128))
        return parameter, build_optimizer([parameter], OptimizerSection(name=name, lr=0.1), scaled=False)  # type: ignore[arg-type]

    def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, k: int) -> None:
        parameter.grad = torch.sin(torch.arange(8192.0) * (k + 1)).view(64, 128)
        optimizer.step()

    whole, optimizer = start()
    for k in range(4):
        step(whole, optimizer, k)
    first, optimizer = start()
    for k in range(2):
        step(first, optimizer, k)
    saved = optimizer.state_dict()
    second, resumed = start()
    second.data.copy_(first.data)
    resumed.load_state_dict(saved)
    for k in range(2, 4):
        step(second, resumed, k)
    assert torch.equal(second, whole)
    assert not torch.equal(whole, start()[0])


def test_vectors_do_not_decay() -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    groups = build_optimizer([matrix, vector], OptimizerSection(weight_decay=0.1), scaled=False).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_gradients_live_in_one_buffer() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))]
    buffer = GradientBuffer(parameters)
    buffer.attach()
    (parameters[0].sum() * 2 + parameters[1].sum() * 3).backward()
    assert buffer.flat.tolist() == [2.0] * 6 + [3.0] * 4
    norm = buffer.norm()
    assert norm.item() == pytest.approx((6 * 4 + 4 * 9) ** 0.5)
    buffer.clip(norm, 1.0)
    assert buffer.norm().item() == pytest.approx(1.0, rel=1e-5)
    buffer.zero()
    assert parameters[0].grad is not None and not parameters[0].grad.any()


def test_a_gradient_outside_the_buffer_is_noticed() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    buffer = GradientBuffer([parameter])
    parameter.sum().backward()
    with pytest.raises(AssertionError, match="outside the buffer"):
        buffer.attach()
