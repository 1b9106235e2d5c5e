"""Models that say how well a text fits an image: our own ITC and ITM, and CLIP's kind.

Shapes: B images, T texts of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from blip2fast._imports import needs
from blip2fast.checkpoints.trained import is_trained
from blip2fast.frozen.hub import check_weights
from blip2fast.frozen.pictures import to_rgb
from blip2fast.inference.inputs import Transform
from blip2fast.inference.model_folders import check_model_folder, stage_of_transformers
from blip2fast.search.retriever import Blip2Retriever

with needs("read images", "PIL"):
    from PIL import Image


class Ranker(Protocol):
    """Scores texts of images.

    Attributes:
        transform: from a PIL image to a tensor, of one shape for all images.
    """

    @property
    def transform(self) -> Transform: ...

    def scores(self, pixels: Tensor, texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """The score of each text of each image [B, 3, h, w]; larger is better."""
        ...


class OwnRanker:
    """A stage-1 model: ITC similarity, or with `match` ITM's "match" logit added to it."""

    def __init__(self, retriever: Blip2Retriever, match: bool = False) -> None:
        self._retriever, self._match = retriever, match
        self.transform = retriever.transform

    def scores(self, pixels: Tensor, texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """See `Ranker`."""
        tokens = self._retriever.image_tokens(list(pixels))
        features = self._retriever.encode_images(image_embeds=tokens)
        every = [text for each in texts for text in each]
        image = torch.tensor([i for i, each in enumerate(texts) for _ in each])
        words = self._retriever.encode_texts(every)
        # [T, Q] of each text with its own image
        found = torch.einsum("tqd,td->tq", features[image], words).amax(1)
        if self._match:
            found = found + self._retriever.match_logits(tokens[image.to(tokens.device)], every)
        return _nested(found, texts)


class ClipRanker:
    """The cosine of a model with image and text features, such as CLIP or SigLIP.

    Args:
        path: folder or hub name of a transformers model.
        dtype, device: of the model.
    """

    def __init__(self, path: str, dtype: torch.dtype, device: torch.device) -> None:
        self._model = AutoModel.from_pretrained(path, dtype=dtype, trust_remote_code=False)
        for name in ("get_image_features", "get_text_features"):
            if not hasattr(self._model, name):
                raise ValueError(f"a {type(self._model).__name__} has no {name}")
        self._model.to(device).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        self._processor = AutoImageProcessor.from_pretrained(
            path, backend="pil", trust_remote_code=False
        )
        text = self._model.config.get_text_config()
        self._most = int(getattr(text, "max_position_embeddings", 77))
        # SigLIP was trained on texts padded to their full length
        self._padding = "max_length" if "siglip" in self._model.config.model_type else True

    def transform(self, image: Image.Image) -> Tensor:
        """[3, h, w], by the model's image processor."""
        pixels: Tensor = self._processor(images=to_rgb(image), return_tensors="pt")["pixel_values"]
        return pixels[0]

    @torch.no_grad()
    def scores(self, pixels: Tensor, texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """See `Ranker`."""
        device = self._model.device
        images = _features(
            self._model.get_image_features(pixel_values=pixels.to(device, self._model.dtype))
        )
        every = [text for each in texts for text in each]
        tokens = self._tokenizer(
            every,
            padding=self._padding,
            truncation=True,
            max_length=self._most,
            return_tensors="pt",
        )
        words = _features(
            self._model.get_text_features(**{name: ids.to(device) for name, ids in tokens.items()})
        )
        image = torch.tensor([i for i, each in enumerate(texts) for _ in each], device=device)
        return _nested((images[image] * words).sum(1), texts)


def _features(output: Any) -> Tensor:
    """Unit-normalised features; transformers 5 returns them inside an object."""
    values: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return torch.nn.functional.normalize(values.float(), dim=-1)


def _nested(scores: Tensor, texts: Sequence[Sequence[str]]) -> list[list[float]]:
    left = iter(scores.float().tolist())
    return [[next(left) for _ in each] for each in texts]


def check_ranker(path: str, match: bool) -> None:
    """Refuse a ranker before anything is loaded.

    Raises:
        ValueError: not found, a model that does not compare, or `match` of one without ITM.
    """
    own = is_trained(path) or (Path(path) / "checkpoints").is_dir()
    if not own:
        fault = check_weights("ranker", path)
        if fault is not None:
            raise ValueError(fault)
        own = stage_of_transformers(path) > 0
    if own:
        check_model_folder(path, (1,))
    elif match:
        raise ValueError(f"--match: the ranker {path} has no matching head; give a stage-1 model")


def load_ranker(
    path: str,
    match: bool,
    dtype: torch.dtype,
    device: torch.device,
    image_encoder: str | None = None,
) -> Ranker:
    """A ranker of a folder or hub name; of a run, its image encoder where it is now.

    Raises:
        ValueError: a model that cannot be loaded, or does not compare.
    """
    if is_trained(path) or stage_of_transformers(path) > 0:
        moved = image_encoder if is_trained(path) else None
        retriever = Blip2Retriever.from_pretrained(
            path, dtype=dtype, device=device, image_encoder=moved
        )
        return OwnRanker(retriever, match)
    try:
        return ClipRanker(path, dtype, device)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"ranker {path!r} cannot be loaded: {reason}") from error
