"""Stage 2 from stage 1, and to and from transformers' BLIP-2 and (text-conditioned) InstructBLIP.

The parameter names are transformers', but for `ln_vision`: there it is inside the vision model, as
`vision_model.post_layernorm`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
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

from blip2fast.qformer.checks import check_state
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.config import Stage2Config

if TYPE_CHECKING:
    from blip2fast.stage2.model import Blip2Stage2


TransformersModel: TypeAlias = Blip2ForConditionalGeneration | InstructBlipForConditionalGeneration
VisionModel: TypeAlias = Blip2VisionModel | InstructBlipVisionModel
# names in stage 1, where the text embeddings are outside the Q-Former, and in a Q-Former that has
# its own
_TEXT_BRANCH = {
    "qformer.embeddings.layernorm.": "qformer.layernorm.",
    "qformer.embeddings.": "embeddings.",
}


class VisionTokens(nn.Module):
    """transformers' BLIP-2 or InstructBLIP vision model up to its last norm, which stage 2 trains.

    Args:
        vision_model: Shared, not copied. Its `post_layernorm` stays where it is and is not used.
    """

    def __init__(self, vision_model: VisionModel) -> None:
        super().__init__()
        self.vision_model = vision_model

    def forward(self, images: Tensor) -> Tensor:
        """Tokens [B, S, E] of images [B, 3, h, w], before `ln_vision`."""
        hidden = self.vision_model.embeddings(images)
        return self.vision_model.encoder(inputs_embeds=hidden).last_hidden_state


def from_stage1(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a stage-1 state has of the tensors `wanted`, under stage 2's names."""
    found = {}
    for name in wanted:
        new = next((new for new in _TEXT_BRANCH if name.startswith(new)), "")
        source = _TEXT_BRANCH.get(new, "") + name.removeprefix(new)
        # a stage-2 state, of which the projection alone is not wanted, has stage 2's names
        source = source if source in state else name
        if source in state:
            found[name] = state[source]
    return found


def start_from_stage1(
    kind: type[Blip2Stage2],
    stage1: Blip2Stage1 | Mapping[str, Tensor],
    language_model: PreTrainedModel,
    config: Stage2Config | None,
    image_encoder: nn.Module | None,
) -> Blip2Stage2:
    """See `Blip2Stage2.from_stage1`."""
    if isinstance(stage1, Blip2Stage1):
        config = config or Stage2Config.from_stage1(stage1.config)
        image_encoder = image_encoder or stage1.image_encoder
        stage1 = stage1.state_dict()
    elif config is None:
        raise ValueError("a stage-1 state dict does not tell all sizes; pass config=...")
    model = kind(config, language_model, image_encoder)
    wanted = {
        name: value
        for name, value in model.trainable_state_dict().items()
        if not name.startswith("language_projection.")
    }
    state = from_stage1(stage1, wanted)
    check_state("stage-1 state", state, wanted)
    model.load_state_dict(state, strict=False)
    return model


def config_from_transformers(config: Blip2Config | InstructBlipConfig) -> Stage2Config:
    """The sizes of a transformers model.

    Raises:
        ValueError: a Q-Former that stage 2 does not build.
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


def from_transformers(kind: type[Blip2Stage2], model: TransformersModel) -> Blip2Stage2:
    """See `Blip2Stage2.from_transformers`."""
    stage2 = kind(
        config_from_transformers(model.config),
        model.language_model,
        VisionTokens(model.vision_model),
    )
    trained = trained_from_transformers(model)
    for name in ("ln_vision", "qformer", "language_projection"):
        stage2.get_submodule(name).to(first_tensor(trained, name))
    stage2.query_tokens.data = stage2.query_tokens.data.to(trained["query_tokens"])
    stage2.load_trainable_state_dict(trained)
    return stage2


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
    """Any tensor of a part, for its type and device."""
    return next(value for name, value in trained.items() if name.startswith(f"{part}."))


def to_transformers(
    model: Blip2Stage2, image_token_id: int, vision_model: VisionModel | None
) -> TransformersModel:
    """See `Blip2Stage2.to_transformers`."""
    if vision_model is None and isinstance(model.image_encoder, VisionTokens):
        vision_model = model.image_encoder.vision_model
    if vision_model is None:
        raise ValueError(
            "transformers' BLIP-2 holds its vision model; pass vision_model=Blip2VisionModel"
        )
    config = _transformers_config(model, image_token_id, vision_model)
    instructed = model.config.text_conditioned
    # the submodules are replaced below; on meta, no second language model is ever allocated
    with torch.device("meta"):
        whole: TransformersModel = (
            InstructBlipForConditionalGeneration(config)
            if instructed
            else Blip2ForConditionalGeneration(config)
        )
    trained = trained_to_transformers(model.trainable_state_dict())
    vision = InstructBlipVisionModel if instructed else Blip2VisionModel
    whole.vision_model = vision(config.vision_config)
    whole.vision_model.load_state_dict(vision_model.state_dict())
    whole.vision_model.post_layernorm.eps = model.config.ln_vision_eps
    qformer = InstructBlipQFormerModel if instructed else Blip2QFormerModel
    whole.qformer = qformer(config.qformer_config)
    whole.language_projection = nn.Linear(*model.language_projection.weight.shape[::-1])
    whole.query_tokens = nn.Parameter(trained["query_tokens"].clone())
    for name in ("qformer", "language_projection"):
        whole.get_submodule(name).to(first_tensor(trained, name))
    whole.vision_model.to(next(vision_model.parameters()))
    whole.language_model = model.language_model
    whole.load_state_dict(trained, strict=False)
    return whole.eval()


def _transformers_config(
    model: Blip2Stage2, image_token_id: int, vision_model: VisionModel
) -> Blip2Config | InstructBlipConfig:
    sizes, text = model.config, model.language_model.config
    if sizes.llm_activation is not None:
        text = copy.deepcopy(text)
        text.dense_act_fn = sizes.llm_activation
    if vision_model.config.hidden_size != sizes.encoder_hidden_size:
        raise ValueError(
            f"vision_model has width {vision_model.config.hidden_size}, this model reads tokens "
            f"of width {sizes.encoder_hidden_size} (encoder_hidden_size)"
        )
    width = model.language_projection.out_features
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
    """A vision model's sizes as its twin's: BLIP-2 and InstructBLIP have the same one."""
    known = kind().to_dict().keys() - {"model_type", "transformers_version", "architectures"}
    return {name: v for name, v in vision_model.config.to_dict().items() if name in known}
