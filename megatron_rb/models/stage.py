"""`RoboBrainStage`: the model chunk of one pipeline rank and virtual chunk, built from its slice of the layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch.utils.checkpoint import checkpoint

from megatron_rb.kernels.dynamic_padding.op import add_rows
from megatron_rb.layout import Kind, PipelineLayout
from megatron_rb.models.flow import Flow, boundary_before, pack, unpack
from megatron_rb.models.inputs import MicroBatch, TextInputs
from megatron_rb.models.language.blocks import DecoderLayer, Embedding, Head, HeadOutput
from megatron_rb.models.language.cache import DecoderCache
from megatron_rb.models.layers import BuildContext
from megatron_rb.models.vision.blocks import Merger, PatchEmbed, VisionLayer
from megatron_rb.parallel import context
from megatron_rb.parallel.random_states import replayed
from megatron_rb.parallel.sharding import Sharded, shard_of, sharded_tensor
from megatron_rb.shapes.shape import RoboBrainShape

EMBEDDING_WEIGHT, HEAD_WEIGHT = "language.embedding.tokens.weight", "language.head.output.weight"


@dataclass(frozen=True)
class Recompute:
    """Layers of a slice, counted from its first, whose activations are recomputed in the backward pass; -1 = all."""

    vision: int = 0
    language: int = 0
    vision_per_slice: tuple[int, ...] = ()
    """For every slice of the layout; empty = `vision` in all of them."""
    language_per_slice: tuple[int, ...] = ()

    def of_slice(self, index: int) -> Recompute:
        """What one slice does."""
        return Recompute(
            self.vision_per_slice[index] if self.vision_per_slice else self.vision,
            self.language_per_slice[index] if self.language_per_slice else self.language,
        )


class VisionPart(torch.nn.Module):
    """The vision blocks of a slice, under their global layer numbers."""

    def __init__(self, ctx: BuildContext, shape: RoboBrainShape, part) -> None:
        super().__init__()
        vision = shape.vision
        self.patch_embed = PatchEmbed(ctx, vision) if part.has(Kind.PATCH_EMBED) else None
        layers = part.layers(Kind.VISION)
        self.layers = torch.nn.ModuleDict({str(i): VisionLayer(ctx, vision, i) for i in layers})
        self.deepstack_of = {
            layer: number for number, layer in enumerate(sorted(vision.deepstack_layers)) if layer in layers
        }
        self.deepstack = torch.nn.ModuleDict(
            {str(number): Merger(ctx, vision, norm_after_merge=True) for number in self.deepstack_of.values()}
        )
        self.merger = Merger(ctx, vision, norm_after_merge=False) if part.has(Kind.MERGER) else None


class LanguagePart(torch.nn.Module):
    """The language blocks of a slice, under their global layer numbers."""

    def __init__(self, ctx: BuildContext, shape: RoboBrainShape, part) -> None:
        super().__init__()
        text = shape.text
        embedding = Embedding(ctx, text) if part.has(Kind.EMBEDDING) else None
        tied_weight = embedding.tokens.weight if embedding is not None and text.tied_embeddings else None
        self.embedding = embedding
        self.layers = torch.nn.ModuleDict({str(i): DecoderLayer(ctx, text) for i in part.layers(Kind.DECODER)})
        self.head = Head(ctx, text, tied_weight) if part.has(Kind.HEAD) else None


class RoboBrainStage(MegatronModule):
    """One contiguous slice of a RoboBrain model; its forward reads as if the blocks before it were local."""

    def __init__(
        self, ctx: BuildContext, shape: RoboBrainShape, layout: PipelineLayout, slice_index: int, recompute: Recompute
    ) -> None:
        super().__init__(config=ctx.config)
        part = layout.slice(slice_index)
        self.part = part
        self.shape = shape
        self.recompute = recompute.of_slice(slice_index)
        self.vp_stage = slice_index // layout.pp_size
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = part.is_first, part.is_last
        self.share_embeddings_and_output_weights = False  # tied weights are kept equal by TiedEmbedding
        self.rows_split_over = ctx.tp_size if ctx.sequence_parallel else 1
        self.boundary = boundary_before(part, shape, layout.num_vision_layers, layout.num_decoder_layers)
        self.mesh = ctx.mesh
        self.vision = VisionPart(ctx, shape, part)
        self.language = LanguagePart(ctx, shape, part)
        self.rows = ctx.kernels.dynamic_padding
        self.received: torch.Tensor | None = None
        self.stores_frozen = True
        """False where the weights that are not trained are those of a folder, and adapters alone are stored."""

    def set_input_tensor(self, input_tensor) -> None:
        """Called by the schedule with what the stage before sent (None on the first stage)."""
        self.received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def sharded_state_dict(self, dp_rank: int | None = None) -> dict[str, Sharded]:
        """Parameters by the name they are stored under, as megatron-core's distributed checkpoints take them."""
        tp_rank, tp_size = self.mesh.tp_rank, self.mesh.tp_size
        state = {}
        for name, parameter in self.named_parameters():
            if not (parameter.requires_grad or self.stores_frozen):
                continue
            tied_copy = self.shape.text.tied_embeddings and name == HEAD_WEIGHT
            state[name] = sharded_tensor(
                EMBEDDING_WEIGHT if tied_copy else name,
                parameter,
                shard_of(parameter),
                tp_rank,
                tp_size,
                self.mesh.dp_cp_rank if dp_rank is None else dp_rank,
                copy=int(tied_copy),
            )
        return state

    def forward(
        self, batch: MicroBatch, wanted: HeadOutput = HeadOutput.LOSS, cache: DecoderCache | None = None
    ) -> torch.Tensor:
        """
        Args:
            wanted: what the last slice returns.
            cache: keeps the keys and values of the batch, whose samples are prompts.

        Returns:
            On the last slice what is wanted of the head. On every other slice the packed flow for the next one.
        """
        flow = self._run_vision(self._receive(batch), batch)
        flow = self._run_language(flow, batch, cache)
        if self.language.head is None:
            return pack(flow)
        return self.language.head(flow.stream, batch.text, wanted)

    def decode(self, text: TextInputs, cache: DecoderCache) -> torch.Tensor:
        """One further token of every sequence of a cache; the vision blocks have seen all there is and do nothing.

        Returns:
            As `forward`, on the last slice the logits of every sequence; a slice of vision blocks alone sends one
            number, since the schedule sends something.
        """
        if self.language.embedding is not None:
            stream = self.language.embedding(text, None)
        elif self.part.has(Kind.DECODER) or self.language.head is not None:
            assert self.received is not None, "a stage after the first ran before it received its input"
            stream = self.received.view(text.num_tokens // self.rows_split_over, 1, -1)
        else:
            return torch.zeros(1, 1, 1, dtype=self.config.params_dtype, device=text.input_ids.device)
        for name, layer in self.language.layers.items():
            stream = layer(stream, text, cache.layer(int(name)))
        if self.language.head is None:
            return pack(Flow(stream, {}))
        return self.language.head(stream, text, HeadOutput.LABEL_LOGITS)

    def _receive(self, batch: MicroBatch) -> Flow:
        if self.vision.patch_embed is not None:
            return Flow(self.vision.patch_embed(batch.vision), {})
        assert self.received is not None, "a stage after the first ran before it received its input"
        return unpack(self.received, self.boundary, batch, self.shape, self.rows_split_over)

    def _run_vision(self, flow: Flow, batch: MicroBatch) -> Flow:
        stream, deepstack = flow.stream, dict(flow.deepstack)
        # What is computed again keeps its inputs, and no layer reads the pixels.
        inputs = replace(batch.vision, pixels=None)
        for place, (name, layer) in enumerate(self.vision.layers.items()):
            stream = _maybe_recompute(layer, place, self.recompute.vision, stream, inputs)
            number = self.vision.deepstack_of.get(int(name))
            if number is not None:
                deepstack[number] = self.vision.deepstack[str(number)](stream)
        if self.vision.merger is not None:
            stream = self.vision.merger(stream)
        return Flow(stream, deepstack)

    def _run_language(self, flow: Flow, batch: MicroBatch, cache: DecoderCache | None) -> Flow:
        stream, deepstack = flow.stream, dict(flow.deepstack)
        if self.language.embedding is not None:
            stream = self.language.embedding(batch.text, stream)
        for place, (name, layer) in enumerate(self.language.layers.items()):
            kept = () if cache is None else (cache.layer(int(name)),)
            stream = _maybe_recompute(layer, place, self.recompute.language, stream, batch.text, *kept)
            if int(name) in deepstack:
                stream = self._add_deepstack(stream, deepstack.pop(int(name)), batch.text)
        return Flow(stream, deepstack)

    def _add_deepstack(self, stream: torch.Tensor, feature: torch.Tensor, text: TextInputs) -> torch.Tensor:
        """Decoder layer k adds the k-th DeepStack feature to the rows of the visual tokens."""
        if self.rows_split_over > 1:
            # Every rank uses the rows of its own tokens; the gradients of all ranks make up the feature's.
            feature = tensor_parallel.copy_to_tensor_model_parallel_region(feature)
        if text.keys is not None:
            feature = context.gather_rows(feature, self.mesh.cp_group)
        return add_rows(stream, feature, text.local_visual, self.rows)


def _maybe_recompute(layer, place: int, limit: int, stream: torch.Tensor, *inputs) -> torch.Tensor:
    if torch.is_grad_enabled() and (limit < 0 or place < limit):
        return checkpoint(layer, stream, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=replayed)
    return layer(stream, *inputs)
