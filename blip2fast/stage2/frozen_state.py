"""A state dict without the frozen models.

Trainers that know only `nn.Module` save `model.state_dict()`. A frozen language model does not
belong there: it is loaded from its own files, is many times larger than what is trained, and its
tied embeddings are one tensor under two names, which safetensors refuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

# FSDP1 and PEFT put modules between, whose names are in one name and not in the other
_BETWEEN = ("_fsdp_wrapped_module.", "base_layer.")


class FrozenState:
    """Which entries of a model's state dict are frozen, by their names when it was built.

    What came later is kept: adapters are not in those files. So is a parameter that somebody
    trains, and everything where FSDP1 has flattened parameters, whose own hook looks for all.

    Args:
        model: Any module.
        frozen: Prefixes of the names of its frozen parts, such as `("language_model.",)`.
    """

    def __init__(self, model: nn.Module, frozen: tuple[str, ...]) -> None:
        self._parts = frozen
        passing = {
            f"{name}.{buffer}" if name else buffer
            for name, module in model.named_modules(remove_duplicate=False)
            for buffer in module._non_persistent_buffers_set
        }
        named = (model.named_parameters, model.named_buffers)
        self._names = frozenset(
            name
            for tensors in named
            for name, _ in tensors(remove_duplicate=False)
            if name.startswith(frozen) and name not in passing
        )

    def left_out(self, model: nn.Module, keys: Iterable[str]) -> Iterator[str]:
        """Those of the keys of a state dict of `model` that are frozen."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if any(getattr(p, "_fsdp_flattened", False) for p in parameters.values()):
            return
        kept = {_plain(name) for name, p in parameters.items() if p.requires_grad}
        for key in keys:
            name = _plain(key)
            if name in kept:
                continue
            # quantised weights have entries of their own below the weight's name
            while name not in self._names and "." in name:
                name = name.rpartition(".")[0]
            if name in self._names:
                yield key

    def forgive(self, _: nn.Module, result: Any) -> None:
        """A hook after `load_state_dict`: a frozen part given in no part is not missing."""
        for part in self._parts:
            names = {name for name in self._names if name.startswith(part)}
            missing = {key for key in result.missing_keys if self._suffix(key) in names}
            if len(missing) == len(names):
                result.missing_keys[:] = [k for k in result.missing_keys if k not in missing]

    def _suffix(self, key: str) -> str:
        """The frozen tensor's name at the end of a key of any prefix."""
        name = _plain(key)
        while name not in self._names and "." in name:
            name = name.partition(".")[2]
        return name


def _plain(name: str) -> str:
    for between in _BETWEEN:
        name = name.replace(between, "")
    return name
