"""Data set of a run from its configuration."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from megatron_rb.config.schema import DataConfig
from megatron_rb.data.dataset import ConversationDataset
from megatron_rb.data.encoder import SampleEncoder
from megatron_rb.data.examine import IndexRules
from megatron_rb.data.fingerprint import file_digest
from megatron_rb.data.index import Index, build_index, describe, load_index, look_again
from megatron_rb.data.ledger import Ledger
from megatron_rb.data.packing import Budget
from megatron_rb.data.processor import build_processor
from megatron_rb.data.prompt import build_template
from megatron_rb.data.tokenizer import build_tokenizer, check_tokens
from megatron_rb.shapes.shape import RoboBrainShape

log = logging.getLogger(__name__)

INDEX_VERSION = 2
"""Raised when the same rows would be indexed in another way."""
MOST_KEYS = 20
"""Unknown keys that are named in the log."""
RefusedRows = Literal["again", "tell", "leave"]


def build_encoder(config: DataConfig, hf_path: str | Path, shape: RoboBrainShape) -> SampleEncoder:
    """Tokenizer, processor and chat template of a model, checked against its shape.

    Raises:
        ValueError: one of them is missing or belongs to another model.
    """
    tokenizer = build_tokenizer(config.tokenizer or hf_path)
    check_tokens(tokenizer, shape)
    return SampleEncoder(
        tokenizer=tokenizer,
        processor=build_processor(hf_path, shape, config.min_pixels, config.max_pixels),
        template=build_template(config.chat_template, tokenizer, config.system_prompt),
        video_fps=config.video_fps,
        max_video_frames=config.max_video_frames,
        read_seconds=config.read_seconds,
        loss_turns=config.loss_turns,
        box_text=config.box_text,
    )


def build_dataset(
    config: DataConfig,
    encoder: SampleEncoder,
    files: Sequence[str],
    ledger: Ledger,
    *,
    cache_dir: Path | None = None,
    progress: bool = False,
    refused: RefusedRows = "again",
) -> ConversationDataset:
    """Index the files and open them.

    With a `cache_dir` the index is kept there and read again while files, tokenizer, processor and limits are the same.
    Rows that were refused for their media are looked at again then, since media may have been repaired. Ranks that
    share the folder need to look at the rows only once: build on rank 0 first, then on the others.

    Args:
        files: jsonl files, `config.train` or `config.evaluation`.
        progress: show a progress bar while rows are indexed.
        refused: what happens to rows of a kept index that were refused for their media: `again` takes those in that are
            usable now; `tell` only tells of them, for a run whose checkpoint counts on the samples as they are;
            `leave` trusts the index, for ranks after one that has checked it.

    Raises:
        ValueError: a file is missing, or no row is usable.
    """
    limits = Budget(config.seq_length, config.max_patches)
    rules = IndexRules(limits, config.media_root, decode_media=config.verify == "decode")
    cached = cache_dir / f"index-{_key(encoder, files, rules)}.npz" if cache_dir is not None else None
    index = _kept(cached, files, refused)
    if index is not None and cached is not None:
        index = _checked(index, cached, config.decode_threads, encoder, rules, ledger, refused)
        log.info("%d samples (%s), index read from %s", len(index), describe(index.rejected), cached)
        return ConversationDataset(index, encoder, rules)
    index = build_index(files, encoder, rules, ledger, threads=config.decode_threads, progress=progress)
    if cached is not None:
        index.save(cached)
    _log_new(index, ledger)
    return ConversationDataset(index, encoder, rules)


def _kept(cached: Path | None, files: Sequence[str], refused: RefusedRows) -> Index | None:
    """The index on disk, if it is that of the files as they are: size and time may hide a change."""
    if cached is None or not cached.is_file():
        return None
    index = load_index(cached)
    if refused != "leave" and index.digests != tuple(map(file_digest, files)):
        log.warning("a data file has changed since %s was written; its rows are read again", cached)
        return None
    return index


def _checked(
    index: Index,
    cached: Path,
    threads: int,
    encoder: SampleEncoder,
    rules: IndexRules,
    ledger: Ledger,
    refused: RefusedRows,
) -> Index:
    """The index after another look at the rows that were refused for their media."""
    if refused == "leave" or not len(index.refused):
        return index
    if refused == "tell":
        with tempfile.TemporaryDirectory() as aside, Ledger(Path(aside) / "ledger.jsonl") as unused:
            usable = len(look_again(index, encoder, rules, unused, threads=threads)) - len(index)
        if usable:
            log.warning(
                "%d samples that were refused for their media are usable now; the run goes on without them, as its "
                "checkpoint was made without them: data.allow_changed=true takes them in",
                usable,
            )
        return index
    repaired = look_again(index, encoder, rules, ledger, threads=threads)
    if repaired is not index:
        log.info("%d samples that were refused for their media are usable now", len(repaired) - len(index))
        repaired.save(cached)
    return repaired


def _log_new(index: Index, ledger: Ledger) -> None:
    level = logging.WARNING if index.rejected else logging.INFO
    where = f", see {ledger.path}" if index.rejected else ""
    log.log(level, "%d samples, %s%s", len(index), describe(index.rejected), where)
    if index.unread:
        keys = ", ".join(f"{key} ({count} rows)" for key, count in sorted(index.unread.items())[:MOST_KEYS])
        more = f" and {len(index.unread) - MOST_KEYS} more" if len(index.unread) > MOST_KEYS else ""
        log.warning("keys of rows that mean nothing here and are not read: %s%s", keys, more)


def _key(encoder: SampleEncoder, files: Sequence[str], rules: IndexRules) -> str:
    """Stands for everything that the index depends on, but for the media files."""
    content = {
        "version": INDEX_VERSION,
        "files": [[file, os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in files if Path(file).is_file()],
        "rules": asdict(rules),
        "tokenizer": encoder.tokenizer.fingerprint,
        "processor": encoder.processor.description(),
        "template": [encoder.template.source, dict(encoder.template.variables), encoder.template.system_prompt],
        "video": [encoder.video_fps, encoder.max_video_frames],
        "turns": [encoder.loss_turns, encoder.box_text],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
