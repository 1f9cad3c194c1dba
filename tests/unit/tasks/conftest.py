"""A tiny model in a world of this process alone, and samples whose media may be missing."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import pytest
import torch

from megatron_rb.data.problems import BadSample
from megatron_rb.data.sample import EncodedSample
from megatron_rb.models.build import ModelOptions
from megatron_rb.parallel.session import Session
from megatron_rb.parity.samples import draw_samples
from megatron_rb.platform import get_platform
from megatron_rb.shapes.balance import default_layout
from megatron_rb.shapes.shape import shape_from_dict
from megatron_rb.train.build import build_model
from megatron_rb.train.step import Runner
from tests.parity.tiny_models import MODELS


class DrawnSamples:
    """A data set of drawn samples.

    Args:
        missing: numbers of samples whose media cannot be read.
    """

    def __init__(self, samples: Sequence[EncodedSample], missing: Sequence[int] = ()) -> None:
        self.samples, self.missing = samples, set(missing)
        self.rows: list[bytes] = [b"{}"] * len(samples)
        self.read: list[tuple[int, bool]] = []

    @property
    def sizes(self) -> np.ndarray:
        return np.array([[len(sample.input_ids), sample.num_patches] for sample in self.samples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def get(self, number: int, *, with_pixels: bool) -> EncodedSample:
        self.read.append((number, with_pixels))
        if number in self.missing and with_pixels:
            raise BadSample("no such file", f"sample {number} has lost its picture")
        sample = deepcopy(self.samples[number])
        sample.pixels = sample.pixels if with_pixels else None
        return sample

    def blank(self, number: int) -> EncodedSample:
        sample = deepcopy(self.samples[number])
        sample.pixels = [np.zeros_like(pixels) for pixels in sample.pixels or []]
        return sample

    def source(self, number: int) -> tuple[str, int]:
        return "rows.jsonl", number + 1

    def row(self, number: int) -> bytes:
        return self.rows[number]


@pytest.fixture(scope="module")
def session(lone_mesh):
    shape = shape_from_dict(MODELS["qwen3_vl"][0](0).to_dict())
    return Session(get_platform("cpu"), lone_mesh, shape, default_layout(shape, 1), torch.device("cpu"))


@pytest.fixture(scope="module")
def runner(session) -> Runner:
    """Of a model without data parallelism: it judges and does not learn."""
    return Runner(build_model(session, ModelOptions(), "random"), session)


@pytest.fixture(scope="module")
def samples(session) -> list[EncodedSample]:
    """Ten: pictures, texts alone, videos, both."""
    return draw_samples(session.shape, seed=0) + draw_samples(session.shape, seed=1)


@pytest.fixture
def data_of(samples):
    """A data set of these samples, some of them lost."""
    return lambda missing=(): DrawnSamples(samples, missing)
