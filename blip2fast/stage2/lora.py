"""Low-rank adapters (LoRA) of the frozen language model, by `peft`.

    add_lora(model.language_model, r=8, alpha=16)
    ...                                   # train `model.trainable_parameters()`
    merge_lora(model.language_model)      # the same function, without adapters

Adapters are injected into the language model itself, which keeps its class. They are stored as
peft stores them, `adapter_model.safetensors` and `adapter_config.json`, so that
`peft.PeftModel.from_pretrained(language_model, folder)` reads them.
"""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blip2fast._imports import needs

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAME = "default"  # peft's name of an adapter that is given none
_OWN = "language_model."
# where peft wraps a whole model, its names begin with this
_WRAPPED = "base_model.model."
_WITH_NAME = re.compile(rf"\.(lora_\w+)\.{NAME}(?=\.|$)")
_WITHOUT_NAME = re.compile(r"\.(lora_\w+)(?=\.|$)")


def lora_config(
    language_model: PreTrainedModel,
    r: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    target_modules: list[str] | str | None = None,
) -> LoraConfig:
    """peft's configuration of adapters.

    Args:
        language_model: the model that gets them.
        r: rank of the update of a weight.
        alpha: the update is scaled by alpha / r.
        dropout: dropout rate of the adapters' inputs, in training.
        target_modules: ends of the names of linear layers, or `all-linear`; None: peft's choice
            for the model type, which is the query and value projections.
    """
    with needs("train LoRA adapters", "peft"):
        from peft import LoraConfig, TaskType

    encoder_decoder = bool(language_model.config.is_encoder_decoder)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        task_type=TaskType.SEQ_2_SEQ_LM if encoder_decoder else TaskType.CAUSAL_LM,
        base_model_name_or_path=getattr(language_model, "name_or_path", None) or None,
    )


def add_lora(
    language_model: PreTrainedModel, config: LoraConfig | None = None, **settings: Any
) -> None:
    """Inject adapters into a frozen language model; they are fp32, trained, and change nothing yet.

    The weights of the model stay frozen. Call it after `Blip2Stage2` has frozen the model, and
    `train()` on that afterwards.

    Args:
        language_model: the model.
        config: peft's configuration.
        settings: those of `lora_config`, instead of `config`.

    Raises:
        ValueError: the model has adapters already, is streamed or partitioned, or has no layer of
            a name in `target_modules`; close names are listed.
    """
    config = config or lora_config(language_model, **settings)
    with needs("train LoRA adapters", "peft"):
        from peft import inject_adapter_in_model

    if has_lora(language_model):
        raise ValueError(
            f"{type(language_model).__name__} has adapters already: merge_lora them first"
        )
    if any(p.device.type == "meta" or hasattr(p, "ds_id") for p in language_model.parameters()):
        raise ValueError(
            "LoRA needs the whole language model on the device: leave out offload and zero_stage 3"
        )
    target_names(language_model, config.target_modules)
    frozen = {id(p) for p in language_model.parameters()}
    with torch.random.fork_rng(devices=[]):
        # like the rest of the model, adapters do not depend on what was drawn before
        torch.manual_seed(torch.initial_seed())
        inject_adapter_in_model(config, language_model, adapter_name=NAME)
    for parameter in language_model.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
        if id(parameter) not in frozen:
            parameter.data = parameter.data.float()
    set_adapter_dropout(language_model, language_model.training)


def target_names(
    language_model: PreTrainedModel, target_modules: Collection[str] | str | None
) -> list[str]:
    """The full names of the linear layers that `target_modules` means.

    Raises:
        ValueError: as `add_lora`; or None for a model type that peft does not know.
    """
    linear = [n for n, m in language_model.named_modules() if isinstance(m, nn.Linear)]
    if target_modules == "all-linear":
        head = language_model.get_output_embeddings()
        return [name for name in linear if language_model.get_submodule(name) is not head]
    kind = language_model.config.model_type
    if target_modules is None:
        with needs("train LoRA adapters", "peft"):
            from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

        target_modules = KNOWN.get(kind)
        if target_modules is None:
            raise ValueError(
                f"language_model.lora: peft names no layers of a {kind!r} model: set target_modules"
            )
    wanted = {target_modules} if isinstance(target_modules, str) else set(target_modules)
    ends = {name: [n for n in linear if n == name or n.endswith(f".{name}")] for name in wanted}
    known = sorted({name.rpartition(".")[2] for name in linear})
    for name in sorted(wanted):
        if not ends[name]:
            near = difflib.get_close_matches(name, known, 3, 0.4) or known
            raise ValueError(
                f"language_model.lora.target_modules {name!r}: no linear layer of "
                f"{type(language_model).__name__} has this name; near it are {', '.join(near)}"
            )
    found = {full for names in ends.values() for full in names}
    return [name for name in linear if name in found]


def has_lora(language_model: nn.Module) -> bool:
    """Whether a model has LoRA adapters."""
    return any("lora_" in name for name, _ in language_model.named_parameters())


def merge_lora(language_model: PreTrainedModel) -> None:
    """Add the adapters to the weights, which are then plain layers again; equal up to rounding.

    Raises:
        ValueError: the model has no adapters.
    """
    with needs("merge LoRA adapters", "peft"):
        from peft.tuners.lora import LoraLayer

    layers = [(n, m) for n, m in language_model.named_modules() if isinstance(m, LoraLayer)]
    if not layers:
        raise ValueError(f"{type(language_model).__name__} has no adapters to merge")
    for name, layer in layers:
        merged: Any = layer
        merged.merge(safe_merge=True)
        parent, _, last = name.rpartition(".")
        setattr(language_model.get_submodule(parent), last, merged.get_base_layer())
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        vars(language_model).pop(attribute, None)
    language_model.requires_grad_(False)


def set_adapter_dropout(language_model: nn.Module, mode: bool) -> None:
    """Enable or disable the adapters' own dropout; a frozen model around them does not matter."""
    for name, module in language_model.named_modules():
        if name.endswith("lora_dropout"):
            module.train(mode)


def adapter_names(state: Mapping[str, Any]) -> Iterator[str]:
    """Names of adapter weights among those of a `Blip2Stage2`."""
    return (name for name in state if name.startswith(_OWN) and ".lora_" in name)


def to_peft_name(name: str) -> str:
    """peft's name in a file, of a parameter of `Blip2Stage2`."""
    return _WRAPPED + _WITH_NAME.sub(r".\1", name.removeprefix(_OWN))


def from_peft_name(name: str) -> str:
    """The name of a parameter in `Blip2Stage2`, of peft's name in a file."""
    return _OWN + _WITHOUT_NAME.sub(rf".\1.{NAME}", name.removeprefix(_WRAPPED))


def adapter_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter weights of a `Blip2Stage2`'s state, by peft's names."""
    return {to_peft_name(name): state[name] for name in adapter_names(state)}


def write_config(config: LoraConfig, path: Path) -> None:
    """Write peft's `adapter_config.json` at `path`."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        path.write_text(Path(folder, ADAPTER_CONFIG).read_text(encoding="utf-8"), encoding="utf-8")
