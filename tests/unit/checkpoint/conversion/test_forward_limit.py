"""How far logits of two sides may be apart, and that the command tells it."""

from pathlib import Path

import pytest

from megatron_rb.checkpoint.conversion.verify import BYTES, DTYPE, FolderComparison, FolderDifference
from megatron_rb.parity import forward_difference
from megatron_rb.parity.forward_difference import logit_limit
from megatron_rb.tools import convert
from tests.parity.tiny_models import write_model


def verified(monkeypatch, capsys, folder: Path, gap: float, *differences: FolderDifference) -> tuple[int, str]:
    """`rb convert verify --forward` of a folder with itself, told that logits up to 8 differ by so much."""
    found = FolderComparison(str(folder), str(folder), "Hugging Face", differences=list(differences))
    monkeypatch.setattr(convert, "verify", lambda *_: found)
    monkeypatch.setattr(forward_difference, "forward_difference", lambda *_: (gap, 8.0))
    monkeypatch.setenv("COLUMNS", "200")
    return convert.main(["verify", str(folder), str(folder), "--forward"]), capsys.readouterr().out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "hf", "qwen3_vl", seed=0)


def test_logits_within_their_limit_are_equal(monkeypatch, capsys, folder):
    code, said = verified(monkeypatch, capsys, folder, 0.0007)
    assert code == 0 and "largest difference of a logit: 0.0007 (limit 0.0008)" in said


@pytest.mark.parametrize("gap", [0.782, float("inf")])
def test_equal_tensors_with_other_logits_are_an_error_of_the_settings(monkeypatch, capsys, folder, gap: float):
    code, said = verified(monkeypatch, capsys, folder, gap)
    assert code == 1 and "the tensors are equal and the logits are not" in said


def test_other_tensors_are_an_error_whatever_the_logits(monkeypatch, capsys, folder):
    assert verified(monkeypatch, capsys, folder, 0.0, FolderDifference("w", BYTES, "1", "2"))[0] == 1


@pytest.mark.parametrize(
    ("rounded_to", "limit"),
    [(set(), 8e-4), ({"float32"}, 8e-4), ({"float32", "bfloat16"}, 0.25), ({"float16", "float32"}, 1 / 32)],
)
def test_the_limit_follows_from_the_type_that_one_side_is_rounded_to(rounded_to: set[str], limit: float):
    assert logit_limit(rounded_to, 8.0) == pytest.approx(limit)
    assert logit_limit(rounded_to, 0.0) == 1e-4


def test_types_of_one_side_alone_are_those_that_differ():
    differences = [FolderDifference("a", DTYPE, "float32", "bfloat16"), FolderDifference("b", BYTES, "1", "2")]
    assert FolderComparison("", "", "", differences=differences).rounded_to == {"float32", "bfloat16"}
