"""Operations of a training step whose weights are frozen but for adapters and a few modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rb.layout import Kind
from megatron_rb.models.adapters.plan import Adapter, adapted, factor_elements
from megatron_rb.models.stage import EMBEDDING_WEIGHT, HEAD_WEIGHT
from megatron_rb.models.work import Flops, Work
from megatron_rb.shapes.balance import matrix_weights
from megatron_rb.shapes.linears import ModelLinear, linears
from megatron_rb.shapes.shape import RoboBrainShape

PATCH_EMBED = "vision.patch_embed.weight"


@dataclass
class _Path:
    """The way of the activations through the model: what has been computed, and whether a gradient comes back here."""

    adapters: Sequence[Adapter]
    in_full: frozenset[str]
    reached: bool = False
    """Something before is trained."""
    flops: float = 0.0

    def linear(self, linear: ModelLinear, rows: float) -> None:
        trained = f"{linear.name}.weight" in self.in_full
        self.matrix(rows, linear.inputs * linear.outputs, trained)
        before = self.reached
        for adapter in self.adapters:
            first, second = factor_elements(adapter, linear)
            self.flops += 2.0 * rows * (first * (2 + before) + second * 3)
            self.reached |= first > 0
        self.reached |= trained

    def matrix(self, rows: float, weights: int, trained: bool) -> None:
        """Forward, gradient of the weights, gradient of the input."""
        self.flops += 2.0 * rows * weights * (1 + trained + self.reached)

    def attention(self, flops: float, qkv: ModelLinear, before: bool) -> None:
        """Two products forward; backward one for each of queries, keys and values that a gradient goes to, and one for
        the scores between queries and keys.

        Args:
            before: a gradient goes to the input of their projection.
        """
        q, k, v = (True,) * 3 if before or f"{qkv.name}.weight" in self.in_full else self._changed(qkv)
        self.flops += flops / 2 * (2 + q + k + v + (q or k))

    def _changed(self, qkv: ModelLinear) -> tuple[bool, bool, bool]:
        numbers = {number for adapter in self.adapters for number in adapted(adapter, qkv)}
        if len(qkv.modules) == 1:
            return (bool(numbers),) * 3
        return 0 in numbers, 1 in numbers, 2 in numbers

    def norms(self, layer: str) -> None:
        """Weights of norms are trained before what follows them."""
        self.reached |= any(name.startswith(f"{layer}.") and "norm" in name for name in self.in_full)

    def branch(self) -> _Path:
        return _Path(self.adapters, self.in_full, self.reached)


def adapted_flops(
    shape: RoboBrainShape, work: Work, adapters: Sequence[Adapter], in_full: frozenset[str] = frozenset()
) -> Flops:
    """What `training_flops` counts, for adapters.

    Args:
        in_full: names of the parameters that are trained beside them.
    """
    weights, own = matrix_weights(shape), _by_layer(shape)
    vision, mergers, features = _Path(adapters, in_full), 0.0, {}
    vision.matrix(work.patches, weights[Kind.PATCH_EMBED], PATCH_EMBED in in_full)
    vision.reached |= PATCH_EMBED in in_full
    rows = work.patches / shape.vision.merge_unit
    for index in range(shape.vision.num_layers):
        _layer(vision, f"vision.layers.{index}", own, work.patches, _vision_attention(shape, work, index))
        if index in shape.vision.deepstack_layers:
            number = sorted(shape.vision.deepstack_layers).index(index)
            features[number] = _merger(vision.branch(), f"vision.deepstack.{number}", own, rows)
            mergers += features[number].flops
    merged = _merger(vision.branch(), "vision.merger", own, rows)
    language = _Path(adapters, in_full, merged.reached or EMBEDDING_WEIGHT in in_full)
    text = shape.text
    for index in range(text.num_layers):
        attention = 2.0 * text.num_heads * text.head_dim * work.token_squares
        _layer(language, f"language.layers.{index}", own, work.tokens, attention)
        language.reached |= index in features and features[index].reached
    language.norms("language.head")
    tied = text.tied_embeddings and EMBEDDING_WEIGHT in in_full
    language.matrix(work.labels, weights[Kind.HEAD], HEAD_WEIGHT in in_full or tied)
    return Flops(vision.flops, mergers + merged.flops, language.flops)


def _by_layer(shape: RoboBrainShape) -> dict[str, dict[str, ModelLinear]]:
    """Linears by layer and by their own names."""
    found: dict[str, dict[str, ModelLinear]] = {}
    for linear in linears(shape):
        found.setdefault(linear.layer, {})[linear.name.rpartition(".")[2]] = linear
    return found


def _layer(path: _Path, name: str, own: dict[str, dict[str, ModelLinear]], rows: float, attention: float) -> None:
    path.norms(name)
    before, qkv = path.reached, own[name]["linear_qkv"]
    path.linear(qkv, rows)
    path.attention(attention, qkv, before)
    for linear in ("linear_proj", "linear_fc1", "linear_fc2"):
        path.linear(own[name][linear], rows)


def _merger(path: _Path, name: str, own: dict[str, dict[str, ModelLinear]], rows: float) -> _Path:
    path.norms(name)
    for linear in ("linear_fc1", "linear_fc2"):
        path.linear(own[name][linear], rows)
    return path


def _vision_attention(shape: RoboBrainShape, work: Work, index: int) -> float:
    vision = shape.vision
    windowed = vision.window_size > 0 and index not in vision.full_attention_layers
    return 4.0 * vision.hidden_size * (work.window_squares if windowed else work.frame_squares)
