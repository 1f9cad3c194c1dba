"""Text <-> token ids: a Hugging Face tokenizer folder or a sentencepiece model behind one small interface."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_rb.shapes.shape import RoboBrainShape

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
END_TOKENS = ("<|im_end|>", "<|endoftext|>")
BYTE_LETTERS = frozenset(chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)))
"""The characters that byte-level BPE writes for the 256 bytes."""
SPECIAL_TOKENS = ("<|im_start|>", *END_TOKENS, VISION_START, VISION_END, IMAGE_TOKEN, VIDEO_TOKEN)


class Tokenizer(Protocol):
    """What the data path needs of a tokenizer; all methods may be called from several threads."""

    chat_template: str | None
    """Jinja source, when the tokenizer brings one."""
    template_variables: dict[str, str]
    """Names such as `eos_token` that the chat template may use."""
    eos_ids: tuple[int, ...]
    """Tokens that end an answer."""
    fingerprint: str
    """Changes whenever the same text could give other ids."""
    most_bytes_per_id: int | None
    """No id stands for more bytes of text than this; None = not known."""

    def __len__(self) -> int:
        """Number of ids; every id is below it."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens written in it become their own id, and nothing is added."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""

    def token_id(self, token: str) -> int:
        """Id of one special token."""


def build_tokenizer(path: str | Path) -> Tokenizer:
    """A sentencepiece tokenizer for a `.model` file, else the Hugging Face tokenizer of a folder.

    Raises:
        ValueError: the path does not exist, or a special token is missing.
    """
    path = Path(path)
    if path.suffix == ".model" and path.is_file():
        return SentencePieceTokenizer(path)
    if not path.is_dir():
        raise ValueError(
            f"no tokenizer at {path}; data.tokenizer (or model.hf_path) must be a Hugging Face folder or a "
            f"sentencepiece .model file"
        )
    return HuggingFaceTokenizer(path)


def check_tokens(tokenizer: Tokenizer, shape: RoboBrainShape) -> None:
    """Whether tokenizer and model speak of the same ids.

    Raises:
        ValueError: a vision token has another id in `config.json`, or the embedding is too small.
    """
    wanted = {
        IMAGE_TOKEN: shape.image_token_id,
        VIDEO_TOKEN: shape.video_token_id,
        VISION_START: shape.vision_start_token_id,
        VISION_END: shape.vision_end_token_id,
    }
    for token, model_id in wanted.items():
        if tokenizer.token_id(token) != model_id:
            raise ValueError(
                f"{token} is token {tokenizer.token_id(token)} in the tokenizer but {model_id} in the model's "
                f"config.json; use the tokenizer that belongs to the model"
            )
    if len(tokenizer) > shape.text.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's vocab_size is {shape.text.vocab_size}; "
            f"use the tokenizer that belongs to the model"
        )


class HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face folder; files only, never the network."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # or a file of another form
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(f"no readable Hugging Face tokenizer in {folder}: {reason}") from error
        self._rust: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        self._lock = threading.Lock()
        self._ids = {token: self._special_id(token, folder) for token in SPECIAL_TOKENS}
        self.chat_template = _folder_template(folder) or _main_template(self._tokenizer.chat_template)
        self.template_variables = {
            name: str(token) for name, token in self._tokenizer.special_tokens_map.items() if isinstance(token, str)
        }
        self.eos_ids = tuple(self._ids[token] for token in END_TOKENS)
        self.most_bytes_per_id = _most_bytes(json.loads(self._rust.to_str())) if self._rust is not None else None
        self.fingerprint = _digest(
            self._rust.to_str() if self._rust is not None else json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        )

    def _special_id(self, token: str, folder: Path) -> int:
        number = self._tokenizer.convert_tokens_to_ids(token)
        # Qwen's unknown token is one of the special tokens itself, so only its own name may give its id.
        unknown = number is None or (number == self._tokenizer.unk_token_id and token != self._tokenizer.unk_token)
        if unknown or self.encode(token) != [number]:
            raise ValueError(f"the tokenizer in {folder} has no special token {token}; RoboBrain models need it")
        return int(number)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        if self._rust is not None:
            return list(self._rust.encode(text, add_special_tokens=False).ids)
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        with self._lock:
            return str(self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=False))

    def token_id(self, token: str) -> int:
        return self._ids[token]


class SentencePieceTokenizer:
    """A sentencepiece model; its special tokens must be pieces, and it brings no chat template."""

    def __init__(self, file: Path) -> None:
        proto = _exact_spaces(file.read_bytes(), file)
        self._pieces = _load_pieces(proto, file)
        self._ids = {token: self._special_id(token, file) for token in SPECIAL_TOKENS}
        self._tokens = {number: token for token, number in self._ids.items()}
        self._cut = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")
        self.chat_template: str | None = None
        self.template_variables: dict[str, str] = {"eos_token": END_TOKENS[0]}
        self.eos_ids = tuple(self._ids[token] for token in END_TOKENS)
        self.most_bytes_per_id: int | None = None  # normalisation may drop any number of characters
        self.fingerprint = _digest(proto)

    def _special_id(self, token: str, file: Path) -> int:
        number = int(self._pieces.piece_to_id(token))
        if number == self._pieces.unk_id():
            raise ValueError(
                f"{file} has no piece {token}; train the model with user_defined_symbols={','.join(SPECIAL_TOKENS)}"
            )
        return number

    def __len__(self) -> int:
        return int(self._pieces.get_piece_size())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._cut.split(text):
            ids += [self._ids[part]] if part in self._ids else self._pieces.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: list[str] = []
        ordinary: list[int] = []
        for number in map(int, ids):
            if number in self._tokens:
                text += [self._pieces.decode(ordinary), self._tokens[number]]
                ordinary = []
            else:
                ordinary.append(number)
        return "".join([*text, self._pieces.decode(ordinary)])

    def token_id(self, token: str) -> int:
        return self._ids[token]


COMPOSITION = 4
"""NFC makes a text at most this many times shorter; Hangul syllables come closest, 3 bytes of 9."""


def _most_bytes(model: dict[str, Any]) -> int | None:
    """Most bytes of text that one id can stand for; None for a tokenizer that may drop or squeeze text.

    Args:
        model: of a byte-level BPE as `tokenizers` writes it, else nothing is known.
    """
    splitters = model["pre_tokenizer"] or {}
    splitters = splitters.get("pretokenizers", [splitters])
    keeping = all(
        part.get("type") == "ByteLevel" or (part.get("type") == "Split" and part.get("behavior") == "Isolated")
        for part in splitters
    )
    normalizer = (model["normalizer"] or {}).get("type")
    squeezing = any(token["lstrip"] or token["rstrip"] for token in model["added_tokens"])
    vocabulary = model["model"].get("vocab", {})
    if not keeping or squeezing or normalizer not in (None, "NFC") or not BYTE_LETTERS <= vocabulary.keys():
        return None
    added = [len(token["content"].encode()) for token in model["added_tokens"]]
    longest = max([*map(len, vocabulary), *added])
    return longest * (COMPOSITION if normalizer == "NFC" else 1)


def _exact_spaces(model: bytes, file: Path) -> bytes:
    """The same model without the rules that add a space in front of a text and squeeze spaces.

    Text is encoded in parts, between special tokens; each part must keep exactly its own spaces.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise ValueError(f"{file} is not a sentencepiece model") from error
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()


def _load_pieces(proto: bytes, file: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(proto)
    except RuntimeError as error:
        raise ValueError(f"{file} is not a sentencepiece model: {error}") from error
    return pieces


def _folder_template(folder: Path) -> str | None:
    """Template of the processor, which transformers prefers to the tokenizer's own; two file names are in use."""
    jinja, old = folder / "chat_template.jinja", folder / "chat_template.json"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    if old.is_file():
        return _main_template(json.loads(old.read_text(encoding="utf-8")).get("chat_template"))
    return None


def _main_template(template: str | dict[str, str] | None) -> str | None:
    return template.get("default") if isinstance(template, dict) else template


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
