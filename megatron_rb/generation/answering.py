"""Answers of a model to a list of questions, written as they come, so that a stopped run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rb.checkpoint.hf.generation import greedy_answers
from megatron_rb.config.schema import DataConfig
from megatron_rb.data.answer_file import answers_in, check_same_source
from megatron_rb.data.build import build_dataset, build_encoder
from megatron_rb.data.dataset import ConversationDataset
from megatron_rb.data.ledger import Ledger
from megatron_rb.data.problems import BadSample, NoUsableSample
from megatron_rb.data.sample import EncodedSample
from megatron_rb.generation.questions import Questions
from megatron_rb.generation.source import source_of_transformers
from megatron_rb.shapes.shape import load_shape

ANSWER_TOKENS = 256
BATCH = 64
"""Questions between two writes."""


def answer_with_transformers(
    questions: Questions, hf_folder: str, max_new_tokens: int = ANSWER_TOKENS, settings: DataConfig | None = None
) -> dict[str, str]:
    """Greedy answers of a Hugging Face folder by question id.

    A question whose pictures cannot be read gets no answer and a line in the ledger.

    Args:
        settings: system prompt, chat template and picture sizes the model was trained with; None = the defaults.
    """
    shape = load_shape(hf_folder)
    settings = settings or DataConfig()
    check_same_source(questions.out, source_of_transformers(Path(hf_folder), settings, max_new_tokens))

    def generate(prompts: Sequence[EncodedSample], decode: Callable, eos_ids: Sequence[int]) -> list[str]:
        return greedy_answers(hf_folder, shape, prompts, decode, eos_ids, max_new_tokens)

    return answer_all(questions, hf_folder, generate, settings)


def answer_all(
    questions: Questions, hf_folder: str, generate: Callable[..., list[str]], settings: DataConfig
) -> dict[str, str]:
    """The same with any generator of answers, called with prompts, a decoder of token ids and the end tokens."""
    out, done = questions.out, answers_in(questions.out)
    asked = write_questions_left(questions, done)
    if asked is None:
        return done
    settings = without_limits(settings, questions.media_root)
    encoder = build_encoder(settings, hf_folder, load_shape(hf_folder))
    with Ledger(questions.ledger) as ledger:
        try:
            dataset = build_dataset(settings, encoder, [str(asked)], ledger)
        except NoUsableSample:  # what is left cannot be asked, now or later; the ledger says why
            return done
        with open(out, "a", encoding="utf-8") as lines:
            for start in range(0, len(dataset), BATCH):
                numbers = range(start, min(start + BATCH, len(dataset)))
                prompts = dict(_readable(dataset, numbers, ledger))
                texts = generate(list(prompts.values()), encoder.tokenizer.decode, encoder.tokenizer.eos_ids)
                for number, text in zip(prompts, texts, strict=True):
                    key = str(json.loads(dataset.row(number))["id"])
                    done[key] = text
                    lines.write(json.dumps({"question_id": key, "answer": text}) + "\n")
                lines.flush()
    dataset.close()
    return done


def _readable(
    dataset: ConversationDataset, numbers: Sequence[int], ledger: Ledger
) -> Iterator[tuple[int, EncodedSample]]:
    for number in numbers:
        try:
            yield number, dataset.prompt(number)
        except BadSample as problem:
            file, line = dataset.source(number)
            ledger.record("unreadable", file, str(problem), line=line, problem=problem.problem)


def write_questions_left(questions: Questions, done: Mapping[str, str]) -> Path | None:
    """The questions without an answer as a data file beside the answers; None when there is none."""
    waiting = [row for row in questions.rows if str(row["id"]) not in done]
    if not waiting:
        return None
    questions.out.parent.mkdir(parents=True, exist_ok=True)
    asked = questions.out.with_suffix(".questions.jsonl")
    empty = {"from": "gpt", "value": ""}
    asked.write_text("".join(json.dumps(row | {"conversations": [*_human(row), empty]}) + "\n" for row in waiting))
    return asked


def without_limits(settings: DataConfig, media_root: Path) -> DataConfig:
    """Settings under which no question is refused for its length."""
    return replace(settings, seq_length=1 << 20, max_patches=1 << 22, media_root=str(media_root.absolute()))


def _human(row: dict) -> list[dict]:
    return [turn for turn in row["conversations"] if turn["from"] == "human"][:1]
