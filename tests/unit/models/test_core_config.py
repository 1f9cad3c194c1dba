"""What megatron-core is told."""

import pytest

from megatron_rb.layout.mesh import RankGrid
from megatron_rb.models.build import ModelOptions, core_config
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.shapes.shape import load_shape
from tests.parity.tiny_models import write_model


@pytest.mark.parametrize("vpp_size", [1, 2])
def test_outputs_are_freed_after_a_send_only_where_the_schedule_waits_for_it(vpp_size, tmp_path):
    """A tensor whose data is exchanged while gloo sends it arrives as whatever took its memory."""
    shape = load_shape(write_model(tmp_path / "hf", "qwen3_vl", seed=0))
    mesh = Mesh(RankGrid(pp_size=2), vpp_size=vpp_size)
    config = core_config(shape, mesh, ModelOptions())
    assert config.overlap_p2p_comm == (vpp_size > 1)
    assert not (config.overlap_p2p_comm and config.deallocate_pipeline_outputs)
