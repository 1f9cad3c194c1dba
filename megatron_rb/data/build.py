"""Data set of a run from its configuration."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_rb.config.schema import DataConfig
from megatron_rb.data.dataset import ConversationDataset
from megatron_rb.data.encoder import SampleEncoder
from megatron_rb.data.index import Index, IndexRules, build_index, describe, load_index
from megatron_rb.data.ledger import Ledger
from megatron_rb.data.packing import Budget
from megatron_rb.data.processor import build_processor
from megatron_rb.data.prompt import build_template
from megatron_rb.data.tokenizer import build_tokenizer, check_tokens
from megatron_rb.models.robobrain.config import RoboBrainShape

log = logging.getLogger(__name__)

INDEX_VERSION = 2
"""Raised when the same rows would be indexed in another way."""


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
    )


def build_dataset(
    config: DataConfig,
    encoder: SampleEncoder,
    files: Sequence[str],
    ledger: Ledger,
    *,
    cache_dir: Path | None = None,
    progress: bool = False,
) -> ConversationDataset:
    """Index the files and open them.

    With a `cache_dir` the index is kept there and read again while files, tokenizer, processor and limits are the same.
    Ranks that share the folder then need to look at the rows only once: build on rank 0 first, then on the others.

    Args:
        files: jsonl files, `config.train` or `config.evaluation`.
        progress: show a progress bar while rows are indexed.

    Raises:
        ValueError: a file is missing, or no row is usable.
    """
    limits = Budget(config.seq_length, config.max_patches)
    rules = IndexRules(limits, config.media_root, decode_media=config.verify == "decode")
    return ConversationDataset(_index(config, encoder, files, ledger, rules, cache_dir, progress), encoder, rules)


def _index(
    config: DataConfig,
    encoder: SampleEncoder,
    files: Sequence[str],
    ledger: Ledger,
    rules: IndexRules,
    cache_dir: Path | None,
    progress: bool,
) -> Index:
    cached = cache_dir / f"index-{_key(encoder, files, rules)}.npz" if cache_dir is not None else None
    if cached is not None and cached.is_file():
        index = load_index(cached)
        log.info("%d samples (%s), index read from %s", len(index), describe(index.rejected), cached)
        return index
    index = build_index(files, encoder, rules, ledger, threads=config.decode_threads, progress=progress)
    if cached is not None:
        index.save(cached)
    log.log(
        logging.WARNING if index.rejected else logging.INFO,
        "%d samples, %s%s", len(index), describe(index.rejected), f", see {ledger.path}" if index.rejected else "",
    )  # fmt: skip
    return index


def _key(encoder: SampleEncoder, files: Sequence[str], rules: IndexRules) -> str:
    """Stands for everything that the index depends on, but for the media files."""
    content = {
        "version": INDEX_VERSION,
        "files": [[file, os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in files if Path(file).is_file()],
        "rules": asdict(rules),
        "tokenizer": encoder.tokenizer.fingerprint,
        "processor": asdict(encoder.processor),
        "template": [encoder.template.source, dict(encoder.template.variables), encoder.template.system_prompt],
        "video": [encoder.video_fps, encoder.max_video_frames],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
