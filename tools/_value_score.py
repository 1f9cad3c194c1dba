"""Score episodes: ask a model about pairs of frames, or take recorded answers, and write progress curves."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from megatron_rb.evaluation.answer_source import add_arguments, answers_of
from megatron_rb.evaluation.value_scores import curves_of, score_questions
from megatron_rb.launch.workers import start_workers
from megatron_rb.value.episodes import BadEpisode
from megatron_rb.value.reconstruct import Consistency


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    scored = list(score_questions(Path(options.data), options.interval))
    usable = [item for item in scored if not isinstance(item, BadEpisode)]
    for bad in (item for item in scored if isinstance(item, BadEpisode)):
        print(f"not scored: {bad.reason} ({bad.place})")
    if not usable:
        raise ValueError(f"{options.data} holds no episode that can be scored")
    root = Path(options.data).parent if Path(options.data).is_file() else Path()
    questions = [row for _, _, rows in usable for row in rows]
    said = Path(options.out).with_suffix(".answers.jsonl")
    answers = answers_of(options, questions, root, said, start_workers)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    curves = [curves_of(episode.name, frames, answers, Consistency(options.alpha)) for episode, frames, _ in usable]
    out.write_text("".join(json.dumps(curve.as_json()) + "\n" for curve in curves))
    plus, minus = (np.mean([getattr(curve, name) for curve in curves]) for name in ("voc_plus", "voc_minus"))
    unreadable, total = sum(curve.unreadable for curve in curves), sum(curve.answers for curve in curves)
    print(f"{out}: {len(curves)} episodes, VOC+ {plus:.4f}, VOC- {minus:.4f}, {unreadable} of {total} unreadable")
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
