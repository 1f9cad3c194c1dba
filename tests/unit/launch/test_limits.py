"""Time limits learnt from the run."""

from megatron_rb.launch.limits import Beat, Limits, RankProgress


def test_unknown_phase_has_the_configured_limit():
    assert Limits(600.0).of("step") == 600.0
    assert Limits(600.0, {"step": 1.0}, least=60.0).of("step") == 60.0


def test_limit_of_a_step_follows_the_slowest():
    limits = Limits(600.0)
    progress = RankProgress(limits, now=0.0)
    for step, time in ((1, 10.0), (2, 11.0), (3, 14.0), (4, 15.0)):
        progress.see(Beat(1, "step", step, time), now=time)
    assert limits.slowest["step"] == 3.0
    assert limits.of("step") <= 2 * 3.0 + 5
    assert not progress.hangs(now=24.9)
    assert progress.hangs(now=25.1)


def test_time_before_a_phase_changes_is_that_of_the_phase():
    limits = Limits(600.0)
    progress = RankProgress(limits, now=0.0)
    for phase, time in (("init", 0.0), ("step", 20.0), ("checkpoint", 21.0), ("step", 26.0)):
        progress.see(Beat(1, phase, 1, time), now=time)
    assert limits.slowest == {"init": 20.0, "checkpoint": 5.0}
