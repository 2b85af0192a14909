"""Pictures on disk to pixels for the model: reading, making square, normalising; and checking a whole data set of them.

All that can be wrong with a picture becomes an `ImageProblem` with a short reason. The transforms are those that
LLaMA2-Accessory takes from torchvision, on Pillow's own resampling.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from accessory.config import ImageTransform
from accessory.errors import first_line

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = tuple(int(255 * value) for value in CLIP_MEAN)  # whole levels, cut as LLaMA2-Accessory cuts them
CROP_AREA = (0.9, 1.0)  # of the picture's
CROP_RATIO = (0.75, 1.3333)  # width over height
MAX_PIXELS = 89_478_485  # above, Pillow itself warns of a decompression bomb
CHECKED_AT_ONCE = 1024  # pictures handed to the threads together: a bound on what waits in memory

Source = str | Path | Image.Image
Stamp = tuple[int, int]

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an ImageProblem here


@dataclass(frozen=True)
class ImageInput:
    """How a model takes images."""

    size: int
    """Pixels a side."""
    words: int
    """Positions of a row that an image takes, its tags included."""


class ImageProblem(ValueError):
    """Why a picture cannot be used, in a few words."""


# --- reading ---------------------------------------------------------------------------------------------------------


def read_image(source: Source) -> Image.Image:
    """A picture -> RGB, upright as its EXIF data says, transparency on white, 16-bit grays scaled to 8 bits.

    Of an animation in a file, the first frame. Raises ImageProblem.
    """
    if isinstance(source, Image.Image):
        return _guarded(source, quick=False)
    return _decode(_read_bytes(source), quick=False)


def _read_bytes(path: str | Path) -> bytes:
    try:
        kind = os.stat(path).st_mode
        if stat.S_ISDIR(kind):
            raise ImageProblem("is a folder")
        if not stat.S_ISREG(kind):
            raise ImageProblem("not a file")
        data = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ImageProblem("no such file") from None
    except OSError as error:
        raise ImageProblem((error.strerror or str(error)).lower()) from None
    except ImageProblem:
        raise
    except ValueError:  # a zero byte, half a surrogate pair
        raise ImageProblem("not a file name") from None
    if not data:
        raise ImageProblem("empty file")
    return data


def _decode(data: bytes, quick: bool) -> Image.Image:
    try:
        opened = Image.open(BytesIO(data))
    except Exception as error:
        raise ImageProblem(_reason(error)) from None
    with opened:
        return _guarded(opened, quick)


def _guarded(image: Image.Image, quick: bool) -> Image.Image:
    """quick: decode JPEGs at an eighth of their size, which still reads every byte."""
    width, height = image.size
    if width * height == 0:
        raise ImageProblem(f"has no pixels: {width} x {height}")
    if width * height > MAX_PIXELS:  # before anything is decoded
        raise ImageProblem(f"is too large: {width} x {height} pixels, of at most {MAX_PIXELS:,}")
    try:
        if quick:
            image.draft(None, (1, 1))
        image.load()
        return _to_rgb(_upright(image))
    except Exception as error:  # a decoder raises whatever its parsers raise
        raise ImageProblem(_reason(error)) from None


def _reason(error: Exception) -> str:
    text = first_line(error)
    if isinstance(error, ImageProblem):
        return text
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"is too large: {text.split(',')[0]}"
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return "truncated"
    return f"broken ({text})"


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data; the pixels are loaded and fine
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # I, I;16, I;16B, …: Pillow's own conversion clips at 255
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageProblem("has floating-point pixels of unknown range; save it with 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


# --- making square ---------------------------------------------------------------------------------------------------


def random_resized_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A random box of nearly all of the picture, stretched to the square (torchvision's RandomResizedCrop)."""
    left, top, width, height = _random_box(*image.size, rng)
    box = (left, top, left + width, top + height)
    return image.crop(box).resize((size, size), Image.Resampling.BICUBIC)


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """left, top, width, height."""
    for _ in range(10):
        area = width * height * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    # no such box fits a picture this long: the largest central one of a permitted ratio
    w, h = min(width, round(height * CROP_RATIO[1])), min(height, round(width / CROP_RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def resized_center_crop(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size`, and of that the central square.

    The box is mapped back into the picture, so that only the square is computed: of a picture of 1 x 5000 pixels the
    whole would be `size` x 5000 `size`.
    """
    short = min(image.size)
    box = []
    for side in image.size:
        scaled = int(size * side / short)
        start = round((scaled - size) / 2)
        box.append((start * side / scaled, min((start + size) * side / scaled, side)))
    (left, right), (top, bottom) = box
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom))


def padded_resize(image: Image.Image, size: int) -> Image.Image:
    """The whole picture, padded to a square with CLIP's mean colour.

    The long side is resized before padding, which gives the same pixels (resampling is separable, and plain colour
    stays plain), from size x long instead of long x long of them.
    """
    longest = 64 * size
    if max(image.size) > longest:  # so thin or so large that the rounding of its sides shows in no pixel
        sides = (max(1, round(side * longest / max(image.size))) for side in image.size)
        image = image.resize(tuple(sides), Image.Resampling.BICUBIC)
    width, height = image.size
    long = max(width, height)
    if width >= height:
        image = image.resize((size, height), Image.Resampling.BICUBIC)
        canvas, corner = Image.new("RGB", (size, long), PAD_COLOUR), (0, (long - height) // 2)
    else:
        image = image.resize((width, size), Image.Resampling.BICUBIC)
        canvas, corner = Image.new("RGB", (long, size), PAD_COLOUR), ((long - width) // 2, 0)
    canvas.paste(image, corner)
    return canvas.resize((size, size), Image.Resampling.BICUBIC)


def deterministic(transform: ImageTransform) -> ImageTransform:
    """The transform for where nothing may be random."""
    if transform is ImageTransform.random_resized_crop:
        return ImageTransform.resized_center_crop
    return transform


def to_pixels(image: Image.Image) -> Tensor:
    """RGB -> float32 [3, height, width]: 0 to 1, then less CLIP's mean, over CLIP's deviation."""
    levels = np.asarray(image, dtype=np.float32) / 255
    pixels = (levels - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def load_pixels(
    source: Source, transform: ImageTransform, size: int, rng: Optional[np.random.Generator] = None
) -> Tensor:
    """A picture as the model takes it: float32 [3, size, size]. rng: for random_resized_crop, and needed there."""
    image = read_image(source)
    if transform is ImageTransform.random_resized_crop:
        assert rng is not None, "a random transform needs a generator"
        return to_pixels(random_resized_crop(image, size, rng))
    square = resized_center_crop if transform is ImageTransform.resized_center_crop else padded_resize
    return to_pixels(square(image, size))


# --- checking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageCheck:
    """What `check_images` found."""

    problems: dict[str, str]
    """Reason by path, of the pictures that cannot be used."""
    digest: str
    """Of the contents, in the order given; one that cannot be used counts as such, whatever it holds."""
    stamps: dict[str, Optional[Stamp]]
    """By path, in the order of their first use; see `stamp_of`."""


def stamp_of(path: str) -> Optional[Stamp]:
    """(bytes, time of the last change in ns), None where there is no such file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def check_images(paths: Sequence[str]) -> ImageCheck:
    """Decode every picture once."""
    unique = list(dict.fromkeys(paths))
    found = {}
    is_shown = bool(unique) and sys.stderr.isatty()
    bar = tqdm(total=len(unique), desc="checking images", unit="image", disable=not is_shown)
    with bar, ThreadPoolExecutor() as pool:
        for start in range(0, len(unique), CHECKED_AT_ONCE):
            part = unique[start : start + CHECKED_AT_ONCE]
            for path, result in zip(part, pool.map(_check, part), strict=True):
                found[path] = result
                bar.update()
    digest = hashlib.sha256()
    for path in paths:
        digest.update(found[path][1].encode() + b",")
    problems = {path: problem for path, (_, _, problem) in found.items() if problem}
    return ImageCheck(problems, digest.hexdigest(), {path: stamp for path, (stamp, _, _) in found.items()})


def _check(path: str) -> tuple[Optional[Stamp], str, str]:
    """stamp, digest of the content, problem."""
    stamp = stamp_of(path)  # before the content: a change meanwhile is then noticed at the next opening
    try:
        data = _read_bytes(path)
        _decode(data, quick=True)
    except ImageProblem as problem:
        return stamp, "", str(problem)
    return stamp, hashlib.sha256(data).hexdigest(), ""
