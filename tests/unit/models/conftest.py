"""One tiny model of every family twice: transformers' own and the stage that holds all of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rb.checkpoint.hf.oracle import load_transformers, model_inputs
from megatron_rb.checkpoint.hf.reader import HFReader
from megatron_rb.data.sample import EncodedSample
from megatron_rb.models.build import ModelOptions, build_stages, fill_weights
from megatron_rb.models.inputs import MicroBatch, build_micro_batch, to_device
from megatron_rb.models.stage import RoboBrainStage
from megatron_rb.parallel.mesh import Mesh
from megatron_rb.parallel.session import Session
from megatron_rb.parity.samples import draw_samples
from megatron_rb.platform import get_platform
from megatron_rb.shapes.balance import default_layout
from megatron_rb.shapes.shape import RoboBrainShape, load_shape
from tests.parity.tiny_models import MODELS, write_model


@dataclass(frozen=True)
class Pair:
    """Both models, a sample with several pictures, and what transformers' modules took and gave for it."""

    theirs: Any
    ours: RoboBrainStage
    shape: RoboBrainShape
    sample: EncodedSample
    taken: dict[torch.nn.Module, torch.Tensor]
    """Hidden state in front of each module, `[rows, hidden]`."""
    given: dict[torch.nn.Module, torch.Tensor]
    """Hidden state behind it."""

    @property
    def batch(self) -> MicroBatch:
        """The sample as our blocks read it, its rotary angles included."""
        batch = build_micro_batch([self.sample], self.shape, tp_rank=0, tp_size=1, sequence_parallel=False)
        return to_device(batch, self.shape, torch.device("cpu"))


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request, lone_mesh: Mesh, tmp_path_factory) -> Pair:
    folder = write_model(tmp_path_factory.mktemp("model") / "hf", request.param, seed=0)
    shape, theirs = load_shape(folder), load_transformers(folder)
    sample = draw_samples(shape, seed=2, scale=2)[2]
    taken, given = _recorded(theirs, model_inputs(sample, shape))
    return Pair(theirs, _stage_of(folder, shape, lone_mesh), shape, sample, taken, given)


def _stage_of(folder: Path, shape: RoboBrainShape, mesh: Mesh) -> RoboBrainStage:
    session = Session(get_platform("cpu"), mesh, shape, default_layout(shape, 1), torch.device("cpu"))
    stages = build_stages(session, ModelOptions())
    fill_weights(stages, mesh, HFReader(folder, shape).read)
    return stages[0]


def _recorded(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    taken: dict[torch.nn.Module, torch.Tensor] = {}
    given: dict[torch.nn.Module, torch.Tensor] = {}

    def record(module, arguments, options, output) -> None:
        values = arguments[0] if arguments else options["hidden_states"]
        taken[module], given[module] = (_flat(each) for each in (values, output))

    visual, text = model.model.visual, model.model.language_model
    mergers = [visual.merger, *getattr(visual, "deepstack_merger_list", [])]
    for module in (visual.patch_embed, *visual.blocks, *mergers, *text.layers, text.norm):
        module.register_forward_hook(record, with_kwargs=True)
    with torch.no_grad():
        given[model] = _flat(model(**inputs).logits)
    return taken, given


def _flat(values) -> torch.Tensor:
    values = values[0] if isinstance(values, tuple) else values
    return values.detach().reshape(-1, values.shape[-1])
