"""Converts stage-2 parameters and sizes from stage 1, and from and to transformers.

In transformers the model is BLIP-2, or InstructBLIP if the Q-Former is text-conditioned. Parameter
names match transformers', except `ln_vision`, which is `vision_model.post_layernorm` there.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from blip2fast._imports import needs
from blip2fast.frozen.cpu_inference import tokens_of
from blip2fast.stage2.config import Stage2Config

with needs("convert transformers' BLIP-2", "tokenizers"):
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerModel,
        Blip2VisionConfig,
        Blip2VisionModel,
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipQFormerModel,
        InstructBlipVisionConfig,
        InstructBlipVisionModel,
        PreTrainedConfig,
        PreTrainedModel,
    )

TransformersModel: TypeAlias = Blip2ForConditionalGeneration | InstructBlipForConditionalGeneration
VisionModel: TypeAlias = Blip2VisionModel | InstructBlipVisionModel
# name prefixes of the text branch: in a Q-Former with its own text embeddings, and in stage 1,
# where the embeddings are outside the Q-Former
_TEXT_BRANCH = {
    "qformer.embeddings.layernorm.": "qformer.layernorm.",
    "qformer.embeddings.": "embeddings.",
}


class VisionTokens(nn.Module):
    """transformers' BLIP-2 or InstructBLIP vision model up to its last norm, which stage 2 trains.

    Args:
        vision_model: Shared, not copied. Its `post_layernorm` is not used.
    """

    def __init__(self, vision_model: VisionModel) -> None:
        super().__init__()
        self.vision_model = vision_model

    def forward(self, images: Tensor) -> Tensor:
        """Tokens [B, S, E] of images [B, 3, h, w], before `ln_vision`."""
        width = int(self.vision_model.config.hidden_size)
        return tokens_of(self._encode, images, {}, 0, width)

    def _encode(self, images: Tensor) -> Any:
        hidden = self.vision_model.embeddings(images)
        return self.vision_model.encoder(inputs_embeds=hidden)


def trained_from_stage1(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a stage-1 state that stage 2 needs, under stage 2's names."""
    found = {}
    for name in wanted:
        new = next((new for new in _TEXT_BRANCH if name.startswith(new)), "")
        source = _TEXT_BRANCH.get(new, "") + name.removeprefix(new)
        # a stage-2 state dict already has stage 2's names
        source = source if source in state else name
        if source in state:
            found[name] = state[source]
    return found


def conditioned_names(name: str) -> str:
    """The name in a text-conditioned Q-Former of a stage-1 parameter."""
    for there, stage1 in _TEXT_BRANCH.items():
        if name.startswith(stage1):
            return there + name.removeprefix(stage1)
    return name


def stage1_names(name: str) -> str:
    """The name in stage 1 of a parameter of either stage."""
    for there, stage1 in _TEXT_BRANCH.items():
        if name.startswith(there):
            return stage1 + name.removeprefix(there)
    return name


def config_from_transformers(config: Blip2Config | InstructBlipConfig) -> Stage2Config:
    """The sizes of a transformers model.

    Raises:
        ValueError: a Q-Former that stage 2 does not support.
    """
    qformer, instructed = config.qformer_config, isinstance(config, InstructBlipConfig)
    for name, expected in (("use_qformer_text_input", False), ("hidden_act", "gelu")):
        if getattr(qformer, name, expected) != expected:
            raise ValueError(
                f"qformer_config.{name} is {getattr(qformer, name)!r}; stage 2 has {expected!r}"
            )
    own = Stage2Config.__dataclass_fields__.keys() & qformer.to_dict().keys()
    if not instructed:
        own -= {"vocab_size", "max_position_embeddings", "pad_token_id"}
    return Stage2Config(
        **{name: getattr(qformer, name) for name in own},
        num_query_tokens=config.num_query_tokens,
        ln_vision_eps=config.vision_config.layer_norm_eps,
        text_conditioned=instructed,
    )


def trained_from_transformers(model: TransformersModel) -> dict[str, Tensor]:
    """The trained part of a transformers model under stage 2's names."""
    trained = {"query_tokens": model.query_tokens.detach()}
    parts = {
        "ln_vision": model.vision_model.post_layernorm,
        "qformer": model.qformer,
        "language_projection": model.language_projection,
    }
    for part, module in parts.items():
        trained |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
    return trained


def trained_to_transformers(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`Blip2Stage2.trainable_state_dict()` under transformers' names, for its `load_state_dict`."""
    old, new = "ln_vision.", "vision_model.post_layernorm."
    return {
        new + name.removeprefix(old) if name.startswith(old) else name: value
        for name, value in trained.items()
    }


def first_tensor(trained: Mapping[str, Tensor], part: str) -> Tensor:
    """The first tensor of a part, for its dtype and device."""
    return next(value for name, value in trained.items() if name.startswith(f"{part}."))


def transformers_model(
    config: Stage2Config,
    language_model: PreTrainedModel,
    vision_model: VisionModel,
    trained: Mapping[str, Tensor],
    image_token_id: int,
) -> TransformersModel:
    """Build transformers' BLIP-2 or InstructBLIP from these parts.

    Args:
        config: Sizes.
        language_model: Shared, not copied.
        vision_model: Copied, with its last norm replaced by the trained one.
        trained: From `Blip2Stage2.trainable_state_dict`, copied.
        image_token_id: As in `Blip2Stage2.to_transformers`.

    Raises:
        ValueError: as `Blip2Stage2.to_transformers`.
    """
    trained = trained_to_transformers(trained)
    projection = trained["language_projection.weight"]
    whole_config = _transformers_config(
        config, language_model.config, vision_model, len(projection), image_token_id
    )
    instructed = config.text_conditioned
    # the submodules are replaced below; on meta, so that no second language model is allocated
    with torch.device("meta"):
        whole: TransformersModel = (
            InstructBlipForConditionalGeneration(whole_config)
            if instructed
            else Blip2ForConditionalGeneration(whole_config)
        )
    vision = InstructBlipVisionModel if instructed else Blip2VisionModel
    whole.vision_model = vision(whole_config.vision_config)
    whole.vision_model.load_state_dict(vision_model.state_dict())
    whole.vision_model.post_layernorm.eps = config.ln_vision_eps
    qformer = InstructBlipQFormerModel if instructed else Blip2QFormerModel
    whole.qformer = qformer(whole_config.qformer_config)
    whole.language_projection = nn.Linear(*projection.shape[::-1])
    whole.query_tokens = nn.Parameter(trained["query_tokens"].clone())
    for name in ("qformer", "language_projection"):
        whole.get_submodule(name).to(first_tensor(trained, name))
    whole.vision_model.to(next(vision_model.parameters()))
    whole.language_model = language_model
    whole.load_state_dict(trained, strict=False)
    return whole.eval()


def _transformers_config(
    sizes: Stage2Config, text: Any, vision_model: VisionModel, width: int, image_token_id: int
) -> Blip2Config | InstructBlipConfig:
    """transformers' configuration of the whole model.

    Args:
        text: The language model's configuration.
        width: Width of the language model's embeddings.
    """
    if sizes.llm_activation is not None:
        text = copy.deepcopy(text)
        text.dense_act_fn = sizes.llm_activation
    if vision_model.config.hidden_size != sizes.encoder_hidden_size:
        raise ValueError(
            f"vision_model has width {vision_model.config.hidden_size}, this model reads tokens "
            f"of width {sizes.encoder_hidden_size} (encoder_hidden_size)"
        )
    if text.hidden_size != width:
        raise ValueError(
            f"the language model embeds in {width} and has hidden_size {text.hidden_size}; "
            "transformers' BLIP-2 needs them equal"
        )
    if not 0 <= image_token_id < text.vocab_size:
        raise ValueError(
            f"image_token_id is {image_token_id}, the language model has tokens 0 to "
            f"{text.vocab_size - 1}; resize its embeddings to add one"
        )
    if vision_model.config.layer_norm_eps != sizes.ln_vision_eps:
        warnings.warn(
            f"ln_vision_eps is {sizes.ln_vision_eps}, the vision model's layer_norm_eps is "
            f"{vision_model.config.layer_norm_eps}: transformers saves one for both, so the model "
            "will differ slightly once saved and loaded",
            stacklevel=3,
        )
    whole, vision = Blip2Config, Blip2VisionConfig
    if sizes.text_conditioned:
        whole, vision = InstructBlipConfig, InstructBlipVisionConfig
    same_kind = isinstance(vision_model.config, vision)
    return whole(
        vision_config=vision_model.config if same_kind else vision(**_fields(vision_model, vision)),
        qformer_config=sizes.qformer_config(),
        text_config=text,
        num_query_tokens=sizes.num_query_tokens,
        image_token_index=image_token_id,
    )


def _fields(vision_model: VisionModel, kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields of a vision config, to build the other of BLIP-2's and InstructBLIP's classes."""
    known = kind().to_dict().keys() - {"model_type", "transformers_version", "architectures"}
    return {name: v for name, v in vision_model.config.to_dict().items() if name in known}
