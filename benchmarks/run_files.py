"""What real runs read, made up: captions, features, JPEG files, tokenizers and frozen models.

Weights and words are random. Sizes, lengths and formats are those of real runs, and so is the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from shapes import RunShape
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.records import CaptionRecord, write_records
from blip2fast.training.config import RunConfig
from blip2fast.training.config_files import parse_config

QFORMER_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]")
LANGUAGE_WORDS = ("<s>", "<pad>", "</s>", "<unk>")  # the ids of OPT
# so many words a caption has on average, as COCO's captions do, and at least and at most
MEAN_WORDS, LEAST_WORDS, MOST_WORDS = 10.5, 6, 28


def write_pictures(folder: Path, count: int, width: int, height: int) -> list[str]:
    """JPEGs of smooth noise, which compress as photographs do; their names."""
    draws = np.random.default_rng(0)
    names = []
    for number in range(count):
        small = draws.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        names.append(f"{number:03d}.jpg")
        image.save(folder / names[-1], quality=90)
    return names


def make_captions(count: int, vocabulary: int) -> list[str]:
    """Texts of words `w0`, `w1`, ..., frequent ones first; their lengths vary as those of COCO."""
    draws = np.random.default_rng(1)
    spread = draws.poisson(MEAN_WORDS - LEAST_WORDS, count)
    lengths = np.minimum(LEAST_WORDS + spread, MOST_WORDS)
    often = 1 / np.arange(1, vocabulary + 1)
    words = draws.choice(vocabulary, int(lengths.sum()), p=often / often.sum())
    ends = np.cumsum(lengths)[:-1]
    return [" ".join(f"w{n}" for n in some) for some in np.split(words, ends)]


def make_tokenizer(
    special: Sequence[str], size: int, template: str, last: Sequence[str] = (), **names: str
) -> PreTrainedTokenizerFast:
    """Words to numbers: the special ones, `w0` and on, and what comes last."""
    words = [*special, *(f"w{n}" for n in range(size - len(special) - len(last))), *last]
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=names["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    used = [(name, numbers[name]) for name in special if name in template.split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def qformer_words(size: int) -> PreTrainedTokenizerFast:
    """As BERT's with BLIP-2's [DEC]."""
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    names |= {"sep_token": "[SEP]", "bos_token": "[DEC]"}
    return make_tokenizer(QFORMER_WORDS, size, "[CLS] $A [SEP]", **names)


def language_words(size: int, last: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """As OPT's: texts begin with </s>."""
    names = {"pad_token": "<pad>", "unk_token": "<unk>"}
    names |= {"bos_token": "</s>", "eos_token": "</s>"}
    return make_tokenizer(LANGUAGE_WORDS, size, "</s> $A", last, **names)


@dataclass(frozen=True)
class RunFiles:
    """What a run and its rival read.

    Attributes:
        folder: of everything.
        keys, captions: of each pair.
    """

    folder: Path
    keys: list[str]
    captions: list[str]

    @property
    def images(self) -> Path:
        """The JPEG files."""
        return self.folder / "images"

    @property
    def tensors(self) -> Path:
        """Features as a tensor a file, which the rival reads."""
        return self.folder / "tensors"

    @property
    def encoder(self) -> Path:
        """The frozen image encoder, as transformers saves it."""
        return self.folder / "encoder"

    @property
    def words(self) -> Path:
        """The tokenizer of the captions, and in stage 2 its language model."""
        return self.folder / "words"

    def tensor(self, key: str) -> Path:
        """The rival's features of an image."""
        return self.tensors / f"{Path(key).stem}.pt"


def write_files(folder: Path, shape: RunShape, count: int) -> RunFiles:
    """Write what `count` pairs need."""
    files = RunFiles(folder, [], make_captions(count, shape.vocabulary - len(QFORMER_WORDS)))
    if shape.vision is None:
        files.keys.extend(f"{number:05d}" for number in range(count))
        _write_features(files, shape)
    else:
        files.images.mkdir()
        files.keys.extend(write_pictures(files.images, count, *shape.picture))
        _write_encoder(files, shape.vision)
    if shape.language is None:
        qformer_words(shape.vocabulary).save_pretrained(files.words)
    else:
        language_words(shape.vocabulary).save_pretrained(files.words)
        torch.manual_seed(2)
        OPTForCausalLM(shape.language).save_pretrained(files.words)
    records = [
        CaptionRecord(key, (text,)) for key, text in zip(files.keys, files.captions, strict=True)
    ]
    write_records(folder / "captions.jsonl", records)
    return files


def _write_features(files: RunFiles, shape: RunShape) -> None:
    """The same numbers as a cache and as a tensor a file, both in bf16."""
    files.tensors.mkdir()
    draws = torch.Generator().manual_seed(0)
    width = shape.qformer.encoder_hidden_size
    cache = files.folder / "cache"
    with FeatureCache.create(cache, files.keys, shape.image_tokens, width, "bfloat16") as writer:
        for row, key in enumerate(files.keys):
            tokens = torch.randn(shape.image_tokens, width, generator=draws)
            writer.write(row, tokens[None])
            torch.save(tokens.bfloat16(), files.tensor(key))


def _write_encoder(files: RunFiles, config: Any) -> None:
    torch.manual_seed(3)
    kind: Any = CLIPVisionModel if isinstance(config, CLIPVisionConfig) else Blip2VisionModel
    kind(config).save_pretrained(files.encoder)


def run_config(
    shape: RunShape, files: RunFiles, output: Path, dtype: torch.dtype, kernels: str
) -> RunConfig:
    """The configuration of a run, as its YAML file would have it."""
    qformer = shape.qformer
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes += ("num_query_tokens", "cross_attention_frequency")
    model: dict[str, Any] = {name: getattr(qformer, name) for name in sizes} | {"dropout": 0.0}
    data: dict[str, Any] = {"records": str(files.folder / "captions.jsonl")}
    if shape.vision is None:
        data["features"] = str(files.folder / "cache")
    else:
        data |= {"images": str(files.images), "image_encoder": str(files.encoder)}
        # without random crops, so that the rival trains on the same pixels
        data |= {"augment": False, "workers": shape.workers}
    optim = {"max_steps": 100_000, "batch_size": shape.batch, "warmup_steps": 10, "clip_norm": 0}
    values: dict[str, Any] = {
        "stage": 1 if shape.language is None else 2,
        "output_dir": str(output),
        "precision": "fp32" if dtype == torch.float32 else "bf16",
        "kernels": kernels,
        "log_every": shape.steps,
        "model": model,
        "data": data,
        "optim": optim,
    }
    if shape.language is None:
        model |= {"tokenizer": str(files.words), "embed_dim": qformer.embed_dim}
    else:
        values["language_model"] = {"path": str(files.words)}
    return parse_config(values)
