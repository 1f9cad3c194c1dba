"""The stack against transformers in one world of processes: many layouts, one start-up."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.in_turn import adapted_cpu, each_layout


def transformer_engine_parity(cases: list[dict], folder: str) -> list[dict]:
    """As `parity`, with Transformer Engine's layers, which a stand-in computes; adds how often each of them ran."""
    from tests.distributed import transformer_engine_stand_in

    transformer_engine_stand_in.install()
    return [*parity(cases, folder, layers="transformer_engine"), transformer_engine_stand_in.CALLS]


def parity(cases: list[dict], folder: str, layers: str = "local") -> list[dict]:
    """Every case: `hf`, `layout`, `tp`, `pp`, `cp`, `sp`, `packed`. Rank 0 returns what was compared."""
    platform = adapted_cpu()
    from megatron_rb.models.layer_choice import select_layers
    from megatron_rb.parity.samples import draw_samples
    from megatron_rb.parity.stack import compare, default_packs, first_parting, merge_traces, run_stack

    results = []
    for case, shape, layout, place in each_layout(cases, platform):
        samples = draw_samples(shape, case["sample_seed"])
        packs = [samples] if case.get("packed") else default_packs(samples)
        part = run_stack(
            case["hf"],
            shape,
            layout,
            place,
            packs,
            sequence_parallel=case.get("sp", False),
            grads=True,
            device=torch.device("cpu"),
            # fp32 is what the comparison needs; asked for bf16, because the real package refuses fp32.
            layers=select_layers(layers, "bf16", has_transformer_engine=True),
        )
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, part)
        if dist.get_rank() == 0:
            reference = pickle.loads((Path(folder) / f"{Path(case['hf']).name}.pickle").read_bytes())
            rows = compare(merge_traces(parts, layout), reference)
            failed = [
                f"{row.name}: {row.max_abs:.3g} (relative {row.relative:.3g})" for row in rows if row.passed is False
            ]
            parting = first_parting(rows)
            results.append(
                {
                    "case": str(layout),
                    "tp": case["tp"],
                    "cp": place.cp_size,
                    "sp": case.get("sp", False),
                    "rows": len(rows),
                    "gradients": sum(row.name.startswith("gradient") for row in rows),
                    "failed": failed,
                    "first_parting": parting.name if parting else None,
                    "logits": next(row.max_abs for row in rows if row.name == "logits"),
                }
            )
    return results
