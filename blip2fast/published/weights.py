"""Trained parameters from a run, a transformers model or a LAVIS file, under this library's names.

Nothing is read until it is asked for: of a published BLIP-2, whose language model is most of it,
a run reads the Q-Former alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Blip2VisionConfig, Blip2VisionModel

from blip2fast.checkpoints.trained import Description
from blip2fast.frozen.identity import FrozenIdentity, Sample, identify, sampled_parts
from blip2fast.frozen.lavis_files import VisionWeights
from blip2fast.offload.tensor_files import TensorFile
from blip2fast.published.report import Report
from blip2fast.stage2.convert import conditioned_names

Layout = Literal["blip2fast", "transformers", "lavis"]
Stored = Tensor | TensorFile
# parameters of stage 1 that transformers' retrieval models lack
NEW_IN_STAGE1 = ("lm_head.", "temp")
# a text branch must agree with the rest of its Q-Former in these, and brings along those
_OF_LAYERS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "cross_attention_frequency",
)
_OF_WORDS = ("vocab_size", "max_position_embeddings", "pad_token_id")
# the tokenizer decides the ids, and new weights are as the run wants them
_OF_A_RUN = ("bos_token_id", "pad_token_id", "initializer_range")


@dataclass(frozen=True)
class Weights:
    """A trained model as it is stored somewhere.

    Attributes:
        source: folder, file or hub name.
        layout: whose names and files.
        what: what it is, in words.
        stage: 1 or 2.
        sizes: fields of Stage1Config or Stage2Config.
        tensors: the trained parameters, by this library's names.
        names: the name in the source of each of `tensors`.
        others: names of all other tensors in the source, by the reason why they are none of these.
        vision_config: configuration of the image encoder in the source; None without one.
        vision: its tensors, by `Blip2VisionModel`'s names, without its last norm.
        language: what is known of the language model, by the keys of its configuration.
        description: the `model.json` of a run of blip2fast.
    """

    source: str
    layout: Layout
    what: str
    stage: int
    sizes: dict[str, Any]
    tensors: Mapping[str, Stored]
    names: Mapping[str, str]
    others: Mapping[str, list[str]] = field(default_factory=dict)
    vision_config: Blip2VisionConfig | None = None
    vision: Mapping[str, Stored] = field(default_factory=dict)
    language: Mapping[str, Any] = field(default_factory=dict)
    description: Description | None = None

    def parameters(self) -> dict[str, Tensor]:
        """The trained parameters, read into memory; those of 16 bits become fp32."""
        return {name: _wide(read_stored(value)) for name, value in self.tensors.items()}

    def vision_weights(self) -> VisionWeights | None:
        """The image encoder's weights, as they are stored; None without one."""
        if self.vision_config is None:
            return None
        tensors = {name: read_stored(value) for name, value in self.vision.items()}
        return VisionWeights(self.vision_config, tensors)

    @functools.cached_property
    def described(self) -> Description:
        """The `model.json` of a run; of a published model, what one would say of its weights."""
        if self.description is not None:
            return self.description
        frozen = {}
        if self.vision_config is not None:
            identity = vision_identity(self.source, self.vision_config, self.vision)
            frozen["image_encoder"] = identity
        sizes = {name: value for name, value in self.sizes.items() if name not in _OF_A_RUN}
        return Description(stage=self.stage, sizes=sizes, frozen=frozen)

    def complete(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of a stage-1 model; those that transformers lacks are the model's own."""
        found = self.parameters()
        own = {n: v for n, v in wanted.items() if n.startswith(NEW_IN_STAGE1)}
        return own | found if self.layout == "transformers" else found

    def with_text_branch(self, other: Weights) -> Weights:
        """These weights of stage 2, with which a Q-Former reads images alone, and a text branch.

        Args:
            other: weights of either stage whose Q-Former reads texts: its embeddings and the
                feed-forward layers of texts are taken.

        Raises:
            ValueError: it reads no texts, or its Q-Former differs in size.
        """
        if other.stage == 2 and not other.sizes.get("text_conditioned"):
            raise ValueError(f"{other.what}: its Q-Former reads no texts")
        differing = [
            f"{name} is {other.sizes[name]} there, {self.sizes[name]} in {self.source}"
            for name in _OF_LAYERS
            if other.sizes[name] != self.sizes[name]
        ]
        if differing:
            raise ValueError(f"its Q-Former differs in size: {'; '.join(differing)}")
        own = {conditioned_names(name): name for name in self.tensors}
        theirs = {conditioned_names(name): name for name in other.tensors}
        text = {n: old for n, old in theirs.items() if n.startswith("qformer.") and n not in own}
        words = {"text_conditioned": True} | {
            name: other.sizes[name] for name in _OF_WORDS if name in other.sizes
        }
        sizes = self.sizes | words
        description = self.description
        if description is not None:
            description = dataclasses.replace(description, sizes=description.sizes | words)
        return dataclasses.replace(
            self,
            what=f"{self.what}, with the text branch of {other.source}",
            sizes=sizes,
            description=description,
            tensors={
                **{new: self.tensors[old] for new, old in own.items()},
                **{new: other.tensors[old] for new, old in text.items()},
            },
            names={
                **{new: self.names[old] for new, old in own.items()},
                **{new: other.names[old] for new, old in text.items()},
            },
        )

    def report(self, wanted: Iterable[str], stage: int, use: str) -> Report:
        """What a model takes of these weights.

        Args:
            wanted: names of the model's trained parameters.
            stage: of the model.
            use: what names the source, such as the key "init_from".
        """
        wanted = set(wanted)
        used = {name for name in self.tensors if renamed(name, wanted) is not None}
        there = {renamed(name, wanted) for name in used}
        left = {reason: list(names) for reason, names in self.others.items() if names}
        unused = [self.names[name] for name in self.tensors if name not in used]
        if unused:
            left[f"stage {stage} has none of it"] = unused
        return Report(
            f"{use} {self.source!r}: {self.what}",
            len(used),
            sorted(name for name in wanted if name not in there),
            left,
            missing_means="new",
            notes=self._notes(),
        )

    def _notes(self) -> list[str]:
        """What a run with these weights should know of the models that were around them."""
        if self.vision_config is not None:
            notes = [f"image encoder: data.image_encoder may name {self.source!r}, which holds it"]
        else:
            notes = [
                "image encoder: not in it; LAVIS's is EVA-CLIP's ViT-g/14, as in "
                "Salesforce/blip2-opt-2.7b, where it was not fine-tuned"
            ]
        settings = {"end_text": "end_text", "llm_activation": "activation"}
        return notes + [
            f"it was trained with language_model.{key}: {self.sizes[name]!r}"
            for name, key in settings.items()
            if self.sizes.get(name) is not None
        ]


def vision_identity(
    name: str, config: Blip2VisionConfig, tensors: Mapping[str, Stored]
) -> FrozenIdentity:
    """The identity of a `FrozenImageEncoder` with these weights, from samples of them.

    Of the weights alone: one encoder has another configuration in BLIP-2 and in InstructBLIP.

    Args:
        name: for messages.
        config: of the encoder.
        tensors: by `Blip2VisionModel`'s names, without its last norm.

    Raises:
        ValueError: a tensor is missing.
    """
    with torch.device("meta"):
        model = Blip2VisionModel(config)
    names = [n for n in model.state_dict() if not n.startswith("post_layernorm.")]
    lost = next((each for each in names if each not in tensors), None)
    if lost is not None:
        raise ValueError(f"{name}: its image encoder lacks {lost}")
    return identify(name, None, (_sample(tensors[each]) for each in names))


def renamed(name: str, wanted: Iterable[str]) -> str | None:
    """The name among `wanted` of a parameter of either stage; None if it is not there."""
    other = conditioned_names(name)
    return next((each for each in (name, other) if each in wanted), None)


def same_language_model(
    weights: Weights, given: FrozenIdentity, where: str, allow_other: bool = False, remedy: str = ""
) -> bool:
    """Whether the weights' projection is for a language model, as far as they tell.

    A published checkpoint's language model has more rows in its embeddings than the one that it was
    trained with, so that not its values but its kind and sizes are compared.

    Args:
        weights: of stage 2.
        given: the language model of the run.
        where: names the weights, for the message.
        allow_other: False: raise if it is for another one.
        remedy: what to do then, besides giving that one.

    Raises:
        ValueError: it is for another language model.
    """
    differing = [
        f"{key} is {value!r} there, {given.config[key]!r} here"
        for key, value in weights.language.items()
        if key in given.config and given.config[key] != value
    ]
    if differing and not allow_other:
        raise ValueError(
            f"{where} was trained with another language model than {given}: "
            f"{'; '.join(differing)}. Give that one{remedy}"
        )
    return not differing


def read_stored(value: Stored) -> Tensor:
    """A tensor in memory or in a file."""
    return value.read() if isinstance(value, TensorFile) else value


def _wide(value: Tensor) -> Tensor:
    half = value.is_floating_point() and value.dtype.itemsize == 2
    return value.float() if half else value


def _sample(value: Stored) -> Sample:
    if isinstance(value, TensorFile):
        return value.sample()
    flat = value.detach().reshape(-1)
    parts = [flat[part] for part in sampled_parts(flat.numel())]
    return tuple(value.shape), torch.cat(parts)
