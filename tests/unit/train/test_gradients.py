"""What happens to gradients between the backward pass and the optimizer."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_rb.layout import parse_layout
from megatron_rb.layout.mesh import RankGrid
from megatron_rb.models.build import ModelOptions, build_stages
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.shapes.shape import shape_from_dict
from megatron_rb.train.gradients import TiedEmbedding, gradient_finalizer, main_grad, tie_embeddings
from tests.parity.tiny_models import MODELS


def weight(gradient: float, trained: bool = True) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.zeros(3), requires_grad=trained)
    parameter.main_grad = torch.full((3,), gradient)
    return parameter


def test_two_copies_on_one_rank_both_get_the_sum():
    copies = weight(1.0), weight(2.0)
    TiedEmbedding(copies, None).sync_gradients()
    assert [main_grad(copy).tolist() for copy in copies] == [[3.0] * 3] * 2


def test_frozen_copies_are_left_alone():
    copies = weight(1.0, trained=False), weight(2.0, trained=False)
    TiedEmbedding(copies, None).sync_gradients()
    assert [float(main_grad(copy)[0]) for copy in copies] == [1.0, 2.0]


def test_a_rank_without_a_copy_has_nothing_to_do():
    TiedEmbedding((), None).sync_gradients()


ONE, TWO = "P v*{v} M E t*{t} L", "P | v*{v} M E | t | t*{rest} L"
"""One slice; four, of which the second pipeline rank holds that of the embedding and that of the head."""


def stages_and_session(session, tied: bool, layout: str):
    shape = shape_from_dict(MODELS["qwen3_vl"][0](int(tied)).to_dict())
    vision, text = shape.vision.num_layers, shape.text.num_layers
    pp_size = 2 if layout == TWO else 1
    cut = parse_layout(layout.format(v=vision, t=text, rest=text - 1), vision, text, pp_size)
    mesh = Mesh(RankGrid(pp_size=pp_size), pp_size - 1, cut.vpp_size)
    there = replace(session, shape=shape, layout=cut, mesh=mesh)
    return build_stages(there, ModelOptions()), there


@pytest.mark.parametrize(("tied", "layout"), [(False, ONE), (False, TWO), (True, ONE)])
def test_an_untied_model_and_one_slice_need_no_tie(session, tied, layout):
    stages, there = stages_and_session(session, tied, layout)
    assert tie_embeddings(stages, there) == TiedEmbedding((), None)
    assert not any(getattr(p, "shared_embedding", False) for stage in stages for p in stage.parameters())


def test_two_chunks_of_one_rank_hold_both_copies_and_the_norm_counts_one(session):
    stages, there = stages_and_session(session, True, TWO)
    tied = tie_embeddings(stages, there)
    embedding, head = stages[0].language.embedding.tokens.weight, stages[1].language.head.output.weight
    assert tied.local[0] is embedding and tied.local[1] is head and tied.group is None
    assert embedding.shared_embedding and head.shared_embedding
    assert head.shared and not getattr(embedding, "shared", False)


class Chunk(SimpleNamespace):
    """Writes down what the finalizer asks of it."""

    def __init__(self, calls: list) -> None:
        super().__init__(calls=calls, config=SimpleNamespace(sequence_parallel=False, qk_layernorm=False))

    def finish_grad_sync(self, force_all_reduce: bool) -> None:
        self.calls.append("reduced")

    def scale_gradients(self, factor: torch.Tensor) -> None:
        self.calls.append(float(factor))


@pytest.mark.parametrize(("labels", "factor"), [(8, 0.125), (0, 1.0)])
def test_gradients_are_divided_by_the_labels_of_the_world_after_they_are_reduced(lone_mesh, labels, factor):
    calls = []
    tied = SimpleNamespace(sync_gradients=lambda: calls.append("tied"))
    gradient_finalizer(tied, lone_mesh)([Chunk(calls), Chunk(calls)], torch.tensor(labels, dtype=torch.int32))
    assert calls == ["reduced", "reduced", "tied", factor, factor]


def test_without_a_count_nothing_is_scaled(lone_mesh):
    calls = []
    gradient_finalizer(TiedEmbedding((), None), lone_mesh)([Chunk(calls)])
    assert calls == ["reduced"]
