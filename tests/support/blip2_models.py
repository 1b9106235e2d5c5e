"""Small random BLIP-2 models on disk: runs of blip2fast, and folders of transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from stage2_models import (
    SIZE,
    Q,
    opt_config,
    spread_weights,
    stage2_config,
    t5_config,
    transformers_model,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Blip2Processor,
    BlipImageProcessorPil,
    InstructBlipProcessor,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from blip2fast.checkpoints.trained import Description, save_model
from blip2fast.frozen.image_encoders import load_image_encoder
from blip2fast.stage2.model import Blip2Stage2

NUM_QUERIES = Q
SPECIAL = ["</s>", "<pad>", "<unk>", "<image>"]
TEXT = """a photo of Question Short Answer answer question : ? . what is it its colour and where
red blue green black ring star cross disc top left right bottom the on with dog cat"""
WORDS = TEXT.split()
VOCABULARY = len(SPECIAL) + len(WORDS)


def word_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Words to numbers; OPT's texts begin with </s>, T5's end with it."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A" if kind == "opt" else "$A </s>", special_tokens=[("</s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>" if kind == "opt" else None,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def language_config(kind: str, **changes: int):
    ids = {"vocab_size": VOCABULARY, "eos_token_id": 0, "pad_token_id": 1}
    if kind == "opt":
        sizes = {"bos_token_id": 0, "max_position_embeddings": 96} | changes
        return opt_config(**(ids | sizes))
    return t5_config(**(ids | {"decoder_start_token_id": 1} | changes))


def qformer_words() -> PreTrainedTokenizerFast:
    """The Q-Former's tokenizer: [CLS] words [SEP]."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **names)


def write_run(
    folder: Path, kind: str, prompt: str = "", conditioned: bool = False, **changes: int
) -> Path:
    """A finished stage-2 run with its frozen models beside it."""
    language = folder / "language"
    if kind == "opt":
        language_model = OPTForCausalLM(language_config(kind, **changes))
    else:
        language_model = T5ForConditionalGeneration(language_config(kind, **changes))
    spread_weights(language_model, 1)
    language_model.tie_weights()
    language_model.save_pretrained(language)
    word_tokenizer(kind).save_pretrained(language)
    vision = ViTModel(
        ViTConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=8,
        ),
        add_pooling_layer=False,
    )
    spread_weights(vision, 2)
    vision.save_pretrained(folder / "vision")
    encoder = load_image_encoder(str(folder / "vision"), layer=1)
    torch.manual_seed(0)
    config = stage2_config(prompt=prompt, text_conditioned=conditioned, vocab_size=64)
    model = Blip2Stage2(config, language_model)
    qformer_words().save_pretrained(folder / "words")
    for name, child in model.named_children():
        if name != "language_model":
            spread_weights(child, 3)
    description = Description(
        stage=2,
        sizes=dataclasses.asdict(model.config),
        image_encoder=encoder.encoder_id,
        language_model=str(language),
        tokenizer=str(folder / "words") if conditioned else None,
    )
    save_model(folder / "run", model.trainable_state_dict(), description)
    return folder / "run"


def write_transformers(folder: Path, kind: str, instruct: bool = False) -> Path:
    """A transformers BLIP-2, or InstructBLIP, with its processor."""
    model = transformers_model(
        language_config(kind),
        instruct,
        image_token=SPECIAL.index("<image>"),
        seed={"opt": 4, "t5": 7}[kind],
        num_hidden_layers=2,
        vocab_size=64,
    )
    model.language_model.tie_weights()
    model.save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    if instruct:
        processor = InstructBlipProcessor(
            images, word_tokenizer(kind), qformer_words(), num_query_tokens=NUM_QUERIES
        )
    else:
        processor = Blip2Processor(images, word_tokenizer(kind), num_query_tokens=NUM_QUERIES)
    processor.save_pretrained(folder)
    return folder


def pictures(count: int) -> list[Image.Image]:
    """Random pictures, larger than the encoder takes and not square."""
    draws = np.random.default_rng(5)
    return [Image.fromarray(draws.integers(0, 256, (20, 24, 3), np.uint8)) for _ in range(count)]
