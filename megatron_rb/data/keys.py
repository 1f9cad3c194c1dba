"""Every key of the public forms of rows, and what becomes of it: read, refused, or known to change nothing.

`docs/data.md` holds the same tables; what is in none of them is counted and told once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rb.data.problems import BadSample, quoted

READ = "read"
REFUSED = "refuses the row"
UNUSED = "changes nothing"


@dataclass(frozen=True)
class Key:
    """What becomes of a key, and why."""

    fate: str
    meaning: str


def _keys(fate: str, **meanings: str) -> dict[str, Key]:
    return {name: Key(fate, meaning) for name, meaning in meanings.items()}


SIZES = _keys(
    READ,
    min_pixels="smallest area of a picture or frame after resizing",
    max_pixels="largest area of a picture or frame after resizing",
    resized_height="height after resizing, together with `resized_width`",
    resized_width="width after resizing, together with `resized_height`",
)
FRAMES = _keys(
    READ,
    total_pixels="largest area of all sampled frames of a video together",
    fps="frames a second taken from a video file; rate of frames that lie there as images",
    nframes="frames taken from a video file; not together with `fps`",
    min_frames="fewest frames taken from a video file",
    max_frames="most frames taken from a video file",
    video_start="second of a video file at which the clip begins",
    video_end="second of a video file at which the clip ends",
    sample_fps="rate of frames that lie there as images, before `fps`",
    raw_fps="rate of the video that such frames were taken from",
)
_PREFERENCE = (
    "a preference pair; only the wished answer can be learned: write it as the assistant's turn, drop this key"
)
_MARK = "a mark of what is learned that is not obeyed here; mark turns with `loss`: true or false"
_AUDIO = "sound; the models hear none"

ROW_KEYS = {
    **_keys(
        READ,
        id="name of the sample; without one, file and line",
        conversations="turns, ShareGPT",
        conversation="turns, ShareGPT, or pairs `human` and `assistant` (ms-swift)",
        messages="turns, OpenAI",
        system="system turn, unless the turns begin with one; empty = none",
        system_prompt="as `system` (ms-swift)",
        instruction="question (Alpaca)",
        input="second line of the question (Alpaca)",
        output="answer (Alpaca)",
        query="question (ms-swift)",
        response="answer (ms-swift)",
        history="earlier questions and answers, `[[question, answer], ...]` (Alpaca, ms-swift); learned too",
        tools="functions the assistant may call, a list or its JSON text; needs a chat template that writes them",
        functions="as `tools` (OpenAI's older form)",
        image='picture or list of pictures: paths, `file://`, data URIs, `{"path": ...}`; null and empty = none',
        images="as `image`",
        video="video file, folder of frames, list of frames, or a list of these; null and empty = none",
        videos="as `video`",
        video_fps="as `fps`",
        chat_template_kwargs="keys of pictures and videos, for all of the row (ms-swift)",
        objects="`ref`, `bbox`, `bbox_type`, `image_id`: what stands for `<ref-object>` and `<bbox>` (ms-swift)",
        label="KTO: true = an ordinary row; anything else refuses it",
        kto_tag="as `label` (LLaMA-Factory)",
        points="places the answer names, checked against the picture",
    ),
    **SIZES,
    **FRAMES,
    **_keys(
        REFUSED,
        loss=_MARK,
        weight=_MARK,
        loss_mask=_MARK,
        chosen=_PREFERENCE,
        rejected=_PREFERENCE,
        rejected_response=_PREFERENCE,
        rejected_messages=_PREFERENCE,
        rejected_images=_PREFERENCE,
        preferred_output=_PREFERENCE,
        non_preferred_output=_PREFERENCE,
        positive_messages="pairs for an embedding model; none is trained here",
        negative_messages="pairs for an embedding model; none is trained here",
        margin="a margin of a reward model; none is trained here",
        teacher_prompt="a prompt for a teacher; none is asked here",
        audio=_AUDIO,
        audios=_AUDIO,
    ),
    **_keys(
        UNUSED,
        task="kind of the question, for reports",
        answer="the answer in numbers, for scoring",
        mask="file of the wished region, for scoring",
        hop="progress label of a value sample",
        progress="progress of the two states of a value sample",
        episode="where a value sample comes from",
        frames="where a value sample comes from",
        steps="the plan in words, for scoring",
        order="the order of pictures, for scoring",
        box="the box in numbers, for scoring",
        metres="the length in numbers, for scoring",
        unit="unit of the length, for scoring",
        channel="group whose loss ms-swift reports apart",
        parallel_tool_calls="a wish for the generation of calls (OpenAI)",
    ),
}
TURN_KEYS = {
    **_keys(
        READ,
        role="who speaks",
        content="what is said: text, or a list of parts; null where there are tool calls or thoughts",
        loss="whether an assistant's turn is learned: true, false, 1, 0; null = as `data.loss_turns` says",
        weight="as `loss` (OpenAI)",
        trainable="as `loss`",
        loss_mask="as `loss`",
        train="as `loss` (axolotl)",
        training="as `loss` (axolotl)",
        loss_weight="as `loss` (LLaMA-Factory)",
        loss_scale="as `loss` (ms-swift); other numbers than 0 and 1 refuse the row",
        reasoning_content="thoughts before the answer, learned; `<think>` text where the template knows no such field",
        reasoning="as `reasoning_content`",
        thinking="as `reasoning_content`",
        tool_calls="functions the assistant calls (OpenAI)",
        function_call="one function the assistant calls (OpenAI's older form)",
        tool_call_id="handed to the template",
        name="handed to the template",
    ),
    "from": Key(READ, "as `role`"),
    "value": Key(READ, "as `content`"),
    **_keys(
        REFUSED,
        train_on_turn=_MARK,
        train_detail=_MARK,
        training_detail=_MARK,
        refusal="an answer of OpenAI's models that declines; write it as the content",
        audio=_AUDIO,
        images="pictures of a turn; name them in the row's `images` and mark them with <image>",
    ),
    **_keys(UNUSED, annotations="sources that OpenAI's models name"),
}
PART_KEYS = {
    **_keys(
        READ,
        type="`text`, `image`, `image_url`, `video`, `video_url`, `reasoning`, `thinking` or `tool_call`",
        text="text",
        value="as the key that the type names (LLaMA-Factory)",
        reasoning="thoughts, as `reasoning_content` of the turn",
        thinking="thoughts, as `reasoning_content` of the turn",
        tool_call="a function the assistant calls, as JSON",
        image="picture, as in the row; without one, the row's next",
        image_url='as `image`, or `{"url": ...}`',
        video="video, as in the row; without one, the row's next",
        video_url='as `video`, or `{"url": ...}`',
        path="file of the picture or video",
        url="file of the picture or video",
    ),
    **SIZES,
    **FRAMES,
    **_keys(UNUSED, cache_control="a hint for an API's cache", detail="a hint for the price of an API's picture"),
}


def empty(value: Any) -> bool:
    """Whether a key is there only because all rows of a table have it."""
    return value is None or value == "" or value == [] or value == {} or value == [None]


SAME = (
    ("system", "system_prompt"),
    ("content", "value"),
    ("fps", "video_fps"),
    ("tools", "functions"),
    ("tool_calls", "function_call"),
    ("image", "image_url", "path", "url"),
    ("video", "video_url", "path", "url"),
    ("text", "value"),
)
"""Keys of one thing that mean the same, so that only one of them can be obeyed."""


def check_same(given: Mapping[str, Any], place: str, groups: Sequence[Sequence[str]] = SAME) -> None:
    """Refuse two spellings of one key that say different things.

    Raises:
        BadSample: they do; with both keys and values.
    """
    for group in groups:
        said = {name: given[name] for name in group if not empty(given.get(name))}
        first = next(iter(said.values()), None)
        if len(said) > 1 and any(value != first for value in said.values()):
            values = " and ".join(f"{name!r}: {quoted(value)}" for name, value in said.items())
            raise BadSample(
                f"key {next(iter(said))}", f"the {place or 'row'} says {values}, which differ; keep one of them"
            )


def check_keys(given: Mapping[str, Any], table: Mapping[str, Key], place: str) -> list[str]:
    """Refuse what cannot be honoured; returns the keys that nobody knows, as `<place>.<key>`.

    Raises:
        BadSample: a key that refuses its row is not empty.
    """
    check_same(given, place)
    unknown = []
    for name, value in given.items():
        key = table.get(name)
        if key is None:
            unknown.append(f"{place}.{name}" if place else str(name))
        elif key.fate == REFUSED and not empty(value):
            raise BadSample(
                f"key {name}", f"the {place or 'row'}'s key {name!r} is {key.meaning}; it is {quoted(value)}"
            )
    return unknown


def key_table(table: Mapping[str, Key]) -> Iterator[str]:
    """The lines of a table of keys in Markdown."""
    yield from ("| key | what becomes of it | |", "|---|---|---|")
    for name, key in table.items():
        yield f"| `{name}` | {key.fate} | {key.meaning} |"
