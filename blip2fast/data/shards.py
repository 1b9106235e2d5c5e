"""Tar shards of webdataset, read where they are.

An image in a shard has a key that says where its bytes lie, so it is read by one seek and no index
beside the records is needed:

    train/00017.tar/000170042.jpg@1536+48213     shard / member @ offset + size, in bytes
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from blip2fast.frozen.unusable import UnusableImageError

_KEY = re.compile(r"(?P<shard>.+?\.tar)/(?P<member>.+)@(?P<offset>\d+)\+(?P<size>\d+)")
_BLOCK = tarfile.BLOCKSIZE
_TEXTS = (".txt", ".json")


@dataclass
class ShardSample:
    """The files of one sample, which have their name up to the first dot in common.

    Attributes:
        name: that name.
        image: the key of its image; None without one.
        texts: contents of its .txt and .json.
    """

    name: str
    image: str | None = None
    texts: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardKey:
    """Where the bytes of an image lie."""

    shard: str
    member: str
    offset: int
    size: int

    @classmethod
    def parse(cls, key: str) -> ShardKey | None:
        """The parts of a key; None if it names a file of its own."""
        found = _KEY.fullmatch(key)
        if found is None:
            return None
        return cls(found["shard"], found["member"], int(found["offset"]), int(found["size"]))

    def __str__(self) -> str:
        return f"{self.shard}/{self.member}@{self.offset}+{self.size}"


def shard_samples(path: Path, name: str, image_suffixes: Collection[str]) -> Iterator[ShardSample]:
    """The samples of a shard, in its order; only headers and texts are read.

    Args:
        path: the tar file.
        name: what keys call it: its path from the folder of images.
        image_suffixes: such as `.jpg`.

    Raises:
        ValueError: not a tar file, a compressed one, or one that is cut off.
    """
    sample: ShardSample | None = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or PurePosixPath(member.name).name.startswith("."):
                    continue
                stem, suffix = _split(member.name)
                if sample is None or sample.name != stem:
                    if sample is not None:
                        yield sample
                    sample = ShardSample(stem)
                if suffix in image_suffixes:
                    key = ShardKey(name, member.name, member.offset_data, member.size)
                    sample.image = str(key)
                elif suffix in _TEXTS:
                    file = tar.extractfile(member)
                    sample.texts[suffix] = b"" if file is None else file.read()
            end = tar.offset
        if end > path.stat().st_size:
            raise tarfile.ReadError("unexpected end of data")
    except tarfile.TarError as error:
        raise ValueError(
            f"{path}: not a whole, uncompressed tar file ({error}); fetch or unpack it again"
        ) from None
    if sample is not None:
        yield sample


class NamedBytes(io.BytesIO):
    """The bytes of an image, with the name that messages give it."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


def read_member(folder: Path, key: ShardKey) -> NamedBytes:
    """The bytes of an image in a shard of `folder`.

    Raises:
        UnusableImageError: the shard is missing, cut off, or not the one that the key was made for.
    """
    path = folder / key.shard
    remedy = "import its records again"
    try:
        with path.open("rb") as file:
            file.seek(key.offset - _BLOCK)
            header = file.read(_BLOCK)
            content = file.read(key.size)
    except FileNotFoundError:
        raise UnusableImageError(f"image {key.member} of {path}: no such shard") from None
    if len(content) != key.size:
        raise UnusableImageError(
            f"image {key.member} of {path}: the shard is shorter than it was; {remedy}"
        )
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        found = None
    if found is None or found.size != key.size or _start(found.name) != _start(key.member):
        raise UnusableImageError(f"image {key.member} of {path}: the shard has changed; {remedy}")
    return NamedBytes(content, f"{path}/{key.member}")


def _start(name: str) -> bytes:
    """What a header can hold of a name: longer ones are cut after 100 bytes."""
    return name.encode("utf-8", "surrogateescape")[:100]


def _split(name: str) -> tuple[str, str]:
    """Name up to the first dot of the file, and the rest in lower case (webdataset's rule)."""
    path = PurePosixPath(name)
    first, dot, rest = path.name.partition(".")
    return str(path.parent / first), (dot + rest).lower()
