"""Reads picture files of every kind to upright RGB, or says which file cannot be read and why.

What PIL alone does without a word is not done: 16-bit greys are not clipped to white, transparent
pixels do not show what lies under them, and photographs are turned as their camera says.
"""

from __future__ import annotations

import errno
import io
import struct
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np

from blip2fast._imports import needs
from blip2fast.frozen.unusable import MAX_PIXELS, UnusableImageError

with needs("read images", "PIL"):
    from PIL import ExifTags, Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError

# of the file itself; other errors of the system (EIO, EMFILE, ESTALE) may pass
_OF_THE_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP)
# what PIL raises on damaged files of one format or another
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, IndexError, struct.error, EOFError)


def load_image(
    source: str | Path | IO[bytes],
    background: str = "white",
    *,
    max_pixels: int = MAX_PIXELS,
    least: int | None = None,
) -> Image.Image:
    """Read a picture as upright 8-bit RGB; of an animation the first frame.

    Args:
        source: A path, or an open binary file.
        background: What transparent pixels stand on, a colour that PIL knows.
        max_pixels: Most pixels to decode, up to PIL's limit.
        least: The shorter side may be decoded as small as this, where the format allows it
            (JPEG, by powers of two): much faster for large photographs.

    Raises:
        UnusableImageError: Not found, not a picture, damaged, too large, or of numbers whose range
            is not known. The message names the file.
        ValueError: The system cannot read it just now; or no such colour.
    """
    try:
        ImageColor.getrgb(background)
    except ValueError:
        raise ValueError(
            f"background {background!r}: no colour that PIL knows; give white or #ffffff"
        ) from None
    name = str(source) if isinstance(source, str | Path) else getattr(source, "name", "from a file")
    try:
        return _load(source, background, max_pixels, least)
    except FileNotFoundError:
        reason = "no such file"
    except _Refused as error:
        reason = str(error)
    except Image.DecompressionBombError:
        reason = f"more than {MAX_PIXELS:,} pixels, PIL's limit; make it smaller"
    except UnidentifiedImageError:
        reason = "is empty" if _is_empty(source) else "is not a picture that PIL can read"
    except _DAMAGED as error:
        number = getattr(error, "errno", None)
        if number is not None and number not in _OF_THE_FILE:
            raise ValueError(f"image {name}: {error.strerror}") from error  # type: ignore[union-attr]
        reason = f"is cut off or damaged: {error}" if number is None else str(error.strerror)  # type: ignore[union-attr]
    raise UnusableImageError(f"image {name}: {reason}")


class _Refused(Exception):
    """A whole picture that cannot be shown; the message says why."""


def _load(
    source: str | Path | IO[bytes], background: str, max_pixels: int, least: int | None
) -> Image.Image:
    with warnings.catch_warnings():
        # PIL warns at half of its limit
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        # of damage, without the file's name: what cannot be read is an error that has it
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        with Image.open(source) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _Refused(
                    f"{width} x {height} pixels, more than {max_pixels:,}; make it smaller"
                )
            if least is not None and min(width, height) > least:
                scale = least / min(width, height)
                image.draft(None, (round(width * scale), round(height * scale)))
            _scale_transparency(image)
            image.load()
    try:
        return to_rgb(image, background)
    except ValueError as error:
        raise _Refused(str(error)) from error


def _scale_transparency(image: Image.Image) -> None:
    """The transparent level of a PNG in the depth that PIL decodes to.

    PIL widens greys of 2 and 4 bits and narrows colours of 16, but not the level among them.
    """
    level = image.info.get("transparency")
    stored = image.tile[0][3] if image.format == "PNG" and image.tile else None  # type: ignore[attr-defined]
    if stored in _WIDENED and isinstance(level, int):
        image.info["transparency"] = level * _WIDENED[stored]
    elif stored == "RGB;16B" and isinstance(level, tuple):
        image.info["transparency"] = tuple(each >> 8 for each in level)


_WIDENED = {"L;2": 85, "L;4": 17}


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """A PIL image as upright 8-bit RGB.

    Args:
        image: Of any mode; turned if its EXIF data says that it does not stand upright.
        background: What transparent pixels stand on.

    Raises:
        ValueError: Numbers whose range is not known, or a mode that PIL cannot convert.
    """
    image = _upright(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        shown = Image.fromarray(_to_bytes(image)).convert("RGB")
        level = image.info.get("transparency")
        if isinstance(level, int):  # of a PNG
            clear = np.asarray(image) == level
            shown.paste(Image.new("RGB", shown.size, background), mask=Image.fromarray(clear))
        return shown
    if image.has_transparency_data:
        over = image.convert("RGBA")
        under = Image.new("RGBA", over.size, background)
        return Image.alpha_composite(under, over).convert("RGB")
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        converted = _by_profile(image, image.info["icc_profile"])
        if converted is not None:
            return converted
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return _required(ImageCms.profileToProfile(image, lab, _srgb(), outputMode="RGB"))
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"mode {image.mode!r} cannot be converted to RGB: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image
        return _required(ImageOps.exif_transpose(image))
    except _DAMAGED:
        # damaged EXIF data say nothing about the pixels, which are there
        return image


def _to_bytes(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Grey levels of more than 8 bits, by their depth: 65535 is white; of floats 1 or 255."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        white = 1.0 if high <= 1 else 255.0
        if not (low >= 0 and high <= 255):
            raise ValueError(
                f"floating-point pixels from {low:g} to {high:g}, neither 0 to 1 nor 0 to 255; "
                "scale them to one of these"
            )
        return np.rint(values * (255 / white)).astype(np.uint8)
    if image.mode == "I" and not (low >= 0 and high <= 65535):
        raise ValueError(
            f"32-bit pixels from {low} to {high}, whose white is not known; "
            "save them in 8 or 16 bits"
        )
    # 32-bit files of small numbers: 8 bits, unless it is a PNG, which has 16 at most
    eight_bits = image.mode == "I" and high <= 255 and image.format != "PNG"
    scaled = values if eight_bits else np.rint(values.astype(np.float32) * (255 / 65535))
    return scaled.astype(np.uint8)


def _by_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(image, source, _srgb(), outputMode="RGB")
    except (ImageCms.PyCMSError, *_DAMAGED):
        return None  # PIL's formula is what readers without profiles show


def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _required(image: Image.Image | None) -> Image.Image:
    """For functions that give none only where they work in place."""
    assert image is not None
    return image


def _is_empty(source: str | Path | IO[bytes]) -> bool:
    if isinstance(source, str | Path):
        return Path(source).stat().st_size == 0
    source.seek(0, io.SEEK_END)
    return source.tell() == 0
