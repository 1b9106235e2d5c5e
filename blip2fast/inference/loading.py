"""Loads the parts of a `Blip2` from a folder or a hub name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    BlipImageProcessorPil,
    InstructBlipForConditionalGeneration,
    PreTrainedModel,
)

from blip2fast._imports import needs
from blip2fast.checkpoints.files import last_checkpoint
from blip2fast.checkpoints.trained import (
    Description,
    check_frozen,
    frozen_name,
    is_trained,
    load_trained,
    read_description,
)
from blip2fast.data.tokenizers import qformer_tokenizer
from blip2fast.frozen.hub import at_revision
from blip2fast.frozen.image_encoders import (
    EncoderName,
    FrozenImageEncoder,
    load_image_encoder,
    parse_encoder_id,
)
from blip2fast.frozen.images import transform_for
from blip2fast.frozen.language_models import load_language_model
from blip2fast.frozen.pictures import to_rgb
from blip2fast.inference.inputs import Transform
from blip2fast.offload.loading import load_streamed
from blip2fast.offload.streaming import stream_blocks, stream_of
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.language_model import is_encoder_decoder
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.stage2.text import Stage2Text

with needs("read images", "PIL"):
    from PIL import Image

Residence = Literal["none", "stream"]
# no limit from the configuration: prompts are limited by the position table alone
NO_LIMIT = 1_000_000
MARKER = "<image>"
_KINDS = {
    "blip-2": Blip2ForConditionalGeneration,
    "instructblip": InstructBlipForConditionalGeneration,
}


@dataclass(frozen=True)
class Prompts:
    """Prompt templates; `{}` is replaced by the question.

    Attributes:
        caption: prefix of captions.
        question: template for VQA.
        chat: template for a turn of a conversation.
    """

    caption: str
    question: str
    chat: str


def paper_prompts(encoder_decoder: bool, text_conditioned: bool) -> Prompts:
    """The paper's prompts (arXiv 2301.12597): section 4.2 for captions, 4.1 for questions.

    For a text-conditioned Q-Former, those of InstructBLIP's tuning (arXiv 2305.06500).
    """
    chat = "Question: {} Answer:"
    short = encoder_decoder or text_conditioned
    caption = "A short image description:" if text_conditioned else "a photo of"
    return Prompts(caption, "Question: {} Short answer:" if short else chat, chat)


def prompts_of_run(model: Blip2Stage2) -> Prompts:
    """The prompts that a run was trained with; the paper's for tasks it was not trained on.

    A decoder-only model trained without a prompt captions without one. Encoder-decoder models and
    text-conditioned Q-Formers need a text input and get the paper's prompt.
    """
    own, encoder_decoder = model.config.prompt, is_encoder_decoder(model.language_model)
    paper = paper_prompts(encoder_decoder, model.config.text_conditioned)
    begun = paper.caption if encoder_decoder or model.config.text_conditioned else ""
    if "{}" in own:
        return Prompts(begun, own, own)
    return Prompts(own or begun, paper.question, paper.chat)


@dataclass(frozen=True)
class Loaded:
    """The parts of a `Blip2`.

    Attributes:
        model: in evaluation mode.
        text: text preparation with no prompt or length limit; images are placed at the markers.
        prompts: the templates.
        transform: image transform of `model.image_encoder`; None without an encoder.
        no_encoder: the reason why there is no encoder.
        end_ids: ids of the tokens that end a text.
    """

    model: Blip2Stage2
    text: Stage2Text
    prompts: Prompts
    transform: Transform | None
    no_encoder: str
    end_ids: list[int]

    @property
    def marker(self) -> str:
        """The image marker in texts."""
        return self.text.image_marker or MARKER

    def image_transform(self) -> Transform:
        """The image transform.

        Raises:
            ValueError: there is no image encoder; says why.
        """
        if self.transform is None:
            raise ValueError(
                f"no image encoder for pictures: {self.no_encoder}. Give from_pretrained "
                "image_encoder=..., on the command line --image-encoder, or give image_embeds=..., "
                "its tokens"
            )
        return self.transform


def load_parts(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    offload: Residence,
    language_model: str | None,
    image_encoder: str | None,
) -> Loaded:
    """See `Blip2.from_pretrained`."""
    if offload not in ("none", "stream"):
        raise ValueError(f"offload={offload!r}: expected 'none' or 'stream'")
    if is_trained(path):
        return _trained(path, dtype, device, offload, language_model, image_encoder)
    if (Path(path) / "checkpoints").is_dir():
        last = last_checkpoint(Path(path) / "checkpoints")
        raise ValueError(f"{path} is a run that has not ended; give a checkpoint of it, {last}")
    for name, value in (("language_model", language_model), ("image_encoder", image_encoder)):
        if value is not None:
            raise ValueError(
                f"{name}={value!r}: {path} is not a folder that blip2fast trained, and a "
                "transformers BLIP-2 has its own"
            )
    return _transformers(path, dtype, device, offload)


def _trained(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    offload: Residence,
    language_model: str | None,
    image_encoder: str | None,
) -> Loaded:
    description = read_description(path)
    if description.stage != 2:
        raise ValueError(
            f"{path} was trained in stage {description.stage}, without a language model to write "
            "with; give a run of stage 2"
        )
    if language_model is None and description.language_model is None:
        raise ValueError(
            f"{path} names no language model: give language_model=..., on the command line "
            "--language-model"
        )
    name = language_model or frozen_name(description, "language_model", path)
    frozen: PreTrainedModel
    if offload == "stream" and description.adapter is not None:
        raise ValueError(
            f"{path} has LoRA adapters, for which the language model must be on the device: leave "
            "out offload='stream'"
        )
    try:
        if offload == "stream":
            frozen, _ = load_streamed(name, dtype, device)
        else:
            frozen = load_language_model(name, dtype)
    except ValueError as error:
        if language_model is not None:
            raise
        raise ValueError(
            f"{error}. {path} was trained with it; give its place now: language_model=..., on the "
            "command line --language-model"
        ) from error
    model = load_trained(path, frozen, image_encoder=image_encoder)
    if not isinstance(model, Blip2Stage2):
        raise ValueError(f"{path}: expected a model of stage 2")
    transform, missing = add_encoder(model, image_encoder, description, path, dtype)
    _place(model, dtype, device)
    reads = model.config.text_conditioned
    words = qformer_tokenizer(frozen_name(description, "tokenizer", path)) if reads else None
    text = _text(model, AutoTokenizer.from_pretrained(name, trust_remote_code=False), words)
    return Loaded(model, text, prompts_of_run(model), transform, missing, [text.end_token_id])


def add_encoder(
    model: Blip2Stage1 | Blip2Stage2,
    given: str | None,
    description: Description,
    path: str,
    dtype: torch.dtype,
) -> tuple[Transform | None, str]:
    """Load the encoder of the run's image tokens; returns its transform, or the reason for none.

    The description names the encoder as `FrozenImageEncoder.encoder_id` does, "name, block n", or
    by whatever name a feature cache from another source states.

    Args:
        given: folder or hub name that overrides the one in the description.
    """
    known = description.image_encoder
    parsed = parse_encoder_id(known)
    if isinstance(model.image_encoder, FrozenImageEncoder):  # trained with the rest
        base = given or (known if parsed is None else parsed[0])
        return transform_for(base, model.image_encoder.image_size), ""
    if given is None and parsed is None:
        return None, f"its image tokens came from {known!r}, which is not a known encoder"
    name, layer, size, quantization = parsed or EncoderName("")
    try:
        name = given or at_revision(name, description.revisions.get("image_encoder"))
        size = size or description.image_size
        encoder = load_image_encoder(name, layer, dtype, size, quantization)
    except ValueError as error:
        if given is not None:
            raise
        return None, str(error)
    if encoder.width != model.config.encoder_hidden_size:
        raise ValueError(
            f"image encoder {name!r} gives tokens of width {encoder.width}, but this "
            f"model was trained on {model.config.encoder_hidden_size} (of {known!r})"
        )
    check_frozen(
        description,
        "image_encoder",
        encoder.identity,
        path,
        "Give image_encoder=..., the one it was trained with",
    )
    model.image_encoder = encoder
    return transform_for(name, encoder.image_size), ""


def _transformers(
    path: str, dtype: torch.dtype, device: torch.device, offload: Residence
) -> Loaded:
    try:
        kind = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
        if kind not in _KINDS:
            raise ValueError(
                f"{path} is a {kind!r} model; give a run that blip2fast trained in stage 2, or a "
                "transformers BLIP-2 or InstructBLIP"
            )
        whole = _KINDS[kind].from_pretrained(path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        transform = processor_transform(path)
        words = None
        if kind == "instructblip":
            words = AutoTokenizer.from_pretrained(
                path, subfolder="qformer_tokenizer", trust_remote_code=False
            )
    except OSError as error:
        raise ValueError(
            f"{path!r}: not found: give a folder, a run of blip2fast or a transformers BLIP-2 with "
            f"its tokenizer and image processor, or a hub name that can be reached ({error})"
        ) from error
    model = Blip2Stage2.from_transformers(whole).eval()

    if offload == "stream":
        stream_blocks(model.language_model, device)
    _place(model, dtype, device)
    text = _text(model, tokenizer, words)
    # in checkpoints converted from LAVIS only the generation config names the real end token
    ends = model.language_model.generation_config.eos_token_id
    end_ids = [text.end_token_id] if ends is None else ends if isinstance(ends, list) else [ends]
    text.end_token_id = end_ids[0]
    encoder_decoder = is_encoder_decoder(model.language_model)
    prompts = paper_prompts(encoder_decoder, model.config.text_conditioned)
    return Loaded(model, text, prompts, transform, "", end_ids)


def processor_transform(path: str) -> Transform:
    """The image transform of a transformers BLIP-2."""
    # all models of these kinds use this class; AutoImageProcessor may require torchvision
    processor = BlipImageProcessorPil.from_pretrained(path)

    def transform(image: Image.Image) -> Tensor:
        pixels: Tensor = processor(images=to_rgb(image), return_tensors="pt")["pixel_values"]
        return pixels[0]

    return transform


def _text(model: Blip2Stage2, tokenizer: Any, qformer_tokenizer: Any) -> Stage2Text:
    return Stage2Text(
        tokenizer,
        is_encoder_decoder(model.language_model),
        end_text=model.config.end_text,
        max_txt_len=NO_LIMIT,
        image_marker=model.config.image_marker or MARKER,
        num_query_tokens=model.config.num_query_tokens,
        qformer_tokenizer=qformer_tokenizer,
    )


def _place(model: Blip2Stage2, dtype: torch.dtype, device: torch.device) -> None:
    """Move all modules; the language model keeps its dtypes (T5 has parts in fp32)."""
    for name, child in model.named_children():
        if name != "language_model":
            child.to(device, dtype)
        elif not is_streamed(model):
            child.to(device)
    model.query_tokens.data = model.query_tokens.data.to(device, dtype)


def is_streamed(model: Blip2Stage2) -> bool:
    """Whether the language model's blocks are streamed from host memory."""
    return any(stream_of(module) is not None for module in model.language_model.modules())
