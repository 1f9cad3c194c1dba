"""Looks at a device part by part, each within its time, and writes what it found as one folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rb.bench.device.parts import Figures, LookPart
from megatron_rb.bench.device.workplace import OutOfTime, PartFailed, Skipped, Workplace

RESULTS_FILE, PAGE_FILE = "results.json", "README.md"
DONE, FAILED, LATE, SKIPPED = "done", "failed", "out of time", "skipped"


@dataclass(frozen=True)
class PartOutcome:
    """What became of one part."""

    name: str
    about: str
    state: str
    seconds: float
    figures: Figures
    why: str = ""
    """Of a part that is not done."""


@dataclass(frozen=True)
class FirstLook:
    """All that was found on a device."""

    date: str
    dry: bool
    device: dict[str, Any]
    versions: dict[str, str]
    outcomes: tuple[PartOutcome, ...]

    @property
    def sound(self) -> bool:
        return all(outcome.state in (DONE, SKIPPED) for outcome in self.outcomes)


def look(
    parts: Sequence[LookPart],
    place: Workplace,
    seconds: float,
    found: FirstLook,
    tell: Callable[[PartOutcome], None] = lambda outcome: None,
) -> FirstLook:
    """Run the parts one after the other; the folder is whole after each of them.

    Args:
        seconds: for all parts together; those that are not reached are out of time.
        found: device and versions; its outcomes come first.
    """
    end = time.monotonic() + seconds
    for part in parts:
        outcome = _outcome(part, place, end)
        found = FirstLook(found.date, found.dry, found.device, found.versions, (*found.outcomes, outcome))
        _write(place.folder / RESULTS_FILE, json.dumps(asdict(found), indent=1) + "\n")
        _write(place.folder / PAGE_FILE, "\n".join(page(found)) + "\n")
        tell(outcome)
    return found


def _outcome(part: LookPart, place: Workplace, end: float) -> PartOutcome:
    start = time.monotonic()
    if start >= end:
        return PartOutcome(part.name, part.about, LATE, 0.0, {}, "the time was over before it began")
    place.part, place.deadline = part.name, min(start + part.seconds, end)
    try:
        state, figures, why = DONE, part.run(place), ""
    except Skipped as reason:
        state, figures, why = SKIPPED, {}, str(reason)
    except OutOfTime:
        state, figures, why = LATE, {}, f"ended after {time.monotonic() - start:.0f} s"
    except Exception as error:  # whatever it is, the other parts are still to be looked at
        state, figures, why = FAILED, {}, str(error) if isinstance(error, PartFailed) else repr(error)
    return PartOutcome(part.name, part.about, state, round(time.monotonic() - start, 1), figures, why)


def page(found: FirstLook) -> Iterator[str]:
    """The results as Markdown."""
    device = found.device.get("device") or found.device.get("name") or "a device"
    yield f"# First look at {device}"
    yield ""
    yield f"{found.date}; " + ", ".join(f"{name} {version}" for name, version in found.versions.items()) + "."
    if found.dry:
        yield ""
        yield "**Dry form**: small models on a CPU, to show that the parts run. No figure here is one of a device."
    yield ""
    yield "| part | what | state | s | figures |"
    yield "|---|---|---|---|---|"
    for each in found.outcomes:
        figures = "; ".join(f"{name}: {value}" for name, value in each.figures.items() if value is not None)
        words = "; ".join(text for text in (figures, each.why) if text).replace("|", "/")
        yield f"| {each.name} | {each.about} | {each.state} | {each.seconds} | {words} |"
    yield from _memory(found)
    yield ""
    yield f"Every figure is in {RESULTS_FILE} and the folders of the parts, what the commands said in logs/."


def _memory(found: FirstLook) -> Iterator[str]:
    """The measured peak beside the rehearsed and the forecast one, where all are there."""
    figures = {each.name: each.figures for each in found.outcomes}
    measured = figures.get("smoke", {}).get("peak GiB")
    rehearsed = figures.get("rehearsal", {}).get("rehearsed peak GiB")
    if measured is None or rehearsed is None:
        return
    yield ""
    yield f"Peak memory: {measured} GiB measured, {rehearsed} GiB rehearsed ({measured / rehearsed - 1:+.1%})."


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def new_folder(path: Path) -> Path:
    """Make a folder that is empty or absent.

    Raises:
        ValueError: something is in it.
    """
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty; name a new folder with --out, or remove it")
    path.mkdir(parents=True, exist_ok=True)
    return path
