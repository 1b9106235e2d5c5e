"""The device that models compute on."""

from __future__ import annotations

import torch


def compute_device(given: torch.device | str | None) -> torch.device:
    """The device to compute on; None: CUDA if available.

    Raises:
        ValueError: no device, or none that is here.
    """
    if given is None:
        given = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(given)
    except RuntimeError:
        raise ValueError(f"device {str(given)!r}: give cpu, cuda or cuda:NUMBER") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device {str(given)!r}: PyTorch finds {count} CUDA devices here")
    return device
