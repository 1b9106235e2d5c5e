"""A whole small run on disk: records, feature caches, tokenizers, a small OPT, configurations."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.records import CaptionRecord, QuestionRecord, write_records
from blip2fast.training.config import RunConfig
from blip2fast.training.config_files import parse_config
from blip2fast.training.log import read_metrics

COLOURS = ("red", "blue", "green", "black")
THINGS = ("ring", "star", "cross", "disc")
WORDS = ("a", "what", "is", "it", *COLOURS, *THINGS)
NUM_TOKENS, WIDTH = 5, 12
MEASURED = ("seconds_per_step", "samples_per_second", "data_wait_share", "peak_memory_gib")


def word_tokenizer(special: dict[str, str], template: str) -> PreTrainedTokenizerFast:
    names = list(dict.fromkeys(special.values()))
    vocabulary = {word: i for i, word in enumerate([*names, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    used = [name for name in names if name in template]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, vocabulary[name]) for name in used]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def small_opt(tokenizer: PreTrainedTokenizerFast) -> OPTForCausalLM:
    torch.manual_seed(7)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        word_embed_proj_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=96,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return OPTForCausalLM(config)


def small_t5(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    torch.manual_seed(8)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


def write_world(folder: Path) -> Path:
    """Records, caches, tokenizers and two language models under `folder`."""
    draw = random.Random(0)
    qformer = word_tokenizer(
        {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "bos_token": "[DEC]",
        },
        "[CLS] $A [SEP]",
    )
    qformer.save_pretrained(folder / "qformer_tokenizer")
    language = word_tokenizer(
        {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "</s>", "eos_token": "</s>"},
        "</s> $A",
    )
    language.save_pretrained(folder / "opt")
    small_opt(language).save_pretrained(folder / "opt")
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    translator = word_tokenizer(special, "$A </s>")
    translator.save_pretrained(folder / "t5")
    small_t5(translator).save_pretrained(folder / "t5")
    # What an image shows is written into its features, so that there is something to learn.
    codes = torch.randn(len(WORDS), NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    for split, count in (("train", 22), ("eval", 8)):
        seen = [(draw.choice(COLOURS), draw.choice(THINGS)) for _ in range(count)]
        keys = [f"{split}{i}" for i in range(count)]
        write_records(
            folder / f"{split}.jsonl",
            [
                CaptionRecord(k, (f"a {c} {t}", f"it is a {c} {t}"))
                for k, (c, t) in zip(keys, seen, strict=True)
            ],
        )
        write_records(
            folder / f"{split}_questions.jsonl",
            [
                QuestionRecord(k, "what is it", f"a {c} {t}")
                for k, (c, t) in zip(keys, seen, strict=True)
            ],
        )
        features = torch.stack([codes[WORDS.index(c)] + codes[WORDS.index(t)] for c, t in seen])
        with FeatureCache.create(
            folder / f"{split}_features", keys, NUM_TOKENS, WIDTH, encoder_id="codes"
        ) as writer:
            writer.write(0, features)
    return folder


def values(world: Path, output: Path, stage: int = 1, **changes: Any) -> dict[str, Any]:
    """The keys of a run on `world`; `changes` are top-level, sections are merged."""
    base: dict[str, Any] = {
        "stage": stage,
        "output_dir": str(output),
        "precision": "fp32",
        "zero_stage": 0,
        "log_every": 1,
        "eval_batch_size": 4,
        "model": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "num_query_tokens": 3,
            "max_position_embeddings": 16,
            # 0.02 makes all features of so small a model alike, and their gradients mere rounding
            "initializer_range": 0.25,
        },
        "data": {
            "records": str(world / "train.jsonl"),
            "features": str(world / "train_features"),
            "eval_records": str(world / "eval.jsonl"),
            "eval_features": str(world / "eval_features"),
            "max_txt_len": 12,
        },
        "optim": {"max_steps": 6, "batch_size": 4, "warmup_steps": 2, "lr": 1e-2, "min_lr": 1e-3},
    }
    if stage == 1:
        base["model"] |= {"tokenizer": str(world / "qformer_tokenizer"), "embed_dim": 8}
    else:
        base["language_model"] = {"path": str(world / "opt")}
    for name, change in changes.items():
        base[name] = base[name] | change if isinstance(base.get(name), dict) else change
    return base


def config(world: Path, output: Path, stage: int = 1, **changes: Any) -> RunConfig:
    """As `values`, checked."""
    return parse_config(values(world, output, stage, **changes))


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The trained parameters that a run left."""
    return load_file(run / "model.safetensors")


def timeless(run: Path) -> list[dict[str, Any]]:
    """The log of a run without what is measured: times and memory."""
    return [
        {name: value for name, value in line.items() if name not in MEASURED}
        for line in read_metrics(run)
    ]


def distance(run: Path, reference: Path) -> float:
    """Norm of the difference of all weights over their norm, key biases left out.

    AdamW divides a gradient by its own size, so where it is zero up to rounding (key biases) the
    rounding alone decides.
    """
    expected, found = (
        {name: value for name, value in weights(folder).items() if not name.endswith("key.bias")}
        for folder in (reference, run)
    )
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in expected.items()}
    apart = sum((found[name] - value).square().sum() for name, value in expected.items())
    return float((apart / sum(value.square().sum() for value in expected.values())).sqrt())


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def be_one_of_two(rank: int, port: int) -> None:
    """What a launcher of two processes sets in this one, and one thread."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
