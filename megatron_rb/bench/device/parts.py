"""What is looked at in the first minutes on a device, in order of value; every part is commands that a user would type.

In the dry form, on a CPU, the same commands take small models, and what needs the device says so.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rb.app.forecast import stage_forecast
from megatron_rb.bench.device.workplace import PartFailed, Skipped, Workplace
from megatron_rb.bench.train.result import load_result
from megatron_rb.checkpoint.hf.training import write_benchmark_model
from megatron_rb.config.compose import load_config
from megatron_rb.config.derive import derive
from megatron_rb.data.mixes import Mix, load_mix
from megatron_rb.metrics.writers import METRICS_FILE
from megatron_rb.platform.base import module_exists
from megatron_rb.shapes.families import FAMILIES
from megatron_rb.shapes.published import shape_of

MODEL, MIX = "RoboBrain2.0-3B", "images_8k"
SMALL_MODEL, SMALL_MIX = "small-qwen3_vl", "tiny"
RESERVED = 0.08
"""Share of the memory that is left to libraries and fragmentation."""
EVERY_LAYER = ("model.recompute.vision=-1", "model.recompute.language=-1")
FROZEN_VISION = (*EVERY_LAYER, "model.freeze.vision=true")
MERGER_ALONE = (*FROZEN_VISION, "model.freeze.language=true")
LADDER = ((), EVERY_LAYER[:1], EVERY_LAYER, FROZEN_VISION, MERGER_ALONE)
"""Settings of the smoke step that take less and less memory."""
KEPT = "benchmarks/device"
"""Where a checkout keeps what was measured and rehearsed."""
DRY_STEPS = 2
"""Of a small model, whose speed on a CPU nobody asks for."""
STEPS_BEFORE, STEPS_AFTER = 3, 3
"""Of the run that is resumed."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class LookPart:
    """One thing that is looked at."""

    name: str
    about: str
    seconds: int
    """It is ended after so many."""
    run: Callable[[Workplace], Figures]
    """Raises Skipped where it has nothing to do."""


def smoke(place: Workplace) -> Figures:
    """Steps of one process, their speed and their peak memory beside the forecast."""
    settings = smoke_settings(place)
    forecast = {"forecast GiB": _forecast(place, settings)} if place.on_device else {}
    return {"settings": " ".join(settings)} | _train(place, place.folder / "smoke", *settings, steps=5) | forecast


def smoke_with_transformer_engine(place: Workplace) -> Figures:
    """The same steps through Transformer Engine's layers."""
    if not place.on_device or not module_exists("transformer_engine"):
        raise Skipped("transformer_engine is not installed" if place.on_device else "it needs a device")
    settings = (*smoke_settings(place), "model.layers=transformer_engine")
    return _train(place, place.folder / "smoke-transformer-engine", *settings, steps=5)


def rehearsal(place: Workplace) -> Figures:
    """The peak that the rehearsal of the smoke step counts, for the device: as it is kept, else counted now."""
    kept = _kept_rehearsal(place)
    peak = kept if kept is not None else rehearse_smoke(place, place.folder / "rehearsed.json")
    return {"rehearsed peak GiB": round(peak / 2**30, 2)}


def rehearse_smoke(place: Workplace, out: Path) -> int:
    """Rehearse the smoke step, write what is seen, and return the peak in bytes."""
    mix = load_mix(MIX if place.on_device else SMALL_MIX)
    model = [f"model.published={MODEL}", "model.hf_path=absent"]
    words = [*smoke_settings(place), *_one_process(mix), *(model if place.on_device else [_small_model(place)])]
    options = ["--mix", mix.name, "--micro-batches", mix.micro_batches, "--device", place.device, "--no-compile"]
    place.rb("rehearse", *words, *options, "--make-environment", "--json", out)
    summary = json.loads(out.read_text())
    out.write_text(json.dumps({"settings": list(smoke_settings(place))} | summary, indent=1))
    return summary["stages"][0]["peak_bytes"]


def _kept_rehearsal(place: Workplace) -> int | None:
    """Bytes of the peak that the checkout has for this device and these settings."""
    if place.repository is None or not place.on_device:
        return None
    file = place.repository / KEPT / f"rehearsed-{place.device}.json"
    if not file.is_file():
        return None
    summary = json.loads(file.read_text())
    same = summary["settings"] == list(smoke_settings(place))
    return summary["stages"][0]["peak_bytes"] if same else None


def parity(place: Workplace) -> Figures:
    """Logits and gradients beside transformers, of a small model of every family."""
    for family in FAMILIES:
        folder = place.scratch / f"parity-{family}"
        write_benchmark_model(folder, family)
        place.rb("parity", "--hf", folder, "--grads", "--json", place.folder / f"parity-{family}.json")
    return {"within the tolerances": ", ".join(FAMILIES)}


def device_tests(place: Workplace) -> Figures:
    """Kernels against fp64, no wait of the host, on the device."""
    if place.repository is None:
        raise Skipped("there is no checkout with tests here")
    options = ("-q", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider")
    said = place.run(sys.executable, "-m", "pytest", *options, place.repository / "tests/gpu")
    return {"pytest": said.strip().splitlines()[-1]}


def kernels(place: Workplace) -> Figures:
    """The kernels as shares of the device's measured ceilings."""
    out = place.folder / "kernels"
    place.rb("bench", "kernels", "--rounds", 1, "--out", out)
    return {"report": next(path.name for path in sorted(out.glob("*.md")))}


def throughput(place: Workplace) -> Figures:
    """Steps beside transformers' own on the same batch."""
    out = place.folder / "train"
    found = _train(place, out, *smoke_settings(place), steps=10, options=("--baseline", "hf"))
    baseline = load_result(out).baseline
    return found | ({"times as fast as transformers": round(baseline.speedup, 2)} if baseline else {})


def resume(place: Workplace) -> Figures:
    """A run that is ended half-way and continued has the losses of the one that was not, bit by bit."""
    if place.repository is None:
        raise Skipped("there are no example episodes here")
    data, model = place.scratch / "data", place.scratch / "demo-model"
    episodes = place.repository / "examples/robosim"
    place.rb("demo-data", "--episodes", episodes, "--tasks", "pointing", "--out", data)
    place.rb("demo-model", "--texts", data / "train.jsonl", "--out", model)
    whole, continued = place.scratch / "whole", place.scratch / "continued"
    words = _resumed_settings(place, model, data / "train.jsonl")
    place.rb("train", *words, f"run_dir={whole}")
    step = f"step_{STEPS_BEFORE:08d}"
    shutil.copytree(whole / "checkpoints" / step, continued / "checkpoints" / step)
    place.rb("train", *words, f"run_dir={continued}")
    losses = [_losses(folder)[-STEPS_AFTER:] for folder in (whole, continued)]
    if losses[0] != losses[1]:
        raise PartFailed(f"the losses differ: {losses[0]} in one piece, {losses[1]} continued")
    return {"losses after the resume": ", ".join(f"{loss:.6f}" for loss in losses[1])}


PARTS = (
    LookPart("smoke", "steps of a whole model in bf16 on one device, and its peak memory", 120, smoke),
    LookPart("smoke-te", "the same through Transformer Engine", 80, smoke_with_transformer_engine),
    LookPart("rehearsal", "the peak memory that the rehearsal counts", 60, rehearsal),
    LookPart("parity", "logits and gradients beside transformers", 70, parity),
    LookPart("tests", "kernels against fp64 on the device", 80, device_tests),
    LookPart("kernels", "kernels as shares of the device's ceilings", 90, kernels),
    LookPart("train", "speed beside transformers' own step", 120, throughput),
    LookPart("resume", "a run continued from its checkpoint, bit by bit", 60, resume),
)
"""In order of value: when the time is over, the last ones are missing."""


def smoke_settings(place: Workplace) -> tuple[str, ...]:
    """What the smoke step takes so that it fits: nothing, recomputation, or frozen parts as well."""
    if not place.on_device:
        return ("platform.name=cpu",)
    plain: tuple[str, ...] = ("model.dtype=bf16", "platform.name=cuda")
    choices = [(*plain, *words) for words in LADDER]
    fits = (words for words in choices if not place.memory or _forecast(place, words) <= place.memory / 2**30)
    return next(fits, choices[-1])


def _forecast(place: Workplace, settings: tuple[str, ...]) -> float:
    """Of the smoke step on the device, GiB, with what is left to libraries."""
    mix = load_mix(MIX)
    config = load_config([*settings, *_one_process(mix), f"model.published={MODEL}", "model.hf_path=absent"])
    shape = shape_of(config.model.hf_path, config.model.published)
    (stage,) = stage_forecast(config, derive(config, shape), shape, "cuda", RESERVED * place.memory, mix.micro_batches)
    return round(stage.total / 2**30, 2)


def _one_process(mix: Mix) -> list[str]:
    budgets = [f"data.seq_length={mix.seq_length}", f"data.max_patches={mix.max_patches}"]
    return [*budgets, "parallel=one_process", "world_size=1"]


def _train(place: Workplace, out: Path, *settings: str, steps: int, options: tuple[str, ...] = ()) -> Figures:
    model, mix = (MODEL, MIX) if place.on_device else (SMALL_MODEL, SMALL_MIX)
    counts = ("--steps", steps, "--warmup", 2) if place.on_device else ("--steps", DRY_STEPS, "--warmup", 1)
    place.rb("bench", "train", *settings, "--model", model, "--mix", mix, *counts, *options, "--out", out)
    found = load_result(out).summary()
    shutil.rmtree(out / "run", ignore_errors=True)
    return {
        "seconds a step": round(found["step_seconds"], 4),
        "tokens/s": round(found["tokens_per_second"]),
        "TFLOP/s": round(found["tflops"], 2),
        "peak GiB": round(found["peak_memory_bytes"] / 2**30, 2),
    }


def _small_model(place: Workplace) -> str:
    folder = place.scratch / "small"
    write_benchmark_model(folder, SMALL_MODEL.removeprefix("small-"))
    return f"model.hf_path={folder}"


def _resumed_settings(place: Workplace, model: Path, rows: Path) -> list[str]:
    platform, dtype = ("cuda", "bf16") if place.on_device else ("cpu", "fp32")
    return [
        f"model.hf_path={model}",
        f"model.dtype={dtype}",
        f"platform.name={platform}",
        f"data.train=[{rows}]",
        "data.seq_length=512",
        "data.max_patches=1024",
        "data.global_batch_size=4",
        "parallel=one_process",
        "checkpoint.init=",
        "checkpoint.keep_last=0",
        f"checkpoint.save_every={STEPS_BEFORE}",
        f"schedule.train_steps={STEPS_BEFORE + STEPS_AFTER}",
        "metrics.plots=false",
    ]


def _losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    return [record["loss"] for record in records if record.get("kind") == "step"]
