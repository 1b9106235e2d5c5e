"""The model of a run and what `model.json` says of it, from its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from blip2fast.checkpoints.trained import Description, attach_encoder, check_frozen, load_parameters
from blip2fast.data.records import IMAGE_MARKER
from blip2fast.data.tokenizers import qformer_tokenizer
from blip2fast.frozen.hub import lasting_name
from blip2fast.frozen.identity import FrozenIdentity, identify_model
from blip2fast.frozen.image_encoders import FrozenImageEncoder, parse_encoder_id
from blip2fast.offload.loading import source_identity
from blip2fast.published.reading import open_weights
from blip2fast.published.weights import Weights, same_language_model
from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage1.pretrained import initialise_from_bert
from blip2fast.stage2.config import Stage2Config
from blip2fast.stage2.lora import NAME as ADAPTER_NAME
from blip2fast.stage2.lora import add_lora
from blip2fast.stage2.model import FROZEN, Blip2Stage2
from blip2fast.training.config import RunConfig
from blip2fast.training.placement import load_frozen
from blip2fast.training.run_data import ImageSource


def build_model(
    config: RunConfig, source: ImageSource, start: Weights | None
) -> tuple[Blip2Stage1 | Blip2Stage2, Any, Description]:
    """The model, its tokenizer, and what `model.json` says of it; `start` is `init_from`."""
    if start is not None:
        if start.stage > config.stage:
            raise ValueError(
                f"init_from {config.init_from!r} holds a stage-{start.stage} model, but the "
                f"configuration says stage: {config.stage}; a Q-Former goes from stage 1 to 2"
            )
        if not config.allow_other_frozen:
            _refuse_other_tokens(config, start.described, source)
    sizes = _sizes(config, source.width, None if start is None else start.described)
    frozen = {} if source.identity is None else {"image_encoder": source.identity}
    model: Blip2Stage1 | Blip2Stage2
    encoder = source.encoder if source.is_own else None
    adapter = None
    if config.stage == 1:
        model, tokenizer = _stage1(config, sizes, start, encoder)
    else:
        model, tokenizer, frozen["language_model"] = _stage2(config, sizes, start, encoder)
        adapter = getattr(model.language_model, "peft_config", {}).get(ADAPTER_NAME)
    description = dataclasses.replace(
        _describe(config, model, source.encoder_id, frozen),
        image_size=None if source.encoder is None else source.encoder.image_size,
        trains_encoder=source.is_own,
        adapter=adapter,
    )
    return model, tokenizer, description


def open_start(config: RunConfig) -> Weights | None:
    """The weights of `init_from`, completed by those of `init_text_from`; None without one.

    Raises:
        ValueError: not found, damaged, or they do not go together.
    """
    if config.init_from is None:
        return None
    start = open_weights(config.init_from)
    if config.init_text_from is None or start.sizes.get("text_conditioned"):
        return start
    if start.stage == 1:
        raise ValueError(
            f"init_text_from {config.init_text_from!r}: init_from {config.init_from!r} is of stage "
            "1 and reads texts itself: leave init_text_from out"
        )
    try:
        return start.with_text_branch(open_weights(config.init_text_from))
    except ValueError as error:
        raise ValueError(f"init_text_from {config.init_text_from!r}: {error}") from None


def _sizes(config: RunConfig, width: int, start: Description | None) -> dict[str, Any]:
    """The model's sizes, from the `model` section and the model of `init_from`."""
    names = [f.name for f in dataclasses.fields(config.model)]
    wanted = {n: getattr(config.model, n) for n in names if n not in ("tokenizer", "bert")}
    dropout = wanted.pop("dropout")
    wanted = {name: value for name, value in wanted.items() if value is not None}
    wanted["encoder_hidden_size"] = width
    if start is not None:
        differing = [
            f"model.{name} is {start.sizes[name]} there, {value} here"
            for name, value in wanted.items()
            if name in start.sizes and start.sizes[name] != value
        ]
        if (
            start.stage == 2
            and wanted.get("text_conditioned")
            and not start.sizes.get("text_conditioned")
        ):
            raise ValueError(
                f"init_from {config.init_from!r} has a Q-Former that reads images alone, and "
                "model.text_conditioned is true: set init_text_from to the run of stage 1, whose "
                "text branch is taken"
            )
        if differing:
            raise ValueError(
                f"init_from {config.init_from!r} differs in size: {'; '.join(differing)} "
                "(encoder_hidden_size comes from data.features)"
            )
        known = {f.name for f in dataclasses.fields(Stage1Config)} | {"text_conditioned"}
        wanted |= {n: v for n, v in start.sizes.items() if n in known}
    if dropout is not None:
        wanted |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return wanted


def _describe(
    config: RunConfig,
    model: Blip2Stage1 | Blip2Stage2,
    encoder_id: str,
    frozen: dict[str, FrozenIdentity],
) -> Description:
    """The run's `model.json`; folders by their absolute paths, models of the hub with revisions."""
    parsed = parse_encoder_id(encoder_id)
    encoder = encoder_id if parsed is None else parsed[0]
    given = {
        "image_encoder": encoder,
        "language_model": config.language_model.path if config.language_model else None,
        "tokenizer": config.model.tokenizer,
    }
    names = {part: lasting_name(name) for part, name in given.items() if name}
    tail = encoder_id.removeprefix(encoder)
    return Description(
        stage=config.stage,
        sizes=dataclasses.asdict(model.config),
        image_encoder=names["image_encoder"][0] + tail if "image_encoder" in names else "",
        language_model=names["language_model"][0] if "language_model" in names else None,
        tokenizer=names["tokenizer"][0] if "tokenizer" in names else None,
        frozen=frozen,
        revisions={part: revision for part, (_, revision) in names.items() if revision},
    )


def _refuse_other_tokens(config: RunConfig, start: Description, source: ImageSource) -> None:
    """Refuse image tokens of an encoder other than that of `init_from`, by identity or name."""
    remedy = "Cache the images with that encoder, or set allow_other_frozen: true"
    if "image_encoder" in start.frozen and source.identity is not None:
        where = f"init_from {config.init_from!r}"
        check_frozen(start, "image_encoder", source.identity, where, remedy)
    elif source.encoder_id and start.image_encoder and source.encoder_id != start.image_encoder:
        raise ValueError(
            f"init_from {config.init_from!r} was trained on tokens of {start.image_encoder!r}, "
            f"but the data are of {source.encoder_id!r}. {remedy}"
        )


def _stage1(
    config: RunConfig,
    sizes: dict[str, Any],
    start: Weights | None,
    encoder: FrozenImageEncoder | None,
) -> tuple[Blip2Stage1, Any]:
    tokenizer, words = qformer_words(config, sizes)
    size = Stage1Config(**(sizes | words))
    check_positions(config, size.max_position_embeddings)
    model = Blip2Stage1(size, losses=config.optim.losses)
    if encoder is not None:
        attach_encoder(model, encoder)
    # transformers' retrieval models lack the generation head, which BERT has
    if config.model.bert is not None and (start is None or start.layout == "transformers"):
        initialise_from_bert(model, config.model.bert)
    if start is not None:
        _load_start(config, model, start.complete(model.state_dict()))
    return model, tokenizer


def _stage2(
    config: RunConfig,
    sizes: dict[str, Any],
    start: Weights | None,
    encoder: FrozenImageEncoder | None,
) -> tuple[Blip2Stage2, Any, FrozenIdentity]:
    if config.language_model is None:
        raise ValueError("language_model: stage 2 needs one")
    known = {f.name for f in dataclasses.fields(Stage2Config)}
    if sizes.get("text_conditioned"):
        _, words = qformer_words(config, sizes)
        sizes = sizes | words
    size = Stage2Config(
        **{name: value for name, value in sizes.items() if name in known},
        image_marker=IMAGE_MARKER if config.data.task == "sequence" else None,
        llm_activation=config.language_model.activation,
        llm_dropout=config.language_model.llm_dropout,
        pack_padding=config.language_model.pack_padding,
        max_txt_len=config.data.max_txt_len,
        prompt=config.language_model.prompt,
        end_text=config.language_model.end_text,
        match_embedding_scale=config.language_model.match_embedding_scale,
    )
    # identified from its files where possible, to refuse another model before loading it
    found = source_identity(config.language_model.path)
    if found is not None:
        _same_language_model(config, start, found)
    language_model = load_frozen(config)
    identity = found or identify_model(language_model)
    tokenizer = AutoTokenizer.from_pretrained(config.language_model.path, trust_remote_code=False)
    same = start is not None and _same_language_model(config, start, identity)
    lora = config.language_model.lora
    adapter = None if start is None else start.described.adapter
    if adapter is not None:
        _check_adapter(config, adapter, same)
    if start is None or same:
        model = Blip2Stage2(size, language_model)
    else:
        # the start's projection, if any, was trained for another language model
        model = Blip2Stage2.from_stage1(start.parameters(), language_model, size)
    if lora is not None:
        add_lora(language_model, **dataclasses.asdict(lora))
    if encoder is not None:
        attach_encoder(model, encoder)
    if start is not None and same:
        _load_start(config, model, start.parameters())
    return model.train(), tokenizer, identity


def _load_start(
    config: RunConfig, model: Blip2Stage1 | Blip2Stage2, state: Mapping[str, Tensor]
) -> None:
    """Load the parameters of `init_from`.

    The image encoder has them already, and adapters that `init_from` does not have are new.
    """
    given = {n: v for n, v in state.items() if not n.startswith("image_encoder.")}
    own = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    new = {n: v for n, v in own.items() if n.startswith(FROZEN) and n not in given}
    load_parameters(model, {**given, **new}, f"init_from {config.init_from!r}")


def _check_adapter(config: RunConfig, adapter: Any, same: bool) -> None:
    """Refuse to leave out, or to change the form of, the adapters of `init_from`."""
    targets = adapter.target_modules
    there = {
        "r": adapter.r,
        "alpha": adapter.lora_alpha,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
    }
    where = f"init_from {config.init_from!r} has LoRA adapters ({there})"
    if not same:
        raise ValueError(f"{where} of another language model: give its language model")
    lora = config.language_model.lora if config.language_model is not None else None
    if lora is None:
        raise ValueError(
            f"{where}: train on with the same language_model.lora, or merge them into the language "
            "model first (docs/fine_tuning.md)"
        )
    here: dict[str, Any] = {"r": lora.r, "alpha": lora.alpha}
    if isinstance(lora.target_modules, list):
        here["target_modules"] = sorted(lora.target_modules)
    differing = [
        f"{n} is {there[n]} there, {value} here" for n, value in here.items() if there[n] != value
    ]
    if differing:
        raise ValueError(f"{where}: {'; '.join(differing)}: set the same language_model.lora")


def _same_language_model(
    config: RunConfig, start: Weights | None, identity: FrozenIdentity
) -> bool:
    """Whether the model of `init_from` was trained with this language model.

    Raises:
        ValueError: it was trained with another one, and `allow_other_frozen` is not set.
    """
    if start is None or start.stage == 1:
        return False
    where = f"init_from {config.init_from!r}"
    if start.description is None:
        remedy = ", or set allow_other_frozen: true for a new projection"
        return same_language_model(start, identity, where, config.allow_other_frozen, remedy)
    if not config.allow_other_frozen:
        remedy = "Give that one, or set allow_other_frozen: true for a new projection"
        check_frozen(start.description, "language_model", identity, where, remedy)
        return True
    there = start.description.frozen.get("language_model")
    return there is not None and not there.differences(identity)


def qformer_words(config: RunConfig, sizes: Mapping[str, Any]) -> tuple[Any, dict[str, int]]:
    """The Q-Former's tokenizer, and the vocabulary size and special token ids that it implies.

    Args:
        sizes: the sizes of the model to start from, which must agree with the tokenizer.

    Raises:
        ValueError: they disagree, or no tokenizer is configured.
    """
    if config.model.tokenizer is None:
        raise ValueError(
            f"init_from {config.init_from!r} has a Q-Former that reads text: set model.tokenizer "
            "and model.text_conditioned: true"
        )
    tokenizer = qformer_tokenizer(str(config.model.tokenizer))
    words = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, value in words.items():
        if sizes.get(name, value) != value:
            raise ValueError(
                f"init_from {config.init_from!r} has {name} {sizes[name]}, but the tokenizer "
                f"{config.model.tokenizer!r} has {value}"
            )
    return tokenizer, words


def check_positions(config: RunConfig, positions: int) -> None:
    """Refuse texts that may be longer than the Q-Former's position table."""
    if config.data.max_txt_len > positions:
        raise ValueError(
            f"data.max_txt_len {config.data.max_txt_len} is longer than the position table, "
            f"model.max_position_embeddings {positions}"
        )
