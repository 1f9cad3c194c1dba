"""One process of `rb parity`: runs the samples through its part of the model and writes its part of the trace."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_rb.data.sample import EncodedSample
from megatron_rb.layout import parse_layout
from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims
from megatron_rb.shapes.shape import load_shape

SPEC, SAMPLES = "spec.json", "samples.pickle"
TIMEOUT_MINUTES = 10.0


@dataclass(frozen=True)
class ParitySpec:
    """What all processes of a parity run agree on."""

    hf_path: str
    weights: str
    """Where the stack takes its weights from: a checkpoint, or the Hugging Face folder."""
    layout: str
    tp_size: int
    pp_size: int
    sequence_parallel: bool
    grads: bool
    cp_size: int = 1

    def write(self, folder: Path, samples: Sequence[EncodedSample]) -> None:
        (folder / SPEC).write_text(json.dumps(asdict(self)))
        (folder / SAMPLES).write_bytes(pickle.dumps(list(samples)))


def main(argv: Sequence[str]) -> int:
    """Read the spec and the samples from a folder, write `rank<N>.safetensors` into it."""
    folder = Path(argv[0])
    spec = ParitySpec(**json.loads((folder / SPEC).read_text()))
    samples = pickle.loads((folder / SAMPLES).read_bytes())
    platform = get_platform("auto")
    install_mcore_shims(platform)

    from megatron_rb.parallel.groups import build_groups, cpu_threads_of_rank, start_process_group
    from megatron_rb.parity.stack import default_packs, run_stack

    torch.set_num_threads(cpu_threads_of_rank(0))
    start_process_group(platform, TIMEOUT_MINUTES)
    shape = load_shape(spec.hf_path)
    layout = parse_layout(spec.layout, shape.vision.num_layers, shape.text.num_layers, spec.pp_size)
    place = build_groups(spec.tp_size, spec.pp_size, layout.vpp_size, TIMEOUT_MINUTES, 0, spec.cp_size)
    trace = run_stack(
        spec.weights,
        shape,
        layout,
        place,
        default_packs(samples),
        sequence_parallel=spec.sequence_parallel,
        grads=spec.grads,
        device=platform.current_device(),
    )
    save_file({name: value.contiguous() for name, value in trace.items()}, folder / f"rank{place.rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
