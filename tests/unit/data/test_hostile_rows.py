"""Whatever a row holds, it is at most a refused row; the others train."""

import json
import logging
import re

import pytest

from megatron_rb.config.schema import DataConfig
from megatron_rb.data import examine
from megatron_rb.data.build import build_dataset
from megatron_rb.data.ledger import Ledger, read_ledger
from megatron_rb.data.problems import LONGEST_MESSAGE, BadSample, refusing_the_unexpected


def _talk(text: str, **keys) -> bytes:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "Here."}]
    return json.dumps({"conversations": turns, **keys}).encode()


ROWS = {
    "half a character": _talk("half an emoji \ud83d here"),
    "half a character in a name": _talk("<image>", image="\ud83d.png"),
    "half a character in the id": _talk("a", id="\ud83d"),
    "brackets": b"[" * 100_000,
    "deep annotation": b'{"a": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    "long video name": _talk("<video>", video="x" * 300),
    "long image name": _talk("<image>", image="x" * 300),
    "long path": _talk("<video>", video="x/" * 3000),
    "NUL in a name": _talk("<image>", image="a\0b"),
    "NUL in a frame": _talk("<video>", videos=[["a\0b", "c"]]),
    "endless rate": _talk("<video>", video="v").replace(b'"v"', b'"v", "fps": 1e400'),
    "endless number": _talk("a").replace(b"{", b'{"n": ' + b"9" * 5000 + b", ", 1),
    "long text": _talk("word " * 400_000),
    "no text": b'{"conversations": [{"from": "human", "value": 1}, {"from": "gpt", "value": null}]}',
    "no turns": b'{"conversations": {"from": "human"}}',
    "URL": _talk("<image>", image="https://example.com/" + "a" * 10_000),
    "endless picture": _talk("a", points={"points": [[1, 2]], "frame": "pixels", "size": [1e308 * 10, 9]}),
    "endless point": _talk("a", points={"points": [[10**400, 2]]}),
    "payload": _talk("<image>", image="data:image/png;base64," + "A" * 100_001),
    "huge id": _talk("<image>", id="n" * 100_000),
}


@pytest.fixture
def build(encoder, tmp_path):
    def build_rows(*rows: bytes):
        (tmp_path / "rows.jsonl").write_bytes(b"\n".join(rows))
        ledger = Ledger(tmp_path / "ledger.jsonl")
        config = DataConfig(system_prompt="", seq_length=512)
        return build_dataset(config, encoder, [str(tmp_path / "rows.jsonl")], ledger), read_ledger(ledger.path)

    return build_rows


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_a_row_is_at_most_refused_with_its_line_and_a_short_reason(build, row):
    dataset, refused = build(_talk("good"), row, _talk("good too"))
    assert len(dataset) == 2
    (record,) = refused
    assert record["line"] == 2 and record["problem"] != "reader error"
    assert len(json.dumps(record)) < 3 * LONGEST_MESSAGE


def test_no_message_is_long_or_holds_half_a_character():
    text = str(BadSample("a", "no file " + "x" * 10_000 + "\ud83d"))
    assert len(text) < LONGEST_MESSAGE and text.startswith("no file xxx") and "(10,014 characters)" in text
    assert r"\ud83d" in text


def test_a_row_that_fits_is_not_refused_for_the_length_of_its_text(build, encoder):
    """The bound looks at bytes: the longest token there is must still fit."""
    longest = max(encoder.tokenizer._tokenizer.get_vocab(), key=len)
    text = encoder.tokenizer._tokenizer.convert_tokens_to_string([longest]) * 480
    dataset, _ = build(_talk(text))
    assert len(dataset) == 1 and dataset.sizes[0, 0] <= 512


def test_composed_characters_do_not_make_a_row_too_long(build, encoder):
    """NFC writes these three letters as one."""
    tokens = len(encoder.tokenizer.encode("\u1100\u1161\u11a8"))
    dataset, _ = build(_talk("\u1100\u1161\u11a8" * (480 // tokens)))
    assert len(dataset) == 1


def test_a_long_text_is_not_tokenised(build, encoder, monkeypatch):
    told = []
    encode = type(encoder.tokenizer).encode
    spy = lambda self, text: told.append(len(text)) or encode(self, text)  # noqa: E731
    monkeypatch.setattr(type(encoder.tokenizer), "encode", spy)
    _, refused = build(_talk("good"), _talk("word " * 400_000))
    assert max(told) < 10_000
    assert re.search(r"2,000,\d+ bytes of text, at least [\d,]+ tokens, do not fit", refused[0]["reason"])


def test_an_error_of_a_reader_is_counted_apart_and_its_traceback_told_once(build, monkeypatch, caplog):
    def fail(line, name, root):
        if b"broken" in line:
            raise ZeroDivisionError("by hand")
        return read(line, name, root)

    read = examine.parse_line
    monkeypatch.setattr(examine, "parse_line", fail)
    monkeypatch.setattr("megatron_rb.data.problems._logged", set())
    with caplog.at_level(logging.DEBUG):
        dataset, refused = build(_talk("good"), _talk("broken"), _talk("broken"))
    assert dataset.index.rejected == {"reader error": 2}
    assert refused[0]["reason"] == "ZeroDivisionError: by hand"
    assert caplog.text.count("Traceback") == 1


def test_an_error_while_pixels_are_read_costs_the_sample_alone(build, draw_image, monkeypatch):
    dataset, _ = build(_talk("<image>", image=draw_image("a.png", 64, 64)))
    monkeypatch.setattr(type(dataset.encoder), "pixels", lambda *_: 1 / 0)
    with pytest.raises(BadSample, match="ZeroDivisionError"):
        dataset.get(0, with_pixels=True)


def test_a_missing_package_is_no_fault_of_the_row():
    def need():
        try:
            import no_such_package  # noqa: F401
        except ImportError as error:
            raise ValueError("install it") from error

    with pytest.raises(ValueError, match="install it") as caught, refusing_the_unexpected():
        need()
    assert not isinstance(caught.value, BadSample)


@pytest.mark.parametrize("text", ['[{"id": 1}, {"id": 2}]', '[\n  {\n "id": 1}]', "[\n"])
def test_a_json_array_is_told_how_to_become_a_data_file(encoder, tmp_path, text):
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"rows.json is one JSON array.*jq -c '\.\[\]'"):
        build_dataset(DataConfig(), encoder, [str(file)], Ledger(tmp_path / "ledger.jsonl"))


def test_keys_that_are_not_read_are_told_once(build, caplog):
    with caplog.at_level(logging.WARNING):
        build(*[_talk("a", colour="red")] * 3)
    assert caplog.text.count("are not read: colour (3 rows)") == 1
