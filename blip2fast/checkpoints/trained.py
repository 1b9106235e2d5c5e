"""Trained models and checkpoints on disk, in one form for every ZeRO stage and number of processes.

    manifest.json          size and SHA-256 of the files below
    model.safetensors      the trained parameters, whole, fp32
    model.json             stage, sizes, and which frozen models they belong to
    optimizer.safetensors  exp_avg/<name> and exp_avg_sq/<name>, whole, fp32     (checkpoint only)
    process_<rank>.pt      random states, and sums for the log, of a process     (checkpoint only)
    state.json             step, and the configuration of the run                (checkpoint only)

A checkpoint is written as `<name>.partial` and renamed when it is complete and on the disk, so that
a run that is killed while writing leaves the checkpoint before it as the last one. The model in the
run's own folder is replaced in one step too; see `blip2fast.data.manifest`. Whatever is read is
compared with the manifest first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from blip2fast.checkpoints.files import (
    DESCRIPTION,
    MODEL,
    load_tensors,
    on_cpu,
    read_json,
)
from blip2fast.data import manifest
from blip2fast.data.manifest import MANIFEST, write_json
from blip2fast.frozen.identity import FrozenIdentity, identify_model, refuse_other
from blip2fast.frozen.language_models import load_language_model
from blip2fast.offload.loading import source_identity
from blip2fast.qformer.checks import check_state
from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.config import Stage2Config
from blip2fast.stage2.model import Blip2Stage2

_PARTS = {"language_model": "language model", "image_encoder": "image encoder"}


@dataclasses.dataclass(frozen=True)
class Description:
    """The contents of `model.json`, which describes the trained parameters beside it.

    Attributes:
        stage: 1 or 2.
        sizes: fields of Stage1Config or Stage2Config.
        image_encoder: which encoder the image tokens came from, as its feature cache says.
        language_model: folder or hub name (stage 2).
        tokenizer: folder or hub name of the Q-Former's tokenizer (stage 1).
        step: optimizer steps taken.
        frozen: which models "image_encoder" and "language_model" are, where that is known; of image
            tokens, what their cache says.
    """

    stage: int
    sizes: dict[str, Any]
    image_encoder: str = ""
    language_model: str | None = None
    tokenizer: str | None = None
    step: int = 0
    frozen: dict[str, FrozenIdentity] = dataclasses.field(default_factory=dict)

    def config(self) -> Stage1Config | Stage2Config:
        """The sizes as the model's configuration."""
        return Stage1Config(**self.sizes) if self.stage == 1 else Stage2Config(**self.sizes)


def trained_names(model: nn.Module) -> list[str]:
    """Names of the parameters that training changes."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def save_model(folder: Path, state: Mapping[str, Tensor], description: Description) -> None:
    """Write a trained model into `folder`; an older one is replaced atomically.

    Whenever this is killed, the older model or the new one is there, never a mixture.
    """
    manifest.replace_files(folder, model_files(state, description))


def is_trained(path: str | Path) -> bool:
    """Whether a trained model or a checkpoint is at `path`; nothing is checked."""
    return any((Path(path) / name).is_file() for name in (MANIFEST, DESCRIPTION))


def read_description(path: str | Path) -> Description:
    """Read `model.json` of a finished run, or of a checkpoint.

    Raises:
        ValueError: not found, of an earlier format, or not as it was written.
    """
    values = read_json(Path(path), DESCRIPTION)
    identities = {part: FrozenIdentity(**v) for part, v in values.pop("frozen").items()}
    return Description(**values, frozen=identities)


def read_parameters(path: str | Path) -> dict[str, Tensor]:
    """The trained parameters of a finished run or a checkpoint, fp32, on the CPU.

    Raises:
        ValueError: as `read_description`.
    """
    return load_tensors(Path(path), MODEL)


def load_trained(
    path: str | Path, language_model: PreTrainedModel | None = None, check: bool = True
) -> Blip2Stage1 | Blip2Stage2:
    """Load the model that a run trained, ready for evaluation.

    Args:
        path: output folder of a finished run, or one of its checkpoints.
        language_model: stage 2: use this one instead of loading the one that `model.json` names.
        check: refuse a language model that is not the one it was trained with, see
            `blip2fast.frozen.identity`; otherwise any of the same width will do.

    Returns:
        The model in fp32, on the CPU, in evaluation mode.

    Raises:
        ValueError: nothing there, cut or damaged, tensors of other shapes than the sizes say, or
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
    load_parameters(model, state, str(path))
    return model.eval()


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
    name = description.language_model
    if name is None:
        raise ValueError(f"{path} names no language model; pass language_model=...")
    remedy = "Put back the one it was trained with, pass it as language_model=..."
    # before it is loaded, where its files tell which one it is
    known = source_identity(name) if check else None
    refuse(known, remedy)
    model = load_language_model(name, torch.float32)
    if check and known is None:
        refuse(identify_model(model), remedy)
    return model


def check_frozen(
    description: Description, part: str, given: FrozenIdentity | None, source: str, remedy: str
) -> None:
    """Refuse a frozen model that is not the one that a trained model belongs to.

    Args:
        description: of the trained model.
        part: "language_model" or "image_encoder".
        given: which one it is to be used with; None: not known, and not refused.
        source: where the trained model is, for the message.
        remedy: what the caller can do, a sentence.

    Raises:
        ValueError: another one; both are named.
    """
    refuse_other(_PARTS[part], description.frozen.get(part), given, source, remedy)


def load_parameters(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load trained parameters; frozen ones are not touched.

    Raises:
        ValueError: a parameter that is missing, unknown or of another shape, with both shapes.
    """
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_state(source, state, own)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def model_files(state: Mapping[str, Tensor], description: Description) -> dict[str, manifest.Write]:
    """The writer of each file of a trained model."""
    return {
        MODEL: lambda path: save_file(on_cpu(state), path),
        DESCRIPTION: write_json(dataclasses.asdict(description)),
    }
