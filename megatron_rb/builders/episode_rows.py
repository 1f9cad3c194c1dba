"""Rows about the course of an episode: the next step, the steps that are left, the order of moments."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping

from megatron_rb.builders.episodes import Episode
from megatron_rb.builders.rows import Build, Row, RowKey, build_row, relative_path, views_of
from megatron_rb.spatial import prompts

STEPS = {
    "approach": "move the gripper over the {object}",
    "descend": "lower the gripper to the {object}",
    "grasp": "close the gripper on the {object}",
    "lift": "lift the {object}",
    "transport": "carry the {object} over the green cube",
    "place": "lower the {object} onto the green cube",
    "release": "open the gripper",
    "retreat": "move the gripper away",
}
"""Words for the phases of robosim; a phase that is not among them speaks for itself."""
MOST_MOMENTS = 6


def planning(episode: Episode, build: Build) -> Iterator[Row]:
    """At each change of phase: what comes next, and all that is left, as a JSON list of steps."""
    phases = [episode.frames[k].phase for k in episode.key_frames()[:-1]]
    for number, index in enumerate(episode.key_frames()[:-1]):
        left = [STEPS[phase].format(object="red cube") if phase in STEPS else phase for phase in phases[number:]]
        for name, view in views_of(episode.frames[index], build.mix.views):
            image = relative_path(view.image, build.media_root)
            for kind, template, answer in (
                ("next", prompts.NEXT_STEP, left[0]),
                ("remaining", prompts.REMAINING, json.dumps(left)),
            ):
                question = f"{prompts.IMAGE}\n{template.format(instruction=episode.instruction)}"
                key = RowKey("planning", f"{episode.name}_{index:02d}_{name}_{kind}")
                yield build_row(key, [image], question, answer, {"steps": left})


def temporal_order(episode: Episode, build: Build) -> Iterator[Row]:
    """Key frames in mixed order; the answer numbers them as they happened."""
    keys = episode.key_frames()[:MOST_MOMENTS]
    for name in build.mix.views:
        if any(name not in episode.frames[k].views for k in keys):
            build.report.skipped["temporal_order: a moment lacks the view"] += 1
            continue
        order = build.rng.permutation(len(keys))
        images = [relative_path(episode.frames[keys[k]].views[name].image, build.media_root) for k in order]
        answer = [int((order == moment).nonzero()[0][0]) + 1 for moment in range(len(keys))]
        question = f"{prompts.images(len(keys))}\n{prompts.TEMPORAL_ORDER.format(instruction=episode.instruction)}"
        key = RowKey("temporal_order", f"{episode.name}_{name}")
        yield build_row(key, images, question, json.dumps(answer), {"order": answer})


EPISODE_BUILDERS: Mapping[str, Callable[[Episode, Build], Iterator[Row]]] = {
    "planning": planning,
    "temporal_order": temporal_order,
}
