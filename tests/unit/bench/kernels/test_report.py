"""Tables and pictures of `rb bench kernels`, from made-up measurements."""

import json

import pytest

from megatron_rb.bench.kernels import report
from megatron_rb.bench.kernels.measure import MeasuredCase
from megatron_rb.bench.kernels.run import Report

CEILINGS = {"copy_bytes_per_second": 4e12, "matmul_flops_per_second": 8e14}


def row(copy_share=0.9, goal=0.85, seconds=None, at_least=None, failed=None, flops=10**9) -> MeasuredCase:
    seconds = seconds or {"ours": 1e-5, "eager": 5e-5}
    return MeasuredCase(
        "rotary", 10**7, flops, seconds, {"ours": 10**6}, copy_share, 0.1, goal, at_least or {}, failed or {}
    )


@pytest.mark.parametrize(
    ("made", "reached"),
    [
        (row(), True),
        (row(copy_share=0.8), False),
        (row(at_least={"eager": 4.0}), True),
        (row(at_least={"eager": 6.0}), False),
        (row(goal=None), None),
        (row(at_least={"flash": 2.0}), None),
        (row(copy_share=0.8, at_least={"flash": 2.0}), False),
    ],
)
def test_a_goal_is_reached_only_when_all_of_it_was_measured_and_met(made, reached):
    assert made.reached is reached


def test_table_tells_shares_ratios_and_what_could_not_run():
    rows = [row(at_least={"eager": 4.0}, failed={"Liger": "No module named 'liger_kernel'"}), row(goal=None)]
    text = report.gpu_markdown("Kernels", {"device": "H200"}, CEILINGS, rows)
    assert "copy 4.00 TB/s, bf16 matrix product 800 TFLOP/s" in text
    assert "| rotary | 10.0 | 90.0% | 10.0% | 85%, 4x eager | yes | 1 | 5.00x eager; without Liger: No module" in text


def test_a_run_is_three_files_named_by_card_and_date(tmp_path):
    rows = [row(), row(flops=0)]
    stem = report.file_stem("NVIDIA H200 (141 GB)", "2026-01-31")
    assert stem == "nvidia-h200-141-gb-2026-01-31"
    made = Report(
        stem, {"rows": [r.as_json() for r in rows]}, "table", lambda path: report.draw_gpu(CEILINGS, rows, "t", path)
    )
    paths = made.write(tmp_path / "new")
    assert [path.suffix for path in paths] == [".json", ".md", ".png"]
    assert json.loads(paths[0].read_text())["rows"][0]["speedups"] == {"eager": 5.0}
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_tables_of_a_cpu(tmp_path):
    tower = {"family": "qwen3_vl", "hidden_size": 288, "images": "four images", "patches": 1280}
    tower |= {"transformers": 1.0, "ours": 0.5, "speedup": 2.0}
    loss = {"rows": 4, "hidden_size": 8, "vocabulary": 16, "logits_bytes": 2**20, "speedup": 1.25}
    loss |= {"our_peak": 10**6, "plain_peak": 3 * 10**6}
    text = report.cpu_markdown("CPU", {"cpu": "EPYC"}, [tower], [loss])
    assert "| qwen3_vl | 288 | four images | 1280 | 1.000 | 0.500 | 2.00x |" in text
    assert "| 4 | 8 | 16 | 1 | 3 | 1 | 1.25x |" in text
    report.draw_cpu([tower], "CPU", tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000
