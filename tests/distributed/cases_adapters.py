"""Adapters whose inputs are dropped, on several tensor-parallel ranks."""

from __future__ import annotations

import torch

from tests.distributed.in_turn import adapted_cpu, each_layout


def replicated_gradients(cases: list[dict]) -> list[dict]:
    """Per case and factor that every tensor-parallel rank holds: how far its gradients are apart, and how large they
    are. A case has `hf`, `layout`, `tp`, `pp`, `sp`."""
    adapted_cpu()
    from megatron_rb.config.schema import AdapterConfig, ModelConfig
    from megatron_rb.models.build import ModelOptions, named_parameters
    from megatron_rb.parallel.collectives import gather_over
    from megatron_rb.parallel.sharding import shard_of
    from megatron_rb.parity.samples import draw_samples
    from megatron_rb.parity.stack import default_packs, run_stack
    from megatron_rb.train.adapters import add_adapters, train_adapters_only
    from megatron_rb.train.build import build_model
    from megatron_rb.train.gradients import main_grad
    from megatron_rb.train.run import seed_everything

    results = []
    for case, session in each_layout(cases):
        seed_everything(3, session.platform)
        stages = build_model(session, ModelOptions(sequence_parallel=case.get("sp", False)), case["hf"])
        adapters = {"lora": AdapterConfig(rank=2, dropout=0.5)}
        add_adapters(stages, session, ModelConfig(adapters=adapters), seed=0)
        train_adapters_only(stages, ())
        factors = {name: each for name, each in named_parameters(stages) if each.requires_grad}
        for name, parameter in factors.items():
            if name.endswith("lora_B"):
                torch.nn.init.constant_(parameter, 0.01)
        run_stack(session, stages, default_packs(draw_samples(session.shape, 1)), grads=True)
        for name, parameter in factors.items():
            if shard_of(parameter).dim is None:
                first, second = gather_over(main_grad(parameter), session.mesh.tp_group)
                apart, size = float((first - second).abs().max()), float(first.abs().max())
                results.append({"name": name, "sp": case.get("sp", False), "apart": apart, "size": size})
    return results
