"""What a conversion leaves behind beside the tensors: `manifest.json`, a summary, and the proof that it was re-read."""

from __future__ import annotations

import json
import math
import platform as host
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from megatron_rb.checkpoint.conversion.files import FileRecord
from megatron_rb.checkpoint.conversion.stream import MANIFEST, Job, tensor_checksum
from megatron_rb.checkpoint.conversion.workspace import in_parallel
from megatron_rb.checkpoint.storage.checksum import ALGORITHM
from megatron_rb.checkpoint.storage.tensors import StoredTensor

COMPARING = "comparing"


@dataclass(frozen=True)
class Summary:
    """What a conversion has made."""

    folder: Path
    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]
    num_files: int
    notes: tuple[str, ...] = ()
    """What the user should know: NaNs, changed values, tensors left out."""


@dataclass
class Outcome:
    """Facts collected on the way to the manifest."""

    kind: str
    sources: Mapping[str, Any]
    """Where the tensors came from."""
    records: dict[str, FileRecord]
    key_map: Mapping[str, list[str]]
    """Names of the sources of every written tensor."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """What was left out, with the reason."""
    rng: str = "the source has no random states"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, dict]:
        """Records of all written tensors by name."""
        return {name: entry for record in self.records.values() for name, entry in record["tensors"].items()}

    def write(self, folder: Path) -> None:
        """Write `manifest.json`."""
        tensors = {
            name: {key: value for key, value in entry.items() if key != "chunks"} | {"file": file}
            for file, record in self.records.items()
            for name, entry in record["tensors"].items()
        }
        content = {
            "conversion": self.kind,
            "versions": versions(),
            "checksum": ALGORITHM,
            "source": self.sources,
            "rng": self.rng,
            "dropped": self.dropped,
            **self.extra,
            "key_map": self.key_map,
            "tensors": tensors,
        }
        (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")

    def summary(self, out: str | Path) -> Summary:
        tensors = self.tensors()
        elements = {name: math.prod(entry["shape"]) for name, entry in tensors.items()}
        dtypes = {entry["dtype"] for entry in tensors.values()}
        num_bytes = sum(elements[name] * getattr(torch, entry["dtype"]).itemsize for name, entry in tensors.items())
        return Summary(
            Path(out),
            len(tensors),
            sum(elements.values()),
            num_bytes,
            tuple(sorted(dtypes)),
            len(self.records),
            tuple(self._notes(tensors)),
        )

    def _notes(self, tensors: Mapping[str, dict]) -> list[str]:
        notes = [
            f"{name} holds {entry[key]} {word}, kept as they are"
            for key, word in (("nans", "NaN"), ("infinities", "infinite values"))
            for name, entry in tensors.items()
            if key in entry
        ]
        casts = [entry["cast"] for entry in tensors.values() if "cast" in entry]
        if casts:
            changed, elements = sum(c["changed"] for c in casts), sum(c["elements"] for c in casts)
            worst = max(cast["max_abs_error"] for cast in casts)
            notes.append(f"the change of type altered {changed:,} of {elements:,} values, by {worst:.3g} at most")
        notes += self.extra.get("warnings", [])
        differing = self.extra.get("main_weights", {}).get("differing", [])
        if differing:
            notes.append(f"{len(differing)} weights are not the rounded fp32 main weights, e.g. {differing[0]}")
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.dropped.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            others = f" and {len(names) - 1} more were" if len(names) > 1 else " was"
            notes.append(f"{names[0]}{others} left out: {reason}")
        return notes


def check_written(tensors: Mapping[str, StoredTensor], outcome: Outcome, job: Job) -> None:
    """Read everything that was written again and compare it with what was meant to be written.

    Raises:
        ValueError: a tensor differs, is missing or is too many.
    """
    expected = outcome.tensors()
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())
        raise ValueError(f"the new folder does not hold what was written: {', '.join(odd[:3])}; nothing was published")
    job.progress.total(COMPARING, sum(tensor.num_bytes for tensor in tensors.values()))

    def compare(tensor: StoredTensor) -> str | None:
        entry = expected[tensor.name]
        form = (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        equal = form == (entry["dtype"], entry["shape"])
        return None if equal and tensor_checksum(tensor, job, COMPARING) == entry["checksum"] else tensor.name

    actions: list[Callable[[], str | None]] = [lambda tensor=tensor: compare(tensor) for tensor in tensors.values()]  # type: ignore[misc]
    wrong = [name for name in in_parallel(actions, job) if name]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors read back from the new folder differ from what was written, e.g. {wrong[0]}; "
            "the disk or the memory is at fault, nothing was published"
        )


def versions() -> dict[str, str]:
    """Versions of what took part."""
    found = {"python": host.python_version(), "torch": torch.__version__}
    try:
        found["megatron-rb"] = version("megatron-rb")
    except PackageNotFoundError:  # run from a checkout
        found["megatron-rb"] = "not installed"
    return found


def files_identity(paths: set[Path]) -> list[list]:
    """Name, size and time of change of files: whether a stopped conversion still reads the same source."""
    return sorted([str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths)


def known_checksums(folder: Path) -> dict[str, str]:
    """Checksums of the tensors of a folder by name, where a conversion has left them; none where not."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    if content.get("checksum") != ALGORITHM:
        return {}
    return {name: entry["checksum"] for name, entry in content["tensors"].items()}
