"""Boxes read from a checkpoint: their values, the bytes that are read for them, and damage."""

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_rb.checkpoint.sharded import save_model_only
from megatron_rb.checkpoint.storage.tensors import DamagedFile, FilePool
from megatron_rb.checkpoint.stored import open_stored, read_pieces

ROWS, COLUMNS = 6, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lone_mesh):
    """A checkpoint of one tensor that lies in two parts, the first two rows and the rest."""
    path = tmp_path_factory.mktemp("stored")
    whole = torch.arange(float(ROWS * COLUMNS)).view(ROWS, COLUMNS)
    parts = {"upper": piece(whole[:2].clone(), (0, 0)), "lower": piece(whole[2:].clone(), (2, 0))}
    save_model_only(parts, path)
    return path


def piece(data: torch.Tensor, offset: tuple[int, int], rows: int = ROWS) -> ShardedTensor:
    return ShardedTensor("w", data, data.dtype, tuple(data.shape), (rows, COLUMNS), offset, axis_fragmentations=None)


@pytest.fixture
def read_bytes(monkeypatch) -> list[int]:
    """Length of every read."""
    lengths: list[int] = []
    read_into = FilePool.read_into

    def counted(pool, path, position, out):
        lengths.append(len(out))
        read_into(pool, path, position, out)

    monkeypatch.setattr(FilePool, "read_into", counted)
    return lengths


@pytest.mark.parametrize(
    ("offset", "shape", "lengths"),
    [
        ((0, 0), (6, 5), [40, 80]),
        ((3, 0), (2, 5), [40]),
        ((1, 2), (1, 3), [12]),
        ((1, 1), (2, 2), [8, 8]),
        ((2, 1), (3, 2), [4 * (2 * 5 + 2)]),
    ],
    ids=["all", "whole rows", "part of a row", "over both parts", "columns span the rows between"],
)
def test_a_box_is_read_by_the_bytes_it_spans(folder, read_bytes, offset, shape, lengths):
    wanted = piece(torch.full(shape, -1.0), offset)
    read_pieces(open_stored(folder), [wanted])
    whole = torch.arange(float(ROWS * COLUMNS)).view(ROWS, COLUMNS)
    assert torch.equal(wanted.data, whole[wanted.global_slice()])
    assert read_bytes == lengths


def test_values_are_given_in_the_type_that_is_asked_for(folder):
    wanted = piece(torch.zeros(1, 5, dtype=torch.bfloat16), (1, 0))
    read_pieces(open_stored(folder), [wanted])
    assert wanted.data.tolist() == [[5.0, 6.0, 7.0, 8.0, 9.0]]


def test_a_box_that_is_not_all_there_is_refused(folder):
    with pytest.raises(DamagedFile, match="it holds 5 of 10 elements of w"):
        read_pieces(open_stored(folder), [piece(torch.zeros(2, 5), (5, 0), rows=7)])


def test_a_cut_off_file_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".distcp" else content)
    with pytest.raises(DamagedFile, match="ends at byte"):
        read_pieces(open_stored(tmp_path), [piece(torch.zeros(6, 5), (0, 0))])


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not fit this run"):
        open_stored(tmp_path)
