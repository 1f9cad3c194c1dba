"""The parts of a training process that a benchmark's step needs, and the samples they run on."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from megatron_rb.bench.train.spec import BenchSpec
from megatron_rb.config.derive import Derived, derive
from megatron_rb.config.schema import Config
from megatron_rb.data.build import build_dataset, build_encoder
from megatron_rb.data.ledger import Ledger
from megatron_rb.data.loader import SampleSource
from megatron_rb.data.mock_samples import MockSamples
from megatron_rb.metrics.timeline import StageTimeline
from megatron_rb.models.work import Work, work_of
from megatron_rb.parallel.collectives import rank_zero_first
from megatron_rb.parallel.session import Session
from megatron_rb.tasks.build import TaskData, build_task
from megatron_rb.train.build import build_trainable
from megatron_rb.train.run import seed_everything
from megatron_rb.train.step import Runner, update
from megatron_rb.train.timers import StepTimers
from megatron_rb.train.totals import sum_over_world
from megatron_rb.train.trace import PassTracer


@dataclass(frozen=True)
class TimedStep:
    """One step of this rank."""

    seconds: float
    wait_seconds: float
    works: list[Work]
    """Of its micro-batches."""


class Bench:
    """The parts of a training process that a step needs, and the samples they run on."""

    def __init__(self, session: Session, config: Config, spec: BenchSpec) -> None:
        self.session, self.config, self.spec = session, config, spec
        self.platform, self.shape, self.mesh = session.platform, session.shape, session.mesh
        self.derived: Derived = derive(config, self.shape, self.mesh.world_size)
        self.ledger = Ledger(self.derived.run_dir / "ledger.jsonl", self.mesh.rank)
        self.samples = TaskData(self._samples(), None, self.ledger)
        seed_everything(config.seed, self.platform)
        trainable = build_trainable(session, config, self.derived.init)
        self.chunks, self.optimizer = trainable.chunks, trainable.optimizer
        self.runner = Runner(self.chunks, session)
        self.task = build_task(config, self.derived, self.runner, self.samples)
        self.timers = StepTimers([chunk.module for chunk in self.chunks], self.platform, every=1)
        self.tracer = PassTracer(self.chunks, self.platform, self.mesh, self.timers)

    def _samples(self) -> SampleSource:
        config = self.config
        if self.spec.mix is not None:
            return MockSamples(self.spec.mix, self.shape)
        encoder = build_encoder(config.data, config.model.hf_path, self.shape)
        return rank_zero_first(
            lambda: build_dataset(
                config.data,
                encoder,
                config.data.train,
                self.ledger,
                cache_dir=self.derived.run_dir / "index",
                refused="leave" if self.mesh.rank else "again",
            )
        )

    def step(self) -> TimedStep:
        """One step as `rb train` takes it, until all ranks are done."""
        self.platform.synchronize()
        start = time.perf_counter()
        data = self.task.next_step()
        results, _ = update(self.chunks, self.optimizer, lambda: self.task.run(data.micro_batches))
        sum_over_world(results, data.micro_batches, self.mesh, stop_requested=False, platform=self.platform)
        self.platform.synchronize()
        seconds = time.perf_counter() - start
        return TimedStep(seconds, data.wait_seconds, [work_of(batch) for batch in data.micro_batches])

    def traced_step(self) -> tuple[dict[str, float], StageTimeline]:
        """One step in sections, which wait for the device at every border; and when its passes ran."""
        self.platform.synchronize()
        start = time.perf_counter()
        data = self.task.next_step()
        passes = 0.0

        def run() -> list[dict[str, torch.Tensor]]:
            nonlocal passes
            with self.tracer.tracing():
                results = self.task.run(data.micro_batches)
                passes = self.tracer.now()
            return results

        before = time.perf_counter()
        results, _ = update(self.chunks, self.optimizer, run)
        self.platform.synchronize()
        updated = time.perf_counter() - before
        sum_over_world(results, data.micro_batches, self.mesh, stop_requested=False, platform=self.platform)
        total = time.perf_counter() - start
        timeline = self.tracer.timeline()
        forward, backward = timeline.busy("forward"), timeline.busy("backward")
        vision, language = (self.timers.seconds[name] for name in ("vision", "language"))
        sections = {
            "data": data.wait_seconds,
            "vision forward": vision,
            "language forward": language,
            "other forward": forward - vision - language,
            "backward": backward,
            "waiting": passes - forward - backward,
            "optimizer": updated - passes,
        }
        return sections | {"other": total - sum(sections.values())}, timeline

    def close(self) -> None:
        self.task.close()
