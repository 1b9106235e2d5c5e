"""Trained models and checkpoints on disk, in one format for any ZeRO stage and world size.

    manifest.json          size and SHA-256 of the files below
    model.safetensors      the trained parameters, unsharded, fp32
    model.json             stage, sizes, and which frozen models they belong to
    optimizer.safetensors  exp_avg/<name> and exp_avg_sq/<name>, unsharded, fp32 (checkpoint only)
    adapter_model.safetensors, adapter_config.json   LoRA adapters, as peft stores them (if any)
    process_<rank>.pt      random states and log sums of one process             (checkpoint only)
    state.json             step, and the configuration of the run                (checkpoint only)

A checkpoint is written as `<name>.partial` and renamed once it is complete and flushed, so a run
killed during the write resumes from the previous checkpoint. The model in the run's output folder
is replaced atomically too; see `blip2fast.data.manifest`. Every file is verified against the
manifest before it is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from blip2fast._imports import needs
from blip2fast.checkpoints.files import (
    DESCRIPTION,
    MODEL,
    find_file,
    load_tensors,
    on_cpu,
    read_json,
)
from blip2fast.data import manifest
from blip2fast.data.manifest import MANIFEST, write_json
from blip2fast.frozen.hub import at_revision
from blip2fast.frozen.identity import FrozenIdentity, identify_model, refuse_other
from blip2fast.frozen.image_encoders import (
    EncoderName,
    FrozenImageEncoder,
    load_image_encoder,
    parse_encoder_id,
)
from blip2fast.frozen.language_models import load_language_model
from blip2fast.offload.loading import source_identity
from blip2fast.qformer.checks import check_state
from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage1.modules import with_scalar_temp
from blip2fast.stage2.config import Stage2Config
from blip2fast.stage2.lora import (
    ADAPTER,
    ADAPTER_CONFIG,
    adapter_names,
    adapter_state,
    add_lora,
    from_peft_name,
    write_config,
)
from blip2fast.stage2.model import Blip2Stage2

_PARTS = {"language_model": "language model", "image_encoder": "image encoder"}


@dataclasses.dataclass(frozen=True)
class Description:
    """The contents of `model.json`, which describes the trained parameters in the same folder.

    Attributes:
        stage: 1 or 2.
        sizes: fields of Stage1Config or Stage2Config.
        image_encoder: name of the encoder of the image tokens, as its feature cache states it.
        language_model: absolute folder or hub name (stage 2).
        tokenizer: absolute folder or hub name of the Q-Former's tokenizer (if it reads text).
        step: optimizer steps taken.
        frozen: identities of "image_encoder" and "language_model", where known; that of cached
            image tokens is read from their feature cache. Of an encoder that was trained too, the
            one that its training began with.
        image_size: h = w of the images, in pixels; None: the encoder's own, or a feature cache's.
        trains_encoder: whether the parameters hold an image encoder.
        adapter: peft's configuration of the language model's LoRA adapters, if it has any; it is
            stored in its own file.
        revisions: commits on the hub of "image_encoder", "language_model" and "tokenizer", where
            they were named there.
    """

    stage: int
    sizes: dict[str, Any]
    image_encoder: str = ""
    language_model: str | None = None
    tokenizer: str | None = None
    step: int = 0
    frozen: dict[str, FrozenIdentity] = dataclasses.field(default_factory=dict)
    image_size: int | None = None
    trains_encoder: bool = False
    adapter: Any = dataclasses.field(default=None, compare=False)
    revisions: dict[str, str] = dataclasses.field(default_factory=dict)

    def config(self) -> Stage1Config | Stage2Config:
        """The sizes as a model configuration."""
        return Stage1Config(**self.sizes) if self.stage == 1 else Stage2Config(**self.sizes)


def trained_names(model: nn.Module) -> list[str]:
    """Names of the trained parameters."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def save_model(folder: Path, state: Mapping[str, Tensor], description: Description) -> None:
    """Write a trained model into `folder`, replacing an older one atomically.

    If killed at any point, the folder holds either the old model or the new one, never a mixture.
    """
    manifest.replace_files(folder, model_files(state, description))


def is_trained(path: str | Path) -> bool:
    """Whether `path` is a trained model or a checkpoint; its files are not verified."""
    return any((Path(path) / name).is_file() for name in (MANIFEST, DESCRIPTION))


def read_description(path: str | Path) -> Description:
    """Read `model.json` of a finished run or a checkpoint.

    Raises:
        ValueError: not found, of an older format, or damaged.
    """
    values = read_json(Path(path), DESCRIPTION)
    try:
        identities = {part: FrozenIdentity(**v) for part, v in values.pop("frozen").items()}
        return Description(**values, frozen=identities, adapter=read_adapter_config(Path(path)))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{Path(path) / DESCRIPTION} does not describe a trained model ({error})"
        ) from error


def read_parameters(path: str | Path) -> dict[str, Tensor]:
    """Read the trained parameters of a finished run or a checkpoint, in fp32 on the CPU.

    Raises:
        ValueError: as `read_description`.
    """
    parameters = load_tensors(Path(path), MODEL)
    if has_adapter(Path(path)):
        adapter = load_tensors(Path(path), ADAPTER)
        parameters |= {from_peft_name(name): value for name, value in adapter.items()}
    return parameters


def has_adapter(path: Path) -> bool:
    """Whether a trained model has LoRA adapters beside it."""
    return (path / MANIFEST).is_file() and ADAPTER_CONFIG in manifest.read_manifest(path)


def read_adapter_config(path: Path) -> Any:
    """peft's configuration of the adapters of a trained model; None without adapters."""
    if not has_adapter(path):
        return None
    with needs("load LoRA adapters", "peft"):
        from peft import LoraConfig

    file = find_file(path, ADAPTER_CONFIG)
    try:
        return LoraConfig.from_peft_type(**LoraConfig.from_json_file(str(file)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: not a configuration of this version of peft ({error})"
        ) from error


def load_trained(
    path: str | Path,
    language_model: PreTrainedModel | None = None,
    check: bool = True,
    image_encoder: str | None = None,
) -> Blip2Stage1 | Blip2Stage2:
    """Load a trained model for evaluation.

    Args:
        path: output folder of a finished run, or one of its checkpoints.
        language_model: stage 2: use this model instead of loading the one named in `model.json`.
        check: refuse a language model other than the one it was trained with, see
            `blip2fast.frozen.identity`; otherwise any model of the same width is accepted.
        image_encoder: folder or hub name of the encoder from which that of the run was trained, if
            it was trained too and has moved.

    Returns:
        The model in fp32, on the CPU, in evaluation mode.

    Raises:
        ValueError: not found, truncated or damaged; tensor shapes that do not match the sizes; or
            another language model.
    """
    description = read_description(path)
    state, config = read_parameters(path), description.config()
    model: Blip2Stage1 | Blip2Stage2
    if isinstance(config, Stage1Config):
        model = Blip2Stage1(config)
    else:
        language_model = _language_model(str(path), description, language_model, check)
        model = Blip2Stage2(config, language_model)
        if description.adapter is not None:
            add_lora(language_model, description.adapter)
    if description.trains_encoder:
        attach_encoder(model, load_encoder_of(description, str(path), image_encoder))
    load_parameters(model, state, str(path))
    return model.eval()


def attach_encoder(model: Blip2Stage1 | Blip2Stage2, encoder: FrozenImageEncoder) -> None:
    """Make an image encoder part of a model, to be trained and stored with it."""
    model.image_encoder = encoder
    encoder.unfreeze()


def load_encoder_of(
    description: Description, path: str, name: str | None = None
) -> FrozenImageEncoder:
    """The image encoder with which a run began, for its image size; in fp32.

    Args:
        description: of the run.
        path: where the run is, for error messages.
        name: folder or hub name of the encoder, if it has moved.

    Raises:
        ValueError: not found, or another one.
    """
    parsed = parse_encoder_id(description.image_encoder)
    known, layer, *_ = parsed or EncoderName(description.image_encoder)
    known = at_revision(known, description.revisions.get("image_encoder"))
    encoder = load_image_encoder(name or known, layer, image_size=description.image_size)
    remedy = "Give image_encoder=..., the one that its training began with"
    check_frozen(description, "image_encoder", encoder.identity, path, remedy)
    return encoder


def _language_model(
    path: str, description: Description, given: PreTrainedModel | None, check: bool
) -> PreTrainedModel:
    def refuse(identity: FrozenIdentity | None, remedy: str) -> None:
        check_frozen(
            description, "language_model", identity, path, f"{remedy}, or pass check=False"
        )

    if given is not None:
        if check:
            refuse(identify_model(given), "Give the one it was trained with")
        return given
    if description.language_model is None:
        raise ValueError(f"{path} names no language model; pass language_model=...")
    name = frozen_name(description, "language_model", path)
    remedy = "Put back the one it was trained with, pass it as language_model=..."
    # before loading, where the model's files are enough to identify it
    known = source_identity(name) if check else None
    refuse(known, remedy)
    model = load_language_model(name, torch.float32)
    if check and known is None:
        refuse(identify_model(model), remedy)
    return model


def frozen_name(description: Description, part: str, source: str) -> str:
    """Where a run's frozen model is, in the revision that the run was trained with.

    Args:
        description: describes the trained model; it names the part.
        part: "language_model" or "tokenizer".
        source: where the trained model is, for the error message.

    Raises:
        ValueError: the folder is not there any more; says how to name another one.
    """
    name = str(getattr(description, part))
    if Path(name).is_absolute() and not Path(name).exists():
        remedy = (
            "put it back"
            if part == "tokenizer"
            else (f"give its place now: {part}=..., on the command line --{part.replace('_', '-')}")
        )
        raise ValueError(
            f"{source} was trained with the {part.replace('_', ' ')} {name}, which is not there; "
            f"{remedy}"
        )
    return at_revision(name, description.revisions.get(part))


def check_frozen(
    description: Description, part: str, given: FrozenIdentity | None, source: str, remedy: str
) -> None:
    """Refuse a frozen model other than the one that a model was trained with.

    Args:
        description: describes the trained model.
        part: "language_model" or "image_encoder".
        given: identity of the frozen model to be used; None if unknown, which is accepted.
        source: where the trained model is, for the error message.
        remedy: a sentence on how to fix it, for the error message.

    Raises:
        ValueError: the identities differ; both are named.
    """
    refuse_other(_PARTS[part], description.frozen.get(part), given, source, remedy)


def load_parameters(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load trained parameters into a model; frozen ones are not touched.

    Raises:
        ValueError: a missing or unknown parameter, or a shape mismatch, with both shapes.
    """
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_state(source, with_scalar_temp(state), with_scalar_temp(own))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name].view(parameter.shape))


def model_files(state: Mapping[str, Tensor], description: Description) -> dict[str, manifest.Write]:
    """A writer function for each file of a trained model, by file name."""
    adapters = set(adapter_names(state))
    rest = {name: value for name, value in state.items() if name not in adapters}
    values = {
        field.name: getattr(description, field.name)
        for field in dataclasses.fields(description)
        if field.name != "adapter"
    }
    values["frozen"] = {n: dataclasses.asdict(each) for n, each in description.frozen.items()}
    files = {
        MODEL: lambda path: save_file(on_cpu(with_scalar_temp(rest)), path),
        DESCRIPTION: write_json(values),
    }
    if description.adapter is not None:
        of_peft = {"format": "pt"}
        files[ADAPTER] = lambda path: save_file(on_cpu(adapter_state(state)), path, of_peft)
        files[ADAPTER_CONFIG] = partial(write_config, description.adapter)
    return files
