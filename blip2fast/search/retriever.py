"""Searches images by text or by image, in three lines.

    retriever = Blip2Retriever.from_pretrained("runs/stage1")
    retriever.index("photos", "runs/photos.index")
    retriever.search("red heart", k=10)

Candidates by ITC similarity, the largest product of a query feature with the text's feature (paper,
section 3.1), re-ranked by ITM on request (section 4.4). docs/search.md describes the index.

Shapes: B images, T texts, Q queries, D feature width, S image tokens, E image token width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.texts import tokenize_captions
from blip2fast.evaluation.retrieval import chunks, evaluating
from blip2fast.frozen.pictures import load_image
from blip2fast.inference.devices import compute_device
from blip2fast.inference.inputs import OneImage, as_list, to_pixels
from blip2fast.inference.picture_files import find_pictures, load_with, read_ahead
from blip2fast.search.attention import query_attention
from blip2fast.search.index import CODE_WIDTH, IndexWriter, Row, SearchIndex, check_model
from blip2fast.search.loading import Matcher, load_matcher
from blip2fast.search.scan import Nearest
from blip2fast.stage1.losses import max_query_similarity

BATCH_SIZE = 32
MAX_TXT_LEN = 32
RERANK_BATCH = 64


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Attributes:
        key, path, metadata: as they were indexed.
        similarity: by ITC; the cosine for a text, the mean over queries for an image.
        match: ITM's "match" logit, if it was re-ranked.
    """

    key: str
    path: str
    metadata: Mapping[str, Any]
    similarity: float
    match: float | None = None

    @property
    def score(self) -> float:
        """What it is ranked by: the similarity, plus the logit if it was re-ranked (LAVIS)."""
        return self.similarity + (self.match or 0.0)


@dataclass(frozen=True)
class Hits(Sequence[Hit]):
    """The images of one search, best first.

    Attributes:
        exact: whether no other image of the index has a larger similarity than the last.
        read: images whose features were read.
    """

    hits: list[Hit]
    exact: bool
    read: int

    def __len__(self) -> int:
        return len(self.hits)

    def __getitem__(self, index: Any) -> Any:
        return self.hits[index]

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)


@dataclass
class Indexed:
    """What `Blip2Retriever.index` did.

    Attributes:
        added: number of images.
        there: number of those that were in the index.
        faults: one line for each picture that could not be read.
        complain: receives each of them at once.
    """

    added: int = 0
    there: int = 0
    faults: list[str] = field(default_factory=list)
    complain: Callable[[str], None] | None = None

    def note(self, fault: str) -> None:
        """Keep a fault, and tell it."""
        self.faults.append(fault)
        if self.complain is not None:
            self.complain(fault)


class Blip2Retriever:
    """Images found by texts and by images; created by `from_pretrained`.

    Attributes:
        model: the `Blip2Stage1` inside.
    """

    def __init__(self, matcher: Matcher) -> None:
        self.model = matcher.model
        self._matcher = matcher
        self._index: SearchIndex | None = None
        self._cache: FeatureCache | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        image_encoder: str | None = None,
    ) -> Blip2Retriever:
        """Load a model with its tokenizer and image encoder.

        Args:
            path: output folder or checkpoint of a stage-1 run of blip2fast, or folder or hub name
                of a transformers `Blip2ForImageTextRetrieval`.
            dtype: dtype of the weights.
            device: compute device; by default CUDA if available.
            image_encoder: folder or hub name, for a run whose encoder has moved since training.

        Raises:
            ValueError: not found, a model that cannot compare, or parts that do not match.
        """
        return cls(load_matcher(str(path), dtype, compute_device(device), image_encoder))

    @property
    def identity(self) -> dict[str, str]:
        """What an index says of the model that made it."""
        return {"name": self._matcher.name, "weights": self._matcher.weights}

    @property
    def transform(self) -> Callable[..., Tensor]:
        """The image transform of the encoder.

        Raises:
            ValueError: there is no encoder; says why.
        """
        if self._matcher.transform is None:
            raise ValueError(
                f"no image encoder for pictures: {self._matcher.no_encoder}. Give from_pretrained "
                "image_encoder=..., on the command line --image-encoder, or index a feature cache"
            )
        return self._matcher.transform

    def image_tokens(self, images: OneImage | Sequence[OneImage]) -> Tensor:
        """Tokens of the frozen encoder, [B, S, E].

        Args:
            images: PIL images, paths, uint8 pictures or transformed float images; one or a list.

        Raises:
            ValueError: an image that cannot be read, or no image encoder.
        """
        given, _ = as_list(images)
        pixels = torch.stack([to_pixels(each, self.transform) for each in given])
        with evaluating(self.model) as device:
            kind = self.model.query_tokens.dtype
            return self.model.image_tokens(None, pixels.to(device, kind))

    def encode_images(
        self,
        images: OneImage | Sequence[OneImage] | None = None,
        *,
        image_embeds: Tensor | None = None,
    ) -> Tensor:
        """ITC features of images, [B, Q, D], unit-normalised, fp32 on the CPU.

        Args:
            images: as in `image_tokens`.
            image_embeds: instead of images, tokens of the frozen encoder, [B, S, E].
        """
        if (images is None) == (image_embeds is None):
            raise ValueError("give images or image_embeds, one of them")
        if image_embeds is None:
            given, _ = as_list(images)
            parts = (given[i : i + BATCH_SIZE] for i in range(0, len(given), BATCH_SIZE))
            tokens = (self.image_tokens(part) for part in parts)
        else:
            tokens = iter(image_embeds.split(BATCH_SIZE))
        with evaluating(self.model) as device:
            kind = self.model.query_tokens.dtype
            found = [
                self.model.encode_image(some.to(device, kind))[0].float().cpu() for some in tokens
            ]
        return torch.cat(found)

    def encode_texts(self, texts: str | Sequence[str]) -> Tensor:
        """ITC features of texts, [T, D], unit-normalised, fp32 on the CPU.

        Raises:
            ValueError: no text, or an empty one.
        """
        ids, mask = self._tokens([texts] if isinstance(texts, str) else texts)
        with evaluating(self.model) as device:
            found = [
                self.model.encode_text(ids[rows].to(device), mask[rows].to(device)).float().cpu()
                for rows in chunks(len(ids), 256)
            ]
        return torch.cat(found)

    def similarity(
        self, images: OneImage | Sequence[OneImage], texts: str | Sequence[str], match: bool = False
    ) -> Tensor:
        """Similarity of every image with every text, [B, T], fp32 on the CPU.

        Args:
            images: as in `image_tokens`.
            texts: one or several.
            match: add ITM's "match" logit to the ITC similarity, as LAVIS ranks.
        """
        given, _ = as_list(images)
        names = [texts] if isinstance(texts, str) else list(texts)
        tokens = self.image_tokens(given)
        found = max_query_similarity(
            self.encode_images(image_embeds=tokens), self.encode_texts(names)
        )
        if match:
            logits = [
                self.match_logits(image.expand(len(names), -1, -1), names) for image in tokens
            ]
            found = found + torch.stack(logits)
        return found

    def match_logits(self, image_embeds: Tensor, texts: Sequence[str]) -> Tensor:
        """ITM's "match" logit of each pair, [T], fp32 on the CPU.

        Args:
            image_embeds: [T, S, E], the image tokens of each text.
            texts: T texts.
        """
        ids, mask = self._tokens(texts)
        with evaluating(self.model) as device:
            kind = self.model.query_tokens.dtype
            logits = [
                self.model.match(
                    image_embeds[rows].to(device, kind), ids[rows].to(device), mask[rows].to(device)
                )[:, 1]
                for rows in chunks(len(ids), RERANK_BATCH)
            ]
        return torch.cat(logits).float().cpu()

    def attention(self, image: OneImage, text: str) -> Tensor:
        """Attention of each query on the patches of an image beside a text, [Q, p, p], fp32.

        As in `blip2fast.search.attention.query_attention`.
        """
        ids, mask = self._tokens([text])
        return query_attention(self.model, self.image_tokens(image), ids, mask)[0]

    def index(
        self,
        images: str | Path | Sequence[str | Path] | FeatureCache,
        out: str | Path | None = None,
        *,
        recursive: bool = True,
        metadata: Callable[[str], Mapping[str, Any]] | None = None,
        batch_size: int = BATCH_SIZE,
        workers: int = 4,
        code_width: int = CODE_WIDTH,
        complain: Callable[[str], None] | None = None,
    ) -> Indexed:
        """Index images, or add them to an index; then `search` searches it.

        Images whose key is in the index are passed over, so a call that was interrupted is made
        again. The key of a picture is its path from its folder; of a feature cache, its own.

        Args:
            images: a folder, picture files, or a feature cache.
            out: folder of the index; None: a temporary one, which goes with this object.
            recursive: also pictures in folders below.
            metadata: returns what to keep with the image of a key; anything that JSON holds.
            batch_size: images per forward pass.
            workers: threads that read pictures.
            code_width: bytes of a query feature's code (docs/search.md).
            complain: receives the fault of a picture that cannot be read, at once.

        Raises:
            ValueError: no pictures, an index of another model, or no image encoder.
        """
        if out is None:
            self._folder = tempfile.TemporaryDirectory(prefix="blip2fast-index-")
            out = self._folder.name
        config = self.model.config
        cache = images if isinstance(images, FeatureCache) else None
        if isinstance(images, FeatureCache):
            rows = [Row(key) for key in images.keys]
        else:
            _ = self.transform  # an error before anything is written
            rows = _rows_of_files(images, recursive)
        if cache is not None and cache.width != config.encoder_hidden_size:
            raise ValueError(
                f"{cache.path} has tokens of width {cache.width}, but the model reads "
                f"{config.encoder_hidden_size}"
            )
        if metadata is not None:
            rows = [Row(row.key, row.path, metadata(row.key)) for row in rows]
        writer = IndexWriter(
            out, self.identity, config.num_query_tokens, config.embed_dim, code_width=code_width
        )
        done = Indexed(complain=complain)
        with writer, tqdm(total=len(rows), unit="image", disable=None) as bar:
            new = [row for row in rows if row.key not in writer.keys]
            done.there = len(rows) - len(new)
            bar.update(done.there)
            for some, tokens in self._batches(new, cache, batch_size, workers, done, bar):
                if some:
                    writer.add(some, self.encode_images(image_embeds=tokens))
                    done.added += len(some)
        self._index, self._cache = SearchIndex(out), cache
        return done

    def _batches(
        self,
        rows: list[Row],
        cache: FeatureCache | None,
        batch_size: int,
        workers: int,
        done: Indexed,
        bar: Any,
    ) -> Iterator[tuple[list[Row], Tensor]]:
        """Rows and their image tokens; pictures that cannot be read are noted in `done`."""
        if cache is not None:
            for numbers in chunks(len(rows), batch_size):
                some = [rows[i] for i in numbers.tolist()]
                yield some, cache.read([cache.row(row.key) for row in some])
                bar.update(len(some))
            return
        load = load_with(self.transform)
        for batch in read_ahead(rows, lambda row: load(Path(row.path)), batch_size, workers):
            for each in batch:
                if each.pixels is None:
                    done.note(each.fault)
            pixels = [each.pixels for each in batch if each.pixels is not None]
            some = [each.item for each in batch if each.pixels is not None]
            yield some, self.image_tokens(pixels) if pixels else torch.empty(0)
            bar.update(len(batch))

    def open(self, path: str | Path, cache: FeatureCache | None = None) -> SearchIndex:
        """Search the index at `path` from now on.

        Args:
            path: folder of an index that this model made.
            cache: the feature cache that it was made of, which re-ranking reads.

        Raises:
            ValueError: no index there, a damaged one, or one of another model.
        """
        index = SearchIndex(path)
        check_model(index.path, index.model, self.identity)
        self._index, self._cache = index, cache
        return index

    def search(
        self,
        text: str | None = None,
        k: int = 10,
        *,
        image: OneImage | None = None,
        candidates: int | None = None,
        rerank: int = 0,
    ) -> Hits:
        """The k images that fit a text, or are like an image.

        Args:
            text: what to look for.
            k: images to return.
            image: instead of a text.
            candidates: most images whose features are read; None: as many as it takes until the
                result is exact.
            rerank: re-rank this many by ITM, whose pictures are read again (128 in the paper); at
                least k, or 0 for none. The score is the similarity plus the "match" logit.

        Raises:
            ValueError: no index, no or two queries, or a picture to re-rank that cannot be read.
        """
        if self._index is None:
            raise ValueError("no index to search: call index(images) or open(path) first")
        if (text is None) == (image is None):
            raise ValueError("search for a text or for an image, one of them")
        if rerank and (text is None or rerank < k):
            raise ValueError(
                f"rerank={rerank}: give at least k={k}, and a text, which ITM compares with images"
            )
        most = max(k, rerank)
        if text is not None:
            (found,) = self._index.search_texts(self.encode_texts(text), most, candidates)
        elif image is not None:
            (found,) = self._index.search_images(self.encode_images(image), most, candidates)
        hits = self._hits(found)
        if rerank and text is not None:
            hits = self._reranked(hits, text)
        return Hits(hits[:k], found.exact, found.read)

    def _hits(self, found: Nearest) -> list[Hit]:
        assert self._index is not None
        rows = [self._index.row(number) for number in found.rows.tolist()]
        return [
            Hit(row.key, row.path, row.metadata, similarity)
            for row, similarity in zip(rows, found.similarity.tolist(), strict=True)
        ]

    def _reranked(self, hits: list[Hit], text: str) -> list[Hit]:
        scored = []
        for start in range(0, len(hits), BATCH_SIZE):
            some = hits[start : start + BATCH_SIZE]
            logits = self.match_logits(self._tokens_of(some), [text] * len(some)).tolist()
            scored += [
                Hit(hit.key, hit.path, hit.metadata, hit.similarity, match)
                for hit, match in zip(some, logits, strict=True)
            ]
        return sorted(scored, key=lambda hit: -hit.score)

    def _tokens_of(self, hits: list[Hit]) -> Tensor:
        if self._cache is not None:
            return self._cache.read([self._cache.row(hit.key) for hit in hits])
        for hit in hits:
            if not hit.path:
                raise ValueError(
                    f"{hit.key!r} was indexed from a feature cache: re-ranking reads its tokens, "
                    "so give open(path, cache=...)"
                )
        return self.image_tokens([load_image(hit.path) for hit in hits])

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        if not texts:
            raise ValueError("no texts: give at least one")
        for text in texts:
            if not text.strip():
                raise ValueError(f"the text {text!r} is empty")
        most = min(MAX_TXT_LEN, self.model.config.max_position_embeddings)
        tokens = tokenize_captions(self._matcher.tokenizer, texts, most)
        return tokens["input_ids"], tokens["attention_mask"]


def feature_cache(paths: Sequence[str], required: bool = False) -> FeatureCache | None:
    """The feature cache that a command was given in place of pictures, if it was.

    Raises:
        ValueError: a damaged cache, or with `required` none.
    """
    if required or (len(paths) == 1 and Path(paths[0], "keys.json").is_file()):
        return FeatureCache(paths[0])
    return None


def _rows_of_files(images: str | Path | Sequence[str | Path], recursive: bool) -> list[Row]:
    given = [images] if isinstance(images, str | Path) else list(images)
    rows: dict[str, Row] = {}
    for each in map(Path, given):
        for path in find_pictures([each], recursive):
            key = path.relative_to(each).as_posix() if each.is_dir() else path.as_posix()
            if key in rows and rows[key].path != str(path.absolute()):
                raise ValueError(
                    f"{path} and {rows[key].path} have the same key {key!r}: index the folder that "
                    "holds both"
                )
            rows[key] = Row(key, str(path.absolute()))
    return list(rows.values())
