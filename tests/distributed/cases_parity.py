"""The stack against transformers in one world of processes: many layouts, one start-up."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch.distributed as dist

from tests.distributed.in_turn import adapted_cpu, each_layout


def transformer_engine_parity(cases: list[dict], folder: str) -> list[dict]:
    """As `parity`, with Transformer Engine's layers, which a stand-in computes; adds how often each of them ran."""
    from tests.distributed import transformer_engine_stand_in

    transformer_engine_stand_in.install()
    return [*parity(cases, folder, layers="transformer_engine"), transformer_engine_stand_in.CALLS]


def parity(cases: list[dict], folder: str, layers: str = "local") -> list[dict]:
    """Every case: `hf`, `layout`, `tp`, `pp`, `cp`, `sp`, `packed`, `reference` (name of its file), `adapters` (folders
    of peft by name), `train_in_full`. Rank 0 returns what was compared."""
    adapted_cpu()
    from megatron_rb.config.schema import AdapterConfig, ModelConfig
    from megatron_rb.models.build import ModelOptions
    from megatron_rb.models.layer_choice import select_layers
    from megatron_rb.parity.differences import compare, first_parting, merge_traces
    from megatron_rb.parity.samples import draw_samples
    from megatron_rb.parity.stack import default_packs, run_stack
    from megatron_rb.train.adapters import add_adapters, train_adapters_only
    from megatron_rb.train.build import build_model

    results = []
    for case, session in each_layout(cases):
        samples = draw_samples(session.shape, case["sample_seed"])
        packs = [samples] if case.get("packed") else default_packs(samples)
        options = ModelOptions(sequence_parallel=case.get("sp", False))
        # fp32 is what the comparison needs; asked for bf16, because the real package refuses fp32.
        provider = select_layers(layers, "bf16", has_transformer_engine=True)
        stages = build_model(session, options, case["hf"], layers=provider)
        if "adapters" in case:
            adapters = {name: AdapterConfig(init=init) for name, init in case["adapters"].items()}
            add_adapters(stages, session, ModelConfig(adapters=adapters), seed=0)
            train_adapters_only(stages, case.get("train_in_full", ()))
        part = run_stack(session, stages, packs, grads=True)
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, part)
        if dist.get_rank() == 0:
            reference = pickle.loads(
                (Path(folder) / f"{case.get('reference', Path(case['hf']).name)}.pickle").read_bytes()
            )
            rows = compare(merge_traces(parts), reference)
            failed = [
                f"{row.name}: {row.max_abs:.3g} (relative {row.relative:.3g})" for row in rows if row.passed is False
            ]
            parting = first_parting(rows)
            results.append(
                {
                    "case": str(session.layout),
                    "tp": case["tp"],
                    "cp": session.mesh.cp_size,
                    "sp": case.get("sp", False),
                    "rows": len(rows),
                    "gradients": sum(row.name.startswith("gradient") for row in rows),
                    "failed": failed,
                    "first_parting": parting.name if parting else None,
                    "logits": next(row.max_abs for row in rows if row.name == "logits"),
                }
            )
    return results
