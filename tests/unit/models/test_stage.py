"""Which layers of a slice are recomputed, and that it changes nothing but memory."""

import pytest
import torch

from megatron_rb.layout import parse_layout
from megatron_rb.layout.mesh import RankGrid
from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims
from tests.unit.planner.cases import tiny

install_mcore_shims(get_platform("cpu"))

from megatron_rb.bench.blocks import draw_micro_batch  # noqa: E402
from megatron_rb.models.build import ModelOptions, build_stages, fill_weights, random_weights  # noqa: E402
from megatron_rb.models.inputs import to_device  # noqa: E402
from megatron_rb.models.stage import Recompute  # noqa: E402
from megatron_rb.parallel.groups import build_mesh, destroy_groups  # noqa: E402
from megatron_rb.parallel.mesh import Mesh  # noqa: E402
from megatron_rb.parallel.session import Session  # noqa: E402


def test_every_slice_does_the_same_unless_it_has_a_number_of_its_own():
    assert Recompute(2, 3).of_slice(5) == Recompute(2, 3)
    assert Recompute(2, 3, vision_per_slice=(4, 0)).of_slice(0) == Recompute(4, 3)
    assert Recompute(2, 3, (4, 0), (1, -1)).of_slice(1) == Recompute(0, -1)


@pytest.fixture
def lone_world():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield build_mesh(RankGrid(), 1, timeout_minutes=1, seed=0)
    destroy_groups()
    torch.distributed.destroy_process_group()


def gradients(recompute: Recompute) -> tuple[list[torch.Tensor], int]:
    """Gradients of both slices, one behind the other in this process, and how many layer calls the backward made."""
    shape = tiny(3, 3)
    layout = parse_layout("P v*2 | v M E t*3 L", 3, 3, 2)
    stages = []
    for rank in range(2):
        mesh = Mesh(RankGrid(pp_size=2), rank)
        session = Session(get_platform("cpu"), mesh, shape, layout, torch.device("cpu"))
        stages += build_stages(session, ModelOptions(recompute=recompute))
    fill_weights(stages, Mesh(RankGrid()), random_weights(stages, 0))
    calls = []
    for stage in stages:
        for layer in [*stage.vision.layers.values(), *stage.language.layers.values()]:
            layer.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = to_device(draw_micro_batch(shape, 64, 64), shape, torch.device("cpu"))
    stages[1].set_input_tensor(stages[0](batch))
    loss = stages[1](batch)
    before = len(calls)
    loss.backward()
    return [parameter.grad for stage in stages for parameter in stage.parameters()], len(calls) - before


def test_layers_are_recomputed_slice_by_slice_and_gradients_stay(lone_world):
    expected, none = gradients(Recompute())
    found, again = gradients(Recompute(vision_per_slice=(1, 0), language_per_slice=(0, 2)))
    assert (none, again) == (0, 3)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)
