"""Decoding of image files: any file a user may have becomes uint8 RGB, or an error that names it.

Pillow decodes, never ``torchvision.io`` (a PNG with too few rows ends the process there). What
Pillow gets silently wrong is repaired here: 16-bit and float pixels are scaled instead of clipped,
EXIF orientation is applied, truncated files are refused, transparency is composited over white.
"""

# S side of the square that comes out, in pixels

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mtl_cli.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 40_000_000  # 40 megapixels: about 160 MB once decoded
PAD_COLOUR = (124, 116, 104)  # the ImageNet mean: padding is 0 after normalisation
POLICIES = ("crop", "pad")

# Pillow warns above 89 megapixels; here such an image is an error anyway.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def load(path: str | Path, size: int, resize: str = "crop") -> np.ndarray:
    """Decode one file into a square that keeps the aspect ratio.

    Args:
        path: image file; only regular files are opened (a FIFO would hang).
        size: side S of the result in pixels.
        resize: ``crop`` scales the short side to S and cuts the middle; ``pad`` scales the long
            side to S and fills the rest with the ImageNet mean colour.

    Returns:
        uint8 [S,S,3], RGB.

    Raises:
        DataError: missing, not a regular file, not an image, damaged, or above 40 megapixels.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"{path}: not a regular file (expected an image)")
        with Image.open(path, formats=FORMATS) as image:
            _refuse_bomb(image, path)
            _draft(image, size, resize)
            return square(to_rgb(image, str(path)), size, resize)
    except (DataError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise DataError(f"{path}: {_reason(error)}") from error


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Convert any mode to 8-bit RGB, upright, without clipping; first frame of an animation.

    Raises:
        DataError: 32-bit integer pixels, or float pixels outside 0..1: their range is unknown.
    """
    scaled = _to_eight_bits(image, name)
    if scaled is not None:
        exif = image.getexif()
        if exif:
            scaled.getexif().update(exif)
        image = scaled
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(white, upright).convert("RGB")
    return upright.convert("RGB")


def square(image: Image.Image, size: int, resize: str = "crop") -> np.ndarray:
    """Resize an RGB image to uint8 [S,S,3], keeping its aspect ratio; see :func:`load`."""
    width, height = image.size
    if resize == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        out = image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        return np.asarray(out)
    scale = size / max(width, height)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    canvas = Image.new("RGB", (size, size), PAD_COLOUR)
    small = image.resize(inner, Image.Resampling.BILINEAR, reducing_gap=2.0)
    canvas.paste(small, ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return np.asarray(canvas)


def find(root: str | Path) -> list[str]:
    """Names of all image files below a folder, relative to it, sorted."""
    root, found = str(root), []
    for folder, folders, files in os.walk(root):
        folders.sort()
        inside = os.path.relpath(folder, root)
        names = (f for f in files if f.lower().endswith(SUFFIXES))
        found += [f if inside == "." else os.path.join(inside, f) for f in names]
    return sorted(found)


def _refuse_bomb(image: Image.Image, path: str | Path) -> None:
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        limit = MAX_PIXELS // 1_000_000
        raise DataError(
            f"{path}: too large (found {image.width}x{image.height} = {pixels / 1e6:.0f} "
            f"megapixels, limit {limit} megapixels); scale it down"
        )


def _draft(image: Image.Image, size: int, resize: str) -> None:
    """Let the JPEG decoder shrink by 2, 4 or 8 while decoding; a no-op for other formats."""
    side = min(image.size) if resize == "crop" else max(image.size)
    if side > size:
        wanted = (-(-image.width * size // side), -(-image.height * size // side))
        image.draft("RGB", wanted)


def _to_eight_bits(image: Image.Image, name: str) -> Image.Image | None:
    """Scale 16-bit and float grey images to 8 bits; None where Pillow converts rightly."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        pixels = np.asarray(image).astype(np.float64) / 257.0
    elif image.mode == "I":
        raise DataError(f"{name}: 32-bit integer pixels have no known range; save 8 or 16 bits")
    elif image.mode == "F":
        pixels = np.asarray(image).astype(np.float64)
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0.0 and high <= 1.0):
            raise DataError(f"{name}: float pixels out of range (found {low:g}..{high:g}, "
                            "expected 0..1)")  # fmt: skip
        pixels *= 255.0
    else:
        return None
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image that can be read (expected one of {', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"too large (limit {MAX_PIXELS // 1_000_000} megapixels); scale it down"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return f"damaged image ({error})"
