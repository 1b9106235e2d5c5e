"""Where the frozen language model of a run is kept, and which settings go with which place.

none: as `zero_stage` and `offload_param` say. stream: blocks on the host, streamed to the device.
zero3: DeepSpeed ZeRO-3 with its parameters on the host. auto: the first of these that fits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from blip2fast.training.config import RunConfig

OffloadChoice = Literal["none", "stream", "zero3", "auto"]
StreamStorage = Literal["as_is", "int8", "int4"]


def offload_faults(config: RunConfig) -> list[str]:
    """Settings that cannot hold together with `config.offload`, whatever the machine."""
    faults: list[str] = []
    offload = config.offload
    if offload != "none" and config.stage == 1:
        faults.append(f"offload {offload!r} is for stage 2's language model, but stage is 1")
    if offload in ("stream", "auto"):
        if config.zero_stage == 3:
            faults.append(
                f"offload {offload!r} needs zero_stage 0, 1 or 2, it is 3: streamed blocks are "
                "whole in every process (offload: zero3 spreads them)"
            )
        if config.offload_param != "none":
            faults.append(
                f"offload {offload!r} decides where the language model is: remove offload_param "
                f"{config.offload_param!r}"
            )
    if offload == "zero3" and config.zero_stage in (1, 2):
        faults.append(
            f"offload 'zero3' stands for zero_stage 3, but zero_stage is {config.zero_stage}: "
            "leave it out"
        )
    if offload in ("none", "zero3"):
        for name, default in (("stream_storage", "as_is"), ("stream_buffers", 2)):
            value = getattr(config, name)
            if value != default:
                faults.append(f"{name} {value!r} belongs to offload: stream, it is {offload!r}")
    return faults


def with_offload(config: RunConfig, offload: Literal["none", "stream", "zero3"]) -> RunConfig:
    """The run with the language model in one place, and the DeepSpeed settings that this means."""
    if offload == "zero3":
        param = "cpu" if config.offload_param == "none" else config.offload_param
        return replace(
            config,
            offload="zero3",
            zero_stage=3,
            offload_param=param,
            stream_storage="as_is",
            stream_buffers=2,
        )
    if offload == "none":
        return replace(config, offload="none", stream_storage="as_is", stream_buffers=2)
    return replace(config, offload="stream")
