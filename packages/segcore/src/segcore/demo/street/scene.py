"""A straight street in perspective: sky, ground, houses and gardens on both sides, and objects on it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from segcore.demo.street import things
from segcore.demo.street.canvas import (
    ASPHALT,
    BUILDING,
    CLOUD,
    FENCE,
    GLASS,
    GRASS,
    IGNORE,
    LEAVES,
    PAINT,
    ROAD,
    SIDEWALK,
    SKY,
    STONE,
    TERRAIN,
    VEGETATION,
    WALL,
    WHITE,
    Canvas,
    box,
    ellipse,
    front,
    side,
)

FACADES = [
    (196, 178, 150),
    (150, 92, 74),
    (188, 188, 184),
    (120, 116, 112),
    (206, 190, 120),
    (142, 158, 170),
    (172, 132, 112),
]
ROOFS = [(94, 66, 58), (70, 72, 80), (140, 84, 64)]
FOLIAGE = [(72, 98, 44), (50, 80, 48), (104, 118, 52), (150, 110, 46), (134, 74, 44), (96, 90, 62)]
LAWNS = [(96, 116, 58), (140, 128, 78), (120, 102, 74), (78, 104, 54)]
PAVING = [(168, 164, 158), (150, 130, 116), (128, 128, 130), (176, 166, 140)]
TAR = [(104, 104, 108), (84, 82, 80), (128, 122, 114), (92, 98, 108)]
ZENITH = [(90, 140, 205), (150, 170, 190), (190, 192, 194), (120, 130, 160), (60, 100, 170)]
HORIZON = [(220, 226, 230), (236, 214, 188), (200, 204, 206), (232, 190, 160)]
BOARDS = [(60, 64, 62), (206, 202, 194), (120, 84, 58), (50, 76, 62)]
BARK = [(92, 74, 58), (112, 104, 94)]


def draw_scene(rng: np.random.RandomState, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image (height, width, 3) uint8 RGB and its Cityscapes train ids (height, width) uint8, 255 ignored.

    Objects are painted from far to near. On any line of sight the sides of the street lie behind all objects in it, so
    they are painted first.
    """
    c = Canvas(rng, height, width)
    leaf = c.pick(FOLIAGE)
    _sky(c)
    kerbs, lines = _ground(c)
    _skyline(c)
    for line, out in zip(lines, (-1, 1), strict=True):
        _lots(c, line, out, leaf)
    _things(c, kerbs, lines, leaf)
    _hood(c)
    return c.develop()


def _sky(c: Canvas) -> None:
    top, low = c.pick(ZENITH), c.pick(HORIZON, light=0.1)
    if c.dusk:
        top, low = top * 0.45, low * 0.75
    c.haze = low * 0.9
    c.color[:] = top + (low - top) * np.clip(np.arange(c.h) / c.center[1], 0, 1)[:, None, None] ** 0.8
    c.label[:], c.texture[:] = SKY, CLOUD


def _ground(c: Canvas) -> tuple[tuple[float, float], tuple[float, float]]:
    """Draw the ground; return the x of the curbs and of the house fronts, left and right."""
    rng, lawn, paving, tar = c.rng, c.pick(LAWNS), c.pick(PAVING, 9), c.pick(TAR, 7)
    left, right = -rng.uniform(3.5, 8), rng.uniform(3, 5.5)
    c.ground(-400, 400, 1, 400, c.pick(LAWNS), TERRAIN, GRASS)
    lines = []
    for kerb, out in ((left, -1), (right, 1)):
        verge, pavement = rng.choice([0, rng.uniform(1.6, 3.2)]), rng.uniform(2, 3.4)
        near, far = kerb + out * verge, kerb + out * (verge + pavement)
        c.ground(kerb, near, 1, 300, lawn, TERRAIN, GRASS)
        c.ground(near, far, 1, 300, paving, SIDEWALK, STONE)
        for z in np.geomspace(2.5, 40, 24):  # joints between the slabs
            c.ground(near, far, z, z * 1.008 + 0.02, paving * 0.82)
        c.ground(near + out * pavement / 2, near + out * (pavement / 2 + 0.05), 1, 60, paving * 0.84)
        c.ground(near - out * 0.02, near + out * 0.22, 1, 150, paving * 1.18)
        lines.append(far)
    c.ground(left, right, 1, 300, tar, ROAD, ASPHALT)
    for _ in range(rng.randint(2, 7)):  # repairs
        x, z, size = rng.uniform(left, right - 1), rng.uniform(3, 30), rng.uniform(0.6, 1.6)
        c.ground(x, min(x + size, right), z, z * 1.2 + size, tar * rng.uniform(0.8, 1.12))
    mark = WHITE if rng.rand() < 0.8 else (222, 190, 70)
    middle, dash = (left + right) / 2 - rng.uniform(0, 0.6), rng.uniform(3, 5)
    for z in np.arange(rng.uniform(0, dash), 90, 2 * dash):
        c.ground(middle - 0.08, middle + 0.08, z, z + dash, mark)
    if rng.rand() < 0.5:
        c.ground(left + 0.35, left + 0.5, 1, 200, mark)
        c.ground(right - 0.5, right - 0.35, 1, 200, mark)
    if rng.rand() < 0.4:  # a crossing
        z = rng.uniform(7, 16)
        for x in np.arange(left + 0.4, right - 0.5, 1.1):
            c.ground(x, x + 0.55, z, z + 3, mark)
    return (left, right), (lines[0], lines[1])


def _skyline(c: Canvas) -> None:
    x = -160.0
    while x < 160:
        wide, z = c.rng.uniform(8, 26), c.rng.uniform(95, 120)
        if c.rng.rand() < 0.5:
            c.face(front(z, x, x + wide, 0, c.rng.uniform(6, 24)), c.pick(FACADES), BUILDING, STONE)
        else:
            _leaves(c, x + wide / 2, z, c.rng.uniform(4, 8), wide / 1.6, 6, c.pick(FOLIAGE), 10)
        x += wide


def _leaves(c: Canvas, x: float, z: float, y: float, rx: float, ry: float, color: np.ndarray, count: int) -> None:
    """Draw clusters of leaves around height y, lighter above and towards the sun."""
    place, angle, radius = c.board(x, z), c.rng.uniform(0, 2 * np.pi, count), np.sqrt(c.rng.uniform(0, 1, count))
    clusters = zip(radius * np.cos(angle), radius * np.sin(angle), strict=True)
    for dx, dy in sorted(clusters, key=lambda at: at[0] * c.sun + at[1]):
        light = 0.82 + 0.3 * (dy + 0.5 * dx * c.sun) + c.rng.uniform(-0.12, 0.12)
        size = c.rng.uniform(0.16, 0.36)
        blob = ellipse(dx * rx, y + dy * ry, size * rx, size * ry)
        c.fill(place(blob), color * light, VEGETATION, LEAVES, z)


def _tree(c: Canvas, x: float, z: float, leaf: np.ndarray) -> None:
    tall, wide = c.rng.uniform(4.5, 8), c.rng.uniform(1.3, 2.2)
    c.fill(c.board(x, z)(box(-0.14, 0.14, 0, tall * 0.6)), c.pick(BARK), VEGETATION, STONE, z)
    _leaves(c, x, z, tall * 0.7, wide, tall * 0.3, leaf, 70)


def _building(c: Canvas, x: float, out: int, z0: float, z1: float) -> None:
    """A house along the street with its front at x; `out` is the sign of x, away from the road."""
    rng, story, floors = c.rng, c.rng.uniform(2.8, 3.4), c.rng.randint(2, 6)
    top, base = 1.1 + floors * story, c.pick(FACADES)
    wall = base * (1 - c.contrast if c.sun == out else 1 + c.contrast / 2)
    c.face(front(z0, x, x + out * 12, 0, top), base * 0.8, BUILDING, STONE)
    if rng.rand() < 0.6:
        c.face(
            [(x, top, z0), (x, top + 1.7, z0 + 0.8), (x, top + 1.7, z1 - 0.8), (x, top, z1)],
            c.pick(ROOFS),
            BUILDING,
            STONE,
        )
    c.face(side(x, z0, z1, 0, top), wall, BUILDING, STONE)
    c.face(side(x, z0, z1, top - 0.35, top), wall * 1.12)
    c.face(side(x, z0, z1, 0, 0.5), wall * 0.72)
    count = max(2, round((z1 - z0) / rng.uniform(2.4, 3.4)))
    pitch, frame, high = (z1 - z0) / count, wall * rng.choice([0.75, 1.25]), rng.uniform(0.5, 0.65) * story
    glass, shop = c.pick([GLASS, (110, 128, 146), (38, 40, 44)], light=0.15), rng.rand() < 0.55
    for floor, i in np.ndindex(floors, count):
        a, b, y = z0 + (i + 0.22) * pitch, z0 + (i + 0.78) * pitch, 0.8 + floor * story
        pane = glass * rng.uniform(0.7, 1.3)
        if rng.rand() < (0.45 if c.dusk else 0.05):
            pane = np.array((246, 214, 130))
        if floor == 0 and shop:
            c.face(side(x, a - 0.16 * pitch, b + 0.16 * pitch, 0.4, story), pane)
        elif floor == 0 and i == count // 2:
            c.face(side(x, a, b, 0, 2.3), c.pick(PAINT) * 0.8)  # the door
        else:
            c.face(side(x, a - 0.12, b + 0.12, y - 0.12, y + high + 0.12), frame)
            c.face(side(x, a, b, y, y + high), pane)
            c.face(side(x, (a + b) / 2 - 0.04, (a + b) / 2 + 0.04, y, y + high), frame)
    if shop:
        c.face(side(x, z0 + 0.2, z1 - 0.2, story, story + 0.55), c.pick(PAINT))


def _garden(c: Canvas, x: float, out: int, z0: float, z1: float, leaf: np.ndarray) -> None:
    """Open ground with trees, and perhaps a house, behind a wall, a fence or a hedge."""
    rng = c.rng
    if rng.rand() < 0.6:
        _building(c, x + out * rng.uniform(7, 10), out, z0, z1)
    for z in sorted(rng.uniform(z0 + 1, z1, rng.randint(1, 4)), reverse=True):
        _tree(c, x + out * rng.uniform(1.5, 5), max(z, 4), leaf)
    kind, tall = rng.choice(3, p=[0.46, 0.42, 0.12]), rng.uniform(1.7, 2.4)
    if kind == 0:
        color = c.pick(FACADES) * (1 - c.contrast if c.sun == out else 1)
        c.face(side(x, z0, z1, 0, tall), color, WALL, STONE)
        for row, y in enumerate(np.arange(0, tall - 0.2, 0.32)):  # large blocks
            c.face(side(x, z0, z1, y, y + 0.07), color * 0.55)
            for z in np.arange(z0 + 0.4 * (row % 2), z1, 0.8):
                c.face(side(x, z, z + 0.09, y, min(y + 0.32, tall)), color * 0.55)
        c.face(side(x, z0, z1, tall - 0.2, tall), color * 1.25)
    elif kind == 1:  # see-through, but labeled as a whole, as in Cityscapes
        color = c.pick(BOARDS)
        c.face(side(x, z0, z1, 0, tall), None, FENCE)
        for z in np.arange(z0, z1, 0.4):
            c.face(side(x, z, z + 0.26, 0, tall), color)
        for y in (0.2, tall - 0.4):
            c.face(side(x, z0, z1, y, y + 0.16), color * 0.85)
    else:
        for z in np.arange(z1, max(z0, 3), -0.7):
            _leaves(c, x, z, tall * 0.5, 0.5, tall * 0.5, leaf, 9)


def _lots(c: Canvas, line: float, out: int, leaf: np.ndarray) -> None:
    """Line one side of the street."""
    ends = [1.2, *(np.cumsum(c.rng.uniform(7, 15, 9)) + c.rng.uniform(0, 6))]
    density = c.rng.uniform(0.15, 0.55)
    for z0, z1 in list(pairwise(ends))[::-1]:
        if c.rng.rand() < density:
            _building(c, line + out * c.rng.uniform(0, 0.6), out, z0, z1)
        else:
            _garden(c, line, out, z0, z1, leaf)


FOOTPRINTS = {
    things.car: (2.2, 4.5),
    things.bus: (3, 10),
    things.truck: (3, 8),
    things.bicycle: (1.6, 0.3),
    _tree: (3.2, 2),
}
"""Width and length in meters of an object's shadow; (0.8, 0.3) for all others."""


def _things(c: Canvas, kerbs: tuple[float, float], lines: tuple[float, float], leaf: np.ndarray) -> None:
    """Place all objects at random, and paint them, with shadows, from far to near."""
    rng, (left, right) = c.rng, kerbs
    found: list[tuple[float, Callable[..., None], float, tuple[Any, ...]]] = []  # z, what, x, more arguments

    lanes = [(right - 1.6, True, 8.0), ((left + right) / 2 - 1.9, False, 7.0)]
    if right - left > 10.8:  # room for one more
        lanes.append((left + 1.1, False, 5.0))
    for x, away, start in lanes:
        z = rng.uniform(start, start + 9)
        while z < 36:
            kind: Callable[..., None] = (things.car, things.truck, things.bus)[rng.choice(3, p=[0.56, 0.22, 0.22])]
            found.append((z, kind, x + rng.uniform(-0.2, 0.2), (away,)))
            z += FOOTPRINTS[kind][1] + 2 + rng.exponential(7) + z * 0.15
    for kerb, line, out in zip(kerbs, lines, (-1, 1), strict=True):
        z = rng.uniform(5.5, 9)
        while z < 26:
            kind = (things.lamp_post, things.traffic_light, things.traffic_sign, _tree)[
                rng.choice(4, p=[0.24, 0.3, 0.3, 0.16])
            ]
            found.append((z, kind, kerb + out * 0.45, (leaf,) if kind is _tree else ()))
            z += rng.uniform(2.5, 5) + z * 0.15
        for z in rng.uniform(6, 14, rng.randint(2, 4)):
            for i in range(rng.randint(1, 3)):
                found.append((z + 0.1 * i, things.person, line - out * rng.uniform(0.4, abs(line - kerb) - 0.5), ()))
        if rng.rand() < 0.5:
            found.append((rng.uniform(5, 14), things.bicycle, line - out * 0.8, (False,)))
    for z in rng.uniform(5, 11, rng.randint(1, 4)):
        found.append((z, things.bicycle, rng.uniform(left, right), (True,)))
    if rng.rand() < 0.35:
        found.append((rng.uniform(7, 18), things.person, rng.uniform(left, right), ()))

    for z, draw, x, more in sorted(found, key=lambda item: -item[0]):
        wide, long = FOOTPRINTS.get(draw, (0.8, 0.3))
        near, far = x - wide / 2, x - wide / 2 - c.sun * wide * 1.2 * c.contrast
        shadow = [(near, 0, z - 0.2), (near + wide, 0, z - 0.2), (far + wide, 0, z + long), (far, 0, z + long)]
        c.shade(shadow, 0.62)
        draw(c, x, z, *more)


def _hood(c: Canvas) -> None:
    """The hood of the ego car: part of every image, not of the task."""
    x, high, color = c.w * c.rng.uniform(0.44, 0.56), c.h * c.rng.uniform(0.04, 0.1), c.pick(PAINT) * 0.6
    for share in (1.0, 0.8, 0.55):
        c.fill(ellipse(x, c.h, c.w * (0.34 + 0.22 * share), high * share), color * (1.7 - 0.7 * share), IGNORE)
