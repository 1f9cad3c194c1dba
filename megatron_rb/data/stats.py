"""How large the samples of a data set are, from its index: no pixel is read."""

from __future__ import annotations

import numpy as np

from megatron_rb.data.dataset import ConversationDataset
from megatron_rb.data.index import describe
from megatron_rb.planner.histogram import Histogram, histogram_of


def sample_histogram(dataset: ConversationDataset) -> Histogram:
    """Text tokens, patches and patches of a frame of every usable sample, counted."""
    tokens, patches = dataset.sizes.T
    seen = np.zeros(len(dataset))
    for row in range(len(dataset)):
        infos = dataset.index.media_infos(row)
        refs = dataset.conversation(row).media if infos else ()
        grids = [dataset.encoder.grid(ref, info) for ref, info in zip(refs, infos, strict=True)]
        seen[row] = sum(grid.patches * grid.h * grid.w for grid in grids)
    frame_patches = seen / np.maximum(patches, 1)
    unit = dataset.encoder.processor.merge_size**2
    source = f"{len(dataset)} samples of {', '.join(dataset.index.files)}; {describe(dataset.index.rejected)}"
    return histogram_of(tokens - patches // unit, patches, frame_patches, source)
