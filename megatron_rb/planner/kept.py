"""What the parts of a model keep for their backward pass, and what is in use while they are computed.

Counted from the layers of this stack and the operators that a platform has; tests/unit/planner holds it against what
autograd keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rb.config.schema import KernelsConfig
from megatron_rb.planner.sizes import ModelSizes, TextSizes, VisionSizes, padded_ffn
from megatron_rb.planner.trained import Frozen, PartFactors
from megatron_rb.planner.work import MERGER_PARTS, PARTS, Part, Shards, gathered_values
from megatron_rb.planner.workload import MicroBatchLimits

LOGITS_BYTES = 512 * 2**20
"""Largest fp32 logits that the loss holds at a time (as in kernels/linear_cross_entropy)."""


@dataclass(frozen=True)
class Operators:
    """Which operators are fused ones, which keep less for the backward pass than torch's own."""

    norm: bool
    """Keeps its input alone, which the residual keeps anyway; torch's keeps it in fp32, and the result."""
    windows: bool
    """Windowed attention keeps the packed projection; torch's keeps rotated queries and keys beside it."""
    heads: bool
    """QK-norm and rotation keep what they are given; torch's keep it in fp32, as it came and normed."""
    packed: bool
    """Attention over packed sequences is one call; torch's has one for every length, and keeps the results of all
    beside the whole."""


TORCH, FUSED = Operators(False, False, False, False), Operators(True, True, True, True)


def operators_of(kernels: KernelsConfig, platform: str) -> Operators:
    """The operators that a run takes on devices of a platform."""
    on_cuda = platform == "cuda"
    return Operators(
        norm=kernels.rms_norm == "liger" or on_cuda and kernels.rms_norm == "auto",
        windows=kernels.window_attention == "triton" or on_cuda and kernels.window_attention == "auto",
        heads=kernels.mrope == "triton" or on_cuda and kernels.mrope == "auto",
        packed=kernels.varlen_attention not in ("auto", "torch") or on_cuda and kernels.varlen_attention == "auto",
    )


def kept_bytes(model: ModelSizes, shards: Shards, largest: MicroBatchLimits, operators: Operators) -> dict[Part, float]:
    vision, text, item, tp = model.vision, model.text, shards.itemsize, shards.tp_size
    rows = largest.patches / vision.merge_unit
    # The first linear keeps its rows of this rank, the activation its input and the second linear that one's result.
    values = largest.patches * vision.hidden_size
    joined = values * ((2 / tp + 1 / shards.rows_over) * item + _norm(vision, item, operators) / shards.rows_over)
    # The loss computes its gradients at once: of its rows, and of its weight in fp32.
    head = largest.tokens * text.hidden_size * (item + _rms_norm(item, operators))
    weight = 4 * text.vocab_size / tp * text.hidden_size
    return {
        Part.PATCH_EMBED: largest.patches * float(vision.patch_dim * item),
        Part.WINDOW_LAYER: _vision_layer(vision, shards, largest.patches, operators, vision.window_size > 0),
        Part.FULL_LAYER: _vision_layer(vision, shards, largest.patches, operators, False),
        Part.DEEPSTACK: joined,
        Part.MERGER: joined,
        Part.EMBEDDING: largest.tokens * 16.0 + rows * text.hidden_size * item,
        Part.DECODER: _decoder(text, shards, largest.tokens, operators),
        Part.HEAD: head + weight,
    }


def _rms_norm(itemsize: int, operators: Operators) -> int:
    """Bytes kept by an RMSNorm for one value of its input."""
    return itemsize if operators.norm else 4 + itemsize


def _norm(vision: VisionSizes, itemsize: int, operators: Operators) -> int:
    return _rms_norm(itemsize, operators) if vision.norm == "rmsnorm" else itemsize


def _vision_layer(vision: VisionSizes, shards: Shards, patches: int, operators: Operators, windowed: bool) -> float:
    item, tp, h = shards.itemsize, shards.tp_size, vision.hidden_size
    ffn = padded_ffn(vision.ffn_hidden_size, tp)
    rows = patches / shards.rows_over
    # Two norms and the inputs of the two linears behind them.
    spread = rows * h * 2 * (_norm(vision, item, operators) + item)
    # qkv in one piece and the result; without a fused operator rotated q and k, and the log of the sums.
    fused = windowed and operators.windows
    attention = patches * ((4 if fused else 6) * h / tp * item + (0 if fused else 4 * vision.num_heads / tp))
    if not (fused or operators.packed):
        attention += patches * h / tp * item
    return spread + attention + patches * ffn * item * (3 if vision.gated_mlp else 2)


def _decoder(text: TextSizes, shards: Shards, tokens: int, operators: Operators) -> float:
    item, tp, h = shards.itemsize, shards.tp_size, text.hidden_size
    rows = tokens / shards.rows_over
    spread = rows * h * 2 * (_rms_norm(item, operators) + item)
    # qkv in one piece, of which v is read, rotated q and k, the result; with QK-norm q as it came, in one piece where
    # several groups were packed. With context parallelism rotated q and the result; keys and values are read where they
    # were gathered.
    values = 2 * text.num_heads if shards.cp_size > 1 else 3 * (text.num_heads + text.num_query_groups)
    attention = values * text.head_dim / tp * item
    if not operators.packed:
        attention += text.num_heads * text.head_dim / tp * item
    normed = _qk_norm(text, shards, operators) * text.head_dim / tp if text.qk_norm else 0.0
    mlp = 3 * padded_ffn(text.ffn_hidden_size, tp) * item
    gathered = _whole_keys(text, shards, tokens)
    return spread + tokens * (attention + normed + mlp + 4 * text.num_heads / tp) + gathered


def _qk_norm(text: TextSizes, shards: Shards, operators: Operators) -> int:
    """Bytes of a value of all heads that QK-norm keeps beside what attention keeps."""
    if not operators.heads:
        # Normed in fp32, and as it came in fp32 unless it came so.
        return (4 if shards.itemsize == 4 else 8) * (text.num_heads + text.num_query_groups)
    copied = text.num_heads * (text.num_query_groups > shards.tp_size)
    # Keys are a part of the projection, which with context parallelism nobody else keeps.
    return shards.itemsize * (copied + (text.num_heads + 2 * text.num_query_groups) * (shards.cp_size > 1))


def _whole_keys(text: TextSizes, shards: Shards, tokens: float) -> float:
    """Keys and values that the tokens of a context-parallel rank attend to: those of all tokens at most, and for the
    earlier one of its two chunks once more those before it."""
    return gathered_values(text, shards) * tokens * (shards.cp_size + 0.5) * shards.itemsize


def changed_by_freezing(
    model: ModelSizes, shards: Shards, largest: MicroBatchLimits, part: Part, frozen: Frozen
) -> float:
    """Bytes that a part keeps more, or less, because its own weights are frozen and factors lie beside some of them.

    A frozen linear keeps no input, but where it is adapted the first factor does; between the factors lie a few
    columns. The loss has no gradient of a frozen head.
    """
    factors = frozen.factors(part)
    if part is Part.HEAD and not frozen.trains(part):
        return -4.0 * model.text.vocab_size / shards.tp_size * model.text.hidden_size
    if factors is None or frozen.trains(part):
        return 0.0 if factors is None else _between(model, shards, largest, part, factors)
    item, tp, over = shards.itemsize, shards.tp_size, shards.rows_over
    if part is Part.DECODER:
        rows, h, ffn = largest.tokens, model.text.hidden_size, padded_ffn(model.text.ffn_hidden_size, tp)
    else:
        rows, h, ffn = largest.patches, model.vision.hidden_size, padded_ffn(model.vision.ffn_hidden_size, tp)
    inputs = {"linear_qkv": rows * h / over, "linear_fc1": rows * h / over, "linear_fc2": float(rows * ffn)}
    if part in MERGER_PARTS:
        inputs = {"linear_fc1": rows * h / over, "linear_fc2": rows * h / tp}
    gone = sum(values * (1 - factors.linears.get(name, 0.0)) for name, values in inputs.items())
    return _between(model, shards, largest, part, factors) - gone * item


def _between(model: ModelSizes, shards: Shards, largest: MicroBatchLimits, part: Part, factors: PartFactors) -> float:
    """Bytes of the columns between the factors."""
    rows = largest.tokens if part is Part.DECODER else largest.patches
    rows = rows // model.vision.merge_unit if part in MERGER_PARTS else rows
    return rows * factors.columns * shards.itemsize


def working_bytes(model: ModelSizes, shards: Shards, largest: MicroBatchLimits, kept: dict[Part, float]) -> list[float]:
    vision, text, tp, item = model.vision, model.text, shards.tp_size, shards.itemsize
    # The gradients of a layer's widest tensors live beside what it has kept.
    wide = {
        # Where positions are learned: four corners of every patch, and in fp32 what they weigh and their sum.
        Part.PATCH_EMBED: kept[Part.PATCH_EMBED]
        + (vision.position_grid_side > 0) * largest.patches * vision.hidden_size * (4.0 * item + 5 * 4),
        # The gradient of the whole table.
        Part.EMBEDDING: kept[Part.EMBEDDING] + 1.0 * text.vocab_size / tp * text.hidden_size * item,
        Part.WINDOW_LAYER: 3.0 * largest.patches * padded_ffn(vision.ffn_hidden_size, tp) * item,
        Part.DECODER: max(
            3.0 * largest.tokens * padded_ffn(text.ffn_hidden_size, tp) * item,
            # Their gradients, once as attention gives them and once as they are sent.
            2.0 * _whole_keys(text, shards, largest.tokens),
        ),
        # Logits of a chunk of rows and their gradient; later the weight's gradient once more in the model's dtype.
        Part.HEAD: max(
            min(largest.tokens * text.vocab_size / tp * 4, LOGITS_BYTES) * (1 + item / 2),
            text.vocab_size / tp * text.hidden_size * item,
        ),
    }
    wide[Part.FULL_LAYER] = wide[Part.WINDOW_LAYER]
    return [wide.get(part, kept[part]) for part in PARTS]
