"""Optimizer steps of the real training path on drawn samples, under many layouts in one world."""

from __future__ import annotations

import torch.distributed as dist

from tests.distributed.in_turn import adapted_cpu, detach_chunks, each_layout, micro_batches


class Position:
    """Stands in for the loader: the samples of a step are drawn from its number."""

    def state_dict(self) -> dict:
        return {"seed": 0, "epoch": 0, "position": 0}

    def load_state_dict(self, state: dict) -> None:
        assert state.keys() == self.state_dict().keys()


def losses(cases: list[dict], steps: int) -> list[list[float]]:
    """Per case the loss of every step, as rank 0 sees it. A case has `hf`, `layout`, `tp`, `pp` and settings.

    `migrate`: `[checkpoint, out, platform]` conversions that rank 0 does before the case starts; `load`: folder of
    checkpoints to continue from; `save`: folder a checkpoint goes into after the last step; `last`: that step;
    `padded`: tokens and patches that every micro-batch is padded to; `packed`: all samples of a step in one of them;
    `adapters`: folders of peft by name; `train_in_full`.
    """
    adapted_cpu()
    from megatron_rb.checkpoint.conversion.migrate import migrate_checkpoint
    from megatron_rb.checkpoint.manager import CheckpointManager
    from megatron_rb.checkpoint.sharded import TrainingState
    from megatron_rb.config.schema import AdapterConfig, Config
    from megatron_rb.data.padding import Size
    from megatron_rb.parity.samples import draw_samples
    from megatron_rb.shapes.shape import model_fingerprint
    from megatron_rb.train.build import build_trainable
    from megatron_rb.train.schedule import LearningRateSchedule
    from megatron_rb.train.step import Runner, train_pass
    from megatron_rb.train.totals import sum_over_world

    curves = []
    for case, session in each_layout(cases):
        config = Config()
        config.model.dtype = case.get("dtype", "fp32")
        config.model.recompute.vision = config.model.recompute.language = case.get("recompute", 0)
        config.model.recompute.vision_per_slice = case.get("recompute_per_slice", [])
        config.model.recompute.language_per_slice = case.get("recompute_per_slice", [])
        config.model.freeze.vision = case.get("freeze_vision", False)
        config.model.freeze.language = case.get("freeze_language", False)
        config.model.adapters = {name: AdapterConfig(init=each) for name, each in case.get("adapters", {}).items()}
        config.model.train_in_full = case.get("train_in_full", [])
        config.parallel.sequence_parallel = case.get("sp", False)
        config.parallel.distributed_optimizer = case.get("distributed_optimizer", True)
        config.parallel.overlap_grad_reduce = config.parallel.overlap_param_gather = case.get("overlap", True)
        config.optimizer.name = case.get("optimizer", "adamw")
        config.optimizer.lr = case["lr"]
        config.optimizer.weight_decay = 0.1
        config.schedule.decay, config.schedule.warmup_ratio = "constant", 0.0
        trainable = build_trainable(session, config, case["hf"])
        schedule = LearningRateSchedule(trainable.optimizer, config.optimizer, config.schedule, steps)
        runner = Runner(trainable.chunks, session)
        state = TrainingState(
            trainable.chunks,
            trainable.optimizer,
            {"schedule": schedule, "data": Position()},
            model_fingerprint(session.shape) | trainable.identity,
            {"layout": str(session.layout), "tp": case["tp"], "cp": session.mesh.cp_size},
            session.platform,
            lambda step: None,
        )
        if dist.get_rank() == 0:
            for checkpoint, out, to in case.get("migrate", ()):
                migrate_checkpoint(checkpoint, out, to)
        dist.barrier()
        first = CheckpointManager(case["load"]).load(state).step if "load" in case else 0
        curve = []
        for step in range(first, case.get("last", steps)):
            samples = draw_samples(session.shape, seed=case["sample_seed"] + step % 2)
            packs = [samples] if case.get("packed") else [[sample] for sample in samples]
            batches = micro_batches(
                packs,
                session,
                runner.chunks[0].config.sequence_parallel,
                padded=Size(*case.get("padded", (0, 0))),
            )
            for chunk in trainable.chunks:
                chunk.zero_grad_buffer()
            trainable.optimizer.zero_grad()
            results = train_pass(runner, batches)
            trainable.optimizer.step()
            schedule.step()
            curve.append(sum_over_world(results, batches, session.mesh, False).loss)
        curves.append(curve)
        if "save" in case:
            CheckpointManager(case["save"], asynchronous=False).save(case.get("last", steps), state)
        detach_chunks(trainable.chunks, param_sync=True)
    return curves
