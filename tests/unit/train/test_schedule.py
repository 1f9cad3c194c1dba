"""The learning-rate schedule."""

import pytest

from megatron_rb.config.schema import OptimizerConfig, ScheduleConfig
from megatron_rb.platform.cpu import CpuPlatform
from megatron_rb.platform.mcore_shims import install_mcore_shims

install_mcore_shims(CpuPlatform())

from megatron_rb.models.build import part_of  # noqa: E402
from megatron_rb.train.schedule import LearningRateCurve, LearningRateSchedule  # noqa: E402


class _Optimizer:
    def __init__(self, *groups):
        self.param_groups = [dict(lr_mult=ratio, wd_mult=decay) for ratio, decay in groups]


def _schedule(optimizer, train_steps=10, **settings):
    settings = {"lr": 1.0, "min_lr": 0.1, "vision_lr_ratio": 0.1, "weight_decay": 0.2} | settings
    return LearningRateSchedule(
        optimizer, OptimizerConfig(**settings), ScheduleConfig(decay="linear", warmup_ratio=0.2), train_steps
    )


def test_warm_up_rises_in_equal_parts_and_the_first_update_is_not_wasted():
    curve = LearningRateCurve(train_steps=10, warmup_steps=4, decay="cosine")
    assert [curve.learning_rate(step, 1.0, 0.0) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("decay", "middle", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)]
)
def test_decay_reaches_the_minimum_at_the_end(decay, middle, end):
    curve = LearningRateCurve(train_steps=12, warmup_steps=2, decay=decay)
    assert curve.learning_rate(2, 1.0, 0.1) == pytest.approx(1.0)
    assert curve.learning_rate(7, 1.0, 0.1) == pytest.approx(middle)
    assert curve.learning_rate(12, 1.0, 0.1) == pytest.approx(end)
    assert curve.learning_rate(99, 1.0, 0.1) == pytest.approx(end)


def test_ratio_scales_maximum_and_minimum():
    optimizer = _Optimizer((1.0, 1.0), (0.1, 0.0))
    schedule = _schedule(optimizer)
    for _ in range(10):
        assert optimizer.param_groups[1]["lr"] == pytest.approx(0.1 * optimizer.param_groups[0]["lr"])
        schedule.step()
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.01)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]


def test_learning_rates_name_every_part():
    schedule = _schedule(_Optimizer((1.0, 1.0)), merger_lr_ratio=0.5)
    assert schedule.learning_rates() == pytest.approx({"vision": 0.05, "merger": 0.25, "language": 0.5})


def test_state_continues_the_curve():
    first, second = _Optimizer((1.0, 1.0)), _Optimizer((1.0, 1.0))
    schedule = _schedule(first)
    for _ in range(6):
        schedule.step()
    resumed = _schedule(second)
    resumed.load_state_dict(schedule.state_dict())
    assert second.param_groups == first.param_groups


@pytest.mark.parametrize(
    ("change", "message"),
    [({"min_lr": 2.0}, "min_lr 2.0 is larger"), ({"train_steps": 0}, "at least one step")],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        _schedule(_Optimizer((1.0, 1.0)), **change)


def test_unknown_decay_lists_the_known():
    with pytest.raises(ValueError, match="use cosine, linear, constant"):
        LearningRateCurve(10, 0, "exponential")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("module.module.vision.layers.3.attention.linear_qkv.weight", "vision"),
        ("vision.patch_embed.weight", "vision"),
        ("vision.merger.norm.weight", "merger"),
        ("module.vision.deepstack.1.linear_fc1.weight", "merger"),
        ("language.layers.3.mlp.linear_fc1.weight", "language"),
        ("language.embedding.weight", "language"),
    ],
)
def test_part_follows_from_the_parameter_name(name, part):
    assert part_of(name) == part
