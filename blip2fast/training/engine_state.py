"""Reads and writes the full fp32 state of a DeepSpeed engine, for any ZeRO stage.

DeepSpeed's own checkpoints hold per-rank shards and load only with the same world size and ZeRO
stage. The trained part of BLIP-2 is small enough to gather: fp32 values and AdamW's two moments,
by parameter name.

Where DeepSpeed keeps them:
    fp32, stage 0        in the parameters and AdamW's state for them
    bf16/fp16, stage 0   in fp32 copies, one per parameter
    stages 1 and 2       in flat fp32 shards; `_hp_mapping` maps parameters to their slices
    stage 3              in flat fp32 shards; accessed through `deepspeed.utils`
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from blip2fast._imports import needs
from blip2fast.stage1.model import Blip2Stage1

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def master_parameters(engine: DeepSpeedEngine, model: nn.Module) -> dict[str, Tensor]:
    """The full fp32 values of the trained parameters; every process must call this."""
    return {name: _read(engine, p, None) for name, p in _trained(model)}


def optimizer_moments(engine: DeepSpeedEngine, model: nn.Module) -> dict[str, Tensor]:
    """AdamW's full moments as `<moment>/<name>`; every process must call this.

    The moments do not exist before the first optimizer step.
    """
    return {
        f"{moment}/{name}": _read(engine, p, moment)
        for moment in MOMENTS
        for name, p in _trained(model)
    }


def keep_temperature(engine: DeepSpeedEngine, model: nn.Module) -> None:
    """Store the fp32 value of the temperature in a model whose engine casts it to 16 bits.

    Between 0.0625 and 0.125 adjacent bf16 values are 0.0005 apart: a rounded temperature would
    stay constant in the losses for many steps and then jump. Every process must call this after
    every optimizer step.
    """
    if not (isinstance(model, Blip2Stage1) and model.temp.requires_grad):
        return
    if model.temp.dtype.itemsize == 2:
        model.exact_temp = _read(engine, model.temp, None).view(model.temp.shape)


def restore(
    engine: DeepSpeedEngine,
    model: nn.Module,
    parameters: dict[str, Tensor],
    moments: dict[str, Tensor] | None = None,
    updates: int = 0,
) -> None:
    """Restore the parameters and moments of an engine whose AdamW has made `updates` updates.

    At step 0 this works around DeepSpeed 0.19, which rounds the fp32 copies of a new stage-0 bf16
    engine to bf16 and has already counted an AdamW step without gradients.

    Args:
        engine: built around `model` after `parameters` were loaded into it, so its low-precision
            copies are already correct.
        parameters, moments: unsharded, and validated against the model by the caller. Empty
            moments are restored as zeros.
        updates: steps that AdamW has taken, without skipped ones.
    """
    optimizer = engine.basic_optimizer
    for shard in optimizer_shards(engine):
        optimizer.state[shard] = {
            "step": torch.full((), float(updates), device=shard.device),
            **{moment: torch.zeros_like(shard) for moment in MOMENTS},
        }
    with torch.no_grad():
        for name, parameter in _trained(model):
            _write(engine, parameter, None, parameters[name])
            if moments is not None:
                for moment in MOMENTS:
                    _write(engine, parameter, moment, moments[f"{moment}/{name}"])


def optimizer_state(engine: DeepSpeedEngine) -> dict[str, Any]:
    """What the optimizer holds besides moments: AdamW's count of updates, and fp16's loss scale."""
    state: dict[str, Any] = {
        "updates": int(engine.basic_optimizer.state[optimizer_shards(engine)[0]]["step"])
    }
    scaler = _loss_scaler(engine)
    if scaler is not None:
        state["loss_scale"] = {
            name: getattr(scaler, name) for name in _SCALE if hasattr(scaler, name)
        }
    return state


def restore_loss_scale(engine: DeepSpeedEngine, state: dict[str, Any]) -> None:
    """Restore fp16's loss scale from what `optimizer_state` returned; the stage may differ."""
    scaler = _loss_scaler(engine)
    if scaler is not None:
        for name, value in state.get("loss_scale", {}).items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)


def lowers_loss_scale(engine: DeepSpeedEngine) -> bool:
    """Whether the engine answers an overflow in fp16 with a lower loss scale."""
    scaler = _loss_scaler(engine)
    if scaler is None:
        return False
    # the two kinds of scalers name it differently
    least = getattr(scaler, "min_scale", None) or getattr(scaler, "min_loss_scale", None) or 0
    return bool(scaler.cur_scale > least)


def scale_of_norm(engine: DeepSpeedEngine) -> float:
    """The factor in the gradient norm that the engine reports after its next step.

    ZeRO stages report it without the loss scale, and stage 0 in fp16 with it.
    """
    scaler = _loss_scaler(engine)
    return 1.0 if scaler is None or engine.zero_optimization() else float(scaler.cur_scale)


def _loss_scaler(engine: DeepSpeedEngine) -> Any:
    """The object that holds fp16's dynamic loss scale; None in other precisions."""
    if not engine.fp16_enabled():
        return None
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scale_config", None) or optimizer.loss_scaler


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def optimizer_shards(engine: DeepSpeedEngine) -> list[Tensor]:
    """The tensors that this process's AdamW updates."""
    if engine.zero_optimization_stage() == 3:
        shards: list[Tensor] = engine.optimizer.fp32_partitioned_groups_flat
        return shards
    return [p for group in engine.basic_optimizer.param_groups for p in group["params"]]


def _own_part(engine: DeepSpeedEngine, parameter: Any) -> tuple[Tensor, slice, slice] | None:
    """Stages 0 to 2: (shard, slice of it, slice of the flat parameter); None if on other ranks."""
    whole = slice(0, parameter.numel())
    if engine.zero_optimization_stage() == 0:
        optimizer = engine.optimizer
        if not hasattr(optimizer, "fp32_groups"):
            return parameter, whole, whole
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for candidate, copy in zip(low, high, strict=True):
                if candidate is parameter:
                    return copy, whole, whole
        raise ValueError("a trained parameter is unknown to the optimizer")
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    groups = engine.basic_optimizer.param_groups
    (shard,) = groups[mapping.param_group_index]["params"]
    there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
    return (
        shard,
        slice(there.start, there.start + there.numel),
        slice(here.start, here.start + here.numel),
    )


def _read(engine: DeepSpeedEngine, parameter: Any, moment: str | None) -> Tensor:
    if engine.zero_optimization_stage() == 3:
        with needs("train", "deepspeed"):
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if moment is None:
            value = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, moment)
        return value.reshape(parameter.ds_shape).clone()
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    own = _own_part(engine, parameter)
    if own is not None:
        shard, there, here = own
        source = shard if moment is None else engine.basic_optimizer.state[shard][moment]
        whole[here] = source.detach().view(-1)[there].to(whole.device)
    if engine.zero_optimization_stage() > 0 and dist.get_world_size() > 1:
        # Each element is nonzero on at most one process, so the sum is exact.
        dist.all_reduce(whole)
    return whole.view(parameter.shape)


def _write(engine: DeepSpeedEngine, parameter: Any, moment: str | None, value: Tensor) -> None:
    if engine.zero_optimization_stage() == 3:
        with needs("train", "deepspeed"):
            from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        count = parameter.ds_tensor.numel()
        padded = torch.zeros(count * dist.get_world_size(), dtype=torch.float32)
        padded[: value.numel()] = value.flatten()
        part = padded[dist.get_rank() * count :][:count].to(parameter.ds_tensor.device)
        if moment is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, moment)
        return
    own = _own_part(engine, parameter)
    if own is not None:
        shard, there, here = own
        target = shard if moment is None else engine.basic_optimizer.state[shard][moment]
        target.detach().view(-1)[there] = value.flatten()[here].to(target)
