"""Options that the chosen source of answers does not read are refused."""

import argparse
from pathlib import Path

import pytest

from megatron_rb.generation.answer_source import add_arguments, answers_of
from megatron_rb.generation.questions import Questions


def answers(folder: Path, *words: str) -> dict[str, str]:
    parser = argparse.ArgumentParser()
    add_arguments(parser, 8, "")
    return answers_of(parser.parse_args(words), Questions([], folder, folder / "a.jsonl"), lambda *_: 0)


@pytest.mark.parametrize(
    "words",
    [
        ("--set", "kernels.mrope=torch"),
        ("--tp", "2"),
        ("--sequence-parallel",),
        ("--dtype", "bf16"),
        ("--tokenizer", "other"),
        ("--temperature", "0.1"),
        ("--sampling-seed", "3"),
    ],
)
@pytest.mark.parametrize("source", ["--hf", "--answers"])
def test_an_option_of_ckpt_is_refused_with_another_source(tmp_path, source: str, words: tuple[str, ...]):
    with pytest.raises(ValueError, match=f"^{words[0]} needs --ckpt and is not read with {source}; "):
        answers(tmp_path, source, "somewhere", *words)
