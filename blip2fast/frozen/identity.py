"""Identity of frozen models: a trained part must only be used with the models it was trained with.

Soft prompts are trained for one language model, and a Q-Former for the tokens of one image encoder.
With other models of the same width they load without an error, and the output is nonsense.

The identity of the weights is a hash of samples: the shape of every tensor and 256 of its values,
in 8 runs spread from start to end (all values of a smaller tensor), in model order, equal tensors
once. Reading the samples takes a second or two at the start of each run; hashing a hundred
gigabytes would take minutes. The hash distinguishes any two training runs, fine-tuned copies and
merged adapters (which change all values of a tensor), and any change of shape or order. It does not
detect changes of single values between the samples: it guards against mistakes, not against an
attacker or a failing disk.

The identity does not depend on the precision that a model is loaded or stored in: the samples are
hashed as fp32, rounded to bf16 and rounded to fp16, and two models are the same if any of the three
hashes agrees. Tensor and file names are not hashed: they change with transformers versions and
folders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_RUNS, _RUN = 8, 32
# attribute names: a model's recorded identity; the mark of a module with 8- or 4-bit weights
_MARK, _ENCODED = "_frozen_identity", "_weights_encoded"
# Config keys that do not affect the function that the model computes.
_NO_MATTER = {
    *("_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype"),
    *("torch_dtype", "use_cache", "return_dict", "output_attentions", "output_hidden_states"),
    *("id2label", "label2id", "problem_type", "chunk_size_feed_forward", "_attn_implementation"),
    *("_attn_implementation_autoset", "auto_map", "quantization_config"),
}

Sample = tuple[tuple[int, ...], Tensor]  # shape of a tensor, and values sampled from it


@dataclass(frozen=True)
class FrozenIdentity:
    """A frozen model: where it came from, its configuration, and its weights.

    Attributes:
        name: folder or hub name; for messages only, not compared.
        config: config entries that affect the function it computes, with `a.b` keys.
        weights: hashes of the sampled values (see above), by precision.
        values: number of elements in distinct tensors (equal tensors, such as zero biases of one
            shape, count once).
    """

    name: str
    config: dict[str, Any]
    weights: dict[str, str]
    values: int

    def same_weights(self, other: FrozenIdentity) -> bool:
        """Whether the sampled weights agree in any of the precisions."""
        return any(self.weights[p] == other.weights[p] for p in _PRECISIONS)

    def differences(self, other: FrozenIdentity) -> list[str]:
        """The differences, with both values. Keys that only one config has are ignored.

        Versions of transformers add and remove config keys.
        """
        found = [
            f"{key} is {self.config[key]!r} there, {other.config[key]!r} here"
            for key in sorted(self.config.keys() & other.config.keys())
            if self.config[key] != other.config[key]
        ]
        return found if self.same_weights(other) else [*found, "other weights"]

    def __str__(self) -> str:
        kind = self.config.get("model_type", "unknown type")
        return (
            f"{self.name!r} ({kind}, {self.values:,} values, weights {self.weights['fp32'][:12]})"
        )


def refuse_other(
    part: str,
    trained_with: FrozenIdentity | None,
    given: FrozenIdentity | None,
    source: str,
    remedy: str,
) -> None:
    """Refuse a frozen model other than the one used in training.

    Args:
        part: kind of model, such as "language model".
        trained_with, given: identities to compare; if either is None (unknown), the check is
            skipped.
        source: location of the trained model.
        remedy: what the caller can do, a sentence.

    Raises:
        ValueError: names both models and their differences.
    """
    if trained_with is None or given is None:
        return
    differing = trained_with.differences(given)
    if differing:
        more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ValueError(
            f"{source} was trained with the {part} {trained_with}, but {given} is another one: "
            f"{'; '.join(differing[:4])}{more}. {remedy}"
        )


def identify(name: str, config: Any, samples: Iterable[Sample]) -> FrozenIdentity:
    """The identity of a model, from samples of its tensors.

    Args:
        name: folder or hub name.
        config: a transformers config, or any object with `to_dict`; None: no config.
        samples: one per tensor, in model order; see `sampled_parts`.
    """
    digests = {precision: hashlib.sha256() for precision in _PRECISIONS}
    seen: dict[str, set[bytes]] = {precision: set() for precision in _PRECISIONS}
    values = 0
    for shape, sample in samples:
        for precision, dtype in _PRECISIONS.items():
            rounded = sample.to(dtype) if sample.is_floating_point() else sample
            data = rounded.contiguous().view(torch.uint8).numpy().tobytes()
            digest = hashlib.sha256(repr(tuple(shape)).encode() + data).digest()
            # a tied weight is stored once or twice, depending on the file and the version
            if digest in seen[precision]:
                continue
            seen[precision].add(digest)
            digests[precision].update(digest)
            if precision == "fp32":
                values += torch.Size(shape).numel()
    settings = {} if config is None else _function_of(config.to_dict())
    cleaned = dict(flat(json.loads(json.dumps(settings, default=str))))
    return FrozenIdentity(name, cleaned, {p: d.hexdigest() for p, d in digests.items()}, values)


def sampled_parts(count: int) -> list[slice]:
    """Slices of a flattened tensor of `count` elements that form its sample."""
    if count <= _RUNS * _RUN:
        return [slice(0, count)]
    starts = ((count - _RUN) * run // (_RUNS - 1) for run in range(_RUNS))
    return [slice(start, start + _RUN) for start in starts]


def identify_model(model: nn.Module, name: str | None = None) -> FrozenIdentity:
    """The identity of a model in memory, from its current values.

    If the values are not available (partitioned by ZeRO-3, stored in 8 or 4 bits), returns the
    identity recorded when the model was loaded; see `note_identity`.

    Args:
        model: a `transformers` model, or any module.
        name: folder or hub name; by default the model's `name_or_path`.

    Raises:
        ValueError: the values are not available, and no identity was recorded.
    """
    noted: FrozenIdentity | None = vars(model).get(_MARK)
    if not has_own_values(model):
        if noted is None:
            raise ValueError(
                f"{type(model).__name__}: its weights are partitioned, encoded or without values, "
                "so its identity is unknown; load it with load_streamed or "
                "load_partitioned, or call note_identity before its weights are moved"
            )
        return noted
    name = name or getattr(model, "name_or_path", "") or f"a {type(model).__name__} in memory"
    return identify(name, getattr(model, "config", None), _samples(model))


def note_identity(model: nn.Module, identity: FrozenIdentity | None = None) -> None:
    """Record a model's identity before its values are partitioned or encoded.

    Args:
        model: as in `identify_model`.
        identity: by default computed from its values, if they are available and no identity is
            recorded yet.
    """
    if identity is None and (_MARK in vars(model) or not has_own_values(model)):
        return
    vars(model)[_MARK] = identity or identify_model(model)


def mark_encoded(module: nn.Module, encoded: bool = True) -> None:
    """Mark a module whose state dict contains decoded weights instead of the loaded ones."""
    if encoded:
        vars(module)[_ENCODED] = True
    else:
        vars(module).pop(_ENCODED, None)


def has_own_values(model: nn.Module) -> bool:
    """Whether a model's state dict contains its weights as they were loaded."""
    if any(p.device.type == "meta" or hasattr(p, "ds_id") for p in model.parameters()):
        return False
    return not any(_ENCODED in vars(module) for module in model.modules())


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten nested mappings to `a.b` keys."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _function_of(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _function_of(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in _NO_MATTER
    }


@torch.no_grad()
def _samples(model: nn.Module) -> Iterator[Sample]:
    for tensor in model.state_dict().values():
        values = tensor.detach()
        if is_traceable_wrapper_subclass(values):
            values = values.dequantize()  # type: ignore[attr-defined]
        values = values.reshape(-1)
        parts = [values[part] for part in sampled_parts(values.numel())]
        yield tuple(tensor.shape), torch.cat(parts).cpu()
