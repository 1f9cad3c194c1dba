"""Conversions beside plain copying of the same bytes, in one run on the same disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from megatron_rb.checkpoint.conversion.verify import verify
from megatron_rb.checkpoint.hf.names import exported_name, shard_name
from megatron_rb.checkpoint.hf.table import stored_rules
from megatron_rb.checkpoint.storage.safetensors_files import safetensors_header
from megatron_rb.config.child_processes import follow_parent
from megatron_rb.config.failures import ProcessFailed
from megatron_rb.shapes.shape import shape_from_dict

SHARD_BYTES = 2 << 30
NOISE_BYTES = 32 << 20


def write_random_model(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """A Hugging Face folder of bf16 noise in the shapes of a config.json.

    Returns:
        Bytes of all tensors, and of the largest.
    """
    folder.mkdir(parents=True)
    shape = shape_from_dict(config)
    tensors = [
        (exported_name(name, shape.family), torch.bfloat16, hf_shape)
        for rule in stored_rules(shape).values()
        for name, hf_shape in zip(rule.hf_names, rule.hf_shapes, strict=True)
    ]
    sizes = {name: int(np.prod(size)) * 2 for name, _, size in tensors}
    shards: list[list] = [[]]
    for entry in tensors:
        if shards[-1] and sum(sizes[name] for name, _, _ in shards[-1]) + sizes[entry[0]] > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    # The highest bit of the exponent is off: all values are finite and below 2.
    noise = (np.random.default_rng(0).integers(0, 1 << 16, NOISE_BYTES // 2, dtype=np.uint16) & 0xBFFF).tobytes()
    places: dict[str, str] = {}
    for index, entries in enumerate(shards):
        file = shard_name(index, len(shards))
        places |= {name: file for name, _, _ in entries}
        with open(folder / file, "wb") as out:
            out.write(safetensors_header(entries))
            for number, (name, _, _) in enumerate(entries):
                _write_noise(out, noise, sizes[name], start=2 * (number * 7919 % 4096))
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config))
    return sum(sizes.values()), max(sizes.values())


def _write_noise(out, noise: bytes, size: int, start: int) -> None:
    while size:
        part = noise[start : start + size]
        out.write(part)
        size -= len(part)
        start = 0


@dataclass(frozen=True)
class CommandCost:
    """One command."""

    seconds: float
    peak_memory: int
    """Bytes of resident memory of the process, mapped files included."""


@dataclass
class ConvertResult:
    """One direction of one model."""

    model: str
    direction: str
    num_bytes: int
    largest_tensor: int
    copies: list[float]
    """Seconds of `cp` and `sync`."""
    conversions: list[CommandCost]
    round_trip_equal: bool | None = None
    """After the export: every tensor is byte for byte that of the source."""

    @property
    def ratio(self) -> float:
        """Speed of the conversion as a part of the speed of copying."""
        return median(self.copies) / median(timing.seconds for timing in self.conversions)

    @property
    def best_ratio(self) -> float:
        """The same of the fastest of each: what a disk shared with others hides in the medians."""
        return min(self.copies) / min(timing.seconds for timing in self.conversions)

    @property
    def peak_memory(self) -> int:
        return max(timing.peak_memory for timing in self.conversions)

    def as_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "conversions": [vars(t) for t in self.conversions],
            "ratio": self.ratio,
            "best_ratio": self.best_ratio,
        }


def compare_with_copy(
    folder: Path, name: str, config: dict[str, Any], rounds: int, show: Callable[[ConvertResult], None]
) -> list[ConvertResult]:
    """Import and export one model and copy the same files, in turns; everything written is removed again.

    The first round warms the machine up and is not counted.
    """
    with _scratch(folder) as scratch:
        source = scratch / "hf"
        num_bytes, largest = write_random_model(source, config)
        results = []
        for direction in ("import", "export"):
            result = ConvertResult(name, direction, num_bytes, largest, [], [])
            origin = source if direction == "import" else scratch / "kept"
            out = scratch / "out"
            for number in range(rounds + 1):
                copied, converted = _time_copy(origin, scratch / "copy"), _time_conversion(direction, origin, out)
                if number:
                    result.copies.append(copied)
                    result.conversions.append(converted)
                if direction == "import" and number == rounds:
                    out.rename(scratch / "kept")
                    continue
                if number == rounds:
                    result.round_trip_equal = verify(source, out).equal
                shutil.rmtree(out)
            show(result)
            results.append(result)
        return results


def cut_depth(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The same model with fewer layers of every kind: its largest tensors stay."""
    text = config.get("text_config", config) | {"num_hidden_layers": layers}
    vision = config["vision_config"] | {"depth": layers}
    for key in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        if key in vision:
            vision[key] = [index for index in range(layers)][: len(vision[key])]
    return config | ({"text_config": text} if "text_config" in config else text) | {"vision_config": vision}


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    scratch = folder / f"convert-benchmark-{os.getpid()}"
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _time_copy(source: Path, target: Path) -> float:
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    os.sync()  # a conversion flushes what it wrote before it publishes it
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def _time_conversion(direction: str, source: Path, out: Path) -> CommandCost:
    os.sync()
    given = "--hf" if direction == "import" else "--ckpt"
    command = [sys.executable, "-m", "megatron_rb.cli", "convert", direction, given, str(source), "--out", str(out)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=follow_parent())
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise ProcessFailed(" ".join(command), code)
    return CommandCost(seconds, usage.ru_maxrss * 1024)
