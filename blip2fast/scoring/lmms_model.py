"""A model of lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval), which has many more benchmarks.

    lmms_eval --model blip2fast --model_args pretrained=runs/stage2 --tasks vqav2_val

lmms-eval finds it by the entry point `lmms_eval.models` once both packages are installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from blip2fast._imports import needs
from blip2fast.inference.model import Blip2
from blip2fast.scoring.models import DTYPES, ModelSource

with needs("be a model of lmms-eval", "lmms_eval"):
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

_MARKER = "<image>"


def manifest() -> Any:
    """What the entry point gives to lmms-eval."""
    name = f"{Blip2Fast.__module__}.{Blip2Fast.__qualname__}"
    return ModelManifest(model_id="blip2fast", simple_class_path=name)


class Blip2Fast(lmms):
    """`Blip2` as lmms-eval calls its models: one image and one text a request.

    Args:
        pretrained: as in `Blip2.from_pretrained`.
        prompt: template with `{}` for the task's text; None: the model's own for questions.
        dtype: "fp32", "bf16" or "fp16".
        device: by default CUDA where there is one.
        batch_size: requests at a time.
        num_beams, length_penalty: used where the task says nothing.
        more: options of lmms-eval that every model is given; only empty ones are accepted.

    Raises:
        ValueError: no such model, no encoder for pictures, or an unknown option.
    """

    def __init__(
        self,
        pretrained: str,
        prompt: str | None = None,
        dtype: str = "fp32",
        device: str | None = None,
        batch_size: int | str = 1,
        num_beams: int = 5,
        length_penalty: float = -1.0,
        **more: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(name for name, value in more.items() if value not in (None, ""))
        if unknown:
            raise ValueError(f"blip2fast has no option {unknown[0]!r} in --model_args")
        source = ModelSource(pretrained, dtype)
        self.blip2 = Blip2.from_pretrained(source.path, dtype=DTYPES[dtype], device=device)
        self.blip2.check_reads_pictures()
        self.prompt = self.blip2.prompts.question if prompt is None else prompt
        self.batch_size = int(batch_size)
        self._defaults = {"num_beams": int(num_beams), "length_penalty": float(length_penalty)}

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer requests, each a text about one image.

        Raises:
            ValueError: a request without an image, or with several.
        """
        texts: list[str] = []
        for settings, group in groupby(requests, lambda request: dict(request.args[1])):
            several = list(group)
            for start in range(0, len(several), self.batch_size):
                texts += self._answer(several[start : start + self.batch_size], settings)
        return texts

    def _answer(self, requests: Sequence[Instance], settings: dict[str, Any]) -> list[str]:
        images = [self._image(request) for request in requests]
        asked = [request.args[0].replace(_MARKER, "").strip() for request in requests]
        options = self._options(settings)
        answers: Any = self.blip2.answer(images, asked, prompt=self.prompt, **options)
        return [_until(answer, settings.get("until")) for answer in answers]

    def _image(self, request: Instance) -> Any:
        _, _, visual, number, task, split = request.args
        found = visual(self.task_dict[task][split][number])
        if len(found) != 1:
            raise ValueError(
                f"task {task}, sample {number}: {len(found)} images, and blip2fast reads one a text"
            )
        return found[0]

    def _options(self, settings: dict[str, Any]) -> Any:
        """The task's options of generation, without those that have no effect."""
        names = ("max_new_tokens", "num_beams", "length_penalty", "repetition_penalty")
        given = {n: settings[n] for n in names if settings.get(n) is not None}
        options = {**self._defaults, **given, "batch_size": self.batch_size}
        if settings.get("do_sample") and (settings.get("temperature") or 0) > 0:
            sampling = {n: settings[n] for n in ("temperature", "top_p") if settings.get(n)}
            options |= {"do_sample": True, "num_beams": 1, **sampling}
        return options

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not there: blip2fast writes answers, and its tasks of lmms-eval generate."""
        raise NotImplementedError("blip2fast has no loglikelihood: take tasks that generate")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not there: BLIP-2 was not trained on conversations."""
        raise NotImplementedError("blip2fast has no tasks of several rounds")


def _until(text: str, ends: str | Sequence[str] | None) -> str:
    """The text before the first of the strings that end it."""
    for end in [ends] if isinstance(ends, str) else ends or []:
        text = text.split(end)[0] if end else text
    return text.strip()
