"""Small random models and batches for the tests of stage 2."""

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
)

from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.model import Stage2Config

B, Q, T, V, IMAGE_TOKEN, PAD = 3, 4, 7, 41, 40, 1
SIZE = 16  # of images, in pixels
WORDS = 29  # of an InstructBLIP's Q-Former
QFORMER_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "encoder_hidden_size": 24,
}


def opt_config(**changes):
    sizes = {
        "vocab_size": V,
        "hidden_size": 20,
        "word_embed_proj_dim": 20,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "dropout": 0.1,
        "pad_token_id": PAD,
    }
    return OPTConfig(**(sizes | changes))


def t5_config(**changes):
    sizes = {
        "vocab_size": V,
        "d_model": 20,
        "d_kv": 10,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.1,
        "decoder_start_token_id": 0,
        "feed_forward_proj": "gated-gelu",
    }
    return T5Config(**(sizes | changes))


def opt_model(**changes):
    torch.manual_seed(2)
    return OPTForCausalLM(opt_config(**changes))


def spread_weights(model, seed):
    """Weights so far from 0 and 1 that a random model writes varied texts."""
    draws = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        is_norm = parameter.dim() == 1 and not name.endswith("bias")
        std = 0.2 if parameter.dim() == 1 else 0.3
        if name.endswith(".q.weight"):  # T5 does not scale its scores
            std = 0.1
        value = torch.randn(parameter.shape, generator=draws) * std + float(is_norm)
        parameter.data.copy_(value)


def transformers_model(language, instruct=False, image_token=IMAGE_TOKEN, seed=0, **qformer):
    """transformers' BLIP-2, or InstructBLIP, with random weights; `qformer`: its own sizes."""
    vision = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 8,
    }
    sizes = QFORMER_SIZES | {"num_hidden_layers": 3, "vocab_size": V} | qformer
    config = (InstructBlipConfig if instruct else Blip2Config)(
        vision_config=vision,
        qformer_config=sizes,
        text_config=language,
        num_query_tokens=Q,
        image_token_index=image_token,
    )
    whole = InstructBlipForConditionalGeneration if instruct else Blip2ForConditionalGeneration
    model = whole(config)
    spread_weights(model, seed)
    return model


def text_config(kind):
    return opt_config() if kind == "opt" else t5_config()


def reference_model(kind, dtype=torch.float64):
    return transformers_model(text_config(kind)).to(dtype).eval()


def instruct_model(kind, dtype=torch.float64):
    sizes = {"vocab_size": WORDS, "max_position_embeddings": 12}
    return transformers_model(text_config(kind), instruct=True, **sizes).to(dtype).eval()


def text_batch():
    """[B, T] tokens of length 7, 4 and 2, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, IMAGE_TOKEN, (B, T), generator=generator)
    mask = (torch.arange(T) < torch.tensor([[7], [4], [2]])).long()
    return ids.masked_fill(mask == 0, PAD), mask


def images(dtype=torch.float64):
    return torch.randn(B, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2), dtype=dtype)


def with_placeholders(ids, mask):
    """What transformers' BLIP-2 reads: one image token for each soft prompt, then the text."""
    places = ids.new_full((len(ids), Q), IMAGE_TOKEN)
    return {
        "input_ids": torch.cat([places, ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(places), mask], dim=1),
    }


def batches(kind):
    """The same batch for transformers and for stage 2."""
    ids, mask = text_batch()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100 if kind == "opt" else labels[:, 0]  # a prompt of one token
    ours = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    theirs = with_placeholders(ids, mask)
    ignored = labels.new_full((B, Q), -100)
    theirs["labels"] = torch.cat([ignored, labels], dim=1) if kind == "opt" else labels
    return ours, theirs


def stage1_model(**changes):
    sizes = {"num_query_tokens": Q, "vocab_size": 50, "bos_token_id": 49, "embed_dim": 8}
    torch.manual_seed(1)
    return Blip2Stage1(Stage1Config(**(QFORMER_SIZES | sizes | changes)))


def stage2_config(**changes):
    return Stage2Config(**(QFORMER_SIZES | {"num_query_tokens": Q} | changes))
