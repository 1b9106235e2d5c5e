"""An index of image features on disk, mapped into memory.

    index.json                      what follows, replaced as a whole: it commits every change
    basis-<n>.safetensors           what the codes are made with (`blip2fast.search.coding`)
    part-<i>/features.safetensors   [N, Q, D] fp16, unit-normalised
    part-<i>/codes-<n>.safetensors  [N, Q, W] int8, and what their rounding lost
    part-<i>/rows.arrow             key, path and metadata (JSON) of each image

A part is written once, under a temporary name. So an index that is added to, or whose writer was
killed, answers from what was committed. The basis is fitted anew, and all codes written anew, each
time the index has doubled since.

Shapes: N images, Q queries, D feature width, W code width, B texts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blip2fast._imports import needs
from blip2fast.data.manifest import flush, replace_file, write_json, write_through
from blip2fast.search.coding import Basis, bounds_of_images, bounds_of_texts
from blip2fast.search.scan import Nearest, nearest

with needs("keep the rows of an index", "pyarrow"):
    import pyarrow as pa

FORMAT = 1
INDEX, FEATURES, ROWS = "index.json", "features.safetensors", "rows.arrow"
PART_ROWS = 16_384
CODE_WIDTH = 64
_FIT_ROWS = 8_192
_SCHEMA = pa.schema([("key", pa.string()), ("path", pa.string()), ("metadata", pa.string())])


@dataclass(frozen=True)
class Row:
    """An image of an index.

    Attributes:
        key: its name; no two are equal.
        path: its file, or empty.
        metadata: whatever was given with it.
    """

    key: str
    path: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Stated:
    """What `index.json` says."""

    format: int
    model: dict[str, str]
    num_queries: int
    width: int
    code_width: int
    basis: int = 0
    fitted_rows: int = 0
    parts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(part["rows"] for part in self.parts)


def is_index(path: str | Path) -> bool:
    """Whether there is an index at `path`."""
    return Path(path, INDEX).is_file()


class SearchIndex:
    """Reads an index; files are mapped, and read as far as a search needs them.

    Args:
        path: folder written by `IndexWriter`.

    Attributes:
        model: the model that made the features: "name", "weights" (a hash).
        num_queries, width: Q and D.

    Raises:
        ValueError: no index there, of another format, or a file that is missing or cut short.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stated = _read(self.path)
        self.model = self._stated.model
        self.num_queries, self.width = self._stated.num_queries, self._stated.width
        folders = [self.path / part["name"] for part in self._stated.parts]
        for folder, part in zip(folders, self._stated.parts, strict=True):
            _check_size(folder / FEATURES, part["bytes"])
        self._ends = list(accumulate(part["rows"] for part in self._stated.parts))
        self._features = [_tensors(folder / FEATURES)["features"] for folder in folders]
        coded = [_tensors(folder / _codes(self._stated.basis)) for folder in folders]
        self._codes = [each["codes"] for each in coded]
        self._losses = [each["losses"] for each in coded]
        self._basis = _read_basis(self.path, self._stated.basis) if folders else None
        self._rows = [_rows(folder / ROWS) for folder in folders]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, number: int) -> Row:
        """The image of a row number."""
        part = next(i for i, end in enumerate(self._ends) if number < end)
        table = self._rows[part]
        place = number - (self._ends[part] - table.num_rows)
        key, path, metadata = (table.column(name)[place].as_py() for name in _SCHEMA.names)
        return Row(key, path, json.loads(metadata) if metadata else {})

    def keys(self) -> set[str]:
        """The keys of all images."""
        return {key for table in self._rows for key in table.column("key").to_pylist()}

    def features(self, rows: Tensor) -> Tensor:
        """Features of row numbers [n], in fp32 [n, Q, D]."""
        found = torch.empty(len(rows), self.num_queries, self.width)
        starts = [0, *self._ends[:-1]]
        for start, end, features in zip(starts, self._ends, self._features, strict=True):
            here = ((rows >= start) & (rows < end)).nonzero().squeeze(1)
            if len(here):
                # in the order of the file, which is mapped
                places, order = (rows[here] - start).sort()
                found[here[order]] = features[places].float()
        return found

    def search_texts(self, texts: Tensor, k: int, candidates: int | None = None) -> list[Nearest]:
        """The images of the largest ITC similarity, max over Q of f . t.

        Args:
            texts: [B, D] unit-normalised features; the codes are read once for all.
            k: images for each text.
            candidates: images whose features are read at most; None: until the result is exact.

        Raises:
            ValueError: another width, or k below 1.
        """
        self._check(texts, (self.width,), k)

        def similarity(text: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda rows: (self.features(rows) @ text.float()).amax(1)

        bounds = self._bounds(bounds_of_texts, texts, candidates is None)
        return [
            nearest(bound, similarity(text), k, candidates)
            for bound, text in zip(bounds, texts, strict=True)
        ]

    def search_images(self, images: Tensor, k: int, candidates: int | None = None) -> list[Nearest]:
        """The images whose features are most alike, query by query: mean over Q of f_q . h_q.

        Args:
            images: [B, Q, D] unit-normalised features.
            k, candidates: as in `search_texts`.

        Raises:
            ValueError: another shape, or k below 1.
        """
        self._check(images, (self.num_queries, self.width), k)

        def similarity(image: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda rows: (self.features(rows) * image.float()).sum((1, 2)) / len(image)

        bounds = self._bounds(bounds_of_images, images, candidates is None)
        return [
            nearest(bound, similarity(image), k, candidates)
            for bound, image in zip(bounds, images, strict=True)
        ]

    def _bounds(self, bounds: Callable[..., Tensor], given: Tensor, fine: bool) -> Tensor:
        if self._basis is None:
            return torch.empty(len(given), 0)
        parts = [
            bounds(self._basis, codes, losses, given, fine)
            for codes, losses in zip(self._codes, self._losses, strict=True)
        ]
        return torch.cat(parts, 1)

    def _check(self, given: Tensor, shape: tuple[int, ...], k: int) -> None:
        if k < 1:
            raise ValueError(f"k={k}: expected at least 1 image")
        if tuple(given.shape[1:]) != shape:
            raise ValueError(
                f"features of shape {tuple(given.shape)}, but {self.path} holds "
                f"{self.num_queries} queries of width {self.width}: another model made it"
            )


class IndexWriter:
    """Makes an index, or adds to one; rows are committed part by part, and in `close`.

    Use it as a context manager; whatever ends the block, the rows of whole parts are kept.

    Args:
        path: folder of the index; made where there is none.
        model: the model that makes the features.
        num_queries, width: Q and D.
        code_width: W; of an index that is there, its own is kept.
        part_rows: images of a part.

    Attributes:
        keys: keys of the images that are in the index.

    Raises:
        ValueError: the index was made by another model, or another process writes it.
    """

    def __init__(
        self,
        path: str | Path,
        model: Mapping[str, str],
        num_queries: int,
        width: int,
        *,
        code_width: int = CODE_WIDTH,
        part_rows: int = PART_ROWS,
    ) -> None:
        self.path, self._part_rows = Path(path), part_rows
        self._held: list[tuple[Row, Tensor]] = []
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{self.path}: another process is writing it; wait for it") from None
        try:
            if is_index(self.path):
                self._stated = _read(self.path)
                check_model(self.path, self._stated.model, model)
                self.keys = SearchIndex(self.path).keys()
            else:
                if any(each.name != ".lock" for each in self.path.iterdir()):
                    raise ValueError(
                        f"{self.path} is not empty, and is no index; give a new folder"
                    )
                self._stated = _Stated(FORMAT, dict(model), num_queries, width, code_width)
                self.keys = set()
        except BaseException:
            self._lock.release()
            raise

    def add(self, rows: Sequence[Row], features: Tensor) -> None:
        """Add images.

        Args:
            rows: n images with new keys.
            features: [n, Q, D], unit-normalised.

        Raises:
            ValueError: a key that is there already, another shape, or values that are not finite.
        """
        shape = (len(rows), self._stated.num_queries, self._stated.width)
        if tuple(features.shape) != shape:
            raise ValueError(f"features of shape {tuple(features.shape)}, expected {shape}")
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"features of {rows[0].key!r} or after it hold NaN or infinity")
        for row, feature in zip(rows, features.to(torch.float16).cpu(), strict=True):
            if row.key in self.keys:
                raise ValueError(f"{row.key!r} is in {self.path} already; give each image once")
            self.keys.add(row.key)
            self._held.append((row, feature))
            if len(self._held) == self._part_rows:
                self.commit()

    def commit(self) -> None:
        """Write what was added since the last part, and make it part of the index."""
        if not self._held:
            return
        stated = _Stated(**(asdict(self._stated)))
        number = 1 + max((int(part["name"][5:]) for part in stated.parts), default=-1)
        folder = self.path / f"part-{number:05d}"
        partial = folder.with_name(folder.name + ".partial")
        for left in (folder, partial):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()
        features = torch.stack([feature for _, feature in self._held])
        write_through(partial / FEATURES, lambda path: save_file({"features": features}, path))
        write_through(partial / ROWS, self._write_rows)
        size = (partial / FEATURES).stat().st_size
        stated.parts.append({"name": folder.name, "rows": len(self._held), "bytes": size})
        partial.rename(folder)
        flush(self.path)
        self._held.clear()
        if stated.rows >= 2 * stated.fitted_rows:
            stated = self._fit(stated)
        else:
            self._encode(_read_basis(self.path, stated.basis), stated.basis, folder)
        replace_file(self.path / INDEX, write_json(asdict(stated)))
        self._stated = stated
        self._tidy()

    def close(self) -> None:
        """Commit, and let other processes write."""
        try:
            self.commit()
        finally:
            self._lock.release()

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write_rows(self, path: Path) -> None:
        columns = {
            "key": [row.key for row, _ in self._held],
            "path": [row.path for row, _ in self._held],
            "metadata": [
                json.dumps(dict(row.metadata), ensure_ascii=False) if row.metadata else ""
                for row, _ in self._held
            ],
        }
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_batch(pa.RecordBatch.from_pydict(columns, _SCHEMA))

    def _fit(self, stated: _Stated) -> _Stated:
        """Fit the basis to a sample of all parts, and write all codes anew."""
        every = max(1, stated.rows // _FIT_ROWS)
        folders = [self.path / part["name"] for part in stated.parts]
        sample = [_tensors(folder / FEATURES)["features"][::every] for folder in folders]
        basis, number = Basis.fit(torch.cat(sample), stated.code_width), stated.basis + 1
        tensors = {"mean": basis.mean, "axes": basis.axes, "steps": basis.steps}
        replace_file(self.path / _basis_file(number), lambda path: save_file(tensors, path))
        for folder in folders:
            self._encode(basis, number, folder)
        values = asdict(stated) | {"basis": number, "fitted_rows": stated.rows}
        return _Stated(**values)

    def _encode(self, basis: Basis, number: int, folder: Path) -> None:
        features = _tensors(folder / FEATURES)["features"]
        # some hundred megabytes at a time
        coded = [basis.encode(some) for some in features.split(2048)]
        tensors = {
            "codes": torch.cat([codes for codes, _ in coded]),
            "losses": torch.stack([losses for _, losses in coded]).amax(0),
        }
        replace_file(folder / _codes(number), lambda path: save_file(tensors, path))

    def _tidy(self) -> None:
        """Remove bases and codes that the index no longer names."""
        kept = {_basis_file(self._stated.basis), _codes(self._stated.basis)}
        for pattern in ("basis-*", "part-*/codes-*"):
            for path in self.path.glob(pattern):
                if path.name not in kept:
                    path.unlink()


def check_model(path: Path, made_by: Mapping[str, str], model: Mapping[str, str]) -> None:
    """Refuse a model other than the one that made an index.

    Raises:
        ValueError: names both.
    """
    if made_by.get("weights") != model.get("weights"):
        raise ValueError(
            f"{path} was made by the model {made_by.get('name')!r} (weights "
            f"{made_by.get('weights', '')[:12]}), which is not {model.get('name')!r} "
            f"({model.get('weights', '')[:12]}): give that model, or build another index"
        )


def _read(path: Path) -> _Stated:
    try:
        values = json.loads((path / INDEX).read_text(encoding="utf-8"))
        found = values["format"]
    except FileNotFoundError:
        raise ValueError(
            f"no index at {path}: {INDEX} is missing; make one with `blip2fast index build`"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{path / INDEX} is damaged; build the index again") from None
    if found != FORMAT:
        raise ValueError(
            f"{path}: format {found!r}, but this version reads {FORMAT}; build the index again"
        )
    try:
        return _Stated(**values)
    except TypeError:
        raise ValueError(f"{path / INDEX} is damaged; build the index again") from None


def _check_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.is_file() else 0
    if found != size:
        raise ValueError(
            f"{path} has {found} bytes, but {INDEX} states {size}: it is cut short or mixed up; "
            "build the index again"
        )


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged or missing ({error}); build the index again") from None


def _rows(path: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: damaged or missing ({error}); build the index again") from None


def _read_basis(path: Path, number: int) -> Basis:
    return Basis(**_tensors(path / _basis_file(number)))


def _basis_file(number: int) -> str:
    return f"basis-{number:04d}.safetensors"


def _codes(number: int) -> str:
    return f"codes-{number:04d}.safetensors"
