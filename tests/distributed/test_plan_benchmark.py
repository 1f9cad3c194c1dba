"""`rb bench plan` on a very small case: two processes calibrate, plan and step; the parent reads what they wrote."""

from functools import partial

from megatron_rb.bench.plan.two_processes import HAND_MADE, MEASURE, Case, markdown, run
from megatron_rb.launch.workers import start_workers
from megatron_rb.layout import parse_layout


def test_every_layout_is_predicted_and_measured(tmp_path):
    case = Case("small", 2, 2, ((40, 64), (48, 36), (40, 64)))
    (result,) = run(tmp_path, 2, partial(start_workers, MEASURE, threads=1), [case])
    assert [row.role for row in result.rows] == ["planned", *HAND_MADE]
    for row in result.rows:
        assert row.predicted > 0 and row.measured > 0 and row.spread >= 0
        parse_layout(row.layout, 2, 2, 2)
    predicted, measured = result.ratio(HAND_MADE[0])
    assert predicted >= 1 - 1e-9  # the planned cut is the best of all by the model
    assert measured == result.rows[1].measured / result.rows[0].measured
    assert "Measured by `rb bench plan`" in markdown([result], "a machine", 2)
