"""Timers of the sections of a step."""

import pytest
import torch

from megatron_rb.layout.mesh import RankGrid
from megatron_rb.metrics.stragglers import SECTIONS, RankTimes
from megatron_rb.models.inputs import to_device
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.platform.cpu import CpuPlatform
from megatron_rb.train import timers as module
from megatron_rb.train.timers import StepTimers


class Clock:
    """Every look at it is a second later."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def stage(trainable):
    return trainable.chunks[0].module


def run(stage, batch) -> None:
    stage(to_device(batch, stage.shape, torch.device("cpu")))


def test_every_block_is_timed_in_its_section(stage, batches, clock):
    timers = StepTimers([stage], CpuPlatform(), every=1)
    timers.begin_step(0)
    run(stage, batches[0])
    shape = stage.shape
    vision = 1 + shape.vision.num_layers + len(shape.vision.deepstack_layers) + 1
    assert timers.seconds == {"data": 0.0, "vision": vision, "language": shape.text.num_layers + 2, "wait": 0.0}


@pytest.mark.parametrize(("every", "measured"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6]), (4, [4])])
def test_every_so_many_steps_are_measured(stage, every, measured):
    timers = StepTimers([stage], CpuPlatform(), every)
    found = []
    for step in range(6):
        timers.begin_step(step)
        found += [step + 1] if timers.active else []
    assert found == measured


def test_a_step_that_is_not_measured_is_not_timed(stage, batches, clock):
    timers = StepTimers([stage], CpuPlatform(), every=2)
    timers.begin_step(0)
    run(stage, batches[1])
    assert clock.now == 0 and not any(timers.seconds.values())


def test_without_timers_a_model_has_no_hooks(stage):
    StepTimers([stage], CpuPlatform(), every=0)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in stage.modules())


def test_a_step_begins_with_nothing(stage):
    timers = StepTimers([stage], CpuPlatform(), every=1)
    timers.add("wait", 2.0)
    timers.add("wait", 0.5)
    assert timers.seconds["wait"] == 2.5
    timers.begin_step(1)
    assert not any(timers.seconds.values())


@pytest.mark.usefixtures("lone_mesh")
def test_the_times_of_a_rank_stand_beside_those_of_its_stage(stage):
    timers = StepTimers([stage], CpuPlatform(), every=1)
    for number, section in enumerate(SECTIONS):
        timers.add(section, float(number))
    record = timers.gather(7, 9.0, Mesh(RankGrid()))
    assert (record.step, record.seconds) == (7, 9.0)
    assert record.ranks == [RankTimes(0, 0, {section: float(n) for n, section in enumerate(SECTIONS)})]
