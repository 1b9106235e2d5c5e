"""Small random transformers models that hold a Q-Former, each with inputs that reach all of it."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

Inputs = dict[str, Any]

IMAGE_TOKEN = 39
NUM_QUERIES = 4
QFORMER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "encoder_hidden_size": 24,
    "max_position_embeddings": 32,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
LANGUAGE = {
    "model_type": "opt",
    "vocab_size": 40,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "num_hidden_layers": 1,
    "ffn_dim": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def spread_parameters(model: nn.Module, seed: int = 0) -> None:
    """Draws every parameter at a size where attention differs from a mean and no bias is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            norm = name.lower().endswith(("norm.weight", "norm1.weight", "norm2.weight"))
            parameter.copy_(noise + 1 if norm else noise)


def _text() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 38, (2, 5), generator=generator)
    return ids, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def _after_placeholders(count: int) -> Inputs:
    """Text ids behind `count` image tokens, as the processors write them."""
    ids, mask = _text()
    placeholders = torch.full((2, count), IMAGE_TOKEN)
    return {
        "input_ids": torch.cat([placeholders, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(placeholders), mask], 1),
    }


def _pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _blip2(name: str, inputs: Inputs, text: bool = False) -> tuple[PreTrainedModel, Inputs]:
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER | {"use_qformer_text_input": text},
        text_config=LANGUAGE,
        num_query_tokens=NUM_QUERIES,
        image_token_index=IMAGE_TOKEN,
        image_text_hidden_size=12,
    )
    return getattr(transformers, name)(config), inputs


def _blip2_generative(name: str) -> tuple[PreTrainedModel, Inputs]:
    images = {"pixel_values": _pixels(2, 3, 12, 12)}
    return _blip2(name, images | _after_placeholders(NUM_QUERIES))


def _blip2_retrieval(match: bool) -> tuple[PreTrainedModel, Inputs]:
    inputs = {"pixel_values": _pixels(2, 3, 12, 12), "use_image_text_matching_head": match}
    inputs |= _after_placeholders(NUM_QUERIES)
    return _blip2("Blip2ForImageTextRetrieval", inputs, text=True)


def _blip2_text() -> tuple[PreTrainedModel, Inputs]:
    ids, mask = _text()
    inputs = {"input_ids": ids, "attention_mask": mask}
    return _blip2("Blip2TextModelWithProjection", inputs, text=True)


def _instruct(name: str, frames: int = 1) -> tuple[PreTrainedModel, Inputs]:
    video = name.startswith("InstructBlipVideo")
    family = "InstructBlipVideo" if video else "InstructBlip"
    config = getattr(transformers, f"{family}Config")(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=LANGUAGE,
        num_query_tokens=NUM_QUERIES,
        **{"video_token_index" if video else "image_token_index": IMAGE_TOKEN},
    )
    ids, mask = _text()
    shape = (2, frames, 3, 12, 12) if video else (2, 3, 12, 12)
    inputs = _after_placeholders(NUM_QUERIES * frames) | {
        "pixel_values": _pixels(*shape),
        "qformer_input_ids": ids,
        "qformer_attention_mask": mask,
    }
    return getattr(transformers, name)(config), inputs


def _granite_speech(family: str) -> tuple[PreTrainedModel, Inputs]:
    plus = family == "GraniteSpeechPlus"
    encoder = getattr(transformers, f"{family}EncoderConfig")(
        input_dim=8,
        num_layers=2,
        hidden_dim=24,
        feedforward_mult=2,
        num_heads=2,
        output_dim=8,
        context_size=6,
        max_pos_emb=16,
        conv_kernel_size=3,
        **({"cat_hidden_layers": [0]} if plus else {}),
    )
    text = transformers.GraniteConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
    )
    projector = {"model_type": "blip_2_qformer", "encoder_hidden_size": 48 if plus else 24}
    config = getattr(transformers, f"{family}Config")(
        text_config=text.to_dict(),
        encoder_config=encoder.to_dict(),
        projector_config=QFORMER | projector,
        has_lora_adapter=False,
        audio_token_index=IMAGE_TOKEN,
        # one window of 15 frames yields 3 queries: batch 1 of queries meets 4 windows
        downsample_rate=5,
        window_size=15,
    )
    inputs = _after_placeholders(6) | {
        "input_features": _pixels(2, 20, 8),
        "input_features_mask": torch.ones(2, 6, dtype=torch.bool),
    }
    return getattr(transformers, f"{family}ForConditionalGeneration")(config), inputs


def _granite_vision() -> tuple[PreTrainedModel, Inputs]:
    vision = VISION | {"model_type": "clip_vision_model", "hidden_size": 64, "image_size": 16}
    text = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    qformer = {
        "model_type": "blip_2_qformer",
        "hidden_size": 64,
        "encoder_hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "cross_attention_frequency": 1,
    }
    config = transformers.Granite4VisionConfig(
        vision_config=vision | {"num_hidden_layers": 2},
        text_config=text,
        qformer_config=qformer,
        image_token_index=IMAGE_TOKEN,
        downsample_rate="2/4",  # windows of 16 tokens and 4 queries
        deepstack_layer_map=[[-1, 0]],
        spatial_target_layers=[0, 0, 1, 1],
        image_grid_pinpoints=[[16, 16]],
        image_seq_length=4,
    )
    ids, _ = _text()
    inputs = {
        "input_ids": torch.cat([torch.full((1, 10), IMAGE_TOKEN), ids[:1]], 1),
        "pixel_values": _pixels(1, 2, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 16]]),
    }
    return transformers.Granite4VisionForConditionalGeneration(config), inputs


HOLDERS: dict[str, Callable[[], tuple[PreTrainedModel, Inputs]]] = {
    "Blip2Model": lambda: _blip2_generative("Blip2Model"),
    "Blip2ForConditionalGeneration": lambda: _blip2_generative("Blip2ForConditionalGeneration"),
    "Blip2ForImageTextRetrieval, match": lambda: _blip2_retrieval(match=True),
    "Blip2ForImageTextRetrieval, contrast": lambda: _blip2_retrieval(match=False),
    "Blip2TextModelWithProjection": _blip2_text,
    "Blip2VisionModelWithProjection": lambda: _blip2(
        "Blip2VisionModelWithProjection", {"pixel_values": _pixels(2, 3, 12, 12)}
    ),
    "InstructBlipModel": lambda: _instruct("InstructBlipModel"),
    "InstructBlipForConditionalGeneration": lambda: _instruct(
        "InstructBlipForConditionalGeneration"
    ),
    "InstructBlipVideoModel": lambda: _instruct("InstructBlipVideoModel", frames=2),
    "InstructBlipVideoForConditionalGeneration": lambda: _instruct(
        "InstructBlipVideoForConditionalGeneration", frames=2
    ),
    "GraniteSpeechForConditionalGeneration": lambda: _granite_speech("GraniteSpeech"),
    "GraniteSpeechPlusForConditionalGeneration": lambda: _granite_speech("GraniteSpeechPlus"),
    "Granite4VisionForConditionalGeneration": _granite_vision,
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Inputs]:
    """The holder `name` in evaluation mode, and keyword arguments for its `forward`."""
    model, inputs = HOLDERS[name]()
    spread_parameters(model)
    inputs = {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    return model.eval().to(dtype), inputs


def tensors_in(output: Any) -> list[Tensor]:
    """Every floating-point tensor in a model's output, in order, nested outputs included."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for item in output for tensor in tensors_in(item)]
    return []


def run_with_gradients(
    model: nn.Module, inputs: Inputs, seed: int = 3
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs, and gradients of a random sum of all of them by every parameter and float input."""
    leaves = {
        key: value.clone().requires_grad_()
        for key, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    outputs = tensors_in(model(**inputs | leaves))
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        (output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum()
        for output in outputs
        if output.requires_grad
    )
    wanted = dict(model.named_parameters()) | leaves
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return [output.detach() for output in outputs], dict(zip(wanted, gradients, strict=True))


def assert_same_run(
    expected: tuple[list[Tensor], dict[str, Tensor | None]],
    actual: tuple[list[Tensor], dict[str, Tensor | None]],
    tolerance: float,
) -> None:
    """Outputs and gradients agree to `tolerance` of each tensor's largest entry."""
    assert len(expected[0]) == len(actual[0]) > 0
    for index, (want, got) in enumerate(zip(expected[0], actual[0], strict=True)):
        assert_near(want, got, tolerance, f"output {index}")
    assert expected[1].keys() == actual[1].keys()
    for name, want_gradient in expected[1].items():
        got_gradient = actual[1][name]
        assert (want_gradient is None) == (got_gradient is None), name
        if want_gradient is not None and got_gradient is not None:
            # a key's bias has no gradient in exact arithmetic: judge its noise by its weight's size
            weight = expected[1].get(name.removesuffix("bias") + "weight")
            floor = 0.0 if weight is None else float(weight.abs().max())
            assert_near(want_gradient, got_gradient, tolerance, f"gradient of {name}", floor)


def assert_near(
    expected: Tensor, actual: Tensor, tolerance: float, name: str, floor: float = 0.0
) -> None:
    """`actual` is `expected` to `tolerance` of its largest entry (at least `floor`)."""
    assert expected.shape == actual.shape, name
    assert expected.dtype == actual.dtype, name
    scale = max(float(expected.detach().abs().max()), floor) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual, expected, rtol=0.0, atol=tolerance * scale, msg=lambda text: f"{name}: {text}"
    )
