"""Score episodes: ask a model about pairs of frames, or take recorded answers, and write progress curves."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from megatron_rb.data.answer_file import write_whole
from megatron_rb.evaluation.value_scores import curves_of, score_questions
from megatron_rb.generation.answer_source import add_arguments, answers_of
from megatron_rb.generation.questions import Questions
from megatron_rb.launch.workers import start_workers
from megatron_rb.value.episodes import BadEpisode
from megatron_rb.value.reconstruct import Consistency


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    consistency, out = Consistency(options.alpha), Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    scored = list(score_questions(Path(options.data), options.interval, None if options.answers else out.parent))
    usable = [item for item in scored if not isinstance(item, BadEpisode)]
    bad = [item for item in scored if isinstance(item, BadEpisode)]
    for episode in bad:
        print(f"not scored: {episode.reason} ({episode.place})")
    if not usable:
        raise ValueError(f"{options.data} holds no episode that can be scored")
    questions = [row for _, _, rows in usable for row in rows]
    asked = Questions(questions, out.parent, out.with_suffix(".answers.jsonl"))
    answers = answers_of(options, asked, start_workers)
    strangers = len(answers.keys() - {row["id"] for row in questions})
    if strangers:
        print(f"{strangers} answers belong to no question: other episodes, or another --interval")
    curves = [curves_of(item.name, frames, answers, consistency) for item, frames, _ in usable]
    write_whole(out, "".join(json.dumps(curve.as_json()) + "\n" for curve in curves))
    short = sum(len(frames) < 3 for _, frames, _ in usable)
    if short:
        print(f"{short} episodes have but two scored frames, too few for an order; lower --interval {options.interval}")
    plus, minus = (np.mean([getattr(curve, name) for curve in curves]) for name in ("voc_plus", "voc_minus"))
    unreadable, total = sum(curve.unreadable for curve in curves), sum(curve.answers for curve in curves)
    print(
        f"{out}: {len(curves)} episodes ({len(bad)} not scored), VOC+ {plus:.4f}, VOC- {minus:.4f}, {unreadable} of "
        f"{total} unreadable"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rb value score", description=__doc__)
    parser.add_argument("--data", required=True, help="episodes, as for rb value label")
    recorded = 'recorded answers: {"question_id": "<episode>_<before>_<after>", "answer"}'
    add_arguments(parser, max_new_tokens=64, answers_help=recorded)
    parser.add_argument("--out", required=True, metavar="CURVES.jsonl")
    parser.add_argument("--interval", type=int, default=30, help="frames between two scored frames")
    parser.add_argument("--alpha", type=float, default=20.0, help="of the consistency weight")
    return parser
