"""The loss on held-out conversations that an answer reaches which never looks at the image."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from megatron_rb.config.schema import DataConfig
from megatron_rb.data.build import build_dataset, build_encoder
from megatron_rb.data.dataset import ConversationDataset
from megatron_rb.data.ledger import Ledger
from megatron_rb.models.inputs import IGNORED
from megatron_rb.scores.pointing import constant_token_loss
from megatron_rb.shapes.shape import load_shape


def constant_loss(settings: DataConfig, hf_folder: str, ledger: Path) -> float:
    """Cross entropy per held-out answer token of the position-wise token frequencies of each task's training answers.

    Args:
        settings: names both files; the prompt form is that of the training.
        hf_folder: of the tokenizer and processor.
    """
    train, heldout = (
        _answers_by_task(_open(settings, files, hf_folder, ledger)) for files in (settings.train, settings.evaluation)
    )
    vocab_size = load_shape(hf_folder).text.vocab_size
    total, tokens = 0.0, 0
    for task, answers in heldout.items():
        count = sum(len(answer) for answer in answers)
        total += count * constant_token_loss(train.get(task, []), answers, vocab_size)
        tokens += count
    return total / tokens


def _open(settings: DataConfig, files: Sequence[str], hf_folder: str, ledger: Path) -> ConversationDataset:
    encoder = build_encoder(settings, hf_folder, load_shape(hf_folder))
    return build_dataset(settings, encoder, list(files), Ledger(ledger))


def _answers_by_task(dataset: ConversationDataset) -> dict[str, list[list[int]]]:
    answers: dict[str, list[list[int]]] = defaultdict(list)
    for number in range(len(dataset)):
        sample = dataset.get(number, with_pixels=False)
        answers[json.loads(dataset.row(number))["task"]].append(sample.labels[sample.labels != IGNORED].tolist())
    return answers
