"""Figures of classes and runs: overlays, class-index PNGs, captioned panels and legends.

Images are (H, W, 3) uint8 RGB; a palette is (K, 3), RGB 0..255 in the order of the classes.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segcore.errors import UserError
from segcore.files import write

JPEG = (".jpg", ".jpeg")
FONT_SIZE = 14
"""Height of captions and of legends beside panels, in pixels."""


def colorize(classes: np.ndarray, palette: np.ndarray, ignore_index: int = 255) -> np.ndarray:
    """Return the colors of classes (H, W) as an image; `ignore_index` and values without a color are black."""
    palette = np.asarray(palette, np.uint8)
    known = (classes >= 0) & (classes < len(palette)) & (classes != ignore_index)
    return np.where(known[..., None], palette[np.where(known, classes, 0)], np.uint8(0))


def to_gray(values: np.ndarray) -> np.ndarray:
    """Return values (H, W) in 0..1 as an 8-bit gray image (H, W): 0 is black, 1 white, linear in between."""
    return (np.clip(values, 0, 1) * 255).round().astype(np.uint8)


def colormap(values: np.ndarray) -> np.ndarray:
    """Return values (H, W) in 0..1 as an image from black over purple and orange to light yellow (inferno)."""
    return np.ascontiguousarray(cv2.applyColorMap(to_gray(values), cv2.COLORMAP_INFERNO)[..., ::-1])


def overlay(
    image: np.ndarray, classes: np.ndarray, palette: np.ndarray, opacity: float = 0.5, ignore_index: int = 255,
    *, contours: bool = False,
) -> np.ndarray:  # fmt: skip
    """Return the image painted with the colors of `classes` (H, W) as in MMSegmentation 0.x.

    The result is image * (1 - opacity) + color * opacity in float64, truncated; ignored pixels count as black.
    `contours` then draws the `borders` in the classes' full colors.

    Raises UserError when the sizes differ or `opacity` is outside 0..1.
    """
    if image.shape[:2] != classes.shape:
        raise UserError(
            f"classes of size {classes.shape} do not match an image of size {image.shape[:2]}; resize one of them"
        )
    if not 0 <= opacity <= 1:
        raise UserError(f"opacity is {opacity}; it must be between 0 and 1")
    colors = colorize(classes, palette, ignore_index)
    painted = (image * (1 - opacity) + colors * opacity).astype(np.uint8)
    return np.where(borders(classes)[..., None], colors, painted) if contours else painted


def borders(classes: np.ndarray) -> np.ndarray:
    """Return (H, W) bool, true near another class: lines of 2 pixels, of 4 at 2048x1024, wider as the image grows."""
    reach = max(round(math.sqrt(classes.size) / 700), 1)
    values, kernel = classes.astype(np.uint16), np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    found: np.ndarray = cv2.dilate(values, kernel) != cv2.erode(values, kernel)
    return found


def write_class_png(path: Path | str, classes: np.ndarray, palette: np.ndarray | None = None) -> None:
    """Write classes (H, W) as an 8-bit PNG whose values are the class indices; with a palette, viewers show colors.

    Raises UserError when an index or the number of colors does not fit into 8 bits.
    """
    if classes.size and not 0 <= classes.min() <= classes.max() <= 255:
        raise UserError(
            f"{path}: classes {classes.min()}..{classes.max()} do not fit into an 8-bit PNG, which holds 0..255"
        )
    picture = Image.fromarray(classes.astype(np.uint8))
    if palette is not None:
        if len(palette) > 256:
            raise UserError(
                f"{path}: {len(palette)} colors do not fit into a PNG, which holds 256; write without a palette"
            )
        # All 256 entries: with fewer, Pillow packs the indices into fewer bits and loses those without a color.
        picture.putpalette(np.asarray(palette, np.uint8).tobytes().ljust(3 * 256, b"\0"))
    write(path, _encoded(picture))


def write_image(path: Path | str, image: np.ndarray) -> None:
    """Write an image, color or gray (H, W) uint8, completely or not at all; creates the folder.

    The format is JPEG for .jpg and .jpeg, else PNG.
    """
    kind = "JPEG" if Path(path).suffix.lower() in JPEG else "PNG"
    write(path, _encoded(Image.fromarray(image), kind))


def step_title(entry: str, by: str) -> str:
    """Return `3 steps` or `timestep 3` for the entry "3" of a model whose `step_unit` is `by`; others unchanged."""
    if not (by and entry.isdigit()):
        return entry
    return f"timestep {entry}" if by == "timestep" else f"{entry} step{'s' * (entry != '1')}"


def write_animation(path: Path | str, frames: Sequence[np.ndarray], seconds: float = 0.7) -> None:
    """Write images of equal height as a looping GIF, completely or not at all; the last one stays longer."""
    width = max(frame.shape[1] for frame in frames)
    pictures = [Image.fromarray(_widened(frame, width)) for frame in frames]
    times = [round(1000 * seconds)] * (len(pictures) - 1) + [round(3000 * seconds)]
    data = io.BytesIO()
    pictures[0].save(data, format="GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
    write(path, data.getvalue())


def _encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    picture.save(data, format=kind, quality=95)  # PNG ignores the quality
    return data.getvalue()


def to_uint8_rgb(image: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) uint8 from an image of any channel count and depth."""
    image = image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, 2)
    if image.dtype != np.uint8:  # by its own maximum: 16-bit files often use fewer bits
        image = (image.clip(0) / max(float(image.max()), 1e-6) * 255).astype(np.uint8)
    return image


def hstack_panels(images: Sequence[np.ndarray], captions: Sequence[str], gap: int = 6) -> np.ndarray:
    """Return the images side by side on white, each below its caption, all scaled to the height of the first.

    A column is at least as wide as its caption.
    """
    height = images[0].shape[0]
    columns = []
    for image, caption in zip(images, captions, strict=True):
        if image.shape[0] != height:
            width = round(image.shape[1] * height / image.shape[0])
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        width = max(image.shape[1], math.ceil(_font(FONT_SIZE).getlength(caption)) + 6)
        columns.append(np.concatenate([_text_line(caption, width), _widened(image, width)]))
        columns.append(np.full((columns[0].shape[0], gap, 3), 255, np.uint8))
    return np.concatenate(columns[:-1], 1)


def _widened(image: np.ndarray, width: int) -> np.ndarray:
    """Return the image padded with white on the right."""
    return np.pad(image, ((0, 0), (0, width - image.shape[1]), (0, 0)), constant_values=255)


def add_legend(image: np.ndarray, classes: Sequence[str], palette: np.ndarray) -> np.ndarray:
    """Return an image (H, W, 3) with the colors and names of classes below it, in letters that grow with the image.

    An image that is narrower than the longest name is widened with white.
    """
    if not classes:
        return image
    size = max(round(math.sqrt(image.shape[0] * image.shape[1]) / 50), 12)
    columns = min(max(image.shape[1] // _cell(classes, size), 1), len(classes))
    table = legend(classes, palette, columns, size=size)
    width = max(image.shape[1], table.shape[1])
    return np.concatenate([_widened(image, width), _widened(table, width)])


def legend(
    classes: Sequence[str], palette: np.ndarray, columns: int = 6, cell: int | None = None, size: int = FONT_SIZE
) -> np.ndarray:
    """Return a table of colors and class names with cells `cell` pixels wide; None: as wide as the longest name.

    `size` is that of the letters in pixels.
    """
    rows, gap = -(-len(classes) // columns), size // 5
    line = _text_line("", 1, size).shape[0]
    cell = cell or _cell(classes, size)
    table = np.full((rows * line, columns * cell, 3), 255, np.uint8)
    for i, (name, color) in enumerate(zip(classes, palette, strict=True)):
        y, x = i // columns * line, i % columns * cell
        table[y + gap : y + line - gap, x + gap : x + line - gap] = color
        table[y : y + line, x + line : x + cell] = _text_line(name, cell - line, size)
    return table


def _cell(classes: Sequence[str], size: int) -> int:
    """Return the width of a color and the longest name."""
    return math.ceil(max(map(_font(size).getlength, classes), default=0)) + 5 * size // 2


def _text_line(text: str, width: int, size: int = FONT_SIZE) -> np.ndarray:
    """Return a line of black text on white, cropped to `width` pixels."""
    line = Image.new("RGB", (width, size * 11 // 7), "white")
    ImageDraw.Draw(line).text((size // 4, size // 7), text, "black", _font(size))
    return np.array(line)


@functools.cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)
