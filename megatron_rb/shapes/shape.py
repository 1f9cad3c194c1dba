"""The sizes of a RoboBrain model, read from a Hugging Face `config.json` and written nowhere else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rb.shapes.families import FAMILIES, TEXT_FIXED, Family, family_of, rope_of
from megatron_rb.shapes.fields import MAY_BE_NULL, Fields, check_fixed, check_type, check_types, mapping
from megatron_rb.shapes.foreign import foreign_kind
from megatron_rb.shapes.towers import TextShape, VisionShape


@dataclass(frozen=True)
class RoboBrainShape:
    """One RoboBrain model: family, sizes, special tokens, initial weight scale."""

    family: str
    vision: VisionShape
    text: TextShape
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    initializer_range: float

    @property
    def traits(self) -> Family:
        """All that differs between families and follows from no size."""
        return FAMILIES[self.family]


def load_shape(hf_path: str | Path) -> RoboBrainShape:
    """Read `config.json` of a Hugging Face folder (or the file itself).

    Raises:
        ValueError: the file is missing, is not JSON, or describes another model family.
    """
    path = Path(hf_path)
    path = path / "config.json" if path.suffix != ".json" else path
    if not path.is_file():
        kind = foreign_kind(path.parent)
        if kind:
            raise ValueError(f"{path.parent} {kind}")
        raise ValueError(f"no config.json at {path}; model.hf_path must be a Hugging Face folder of a RoboBrain model")
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return shape_from_dict(raw, str(path))


def shape_from_dict(raw: Any, origin: str = "config") -> RoboBrainShape:
    """Turn the content of a `config.json` into a `RoboBrainShape`; flat (old) and nested text configs are read.

    Raises:
        ValueError: another family, a value that is missing, of a wrong type or not supported, sizes that do not fit.
    """
    raw = mapping(raw, origin)
    family = family_of(raw.get("model_type"), origin)
    try:
        _check_sections(raw, family, origin)
        shape = _read(raw, family, origin)
    except ValueError as error:
        raise error if str(error).startswith(origin) else ValueError(f"{origin}: {error}") from error
    _check(shape, origin)
    _check_tokens(shape, origin)
    return shape


def _read(raw: dict[str, Any], family: Family, origin: str) -> RoboBrainShape:
    nested = raw.get("text_config") is not None or not family.flat_text
    text = {**family.text_defaults, **_text_section(family, raw)}
    vision = {**family.vision_defaults, **mapping(raw.get("vision_config") or {}, "vision_config")}
    text_words = "text_config." if nested else ""
    for fields, known, words in (
        (text, family.text_defaults, text_words),
        (vision, family.vision_defaults, "vision_config."),
    ):
        empty = [name for name in known if fields[name] is None and name not in MAY_BE_NULL]
        if empty:
            raise ValueError(f"{origin} gives the field '{empty[0]}' of a {family.name} model no value")
        check_types(fields, known, words)
    shape = RoboBrainShape(
        family=family.name,
        vision=family.read_vision(vision),
        text=family.read_text(text, _tied(family, raw)),
        image_token_id=_token(raw, "image_token_id", 151655),
        video_token_id=_token(raw, "video_token_id", 151656),
        vision_start_token_id=_token(raw, "vision_start_token_id", 151652),
        vision_end_token_id=_token(raw, "vision_end_token_id", 151653),
        initializer_range=text["initializer_range"],
    )
    _check_computed(shape, text, vision, text_words)
    return shape


def _check_computed(shape: RoboBrainShape, text: Fields, vision: Fields, text_words: str) -> None:
    """Raise ValueError for a field that changes what transformers computes and that no layer here follows."""
    check_fixed(text, TEXT_FIXED | {"attention_bias": shape.text.qkv_bias}, text_words)
    rope = {"mrope_interleaved": shape.text.mrope_interleaved, "partial_rotary_factor": 1}
    check_fixed(rope_of(text), rope, f"{text_words}rope_parameters.")
    other_words = {"num_hidden_layers": vision["depth"], "num_attention_heads": vision["num_heads"]}
    check_fixed(vision, other_words, "vision_config.")


def _token(raw: dict[str, Any], name: str, usual: int) -> int:
    value = raw.get(name, usual)
    check_type(value, usual, name, least=0)
    return value


def _check_sections(raw: dict[str, Any], family: Family, origin: str) -> None:
    """A section that is there without a value is no section of defaults; only flat text may stand beside it."""
    sections = ["vision_config"] if family.flat_text else ["vision_config", "text_config"]
    empty = [name for name in sections if name in raw and raw[name] is None]
    if empty:
        raise ValueError(f"{origin} gives the section '{empty[0]}' of a {family.name} model no value")


def _text_section(family: Family, raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of the language model."""
    if raw.get("text_config") is not None:
        return mapping(raw["text_config"], "text_config")
    return raw if family.flat_text else {}


def _tied(family: Family, raw: dict[str, Any]) -> bool:
    # transformers 4 wrote the switch into the text config, transformers 5 at the top level. The families whose text
    # config was flat once forward the nested one, the others read the top level alone.
    sections = [raw, raw.get("text_config") or {}] if family.flat_text else [raw]
    switches = [section.get("tie_word_embeddings") for section in sections]
    for switch in switches:
        if switch is not None:
            check_type(switch, False, "tie_word_embeddings")
    return any(switches)


def _check(shape: RoboBrainShape, origin: str) -> None:
    vision, text = shape.vision, shape.text
    deepstack = vision.deepstack_layers
    rules = [
        (
            vision.hidden_size % vision.num_heads == 0,
            f"vision hidden_size {vision.hidden_size} is not a multiple of num_heads {vision.num_heads}",
        ),
        (vision.head_dim % 4 == 0, f"vision head size {vision.head_dim} is not a multiple of 4, as 2-D rope needs"),
        (
            vision.out_hidden_size == text.hidden_size,
            f"vision out_hidden_size {vision.out_hidden_size} differs from the text hidden_size {text.hidden_size}",
        ),
        (
            text.num_heads % text.num_query_groups == 0,
            f"num_attention_heads {text.num_heads} is not a multiple of num_key_value_heads {text.num_query_groups}",
        ),
        (
            len(text.mrope_section) == 3,
            f"mrope_section {list(text.mrope_section)} must have 3 numbers: of time, height and width",
        ),
        (
            sum(text.mrope_section) * 2 == text.head_dim,
            f"mrope_section {list(text.mrope_section)} must sum to half the head size {text.head_dim}",
        ),
        (
            len(deepstack) <= text.num_layers,
            f"{len(deepstack)} DeepStack layers need as many decoder layers, there are {text.num_layers}",
        ),
        (
            all(0 <= layer < vision.num_layers for layer in deepstack),
            f"deepstack_visual_indexes {list(deepstack)} must lie in 0..{vision.num_layers - 1}",
        ),
        (
            list(deepstack) == sorted(set(deepstack)),
            f"deepstack_visual_indexes {list(deepstack)} must rise, each layer once: the merger of an entry has its "
            f"place in the list for a number, so sort the list and number the mergers of the weights alike",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise ValueError(f"{origin}: {message}")


def _check_tokens(shape: RoboBrainShape, origin: str) -> None:
    """Special tokens have rows in the embedding and are told apart."""
    names = "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"
    tokens = {name: getattr(shape, name) for name in names}
    words = ", ".join(f"{name} {token}" for name, token in tokens.items())
    if any(not 0 <= token < shape.text.vocab_size for token in tokens.values()):
        raise ValueError(f"{origin}: {words} must lie in 0..{shape.text.vocab_size - 1} (vocab_size)")
    if len(set(tokens.values())) < len(tokens):
        raise ValueError(f"{origin}: {words} must differ from each other")


def model_fingerprint(shape: RoboBrainShape) -> dict[str, Any]:
    """What identifies a model in a checkpoint's manifest, JSON-able; the initial weight scale is no part of it."""
    fields = asdict(shape)
    del fields["initializer_range"]
    return json.loads(json.dumps(fields))
