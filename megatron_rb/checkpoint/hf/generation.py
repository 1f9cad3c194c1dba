"""Greedy answers of a Hugging Face folder through plain transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_rb.checkpoint.hf.oracle import load_transformers, model_inputs
from megatron_rb.data.sample import EncodedSample
from megatron_rb.shapes.shape import RoboBrainShape


def greedy_answers(
    folder: str | Path,
    shape: RoboBrainShape,
    prompts: Sequence[EncodedSample],
    decode: Callable[[list[int]], str],
    eos_ids: Sequence[int],
    max_new_tokens: int,
) -> list[str]:
    """The answer to every prompt, without the end token.

    Args:
        prompts: samples that end where the answer begins.
        decode: token ids to text.
    """
    model = load_transformers(folder).eval()
    answers = []
    for prompt in prompts:
        inputs = model_inputs(prompt, shape)
        with torch.no_grad():
            ids = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=list(eos_ids),
                pad_token_id=eos_ids[0],
            )
        new = ids[0, inputs["input_ids"].shape[1] :].tolist()
        answers.append(decode([token for token in new if token not in eos_ids]))
    return answers
