"""Does the planned cut win, and by as much as predicted? Two CPU processes, each pinned to a core of its own."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rb.config.compose import CONFIG_FILE, save_config
from megatron_rb.config.failures import ProcessFailed
from megatron_rb.config.schema import Config, ModelConfig, ParallelConfig, PlatformConfig
from megatron_rb.layout import PipelineLayout
from megatron_rb.planner.calibration import Calibration, load_calibration
from megatron_rb.planner.cost import Pricing
from megatron_rb.planner.device import Device, Link, load_device
from megatron_rb.planner.histogram import histogram_of
from megatron_rb.planner.partition import Pipeline, play, refine
from megatron_rb.planner.predict import build_pipeline, step_seconds
from megatron_rb.planner.task import Degrees, PlanTask
from megatron_rb.planner.workload import Drawn, MicroBatches, MicroBatchLimits, MicroBatchSampler
from megatron_rb.shapes.published import CONFIGS
from megatron_rb.shapes.shape import RoboBrainShape, shape_from_dict

MEASURE = "megatron_rb.bench.plan.measure:measure_cases"
"""What its two processes run."""
PP_SIZE = 2
DEGREES = Degrees(tp=1, pp=PP_SIZE, vpp=1, dp=1, micro_batch=1, sequence_parallel=False)
DTYPE = "fp32"
SETTINGS = Config(
    world_size=PP_SIZE,
    model=ModelConfig(dtype=DTYPE),
    parallel=ParallelConfig(timeout_minutes=15.0),
    platform=PlatformConfig("cpu", threads_per_rank=1),
)
"""Of the processes; they take the layouts one after the other."""


@dataclass(frozen=True)
class Case:
    """A tiny model and the micro-batches of its steps."""

    name: str
    vision_layers: int
    text_layers: int
    sizes: tuple[tuple[int, int], ...]
    """Tokens and patches of each micro-batch."""

    @property
    def shape(self) -> RoboBrainShape:
        return shape_from_dict(self.config)

    @property
    def config(self) -> dict[str, Any]:
        """Qwen2.5-VL at a width that keeps one core busy for milliseconds a layer."""
        published = CONFIGS["RoboBrain2.0-3B"]
        return {
            **published,
            "tie_word_embeddings": False,
            "vocab_size": 512,
            "hidden_size": 256,
            "intermediate_size": 640,
            "num_hidden_layers": self.text_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
            "image_token_id": 501,
            "video_token_id": 502,
            "vision_start_token_id": 503,
            "vision_end_token_id": 504,
            "vision_config": {
                **published["vision_config"],
                "depth": self.vision_layers,
                "hidden_size": 256,
                "num_heads": 4,
                "intermediate_size": 640,
                "out_hidden_size": 256,
                "fullatt_block_indexes": [self.vision_layers - 1],
            },
        }


CASES = (
    Case(
        "ViT-heavy",
        12,
        6,
        ((120, 288), (150, 400), (100, 196), (160, 400), (110, 288), (130, 288), (160, 400), (100, 196)),
    ),
    Case(
        "text-heavy",
        4,
        12,
        ((256, 64), (240, 128), (256, 32), (224, 64), (256, 128), (240, 64), (256, 32), (224, 128)),
    ),
)
KEPT_SPLITS = 3
"""Splits of the text layers that are timed in every round: the fastest of a first round over all of them."""


@dataclass(frozen=True)
class Measured:
    """One layout of one case."""

    role: str
    """`planned`, or how somebody would have cut by hand."""
    layout: str
    predicted: float
    """Seconds of a step."""
    measured: float
    """Seconds of a step, median over the rounds."""
    spread: float
    """Half the distance between the quartiles of the measured seconds."""


@dataclass(frozen=True)
class CaseResult:
    """A case: the planned layout first, then (a) and (b)."""

    case: str
    rows: tuple[Measured, ...]

    def ratio(self, role: str) -> tuple[float, float]:
        """Predicted and measured time of a layout over the planned one's."""
        rows = {row.role: row for row in self.rows}
        one, other = rows["planned"], rows[role]
        return other.predicted / one.predicted, other.measured / one.measured

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "ratios": {role: dict(zip(("predicted", "measured"), self.ratio(role), strict=True)) for role in HAND_MADE}
        }


EQUAL, UNEVEN = "(a) ViT on stage 0, text in halves", "(b) ViT on stage 0, best text split"
HAND_MADE = (EQUAL, UNEVEN)


class GivenBatches(MicroBatchSampler):
    """The micro-batches of a benchmark in place of drawn ones."""

    def __init__(self, batches: MicroBatches, merge_unit: int) -> None:
        text = batches.labels[0].astype(np.int64)
        patches = batches.patches[0].astype(np.int64)
        histogram = histogram_of(text, patches, patches.astype(float), "the micro-batches of the benchmark")
        super().__init__(histogram, merge_unit, len(text), lambda *_: [])
        self._batches = batches

    def draw(self, budget: MicroBatchLimits, dp_size: int, multiple: int) -> Drawn:
        return Drawn(self._batches, self._batches.tokens.shape[1], 1)

    def mean_step(self, dp_size: int) -> MicroBatches:
        return MicroBatches(*(values.sum(axis=1) for values in vars(self._batches).values()))


def cases_of(spec: Sequence[Mapping[str, Any]]) -> list[Case]:
    """Cases as they were written into the folder."""
    return [Case(**{**item, "sizes": tuple((tokens, patches) for tokens, patches in item["sizes"])}) for item in spec]


def planning_task(case: Case, batches: MicroBatches, device: Device, calibration: Calibration) -> PlanTask:
    """The benchmark's steps as the planner sees them; `batches` are arrays `[1, micro-batches]`."""
    shape = case.shape
    return PlanTask(
        model=shape,
        pricing=Pricing(device, DTYPE, calibration),
        gpus=PP_SIZE,
        sampler=GivenBatches(batches, shape.vision.merge_unit),
        seq_length=4096,
        max_patches=16384,
        distributed_optimizer=False,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
        padding_buckets=0,
    )


def layouts_of(case: Case, task: PlanTask) -> dict[str, PipelineLayout]:
    """The planned cut, (a), and every cut with the whole ViT on the first stage."""
    pipeline = build_pipeline(task, DEGREES)
    planned = refine(pipeline, (1, pipeline.num_blocks - 1)).lengths(0)
    first = case.vision_layers + 3  # patch embedding, ViT, merger, embedding
    found = {"planned": planned, EQUAL: (first + case.text_layers // 2, case.text_layers - case.text_layers // 2 + 1)}
    for layers in range(case.text_layers + 1):
        found[f"ViT and {layers} text layers"] = (first + layers, case.text_layers - layers + 1)
    return {
        role: PipelineLayout(case.vision_layers, case.text_layers, lengths, PP_SIZE) for role, lengths in found.items()
    }


def predicted_seconds(task: PlanTask, layout: PipelineLayout, pipeline: Pipeline | None = None) -> float:
    """Step time of a layout by the cost model."""
    pipeline = pipeline or build_pipeline(task, DEGREES)
    cut = np.concatenate([[0], np.cumsum(layout.slice_lengths)])[None]
    return step_seconds(task, DEGREES, pipeline, play(pipeline, cut)).total


def result_of(case: Case, task: PlanTask, times: Mapping[str, Sequence[float]]) -> CaseResult:
    """Rows of a case from the measured steps of every layout; (b) is the fastest as measured."""
    layouts = layouts_of(case, task)
    pipeline = build_pipeline(task, DEGREES)
    text = {role: values for role, values in times.items() if role.startswith("ViT and")}
    best = min(text, key=lambda role: statistics.median(text[role]))
    rows = []
    for role, source in (("planned", "planned"), (EQUAL, EQUAL), (UNEVEN, best)):
        low, middle, high = statistics.quantiles(times[source], n=4)
        predicted = predicted_seconds(task, layouts[source], pipeline)
        rows.append(Measured(role, str(layouts[source]), predicted, middle, (high - low) / 2))
    return CaseResult(case.name, tuple(rows))


def run(
    folder: Path, rounds: int, start: Callable[[Path, int], int], cases: Sequence[Case] = CASES
) -> list[CaseResult]:
    """Calibrate, measure and predict in a folder.

    Args:
        start: starts so many workers on the folder and returns their exit code.

    Raises:
        ProcessFailed: a worker failed.
    """
    save_config(SETTINGS, folder / CONFIG_FILE)
    (folder / "spec.json").write_text(json.dumps({"rounds": rounds, "cases": [asdict(case) for case in cases]}))
    code = start(folder, PP_SIZE)
    if code:
        raise ProcessFailed("a process of the benchmark", code)
    results = []
    for number, case in enumerate(cases):
        content = json.loads((folder / f"case{number}.json").read_text())
        batches = MicroBatches(*(np.array(values)[None] for values in content["batches"]))
        task = planning_task(
            case, batches, device_of(content["link"]), load_calibration(folder / f"blocks{number}.json")
        )
        results.append(result_of(case, task, content["times"]))
    return results


def device_of(link: Mapping[str, float]) -> Device:
    """The CPU description with the link that was measured between the two processes."""
    device = load_device("cpu")
    measured = Link(link["bandwidth"] / device.efficiency.link, link["latency"])
    return replace(device, inside_node=measured, memory=1e15)


def markdown(results: Sequence[CaseResult], machine: str, rounds: int) -> str:
    """The table that is kept."""
    lines = [
        "# Planned and hand-made cuts on two CPU processes",
        "",
        f"Measured by `rb bench plan`: {machine}. Two processes, each pinned to a core, fp32, one step of 8",
        f"micro-batches, median of {rounds} rounds; every layout runs once a round. Predictions: calibrated in the",
        "same run (blocks timed as by `rb bench blocks`, on both cores at once; ping-pong for the link). (b) is the",
        "fastest of all splits of the text layers as measured, not as predicted (all in a first round, the fastest",
        f"{KEPT_SPLITS} of it in every round).",
        "",
        "| model | layout | predicted s | measured s | ± | over planned, predicted | over planned, measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for row in result.rows:
            predicted, measured = result.ratio(row.role)
            lines.append(
                f"| {result.case} | {row.role}: `{row.layout.replace('|', '/')}` | {row.predicted:.3f} | "
                f"{row.measured:.3f} | {row.spread:.3f} | {predicted:.3f} | {measured:.3f} |"
            )
    return "\n".join(lines) + "\n"
