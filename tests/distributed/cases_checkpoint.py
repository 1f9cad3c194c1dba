"""Cases for test_checkpoint: a toy model with tensor-parallel, fused, replicated and frozen parameters."""

from __future__ import annotations

import math
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_rb.layout.mesh import RankGrid
from megatron_rb.platform import get_platform
from megatron_rb.platform.mcore_shims import install_mcore_shims

install_mcore_shims(get_platform("cpu"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    copy_to_tensor_model_parallel_region,
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import MegatronModule, TransformerConfig  # noqa: E402

from megatron_rb.checkpoint.manager import CheckpointManager, load_weights  # noqa: E402
from megatron_rb.checkpoint.sharded import TrainingState, synchronized_parameters  # noqa: E402
from megatron_rb.config.failures import NotFinite  # noqa: E402
from megatron_rb.config.schema import Config  # noqa: E402
from megatron_rb.parallel.groups import build_mesh, destroy_groups  # noqa: E402
from megatron_rb.parallel.sharding import ShardSpec, full_to_local, sharded_tensor  # noqa: E402
from megatron_rb.train.guard import Finding, check_state, find_not_finite  # noqa: E402
from megatron_rb.train.optimizers import build_optimizer, ddp_config  # noqa: E402
from megatron_rb.train.schedule import LearningRateSchedule  # noqa: E402
from megatron_rb.train.step import accumulate, apply_gradients  # noqa: E402
from megatron_rb.train.totals import sum_over_world  # noqa: E402

HIDDEN, FFN, BATCH = 8, 12, 4
SPECS = {
    "vision.patch.weight": ShardSpec((HIDDEN, HIDDEN)),
    "vision.merger.weight": ShardSpec((HIDDEN, HIDDEN)),
    "language.fc1.weight": ShardSpec((2 * FFN, HIDDEN), dim=0, stride=2),
    "language.fc2.weight": ShardSpec((HIDDEN, FFN), dim=1),
    "language.norm.weight": ShardSpec((HIDDEN,)),
}


class Weight(torch.nn.Module):
    """A linear layer, or a scale when the weight is a vector."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight if self.weight.dim() == 1 else x @ self.weight.T


class Toy(MegatronModule):
    """A gated MLP behind a frozen and a trained linear layer; names are global as in the real model."""

    def __init__(self, config: TransformerConfig, mesh: Any, frozen: tuple[str, ...]) -> None:
        super().__init__(config)
        self.mesh = mesh
        self.prefix = f"stage{mesh.pp_rank}." if mesh.pp_size > 1 else ""
        generator = torch.Generator().manual_seed(11)
        for name, spec in SPECS.items():
            full = torch.randn(spec.full_shape, generator=generator) / HIDDEN**0.5
            parameter = torch.nn.Parameter(full_to_local(full, spec, mesh.tp_rank, mesh.tp_size).clone())
            parameter.requires_grad = not name.startswith(frozen)
            parameter.tensor_model_parallel = spec.dim is not None
            tower, part, _ = name.split(".")
            if not hasattr(self, tower):
                self.add_module(tower, torch.nn.Module())
            getattr(self, tower).add_module(part, Weight(parameter))

    def forward(self, x: torch.Tensor, dropout: float) -> torch.Tensor:
        hidden = self.vision.merger(self.vision.patch(x))
        gate, up = self.language.fc1(copy_to_tensor_model_parallel_region(hidden)).chunk(2, dim=-1)
        hidden = reduce_from_tensor_model_parallel_region(self.language.fc2(torch.nn.functional.silu(gate) * up))
        with get_cuda_rng_tracker().fork():
            hidden = torch.nn.functional.dropout(hidden, dropout)
        return self.language.norm(hidden).float()

    def sharded_state_dict(self) -> dict[str, Any]:
        mesh = self.mesh
        parameters = dict(self.named_parameters())
        return {
            self.prefix + name: sharded_tensor(
                self.prefix + name, parameters[name], spec, mesh.tp_rank, mesh.tp_size, mesh.dp_rank
            )
            for name, spec in SPECS.items()
        }


class Counter:
    """Stands in for the loader: its state decides the next batch."""

    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


@dataclass
class Run:
    mesh: Any
    chunk: DistributedDataParallel
    counter: Counter
    schedule: LearningRateSchedule
    state: TrainingState
    dropout: float

    @property
    def optimizer(self):
        return self.state.optimizer

    def train(self, steps: int) -> list[float]:
        return [self.train_step() for _ in range(steps)]

    def guarded_step(self, factor: float) -> tuple[bool, list[Finding]]:
        """One step as the training loop takes it, the loss of this rank times a factor; whether the update was made."""
        x, y = torch.randn(2, BATCH, HIDDEN, generator=torch.Generator().manual_seed(self.counter.position))
        self.counter.position += 1
        results: list[dict[str, torch.Tensor]] = []

        def run() -> list[dict[str, torch.Tensor]]:
            loss = (self.chunk(x, self.dropout) - y).square().mean() * factor
            loss.backward()
            self.chunk.finish_grad_sync()
            results.append({"loss_sum": loss.detach(), "num_labels": torch.tensor(1.0)})
            return results

        _, norm = accumulate([self.chunk], self.optimizer, run)
        totals = sum_over_world(results, [], self.mesh, False, finite_norm=math.isfinite(norm))
        if totals.sound:
            apply_gradients(self.optimizer, norm)
            return True, []
        batches = [SimpleNamespace(sample_ids=[f"sample-{self.mesh.rank}"])]
        return False, find_not_finite([self.chunk], results, batches, self.mesh)

    def train_step(self) -> float:
        """One step on the next batch, shared by the data-parallel ranks; returns the loss of the whole batch."""
        generator = torch.Generator().manual_seed(self.counter.position)
        x, y = torch.randn(2, BATCH, HIDDEN, generator=generator)
        rows = slice(self.mesh.dp_rank * BATCH // self.mesh.dp_size, None)
        rows = slice(rows.start, rows.start + BATCH // self.mesh.dp_size)
        self.counter.position += 1
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        dtype = next(self.chunk.parameters()).dtype
        loss = (self.chunk(x[rows].to(dtype), self.dropout) - y[rows]).square().mean()
        if loss.requires_grad:
            loss.backward()
        self.chunk.finish_grad_sync()
        self.optimizer.step()
        self.schedule.step()
        total = loss.detach() / self.mesh.dp_size
        if self.mesh.dp_size > 1:
            dist.all_reduce(total)
        return total.item()

    def moments(self) -> dict[str, list]:
        inner = self.optimizer.chained_optimizers[0].optimizer
        return {
            "step": [group["step"] for group in inner.param_groups],
            "moments": [
                [value.tolist() for value in inner.state[parameter].values()]
                for group in inner.param_groups
                for parameter in group["params"]
            ],
        }


def start_run(
    tp_size: int = 1,
    pp_size: int = 1,
    dtype: str = "fp32",
    dropout: float = 0.0,
    distributed_optimizer: bool = True,
    frozen: tuple[str, ...] = ("vision.patch",),
    model: dict[str, Any] | None = None,
) -> Run:
    if not dist.is_initialized():
        dist.init_process_group(get_platform("cpu").collective_backend)
    destroy_groups()
    mesh = build_mesh(RankGrid.of_world(dist.get_world_size(), tp_size, pp_size), 1, timeout_minutes=1, seed=5)
    config = Config()
    config.model.dtype = dtype
    config.parallel.tp_size = tp_size
    config.parallel.distributed_optimizer = distributed_optimizer
    config.optimizer.lr, config.optimizer.min_lr = 3e-2, 3e-3
    config.optimizer.vision_lr_ratio, config.optimizer.merger_lr_ratio = 0.1, 0.5
    mcore_config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        bf16=dtype == "bf16",
        tensor_model_parallel_size=tp_size,
    )
    toy = Toy(mcore_config, mesh, frozen)
    if dtype == "bf16":
        toy = toy.bfloat16()
    chunk = DistributedDataParallel(mcore_config, ddp_config(config), toy)
    optimizer = build_optimizer(config, [chunk])
    schedule = LearningRateSchedule(optimizer, config.optimizer, config.schedule, train_steps=20)
    counter = Counter()
    state = TrainingState(
        chunks=[chunk],
        optimizer=optimizer,
        parts={"schedule": schedule, "loader": counter},
        model=model or {"hidden_size": HIDDEN, "kind": "toy"},
        layout={"tp_size": tp_size, "pp_size": pp_size},
        platform=get_platform("cpu"),
        reseed=lambda step: model_parallel_cuda_manual_seed(5 + step),
    )
    return Run(mesh, chunk, counter, schedule, state, dropout)


def resume_is_exact(folder: str, dtype: str, asynchronous: bool, distributed_optimizer: bool) -> dict[str, Any]:
    """Save after three steps, go on for three; a fresh run from the checkpoint must do the same."""
    settings = {"dtype": dtype, "dropout": 0.2, "distributed_optimizer": distributed_optimizer}
    run = start_run(**settings)
    run.train(3)
    manager = CheckpointManager(folder, asynchronous=asynchronous)
    manager.save(3, run.state)
    straight = run.train(1)
    manager.maybe_finalize()
    straight += run.train(2)
    draws = [random.random(), np.random.rand(), torch.rand(1).item()]
    manager.close()
    children = [int(child) for file in Path("/proc/self/task").glob("*/children") for child in file.read_text().split()]
    final = run.moments()
    random.seed(99)
    np.random.seed(99)
    resumed = start_run(**settings)
    restored = CheckpointManager(folder).load(resumed.state)
    losses = resumed.train(3)
    again = [random.random(), np.random.rand(), torch.rand(1).item()]
    return {
        "straight": straight,
        "resumed": losses,
        "moments_equal": resumed.moments() == final,
        "draws_equal": again == draws,
        "same_layout": restored.same_layout,
        "steps": final["step"],
        "processes_left": children,
        "learning_rates_equal": resumed.schedule.learning_rates() == run.schedule.learning_rates(),
    }


def reshard(folder: str, dtype: str, distributed_optimizer: bool) -> dict[str, Any]:
    """Two data-parallel ranks save, two tensor-parallel ranks go on, and the other way round."""
    settings = {"dtype": dtype, "distributed_optimizer": distributed_optimizer}
    run = start_run(**settings)
    run.train(3)
    manager = CheckpointManager(folder, asynchronous=False)
    manager.save(3, run.state)
    straight = run.train(4)
    tensor_parallel = start_run(tp_size=2, **settings)
    restored = manager.load(tensor_parallel.state)
    resharded = tensor_parallel.train(1)
    manager.save(4, tensor_parallel.state)
    resharded += tensor_parallel.train(1)
    back = start_run(**settings)
    manager.load(back.state, step=4)
    return {
        "straight": straight,
        "resharded": resharded,
        "back": back.train(3),
        "same_layout": restored.same_layout,
    }


def refusals(folder: str) -> dict[str, str]:
    """Messages of loads that must not happen."""
    run = start_run()
    run.train(1)
    manager = CheckpointManager(Path(folder) / "checkpoints", asynchronous=False)
    messages = {"empty": _error(lambda: manager.load(run.state))}
    manager.save(1, run.state)
    messages["absent_step"] = _error(lambda: manager.load(run.state, step=7))
    other = start_run(model={"hidden_size": 16, "kind": "toy"})
    messages["other_model"] = _error(lambda: manager.load(other.state))
    unfrozen = start_run(frozen=("nothing",))
    messages["newly_trained"] = _error(lambda: manager.load(unfrozen.state))
    messages["weights_of_other_model"] = _error(
        lambda: load_weights(list(other.state.chunks), dict(other.state.model), manager.folder / "step_00000001")
    )
    load_weights(list(unfrozen.state.chunks), dict(unfrozen.state.model), manager.folder / "step_00000001")
    trained = dict(run.chunk.module.named_parameters())
    messages["weights_only"] = str(
        all(torch.equal(value, trained[name]) for name, value in unfrozen.chunk.module.named_parameters())
    )
    blocked = Path(folder) / "a_file"
    if dist.get_rank() == 0:
        blocked.write_text("")
    messages["unwritable"] = _error(lambda: CheckpointManager(blocked / "x").save(1, run.state))
    return messages


def retention(folder: str) -> dict[str, Any]:
    """Five checkpoints of which two stay; leftovers of killed runs go, foreign files stay."""
    run = start_run()
    root = Path(folder)
    if dist.get_rank() == 0:
        (root / "step_00000009.writing-0badcafe").mkdir()
        (root / "step_00000002.deleting-0badcafe").mkdir()
        (root / "notes").mkdir()
    manager = CheckpointManager(root, keep_last=2, asynchronous=True)
    for step in range(1, 6):
        run.train(1)
        manager.prove(step - 1)
        manager.save(step, run.state)
    before_close = manager.latest()
    manager.close()
    manager.save(5, run.state)
    return {"names": sorted(entry.name for entry in root.iterdir()), "before": before_close, "latest": manager.latest()}


def retention_of_the_proven(folder: str) -> dict[str, Any]:
    """The newest checkpoint that is known to give finite losses outlives newer ones; those can be set aside."""
    run, root, names = start_run(), Path(folder), {}
    manager = CheckpointManager(root, keep_last=1, asynchronous=False)

    def look(name: str) -> None:
        dist.barrier()
        names[name] = sorted(entry.name for entry in root.iterdir())
        dist.barrier()

    for step in (1, 2):
        run.train(1)
        manager.save(step, run.state)
    look("one is proven by nobody")
    manager.prove(2)
    look("proven")
    for step in (3, 4):
        run.train(1)
        manager.save(step, run.state)
    look("two are not proven")
    without_proof = CheckpointManager(root, keep_last=1, asynchronous=False)
    without_proof.set_aside_unproven()
    look("another process sets aside")
    manager.set_aside_unproven()
    look("set aside")
    return names | {"latest": manager.latest(), "way back": manager.way_back(), "lost": without_proof.way_back()}


def skipped_update(distributed_optimizer: bool, factor: float) -> dict[str, Any]:
    """Two good steps around one in which rank 1 has a bad loss, and the same two without it."""
    outcomes, weights = [], []
    for bad in (True, False):
        run = start_run(distributed_optimizer=distributed_optimizer)
        run.guarded_step(1.0)
        if bad:
            outcomes.append(run.guarded_step(factor if run.mesh.rank == 1 else 1.0))
        run.counter.position = 5
        outcomes.append(run.guarded_step(1.0))
        with synchronized_parameters([run.chunk]):
            weights.append([parameter.tolist() for parameter in run.chunk.parameters()])
    made = [outcome[0] for outcome in outcomes]
    return {"made": made, "equal": weights[0] == weights[1], "findings": [vars(item) for item in outcomes[0][1]]}


def broken_state(what: str) -> str:
    """Rank 1 holds a number that is not finite; what every rank says of it when a checkpoint is due."""
    run = start_run()
    run.train(1)
    check_state([run.chunk], run.optimizer, 1)
    inner = run.optimizer.chained_optimizers[0].optimizer
    if run.mesh.rank == 1 and what == "weights":
        next(parameter for parameter in run.chunk.parameters() if parameter.requires_grad).data.view(-1)[0] = math.inf
    if run.mesh.rank == 1 and what == "moments":
        next(iter(inner.state.values()))["exp_avg_sq"].view(-1)[0] = math.nan
    try:
        check_state([run.chunk], run.optimizer, 7)
    except NotFinite as error:
        return str(error)
    return "nothing"


def frozen_everywhere() -> str:
    return _error(lambda: start_run(frozen=("vision", "language")))


def frozen_stage(folder: str, distributed_optimizer: bool) -> dict[str, Any]:
    """Pipeline rank 0 has nothing to train, rank 1 has: both step, save and load."""
    frozen = ("vision", "language") if int(os.environ["RANK"]) == 0 else ("vision.patch",)
    settings = {"pp_size": 2, "frozen": frozen, "distributed_optimizer": distributed_optimizer}
    run = start_run(**settings)
    before = run.chunk.module.language.fc1.weight.detach().clone()
    run.train(2)
    manager = CheckpointManager(folder, asynchronous=False)
    manager.save(2, run.state)
    straight = run.train(2)
    resumed = start_run(**settings)
    manager.load(resumed.state)
    return {
        "moved": not torch.equal(before, run.chunk.module.language.fc1.weight),
        "equal": resumed.train(2) == straight and resumed.moments() == run.moments(),
    }


def parameter_groups() -> list[list[float]]:
    """[learning rate / language's, weight decay, parameters] of each group, biggest learning rate first."""
    run = start_run(distributed_optimizer=False)
    lr = run.schedule.learning_rates()["language"]
    groups = [
        [round(group["lr"] / lr, 6), group["weight_decay"], sum(p.numel() for p in group["params"])]
        for group in run.optimizer.param_groups
    ]
    return sorted(groups, reverse=True)


def everything(folder: str) -> dict[str, Any]:
    """All cases in one world: imports and process groups are what costs time."""

    def sub(name: str) -> str:
        path = Path(folder) / name
        path.mkdir(exist_ok=True)
        return str(path)

    results: dict[str, Any] = {}
    for dtype in ("fp32", "bf16"):
        for distributed in (True, False):
            name = f"{dtype}-{'distributed' if distributed else 'replicated'}"
            results[f"exact-{name}"] = resume_is_exact(sub(f"exact-{name}"), dtype, distributed, distributed)
            results[f"reshard-{name}"] = reshard(sub(f"reshard-{name}"), dtype, distributed)
    results["refusals"] = refusals(sub("refusals"))
    results["retention"] = retention(sub("retention"))
    results["retention_of_the_proven"] = retention_of_the_proven(sub("proven"))
    for optimizer in ("distributed", "replicated"):
        for factor in ("nan", "inf"):
            results[f"skipped-{optimizer}-{factor}"] = skipped_update(optimizer == "distributed", float(factor))
    results |= {f"broken-{what}": broken_state(what) for what in ("weights", "moments")}
    results["frozen"] = frozen_everywhere()
    results["groups"] = parameter_groups()
    for distributed in (True, False):
        results[f"frozen_stage-{distributed}"] = frozen_stage(sub(f"frozen-{distributed}"), distributed)
    return results


def killed_while_writing(folder: str, killed: list[int]) -> None:
    """Complete step 1, then some ranks die by SIGKILL with the writers of step 2 at work; others try to complete it."""
    run = start_run()
    run.train(1)
    manager = CheckpointManager(folder, asynchronous=True)
    manager.save(1, run.state)
    manager.close()
    run.train(1)
    manager.save(2, run.state)
    if run.mesh.rank in killed:
        os.kill(os.getpid(), signal.SIGKILL)
    manager.close()


def continue_after_kill(folder: str) -> dict[str, Any]:
    before = sorted(entry.name for entry in Path(folder).iterdir())
    run = start_run()
    manager = CheckpointManager(folder, asynchronous=False)
    restored = manager.load(run.state)
    run.train(1)
    manager.save(2, run.state)
    return {"before": before, "step": restored.step, "after": sorted(entry.name for entry in Path(folder).iterdir())}


def _error(action) -> str:
    try:
        action()
    except (ValueError, OSError) as error:
        return str(error)
    return "no error"
