"""BLIP-2's shapes by name, and where each is timed.

B images, N query blocks, Q queries, T text tokens, S image tokens, E image token width, C hidden
width, H heads, D head or feature width. A model's name says its image encoder: vit_g (E = 1408) or
vit_l (E = 1024); attention sees keys and values of width H * D and is the same for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import pytest
import torch
from transformers import Blip2VisionConfig, CLIPVisionConfig, OPTConfig, T5Config

from blip2fast import Stage1Config, Stage2Config
from blip2fast.kernels.qformer_attention.layout import MaskKind

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
Where = Literal["test", "cpu", "cuda"]

UNI, BI, CAUSAL = MaskKind.UNIMODAL, MaskKind.BIDIRECTIONAL, MaskKind.MULTIMODAL_CAUSAL


class Placed(Protocol):
    """A shape that says where it is timed."""

    @property
    def where(self) -> Where:
        """`"test"`: anywhere, and by the tests; `"cpu"`: not by these; `"cuda"`: on a GPU."""
        ...


def cells(table: Mapping[str, Placed]) -> list[Any]:
    """The names of a table, marked by where each shape is timed."""
    no_gpu = pytest.mark.skipif(
        not torch.cuda.is_available(), reason="sized for a CUDA device, and there is none"
    )
    marks: dict[Where, list[Any]] = {
        "test": [],
        "cpu": [pytest.mark.fullsize],
        "cuda": [pytest.mark.fullsize, pytest.mark.gpu, no_gpu],
    }
    return [pytest.param(name, marks=marks[shape.where]) for name, shape in table.items()]


def spread_lengths(count: int, mean: int, longest: int) -> list[int]:
    """Caption lengths spread evenly about a mean; all of them `longest` where that is the mean."""
    if mean >= longest:
        return [longest] * count
    around = min(mean // 2, longest - mean)
    return [mean + (5 * i) % (2 * around + 1) - around for i in range(count)]


@dataclass(frozen=True)
class SelfShape:
    """Self-attention of a pass: N query blocks, and with each a text of every kind.

    Attributes:
        headline: Compiled rivals take part too; each costs tens of seconds.
    """

    blocks: int
    kinds: tuple[MaskKind, ...]
    queries: int = 32
    text_tokens: int = 32
    mean_text: int = 12
    heads: int = 12
    width: int = 64
    headline: bool = False
    where: Where = "cuda"

    def lengths(self) -> list[int]:
        """Tokens of each text: all texts of the first kind, then of the next."""
        return spread_lengths(self.blocks, self.mean_text, self.text_tokens) * len(self.kinds)


SELF_SHAPES = {
    "tiny": SelfShape(
        3, (UNI, CAUSAL), queries=4, text_tokens=6, mean_text=4, heads=2, width=16, where="test"
    ),
    "64x64_b16": SelfShape(16, (BI,), mean_text=32, headline=True, where="cpu"),
    "stage1_pass1_b16": SelfShape(16, (UNI, CAUSAL), where="cpu"),
    "stage1_pass2_b16": SelfShape(48, (BI,), where="cpu"),
    "64x64": SelfShape(256, (BI,), mean_text=32, headline=True),
    "queries": SelfShape(256, ()),
    "stage1_pass1": SelfShape(256, (UNI, CAUSAL)),
    "stage1_pass2": SelfShape(768, (BI,)),
}


@dataclass(frozen=True)
class CrossShape:
    """Cross-attention of N query blocks to B images.

    Attributes:
        layers: The keys and values are one layer's slice of a projection of so many layers.
        headline: As in `SelfShape`.
    """

    blocks: int
    image_tokens: int
    images: int | None = None
    queries: int = 32
    heads: int = 12
    width: int = 64
    layers: int = 1
    headline: bool = False
    where: Where = "cuda"

    def num_images(self) -> int:
        """B; as many as blocks where nothing else is said."""
        return self.blocks if self.images is None else self.images

    def index(self) -> list[int] | None:
        """The image of each block: its own, then a negative, then its own, as in matching."""
        if self.images is None:
            return None
        own = list(range(self.images))
        return own + [(i + 1) % self.images for i in own] + own


CROSS_SHAPES = {
    "tiny": CrossShape(6, 5, images=2, queries=4, heads=2, width=16, layers=2, where="test"),
    "32x257_b16": CrossShape(16, 257, headline=True, where="cpu"),
    "stage1_pass2_b16": CrossShape(48, 257, images=16, layers=6, where="cpu"),
    "windows_3x15_b2048": CrossShape(2048, 15, queries=3, where="cpu"),
    "32x10000_b1": CrossShape(1, 10_000, where="cpu"),
    "32x257": CrossShape(256, 257, headline=True),
    "stage1_pass1": CrossShape(256, 257, layers=6),
    "stage1_pass2": CrossShape(768, 257, images=256, layers=6),
    "windows_3x15": CrossShape(65_536, 15, queries=3, headline=True),
    "32x10000": CrossShape(8, 10_000),
}


@dataclass(frozen=True)
class ITCShape:
    """All pairs of N images and N texts."""

    batch: int
    queries: int = 32
    width: int = 256
    where: Where = "cuda"


ITC_SHAPES = {
    "tiny": ITCShape(12, queries=4, width=16, where="test"),
    "n256": ITCShape(256, where="cpu"),
    "n1680_cpu": ITCShape(1680, where="cpu"),
    "n1680": ITCShape(1680),
    "n4096": ITCShape(4096),
    "n16384": ITCShape(16_384),
    "n32768": ITCShape(32_768),
    "n65536": ITCShape(65_536),
}


@dataclass(frozen=True)
class RowsShape:
    """What stands between large products: R rows of width C; for the LM loss R labels, V words.

    Attributes:
        headline: As in `SelfShape`.
    """

    rows: int
    width: int = 768
    vocabulary: int = 30_523
    headline: bool = False
    where: Where = "cuda"


# on a GPU the two passes of a stage-1 step at B = 256, mean caption 12
GLUE_SHAPES = {
    "tiny": RowsShape(8, where="test"),
    "r1000": RowsShape(1000, headline=True, where="cpu"),
    "r5000": RowsShape(5000, where="cpu"),
    "r14336": RowsShape(14_336, headline=True),
    "r33792": RowsShape(33_792),
}
LM_SHAPES = {
    "tiny": RowsShape(8, width=64, vocabulary=301, where="test"),
    "r170": RowsShape(170, where="cpu"),
    "r2000": RowsShape(2000, where="cpu"),
    "r2816": RowsShape(2816, headline=True),
}


@dataclass(frozen=True)
class Shape:
    """A model with the batch to time it on; captions have T tokens, `mean_caption` of them real.

    Attributes:
        headline: As in `SelfShape`.
    """

    config: Stage1Config
    batch: int
    image_tokens: int
    text_tokens: int = 32
    mean_caption: int = 12
    headline: bool = False
    where: Where = "cpu"


VIT_G = Stage1Config(**NO_DROPOUT)
VIT_L = replace(VIT_G, encoder_hidden_size=1024)
SCENES = replace(
    VIT_G,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=256,
    encoder_hidden_size=64,
    num_query_tokens=8,
    vocab_size=64,
    bos_token_id=63,
    embed_dim=32,
    cross_attention_frequency=1,
)
# a training step; the embedded scenes take seconds
STAGE1_SHAPES = {
    "scenes": Shape(SCENES, batch=64, image_tokens=65, where="test"),
    "vit_l_b8": Shape(VIT_L, batch=8, image_tokens=257),
    "vit_g_b8": Shape(VIT_G, batch=8, image_tokens=257),
    "vit_g_b16": Shape(VIT_G, batch=16, image_tokens=257, headline=True),
    "vit_g_b32": Shape(VIT_G, batch=32, image_tokens=257),
    **{
        f"vit_g_b{batch}_cuda": Shape(
            VIT_G, batch=batch, image_tokens=257, headline=batch == 256, where="cuda"
        )
        for batch in (256, 64, 128, 512)
    },
    **{
        f"vit_g_b{batch}_dropout_cuda": Shape(
            Stage1Config(), batch=batch, image_tokens=257, where="cuda"
        )
        for batch in (256, 64)
    },
}
# the peak of a step, each contender in a process of its own
STAGE1_MEMORY_SHAPES = {
    "scenes": STAGE1_SHAPES["scenes"],
    "vit_g_b16": STAGE1_SHAPES["vit_g_b16"],
    "vit_g_b64": Shape(VIT_G, batch=64, image_tokens=257),
}
# queries on image tokens, no text
INFERENCE_SHAPES = {
    "scenes_b4": Shape(SCENES, batch=4, image_tokens=65, where="test"),
    "vit_l_b1": Shape(VIT_L, batch=1, image_tokens=257),
    "vit_g_b1": Shape(VIT_G, batch=1, image_tokens=257),
    "vit_g_b4": Shape(VIT_G, batch=4, image_tokens=257),
    "vit_g_b1_16_queries": Shape(replace(VIT_G, num_query_tokens=16), batch=1, image_tokens=257),
    "vit_g_b1_four_frames": Shape(VIT_G, batch=1, image_tokens=4 * 257),
    **{
        f"vit_g_b{batch}_cuda": Shape(VIT_G, batch=batch, image_tokens=257, where="cuda")
        for batch in (1, 32, 256)
    },
}


@dataclass(frozen=True)
class CaptionShape:
    """Images to captions; every caption begins with 4 tokens and goes on for `new_tokens`."""

    vision: Blip2VisionConfig
    qformer: Stage2Config
    language: OPTConfig | T5Config
    batch: int
    new_tokens: int
    dtype: torch.dtype = torch.float32
    where: Where = "cpu"


def opt(width: int, layers: int, heads: int, **sizes: int) -> OPTConfig:
    """OPT of a width, its feed-forward layers four times as wide."""
    return OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **sizes,
    )


def flan_t5(width: int, ffn: int, layers: int, heads: int, **sizes: int) -> T5Config:
    """FlanT5 of a width: gated gelu, a head of its own."""
    return T5Config(
        d_model=width,
        d_kv=64,
        d_ff=ffn,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        **sizes,
    )


def vision(width: int, layers: int, heads: int, size: int, patch: int) -> Blip2VisionConfig:
    """A BLIP-2 vision model; the perceptron is 4.36 times as wide in ViT-g, 4 times here."""
    return Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=6144 if width == 1408 else 4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=size,
        patch_size=patch,
        initializer_range=0.02,
    )


TINY_QFORMER = Stage2Config(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    encoder_hidden_size=32,
    num_query_tokens=4,
)
# a quarter of the real widths, fewer layers and words, so that a CPU needs a second or two a batch
SMALL_QFORMER = Stage2Config(
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=1024,
    encoder_hidden_size=352,
)
_TINY_VISION, _SMALL_VISION = vision(32, 2, 2, 16, 8), vision(352, 6, 4, 112, 14)
_VIT_G = vision(1408, 39, 16, 224, 14)
_QFORMER = Stage2Config()
_HALF = torch.float16
CAPTION_SHAPES = {
    "tiny_opt": CaptionShape(
        _TINY_VISION, TINY_QFORMER, opt(32, 2, 2, vocab_size=64), 3, 5, where="test"
    ),
    "tiny_t5": CaptionShape(
        _TINY_VISION, TINY_QFORMER, flan_t5(32, 64, 2, 2, vocab_size=64), 3, 5, where="test"
    ),
    "small_opt_b8": CaptionShape(
        _SMALL_VISION, SMALL_QFORMER, opt(512, 6, 8, vocab_size=4096), 8, 16
    ),
    "small_t5_b8": CaptionShape(
        _SMALL_VISION, SMALL_QFORMER, flan_t5(384, 960, 6, 6, vocab_size=4096), 8, 16
    ),
    "opt_2.7b_b32": CaptionShape(_VIT_G, _QFORMER, opt(2560, 32, 32), 32, 20, _HALF, "cuda"),
    "opt_6.7b_b32": CaptionShape(_VIT_G, _QFORMER, opt(4096, 32, 32), 32, 20, _HALF, "cuda"),
    "flan_t5_xl_b32": CaptionShape(
        _VIT_G, _QFORMER, flan_t5(2048, 5120, 24, 32), 32, 20, torch.bfloat16, "cuda"
    ),
}


@dataclass(frozen=True)
class EncoderShape:
    """Images to the tokens of a vision model, which has only the blocks that are used."""

    config: Blip2VisionConfig | CLIPVisionConfig
    batch: int
    where: Where = "cpu"


def vit_l(layers: int) -> CLIPVisionConfig:
    """CLIP's ViT-L/14, with so many blocks."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )


_ENCODERS = {
    "vit_g": _VIT_G,
    "vit_l": vit_l(23),
    "vit_g_2_blocks": vision(1408, 2, 16, 224, 14),
    "vit_l_2_blocks": vit_l(2),
}
ENCODER_SHAPES = {
    "tiny": EncoderShape(_TINY_VISION, 3, where="test"),
    **{
        f"{name}_b{batch}": EncoderShape(config, batch)
        for name, config in _ENCODERS.items()
        for batch in (1, 4, 16)
    },
    **{f"vit_g_b{batch}_cuda": EncoderShape(_VIT_G, batch, where="cuda") for batch in (1, 32, 256)},
}


@dataclass(frozen=True)
class PictureShape:
    """JPEG files of one size, read in batches; and a feature cache of as many images."""

    width: int
    height: int
    count: int
    batch: int
    tokens: int = 257
    width_of_tokens: int = 1408
    where: Where = "cpu"


PICTURE_SHAPES = {
    "tiny": PictureShape(64, 48, 8, 4, 5, 12, where="test"),
    # the sizes of COCO's pictures, and of a telephone's
    "jpeg_640x480": PictureShape(640, 480, 32, 8),
    "jpeg_2048x1536": PictureShape(2048, 1536, 16, 8),
}


@dataclass(frozen=True)
class RunShape:
    """A training run: the Q-Former, and what is around it.

    Attributes:
        qformer: of stage 1, or of stage 2 with a language model.
        batch: B.
        steps: that are timed in a round, after those that are compared.
        image_tokens: of the cached features.
        vocabulary: of the captions, which are words of changing number.
        vision: the frozen encoder in the loop, which reads JPEG files; None: features are cached.
        language: the frozen language model; None: stage 1.
        workers: that read ahead; 0 is the default of a run.
        picture: width and height of the files.
        headline: As in `SelfShape`.
    """

    qformer: Stage1Config | Stage2Config
    batch: int
    steps: int
    image_tokens: int = 257
    vocabulary: int = 4096
    vision: Blip2VisionConfig | CLIPVisionConfig | None = None
    language: OPTConfig | None = None
    workers: int = 0
    picture: tuple[int, int] = (640, 480)
    headline: bool = False
    where: Where = "cpu"


def clip_vit_l(blocks: int, width: int = 1024) -> CLIPVisionConfig:
    """CLIP's ViT-L/14; its last block is not used."""
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks + 1,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )


# a third of the paper's width and of its layers, on tokens a quarter as wide
_SMALL_STAGE1 = Stage1Config(
    **NO_DROPOUT,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=1024,
    encoder_hidden_size=352,
)
_SMALL_STAGE2 = replace(SMALL_QFORMER, **NO_DROPOUT)
_TINY_STAGE1 = replace(
    SCENES, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
)
_TINY_STAGE2 = replace(TINY_QFORMER, **NO_DROPOUT)
CACHED_RUNS = {
    "tiny": RunShape(_TINY_STAGE1, 4, 2, image_tokens=5, vocabulary=64, where="test"),
    "small_b8": RunShape(_SMALL_STAGE1, 8, 5, headline=True),
    "vit_l_b8": RunShape(VIT_L, 8, 8, vocabulary=30_523),
    "vit_g_b8": RunShape(VIT_G, 8, 8, vocabulary=30_523, headline=True),
    "vit_g_b256_cuda": RunShape(
        VIT_G, 256, 20, vocabulary=30_523, workers=8, headline=True, where="cuda"
    ),
}
# the encoder's width is the real one; where its blocks are counted, the Q-Former is the small one
PICTURE_RUNS = {
    "tiny": RunShape(
        replace(_TINY_STAGE1, encoder_hidden_size=32),
        4,
        2,
        vocabulary=64,
        vision=vision(32, 1, 2, 16, 8),
        picture=(64, 48),
        workers=1,
        where="test",
    ),
    "tiny_clip": RunShape(
        replace(_TINY_STAGE1, encoder_hidden_size=32),
        4,
        2,
        vocabulary=64,
        vision=clip_vit_l(1, 32),
        picture=(64, 48),
        where="test",
    ),
    "vit_l_2_blocks_b4": RunShape(
        replace(_SMALL_STAGE1, encoder_hidden_size=1024), 4, 3, vision=clip_vit_l(2), workers=2
    ),
    "vit_g_2_blocks_b4": RunShape(
        replace(_SMALL_STAGE1, encoder_hidden_size=1408),
        4,
        3,
        vision=vision(1408, 2, 16, 224, 14),
        workers=2,
    ),
    "vit_l_b8": RunShape(
        VIT_L, 8, 3, vocabulary=30_523, vision=clip_vit_l(23), workers=2, headline=True
    ),
    "vit_g_b8": RunShape(VIT_G, 8, 3, vocabulary=30_523, vision=_VIT_G, workers=2),
    "vit_g_b128_cuda": RunShape(
        VIT_G, 128, 10, vocabulary=30_523, vision=_VIT_G, workers=14, headline=True, where="cuda"
    ),
}
STAGE2_RUNS = {
    "tiny": RunShape(
        _TINY_STAGE2,
        4,
        2,
        image_tokens=5,
        vocabulary=64,
        language=opt(32, 2, 2, vocab_size=64),
        where="test",
    ),
    "small_b8": RunShape(
        _SMALL_STAGE2, 8, 5, language=opt(512, 8, 8, vocab_size=4096), headline=True
    ),
    "opt_125m_b8": RunShape(
        replace(Stage2Config(), **NO_DROPOUT),
        8,
        5,
        vocabulary=50_272,
        language=opt(768, 12, 12),
        headline=True,
    ),
}
