"""One process of a generation run; started by `rb eval` and `rb value score`, or by srun or torchrun on the folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rb.generation.spec import GenerationSpec
from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims


def main(argv: Sequence[str]) -> int:
    """Read the spec from a folder and answer; every data-parallel rank appends to its part of the answers file."""
    spec = GenerationSpec.read(Path(argv[0]))
    platform = get_platform("auto")
    install_mcore_shims(platform)  # before anything imports megatron-core

    from megatron_rb.generation.run import run

    run(spec, platform)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:  # weights or questions that do not fit; rank 0 writes to the console
        print(f"generation: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # a normal exit would wait for ranks that sit in a collective
