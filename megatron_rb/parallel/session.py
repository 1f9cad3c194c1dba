"""`Session`: an opened world with a model laid out on it; a record that functions on any floor may take."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_rb.layout import PipelineLayout
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.platform import Platform
from megatron_rb.shapes.shape import RoboBrainShape


@dataclass(frozen=True)
class Session:
    """Where this process computes, with whom, and which part of which model. `app.session` opens it."""

    platform: Platform
    mesh: Mesh
    shape: RoboBrainShape
    layout: PipelineLayout
    device: torch.device

    def with_model(self, shape: RoboBrainShape, layout: PipelineLayout) -> Session:
        """The same ranks and groups with another model on them, cut into as many stages and chunks."""
        assert (layout.pp_size, layout.vpp_size) == (self.mesh.pp_size, self.mesh.vpp_size), str(layout)
        return replace(self, shape=shape, layout=layout)
