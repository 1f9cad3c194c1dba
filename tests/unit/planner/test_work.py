"""Parameters and FLOPs against the published models and hand-computed figures."""

import numpy as np
import pytest

from megatron_rb.layout import Kind, block_list
from megatron_rb.planner.cost import model_flops
from megatron_rb.planner.trained import Frozen
from megatron_rb.planner.work import PARTS, Part, Shards, forward_work, parameters, part_counts
from megatron_rb.planner.workload import MicroBatches
from megatron_rb.shapes.published import PARAMETERS
from tests.unit.planner.cases import published


def one(tokens: float, pairs: float, patches: float, frame_pairs: float, labels: float) -> MicroBatches:
    return MicroBatches(*(np.array([value]) for value in (tokens, pairs, patches, frame_pairs, labels, 1.0)))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parts_make_the_published_number_of_parameters(name: str):
    model = published(name)
    sizes, counts = parameters(model, 1), part_counts(model).sum(axis=0)
    total = sum(int(count) * sizes[part] for part, count in zip(PARTS, counts, strict=True))
    if model.text.tied_embeddings:
        total -= model.text.vocab_size * model.text.hidden_size
    assert total == PARAMETERS[name]


def test_padded_ffn_costs_what_it_computes():
    model, batch = published("RoboBrain2.0-7B"), one(0, 0, 1000, 64000, 0)
    work = forward_work(model, Shards(8, False, 2), batch)[Part.WINDOW_LAYER]
    assert 3420 % 8 != 0
    assert work.matmul[0] == 2 * 1000 * (4 * 1280 * 1280 / 8 + 3 * 1280 * 428)


def test_windows_and_whole_frames_differ_in_attention_only():
    model, batch = published("RoboBrain2.0-7B"), one(0, 0, 1024, 1024 * 1024, 0)
    works = forward_work(model, Shards(1, False, 2), batch)
    window, full = works[Part.WINDOW_LAYER], works[Part.FULL_LAYER]
    assert window.matmul[0] == full.matmul[0]
    assert window.attention[0] == 4 * 1024 * 64 * 1280
    assert full.attention[0] == 4 * 1024 * 1024 * 1280


def test_packed_causal_attention_counts_the_samples_apart():
    model = published("RoboBrain2.0-7B")
    whole = forward_work(model, Shards(1, False, 2), one(4096, 4096**2, 0, 0, 0))[Part.DECODER]
    packed = forward_work(model, Shards(1, False, 2), one(4096, 4 * 1024**2, 0, 0, 0))[Part.DECODER]
    assert packed.attention[0] * 4 == whole.attention[0]
    assert whole.attention[0] == 2 * 4096**2 * 28 * 128
    assert packed.matmul[0] == whole.matmul[0]


def test_model_flops_of_text_are_six_a_parameter_and_token():
    model = published("RoboBrain2.0-7B")
    flops = model_flops(model, one(1000, 0, 0, 0, 1000), Frozen())[0]
    layers = 28 * (3584 * 3584 * 2 + 2 * 3584 * 4 * 128 + 3 * 3584 * 18944)
    assert flops == pytest.approx(6 * 1000 * (layers + 152064 * 3584))


def test_every_block_has_its_parts_and_deepstack_mergers_count_as_one_more():
    model = published("RoboBrain2.5-8B")
    counts = part_counts(model)
    assert len(counts) == len(block_list(27, 36))
    with_merger = [
        row for row, block in enumerate(block_list(27, 36)) if block.kind is Kind.VISION and block.index in (8, 16, 24)
    ]
    assert np.flatnonzero(counts[:, PARTS.index(Part.DEEPSTACK)]).tolist() == with_merger
    assert (counts.sum(axis=1) == 1 + counts[:, PARTS.index(Part.DEEPSTACK)]).all()
