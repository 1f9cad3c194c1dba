"""Conversation -> `EncodedSample`: the same ids and patches as the processors of transformers make."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_rb.data.boxes import BOX_TOKENS, BoxWriter
from megatron_rb.data.conversation import BoxRef, Conversation, MediaRef, NameRef
from megatron_rb.data.frames import FrameRule, clip_of, sample_video, shown_second_per_grid, shown_seconds
from megatron_rb.data.media import MediaInfo, inspect_media, load_frames, load_image
from megatron_rb.data.patience import READ_SECONDS
from megatron_rb.data.problems import BadSample
from megatron_rb.data.processor import VisionProcessor
from megatron_rb.data.prompt import ChatTemplate, TextSpan
from megatron_rb.data.sample import IGNORED, EncodedSample, VisionGrid
from megatron_rb.data.tokenizer import IMAGE_TOKEN, VIDEO_TOKEN, VISION_END, VISION_START, Tokenizer
from megatron_rb.shapes.families import VideoTime

PADS = re.compile("|".join(map(re.escape, (IMAGE_TOKEN, VIDEO_TOKEN))))


@dataclass(frozen=True)
class _Shown:
    """How one image or video stands in the sequence."""

    pad: str
    grid: VisionGrid
    text: str
    """What replaces the template's placeholder; each placeholder in it stands for `tokens` of them."""
    tokens: int


@dataclass(frozen=True)
class SampleEncoder:
    """Everything that decides how a conversation becomes numbers."""

    tokenizer: Tokenizer
    processor: VisionProcessor
    template: ChatTemplate
    video_fps: float
    """Frames per second taken from a video file, and the rate of given frames when nothing else says it."""
    max_video_frames: int
    read_seconds: float = READ_SECONDS
    """Time that a file has to answer, twice; 0 = no limit."""
    loss_turns: str = "all"
    """Assistant turns that are learned when they say nothing of it themselves: `all` or the `last`."""
    box_text: str = "tokens"
    """See `BoxWriter.text`."""

    def inspect(self, conversation: Conversation) -> list[MediaInfo]:
        """Sizes of all media from their headers.

        Raises:
            BadSample: a file is missing or unreadable.
        """
        return [inspect_media(ref, self.video_fps, self.read_seconds) for ref in conversation.media]

    def encode(
        self, conversation: Conversation, infos: Sequence[MediaInfo], max_tokens: int | None = None
    ) -> EncodedSample:
        """Ids and labels of the whole conversation, without pixels; no media file is touched.

        Args:
            max_tokens: a text that has certainly more is refused before it is tokenised; what passes may have more.

        Raises:
            RewrittenTurns: every learned turn must become a sample of its own, `conversation.until(turn)`.
            BadSample: the conversation cannot be written by the template, or media do not fit the model.
        """
        shown = self._all_shown(conversation, infos)
        pieces = self.template.pieces(self._with_boxes(conversation, infos, shown), self.loss_turns)
        self._check_length(pieces, max_tokens)
        return self._assemble(conversation, shown, pieces)

    def encode_prompt(self, conversation: Conversation, infos: Sequence[MediaInfo]) -> EncodedSample:
        """Ids up to where the last assistant turn begins, for generation; `infos` as for the whole conversation."""
        last = max(number for number, turn in enumerate(conversation.turns) if turn.role == "assistant")
        shorter = replace(conversation, turns=conversation.turns[:last])
        infos = infos[: len(shorter.media)]
        shown = self._all_shown(shorter, infos)
        text = self.template.prompt(self._with_boxes(shorter, infos, shown))
        return self._assemble(shorter, shown, [TextSpan(text, learned=False)])

    def grid(self, ref: MediaRef, info: MediaInfo) -> VisionGrid:
        """Patches of an image or video, from its header alone."""
        if info.frames:
            return self.processor.video_grid(len(self._frames(ref, info)), info.height, info.width, options=ref.options)
        return self.processor.image_grid(info.height, info.width, ref.options)

    def pixels(self, conversation: Conversation, infos: Sequence[MediaInfo]) -> list[np.ndarray]:
        """Patches of all media, in order.

        Raises:
            BadSample: a file does not decode or has changed.
        """
        return [self._patches(ref, info) for ref, info in zip(conversation.media, infos, strict=True)]

    def no_pixels(self, sample: EncodedSample) -> list[np.ndarray]:
        """Zeros in place of the patches of media that do not decode."""
        return [np.zeros((grid.patches, self.processor.patch_dim), dtype=np.float32) for grid in sample.grids]

    def _patches(self, ref: MediaRef, info: MediaInfo) -> np.ndarray:
        if ref.kind == "image":
            return self.processor.image_patches(load_image(ref, info, self.read_seconds), ref.options)
        frames = load_frames(ref, info, self._frames(ref, info), self.read_seconds)
        return self.processor.video_patches(frames, ref.options)

    def _frames(self, ref: MediaRef, info: MediaInfo) -> list[int]:
        limits = self.processor.video_limits
        rule = FrameRule(
            self.processor.family.videos.whole_patches,
            self.video_fps,
            limits.min_frames,
            min(limits.max_frames, self.max_video_frames),
            self.processor.temporal_patch_size,
        )
        return sample_video(info, ref.options, rule)

    def _all_shown(self, conversation: Conversation, infos: Sequence[MediaInfo]) -> list[_Shown]:
        return [self._show(ref, info) for ref, info in zip(conversation.media, infos, strict=True)]

    def _with_boxes(
        self, conversation: Conversation, infos: Sequence[MediaInfo], shown: Sequence[_Shown]
    ) -> Conversation:
        """The conversation with text in place of boxes, which are in pixels of pictures as they are shown."""
        if not any(isinstance(part, BoxRef | NameRef) for turn in conversation.turns for part in turn.parts):
            return conversation
        if self.box_text == "tokens" and any(len(self.tokenizer.encode(token)) != 1 for token in BOX_TOKENS):
            needed = f"objects needs the tokens {' '.join(BOX_TOKENS)}, which the tokenizer lacks"
            raise BadSample("key objects", f"{needed}; set data.box_text=list to write boxes as [x1, y1, x2, y2]")
        side = self.processor.patch_size
        images = [place for place, ref in enumerate(conversation.media) if ref.kind == "image"]
        sizes = [(infos[place].width, infos[place].height) for place in images]
        seen = [(shown[place].grid.w * side, shown[place].grid.h * side) for place in images]
        writer = BoxWriter(self.processor.family.boxes_in_thousandths, self.box_text)
        return replace(conversation, turns=writer.written(conversation.turns, sizes, seen))

    def _check_length(self, pieces: Sequence[TextSpan], max_tokens: int | None) -> None:
        most = self.tokenizer.most_bytes_per_id
        if max_tokens is None or most is None:
            return
        size = sum(len(piece.text.encode()) for piece in pieces)
        if size > max_tokens * most:
            least = f"{size:,} bytes of text, at least {-(-size // most):,} tokens,"
            raise BadSample("too many tokens", f"{least} do not fit data.seq_length {max_tokens}")

    def _assemble(self, conversation: Conversation, shown: Sequence[_Shown], pieces: list[TextSpan]) -> EncodedSample:
        self._check_pixels(conversation.pixels_of, shown)
        waiting = iter(shown)
        encoded = [self._encode(piece, waiting) for piece in pieces]
        if next(waiting, None) is not None:
            raise BadSample("chat template", "the chat template leaves out an image or video of the conversation")
        return EncodedSample(
            sample_id=conversation.sample_id,
            input_ids=np.concatenate([ids for ids, _ in encoded]),
            labels=np.concatenate([labels for _, labels in encoded]),
            grids=tuple(item.grid for item in shown),
            pixels=None,
        )

    def _encode(self, piece: TextSpan, waiting: Iterator[_Shown]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels of one piece. Text is encoded with one placeholder per block, which is then repeated."""
        repeats: list[int] = []

        def show(pad: re.Match[str]) -> str:
            item = next(waiting, None)
            if item is None or item.pad != pad.group():
                raise BadSample("special token in text", f"the text itself contains {pad.group()}")
            repeats.extend([item.tokens] * item.text.count(item.pad))
            return item.text

        ids = np.array(self.tokenizer.encode(PADS.sub(show, piece.text)), dtype=np.int32)
        pads = (ids == self.tokenizer.token_id(IMAGE_TOKEN)) | (ids == self.tokenizer.token_id(VIDEO_TOKEN))
        counts = np.ones(len(ids), dtype=np.int64)
        counts[pads] = repeats
        labels = np.where(pads | (not piece.learned), IGNORED, ids).astype(np.int32)
        return np.repeat(ids, counts), np.repeat(labels, counts)

    def _check_pixels(self, named: tuple[int, int] | None, shown: Sequence[_Shown]) -> None:
        """An answer in pixels means those of the last picture as the model sees it; resizing has moved all others."""
        if named is None or not shown:
            return
        side = self.processor.patch_size
        seen = shown[-1].grid.w * side, shown[-1].grid.h * side
        if named != seen:
            raise BadSample(
                "pixels of another size",
                f"the answer names pixels of {named[0]} x {named[1]}, the model is shown {seen[0]} x {seen[1]}; write "
                f"the row for that size, or in 0-1000",
            )

    def _show(self, ref: MediaRef, info: MediaInfo) -> _Shown:
        try:
            if ref.kind == "image":
                grid = self.grid(ref, info)
                return _Shown(IMAGE_TOKEN, grid, IMAGE_TOKEN, self.processor.num_tokens(grid))
            return self._show_video(ref, info)
        except BadSample:
            raise
        except ValueError as error:
            raise BadSample("unfit media", f"{ref.source}: {error}") from error

    def _show_video(self, ref: MediaRef, info: MediaInfo) -> _Shown:
        frames, depth = self._frames(ref, info), self.processor.temporal_patch_size
        time = self.processor.family.video_time
        if time is not VideoTime.TEXT:
            counted = time is VideoTime.POSITIONS
            seconds = shown_second_per_grid(info, frames, clip_of(info, ref.options), depth) if counted else 0.0
            grid = self.processor.video_grid(len(frames), info.height, info.width, seconds, ref.options)
            return _Shown(VIDEO_TOKEN, grid, VIDEO_TOKEN, self.processor.num_tokens(grid))
        # The time of each temporal patch is written. transformers replaces the placeholder alone, so the start and
        # end that the template writes stay around all of it.
        grid = self.grid(ref, info)
        blocks = [
            f"<{second:.1f} seconds>{VISION_START}{VIDEO_TOKEN}{VISION_END}"
            for second in shown_seconds(info, frames, depth)
        ]
        return _Shown(VIDEO_TOKEN, grid, "".join(blocks), self.processor.num_tokens(grid) // grid.t)
