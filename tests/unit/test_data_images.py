"""Decoding: right pixels for every kind of file, a named error for every broken one."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mtl_cli.data import images
from mtl_cli.errors import DataError


def _gradient(width=40, height=40):
    x = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    return x.astype(np.uint8)


def _png(path, width, height, body, depth=8, colour=2):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def _jpeg_bytes():
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(out, "JPEG")
    return out.getvalue()


def test_plain_png_is_exact(tmp_path):
    pixels = _gradient()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.load(tmp_path / "a.png", 40), pixels)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    wide = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / "a.png")
    out = images.load(tmp_path / "a.png", 32)[..., 0]
    np.testing.assert_array_equal(out, np.rint(wide / 257).astype(np.uint8))


def test_float_tiff_is_scaled_and_other_ranges_refused(tmp_path):
    unit = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    Image.fromarray(unit).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(
        images.load(tmp_path / "a.tif", 32)[..., 1], np.rint(unit * 255).astype(np.uint8)
    )
    Image.fromarray(unit * 900).save(tmp_path / "b.tif")
    with pytest.raises(DataError, match=r"b\.tif: float pixels out of range \(found 0\.\.900"):
        images.load(tmp_path / "b.tif", 32)


def test_integer_tiff_is_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 70000, np.int32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="32-bit integer"):
        images.load(tmp_path / "a.tif", 8)


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((30, 30, 3), np.uint8)
    pixels[:15] = (255, 0, 0)  # red on top
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: red comes to the right
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    out = images.load(tmp_path / "a.png", 30)
    assert out[15, 28].tolist() == [255, 0, 0]
    assert out[15, 1].tolist() == [0, 0, 0]


def test_transparency_is_composited_over_white(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, 8:] = (0, 0, 255, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    out = images.load(tmp_path / "a.png", 16)
    assert out[4, 2].tolist() == [255, 255, 255]
    assert out[4, 13].tolist() == [0, 0, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "RGBA", "RGB"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    Image.fromarray(_gradient()).convert(mode).save(tmp_path / f"a.{suffix}")
    out = images.load(tmp_path / f"a.{suffix}", 24)
    assert out.shape == (24, 24, 3)
    assert out.dtype == np.uint8
    assert out[:, 0].mean() < 40 < 200 < out[:, -1].mean()


def test_name_does_not_matter_and_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (20, 20), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "a.gif").rename(tmp_path / "ein bißchen schön\n.jpg")
    assert images.load(tmp_path / "ein bißchen schön\n.jpg", 20)[3, 3, 0] > 250


def test_crop_and_pad_keep_the_aspect_ratio(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255  # a white square in the middle
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert images.load(tmp_path / "a.png", 20, "crop").min() == 255
    padded = images.load(tmp_path / "a.png", 60, "pad")
    assert padded[0, 0].tolist() == list(images.PAD_COLOUR)
    assert padded[30, 30].tolist() == [255, 255, 255]
    assert padded[30, 5].tolist() == [0, 0, 0]
    thin = Image.new("RGB", (1000, 1))
    assert images.square(thin, 10, "pad").shape == (10, 10, 3)


def test_draft_mode_gives_nearly_the_same_pixels(tmp_path):
    smooth = Image.fromarray(_gradient(400, 400))
    smooth.save(tmp_path / "a.jpg", quality=95)
    smooth.save(tmp_path / "a.png")
    a, b = (images.load(tmp_path / f"a.{kind}", 64).astype(int) for kind in ("jpg", "png"))
    assert np.abs(a - b).mean() < 2


def test_broken_files_are_named(tmp_path):
    jpeg = _jpeg_bytes()
    broken = {
        "half.jpg": jpeg[: len(jpeg) // 2],
        "tail.jpg": jpeg[:-2],
        "empty.jpg": b"",
        "page.jpg": b"<html>404</html>",
        "cut.png": None,
        "width0.png": None,
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content or b"")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        tmp_path / "cut.png"
    )
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:4000])
    _png(tmp_path / "width0.png", 0, 8, zlib.compress(b""))
    for name in broken:
        with pytest.raises(DataError, match=name):
            images.load(tmp_path / name, 32)


@pytest.mark.filterwarnings("ignore:Image size")
def test_bombs_are_refused_before_decoding(tmp_path):
    _png(tmp_path / "bomb.png", 60000, 60000, zlib.compress(b"\0" * 100))
    _png(tmp_path / "large.png", 10000, 10000, zlib.compress(b"\0" * 100), 1, 0)
    for name in ("bomb.png", "large.png"):
        with pytest.raises(DataError, match=rf"{name}: too large .*40 megapixels"):
            images.load(tmp_path / name, 32)


def test_what_is_not_a_file_never_hangs(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    expected = {
        "pipe.jpg": "not a regular file",
        "folder.jpg": "not a regular file",
        "broken.jpg": "no such file",
        "absent.jpg": "no such file",
        "loop.jpg": "symbolic links",
    }
    for name, reason in expected.items():
        with pytest.raises(DataError, match=rf"{name}: .*{reason}"):
            images.load(tmp_path / name, 32)


def test_find_is_sorted_and_only_images(tmp_path):
    for name in ("b.JPG", "a.png", "x.txt", "sub/c.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert images.find(tmp_path) == ["a.png", "b.JPG", "sub/c.jpeg"]
