"""Small random models and batches for the tests of stage 2."""

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
    T5Config,
)

from blip2fast.stage2 import Stage2Config

B, Q, T, V, IMAGE_TOKEN, PAD = 3, 4, 7, 41, 40, 1


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


def reference_model(kind, dtype=torch.float64):
    torch.manual_seed(0)
    vision = Blip2VisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        initializer_range=0.5,
    )
    qformer = Blip2QFormerConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=V,
        encoder_hidden_size=24,
        initializer_range=0.2,
    )
    config = Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=opt_config() if kind == "opt" else t5_config(),
        num_query_tokens=Q,
        image_token_index=IMAGE_TOKEN,
    )
    model = Blip2ForConditionalGeneration(config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():  # far from 0 and 1, to write varied text
        is_norm = parameter.dim() == 1 and not name.endswith("bias")
        std = 0.2 if parameter.dim() == 1 else 0.3
        if name.endswith(".q.weight"):  # T5 does not scale its scores
            std = 0.1
        torch.nn.init.normal_(parameter, 1.0 if is_norm else 0.0, std)
    return model.to(dtype).eval()


def text_batch():
    """[B, T] tokens of length 7, 4 and 2, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, IMAGE_TOKEN, (B, T), generator=generator)
    mask = (torch.arange(T) < torch.tensor([[7], [4], [2]])).long()
    return ids.masked_fill(mask == 0, PAD), mask


def images(dtype=torch.float64):
    return torch.randn(B, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=dtype)


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


def stage2_config(**changes):
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "encoder_hidden_size": 24,
        "num_query_tokens": Q,
    }
    return Stage2Config(**(sizes | changes))
