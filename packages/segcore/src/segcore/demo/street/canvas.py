"""The canvas of a street scene: polygons in meters, projected and painted with color, label and texture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

# Cityscapes train ids. No train (16) and no motorcycle (17) is drawn.
ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN, SKY, PERSON, RIDER, CAR, TRUCK, BUS = (
    range(16)
)
BICYCLE, IGNORE = 18, 255

PLAIN, ASPHALT, STONE, LEAVES, GRASS, CLOUD = range(6)
"""Textures. Buildings, walls, paving and bark share one, only terrain has grass."""

Color = Sequence[float] | np.ndarray
"""RGB, 0..255."""
BLACK, WHITE, GLASS = (26, 26, 30), (232, 232, 226), (62, 72, 84)
PAINT = [
    (176, 34, 34),
    (34, 62, 128),
    (226, 226, 222),
    (40, 42, 46),
    (140, 144, 148),
    (196, 150, 40),
    (44, 98, 66),
    (112, 84, 64),
]
"""Colors of vehicles, clothes, doors, awnings: shared, so that they reveal little about the class."""

ANGLES = np.linspace(0, 2 * np.pi, 20, endpoint=False)
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)
SUBPIXEL = 4
"""Fractional bits of the coordinates passed to OpenCV."""


class Canvas:
    """An image being drawn, at twice its final size. Meters: x right, y up from the ground, z ahead of the camera."""

    def __init__(self, rng: np.random.RandomState, height: int, width: int) -> None:
        self.rng, self.h, self.w = rng, 2 * height, 2 * width
        self.color = np.zeros((self.h, self.w, 3), np.uint8)
        self.label = np.full((self.h, self.w), IGNORE, np.uint8)
        self.texture = np.full((self.h, self.w), PLAIN, np.uint8)
        self.focal = 1.15 * self.h
        self.center = np.array([self.w * rng.uniform(0.25, 0.75), self.h * rng.uniform(0.28, 0.54)])
        """Vanishing point of the street in pixels; its height is the horizon."""
        self.eye = rng.uniform(1.6, 2.5)
        self.dusk = rng.rand() < 0.2
        self.sun = int(rng.choice([-1, 1]))
        """Side of the light source: -1 left, 1 right."""
        self.contrast = rng.uniform(0.05, 0.35)
        """Contrast between lit and shaded sides; small under clouds."""
        self.haze: np.ndarray = np.full(3, 200.0)
        self.reach = rng.uniform(60, 200)
        """Distance in meters at which haze makes up 63 % of a color."""

    def pick(self, colors: Sequence[Color], spread: float = 12, light: float = 0.2) -> np.ndarray:
        """Return one of `colors`, varied by a factor 1 +- `light` and by +- `spread` per channel."""
        base = np.array(colors[self.rng.randint(len(colors))]) * self.rng.uniform(1 - light, 1 + light)
        return np.clip(base + self.rng.uniform(-spread, spread, 3), 8, 248)

    def project(self, points: Any) -> np.ndarray:
        """Return pixels (n, 2) of points (n, 3) in meters; points nearer than 0.8 m are moved to 0.8 m."""
        x, y, z = np.asarray(points, float).T
        return self.center + self.focal * np.stack([x, self.eye - y], 1) / np.maximum(z, 0.8)[:, None]

    def fill(self, pixels: Any, color: Any, label: int | None = None, texture: int = PLAIN, z: float = 0) -> None:
        """Paint a polygon (n, 2) in pixels at distance z.

        Without a label, the label below is kept; without a color, only the label is painted.
        """
        polygon = [np.rint(np.asarray(pixels) * 2**SUBPIXEL).astype(np.int32)]
        if color is not None:
            clear = np.exp(-z / self.reach)
            rgb = [min(own * clear + haze * (1 - clear), 255) for own, haze in zip(color, self.haze, strict=True)]
            cv2.fillPoly(self.color, polygon, rgb, shift=SUBPIXEL)
        if label is not None:
            cv2.fillPoly(self.label, polygon, label, shift=SUBPIXEL)
            cv2.fillPoly(self.texture, polygon, texture, shift=SUBPIXEL)

    def face(self, points: Any, color: Any, label: int | None = None, texture: int = PLAIN) -> None:
        """Paint a polygon (n, 3) in meters; other arguments as in `fill`."""
        self.fill(self.project(points), color, label, texture, z=sum(point[2] for point in points) / len(points))

    def ground(
        self, x0: float, x1: float, z0: float, z1: float, color: Any, label: int | None = None, texture: int = PLAIN
    ) -> None:
        """Paint a rectangle of the ground; other arguments as in `fill`."""
        z0, z1 = max(z0, 1.0), max(z1, 1.0)
        corners = [(x0, 0, z0), (x0, 0, z1), (x1, 0, z1), (x1, 0, z0)]
        self.fill(self.project(corners), color, label, texture, z=min(z0, 25))

    def board(self, x: float, z: float) -> Callable[[Any], np.ndarray]:
        """Return the map from (right, up) in meters on an upright board at (x, z) to pixels."""
        foot, scale = self.project([(x, 0, z)])[0], self.focal / z
        return lambda points: foot + np.asarray(points, float) * (scale, -scale)

    def shade(self, points: Any, factor: float) -> None:
        """Darken a polygon (n, 3) in meters: a shadow."""
        polygon = np.rint(self.project(points)).astype(np.int32)
        (left, top), (right, bottom) = polygon.min(0).clip(0), polygon.max(0).clip(-1) + 1
        part = self.color[top:bottom, left:right]
        if part.size:
            mask = np.zeros(part.shape[:2], np.uint8)
            cv2.fillPoly(mask, [polygon - (left, top)], 1)
            part[mask > 0] = (part[mask > 0] * factor).astype(np.uint8)

    def develop(self) -> tuple[np.ndarray, np.ndarray]:
        """Return image (H, W, 3) uint8 RGB and labels (H, W) uint8 at the final size, with texture, light and grain."""
        rng, size = self.rng, (self.w // 2, self.h // 2)
        image = cv2.resize(self.color, size, interpolation=cv2.INTER_AREA).astype(np.float32)
        label, texture = self.label[1::2, 1::2].copy(), self.texture[1::2, 1::2]

        def noise(across: float, down: float) -> np.ndarray:
            """Smooth noise around -1..1 in spots of that many pixels, for an image of 256 rows."""
            unit = size[1] / 256
            shape = max(2, round(size[1] / (down * unit))), max(2, round(size[0] / (across * unit)))
            return cv2.resize(rng.uniform(-1, 1, shape).astype(np.float32), size, interpolation=cv2.INTER_CUBIC)

        fine, soft, broad = noise(1.2, 1.2), noise(5, 5), noise(60, 30)
        fields = {
            PLAIN: 0.03 * soft,
            ASPHALT: 0.12 * fine + 0.05 * noise(20, 3),
            STONE: 0.06 * soft + 0.06 * broad,
            LEAVES: 0.2 * noise(3, 3) + 0.16 * soft,
            GRASS: 0.22 * noise(1.5, 4) + 0.1 * noise(16, 6),
            CLOUD: 0.16 * np.maximum(noise(90, 24) + 0.5 * noise(30, 10), 0),
        }
        factor = 1 + 0.08 * broad + np.linspace(-1, 1, size[0], dtype=np.float32) * (self.sun * rng.uniform(0, 0.15))
        for kind, field in fields.items():
            np.add(factor, field, out=factor, where=texture == kind)
        image *= factor[..., None]
        gray = image.mean(2, keepdims=True)
        image = gray + (image - gray) * np.float32(rng.uniform(0.6, 1.1))
        tint = np.array([(1, 1, 1), (1.1, 0.98, 0.84), (0.88, 0.98, 1.1)][rng.randint(3)], np.float32)
        exposure = np.float32(rng.uniform(0.65, 0.85) if self.dusk else rng.uniform(0.8, 1.2))
        grain = rng.randint(-4, 5, image.shape, np.int8) + rng.randint(-4, 5, image.shape, np.int8)
        return np.clip(image * (tint * exposure) + grain, 0, 255).astype(np.uint8), label


def front(z: float, x0: float, x1: float, y0: float, y1: float) -> list[tuple[float, float, float]]:
    """Return an upright rectangle across the street, (4, 3) meters."""
    return [(x0, y0, z), (x0, y1, z), (x1, y1, z), (x1, y0, z)]


def side(x: float, z0: float, z1: float, y0: float, y1: float) -> list[tuple[float, float, float]]:
    """Return an upright rectangle along the street, (4, 3) meters."""
    return [(x, y0, z0), (x, y1, z0), (x, y1, z1), (x, y0, z1)]


def box(x0: float, x1: float, y0: float, y1: float) -> list[tuple[float, float]]:
    """Return a rectangle on a board, (4, 2) meters."""
    return [(x0, y0), (x0, y1), (x1, y1), (x1, y0)]


def ellipse(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    """Return an ellipse around (x, y) on a board, (20, 2) meters."""
    return CIRCLE * (rx, ry) + (x, y)


def stroke(a: Sequence[float], b: Sequence[float], width: float) -> np.ndarray:
    """Return a straight stroke from a to b on a board, (4, 2) meters."""
    start, end = np.asarray(a, float), np.asarray(b, float)
    along = end - start
    across = np.array([-along[1], along[0]]) / np.hypot(*along) * width / 2
    return np.stack([start + across, end + across, end - across, start - across])
