"""Answers of a model to a list of questions, written as they come, so that a stopped run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rb.checkpoint.hf.generation import greedy_answers
from megatron_rb.config.schema import DataConfig
from megatron_rb.data.build import build_dataset, build_encoder
from megatron_rb.data.ledger import Ledger
from megatron_rb.data.sample import EncodedSample
from megatron_rb.models.robobrain.config import load_shape

ANSWER_TOKENS = 256
BATCH = 64
"""Questions between two writes."""


def answer_with_transformers(
    questions: Sequence[dict], media_root: Path, hf_folder: str, out: Path, max_new_tokens: int = ANSWER_TOKENS,
    settings: DataConfig | None = None,
) -> dict[str, str]:  # fmt: skip
    """Greedy answers of a Hugging Face folder by question id; those that `out` holds already are not asked again.

    A question whose pictures cannot be read gets no answer and a line in `<out>.ledger.jsonl`.

    Args:
        questions: rows with `id`, `image` and one human turn.
        media_root: where relative paths of pictures start.
        settings: system prompt, chat template and picture sizes the model was trained with; None = the defaults.
    """
    shape = load_shape(hf_folder)

    def generate(prompts: Sequence[EncodedSample], decode: Callable, eos_ids: Sequence[int]) -> list[str]:
        return greedy_answers(hf_folder, shape, prompts, decode, eos_ids, max_new_tokens)

    return answer_all(questions, media_root, hf_folder, out, generate, settings or DataConfig())


def answer_all(
    questions: Sequence[dict], media_root: Path, hf_folder: str, out: Path, generate: Callable[..., list[str]],
    settings: DataConfig,
) -> dict[str, str]:  # fmt: skip
    """The same with any generator of answers, called with prompts, a decoder of token ids and the end tokens."""
    done = _done(out)
    waiting = [row for row in questions if str(row["id"]) not in done]
    if not waiting:
        return done
    out.parent.mkdir(parents=True, exist_ok=True)
    asked = out.with_suffix(".questions.jsonl")
    empty = {"from": "gpt", "value": ""}
    asked.write_text("".join(json.dumps(row | {"conversations": [*_human(row), empty]}) + "\n" for row in waiting))
    settings = replace(settings, seq_length=1 << 20, max_patches=1 << 22, media_root=str(media_root.absolute()))
    encoder = build_encoder(settings, hf_folder, load_shape(hf_folder))
    with Ledger(out.with_suffix(".ledger.jsonl")) as ledger:
        dataset = build_dataset(settings, encoder, [str(asked)], ledger)
    with open(out, "a", encoding="utf-8") as lines:
        for start in range(0, len(dataset), BATCH):
            numbers = range(start, min(start + BATCH, len(dataset)))
            prompts = [dataset.prompt(number) for number in numbers]
            texts = generate(prompts, encoder.tokenizer.decode, encoder.tokenizer.eos_ids)
            for number, text in zip(numbers, texts, strict=True):
                key = str(json.loads(dataset.row(number))["id"])
                done[key] = text
                lines.write(json.dumps({"question_id": key, "answer": text}) + "\n")
            lines.flush()
    dataset.close()
    return done


def _human(row: dict) -> list[dict]:
    return [turn for turn in row["conversations"] if turn["from"] == "human"][:1]


def _done(out: Path) -> dict[str, str]:
    """Answers of an earlier run; a half-written last line is dropped."""
    if not out.is_file():
        return {}
    whole = [line for line in out.read_text(encoding="utf-8").split("\n")[:-1] if line]
    out.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
    return {row["question_id"]: row["answer"] for row in map(json.loads, whole)}
