"""The rows of a data set by number, with or without pixels."""

from __future__ import annotations

import os
from contextlib import ExitStack

import numpy as np

from megatron_rb.data.conversation import Conversation
from megatron_rb.data.encoder import SampleEncoder
from megatron_rb.data.examine import WHOLE_ROW, IndexRules, default_id
from megatron_rb.data.fingerprint import DataFingerprint
from megatron_rb.data.index import Index
from megatron_rb.data.problems import BadSample, refusing_the_unexpected
from megatron_rb.data.rows import parse_line
from megatron_rb.data.sample import EncodedSample


class ConversationDataset:
    """Usable samples of some jsonl files; any number of threads may read at once."""

    def __init__(self, index: Index, encoder: SampleEncoder, rules: IndexRules) -> None:
        self.index = index
        self.encoder = encoder
        self.rules = rules
        self._open = ExitStack()
        self._files = [self._open.enter_context(open(name, "rb")) for name in index.files]

    @property
    def sizes(self) -> np.ndarray:
        """int64 `[samples, 2]`: tokens and patches of each sample."""
        return self.index.sizes

    @property
    def fingerprint(self) -> DataFingerprint:
        """Which samples in which order."""
        return self.index.fingerprint

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> EncodedSample:
        return self.get(number, with_pixels=True)

    def get(self, number: int, *, with_pixels: bool) -> EncodedSample:
        """One sample; without pixels no image or video is touched.

        Raises:
            BadSample: the media no longer decode.
            ValueError: the data file has changed since it was indexed.
        """
        conversation, infos = self.conversation(number), self.index.media_infos(number)
        sample = self.encoder.encode(conversation, infos)
        if with_pixels:
            with refusing_the_unexpected():
                sample.pixels = self.encoder.pixels(conversation, infos)
        return sample

    def blank(self, number: int) -> EncodedSample:
        """The sample with zeros for pixels, to keep the place of one whose media do not decode."""
        sample = self.get(number, with_pixels=False)
        sample.pixels = self.encoder.no_pixels(sample)
        return sample

    def prompt(self, number: int, *, with_pixels: bool = True) -> EncodedSample:
        """The sample up to where the last answer begins, for generation; raises as `get`."""
        conversation, infos = self.conversation(number), self.index.media_infos(number)
        sample = self.encoder.encode_prompt(conversation, infos)
        if with_pixels:
            with refusing_the_unexpected():
                sample.pixels = self.encoder.pixels(conversation, infos)[: len(sample.grids)]
        return sample

    def blank_prompt(self, number: int) -> EncodedSample:
        """The prompt with zeros for pixels, to keep the place of one whose media do not decode."""
        sample = self.prompt(number, with_pixels=False)
        sample.pixels = self.encoder.no_pixels(sample)
        return sample

    def row(self, number: int) -> bytes:
        """The line of the data file."""
        file, line, offset, length = self.index.places[number].tolist()
        content = os.pread(self._files[file].fileno(), length, offset)
        if len(content) != length:
            raise ValueError(f"{self.index.files[file]} ends before line {line}; it has changed since it was indexed")
        return content

    def conversation(self, number: int) -> Conversation:
        """The row, read; up to one turn when the sample is that turn."""
        file, line, _, _ = self.index.places[number].tolist()
        name = self.index.files[file]
        try:
            conversation = parse_line(self.row(number), default_id(name, line), self.rules.root_of(name))
        except BadSample as error:
            raise ValueError(f"{name} has changed since it was indexed: in line {line} {error}") from error
        turn = int(self.index.turns[number])
        return conversation if turn == WHOLE_ROW else conversation.until(turn)

    def source(self, number: int) -> tuple[str, int]:
        """File and line of a sample."""
        file, line, _, _ = self.index.places[number].tolist()
        return self.index.files[file], line

    def close(self) -> None:
        """Close the data files."""
        self._open.close()
