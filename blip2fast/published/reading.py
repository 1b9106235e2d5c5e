"""Opens trained weights of every layout: runs of blip2fast, transformers' models, LAVIS's files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import AutoConfig, Blip2VisionConfig

from blip2fast.checkpoints.trained import is_trained, read_description, read_parameters
from blip2fast.frozen.hub import check_weights
from blip2fast.frozen.lavis_files import (
    PREFIX,
    is_lavis_file,
    read_lavis_file,
    vision_from_lavis,
)
from blip2fast.frozen.local_models import not_found
from blip2fast.offload.tensor_files import tensor_files
from blip2fast.published.weights import Weights
from blip2fast.stage1.lavis import TIED, from_lavis, from_lavis_name
from blip2fast.stage1.pretrained import config_from_retrieval
from blip2fast.stage2.convert import conditioned_names, config_from_transformers

# LAVIS's projection, and the kind of language model that it is for (any other: llm)
PROJECTIONS = {"opt_proj.": "opt", "t5_proj.": "t5", "llm_proj.": ""}
_LANGUAGE_MODELS = ("opt_model.", "t5_model.", "llm_model.")
_HEAD = 64  # the width of BERT's heads, which no tensor shows
IMAGE, LANGUAGE = "the image encoder", "the language model"
_NUMBERS, _TIED = "positions' numbers", "tied to another tensor"
# what tells one language model from another, in the configurations of OPT, T5 and Llama
_TELLING = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim"),
    *("d_model", "d_ff", "num_layers", "num_heads", "intermediate_size"),
)


def published_fault(key: str, name: str) -> str | None:
    """Why `name` cannot hold trained weights; None if it may. No weights are read.

    Args:
        key: what names it, such as "init_from".
        name: a run of blip2fast, a folder or hub name of transformers, or a file of LAVIS.
    """
    if is_trained(name) or is_lavis_file(name):
        return None
    fault = check_weights(key, name)
    if fault is None:
        return None
    return (
        f"{key} {name!r}: no model.json and model.safetensors of a finished run or a checkpoint "
        "there, no .pth file of LAVIS, and no BLIP-2 of transformers "
        f"({fault.removeprefix(f'{key} {name!r}: ')})"
    )


def open_weights(name: str) -> Weights:
    """Open trained weights; tensors are read when they are asked for.

    Args:
        name: output folder or checkpoint of a run of blip2fast; folder or hub name of a
            transformers BLIP-2 or InstructBLIP, with or without heads for retrieval; or a `.pth`
            file of LAVIS: stage 1, stage 2, InstructBLIP, fine-tuned or not.

    Raises:
        ValueError: not found, damaged, or of another kind.
    """
    if is_trained(name):
        return _run(name)
    if is_lavis_file(name):
        return _lavis(name)
    return _transformers(name)


def _run(name: str) -> Weights:
    description = read_description(name)
    tensors = read_parameters(name)
    return Weights(
        source=name,
        layout="blip2fast",
        what=f"a run of blip2fast, stage {description.stage}",
        stage=description.stage,
        sizes=description.sizes,
        tensors=tensors,
        names={each: each for each in tensors},
        description=description,
    )


def _transformers(name: str) -> Weights:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(not_found("trained weights", name, error)) from error
    if config.model_type not in ("blip-2", "instructblip"):
        raise ValueError(
            f"{name} is a {config.model_type!r} model; expected a BLIP-2 or InstructBLIP of "
            "transformers, a run of blip2fast, or a .pth file of LAVIS"
        )
    files = tensor_files(name)
    if not files:
        raise ValueError(
            f"{name} has no weights in safetensors; load it with transformers and save it again"
        )
    language: dict[str, Any] = {}
    if "vision_projection.weight" in files:
        stage, what = 1, "Blip2ForImageTextRetrieval"
        sizes = dataclasses.asdict(config_from_retrieval(config))
    elif "language_projection.weight" in files:
        stage = 2
        what = "InstructBLIP" if config.model_type == "instructblip" else "BLIP-2"
        sizes = dataclasses.asdict(config_from_transformers(config))
        text = config.text_config.to_dict()
        language = {key: text[key] for key in _TELLING if key in text}
        if text.get("dense_act_fn") is not None:
            sizes["llm_activation"] = text["dense_act_fn"]
    else:
        raise ValueError(
            f"{name} has neither a language_projection nor a vision_projection: expected "
            "Blip2ForConditionalGeneration, Blip2Model, Blip2ForImageTextRetrieval or InstructBLIP"
        )
    names, vision, others = _sort_transformers(list(files))
    fields = config.vision_config.to_dict()
    known = Blip2VisionConfig().to_dict().keys() - {"model_type", "architectures"}
    return Weights(
        source=name,
        layout="transformers",
        what=f"transformers' {what}, stage {stage}",
        stage=stage,
        sizes=sizes,
        tensors={ours: files[theirs] for ours, theirs in names.items()},
        names=names,
        others=others,
        vision_config=Blip2VisionConfig(**{n: v for n, v in fields.items() if n in known}),
        vision={ours: files[theirs] for ours, theirs in vision.items()},
        language=language,
    )


def _sort_transformers(
    files: list[str],
) -> tuple[dict[str, str], dict[str, str], dict[str, list[str]]]:
    """The trained names, the image encoder's, and others by reason; ours to theirs."""
    names, vision = {}, {}
    others: dict[str, list[str]] = {IMAGE: [], LANGUAGE: [], _NUMBERS: []}
    norm = "vision_model.post_layernorm."
    for name in files:
        if name.startswith(norm):
            names["ln_vision." + name.removeprefix(norm)] = name
        elif name.startswith("vision_model."):
            vision[name.removeprefix("vision_model.")] = name
            others[IMAGE].append(name)
        elif name.startswith("language_model."):
            others[LANGUAGE].append(name)
        elif name.endswith("position_ids"):
            others[_NUMBERS].append(name)
        else:
            names[name] = name
    return names, vision, others


def _lavis(name: str) -> Weights:
    state = read_lavis_file(name)
    own, others = _sort_lavis(state)
    projection = next((p for p in PROJECTIONS if f"{p}weight" in state), None)
    stage = 1 if "vision_proj.weight" in state else 2
    if "query_tokens" not in state or (stage == 2 and projection is None):
        first = ", ".join(list(state)[:3]) or "nothing"
        raise ValueError(
            f"{name}: no BLIP-2 of LAVIS: it has no query_tokens, or neither vision_proj nor "
            f"opt_proj, t5_proj or llm_proj; it holds {first}. The image encoder's own file goes "
            "into data.image_encoder"
        )
    renamed, names = from_lavis(own), {from_lavis_name(each): each for each in own}
    conditioned = stage == 2 and "embeddings.word_embeddings.weight" in renamed
    if conditioned:
        renamed = {conditioned_names(each): value for each, value in renamed.items()}
        names = {conditioned_names(each): theirs for each, theirs in names.items()}
    language: dict[str, Any] = {}
    sizes = _sizes(name, renamed)
    numbers = state.get("Qformer.bert.embeddings.position_ids")
    if numbers is not None:
        sizes["max_position_embeddings"] = numbers.shape[-1]
    if stage == 2 and projection is not None:
        for part in ("weight", "bias"):
            there = f"{projection}{part}"
            renamed[f"language_projection.{part}"] = renamed.pop(there)
            names[f"language_projection.{part}"] = names.pop(there)
        kind = PROJECTIONS[projection]
        width = renamed["language_projection.weight"].shape[0]
        language = {"model_type": kind} if kind else {}
        language["d_model" if kind == "t5" else "hidden_size"] = width
        sizes["text_conditioned"] = conditioned
        # as LAVIS trained them
        if kind == "opt":
            sizes["end_text"] = "\n"
        elif kind == "t5":
            sizes["llm_activation"] = "gelu"
    eva = vision_from_lavis(state, name) if others[IMAGE] else None
    instruct = "InstructBLIP, " if conditioned else ""
    return Weights(
        source=name,
        layout="lavis",
        what=f"a file of LAVIS, {instruct}stage {stage}",
        stage=stage,
        sizes=sizes,
        tensors=renamed,
        names=names,
        others=others,
        vision_config=None if eva is None else eva.config,
        vision={} if eva is None else eva.tensors,
        language=language,
    )


def _sort_lavis(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The trained parameters, and all others by reason; tied ones are checked and dropped."""
    own = {}
    others: dict[str, list[str]] = {IMAGE: [], LANGUAGE: [], _NUMBERS: [], _TIED: []}
    from_lavis(state)  # refuses tied tensors that differ
    for name, value in state.items():
        if name.startswith(PREFIX):
            others[IMAGE].append(name)
        elif name.startswith(_LANGUAGE_MODELS):
            others[LANGUAGE].append(name)
        elif name.endswith("position_ids"):
            others[_NUMBERS].append(name)
        elif name in TIED:
            others[_TIED].append(name)
        else:
            own[name] = value
    return own, others


def _sizes(source: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of a Q-Former tell; the rest is BLIP-2's."""
    queries = state["query_tokens"]
    layers = {int(m[1]) for n in state if (m := re.match(r"qformer\.encoder\.layer\.(\d+)\.", n))}
    crossing = sorted(
        {int(m[1]) for n in state if (m := re.match(r".*\.layer\.(\d+)\.crossattention\.", n))}
    )
    count = len(layers)
    every = crossing[1] if len(crossing) > 1 else count
    first = "qformer.encoder.layer.0.intermediate_query.dense.weight"
    if crossing != list(range(0, count, max(1, every))) or first not in state:
        raise ValueError(
            f"{source}: its Q-Former has {count} layers, of which {crossing} attend to the image; "
            "expected every n-th from 0 on"
        )
    sizes = {
        "hidden_size": queries.shape[2],
        "num_query_tokens": queries.shape[1],
        "num_hidden_layers": count,
        "intermediate_size": state[first].shape[0],
        "cross_attention_frequency": every,
        "encoder_hidden_size": state["ln_vision.weight"].shape[0],
    }
    if queries.shape[2] % _HEAD == 0:
        sizes["num_attention_heads"] = queries.shape[2] // _HEAD
    for prefix in ("", "qformer."):
        words = state.get(f"{prefix}embeddings.word_embeddings.weight")
        places = state.get(f"{prefix}embeddings.position_embeddings.weight")
        if words is not None and places is not None:
            sizes |= {"vocab_size": words.shape[0], "max_position_embeddings": places.shape[0]}
    if "vision_projection.weight" in state:
        sizes["embed_dim"] = state["vision_projection.weight"].shape[0]
    return sizes
