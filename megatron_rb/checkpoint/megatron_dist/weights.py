"""The weights of a foreign `torch_dist` checkpoint under this stack's names, as pieces of its files."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from megatron_rb.checkpoint.hf.non_parameters import ASKED_FOR, check_patterns, is_allowed, non_parameter
from megatron_rb.checkpoint.hf.quantised import PLAIN
from megatron_rb.checkpoint.hf.table import EMBEDDING, HEAD, WeightRule, stored_rules
from megatron_rb.checkpoint.hf.tied import check_tied
from megatron_rb.checkpoint.legacy.arguments import disagreements
from megatron_rb.checkpoint.megatron_dist.folders import MegatronDist
from megatron_rb.checkpoint.megatron_dist.names import GATE, UP, hf_vision_name, is_adapter, native_name, stacked
from megatron_rb.checkpoint.storage.mosaic import cropped, joined
from megatron_rb.checkpoint.storage.tensors import FilePool, StoredChunk, StoredTensor, row_blocks
from megatron_rb.shapes.shape import RoboBrainShape


@dataclass
class FoundWeights:
    """What a checkpoint holds of a model."""

    native: dict[str, StoredTensor] = field(default_factory=dict)
    """Parameters of megatron-core's layers by native name, whole, unpadded."""
    hf: dict[str, StoredTensor] = field(default_factory=dict)
    """Parameters of a transformers ViT by canonical Hugging Face name."""
    keys: set[str] = field(default_factory=set)
    """Keys of the checkpoint that these are made of."""
    dropped: dict[str, str] = field(default_factory=dict)

    def sources(self, native: str, rule: WeightRule) -> list[StoredTensor] | None:
        """What a parameter is made of; None when it is not there."""
        if native in self.native:
            return [self.native[native]]
        found = [self.hf[name] for name in rule.hf_names if name in self.hf]
        return found if len(found) == len(rule.hf_names) else None


def find_weights(
    dist: MegatronDist, shape: RoboBrainShape, pool: FilePool, allow_drop: Collection[str] = ()
) -> FoundWeights:
    """Give every tensor of a checkpoint its place in the model.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or quantised, or the arguments are of another model.
    """
    _check_arguments(dist, shape)
    rules, found = stored_rules(shape), FoundWeights()
    wanted = {name: s for rule in rules.values() for name, s in zip(rule.hf_names, rule.hf_shapes, strict=True)}
    unknown = []
    for key, tensor in _single_layers(dist, shape):
        native, hf = native_name(key), hf_vision_name(key) or ""
        if native is not None and (native in rules or native == HEAD):
            _add(found.native, native, tensor, dist)
        elif hf in wanted:
            _add(found.hf, hf, tensor, dist)
        else:
            unknown.append(tensor.name)
            continue
        found.keys |= {tensor.name} if tensor.name in dist.stored.tensors else {tensor.name + GATE, tensor.name + UP}
    _sort_out(dist, found, sorted(set(unknown)), allow_drop)
    _fit(dist, found, rules, wanted, pool)
    missing = [name for name, rule in rules.items() if found.sources(name, rule) is None]
    if missing:
        raise ValueError(
            f"{dist.folder} lacks {len(missing)} parameters of the model of config.json: {', '.join(missing[:3])}"
            f"{' ...' if len(missing) > 3 else ''}; give the config.json of the model that was trained"
        )
    return found


def _check_arguments(dist: MegatronDist, shape: RoboBrainShape) -> None:
    wrong = disagreements(dist.args, shape)
    if wrong:
        raise ValueError(
            f"{dist.folder} was trained with {', '.join(wrong)}; give the config.json of the model that was trained"
        )
    if dist.norms_are_centered:
        raise ValueError(
            f"{dist.folder} stores norm weights as gamma - 1 (apply_layernorm_1p), which is not read from torch_dist; "
            "save it without, or in Megatron's legacy format (--ckpt-format torch)"
        )


def _single_layers(dist: MegatronDist, shape: RoboBrainShape) -> Iterator[tuple[str, StoredTensor]]:
    """`(key with the number of its layer, tensor)`; a tensor of all layers is cut, gate and up are put together.

    The tensors keep the names of the checkpoint.
    """
    tensors = dict(dist.stored.tensors)
    for key, tensor in dist.stored.tensors.items():
        other = key.removesuffix(GATE) + UP
        if key.endswith((f".linear_fc1.weight{GATE}", f".linear_fc1.bias{GATE}")) and other in tensors:
            del tensors[key]
            name = key.removesuffix(GATE)
            tensors[name] = _gate_and_up(name, tensor, tensors.pop(other))
    for key, tensor in tensors.items():
        place = stacked(key)
        if place is None or non_parameter(key):
            yield key, tensor
            continue
        for layer in range(tensor.shape[0]):
            start, sizes = (layer, *[0] * (len(tensor.shape) - 1)), (1, *tensor.shape[1:])
            yield f"{place[0]}.{layer}.{place[1]}", _without_first_dimension(cropped(tensor, start, sizes))


def _gate_and_up(name: str, gate: StoredTensor, up: StoredTensor) -> StoredTensor:
    rows = gate.shape[0]
    zeros = (0,) * (len(gate.shape) - 1)
    return joined(name, (rows + up.shape[0], *gate.shape[1:]), [(gate, (0, *zeros)), (up, (rows, *zeros))])


def _without_first_dimension(tensor: StoredTensor) -> StoredTensor:
    chunks = tuple(StoredChunk(c.offsets[1:], c.sizes[1:], c.path, c.position) for c in tensor.chunks)
    return StoredTensor(tensor.name, tensor.dtype, tensor.shape[1:], chunks)


def _add(found: dict[str, StoredTensor], name: str, tensor: StoredTensor, dist: MegatronDist) -> None:
    if name in found:
        raise ValueError(f"{dist.folder} holds {name} twice: as {found[name].name} and as {tensor.name}")
    if tensor.dtype not in PLAIN:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"{dist.folder} holds {tensor.name} as {dtype}; fp8 and integer parameters are not read, save the "
            "checkpoint with bf16 parameters"
        )
    found[name] = tensor


def _sort_out(dist: MegatronDist, found: FoundWeights, unknown: list[str], allow_drop: Collection[str]) -> None:
    """Record what is left out, and refuse what may not be."""
    check_patterns(allow_drop, unknown, found.keys, dist.folder)
    for key in (*unknown, *dist.stored.objects):
        reason = non_parameter(key) or (ASKED_FOR if is_allowed(key, allow_drop) else None)
        if reason is None and key in dist.stored.objects:
            reason = "an object beside the tensors: random states and the like, no weight"
        if reason is None:
            raise ValueError(_unknown(dist, key, found))
        found.dropped[key] = reason
    for key in dist.optimizer:
        found.dropped[key] = "optimizer state; of torch_dist checkpoints the weights alone are read"


def _unknown(dist: MegatronDist, key: str, found: FoundWeights) -> str:
    if is_adapter(key):
        return (
            f"{dist.folder} holds a LoRA adapter ({key}); merge it into its base model with the stack that trained it, "
            "and convert the result"
        )
    near = difflib.get_close_matches(key, found.keys, 1)
    hint = f"the nearest known one is {near[0]}" if near else "no known one is near"
    return (
        f"{dist.folder} holds {key}, which the model of config.json does not have ({hint}); give the config.json of "
        "the model that was trained, or leave it out with --allow-drop, by name or by a pattern"
    )


def _fit(
    dist: MegatronDist,
    found: FoundWeights,
    rules: Mapping[str, WeightRule],
    wanted: Mapping[str, tuple[int, ...]],
    pool: FilePool,
) -> None:
    """Take padding away and compare shapes; a stored head of tied embeddings must be the embedding."""
    for name, tensor in found.hf.items():
        if tensor.shape != wanted[name]:
            raise ValueError(_other_shape(dist, tensor, wanted[name]))
    for name, tensor in found.native.items():
        rule = rules[EMBEDDING if name not in rules else name]
        found.native[name] = _unpadded(dist, found, tensor, name, rule, pool)
    if HEAD not in rules and HEAD in found.native:
        head = found.native.pop(HEAD)
        check_tied(dist.folder, found.native[EMBEDDING], head, pool)
        found.dropped[head.name] = "a copy of the tied embedding"


def _other_shape(dist: MegatronDist, tensor: StoredTensor, wanted: tuple[int, ...]) -> str:
    return (
        f"{tensor.name} has the shape {list(tensor.shape)} in {dist.folder}; config.json says {list(wanted)}: give the "
        "config.json of the model that was trained"
    )


def _unpadded(
    dist: MegatronDist, found: FoundWeights, tensor: StoredTensor, name: str, rule: WeightRule, pool: FilePool
) -> StoredTensor:
    """A parameter in the size of config.json: padding of the vocabulary, and zeros of an MLP, are left out."""
    wanted = rule.hf_shapes[0] if tensor.shape == rule.hf_shapes[0] else rule.shape
    if tensor.shape == wanted:
        return tensor
    is_vocabulary = name in (EMBEDDING, HEAD)
    dim = 1 if name.endswith("linear_fc2.weight") else 0
    others = [(a, b) for axis, (a, b) in enumerate(zip(tensor.shape, wanted, strict=False)) if axis != dim]
    is_padded = len(tensor.shape) == len(wanted) and all(a == b for a, b in others) and tensor.shape[dim] > wanted[dim]
    if not is_padded or not (is_vocabulary or ".mlp.linear_fc" in name) or tensor.shape[dim] % rule.parts:
        raise ValueError(_other_shape(dist, tensor, wanted))
    size, kept = tensor.shape[dim] // rule.parts, wanted[dim] // rule.parts
    pieces = [_slab(tensor, dim, part * size, kept) for part in range(rule.parts)]
    padding = [_slab(tensor, dim, part * size + kept, size - kept) for part in range(rule.parts)]
    if not is_vocabulary and any(_is_nonzero(pool, part) for part in padding):
        raise ValueError(f"{_other_shape(dist, tensor, wanted)} (what is beyond is no padding, it is not zero)")
    what = "columns" if dim else "rows"
    found.dropped[f"{name} ({tensor.name})"] = f"{tensor.shape[dim] - wanted[dim]} {what} of padding"
    places = [
        (piece, tuple(part * kept * (axis == dim) for axis in range(len(wanted)))) for part, piece in enumerate(pieces)
    ]
    return joined(tensor.name, wanted, places)


def _slab(tensor: StoredTensor, dim: int, start: int, count: int) -> StoredTensor:
    starts = tuple(start if axis == dim else 0 for axis in range(len(tensor.shape)))
    return cropped(tensor, starts, tuple(count if a == dim else n for a, n in enumerate(tensor.shape)))


def _is_nonzero(pool: FilePool, tensor: StoredTensor) -> bool:
    for start, count in row_blocks(tensor.num_rows, tensor.row_bytes):
        block = bytearray(count * tensor.row_bytes)
        pool.read_rows(tensor, start, count, memoryview(block))
        if any(block):
            return True
    return False
