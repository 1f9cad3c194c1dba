"""What the stages read while answers are generated: packed prompts first, then one token per sequence and pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megatron_rb.data.sample import EncodedSample
from megatron_rb.kernels.dynamic_padding.row_map import RowMap
from megatron_rb.kernels.varlen_attention.segments import Segments
from megatron_rb.models.inputs import MicroBatch, TextInputs, build_micro_batch
from megatron_rb.shapes.shape import RoboBrainShape


def prompt_batch(
    prompts: Sequence[EncodedSample], shape: RoboBrainShape, *, tp_rank: int, tp_size: int, sequence_parallel: bool
) -> MicroBatch:
    """Prompts as one micro-batch whose label rows are the last tokens: from them the first new tokens are told."""
    batch = build_micro_batch(prompts, shape, tp_rank=tp_rank, tp_size=tp_size, sequence_parallel=sequence_parallel)
    last = np.cumsum([len(prompt.input_ids) for prompt in prompts], dtype=np.int64) - 1
    return replace(batch, text=replace(batch.text, **_label_rows(last)))


def first_new_positions(batch: MicroBatch, num_prompts: int) -> np.ndarray:
    """int64 `[prompts]`: position of the first new token of each, on all three axes.

    One above the largest position of the prompt, as transformers' `generate` has it; that is the last token's, but
    where a long video is followed by a short text (Qwen2.5-VL counts its seconds in positions).
    """
    borders = batch.text.samples.borders
    positions = batch.text.positions.numpy()
    return np.array([positions[:, borders[i] : borders[i + 1]].max() + 1 for i in range(num_prompts)], dtype=np.int64)


def next_tokens(ids: Sequence[int], positions: np.ndarray, multiple: int) -> TextInputs:
    """One token per sequence.

    Args:
        ids: the token generated last, of each sequence.
        positions: int64 `[sequences]`.
        multiple: rows are padded to a multiple of this (the tensor-parallel size under sequence parallelism).
    """
    count = len(ids)
    rows = max(count, 1) + -max(count, 1) % multiple
    all_ids, where = np.zeros(rows, dtype=np.int64), np.zeros((3, rows), dtype=np.int32)
    all_ids[:count], where[:, :count] = ids, positions
    nothing = RowMap.of(np.zeros(0), np.zeros(0), rows, 0)
    return TextInputs(
        num_tokens=rows,
        num_real_tokens=count,
        samples=Segments.of_lengths([1] * rows),
        input_ids=torch.from_numpy(all_ids),
        positions=torch.from_numpy(where),
        visual=nothing,
        local_visual=nothing,
        **_label_rows(np.arange(count)),
    )


def _label_rows(rows: np.ndarray) -> dict[str, Any]:
    """Rows whose logits are wanted; the first one where there are none, since the head wants some."""
    chosen = rows if len(rows) else np.zeros(1, dtype=np.int64)
    labels = torch.zeros(len(chosen), dtype=torch.int64)
    return {"label_rows": torch.from_numpy(chosen), "labels": labels, "label_weights": torch.zeros(len(chosen))}
