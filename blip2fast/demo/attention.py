"""Compares query attention for a text that mentions one object with that object's pixels."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from blip2fast.demo.measure import EvalSet, tokenize
from blip2fast.evaluation.retrieval import evaluating
from blip2fast.kernels.qformer_attention.layout import MaskKind
from blip2fast.qformer.masks import qformer_mask
from blip2fast.scenes import Scene, captions
from blip2fast.stage1.model import Blip2Stage1


@dataclass(frozen=True)
class Attention:
    """Attention of the ITM pass on the mentioned object of two-object scenes.

    Attributes:
        maps: [n, p, p] attention of the last cross-attention layer on image patches, mean over
            queries and heads; each map sums to 1.
        scene: [n] number of each scene, and `mentioned` [n] which of its objects the text names.
        on_mentioned, on_other: mean share of attention on the patches of either object, weighted
            by how much of a patch the object covers.
        area_mentioned, area_other: the same shares for a uniform map; the no-preference baseline.
    """

    maps: NDArray[np.float32]
    scene: list[int]
    mentioned: list[int]
    on_mentioned: float
    on_other: float
    area_mentioned: float
    area_other: float


def attention_on_objects(model: Blip2Stage1, data: EvalSet, limit: int = 200) -> Attention:
    """Attention of the queries on one of two objects, each mentioned once."""
    both = [i for i, scene in enumerate(data.split.scenes) if len(scene.objects) == 2][:limit]
    scene = [i for i in both for _ in range(2)]
    mentioned = [0, 1] * len(both)
    rng = random.Random(0)
    texts = []
    for i, j in zip(scene, mentioned, strict=True):
        whole = data.split.scenes[i]
        texts += captions(Scene(whole.spec, (whole.objects[j],)), 1, rng)
    tokens = tokenize(data.tokenizer, texts)
    maps = matching_attention(
        model, data.images(torch.tensor(scene)), tokens.input_ids, tokens.attention_mask
    )
    masks = torch.from_numpy(data.split.masks[scene])
    named = masks[torch.arange(len(scene)), mentioned]
    other = masks[torch.arange(len(scene)), [1 - j for j in mentioned]]

    def share(weights: Tensor, mask: Tensor) -> float:
        cover = F.adaptive_avg_pool2d(mask.float(), weights.shape[-1])
        return (weights * cover).sum((1, 2)).mean().item()

    even = torch.full_like(maps, 1 / maps[0].numel())
    return Attention(
        maps=maps.numpy(),
        scene=scene,
        mentioned=mentioned,
        on_mentioned=share(maps, named),
        on_other=share(maps, other),
        area_mentioned=share(even, named),
        area_other=share(even, other),
    )


def matching_attention(
    model: Blip2Stage1, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor
) -> Tensor:
    """[B, p, p]: last layer's cross-attention on patches in the ITM pass, mean over Q and H.

    A leading class token, which no patch belongs to, is left out and the rest sums to 1.
    """
    Q = model.config.num_query_tokens
    with evaluating(model) as device:
        ids, mask = input_ids.to(device), attention_mask.to(device)
        queries = model.query_tokens.expand(len(ids), -1, -1)
        outputs = model.qformer(
            query_embeds=torch.cat([queries, model.embeddings(ids)], dim=1),
            query_length=Q,
            attention_mask=qformer_mask(MaskKind.BIDIRECTIONAL, Q, mask),
            encoder_hidden_states=model.ln_vision(image_embeds.to(device)),
            output_attentions=True,
        )
    weights = outputs.cross_attentions[-1].mean((1, 2)).float().cpu()
    side = int(weights.shape[1] ** 0.5)
    patches = weights[:, -side * side :]
    return (patches / patches.sum(1, keepdim=True)).unflatten(1, (side, side))
