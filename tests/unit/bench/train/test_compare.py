"""The gate between two results."""

import json
from dataclasses import replace

import pytest

from megatron_rb.bench.train.compare import compare
from megatron_rb.bench.train.result import load_result, save_result
from megatron_rb.cli import main as rb
from megatron_rb.planner.device import published_peak
from tests.unit.bench.train.samples import result

STEADY = [1.0] * 8


def test_the_same_speed_passes():
    found = compare(result(STEADY), result(STEADY), limit=0.0)
    assert found.passed and found.change == 0 and found.noise == 0 and found.notes == ()


@pytest.mark.parametrize(("seconds", "passed"), [(1.02, True), (1.04, False), (0.5, True)])
def test_without_noise_the_limit_alone_decides(seconds, passed):
    assert compare(result(STEADY), result([seconds] * 8), limit=0.03).passed is passed


def test_noise_of_both_widens_what_is_allowed():
    noisy = [0.9, 1.1] * 8
    slower = [1.1 * second for second in noisy]
    assert not compare(result(STEADY * 2), result([1.1] * 16), limit=0.03).passed
    found = compare(result(noisy), result(slower), limit=0.03)
    assert found.noise == pytest.approx(2 * result(noisy).noise(), rel=1e-9) and found.noise > 0.1
    assert found.passed


def test_noise_is_the_notch_of_a_box_plot():
    # Rates of 100, 200, 300, 400 and 500 tokens per second and device: quartiles 150, 300 and 450.
    found = result([1000 / 2 / rate for rate in (100, 200, 300, 400, 500)]).noise()
    assert found == pytest.approx(1.57 * 300 / 5**0.5 / 300)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix": {"name": "other", "seq_length": 96}}, "same mix: name is test in A and other in B"),
        ({"model": {"name": "m", "layers": 3}}, "same model: layers is 2 in A and 3 in B"),
        ({"device": {"platform": "cuda", "device": "H100"}}, "same device: device is H200 in A and H100 in B"),
        ({"settings": {"dtype": "fp32", "threads": 1}}, "same dtype: dtype is bf16 in A and fp32 in B"),
    ],
)
def test_results_of_different_subjects_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        compare(result(STEADY), result(STEADY, **changes), limit=0.03)


def test_threads_make_another_device_of_a_cpu():
    cpu = result(STEADY, device={"platform": "cpu", "device": "x"})
    with pytest.raises(ValueError, match="threads per process is 1 in A and 2 in B"):
        compare(cpu, replace(cpu, settings=cpu.settings | {"threads": 2}), limit=0.03)


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="B has 3 timed steps, whose noise is not known; measure at least 4"):
        compare(result(STEADY), result(STEADY[:3]), limit=0.03)


def test_another_layout_is_compared_and_named():
    other = result(STEADY, settings=result(STEADY).settings | {"layout": "P v v | M E t L"}, devices=4)
    notes = compare(result(STEADY), other, limit=0.99).notes
    assert any(note.startswith("layout: ") for note in notes) and any(note.startswith("devices: 2") for note in notes)


def test_summary_by_hand():
    found = result([1.0, 2.0, 2.0, 4.0]).summary()
    assert found["step_seconds"] == 2.0
    assert found["tokens_per_second"] == 250  # 1,000 tokens in 2 s on 2 devices
    assert found["samples_per_second"] == 5
    assert found["tflops"] == 1.0 and found["mfu"] == pytest.approx(0.1)
    assert found["bubble"] == 0.25 and found["peak_memory_bytes"] == 2e9


def test_command_exits_by_the_verdict(tmp_path, capsys):
    for name, second in (("a", 1.0), ("b", 1.1)):
        (tmp_path / name).mkdir()
        save_result(result([second] * 6), tmp_path / name)
    assert load_result(tmp_path / "a") == result([1.0] * 6)
    assert rb(["bench", "compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "SLOWER: B makes -9.1% tokens" in capsys.readouterr().out
    assert rb(["bench", "compare", str(tmp_path / "a"), str(tmp_path / "b" / "result.json"), "--limit", "10"]) == 0


def test_what_is_no_result_is_said(tmp_path):
    with pytest.raises(ValueError, match="there is no result"):
        load_result(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match=r"in format 1 \(found 99\)"):
        load_result(tmp_path)


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("MTT S4000", 100),
        ("Intel(R) Xeon(R) CPU", None),
    ],
)
def test_peaks_of_data_sheets_are_found_by_the_name_of_the_device(device, tflops):
    found = published_peak(device, "bf16")
    assert (found and round(found.flops / 1e12)) == tflops
