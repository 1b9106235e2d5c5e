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
from blip2fast.scenes import Scene, captions
from blip2fast.search.attention import query_attention
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
    patches = query_attention(model, image_embeds, input_ids, attention_mask).mean(1)
    return patches / patches.sum((1, 2), keepdim=True)
