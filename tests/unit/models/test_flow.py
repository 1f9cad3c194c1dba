"""What crosses a pipeline border, and that it comes out as it went in."""

from types import SimpleNamespace

import pytest
import torch

from megatron_rb.layout import Kind, parse_layout
from megatron_rb.models.flow import Boundary, Flow, boundary_before, pack, unpack
from tests.unit.planner.cases import tiny

SHAPE = tiny(3, 4, family="RoboBrain2.5-4B")
"""DeepStack mergers after vision layers 0 and 1."""
TOKENS, PATCHES = 12, 16
BATCH = SimpleNamespace(text=SimpleNamespace(num_tokens=TOKENS), vision=SimpleNamespace(num_patches=PATCHES))
MERGED = PATCHES // SHAPE.vision.merge_unit


def boundaries(text: str) -> list[Boundary]:
    layout = parse_layout(text, 3, 4, text.count("|") + 1)
    parts = [layout.slice(index) for index in range(1, layout.num_slices)]
    return [boundary_before(part, SHAPE, 3, 4) for part in parts]


def test_deepstack_features_travel_from_their_vision_layer_to_their_decoder_layer():
    assert boundaries("P v | v | v | M | E t | t | t*2 L") == [
        Boundary(Kind.PATCH_EMBED, (0,)),
        Boundary(Kind.PATCH_EMBED, (0, 1)),
        Boundary(Kind.PATCH_EMBED, (0, 1)),
        Boundary(Kind.MERGER, (0, 1)),
        Boundary(Kind.DECODER, (1,)),
        Boundary(Kind.DECODER, ()),
    ]


def test_behind_the_patch_embedding_alone_no_feature_exists_yet():
    assert boundaries("P | v*3 M E t*4 L") == [Boundary(Kind.PATCH_EMBED, ())]


def rows_of(kind: Kind, split: int) -> tuple[int, int]:
    return {
        Kind.PATCH_EMBED: (PATCHES // split, SHAPE.vision.hidden_size),
        Kind.MERGER: (MERGED, SHAPE.text.hidden_size),
        Kind.DECODER: (TOKENS // split, SHAPE.text.hidden_size),
    }[kind]


def drawn(boundary: Boundary, split: int) -> Flow:
    rows, width = rows_of(boundary.stream, split)
    features = {number: torch.randn(MERGED, 1, SHAPE.text.hidden_size) for number in reversed(boundary.deepstack)}
    return Flow(torch.randn(rows, 1, width), features)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("deepstack", [(), (1,), (0, 1)])
@pytest.mark.parametrize("kind", [Kind.PATCH_EMBED, Kind.MERGER, Kind.DECODER])
def test_unpacking_undoes_packing(kind, deepstack, split):
    boundary = Boundary(kind, deepstack)
    flow = drawn(boundary, split)
    flat = pack(flow)
    found = unpack(flat, boundary, BATCH, SHAPE, split)
    assert flat.dim() == 3 and torch.equal(found.stream, flow.stream) and sorted(found.deepstack) == list(deepstack)
    assert all(torch.equal(found.deepstack[number], flow.deepstack[number]) for number in deepstack)


def test_a_packed_flow_has_memory_of_its_own():
    flow = Flow(torch.zeros(4, 1, 2), {})
    flat = pack(flow)
    flat += 1
    assert not flow.stream.any()


def test_gradients_come_back_through_a_border():
    boundary = Boundary(Kind.DECODER, (1,))
    flow = drawn(boundary, 1)
    flow.deepstack[1].requires_grad_()
    unpack(pack(flow), boundary, BATCH, SHAPE, 1).deepstack[1].sum().backward()
    assert torch.equal(flow.deepstack[1].grad, torch.ones_like(flow.deepstack[1]))


def test_a_flow_of_another_batch_is_refused():
    boundary = Boundary(Kind.MERGER, ())
    with pytest.raises(RuntimeError, match=f"received 7 values not {MERGED * SHAPE.text.hidden_size}: the stages read"):
        unpack(torch.zeros(7, 1, 1), boundary, BATCH, SHAPE, 1)
