"""Answers of the stack on many layouts, in one world of processes."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from tests.distributed.in_turn import adapted_cpu, each_layout

ANSWER_WORDS = 6
"""Words of an answer that `draw_samples` puts behind each prompt."""


def prompts_of(shape, seed: int):
    """Drawn samples without their answers: text only, an image, several, a video, both."""
    from megatron_rb.parity.samples import draw_samples

    samples = draw_samples(shape, seed)
    return [replace(s, input_ids=s.input_ids[:-ANSWER_WORDS], labels=s.labels[:-ANSWER_WORDS]) for s in samples]


def generation(cases: list[dict]) -> list[dict]:
    """Every case: `hf`, `layout`, `tp`, `pp`, `sp`, `batch`, `eos`, `tokens`, sampling. Rank 0 returns all answers."""
    adapted_cpu()
    from megatron_rb.generation.generator import AnswerLimits, Generator
    from megatron_rb.generation.spec import Sampling
    from megatron_rb.models.build import ModelOptions
    from megatron_rb.train.build import build_model

    results = []
    for case, session in each_layout(cases):
        shape, mesh = session.shape, session.mesh
        options = ModelOptions(sequence_parallel=case.get("sp", False))
        stages = build_model(session, options, case["hf"])
        seen: list[torch.Tensor] = []
        generator = Generator(
            stages,
            session,
            AnswerLimits(tuple(case["eos"]), case["tokens"]),
            Sampling(**case.get("sampling", {})),
            watch=seen.append,
        )
        prompts = prompts_of(shape, case["sample_seed"])[mesh.dp_rank :: mesh.dp_size]
        size = case["batch"]
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        answers = {}
        for start in range(0, len(batches), mesh.pp_size):
            chunk = batches[start : start + mesh.pp_size]
            for batch, said in zip(chunk, generator.answer(chunk), strict=True):
                answers |= {p.sample_id: tokens for p, tokens in zip(batch, said, strict=True)}
        difference = None
        if case.get("compare_uncached"):
            assert size == 1 and mesh.world_size == mesh.dp_size
            difference = _uncached_difference(stages, session, prompts, answers, seen, case)
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (answers, difference))
        merged = {key: tokens for part, _ in parts for key, tokens in part.items()}
        agree = all(merged[key] == tokens for part, _ in parts for key, tokens in part.items())
        differences = [value for _, value in parts if value is not None]
        results.append({"answers": merged, "ranks_agree": agree, "uncached": max(differences, default=None)})
    return results


def _uncached_difference(stages, session, prompts, answers, seen, case) -> float:
    """Largest difference between the logits of every pass and those of the whole sequence at once."""
    import numpy as np

    from megatron_rb.models.inputs import build_micro_batch
    from megatron_rb.train.step import Runner, logits_pass

    runner = Runner(stages, session)
    worst, passes = 0.0, iter(seen)
    for prompt in prompts:
        tokens = answers[prompt.sample_id]
        ids = np.concatenate([prompt.input_ids, np.array(tokens, dtype=np.int32)])
        whole = replace(prompt, input_ids=ids, labels=ids)
        batch = build_micro_batch([whole], session.shape, tp_rank=0, tp_size=1, sequence_parallel=False)
        wanted = logits_pass(runner, [batch])[0][len(prompt.input_ids) - 1 :]
        for row in range(len(tokens) + (len(tokens) < case["tokens"])):
            worst = max(worst, float((next(passes)[0] - wanted[row]).abs().max()))
    assert next(passes, None) is None
    return worst
