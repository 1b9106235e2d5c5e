"""Where each query looks: cross-attention on an image's patches, drawn over the picture.

Shapes: B pairs, Q queries, H heads, S image tokens, E their width, p patches a side.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip2fast._imports import needs
from blip2fast.data.manifest import replace_file
from blip2fast.evaluation.retrieval import evaluating
from blip2fast.inference.attention_maps import patch_maps, patches_a_side
from blip2fast.kernels.qformer_attention.layout import MaskKind
from blip2fast.qformer.masks import qformer_mask
from blip2fast.stage1.model import Blip2Stage1

with needs("draw attention", "PIL"):
    from PIL import Image, ImageDraw, ImageFont

_TILE, _GAP, _LABEL = 192, 8, 22
_STOPS = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])


def query_attention(
    model: Blip2Stage1, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor
) -> Tensor:
    """[B, Q, p, p] on the CPU: weights of the last cross-attention in the ITM pass, mean over H.

    They sum to at most 1 over the patches: a leading class token, which no patch belongs to, is
    left out.

    Args:
        model: a `Blip2Stage1`.
        image_embeds: [B, S, E], of a square of patches, with a class token or without.
        input_ids, attention_mask: [B, T], the texts.

    Raises:
        ValueError: S is neither a square nor one more.
    """
    Q = model.config.num_query_tokens
    patches_a_side(image_embeds.shape[1])
    with evaluating(model) as device:
        ids, mask = input_ids.to(device), attention_mask.to(device)
        queries = model.query_tokens.expand(len(ids), -1, -1)
        tokens = image_embeds.to(device, model.query_tokens.dtype)
        outputs = model.qformer(
            query_embeds=torch.cat([queries, model.embeddings(ids)], dim=1),
            query_length=Q,
            attention_mask=qformer_mask(MaskKind.BIDIRECTIONAL, Q, mask),
            encoder_hidden_states=model.ln_vision(tokens),
            output_attentions=True,
        )
    return patch_maps(outputs.cross_attentions[-1])


def draw_attention(image: Image.Image, weights: Tensor, title: str = "") -> Image.Image:
    """The picture, the mean over queries, and each query's attention over the picture.

    Args:
        image: the picture; it is drawn as the encoder sees it, a square.
        weights: [Q, p, p]; each map is scaled by its own largest value.
        title: written above.
    """
    square = image.convert("RGB").resize((_TILE, _TILE), Image.Resampling.BICUBIC)
    tiles = [("picture", square), ("mean of queries", over_picture(square, weights.mean(0)))]
    tiles += [(f"query {i + 1}", over_picture(square, each)) for i, each in enumerate(weights)]
    columns = min(len(tiles), math.ceil(math.sqrt(1.6 * len(tiles))))
    rows = math.ceil(len(tiles) / columns)
    width = columns * (_TILE + _GAP) + _GAP
    top = 36 if title else _GAP
    page = Image.new("RGB", (width, top + rows * (_TILE + _LABEL + _GAP)), "white")
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((_GAP, 8), _fitting(draw, title, width - 2 * _GAP), "black", _font(18))
    for number, (label, tile) in enumerate(tiles):
        x = _GAP + number % columns * (_TILE + _GAP)
        y = top + number // columns * (_TILE + _LABEL + _GAP)
        page.paste(tile, (x, y + _LABEL))
        draw.text((x, y + 3), label, "black", _font(14))
    return page


def over_picture(square: Image.Image, weights: Tensor) -> Image.Image:
    """A map of weights over the picture, in its size: the more weight, the less of the picture.

    Args:
        square: the picture as the encoder sees it.
        weights: [p, p]; scaled by the largest.
    """
    largest = weights.max().clamp_min(1e-12)
    heat = Image.fromarray((weights / largest).numpy().astype(np.float32))
    shown = np.asarray(heat.resize(square.size, Image.Resampling.BILINEAR)).clip(0, 1)
    places = np.linspace(0, 1, len(_STOPS))
    colour = np.stack([np.interp(shown, places, _STOPS[:, i]) for i in range(3)], -1)
    grey = np.asarray(square.convert("L"), np.float32)[..., None]
    mixed = 0.35 * grey + 0.65 * colour
    return Image.fromarray(mixed.round().astype(np.uint8))


def save_drawing(drawing: Image.Image, path: Path) -> None:
    """Write a drawing as PNG; it is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda aside: drawing.save(aside, format="PNG"))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _fitting(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    if draw.textlength(text, _font(18)) <= width:
        return text
    while text and draw.textlength(text + "...", _font(18)) > width:
        text = text[:-1]
    return text + "..."
