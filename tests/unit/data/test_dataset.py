"""From jsonl files to samples: what is kept, what is refused, and what is remembered."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from megatron_rb.config.schema import DataConfig
from megatron_rb.data.build import build_dataset
from megatron_rb.data.ledger import Ledger, read_ledger
from megatron_rb.data.problems import BadSample


def _talk(number: int, question: str, answer: str = "Here.", **fields) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"s{number}", "conversations": turns, **fields}


@pytest.fixture
def rows_file(tmp_path, draw_image):
    """Good and bad rows, with an empty line and without a last line feed."""
    draw_image("a.png", 64, 96)
    draw_image("b.jpg", 100, 50)
    cut = draw_image("cut.jpg", 64, 64)
    Path(cut).write_bytes(Path(cut).read_bytes()[:-800])
    (tmp_path / "text.png").write_text("no image")
    lines = [
        json.dumps(_talk(1, "<image>\nWhere is it?", image="a.png")),
        "{broken",
        json.dumps(_talk(3, "Hi")),
        "",
        json.dumps(_talk(5, "<image>", image="gone.png")),
        json.dumps(_talk(6, "<image>", image="text.png")),
        json.dumps(_talk(7, "word " * 400)),
        json.dumps(_talk(8, "<image>" * 9, image=["a.png"] * 9)),
        json.dumps(_talk(9, "<image>")),
        json.dumps({"conversations": [{"from": "human", "value": "?"}]}),
        json.dumps(_talk(11, "a", points={"points": [[1200, 3]]})),
        json.dumps(_talk(12, "<image> <image>", image=["a.png", "b.jpg"])),
        json.dumps(_talk(13, "<image>", image="cut.jpg")),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "run" / "ledger.jsonl") as opened:
        yield opened


CONFIG = DataConfig(seq_length=512, max_patches=200, system_prompt="")


def _build(file, encoder, ledger, config=CONFIG, **options):
    return build_dataset(config, encoder, [str(file)], ledger, **options)


def test_every_refused_row_is_in_the_ledger_with_its_reason(rows_file, encoder, ledger, caplog):
    with caplog.at_level(logging.INFO):
        dataset = _build(rows_file, encoder, ledger)
    records = read_ledger(ledger.path)
    assert [(record["line"], record["problem"]) for record in records] == [
        (2, "not JSON"),
        (5, "missing media"),
        (6, "unreadable media"),
        (7, "too many tokens"),
        (8, "too many patches"),
        (9, "wrong marker count"),
        (10, "no assistant turn"),
        (11, "point outside"),
    ]
    assert records[1]["source"] == str(rows_file) and records[1]["id"] == "s5"
    assert records[0]["id"] == "rows:2"
    assert "gone.png" in records[1]["reason"]
    assert len(dataset) == 4
    assert dataset.index.rejected["missing media"] == 1
    assert "4 samples, 8 rows refused" in caplog.text and "1 point outside" in caplog.text


def test_decode_check_finds_broken_pixels_before_the_run(rows_file, encoder, ledger):
    dataset = _build(rows_file, encoder, ledger, DataConfig(**vars(CONFIG) | {"verify": "decode"}))
    last = read_ledger(ledger.path)[-1]
    assert (last["line"], last["problem"]) == (13, "unreadable media")
    assert len(dataset) == 3


def test_samples_are_as_large_as_the_index_says(rows_file, encoder, ledger):
    dataset = _build(rows_file, encoder, ledger)
    for number in range(3):
        sample = dataset[number]
        assert dataset.sizes[number].tolist() == [len(sample.input_ids), sample.num_patches]
        assert [len(patches) for patches in sample.pixels] == [grid.patches for grid in sample.grids]
    assert [dataset[number].sample_id for number in range(3)] == ["s1", "s3", "s12"]
    assert dataset.source(2) == (str(rows_file), 12)


def test_without_pixels_no_media_file_is_needed(rows_file, encoder, ledger):
    dataset = _build(rows_file, encoder, ledger)
    expected = dataset[0]
    (rows_file.parent / "a.png").unlink()
    sample = dataset.get(0, with_pixels=False)
    assert sample.pixels is None
    assert np.array_equal(sample.input_ids, expected.input_ids) and sample.grids == expected.grids


def test_unreadable_media_keep_their_place_as_zeros(rows_file, encoder, ledger):
    dataset = _build(rows_file, encoder, ledger)
    with pytest.raises(BadSample, match="cut.jpg does not decode"):
        dataset.get(3, with_pixels=True)
    blank = dataset.blank(3)
    assert len(blank.pixels[0]) == blank.num_patches and not blank.pixels[0].any()


def test_prompt_of_a_sample_brings_its_pixels(rows_file, encoder, ledger):
    dataset = _build(rows_file, encoder, ledger)
    prompt, sample = dataset.prompt(2), dataset[2]
    assert prompt.input_ids.tolist() == sample.input_ids[: len(prompt.input_ids)].tolist()
    assert [np.array_equal(a, b) for a, b in zip(prompt.pixels, sample.pixels, strict=True)] == [True, True]


def test_index_is_kept_and_read_again(rows_file, encoder, ledger, tmp_path, caplog):
    cache = tmp_path / "run" / "index"
    first = _build(rows_file, encoder, ledger, cache_dir=cache)
    with caplog.at_level(logging.INFO):
        second = _build(rows_file, encoder, ledger, cache_dir=cache)
    assert "index read from" in caplog.text
    assert len(read_ledger(ledger.path)) == 8
    assert second.index.rejected == first.index.rejected
    assert [np.array_equal(first[n].input_ids, second[n].input_ids) for n in range(3)] == [True] * 3
    assert second.index.media_infos(2) == first.index.media_infos(2)


def test_index_follows_the_file_and_the_limits(rows_file, encoder, ledger, tmp_path):
    cache = tmp_path / "run" / "index"
    _build(rows_file, encoder, ledger, cache_dir=cache)
    shorter = DataConfig(**vars(CONFIG) | {"max_patches": 40})
    assert len(_build(rows_file, encoder, ledger, shorter, cache_dir=cache)) == 3
    rows_file.write_text(rows_file.read_text() + "\n" + json.dumps(_talk(14, "Bye")))
    assert len(_build(rows_file, encoder, ledger, cache_dir=cache)) == 5
    assert len(list(cache.iterdir())) == 3


def test_media_root_is_where_paths_start(rows_file, encoder, ledger, tmp_path):
    moved = tmp_path / "elsewhere" / "rows.jsonl"
    moved.parent.mkdir()
    moved.write_text(json.dumps(_talk(1, "<image>", image="a.png")))
    config = DataConfig(**vars(CONFIG) | {"media_root": str(rows_file.parent)})
    assert len(_build(moved, encoder, ledger, config)[0].grids) == 1


def test_a_file_without_usable_row_is_an_error(tmp_path, encoder, ledger):
    file = tmp_path / "bad.jsonl"
    file.write_text("{\n{\n")
    with pytest.raises(
        ValueError, match=r"no usable sample in .*bad.jsonl \(2 rows refused: 2 not JSON\); the first, .* line 1: "
    ):
        _build(file, encoder, ledger)


def test_a_missing_file_is_an_error(tmp_path, encoder, ledger):
    with pytest.raises(ValueError, match="no data file .*gone.jsonl"):
        _build(tmp_path / "gone.jsonl", encoder, ledger)


def test_a_file_that_shrank_during_the_run_is_an_error(rows_file, encoder, ledger):
    dataset = _build(rows_file, encoder, ledger)
    rows_file.write_text("{}")
    with pytest.raises(ValueError, match="has changed since it was indexed"):
        dataset.get(2, with_pixels=False)
