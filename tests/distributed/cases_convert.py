"""Imported checkpoints opened, and checkpoints saved for export, under layouts of two ranks."""

from __future__ import annotations

from pathlib import Path

from megatron_rb.layout.mesh import RankGrid
from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims

install_mcore_shims(get_platform("cpu"))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_rb.checkpoint.hf.reader import HFReader  # noqa: E402
from megatron_rb.checkpoint.manager import load_weights, save_weights  # noqa: E402
from megatron_rb.checkpoint.sharded import model_state  # noqa: E402
from megatron_rb.models.build import (  # noqa: E402
    ModelOptions,
    build_stages,
    fill_weights,
    named_parameters,
)
from megatron_rb.parallel.groups import build_mesh, destroy_groups  # noqa: E402
from megatron_rb.parallel.session import Session  # noqa: E402
from megatron_rb.parallel.world import start_process_group  # noqa: E402
from megatron_rb.shapes.balance import default_layout  # noqa: E402
from megatron_rb.shapes.shape import load_shape, model_fingerprint  # noqa: E402


def load_and_save(models: list[dict[str, str]]) -> list[dict]:
    """Of every model (`hf`, `imported`, `saved`) and every degree: parameters that differ from the folder's.

    Each layout's weights are saved into the folder `saved` + its name.
    """
    platform = get_platform("cpu")
    start_process_group(platform, 2.0)
    results = []
    for model in models:
        for name, tp_size, pp_size in (("tp2", 2, 1), ("pp2", 1, 2)):
            shape = load_shape(model["hf"])
            mesh = build_mesh(RankGrid.of_world(dist.get_world_size(), tp_size, pp_size), 1, 2.0, seed=0)
            layout = default_layout(shape, pp_size)
            session = Session(platform, mesh, shape, layout, torch.device("cpu"))
            stages = build_stages(session, ModelOptions())
            fill_weights(stages, mesh, HFReader(model["hf"], shape).read)
            expected = {key: value.detach().clone() for key, value in named_parameters(stages)}
            folder = Path(f"{model['saved']}-{name}")
            folder.mkdir(exist_ok=True)
            dist.barrier()
            save_weights(model_state(stages), model_fingerprint(shape), platform, folder)
            with torch.no_grad():
                for _, parameter in named_parameters(stages):
                    parameter.fill_(-7.0)
            load_weights(list(stages), model_fingerprint(shape), model["imported"])
            differing = [key for key, value in named_parameters(stages) if not torch.equal(value, expected[key])]
            results.append({"layout": name, "compared": len(expected), "differing": differing})
            destroy_groups()
    return results
