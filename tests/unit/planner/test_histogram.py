"""Histograms of sample sizes: counted, kept on disk, checked against the limits of a run."""

from pathlib import Path

import numpy as np
import pytest

from megatron_rb.planner.histogram import MOST_BINS, Histogram, histogram_of, load_histogram


def test_counts_and_comes_back_from_disk(tmp_path: Path):
    text, patches = np.array([10, 10, 20]), np.array([64, 64, 0])
    histogram = histogram_of(text, patches, np.array([32.0, 64.0, 0.0]), "three samples")
    histogram.save(tmp_path / "stats.json")
    again = load_histogram(tmp_path / "stats.json")
    assert again.text_tokens.tolist() == [10, 20]
    assert again.patches.tolist() == [64, 0]
    assert again.frame_patches.tolist() == [48.0, 0.0]
    assert again.counts.tolist() == [2, 1]
    assert again.source == "three samples"


def test_many_sizes_are_rounded_up_and_none_is_lost():
    draw = np.random.default_rng(0)
    text, patches = draw.integers(1, 5000, 30000), 4 * draw.integers(0, 5000, 30000)
    histogram = histogram_of(text, patches, patches.astype(float), "many")
    assert len(histogram.counts) <= MOST_BINS
    assert histogram.num_samples == 30000
    assert histogram.text_tokens @ histogram.counts >= text.sum()
    assert histogram.patches @ histogram.counts >= patches.sum()


def test_sample_above_the_limit_is_told_with_numbers():
    histogram = Histogram(np.array([100, 5000]), np.array([0, 16000]), np.zeros(2), np.array([9, 1]))
    with pytest.raises(
        ValueError, match=r"1 of 10 samples .*\(10.00%\).* seq_length 4096 .* 9000: use seq_length=9216"
    ):
        histogram.check(4096, 16384, 4)
    with pytest.raises(ValueError, match="max_patches=16384"):
        histogram.check(16384, 8192, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "is no histogram"),
        ('{"text_tokens": [1], "counts": [1]}', "patches"),
        ('{"text_tokens": [1], "patches": [4], "counts": [0]}', "at least one sample"),
        ('{"text_tokens": [1, 2], "patches": [4], "counts": [1]}', "different lengths"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str):
    (tmp_path / "stats.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_histogram(tmp_path / "stats.json")
