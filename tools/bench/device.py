"""The first ten minutes on a device: steps and their memory, logits, kernels, speed, a resume; one folder to keep."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rb.config.child_processes import STOPPED, stopped_by_signals
from megatron_rb.config.result_files import writable_file, writable_folder

if TYPE_CHECKING:
    from megatron_rb.bench.device.run import PartOutcome

MINUTES = 10.0
NAMES = ("smoke", "smoke-te", "rehearsal", "parity", "tests", "kernels", "train", "resume")
USUAL_DEVICE = "h200"
SLOWER = 5
"""A part of the dry form may take so many times as long: nothing waits for a device that is paid for."""


def main(argv: list[str]) -> int:
    """0 when every part is done or has nothing to do here, 1 when one failed or was not reached."""
    options = _parser().parse_args(argv)
    try:
        with stopped_by_signals():
            return _run(options)
    except KeyboardInterrupt:
        print("rb: stopped; the parts that were done are kept", file=sys.stderr)
        return STOPPED


def _run(options: argparse.Namespace) -> int:
    if not 0 < options.minutes < float("inf"):
        raise ValueError(f"--minutes is {options.minutes:g}; give a number above 0")
    if options.rehearse and (options.dry or options.parts or options.out):
        raise ValueError("--rehearse runs no part and writes its FILE alone; leave out --dry, --parts and --out")
    if options.rehearse:
        writable_file(options.rehearse)
    if options.out:
        writable_folder(options.out)
    # These import torch.
    from megatron_rb.bench.device.parts import KEPT, PARTS, rehearse_smoke
    from megatron_rb.bench.device.run import FirstLook, look, new_folder
    from megatron_rb.bench.device.workplace import Workplace, checkout
    from megatron_rb.bench.train.result import versions
    from megatron_rb.planner.device import load_device, shipped_device
    from megatron_rb.platform import get_platform

    platform = get_platform("cpu" if options.dry else "auto")
    if platform.name != "cuda" and not (options.dry or options.rehearse):
        raise ValueError(
            f"there is no NVIDIA GPU here ({platform.name}); --dry runs the same parts with small models on the CPU"
        )
    on_device = not options.dry
    device = options.device or shipped_device(str(platform.info()["device"])) or USUAL_DEVICE
    memory = (platform.memory().total or 0) if platform.name == "cuda" else int(load_device(device).memory)
    folder = Path(options.out or f"{KEPT}/{'dry' if options.dry else device}-{time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory(prefix="first-look-") as scratch:
        place = Workplace(folder, Path(scratch), on_device, device, memory, checkout())
        if options.rehearse:
            place.folder, place.deadline = Path(scratch), time.monotonic() + options.minutes * 60
            peak = rehearse_smoke(place, Path(options.rehearse))
            print(f"{peak / 2**30:.2f} GiB rehearsed; wrote {options.rehearse}")
            return 0
        longer = SLOWER if options.dry else 1
        named = [part for part in PARTS if not options.parts or part.name in options.parts]
        parts = [replace(part, seconds=part.seconds * longer) for part in named]
        found = FirstLook(time.strftime("%Y-%m-%d"), options.dry, platform.info(), versions(), ())
        new_folder(folder)
        found = look(parts, place, options.minutes * 60, found, _tell)
    print(f"{folder / 'README.md'} has the figures")
    return 0 if found.sound else 1


def _tell(outcome: PartOutcome) -> None:
    figures = ", ".join(f"{name} {value}" for name, value in outcome.figures.items() if value is not None)
    print(f"{outcome.name:<10} {outcome.state:<12} {outcome.seconds:>6.1f} s  {figures or outcome.why}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb bench device", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, metavar="M", help="for all parts (10)")
    parser.add_argument("--dry", action="store_true", help="the same parts with small models on the CPU")
    parser.add_argument(
        "--parts", nargs="+", default=[], metavar="PART", help=f"these alone of {', '.join(NAMES)}", choices=NAMES
    )
    parser.add_argument(
        "--device",
        default="",
        metavar="NAME",
        help="of conf/device, for what is rehearsed; default this one, else h200",
    )
    parser.add_argument("--out", default="", metavar="DIR", help="default: benchmarks/device/<device>-<date>")
    parser.add_argument(
        "--rehearse",
        default="",
        metavar="FILE",
        help="only rehearse the steps of the device, on a machine without it, and keep the peak memory",
    )
    return parser
