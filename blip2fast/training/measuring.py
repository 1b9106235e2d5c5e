"""Measures the memory of models without allocating it.

The models run on PyTorch's fake tensors, which have shapes and dtypes but no data. Parameters are
counted on the real model classes, and saved activations are the tensors that autograd saves, so
this works for any architecture. Attention is counted as fused, as on PyTorch's CPU backend.

Shapes: B images, Q queries, T text tokens, S image tokens, E image token width, V words.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Blip2VisionModel,
)

from blip2fast._choices import STORAGES, LossName, Storage
from blip2fast.frozen.image_encoders import without_weights
from blip2fast.frozen.lavis_files import is_lavis_file, load_lavis_config
from blip2fast.frozen.local_models import not_found
from blip2fast.offload.blocks import find_blocks, lay_out, own_parameters
from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.config import Stage2Config
from blip2fast.stage2.lora import target_names
from blip2fast.stage2.model import Blip2Stage2


@dataclass
class KeptTensors:
    """The storages that autograd saves, except parameters, each counted once.

    Attributes:
        nbytes: bytes of all of them.
        by_block: bytes saved within each block, by block index.
    """

    parameters: set[int]
    current: int | None = None
    by_block: dict[int, int] = field(default_factory=dict)
    _seen: dict[int, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self._seen.values())

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor's storage towards the block that is running."""
        storage = tensor.untyped_storage()
        # keep a reference to the storage, so that its address is not reused
        if storage._cdata not in self.parameters and storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            if self.current is not None:
                taken = self.by_block.get(self.current, 0)
                self.by_block[self.current] = taken + storage.nbytes()
        return tensor.detach()  # a saved output would keep its own graph alive


@contextmanager
def kept_tensors(module: nn.Module) -> Iterator[KeptTensors]:
    """Count what autograd saves inside the `with` block; works with real tensors too."""
    kept = KeptTensors({p.untyped_storage()._cdata for p in module.parameters()})
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        yield kept


@contextmanager
def _without_numbers() -> Iterator[None]:
    """Fake tensor mode, with PyTorch's original `F.linear`.

    ZeRO-3 replaces `F.linear` for the whole process once it has partitioned a model. Its version
    saves more for the backward pass, and a plan must not depend on what ran earlier.
    """
    replaced, F.linear = F.linear, torch._C._nn.linear
    try:
        with FakeTensorMode():
            yield
    finally:
        F.linear = replaced


INSTRUCTION = 32  # prompt tokens assumed for a text-conditioned Q-Former


@dataclass(frozen=True)
class StreamBytes:
    """Bytes of a streamed model's blocks: all on the host, the largest one, the largest decoded."""

    host: int
    buffer: int
    decoded: int


@dataclass(frozen=True)
class LanguageModelSizes:
    """Memory of a frozen language model and of one forward pass with gradients to its inputs.

    Attributes:
        parameters: number of parameters.
        weights: bytes of the weights.
        rest: bytes of the weights that are not streamed: embeddings, norm, head, shared ones.
        streams: bytes of the streamed blocks, by storage type.
        kept: bytes saved for the backward pass.
        kept_block: the largest part of `kept` saved within one block.
        kept_outside: the part of `kept` saved outside the blocks.
        block_inputs: bytes of the blocks' inputs; all that blocks save under recomputation.
        words: V.
        width: embedding width.
        adapters: number of parameters of LoRA adapters, which are not counted above.
    """

    parameters: int
    weights: int
    rest: int
    streams: dict[Storage, StreamBytes]
    kept: int
    kept_block: int
    kept_outside: int
    block_inputs: int
    words: int
    width: int
    adapters: int = 0


@dataclass(frozen=True)
class TrainedSizes:
    """The trained part: Q-Former, queries, norm and projection.

    Attributes:
        parameters: number of parameters.
        kept: bytes that one forward pass saves for the backward pass.
    """

    parameters: int
    kept: int


def read_model_config(key: str, name: str) -> Any:
    """The transformers configuration of a model; weights are not needed.

    Of a file of LAVIS it is that of its image encoder.

    Raises:
        ValueError: not found.
    """
    if is_lavis_file(name):
        return load_lavis_config(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(not_found(key, name, error)) from error


def measure_language_model(
    config: Any,
    dtype: torch.dtype,
    batch: int,
    prompts: int,
    text: int,
    lora: Mapping[str, Any] | None = None,
) -> LanguageModelSizes:
    """Measure the language model that a transformers configuration describes.

    Args:
        config: a configuration from `AutoConfig`.
        dtype: dtype of the weights and activations.
        batch, prompts, text: B images, Q soft prompts before T text tokens; an encoder-decoder
            encodes Q + T tokens and decodes T.
        lora: `r`, `dropout` and `target_modules` of adapters, as in `add_lora`; None: no adapters.
    """
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with _without_numbers():
        model = (
            kind.from_config(config, dtype=dtype, trust_remote_code=False)
            .eval()
            .requires_grad_(False)
        )
        _untie_head(model)
        blocks = find_blocks(model)
        own = own_parameters(model, blocks)
        if lora is not None:
            for name in target_names(model, lora["target_modules"]):
                parent, _, last = name.rpartition(".")
                layer: Any = model.get_submodule(name)
                adapted = _Adapted(layer, lora["r"], lora["dropout"])
                setattr(model.get_submodule(parent), last, adapted)
        embeddings = model.get_input_embeddings()
        with kept_tensors(model) as kept, _block_inputs(blocks, kept) as inputs:
            embeds = torch.empty(
                batch, prompts + text, embeddings.embedding_dim, dtype=dtype, requires_grad=True
            )
            ids = torch.zeros(batch, text, dtype=torch.long)
            more = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
            base = model if config.is_encoder_decoder else model.base_model
            mask = torch.ones(batch, prompts + text, dtype=torch.long)
            base(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **more)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    weights = sum(p.numel() * p.itemsize for p in frozen)
    streamed = sum(
        places[0][0].get_parameter(places[0][1]).nbytes
        for block in own
        for places in block.values()
    )
    return LanguageModelSizes(
        parameters=sum(p.numel() for p in frozen),
        weights=weights,
        rest=weights - streamed,
        streams={storage: _stream_bytes(own, storage) for storage in STORAGES},
        kept=kept.nbytes,
        kept_block=max(kept.by_block.values()),
        kept_outside=kept.nbytes - sum(kept.by_block.values()),
        block_inputs=inputs.nbytes,
        words=embeddings.num_embeddings,
        width=embeddings.embedding_dim,
        adapters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def measure_trained(
    config: Stage2Config, width: int, dtype: torch.dtype, batch: int, image_tokens: int
) -> TrainedSizes:
    """Measure the trained part for a language model of a given width.

    Args:
        config: sizes of the Q-Former.
        width: width of the language model's embeddings.
        dtype: dtype of the activations.
        batch, image_tokens: B and S.
    """
    with _without_numbers():
        plain = replace(config, match_embedding_scale=False, pack_padding=False)
        model = Blip2Stage2(plain, _NoLanguage(width))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.train()
        tokens = torch.empty(batch, image_tokens, config.encoder_hidden_size, dtype=dtype)
        with kept_tensors(model) as kept:
            if not config.text_conditioned:
                model.encode_image(tokens)
            else:
                # calls the parts directly: fake ids would fail the model's check of their range
                ids = torch.zeros(batch, INSTRUCTION, dtype=torch.long)
                states = model.qformer(
                    query_embeds=model.query_tokens.expand(batch, -1, -1),
                    encoder_hidden_states=model.ln_vision(tokens),
                    input_ids=ids,
                ).last_hidden_state
                model.language_projection(states[:, : config.num_query_tokens])
        return TrainedSizes(sum(p.numel() for p in model.trainable_parameters()), kept.nbytes)


def measure_stage1(
    config: Stage1Config,
    losses: Sequence[LossName],
    dtype: torch.dtype,
    batch: int,
    image_tokens: int,
    text: int,
) -> TrainedSizes:
    """Measure stage 1, whose parameters are all trained.

    The passes of stage 1 over packed texts save less than what is measured here: every pass has
    padded texts, and keys and values of its images to itself.

    Args:
        config: sizes.
        losses: those of the run.
        dtype: dtype of the activations.
        batch, image_tokens, text: B, S and T.
    """
    with _without_numbers():
        model = Blip2Stage1(config, losses=losses)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.train()
        tokens = torch.empty(batch, image_tokens, config.encoder_hidden_size, dtype=dtype)
        with kept_tensors(model) as kept:
            states = model.ln_vision(tokens)

            def read(rows: int, queries: bool, words: int, images: Tensor | None) -> None:
                embeds = torch.empty(
                    rows, words, config.hidden_size, dtype=dtype, requires_grad=True
                )
                length = config.num_query_tokens if queries else 0
                if queries:
                    embeds = torch.cat([model.query_tokens.expand(rows, -1, -1), embeds], dim=1)
                model.qformer(
                    query_embeds=embeds, query_length=length, encoder_hidden_states=images
                )

            read(batch, True, 0, states)
            read(batch, False, text, None)
            if "itm" in losses:
                read(3 * batch, True, text, states.repeat(3, 1, 1))
            if "itg" in losses:
                # the words also read the queries, which the first call has computed
                read(batch, False, text, None)
        # stage 1 joins these weights, for one product in place of several
        joined = sum(
            parameter.nbytes
            for name, parameter in model.qformer.named_parameters()
            if name.endswith(("query.weight", "key.weight", "value.weight"))
            and not name.endswith("crossattention.attention.query.weight")
        )
        return TrainedSizes(sum(p.numel() for p in model.parameters()), kept.nbytes + joined)


@dataclass(frozen=True)
class EncoderSizes:
    """An image encoder in the loop.

    Attributes:
        parameters: number of parameters, including those of unused last blocks.
        width: E.
        trained: number of parameters that are trained; 0 if it is frozen, as are the others.
        kept: bytes that one forward pass saves for the backward pass.
        kept_block: the largest part of `kept` saved within one block.
        kept_outside: the part of `kept` saved outside the blocks.
        block_inputs: bytes of the blocks' inputs; all that blocks save under recomputation.
    """

    parameters: int = 0
    width: int | None = None
    trained: int = 0
    kept: int = 0
    kept_block: int = 0
    kept_outside: int = 0
    block_inputs: int = 0

    def activations(self, recomputed: bool) -> int:
        """Bytes that are saved for the backward pass, with blocks that are recomputed or not."""
        if not recomputed:
            return self.kept
        return self.block_inputs + self.kept_outside + self.kept_block


def measure_image_encoder(config: Any) -> tuple[int, int]:
    """Parameter count of a frozen image encoder, including unused last blocks, and its width E."""
    vision = getattr(config, "vision_config", config)
    # not on fake tensors, on which the initialisation of most ViTs (`trunc_normal_`) does not run
    with torch.device("meta"):
        if vision.model_type in ("blip_2_vision_model", "instructblip_vision_model"):
            model = Blip2VisionModel(vision)
        else:
            model = AutoModel.from_config(vision, trust_remote_code=False)
    return sum(p.numel() for p in model.parameters()), int(vision.hidden_size)


def measure_trained_encoder(
    config: Any, dtype: torch.dtype, batch: int, size: int, layer: int | None = None
) -> EncoderSizes:
    """Measure an image encoder that is trained with the rest.

    Args:
        config: a configuration from `AutoConfig`.
        dtype: dtype of the weights and activations.
        batch, size: B images of h = w pixels.
        layer: as in `load_image_encoder`.
    """
    parameters, width = measure_image_encoder(config)
    vision = copy.deepcopy(getattr(config, "vision_config", config))
    vision.image_size = size
    with torch.device("meta"):
        encoder = without_weights(vision, layer)
    with _without_numbers():
        _as_fake(encoder, dtype)
        encoder.unfreeze()
        encoder.train()
        with kept_tensors(encoder) as kept, _block_inputs(list(encoder.blocks), kept) as inputs:
            encoder(torch.empty(batch, 3, size, size, dtype=dtype))
    return EncoderSizes(
        parameters,
        width,
        trained=sum(p.numel() for p in encoder.parameters() if p.requires_grad),
        kept=kept.nbytes,
        kept_block=max(kept.by_block.values()),
        kept_outside=kept.nbytes - sum(kept.by_block.values()),
        block_inputs=inputs.nbytes,
    )


def _as_fake(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace tensors on the meta device by fake ones on the CPU, floating-point ones in `dtype`.

    Fake tensor mode refuses meta tensors of its outside, also to convert them.
    """
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                kind = dtype if buffer.dtype.is_floating_point else buffer.dtype
                part._buffers[name] = torch.empty(buffer.shape, dtype=kind)


def _untie_head(model: Any) -> None:
    """Untie the head of T5 1.1 and FlanT5, as transformers does when it loads their weights."""
    if getattr(model.config, "scale_decoder_outputs", None) is False:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=False)


class _Adapted(nn.Module):
    """A linear layer with an adapter as peft computes it; peft's own cannot be built of fakes."""

    def __init__(self, base: nn.Linear, r: int, dropout: float) -> None:
        super().__init__()
        self.base, self.dropout = base, nn.Dropout(dropout) if dropout else nn.Identity()
        dtype = base.weight.dtype
        self.down = nn.Linear(base.in_features, r, bias=False, dtype=dtype)
        self.up = nn.Linear(r, base.out_features, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + self.up(self.down(self.dropout(x))) * 2.0
        return found


class _NoLanguage(nn.Module):
    """A stand-in for a language model; only its embedding width is used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def get_input_embeddings(self) -> Any:
        return nn.Embedding(1, self.width, device="meta")


@contextmanager
def _block_inputs(blocks: list[nn.Module], kept: KeptTensors) -> Iterator[KeptTensors]:
    """Count the blocks' inputs, and record in `kept` which block is running."""
    inputs = KeptTensors(kept.parameters)

    def before(number: int, args: Any, kwargs: Any) -> None:
        kept.current = number
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                inputs.add(leaf)

    def after(*_: Any) -> None:
        kept.current = None

    handles: list[Any] = []
    for number, block in enumerate(blocks):
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs, number=number: before(number, args, kwargs),
                with_kwargs=True,
            )
        )
        handles.append(block.register_forward_hook(after))
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _stream_bytes(own: list[Any], storage: Storage) -> StreamBytes:
    layouts = [lay_out(block, storage) for block in own]
    return StreamBytes(
        host=sum(layout.nbytes for layout in layouts),
        buffer=max(layout.nbytes for layout in layouts),
        decoded=max(layout.dense_nbytes for layout in layouts),
    )
