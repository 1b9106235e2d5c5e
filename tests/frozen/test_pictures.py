"""Picture files of every kind come in right, or are refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from blip2fast.data import load_image
from blip2fast.frozen.images import ImageTransform, read_image
from blip2fast.frozen.pictures import to_rgb
from blip2fast.frozen.unusable import UnusableImageError

# red, green, blue and grey quarters, so that every turn and flip shows
COLOURS = np.array([[[200, 30, 40], [20, 180, 60]], [[30, 50, 220], [128, 128, 128]]], np.uint8)
GREYS = np.array([[0, 85], [170, 255]], np.uint8)


def quarters(values: np.ndarray, side: int = 32) -> np.ndarray:
    """Each value over `side` x `side` pixels, so that JPEG keeps it."""
    return values.repeat(side, axis=0).repeat(side, axis=1)


def corners(image: Image.Image) -> np.ndarray:
    """The middle of each quarter."""
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    h, w = pixels.shape[0] // 4, pixels.shape[1] // 4
    return pixels[[[h, h], [3 * h, 3 * h]], [[w, 3 * w], [w, 3 * w]]]


def assert_shows(image: Image.Image, expected: np.ndarray, within: int = 0) -> None:
    difference = np.abs(corners(image).astype(int) - expected.astype(int))
    assert difference.max() <= within, corners(image).tolist()


PHOTO = Image.fromarray(quarters(COLOURS))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_photographs_stand_upright(orientation: int, suffix: str, tmp_path: Path) -> None:
    """Stored as a camera does: turned or flipped, and EXIF says how."""
    stored = {
        1: PHOTO,
        2: PHOTO.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: PHOTO.transpose(Image.Transpose.ROTATE_180),
        4: PHOTO.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: PHOTO.transpose(Image.Transpose.TRANSPOSE),
        6: PHOTO.transpose(Image.Transpose.ROTATE_90),
        7: PHOTO.transpose(Image.Transpose.TRANSVERSE),
        8: PHOTO.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    stored.save(path, exif=exif, **({"quality": 95} if suffix != "png" else {}))
    assert_shows(load_image(path), COLOURS, within=8)
    # also where a user has opened it
    with Image.open(path) as opened:
        assert_shows(to_rgb(opened), COLOURS, within=8)


def test_damaged_exif_data_do_not_cost_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    PHOTO.save(path, exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01", quality=95)
    assert_shows(load_image(path), COLOURS, within=8)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_greys_are_scaled(suffix: str, tmp_path: Path) -> None:
    """PIL alone clips them: all but the darkest 255 levels are white."""
    path = tmp_path / f"scan.{suffix}"
    Image.fromarray(quarters(GREYS).astype(np.uint16) * 257).save(path)
    assert_shows(load_image(path), np.stack([GREYS] * 3, axis=-1))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (GREYS.astype(np.int32), GREYS),
        (GREYS.astype(np.int32) * 257, GREYS),
        (GREYS.astype(np.float32) / 255, GREYS),
        (GREYS.astype(np.float32), GREYS),
    ],
)
def test_wide_greys_are_scaled_by_their_range(
    values: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "scan.tiff"
    Image.fromarray(quarters(values)).save(path)
    assert_shows(load_image(path), np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (GREYS.astype(np.int32) * 70_000, "scan.tiff: 32-bit pixels from 0 to 17850000, whose"),
        (GREYS.astype(np.float32) - 200, "scan.tiff: floating-point pixels from -200 to 55"),
        (np.full((2, 2), np.nan, np.float32), "scan.tiff: floating-point pixels from nan to nan"),
    ],
)
def test_greys_of_unknown_range_are_refused(
    values: np.ndarray, message: str, tmp_path: Path
) -> None:
    Image.fromarray(quarters(values)).save(tmp_path / "scan.tiff")
    with pytest.raises(ValueError, match=message):
        load_image(tmp_path / "scan.tiff")


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB with a colour", "L with a colour"])
def test_what_is_transparent_shows_the_background(kind: str, tmp_path: Path) -> None:
    """PIL alone shows the colours that lie hidden under it, often black."""
    path = tmp_path / "logo.png"
    hidden = np.array([[0, 255], [255, 255]], np.uint8)
    expected = COLOURS.copy()
    options = {}
    if kind in ("LA", "L with a colour"):
        expected = np.stack([GREYS] * 3, axis=-1)
    if kind == "RGBA":
        image = Image.fromarray(quarters(np.dstack([COLOURS, hidden])))
    elif kind == "LA":
        image = Image.fromarray(quarters(np.dstack([GREYS, hidden])))
    elif kind == "P":
        image = Image.fromarray(quarters(np.arange(4, dtype=np.uint8).reshape(2, 2)))
        image = image.copy()
        image.putpalette(COLOURS.reshape(-1).tolist())
        options["transparency"] = 0
    else:
        image = Image.fromarray(quarters(COLOURS if kind.startswith("RGB") else GREYS))
        options["transparency"] = tuple(COLOURS[0, 0].tolist()) if "RGB" in kind else 0
    image.save(path, **options)
    expected[0, 0] = 255
    assert_shows(load_image(path), expected)
    expected[0, 0] = [0, 0, 255]
    assert_shows(load_image(path, background="blue"), expected)


def write_png(path: Path, depth: int, colour: int, row: bytes, clear: bytes) -> None:
    """A PNG of four pixels, with a transparent level; PIL writes none of these depths."""
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in (
        (b"IHDR", struct.pack(">IIBBBBB", 4, 1, depth, colour, 0, 0, 0)),
        (b"tRNS", clear),
        (b"IDAT", zlib.compress(b"\0" + row)),
        (b"IEND", b""),
    ):
        content += struct.pack(">I", len(data)) + name + data
        content += struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("depth", "colour", "row", "clear", "expected"),
    [
        (2, 0, bytes([0b00011011]), b"\0\1", [0, 255, 170, 255]),
        (4, 0, bytes([0x01, 0x2F]), b"\0\1", [0, 255, 34, 255]),
        (16, 0, struct.pack(">4H", 0, 7, 257 * 100, 65535), b"\0\7", [0, 255, 100, 255]),
        (
            16,
            2,
            struct.pack(">12H", *[0] * 3, *[300] * 3, *[257 * 100] * 3, *[65535] * 3),
            struct.pack(">3H", 300, 300, 300),
            [0, 255, 100, 255],
        ),
    ],
    ids=["2 bits", "4 bits", "16 bits", "16-bit colours"],
)
def test_a_transparent_level_of_any_depth(
    depth: int, colour: int, row: bytes, clear: bytes, expected: list[int], tmp_path: Path
) -> None:
    write_png(tmp_path / "scan.png", depth, colour, row, clear)
    shown = np.asarray(load_image(tmp_path / "scan.png"))
    assert shown.tolist() == [[[level] * 3 for level in expected]]
    behind = np.asarray(load_image(tmp_path / "scan.png", background="blue"))
    assert behind[0, 1].tolist() == [0, 0, 255]


def test_an_unknown_background_is_not_a_fault_of_the_picture(tmp_path: Path) -> None:
    PHOTO.save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="background 'whit': no colour that PIL knows") as caught:
        load_image(tmp_path / "photo.png", background="whit")
    assert not isinstance(caught.value, UnusableImageError)


def test_half_transparent_pixels_are_mixed(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 128)).save(tmp_path / "shade.png")
    assert load_image(tmp_path / "shade.png").getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("profile", [False, True])
def test_prints_are_converted(profile: bool, tmp_path: Path) -> None:
    """CMYK; a profile that is none is passed over."""
    path = tmp_path / "print.jpg"
    options = {"icc_profile": b"no profile"} if profile else {}
    PHOTO.convert("CMYK").save(path, quality=95, **options)
    assert_shows(load_image(path), COLOURS, within=10)


def test_lab_is_converted(tmp_path: Path) -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    ImageCms.profileToProfile(PHOTO, srgb, lab, outputMode="LAB").save(tmp_path / "lab.tiff")
    assert_shows(load_image(tmp_path / "lab.tiff"), COLOURS, within=10)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"moving.{suffix}"
    other = Image.new("RGB", PHOTO.size, "black")
    options = {"lossless": True} if suffix == "webp" else {}
    PHOTO.save(path, save_all=True, append_images=[other], duration=100, **options)
    assert_shows(load_image(path), COLOURS)


def test_bits_and_palettes(tmp_path: Path) -> None:
    PHOTO.quantize(16).save(tmp_path / "palette.png")
    assert_shows(load_image(tmp_path / "palette.png"), COLOURS, within=8)
    bits = quarters(np.array([[0, 1], [1, 0]], bool))
    Image.fromarray(bits).save(tmp_path / "fax.tiff")
    assert corners(load_image(tmp_path / "fax.tiff"))[..., 0].tolist() == [[0, 255], [255, 0]]


def test_open_files_are_read() -> None:
    file = io.BytesIO()
    PHOTO.save(file, "PNG")
    file.seek(0)
    assert_shows(load_image(file), COLOURS)
    with pytest.raises(ValueError, match="image from a file: is empty"):
        load_image(io.BytesIO())


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "tiff", "bmp"])
def test_files_that_are_cut_off_are_refused_by_name(suffix: str, tmp_path: Path) -> None:
    """Anywhere: never half a picture, never another error."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    whole = tmp_path / f"whole.{suffix}"
    Image.fromarray(noise).save(whole)
    data = whole.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    for share in (0.0, 0.001, 0.01, 0.1, 0.5, 0.9):
        cut.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match=rf"cut\.{suffix}: is (empty|not|cut off)"):
            load_image(cut)


def test_damage_is_told_once(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """By the error, which has the file's name; PIL's warnings of it have none."""
    PHOTO.save(tmp_path / "scan.tiff")
    (tmp_path / "cut.tiff").write_bytes((tmp_path / "scan.tiff").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cut\.tiff: is not a picture that PIL can read"):
        load_image(tmp_path / "cut.tiff")
    assert not recwarn.list


def test_what_is_no_picture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"page\.jpg: is not a picture that PIL can read"):
        load_image(tmp_path / "page.jpg")
    with pytest.raises(ValueError, match=r"none\.jpg: no such file"):
        load_image(tmp_path / "none.jpg")
    with pytest.raises(ValueError, match=rf"image {tmp_path}: Is a directory"):
        load_image(tmp_path)


def test_too_many_pixels_are_refused_by_name(tmp_path: Path) -> None:
    PHOTO.save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match=r"photo\.png: 64 x 64 pixels, more than 1,000; make it"):
        load_image(tmp_path / "photo.png", max_pixels=1000)
    # a small file of 20,000 x 20,000 pixels
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"bomb\.png: more than 178,956,970 pixels"):
        load_image(tmp_path / "bomb.png")


def test_large_photographs_are_decoded_small(tmp_path: Path) -> None:
    """Close to the full picture, resized; and never below what the transform shows."""
    ramp = np.linspace(0, 255, 800)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], ramp[::-1, None]), -1)
    path = tmp_path / "large.jpg"
    Image.fromarray(picture.astype(np.uint8)).save(path, quality=95)
    assert load_image(path, least=200).size == (200, 200)
    assert load_image(path, least=201).size == (400, 400)
    assert load_image(path, least=900).size == (800, 800)
    transform = ImageTransform(50, mean=(0, 0, 0), std=(1, 1, 1))
    small, full = (
        transform(read_image(tmp_path, "large.jpg", least))
        for least in (transform.least_side, None)
    )
    assert float((small - full).abs().max()) < 2 / 255


def test_keys_stay_in_their_folder_and_links_are_followed(tmp_path: Path) -> None:
    """A hub's cache is made of links to files elsewhere."""
    folder = tmp_path / "images"
    (tmp_path / "blobs").mkdir()
    folder.mkdir()
    PHOTO.save(tmp_path / "blobs" / "0.png")
    (folder / "linked.png").symlink_to(tmp_path / "blobs" / "0.png")
    assert_shows(read_image(folder, "linked.png"), COLOURS)
    for key in ("../blobs/0.png", "a/../../blobs/0.png", str(tmp_path / "blobs" / "0.png")):
        with pytest.raises(ValueError, match="lies outside"):
            read_image(folder, key)
