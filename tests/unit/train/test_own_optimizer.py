"""An optimizer that megatron-core does not know is two rows: its updates are those of its own class."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from megatron_rb.checkpoint.manager import CheckpointManager
from megatron_rb.checkpoint.sharded import TrainingState
from megatron_rb.config.optimizers import OPTIMIZERS as TRAITS
from megatron_rb.config.optimizers import OptimizerTraits
from megatron_rb.shapes.shape import model_fingerprint
from megatron_rb.train.build import Trainable, build_trainable
from megatron_rb.train.gradients import main_grad
from megatron_rb.train.optimizers import OPTIMIZERS, OptimizerSpec
from megatron_rb.train.schedule import LearningRateSchedule

STEPS = 3


class Lion(torch.optim.Optimizer):
    """arXiv 2302.06675, algorithm 2; it allocates its state in the first step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                direction = mean.lerp(parameter.grad, 1 - group["betas"][0]).sign()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                mean.lerp_(parameter.grad, 1 - group["betas"][1])


@pytest.fixture(params=["lion", "adagrad"])
def rows(request, monkeypatch, config) -> str:
    """The two rows of an optimizer, and settings that ask for it."""
    traits, specs = {
        "lion": (
            OptimizerTraits("Lion", ("beta1", "beta2"), state=("mean",), distributed=False),
            OptimizerSpec(lambda settings: {"betas": (settings.beta1, settings.beta2)}, build=Lion),
        ),
        "adagrad": (
            OptimizerTraits("Adagrad", ("eps",), state=("sum",), distributed=False),
            OptimizerSpec(lambda settings: {"eps": settings.eps}, build=torch.optim.Adagrad),
        ),
    }[request.param]
    monkeypatch.setitem(TRAITS, request.param, traits)
    monkeypatch.setitem(OPTIMIZERS, request.param, specs)
    settings = config.optimizer
    settings.name, settings.lr, settings.clip_grad, settings.eps = request.param, 1e-2, 0.0, 1e-4
    config.parallel.distributed_optimizer = False
    config.schedule.decay, config.schedule.warmup_ratio = "constant", 0.0
    return request.param


def built(session, config) -> tuple[Trainable, LearningRateSchedule]:
    trainable = build_trainable(session, config, "random")
    return trainable, LearningRateSchedule(trainable.optimizer, config.optimizer, config.schedule, train_steps=9)


def gradients(trainable: Trainable, seed: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=draw) for p in trainable.chunks[0].parameters()]


def take_steps(trainable: Trainable, seeds: Iterable[int]) -> None:
    for seed in seeds:
        for parameter, gradient in zip(trainable.chunks[0].parameters(), gradients(trainable, seed), strict=True):
            main_grad(parameter).copy_(gradient)
        trainable.optimizer.step()


def weights(trainable: Trainable) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainable.chunks[0].parameters()]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_updates_are_those_of_its_own_class(session, config, rows, dtype):
    config.model.dtype = dtype
    trainable, _ = built(session, config)
    settings = config.optimizer
    named = [name.endswith(".bias") or p.dim() < 2 for name, p in trainable.chunks[0].named_parameters()]
    copies = [torch.nn.Parameter(weight.float()) for weight in weights(trainable)]
    groups = [
        {"params": [copy], "lr": settings.lr, "weight_decay": 0.0 if plain else settings.weight_decay}
        | OPTIMIZERS[rows].group(settings)
        for copy, plain in zip(copies, named, strict=True)
    ]
    theirs = OPTIMIZERS[rows].build(groups)
    for seed in range(STEPS):
        for copy, gradient in zip(copies, gradients(trainable, seed), strict=True):
            copy.grad = gradient
        theirs.step()
    take_steps(trainable, range(STEPS))
    for copy, found in zip(copies, weights(trainable), strict=True):
        torch.testing.assert_close(found, copy.detach().to(found.dtype))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_checkpoint_brings_its_state_back(session, config, rows, dtype, tmp_path):
    config.model.dtype = dtype
    first, schedule = built(session, config)
    take_steps(first, range(STEPS))
    CheckpointManager(tmp_path, asynchronous=False).save(STEPS, state_of(first, schedule, session))
    take_steps(first, [7])
    second, schedule = built(session, config)
    assert CheckpointManager(tmp_path).load(state_of(second, schedule, session)).step == STEPS
    take_steps(second, [7])
    for one, other in zip(weights(first), weights(second), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def state_of(trainable: Trainable, schedule: LearningRateSchedule, session) -> TrainingState:
    return TrainingState(
        trainable.chunks,
        trainable.optimizer,
        {"schedule": schedule},
        model_fingerprint(session.shape),
        {},
        session.platform,
        reseed=lambda step: None,
    )


def test_its_state_is_there_before_the_first_step(session, config, rows):
    trainable, _ = built(session, config)
    for part in trainable.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                (name,) = TRAITS[rows].state
                assert part.optimizer.state[parameter][name].shape == parameter.shape
