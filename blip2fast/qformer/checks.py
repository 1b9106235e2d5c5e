"""One check for every state dict that comes from outside."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def check_state(what: str, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are missing, unknown or of another shape.

    Args:
        what: Where the state comes from, for the message.
        state: Tensors by name.
        wanted: Tensors of the model, by the same names.

    Raises:
        ValueError: naming the first few, with both shapes.
    """
    wrong = [
        f"{name}: expected {tuple(value.shape)}, got {tuple(state[name].shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    wrong += [f"{name}: missing" for name in wanted if name not in state]
    wrong += [f"{name}: unknown" for name in state if name not in wanted]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"{what} does not fit the model's sizes: {'; '.join(wrong[:5])}{more}. "
            "Build the model with the config that the weights were trained with"
        )
