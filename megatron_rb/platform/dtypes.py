"""The types a model may be computed in, by the names of `model.dtype`."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
