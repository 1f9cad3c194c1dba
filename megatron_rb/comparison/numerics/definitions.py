"""What each operator of a block should have computed from its own captured inputs, in fp64, and what rounding explains.

An operator is judged by the residual: its captured output minus its definition applied to its captured inputs. The
residual of a sound operator is rounding of its own type, however far its inputs have drifted. A definition returns None
when what it needs was not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_rb.comparison.numerics.captures import Capture, Table, common_rows

ACCUMULATION = 2.0**-24
"""Round-off of fp32, in which sums are taken whatever the type of the tensors."""


@dataclass(frozen=True)
class Residual:
    """Captured minus defined output, and the deviation that rounding explains."""

    values: np.ndarray
    sigma: np.ndarray
    rows: np.ndarray
    wanted: np.ndarray | None = None
    """The defined output, where a common factor on all values (a wrong epsilon) is looked for as well."""
    roundoff: float = 0.0
    """Of the type of the output."""


@dataclass
class BlockView:
    """One block of one sample of one capture; tensors are read once."""

    capture: Capture
    sample: int
    block: str
    _read: dict[str, Table | None] = field(default_factory=dict)

    def point(self, name: str) -> Table | None:
        return self._get(f"value/{self.sample}/{self.block}/{name}")

    def grad(self, name: str) -> Table | None:
        return self._get(f"grad/{self.sample}/{self.block}/{name}")

    def angles(self, rows: str) -> tuple[Table, Table]:
        cos, sin = (self._get(f"value/{self.sample}/angles/{rows}_{name}") for name in ("cos", "sin"))
        assert cos is not None and sin is not None
        return cos, sin

    def weight(self, name: str) -> Table | None:
        return self._get(f"weight/{self.block}.{name}")

    @property
    def is_vision(self) -> bool:
        return self.block.startswith("vision.")

    @property
    def shape(self) -> Mapping[str, Any]:
        return self.capture.description["model"]["vision" if self.is_vision else "text"]

    @property
    def layer(self) -> int:
        """Its number among the blocks of its kind."""
        return int(self.block.rsplit(".", 1)[-1])

    def _get(self, name: str) -> Table | None:
        if name not in self._read:
            self._read[name] = self.capture.read(name)
        return self._read[name]


def linear(view: BlockView, source: str, target: str, module: str, sums_over_ranks: bool) -> Residual | None:
    x, y = view.point(source), view.point(target)
    weight, bias = view.weight(f"{module}.weight"), view.weight(f"{module}.bias")
    if x is None or y is None or weight is None:
        return None
    inputs = _in_rows_of(x.values, weight.values.shape[1])
    if len(inputs) != len(y.values):
        return None
    terms = inputs @ weight.values.T
    size = np.sqrt(np.square(inputs) @ np.square(weight.values.T))
    total = terms if bias is None else terms + bias.values[:, 0]
    output, u = y.values[:, weight.rows], y.roundoff
    sigma = u * np.abs(total) + ACCUMULATION * np.sqrt(inputs.shape[1]) * (size + np.abs(terms))
    if bias is not None:
        sigma += u * np.abs(terms)  # where the bias is added to the rounded product
    if sums_over_ranks and view.capture.tp_size > 1:
        sigma += u * size  # the parts of the ranks are rounded before they are summed
    return Residual(output - total, sigma, y.rows)


def _in_rows_of(values: np.ndarray, width: int) -> np.ndarray:
    """The merger joins neighbouring patches into one row."""
    return values if values.shape[1] == width else values.reshape(-1, width)


def norm(view: BlockView, source: str, target: str, module: str) -> Residual | None:
    x, y = view.point(source), view.point(target)
    weight, bias = view.weight(f"{module}.weight"), view.weight(f"{module}.bias")
    if x is None or y is None or weight is None:
        return None
    values = _in_rows_of(x.values, weight.values.shape[1])
    output = _in_rows_of(y.values, weight.values.shape[1])
    if len(values) != len(output):
        return None
    mean = values.mean(1, keepdims=True) if bias is not None else 0.0
    spread = np.square(values - mean).mean(1, keepdims=True)
    scale = weight.values / np.sqrt(spread + view.shape["norm_eps"])
    scaled = (values - mean) * scale
    total = scaled if bias is None else scaled + bias.values
    sigma = y.roundoff * (np.abs(scaled) + np.abs(total))
    sigma += ACCUMULATION * (2 * np.abs(scaled) + np.abs(scale) * np.abs(mean))
    rows = y.rows if len(y.rows) == len(output) else np.arange(len(output))
    return Residual(output - total, sigma, rows, total, y.roundoff)


def rotary(view: BlockView) -> Residual | None:
    qkv = view.point("qkv")
    outputs = [view.point(name) for name in "qkv"]
    if qkv is None or any(table is None for table in outputs):
        return None
    parts = [_rotated(view, part, name) for part, name in zip(_split_heads(view, qkv), "qkv", strict=True)]
    residuals, sigmas = [], []
    for (wanted, size), table in zip(parts, outputs, strict=True):
        assert table is not None
        kept = table.at(qkv.rows).values
        residuals.append(kept - wanted.reshape(kept.shape))
        sigmas.append(table.roundoff * size.reshape(kept.shape))
    return Residual(np.concatenate(residuals, axis=1), np.concatenate(sigmas, axis=1), qkv.rows)


def _split_heads(view: BlockView, qkv: Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v as `[rows, heads, head_dim]` from the packed projection."""
    shape, rows = view.shape, len(qkv.rows)
    if view.is_vision:
        packed = qkv.values.reshape(rows, shape["num_heads"], 3, -1)
        return packed[:, :, 0], packed[:, :, 1], packed[:, :, 2]
    groups, dim = shape["num_query_groups"], shape["head_dim"]
    packed = qkv.values.reshape(rows, groups, -1, dim)
    return packed[:, :, :-2].reshape(rows, -1, dim), packed[:, :, -2], packed[:, :, -1]


def _rotated(view: BlockView, x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The wanted values, and the sum of sizes that rounding acts on."""
    if name == "v":
        return x, np.abs(x)
    steps = 2.0
    if not view.is_vision and view.shape["qk_norm"]:
        weight = view.weight(f"attention.{name}_layernorm.weight")
        assert weight is not None
        scale = np.sqrt(np.square(x).mean(-1, keepdims=True) + view.shape["norm_eps"])
        x, steps = x / scale * weight.values[0], 4.0
    cos, sin = (table.values[:, None] for table in view.angles("patch" if view.is_vision else "token"))
    first, second = np.split(x, 2, axis=-1)
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    one, other = np.abs(first * cos) + np.abs(second * sin), np.abs(second * cos) + np.abs(first * sin)
    return turned, steps * np.concatenate([one, other], axis=-1)


def attention(view: BlockView) -> Residual | None:
    q, k, v, out = (view.point(name) for name in ("q", "k", "v", "attention"))
    if q is None or k is None or v is None or out is None:
        return None
    allowed = _attended(view, q.rows, k.rows)
    if allowed is None:
        return None
    dim = view.shape["head_dim"] if not view.is_vision else view.shape["hidden_size"] // view.shape["num_heads"]
    heads, groups = q.values.shape[1] // dim, k.values.shape[1] // dim
    queries = q.values.reshape(-1, groups, heads // groups, dim).transpose(1, 2, 0, 3)  # [groups, heads, queries, dim]
    keys, values = (table.values.reshape(-1, groups, 1, dim).transpose(1, 2, 0, 3) for table in (k, v))
    scores = queries @ keys.swapaxes(-1, -2) / np.sqrt(dim)
    sharp = np.abs(np.where(allowed, scores, 0.0)).max(-1, keepdims=True)
    scores = np.where(allowed, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    wanted, size = weights @ values, weights @ np.abs(values)
    sigma = (out.roundoff * 2 + ACCUMULATION * (8 + 4 * sharp)) * size
    wanted, sigma = (x.transpose(2, 0, 1, 3).reshape(len(q.rows), -1) for x in (wanted, sigma))
    return Residual(out.values - wanted, sigma, q.rows)


def _attended(view: BlockView, queries: np.ndarray, keys: np.ndarray) -> np.ndarray | None:
    """`[queries, keys]`: who sees whom; None when keys that a query sees were not kept."""
    if not view.is_vision:
        complete = len(keys) > queries[-1] and keys[queries[-1]] == queries[-1]
        return keys[None] <= queries[:, None] if complete else None
    shape = view.shape
    windowed = shape["window_size"] > 0 and view.layer not in shape["full_attention_layers"]
    facts = view.capture.samples[view.capture.sample_names[view.sample]]
    borders = np.array(facts["windows" if windowed else "frames"])
    if borders[-1] <= queries[-1]:
        return None
    segment = np.searchsorted(borders, queries, side="right")
    starts, stops = borders[segment - 1][:, None], borders[segment][:, None]
    seen = (keys >= starts) & (keys < stops)
    return seen if (seen.sum(1) == (stops - starts)[:, 0]).all() else None


def activation(view: BlockView) -> Residual | None:
    fc1, out = view.point("fc1"), view.point("activation")
    if fc1 is None or out is None:
        return None
    merger = view.block.startswith(("vision.merger", "vision.deepstack"))
    gated = not merger and (not view.is_vision or view.shape["gated_mlp"])
    kind = "gelu" if merger else view.shape["activation"] if view.is_vision else "silu"
    if not gated:
        wanted = _act(kind, fc1.values)
        sigma = out.roundoff * 2 * np.abs(wanted) + ACCUMULATION * 2 * np.abs(fc1.values)
        return Residual(out.values - wanted, sigma, out.rows)
    gate, up = np.split(fc1.values, 2, axis=1)
    wanted = _act(kind, gate) * up
    sigma = out.roundoff * 3 * np.abs(wanted) + ACCUMULATION * 2 * np.abs(gate * up)
    return Residual(out.values - wanted, sigma, out.rows)


def _act(kind: str, x: np.ndarray) -> np.ndarray:
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "relu":
        return np.maximum(x, 0)
    if kind == "gelu_pytorch_tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(torch.from_numpy(x / np.sqrt(2))).numpy())


def sum_of(view: BlockView, left: str, right: str, target: str) -> Residual | None:
    tables = [view.point(name) for name in (left, right, target)]
    if any(table is None for table in tables):
        return None
    a, b, out = (table for table in tables if table is not None)
    total = a.values + b.values
    return Residual(out.values - total, out.roundoff * np.abs(total), out.rows)


def received(view: BlockView) -> Residual | None:
    """The input of a block is the output of the block before it, whichever stage that was on."""
    before = _block_before(view)
    here = view.point("input")
    there = view.capture.read(f"value/{view.sample}/{before}/output") if before else None
    if here is None or there is None:
        return None
    rows = common_rows([here, there])
    if not len(rows):
        return None
    here, wanted = here.at(rows), there.at(rows).values
    return Residual(here.values - wanted, here.roundoff * np.abs(wanted), rows)


def _block_before(view: BlockView) -> str:
    """Empty where the stream is changed in between (DeepStack)."""
    model = view.capture.description["model"]
    vision, text = model["vision"], model["text"]
    if view.block == "vision.merger":
        return f"vision.layers.{vision['num_layers'] - 1}"
    if view.block.startswith("vision.deepstack."):
        return f"vision.layers.{sorted(vision['deepstack_layers'])[view.layer]}"
    layer = text["num_layers"] if view.block == "language.head" else view.layer
    if layer == 0:
        return "vision.patch_embed" if view.is_vision else "language.embedding"
    added = not view.is_vision and layer <= len(vision["deepstack_layers"])
    part = "vision" if view.is_vision else "language"
    return "" if added else f"{part}.layers.{layer - 1}"
