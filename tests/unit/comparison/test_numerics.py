"""The parts of a comparison of captures on small made-up ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rb.capture.files import DESCRIPTION, RankFile, write_json
from megatron_rb.capture.samples import choose
from megatron_rb.comparison.numerics.captures import Capture, check_same_input, open_captures
from megatron_rb.comparison.numerics.comparison import compare_captures
from megatron_rb.comparison.numerics.definitions import BlockView
from megatron_rb.comparison.numerics.distance import ULP_LABELS, ulp_counts
from megatron_rb.comparison.numerics.judgement import _excess
from megatron_rb.comparison.numerics.operators import operators_of

WIDTH, HIDDEN = 2048, 96


def description(**changes) -> dict:
    text = {"num_layers": 1, "norm_eps": 1e-6, "qk_norm": False}
    model = {"vision": {"num_layers": 0, "deepstack_layers": []}, "text": text}
    return {
        "version": 1,
        "step": 1,
        "samples": ["s"],
        "world_size": 1,
        "model": model,
        "dtype": "bf16",
        "layout": {"tp_size": 1},
        "settings": {},
    } | changes


def write_linear(folder: Path, compute, tp_size: int = 1) -> Capture:
    """A capture of one wide linear, whose output `compute(x, w)` gives."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(32, WIDTH, generator=draw).to(torch.bfloat16)
    w = (torch.randn(HIDDEN, WIDTH, generator=draw) / WIDTH**0.5).to(torch.bfloat16)
    file = RankFile(folder, 0)
    rows = np.arange(32)
    file.add("value/0/language.layers.0/activation", x, rows, None)
    file.add("value/0/language.layers.0/fc2", compute(x, w), rows, None)
    file.add("weight/language.layers.0.mlp.linear_fc2.weight", w[::2], np.arange(0, HIDDEN, 2), None)
    file.finish()
    write_json(folder / DESCRIPTION, description(layout={"tp_size": tp_size}))
    return Capture(folder, "a")


def excess_of_fc2(capture: Capture) -> float:
    fc2 = next(operator for operator in operators_of("language.layers.0") if operator.name == "fc2")
    return _excess(fc2.residual(BlockView(capture, 0, "language.layers.0")))


def accumulate(x, w, dtype, chunk):
    total = torch.zeros(x.shape[0], w.shape[0], dtype=dtype)
    for a, b in zip(x.split(chunk, 1), w.split(chunk, 1), strict=True):
        total = (total + (a.float() @ b.float().T).to(dtype)).to(dtype)
    return total.to(torch.bfloat16)


def test_accumulation_in_bf16_is_found_in_a_bf16_linear_and_in_fp32_it_is_sound(tmp_path):
    sound = write_linear(tmp_path / "a", lambda x, w: accumulate(x, w, torch.float32, 16))
    wrong = write_linear(tmp_path / "b", lambda x, w: accumulate(x, w, torch.bfloat16, 16))
    assert excess_of_fc2(sound) < 0.4
    assert excess_of_fc2(wrong) > 1


def test_parts_rounded_on_two_ranks_are_sound(tmp_path):
    halves = write_linear(tmp_path, lambda x, w: accumulate(x, w, torch.bfloat16, WIDTH // 2), tp_size=2)
    assert excess_of_fc2(halves) < 0.4


def test_one_wrong_row_is_found(tmp_path):
    def compute(x, w):
        out = accumulate(x, w, torch.float32, 64)
        out[7] *= 1.1
        return out

    assert excess_of_fc2(write_linear(tmp_path, compute)) > 1


def test_value_that_is_no_number_is_a_defect(tmp_path):
    def compute(x, w):
        out = accumulate(x, w, torch.float32, 64)
        out[3, 4] = float("nan")
        return out

    assert excess_of_fc2(write_linear(tmp_path, compute)) == np.inf


def test_pieces_of_ranks_become_one_tensor(tmp_path):
    whole = torch.randn(4, 6)
    for rank, (rows, columns) in enumerate([((0, 1), [(0, 2), (4, 1)]), ((0, 1), [(2, 2), (5, 1)]), ((2, 3), None)]):
        file = RankFile(tmp_path, rank)
        piece = whole[list(rows)]
        if columns:
            piece = torch.cat([piece[:, start : start + length] for start, length in columns], 1)
        file.add("value/0/x/output", piece, np.array(rows), columns)
        file.finish()
    write_json(tmp_path / DESCRIPTION, description(world_size=3))
    read = Capture(tmp_path, "a").read("value/0/x/output")
    assert read is not None and np.array_equal(read.values, whole.double().numpy())
    assert read.rows.tolist() == [0, 1, 2, 3]
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_missing_ranks_and_pieces_are_said(tmp_path):
    file = RankFile(tmp_path, 0)
    file.add("value/0/x/output", torch.ones(2, 3), np.arange(2), [(3, 3)])
    file.finish()
    write_json(tmp_path / DESCRIPTION, description())
    with pytest.raises(ValueError, match="pieces of value/0/x/output are missing; copy the files of all ranks"):
        Capture(tmp_path, "a").read("value/0/x/output")
    write_json(tmp_path / DESCRIPTION, description(world_size=2))
    with pytest.raises(ValueError, match="rank_00001.safetensors .* missing; copy the files of all ranks"):
        Capture(tmp_path, "a")


def test_folders_without_a_common_step_are_said(tmp_path):
    for name, step in (("a", 1), ("b", 2)):
        folder = tmp_path / name / f"step_{step:08d}"
        RankFile(folder, 0).finish()
        write_json(folder / DESCRIPTION, description(step=step))
    with pytest.raises(ValueError, match=r"not one step in common: .*a has \[1\], .*b has \[2\]"):
        open_captures(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="does not exist"):
        open_captures(tmp_path / "a", tmp_path / "nowhere")
    assert open_captures(tmp_path / "a", tmp_path / "a")[0].description["step"] == 1


def test_unfinished_capture_is_not_taken_for_one(tmp_path):
    RankFile(tmp_path / "step_00000001", 0).finish()
    with pytest.raises(ValueError, match="has none"):
        open_captures(tmp_path, tmp_path)


def write_empty(folder: Path, *, text="1a", pixels="2b", weights=("3c", "4d"), dtype="float32", **changes) -> Capture:
    """A capture that keeps hashes alone."""
    file = RankFile(folder, 0)
    file.samples["s"] = {"text": text, "pixels": pixels, "tokens": 4, "patches": 4}
    for number, value in enumerate(weights):
        file.weights[f"w{number}"] = {"dtype": dtype, "hash": f"{dtype} {value}", "bf16_hash": value}
    file.finish()
    write_json(folder / DESCRIPTION, description(**changes))
    return Capture(folder, folder.name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"text": "9f"},
            r"different batches: the tokens or labels of sample 's' differ \(their hashes are 1a and",
        ),
        ({"pixels": "9f"}, r"different batches: the pixels of sample 's' differ .*prepare the data once and copy it"),
        ({"samples": ["t"]}, r"different batches: a kept the samples \['s'\], b \['t'\]; capture the same step"),
        ({"weights": ("3c", "9f")}, "different weights: 1 of 2 parameters differ, first w1; start both from one"),
        ({"weights": ("3c",)}, "different weights: 1 of 2 parameters differ, first w1"),
        ({"settings": {"rows": 16}}, r"keep different parts: metrics.capture.rows \(32 and 16\) differ; use the same"),
        ({"model": {"vision": {}, "text": {}}}, "different models: vision, text differ; capture one recipe"),
        ({"version": 0}, "a capture of form 0, this rb reads 1"),
    ],
)
def test_other_input_is_told_by_its_hashes(tmp_path, changes, words):
    a = write_empty(tmp_path / "a", **({"settings": {"rows": 32}} if "settings" in changes else {}))
    with pytest.raises(ValueError, match=words):
        check_same_input(a, write_empty(tmp_path / "b", **changes))


def test_weights_of_another_type_are_compared_as_they_are_in_bf16(tmp_path):
    """fp32 weights that a bf16 run has rounded are the same weights."""
    a, b = write_empty(tmp_path / "a"), write_empty(tmp_path / "b", dtype="bfloat16")
    check_same_input(a, b)
    with pytest.raises(ValueError, match="different weights: 2 of 2"):
        check_same_input(a, write_empty(tmp_path / "c", dtype="bfloat16", weights=("3", "4")))


def test_what_one_side_alone_kept_is_named(tmp_path):
    sides = []
    for name, points in (("a", ("output", "norm")), ("b", ("output",))):
        file = RankFile(tmp_path / name, 0)
        for point in points:
            file.add(f"value/0/language.head/{point}", torch.ones(2, 3), np.arange(2), None)
        file.samples["s"] = {"text": "1", "pixels": None, "tokens": 2, "patches": 0}
        file.finish()
        write_json(tmp_path / name / DESCRIPTION, description())
        sides.append(Capture(tmp_path / name, name))
    assert compare_captures(*sides).one_sided == ["norm in language.head (only A)"]
    assert compare_captures(*reversed(sides)).one_sided == ["norm in language.head (only B)"]


def ulps(a, b, roundoff) -> list[int]:
    return ulp_counts(a, b, np.abs(a - b), roundoff).tolist()


@pytest.mark.parametrize(("dtype", "roundoff"), [(torch.float32, 2.0**-24), (torch.bfloat16, 2.0**-8)])
def test_distance_in_units_in_the_last_place(dtype, roundoff):
    """torch's nextafter says what the next number is."""
    value = torch.tensor([1.0, 1.5, 3.7, 1e-3, -2.2]).to(dtype)
    after = value
    for steps, label in ((1, "1"), (3, "2-4"), (12, "5-16")):
        after = value
        for _ in range(steps):
            after = torch.nextafter(after, torch.full_like(after, 100.0))
        counts = dict(zip(ULP_LABELS, ulps(value.double().numpy(), after.double().numpy(), roundoff), strict=True))
        assert counts[label] == len(value), (steps, counts)
    assert ulps(np.ones(3), np.array([1, np.nan, 1]), roundoff) == [2, 0, 0, 0, 0, 1]


def test_full_disk_gives_the_capture_up_and_not_the_run(tmp_path, monkeypatch):
    file = RankFile(tmp_path, 0)
    file.add("value/0/x/output", torch.ones(2, 3), np.arange(2), None)
    monkeypatch.setattr("shutil.copyfileobj", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    file.finish()
    assert "No space left" in file.problem
    assert list(tmp_path.iterdir()) == []
    file.add("value/0/y/output", torch.ones(2, 3), np.arange(2), None)
    blocked = tmp_path / "a file"
    blocked.touch()
    assert RankFile(blocked / "step", 0).problem


def test_samples_are_chosen_by_size_alone():
    sizes = [("a", 90, 40), ("b", 20, 0), ("c", 50, 16), ("d", 30, 64), ("b", 20, 0)]
    assert choose(sizes, 2) == ["c", "b"] == choose(sizes[::-1], 2)
    assert choose(sizes, 9) == ["c", "b", "d", "a"]
    assert choose([("x", 5, 0)], 2) == ["x"]


def test_a_capture_holds_no_pickle(tmp_path):
    write_linear(tmp_path, lambda x, w: accumulate(x, w, torch.float32, 64))
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text())
    assert not any(b"pickle" in path.read_bytes() for path in tmp_path.iterdir())
