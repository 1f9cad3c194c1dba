"""Messages between pipeline stages, whose sizes both sides compute."""

from types import SimpleNamespace

import pytest
import torch

from megatron_rb.layout.mesh import RankGrid
from megatron_rb.layout.text import parse_layout
from megatron_rb.models.inputs import build_micro_batch
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parity.samples import draw_samples
from megatron_rb.train.pipeline import order_of_passes, received_values, run_schedule, stated_messages

CUT = "P v v | v v M E t | t | t*3 L"
"""Of the tiny Qwen3-VL: four vision layers, five decoder layers."""


@pytest.fixture
def batches(session):
    samples = draw_samples(session.shape, seed=1)[:2]
    options = {"tp_rank": 0, "tp_size": 2, "sequence_parallel": True}
    return [build_micro_batch([sample], session.shape, **options) for sample in samples]


def on_rank(session, pp_rank: int, text: str, pp_size: int):
    """The session of one rank of a pipeline, whose groups nobody asks."""
    shape = session.shape
    layout = parse_layout(text, shape.vision.num_layers, shape.text.num_layers, pp_size)
    mesh = Mesh(RankGrid(pp_size=pp_size), pp_rank, layout.vpp_size, session.mesh.groups)
    return SimpleNamespace(mesh=mesh, shape=shape, layout=layout)


def test_what_a_stage_gets_is_the_rows_of_its_stream_and_the_features_on_their_way(session, batches):
    shape, batch = session.shape, batches[0]
    patches, tokens = batch.vision.num_patches // 2, batch.text.num_tokens // 2
    merged = batch.vision.num_patches // shape.vision.merge_unit
    deepstack = len(shape.vision.deepstack_layers)
    there = on_rank(session, 0, CUT, 4)
    found = [received_values(there, 2, number, batch) for number in (1, 2, 3)]
    text = shape.text.hidden_size
    waiting = [sum(layer < 2 for layer in shape.vision.deepstack_layers), max(0, deepstack - 1), max(0, deepstack - 2)]
    assert found == [
        patches * shape.vision.hidden_size + waiting[0] * merged * text,
        tokens * text + waiting[1] * merged * text,
        tokens * text + waiting[2] * merged * text,
    ]


def taken(messages, forward: int, backward: int) -> tuple[list[int], list[int]]:
    ahead = [messages._communicate_shapes(None, None, True, False) for _ in range(forward)]
    back = [messages._communicate_shapes(None, None, False, True) for _ in range(backward)]
    return [first[0] for first, _ in ahead], [second[0] for _, second in back]


@pytest.mark.parametrize(("text", "pp_size"), [(CUT, 4), (CUT, 2)])
def test_what_a_stage_expects_is_what_its_neighbour_sends(session, batches, text, pp_size):
    """By slice and micro-batch, in the order of the schedule: for every rank and both directions."""
    config = SimpleNamespace(virtual_pipeline_model_parallel_size=None)
    names = ["first", "second"]
    for pp_rank in range(pp_size):
        there = on_rank(session, pp_rank, text, pp_size)
        parts = there.layout.slices_of_rank(pp_rank)
        order = order_of_passes(2, there)
        messages = stated_messages(there, config, names, lambda part, name: (part, name))
        ahead = [(parts[chunk].index, names[n]) for n, chunk in order if parts[chunk].index]
        back = [(parts[-1 - chunk].index + 1, names[n]) for n, chunk in order]
        back = [(part, name) for part, name in back if part < there.layout.num_slices]
        assert taken(messages, len(ahead), len(back)) == (ahead, back)


def test_an_interleaved_pipeline_runs_a_group_of_micro_batches_through_every_chunk(session):
    there = on_rank(session, 0, CUT, 2)
    assert order_of_passes(4, there) == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]


def test_every_chunk_reads_all_batches_in_order(session, trainable):
    seen = []

    def step(iterator, chunk):
        seen.append(next(iterator))
        return torch.zeros(1), lambda output: (output.sum(), torch.tensor(1), {"seen": seen[-1]})

    with torch.no_grad():
        results = run_schedule(session, trainable.chunks, ["a", "b", "c"], step, values=None, forward_only=True)
    assert seen == ["a", "b", "c"] and [result["seen"] for result in results] == seen
