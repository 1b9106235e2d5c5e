"""Frozen image features on disk: computed once, memory-mapped in training.

The image encoder of BLIP-2 is frozen (paper, section 3.1), so its tokens depend on the image alone.
A cache is a folder that holds feature files, a key file and a manifest. It is written under a
temporary name and renamed once every row is written, so a folder with the final name is complete.
Features are in one file, or, if they take more than `FILE_BYTES`, in several of as many rows each.
Images that the writer left out are listed in `lacking.json`, each with the reason; their rows are
empty.

    format 1: one file of features, nothing lacking
    format 2: `rows_per_file` and files `features-00000.bin`, ..., or `lacking.json`

Legend: n images, S image tokens, E image token width.
"""

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from blip2fast.data import manifest
from blip2fast.frozen.identity import FrozenIdentity
from blip2fast.frozen.unusable import UnusableImageError

CacheDtype = Literal["float32", "bfloat16", "int8"]
WhenThere = Literal["refuse", "resume", "replace"]

_FORMATS = (1, 2)
FILE_BYTES = 4 * 2**30
_NUMPY_DTYPE: dict[str, Any] = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}
_MANIFEST, _KEYS, _LACKING = "manifest.json", "keys.json", "lacking.json"
_FEATURES, _SCALES = "features", "scales"
# Only in a partial folder: which rows are written, with each row's squared error and squared norm.
_WRITTEN, _ERRORS = "written.bin", "errors.bin"


def _file_names(stem: str, num_rows: int, rows_per_file: int) -> list[str]:
    count = -(-num_rows // rows_per_file)
    return [f"{stem}-{n:05d}.bin" for n in range(count)] if count > 1 else [f"{stem}.bin"]


class _Rows:
    """An array [n, ...] in files of as many rows each, memory-mapped."""

    def __init__(
        self,
        folder: Path,
        stem: str,
        dtype: Any,
        shape: tuple[int, ...],
        rows_per_file: int,
        mode: Literal["r", "r+"] = "r",
    ) -> None:
        self._shape, self._each = shape, rows_per_file
        names = _file_names(stem, shape[0], rows_per_file)
        self._parts = [
            _map(
                folder / name,
                dtype,
                (min(rows_per_file, shape[0] - n * rows_per_file), *shape[1:]),
                mode,
            )
            for n, name in enumerate(names)
        ]

    def __getitem__(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, Any]:
        if len(self._parts) == 1:
            return self._parts[0][rows]
        found = np.empty((len(rows), *self._shape[1:]), self._parts[0].dtype)
        files, places = np.divmod(rows, self._each)
        for number in np.unique(files).tolist():
            chosen = files == number
            found[chosen] = self._parts[number][places[chosen]]
        return found

    def write(self, start: int, values: np.ndarray[Any, Any]) -> None:
        """Store rows from `start` on."""
        done = 0
        while done < len(values):
            number, place = divmod(start + done, self._each)
            count = min(self._each - place, len(values) - done)
            self._parts[number][place : place + count] = values[done : done + count]
            done += count

    def flush(self) -> None:
        """Write what is in memory to the files."""
        for part in self._parts:
            part.flush()


def _digest(keys: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(keys).encode()).hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not readable as JSON ({error}); write the cache again"
        ) from error


class FeatureCache:
    """Read a feature cache.

    Args:
        path: a folder written by `create`.

    Attributes:
        keys: one name per image, in row order.
        lacking: images that could not be used when the cache was written, each with the reason.
        num_images, num_tokens, width: n, S and E.
        dtype: storage type: `"float32"`, `"bfloat16"` or `"int8"`.
        encoder_id: name of the encoder that computed the features, as given to the writer.
        encoder: the encoder's identity, if it was given to the writer.
        relative_error: RMS of (stored - original) divided by the RMS of the original features.

    Raises:
        ValueError: no cache at `path`, an unfinished one, or files that do not match the manifest.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        manifest_path = self.path / _MANIFEST
        if not manifest_path.is_file():
            hint = (
                f"; {_partial(self.path)} is a half-written one: finish or delete it"
                if _partial(self.path).exists()
                else "; build it with `blip2fast features`"
            )
            raise ValueError(f"no feature cache at {self.path}{hint}")
        stated = _read_json(manifest_path)
        if not isinstance(stated, dict) or stated.get("format") not in _FORMATS:
            found = stated.get("format") if isinstance(stated, dict) else stated
            raise ValueError(
                f"{manifest_path}: format {found!r}, but this version reads "
                f"{' and '.join(map(str, _FORMATS))}; write the cache again"
            )
        self.keys: list[str]
        self.num_images: int
        try:
            self._take(stated)
            stored = _NUMPY_DTYPE[self.dtype]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path}: {_MANIFEST} or {_KEYS} lacks what a cache states ({error}); write "
                "the cache again"
            ) from error
        shape = (len(self.keys), self.num_tokens, self.width)
        each = self._rows_per_file
        self._features = _Rows(self.path, _FEATURES, stored, shape, each)
        self._scales = None
        if self.dtype == "int8":
            self._scales = _Rows(self.path, _SCALES, np.float32, shape[:2], each)
        self._stored_rows: Any = None
        if self.lacking:
            self._pass_over_lacking()
        self._row_of = {key: row for row, key in enumerate(self.keys)}

    def _take(self, stated: dict[str, Any]) -> None:
        """Set the attributes that the manifest and the key file state."""
        self.keys = _read_json(self.path / _KEYS)
        self.num_images = stated["num_images"]
        self.num_tokens: int = stated["num_tokens"]
        self.width: int = stated["width"]
        self.dtype: str = stated["dtype"]
        self.encoder_id: str = stated["encoder_id"]
        encoder = stated.get("encoder")
        self.encoder = None if encoder is None else FrozenIdentity(**encoder)
        self.relative_error: float = stated["relative_error"]
        self._rows_per_file: int = stated.get("rows_per_file", max(1, self.num_images))
        self.lacking: dict[str, str] = {}
        if "lacking" in stated:
            self.lacking = _read_json(self.path / _LACKING)
            if not isinstance(self.lacking, dict) or len(self.lacking) != stated["lacking"]:
                raise ValueError(
                    f"{self.path}: {_LACKING} is not that of the manifest; write the cache again"
                )
        if len(self.keys) != self.num_images or _digest(self.keys) != stated["keys_sha256"]:
            raise ValueError(
                f"{self.path}: {_KEYS} holds {len(self.keys)} keys that are not the "
                f"{self.num_images} of the manifest; write the cache again"
            )

    def _pass_over_lacking(self) -> None:
        there = [row for row, key in enumerate(self.keys) if key not in self.lacking]
        self._stored_rows = np.array(there, np.int64)
        self.keys = [self.keys[row] for row in there]
        self.num_images = len(there)

    @staticmethod
    def create(
        path: str | Path,
        keys: Sequence[str],
        num_tokens: int,
        width: int,
        dtype: CacheDtype = "float32",
        encoder_id: str | FrozenIdentity = "",
        when_there: WhenThere = "refuse",
        file_bytes: int = FILE_BYTES,
    ) -> "FeatureCacheWriter":
        """Start writing a cache of `len(keys)` images; see `FeatureCacheWriter`.

        Args:
            path: folder of the finished cache; `<path>.partial` while it is being written.
            keys: one distinct name per image.
            num_tokens: S.
            width: E.
            dtype: `"int8"` stores a scale of absmax / 127 per token with the integers. The error
                per element is at most absmax / 254; the manifest states the measured relative
                error.
            encoder_id: the encoder that computed the features: a name, or the identity of a
                `FrozenImageEncoder`, which lets training refuse features of another encoder.
            when_there: whether an interrupted write is refused, resumed (keys, shape, dtype and
                encoder must match) or replaced; a finished cache is refused unless replaced.
            file_bytes: most bytes of a file; features that take more are in several.

        Raises:
            ValueError: invalid sizes, duplicate keys, a cache already at `path`, another process
                that writes it, or a disk without room for it.
        """
        return FeatureCacheWriter(
            path, keys, num_tokens, width, dtype, encoder_id, when_there, file_bytes
        )

    def __len__(self) -> int:
        return self.num_images

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        # Worker processes map the files again; pickling the arrays would copy the whole cache.
        return type(self), (self.path,)

    def __contains__(self, key: object) -> bool:
        return key in self._row_of

    def row(self, key: str) -> int:
        """Row number of image `key`.

        Raises:
            UnusableImageError: the cache lacks it.
        """
        try:
            return self._row_of[key]
        except KeyError:
            if key in self.lacking:
                raise UnusableImageError(
                    f"image {key!r} was left out of {self.path}: {self.lacking[key]}"
                ) from None
            example = self.keys[0] if self.keys else "none"
            raise UnusableImageError(
                f"image {key!r} is not among the {self.num_images} of {self.path} "
                f"(the first is {example!r}); cache it or drop its records"
            ) from None

    def read(self, rows: Tensor | Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Features `[n, S, E]` of `rows`, on the CPU.

        Raises:
            ValueError: a row that is not in the cache.
        """
        index = np.asarray(rows, dtype=np.int64).reshape(-1)
        if index.size and (index.min() < 0 or index.max() >= self.num_images):
            raise ValueError(
                f"rows {index.min()}..{index.max()} asked of {self.path}, "
                f"which holds rows 0..{self.num_images - 1}"
            )
        if self._stored_rows is not None:
            index = self._stored_rows[index]
        stored = torch.from_numpy(self._features[index])
        if self._scales is not None:
            scales = torch.from_numpy(self._scales[index])
            return (stored.float() * scales[..., None]).to(dtype)
        if self.dtype == "bfloat16":
            stored = stored.view(torch.bfloat16)
        return stored.to(dtype)


class FeatureCacheWriter:
    """Writes a cache to `<path>.partial` and renames it in `close`.

    Use it as a context manager: a clean exit calls `close`; after an exception the partial folder
    remains and can be resumed. Created by `FeatureCache.create`.

    Attributes:
        nbytes: size on disk, which is reserved at the start.
    """

    def __init__(
        self,
        path: str | Path,
        keys: Sequence[str],
        num_tokens: int,
        width: int,
        dtype: CacheDtype,
        encoder_id: str | FrozenIdentity,
        when_there: WhenThere,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        self.path, self.keys = Path(path), list(keys)
        self.num_tokens, self.width, self.dtype = num_tokens, width, dtype
        encoder = encoder_id if isinstance(encoder_id, FrozenIdentity) else None
        self.encoder_id = encoder_id if isinstance(encoder_id, str) else encoder_id.name
        self.left_out: dict[int, str] = {}
        self._check(file_bytes)
        self._partial = _partial(self.path)
        self._plan: dict[str, Any] = {
            "format": 1,
            "num_images": len(self.keys),
            "num_tokens": num_tokens,
            "width": width,
            "dtype": dtype,
            "encoder_id": self.encoder_id,
            "keys_sha256": _digest(self.keys),
        }
        if encoder is not None:
            self._plan["encoder"] = asdict(encoder)
        n = len(self.keys)
        stored: Any = _NUMPY_DTYPE[dtype]
        each = max(1, file_bytes // (num_tokens * width * np.dtype(stored).itemsize))
        if each < n:
            self._plan |= {"format": 2, "rows_per_file": each}
        arrays: dict[str, tuple[Any, tuple[int, ...]]] = {_FEATURES: (stored, (num_tokens, width))}
        if dtype == "int8":
            arrays[_SCALES] = (np.float32, (num_tokens,))
        sizes = {_ERRORS: n * 16, _WRITTEN: n}
        for stem, (kind, shape) in arrays.items():
            row = int(np.prod(shape)) * np.dtype(kind).itemsize
            for number, name in enumerate(_file_names(stem, n, each)):
                sizes[name] = row * min(each, n - number * each)
        self._files = [name for name in sizes if name not in (_ERRORS, _WRITTEN)]
        self.nbytes = sum(sizes.values())
        self._lock = self._acquire()
        try:
            if not self._clear(when_there):
                self._reserve(sizes)
                # Written last: a partial folder without a plan cannot be resumed.
                _write_json(self._partial / _KEYS, self.keys)
                _write_json(self._partial / "plan.json", self._plan)
        except BaseException:
            self._release()
            raise
        self._arrays = {
            stem: _Rows(self._partial, stem, kind, (n, *shape), each, "r+")
            for stem, (kind, shape) in arrays.items()
        }
        self._errors = _map(self._partial / _ERRORS, np.float64, (n, 2), "r+")
        self._written = _map(self._partial / _WRITTEN, np.bool_, (n,), "r+")

    def _check(self, file_bytes: int) -> None:
        if not self.keys:
            raise ValueError("a feature cache of no images: keys is empty")
        if len(set(self.keys)) != len(self.keys):
            key, times = Counter(self.keys).most_common(1)[0]
            raise ValueError(f"key {key!r} comes {times} times; one row per image")
        if self.num_tokens < 1 or self.width < 1:
            raise ValueError(
                f"num_tokens={self.num_tokens} and width={self.width} must be positive"
            )
        if file_bytes < 1:
            raise ValueError(f"file_bytes={file_bytes} must be positive")
        if self.dtype not in get_args(CacheDtype):
            raise ValueError(f"dtype={self.dtype!r}; one of {', '.join(get_args(CacheDtype))}")

    def _acquire(self) -> FileLock:
        """The lock of the process that writes; the system releases it when that dies."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # one for all writers of a process: what an earlier one left it may resume or replace
        lock = FileLock(self.path.with_name(self.path.name + ".lock"), is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{self.path}: another process is writing it; wait for its end"
            ) from None
        return lock

    def _release(self) -> None:
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release(force=True)

    def _reserve(self, sizes: Mapping[str, int]) -> None:
        """Take the disk space: writing to a mapped file on a full disk would end the process."""
        free = shutil.disk_usage(self._partial).free
        try:
            if self.nbytes > free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for name, size in sizes.items():
                with (self._partial / name).open("wb") as file:
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, size)
                    else:
                        file.truncate(size)
        except OSError as error:
            shutil.rmtree(self._partial)
            if error.errno != errno.ENOSPC:
                raise
            raise ValueError(
                f"{self.path}: {_gigabytes(self.nbytes)} for {len(self.keys):,} images of "
                f"{self.num_tokens} tokens x {self.width} in {self.dtype}, and "
                f"{_gigabytes(free)} are free on the disk"
            ) from None

    def _clear(self, when_there: WhenThere) -> bool:
        """Prepare the partial folder; returns True if an earlier write is resumed."""
        if when_there not in get_args(WhenThere):
            raise ValueError(f"when_there={when_there!r}; one of {', '.join(get_args(WhenThere))}")
        if self.path.exists() and when_there != "replace":
            raise ValueError(
                f"{self.path} exists; delete it or replace it (--overwrite, in Python "
                "when_there='replace')"
            )
        if self._partial.exists():
            if when_there == "refuse":
                raise ValueError(
                    f"{self._partial} was left by an interrupted write; delete it, "
                    "or pass when_there='resume' or 'replace'"
                )
            if when_there == "resume" and (self._partial / "plan.json").is_file():
                left = _read_json(self._partial / "plan.json")
                if left != self._plan:
                    differs = [name for name in self._plan if left.get(name) != self._plan[name]]
                    raise ValueError(
                        f"{self._partial} was started with other values: "
                        + ", ".join(f"{k} {left.get(k)!r}, now {self._plan[k]!r}" for k in differs)
                        + "; delete it to start again"
                    )
                return True
            shutil.rmtree(self._partial)
        self._partial.mkdir(parents=True)
        return False

    @property
    def missing_rows(self) -> list[int]:
        """Rows not yet written and not left out, in ascending order."""
        rows: list[int] = np.flatnonzero(~self._written).tolist()
        return [row for row in rows if row not in self.left_out]

    def leave_out(self, row: int, reason: str) -> None:
        """Go without an image that cannot be used; the cache will say that it lacks it, and why.

        A write that is resumed tries these images again.
        """
        self.left_out[row] = reason

    def write(self, start_row: int, features: Tensor) -> None:
        """Store `features` [n, S, E] (any float dtype and device) from row `start_row` on.

        Raises:
            ValueError: a wrong shape, rows past the end, or non-finite values.
        """
        expected = (self.num_tokens, self.width)
        if features.ndim != 3 or tuple(features.shape[1:]) != expected:
            raise ValueError(
                f"features have shape {tuple(features.shape)}, expected (n, {self.num_tokens}, "
                f"{self.width})"
            )
        stop = start_row + len(features)
        if start_row < 0 or stop > len(self.keys):
            raise ValueError(f"rows {start_row}..{stop - 1} of a cache of {len(self.keys)} images")
        given = features.detach().to("cpu", torch.float32)
        if not bool(torch.isfinite(given).all()):
            raise ValueError(f"features of rows {start_row}..{stop - 1} hold NaN or infinity")
        rows, features_file = slice(start_row, stop), self._arrays[_FEATURES]
        if self.dtype == "float32":
            stored = given
            features_file.write(start_row, given.numpy())
        elif self.dtype == "bfloat16":
            half = given.to(torch.bfloat16)
            stored = half.float()
            features_file.write(start_row, half.view(torch.uint16).numpy())
        else:
            scale = given.abs().amax(-1).div(127.0)
            steps = (given / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round()
            stored = steps * scale[..., None]
            features_file.write(start_row, steps.to(torch.int8).numpy())
            self._arrays[_SCALES].write(start_row, scale.numpy())
        error = (stored - given).double().square().sum((1, 2))
        norm = given.double().square().sum((1, 2))
        self._errors[rows] = torch.stack([error, norm], 1).numpy()
        # After the data, so that rows of a killed write stay marked as missing.
        self._written[rows] = True

    def close(self) -> None:
        """Flush everything to disk, write the manifest and rename the folder to its final name.

        Raises:
            ValueError: rows are missing, or all were left out.
        """
        missing = self.missing_rows
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self.keys)} rows were never written (first: row "
                f"{missing[0]}, {self.keys[missing[0]]!r}); {self._partial} is kept"
            )
        if len(self.left_out) == len(self.keys):
            raise ValueError(
                f"none of the {len(self.keys)} images can be used; the first: {self.left_out[0]}"
            )
        error, norm = self._errors.sum(0)
        relative = float(np.sqrt(error / norm)) if norm else 0.0
        for array in self._arrays.values():
            array.flush()
        stated = {**self._plan, "relative_error": relative}
        if self.left_out:
            stated |= {"format": 2, "lacking": len(self.left_out)}
            lacking = {self.keys[row]: self.left_out[row] for row in sorted(self.left_out)}
            _write_json(self._partial / _LACKING, lacking)
            manifest.flush(self._partial / _LACKING)
        # After a crash, a folder with the final name must not have files that were never flushed.
        for name in (_KEYS, *self._files):
            manifest.flush(self._partial / name)
        manifest.replace_file(self._partial / _MANIFEST, manifest.write_json(stated))
        if self.path.exists():
            # Rename first: a kill during deletion must not leave half a cache under this name.
            older = self.path.with_name(self.path.name + ".old.partial")
            shutil.rmtree(older, ignore_errors=True)
            shutil.rmtree(self.path.rename(older))
        manifest.rename_folder(self._partial, self.path)
        for name in (_ERRORS, _WRITTEN, "plan.json"):
            (self.path / name).unlink()
        self._release()

    def __enter__(self) -> "FeatureCacheWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._release()


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.3f} MB"


def _map(
    path: Path, dtype: Any, shape: tuple[int, ...], mode: Literal["r", "r+"] = "r"
) -> "np.memmap[Any, np.dtype[Any]]":
    """Memory-map a file that must hold exactly `shape` elements."""
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.is_file() else 0
    if found != expected:
        raise ValueError(
            f"{path} has {found} bytes, but the manifest's shape {shape} needs {expected}; "
            "the cache is cut short or mixed up: write it again"
        )
    return np.memmap(path, dtype=dtype, mode=mode, shape=shape)
