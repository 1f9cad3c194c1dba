"""Run the real step of single ranks of a GPU run on this machine without a GPU, and find what would fail there."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from megatron_rb.config.child_processes import STOPPED, stopped_by_signals
from megatron_rb.config.result_files import writable_file, writable_folder, write_whole
from megatron_rb.platform.cpu_build import cpu_interpreter
from megatron_rb.rehearsal.page import write_page
from megatron_rb.rehearsal.prepare import Rehearsal, RehearsalRequest, prepare
from megatron_rb.rehearsal.recipes import page, recipes, rehearse_recipes, table
from megatron_rb.rehearsal.report import lines
from megatron_rb.rehearsal.run import Rehearsed, rehearse
from megatron_rb.rehearsal.summary import summarise


def main(argv: list[str]) -> int:
    """0 when everything fits and every message has its other side, 1 when not."""
    options = _parser().parse_intermixed_args(argv)
    try:
        with stopped_by_signals():
            return _run(options)
    except KeyboardInterrupt:
        print("rb: stopped; nothing was written", file=sys.stderr)
        return STOPPED


def _run(options: argparse.Namespace) -> int:
    _check_numbers(options)
    files = [writable_file(path) for path in (options.json, options.html) if path]
    if len(files) == 2 and files[0].resolve() == files[1].resolve():
        raise ValueError(f"--json and --html both name {files[0]}; give each a file of its own")
    request = RehearsalRequest(
        tuple(options.settings),
        options.ranks,
        options.mix,
        options.steps,
        options.micro_batches,
        options.device,
        options.data,
        options.evaluation,
        options.checkpoint,
        not options.no_compile,
        options.packages,
    )
    if options.recipes and (request != RehearsalRequest((), compiled=request.compiled) or options.json or options.html):
        raise ValueError("--recipes rehearses every recipe as it is; leave out settings and other options")
    if options.recipes:
        return _recipes(writable_folder(options.recipes), options.processes, _interpreter(options))
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        rehearsal = prepare(request, Path(folder) / "prepared")
        python = _interpreter(options)
        summary = summarise(rehearsal, _rehearsed(rehearsal, Path(folder), options.processes, python))
    print("\n".join(lines(summary)))
    if options.json:
        write_whole(Path(options.json), json.dumps(summary.as_json(), indent=1))
    if options.html:
        write_page(summary, Path(options.html))
    return 0 if summary.sound else 1


def _check_numbers(options: argparse.Namespace) -> None:
    least = {"steps": 1, "micro-batches": 0, "processes": 0}
    given = {name: getattr(options, name.replace("-", "_")) for name in least}
    for name, number in given.items():
        if number < least[name]:
            raise ValueError(f"--{name} is {number}; give 1 or more{'' if least[name] else ', or leave it out'}")


def _interpreter(options: argparse.Namespace) -> str:
    return cpu_interpreter(lambda text: options.make_environment or _agrees(text))


def _recipes(out: Path, processes: int, python: str) -> int:
    """Rehearse every recipe of a published model and write the table."""
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder, _bar() as bar:
        task = bar.add_task("ranks", total=None)
        found = rehearse_recipes(recipes(), Path(folder), partial(_show, bar, task), processes=processes, python=python)
    write_whole(out / "recipes.md", page(found))
    write_whole(out / "recipes.json", json.dumps([each.as_json() for each in found], indent=1))
    print("\n".join(table(found)))
    return 0 if all(each.sound for each in found) else 1


def _bar() -> Progress:
    columns = ("rehearsing ranks", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def _agrees(text: str) -> bool:
    """Ask at a terminal; elsewhere nobody has agreed."""
    return sys.stdin.isatty() and input(f"{text}? [y/N] ").strip().lower() in ("y", "yes")


def _rehearsed(rehearsal: Rehearsal, folder: Path, processes: int, python: str) -> Rehearsed:
    with _bar() as bar:
        task = bar.add_task("ranks", total=len(rehearsal.ranks))
        show = partial(_show, bar, task)
        return rehearse([rehearsal], folder, processes, show, python=python)[0]


def _show(bar: Progress, task: TaskID, done: int, wanted: int) -> None:
    bar.update(task, completed=done, total=wanted)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb rehearse", description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the run, as for rb launch")
    parser.add_argument(
        "--ranks", default="classes", metavar="WHICH", help="classes (default), all, or numbers as 0,8-15"
    )
    parser.add_argument(
        "--mix", default="", metavar="NAME", help="samples, as for rb bench train; default by the budgets"
    )
    parser.add_argument("--data", default="", metavar="FILE", help="sizes of samples that rb data stats has written")
    parser.add_argument("--evaluation", action="store_true", help="evaluate after the steps")
    parser.add_argument("--checkpoint", action="store_true", help="save and load a checkpoint after that")
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="steps of every rank")
    parser.add_argument(
        "--micro-batches", type=int, default=0, metavar="N", help="of a step and copy; default as the settings say"
    )
    parser.add_argument(
        "--device",
        default="",
        metavar="NAME",
        help="of conf/device, or a yaml file; default the first that the recipe names, else h200",
    )
    parser.add_argument(
        "--with",
        dest="packages",
        default="",
        metavar="PACKAGES",
        help="of the cluster, as flash_attn=2.8.3,flash_attn_3,flash_attn_4,transformer_engine=2.9, or none; default "
        "those that are installed here",
    )
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="at the same time; default one per core")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the Triton kernels that are started")
    parser.add_argument(
        "--make-environment",
        action="store_true",
        help="where torch is a CUDA build, make an environment with a CPU build in the cache without asking",
    )
    parser.add_argument("--recipes", default="", metavar="DIR", help="rehearse every recipe and write the table there")
    parser.add_argument("--json", default="", metavar="FILE", help="write everything")
    parser.add_argument("--html", default="", metavar="FILE", help="write a page")
    return parser
