"""One process of `rb bench train`: reads spec and config from a folder, measures; rank 0 writes the result into it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rb.bench.train.result import save_result
from megatron_rb.bench.train.spec import CONFIG_FILE, read_spec
from megatron_rb.config.compose import config_from_file
from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims


def main(argv: Sequence[str]) -> int:
    """0 when the benchmark has been measured."""
    folder = Path(argv[0])
    config, spec = config_from_file(folder / CONFIG_FILE), read_spec(folder)
    platform = get_platform(config.platform.name)
    install_mcore_shims(platform)  # before anything imports megatron-core

    import torch.distributed as dist

    from megatron_rb.bench.train.measure import measure

    result = measure(config, spec, platform)
    if result is not None:
        save_result(result, folder)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
