"""Timestamps of the passes of a step."""

import math
from types import SimpleNamespace

import pytest

from megatron_rb.layout.mesh import RankGrid
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.platform.cpu import CpuPlatform
from megatron_rb.train.step import Runner, train_pass
from megatron_rb.train.timers import StepTimers
from megatron_rb.train.trace import PassTracer


@pytest.fixture
def tracer(trainable, lone_mesh):
    platform = CpuPlatform()
    timers = StepTimers([chunk.module for chunk in trainable.chunks], platform, every=1)
    return PassTracer(trainable.chunks, platform, lone_mesh, timers)


def test_every_micro_batch_has_a_forward_and_a_backward_pass_one_after_the_other(tracer, trainable, session, batches):
    with tracer.tracing():
        train_pass(Runner(trainable.chunks, session), batches)
    spans = tracer.timeline().spans
    assert [span.kind for span in spans] == ["forward", "backward"] * len(batches)
    moments = [moment for span in spans for moment in (span.start, span.end)]
    assert moments == sorted(moments) and moments[0] >= 0


def test_blocks_are_timed_in_forward_passes_alone(tracer, trainable, session, batches):
    with tracer.tracing():
        train_pass(Runner(trainable.chunks, session), batches)
    forward = tracer.timeline().busy("forward")
    assert 0 < tracer.timers.seconds["vision"] + tracer.timers.seconds["language"] < forward


def test_blocks_that_are_computed_again_belong_to_the_backward_pass(tracer):
    active = []
    with tracer.tracing():
        for kind in ("forward-compute", "backward-compute", "forward-compute"):
            tracer(kind).start()
            active.append(tracer.timers.active)
    assert active == [True, False, True]


def test_the_schedules_timers_are_gone_behind_the_block_even_after_an_error(tracer, trainable):
    with pytest.raises(ZeroDivisionError), tracer.tracing():
        assert trainable.chunks[0].module.config.timers is tracer
        raise ZeroDivisionError
    assert trainable.chunks[0].module.config.timers is None and not tracer.timers.active


def test_other_timers_of_the_schedules_are_not_recorded(tracer):
    with tracer.tracing():
        timer = tracer("forward-backward", log_level=1)
        timer.start(barrier=True)
        timer.stop()
    assert tracer.timeline().spans == ()


def test_a_pass_that_did_not_end_has_no_end(tracer):
    with tracer.tracing():
        tracer("forward-compute").start()
    [span] = tracer.timeline().spans
    assert math.isnan(span.end)


def test_a_timeline_tells_the_rank_its_stage_and_its_pipeline():
    chunk = SimpleNamespace(module=SimpleNamespace(config=SimpleNamespace()))
    mesh = Mesh(RankGrid(tp_size=2, pp_size=2), rank=3)
    timeline = PassTracer([chunk], CpuPlatform(), mesh, None).timeline()
    assert (timeline.rank, timeline.pp_rank, timeline.pipeline) == (3, 1, 1)
