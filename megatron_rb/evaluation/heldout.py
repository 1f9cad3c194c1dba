"""What a trained model does on held-out conversations, beside answers that never look at the image."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_rb.checkpoint.hf.generation import greedy_answers
from megatron_rb.config.schema import DataConfig
from megatron_rb.data.build import build_dataset, build_encoder
from megatron_rb.data.dataset import ConversationDataset
from megatron_rb.data.ledger import Ledger
from megatron_rb.evaluation.pointing import HitRate, constant_point, constant_token_loss, hit_rate
from megatron_rb.models.robobrain.config import load_shape
from megatron_rb.models.robobrain.inputs import IGNORED
from megatron_rb.spatial.answers import parse_points

POINTING = "pointing"
ANSWER_TOKENS = 24
"""Longest answer that is generated; a pointing answer needs about twelve tokens."""


@dataclass(frozen=True)
class Constant:
    """A model that gives the mean training answer whatever it is shown."""

    loss: float
    """Cross entropy per answer token of the position-wise token frequencies of the training answers of each task."""
    pointing: HitRate
    """Of the mean training point."""


def open_rows(
    settings: DataConfig, files: Sequence[str], hf_folder: str, ledger: Path
) -> tuple[ConversationDataset, list[dict]]:
    """Conversations as token ids, in the prompt form of the training settings, and the rows they come from."""
    encoder = build_encoder(settings, hf_folder, load_shape(hf_folder))
    dataset = build_dataset(settings, encoder, list(files), Ledger(ledger))
    return dataset, [json.loads(dataset.row(number)) for number in range(len(dataset))]


def constant_answers(settings: DataConfig, hf_folder: str, ledger: Path) -> Constant:
    """Score the mean training answer on the held-out rows, task by task."""
    train_set, train_rows = open_rows(settings, settings.train, hf_folder, ledger)
    heldout_set, heldout_rows = open_rows(settings, settings.evaluation, hf_folder, ledger)
    train_answers, heldout_answers = (
        _answers_by_task(train_set, train_rows),
        _answers_by_task(heldout_set, heldout_rows),
    )
    vocab_size = load_shape(hf_folder).text.vocab_size
    total, tokens = 0.0, 0
    for task, answers in heldout_answers.items():
        count = sum(len(answer) for answer in answers)
        total += count * constant_token_loss(train_answers.get(task, []), answers, vocab_size)
        tokens += count
    points = [parse_points(row["answer"]).points for row in train_rows if row["task"] == POINTING]
    x, y = constant_point(np.concatenate(points)).astype(int)
    masks = [load_mask(settings.evaluation[0], row) for row in heldout_rows if row["task"] == POINTING]
    return Constant(total / tokens, hit_rate([f"[({x}, {y})]"] * len(masks), masks))


def pointing_hits(settings: DataConfig, hf_folder: str, ledger: Path, limit: int) -> HitRate:
    """Let transformers answer the first `limit` held-out pointing questions with a Hugging Face folder."""
    dataset, rows = open_rows(settings, settings.evaluation, hf_folder, ledger)
    numbers = [number for number, row in enumerate(rows) if row["task"] == POINTING][:limit]
    tokenizer = dataset.encoder.tokenizer
    answers = greedy_answers(
        hf_folder, load_shape(hf_folder), [dataset.prompt(number) for number in numbers], tokenizer.decode,
        tokenizer.eos_ids, ANSWER_TOKENS,
    )  # fmt: skip
    return hit_rate(answers, [load_mask(settings.evaluation[0], rows[number]) for number in numbers])


def load_mask(data_file: str, row: dict) -> np.ndarray:
    """The bool mask `[height, width]` that a pointing row names."""
    with Image.open(Path(data_file).parent / row["mask"]) as image:
        return np.asarray(image.convert("1"))


def _answers_by_task(dataset: ConversationDataset, rows: Sequence[dict]) -> dict[str, list[list[int]]]:
    answers: dict[str, list[list[int]]] = defaultdict(list)
    for number, row in enumerate(rows):
        sample = dataset.get(number, with_pixels=False)
        answers[row["task"]].append(sample.labels[sample.labels != IGNORED].tolist())
    return answers
