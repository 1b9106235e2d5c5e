"""Trained models and checkpoints on disk, in one form for every ZeRO stage and number of processes.

    model.safetensors      the trained parameters, whole, fp32
    model.json             stage, sizes, and which frozen models they belong to
    optimizer.safetensors  exp_avg/<name> and exp_avg_sq/<name>, whole, fp32     (checkpoint only)
    random_<rank>.pt       random states of a process                            (checkpoint only)
    state.json             step, and the configuration of the run                (checkpoint only)

A folder is written as `<name>.partial` and renamed when complete, so a run that is killed while
writing leaves the checkpoint before it as the last one.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig as LanguageConfig
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from blip2fast.stage1 import Blip2Stage1
from blip2fast.stage1_types import Stage1Config
from blip2fast.stage2 import Blip2Stage2
from blip2fast.stage2_types import Stage2Config
from blip2fast.state_dicts import check_state

_FORMAT = 1
_MODEL, _DESCRIPTION = "model.safetensors", "model.json"
_OPTIMIZER, _STATE = "optimizer.safetensors", "state.json"


@dataclasses.dataclass(frozen=True)
class Description:
    """What `model.json` says of the trained parameters beside it.

    Attributes:
        stage: 1 or 2.
        sizes: fields of Stage1Config or Stage2Config.
        image_encoder: which encoder the image tokens came from, as its feature cache says.
        language_model: folder or hub name (stage 2).
        tokenizer: folder or hub name of the Q-Former's tokenizer (stage 1).
        step: optimizer steps taken.
    """

    stage: int
    sizes: dict[str, Any]
    image_encoder: str = ""
    language_model: str | None = None
    tokenizer: str | None = None
    step: int = 0

    def config(self) -> Stage1Config | Stage2Config:
        """The sizes as the model's configuration."""
        return Stage1Config(**self.sizes) if self.stage == 1 else Stage2Config(**self.sizes)


def trained_names(model: nn.Module) -> list[str]:
    """Names of the parameters that training changes."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def save_model(folder: Path, state: Mapping[str, Tensor], description: Description) -> None:
    """Write `model.safetensors` and `model.json` into `folder`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / _MODEL, lambda path: save_file(_on_cpu(state), path))
    values = {"format": _FORMAT, **dataclasses.asdict(description)}
    _replace(folder / _DESCRIPTION, lambda path: _write_json(path, values))


def read_description(path: str | Path) -> Description:
    """Read `model.json` of a finished run, or of a checkpoint.

    Raises:
        ValueError: not there, or of another format.
    """
    values = _read_json(Path(path) / _DESCRIPTION)
    if values.pop("format", None) != _FORMAT or values.get("stage") not in (1, 2):
        raise ValueError(f"{Path(path) / _DESCRIPTION}: not format {_FORMAT} of a trained model")
    return Description(**values)


def read_parameters(path: str | Path) -> dict[str, Tensor]:
    """The trained parameters of a finished run or a checkpoint, fp32, on the CPU."""
    return _load_tensors(Path(path) / _MODEL)


def load_trained(
    path: str | Path, language_model: PreTrainedModel | None = None
) -> Blip2Stage1 | Blip2Stage2:
    """Build the model that a run trained, ready for evaluation.

    Args:
        path: output folder of a finished run, or one of its checkpoints.
        language_model: stage 2: use this one instead of loading the one that `model.json` names.

    Returns:
        The model in fp32, on the CPU, in evaluation mode.

    Raises:
        ValueError: nothing there, half-written, or tensors of other shapes than the sizes say.
    """
    description = read_description(path)
    state, config = read_parameters(path), description.config()
    model: Blip2Stage1 | Blip2Stage2
    if isinstance(config, Stage1Config):
        model = Blip2Stage1(config)
    else:
        if language_model is None:
            if description.language_model is None:
                raise ValueError(f"{path} names no language model; pass language_model=...")
            language_model = load_language_model(description.language_model, torch.float32)
        model = Blip2Stage2(config, language_model)
    load_parameters(model, state, str(path))
    return model.eval()


def load_language_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A causal or an encoder-decoder language model, by folder or hub name.

    Raises:
        ValueError: not there.
    """
    try:
        config = LanguageConfig.from_pretrained(name)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return kind.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"language model {name!r}: not there: give a local folder or a hub name that can be "
            f"reached ({error})"
        ) from error


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


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's generators in this process."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (the one that libraries draw from)
    states = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).copy()), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore what `random_states` gave."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder`; half-written ones do not count."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return max(found, key=lambda path: int(path.name[5:]), default=None)


def save_checkpoint(
    folder: Path,
    description: Description,
    parameters: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    run: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Write `folder/step-<step>`; every process calls this, the first one writes the tensors.

    Args:
        folder: the run's checkpoints.
        description, parameters: as for `save_model`.
        moments: AdamW's, `exp_avg/<name>` and `exp_avg_sq/<name>`.
        run: what `state.json` says besides the step; compared when resuming.
        keep_last: older checkpoints beyond this many are deleted.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    final = folder / f"step-{description.step:08d}"
    partial = final.with_name(final.name + ".partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    torch.save(random_states(), partial / f"random_{rank:05d}.pt")
    if rank == 0:
        save_model(partial, parameters, description)
        save_file(_on_cpu(moments), partial / _OPTIMIZER)
        state = {"format": _FORMAT, "step": description.step, "world_size": world, "run": run}
        _write_json(partial / _STATE, state)
    dist.barrier()
    if rank == 0:
        if final.exists():
            _delete(final)
        partial.rename(final)
        _delete_old(folder, keep_last)
    dist.barrier()
    return final


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back; see `read_checkpoint`."""

    path: Path
    step: int
    world_size: int
    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]

    def random_states(self, rank: int) -> dict[str, Any]:
        """The random states of process `rank`."""
        states: dict[str, Any] = torch.load(self.path / f"random_{rank:05d}.pt", weights_only=True)
        return states


def read_checkpoint(path: Path, run: Mapping[str, Any]) -> Checkpoint:
    """Read a checkpoint that a run of configuration `run` wrote.

    Raises:
        ValueError: half-written, or written by a run of another configuration; every key that
            differs is named with both values.
    """
    state = _read_json(path / _STATE)
    there = _flat(state["run"])
    here = _flat(json.loads(json.dumps(run)))
    differing = [
        f"{key} is {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    ]
    if differing:
        raise ValueError(
            f"{path} was written by another run and cannot be resumed: {'; '.join(differing)}. Set "
            "the same values, or start a new output_dir with init_from"
        )
    return Checkpoint(
        path,
        state["step"],
        state["world_size"],
        read_parameters(path),
        _load_tensors(path / _OPTIMIZER),
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _replace(path: Path, write: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.replace(path)


def _delete_old(folder: Path, keep_last: int) -> None:
    for path in folder.glob("*.partial"):
        shutil.rmtree(path)
    steps = sorted(p for p in folder.glob("step-*") if p.name[5:].isdigit())
    for path in steps[:-keep_last]:
        _delete(path)


def _delete(path: Path) -> None:
    # Renamed first: a kill while deleting must not leave half a checkpoint under its name.
    shutil.rmtree(path.rename(path.with_name(path.name + ".old.partial")))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"no trained model at {path.parent}: {path.name} is missing")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: half-written or damaged ({error})") from error


def _load_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"no trained model at {path.parent}: {path.name} is missing")
    try:
        with safe_open(path, "pt"):
            pass
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: half-written or damaged ({error})") from error
