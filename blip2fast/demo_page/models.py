"""The models behind a demo page: what was asked for is checked first, then loaded."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from blip2fast.inference.model import Blip2
from blip2fast.inference.model_folders import check_model_folder
from blip2fast.inference.picture_files import find_pictures
from blip2fast.search.index import INDEX, SearchIndex
from blip2fast.search.retriever import Blip2Retriever


@dataclass(frozen=True)
class PageParts:
    """What a page is made of; nothing is loaded yet. Created by `check`.

    Attributes:
        writer: model of stage 2, for captions and questions.
        matcher: model of stage 1, for search and for attention beside a text.
        pictures: what is searched: an index, or a folder of pictures.
    """

    writer: str | None
    matcher: str | None
    pictures: Path | None

    @classmethod
    def check(cls, models: Sequence[str], pictures: str | Path | None = None) -> PageParts:
        """Find the stage of each model, and what can be searched.

        Args:
            models: runs, checkpoints, transformers folders or hub names, at most one of each
                stage.
            pictures: an index, whose own model is taken if `models` has none of stage 1; or a
                folder of pictures, which is indexed when the page starts.

        Raises:
            ValueError: a model that cannot be loaded, two of one stage, nothing to search, or
                pictures without a model that compares them with texts.
        """
        found: dict[int, str] = {}
        for model in models:
            stage = check_model_folder(model, (1, 2))
            if stage in found:
                raise ValueError(f"{found[stage]} and {model} are both of stage {stage}; give one")
            found[stage] = model
        if not found:
            raise ValueError("no model: give a run of stage 2, of stage 1, or one of each")
        where = None if pictures is None else Path(pictures)
        if where is not None and (where / INDEX).is_file():
            index = SearchIndex(where)
            if not len(index) or not index.row(0).path:
                what = "is empty" if not len(index) else "was made of a feature cache"
                raise ValueError(f"the index {where} {what}, so it has no pictures to show")
            if 1 not in found:
                check_model_folder(index.model["name"], (1,))
                found[1] = index.model["name"]
        elif where is not None:
            find_pictures([where], recursive=True)
            if 1 not in found:
                raise ValueError(
                    f"to search {where} takes a model of stage 1 too; give a second model"
                )
        return cls(found.get(2), found.get(1), where)


@dataclass(frozen=True)
class PageModels:
    """The loaded models of a page; created by `load`.

    Attributes:
        parts: what they were made of.
        writer: captions and answers; None without a model of stage 2.
        matcher: search and attention; None without a model of stage 1.
    """

    parts: PageParts
    writer: Blip2 | None
    matcher: Blip2Retriever | None

    @classmethod
    def load(
        cls,
        parts: PageParts,
        *,
        device: torch.device | str | None = None,
        language_model: str | None = None,
        image_encoder: str | None = None,
        complain: Callable[[str], None] | None = None,
    ) -> PageModels:
        """Load the models, and index a folder of pictures (for as long as the page is there).

        Args:
            parts: what was asked for.
            device: compute device; by default CUDA if available.
            language_model, image_encoder: folder or hub name, for a run whose frozen models have
                moved since training.
            complain: receives the fault of a picture that cannot be indexed.

        Raises:
            ValueError: as `Blip2.from_pretrained` and `Blip2Retriever.from_pretrained`, a model
                without an image encoder, or an index of another model.
        """
        writer = matcher = None
        if parts.writer is not None:
            writer = Blip2.from_pretrained(
                parts.writer,
                device=device,
                language_model=language_model,
                image_encoder=image_encoder,
            )
            writer.check_reads_pictures()
        if parts.matcher is not None:
            matcher = Blip2Retriever.from_pretrained(
                parts.matcher, device=device, image_encoder=image_encoder
            )
            _ = matcher.transform  # an error before the page is there
            if parts.pictures is not None and (parts.pictures / INDEX).is_file():
                matcher.open(parts.pictures)
            elif parts.pictures is not None:
                matcher.index(parts.pictures, complain=complain)
        return cls(parts, writer, matcher)


def check_port(host: str, port: int) -> None:
    """Refuse an address at which no page can be served.

    Raises:
        ValueError: the port is taken, or the host is not of this machine.
    """
    try:
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind((host, port))
    except OSError as error:
        reason = str(error.strerror or error).lower()
        raise ValueError(
            f"cannot serve at {host}, port {port} ({reason}); give another --host or --port"
        ) from None
