"""Objects in a street scene: vehicles, people, bicycles, poles with lamps, lights and signs.

Every function draws one object whose foot, or near end, is at (x, z) in meters.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from segcore.demo.street.canvas import (
    BICYCLE,
    BLACK,
    BUS,
    CAR,
    CIRCLE,
    GLASS,
    LIGHT,
    PAINT,
    PERSON,
    POLE,
    RIDER,
    SIGN,
    TRUCK,
    WHITE,
    Canvas,
    Color,
    box,
    ellipse,
    front,
    side,
    stroke,
)

# Side views of vehicles: (share of the length from the near end, share of the height).
CAR_FROM_BEHIND = [
    (0, 0.2),
    (0, 0.6),
    (0.05, 0.66),
    (0.16, 1),
    (0.56, 1),
    (0.74, 0.64),
    (0.97, 0.56),
    (1, 0.44),
    (1, 0.2),
]
CAR_FROM_AHEAD = [(1 - share, up) for share, up in CAR_FROM_BEHIND[::-1]]
VAN = [(0, 0.12), (0, 0.98), (0.01, 1), (0.99, 1), (1, 0.98), (1, 0.12)]

SKIN = [(222, 178, 148), (178, 128, 96), (110, 76, 58)]
HAIR = [(40, 30, 26), (92, 62, 40), (176, 146, 96), (128, 126, 124)]
METAL = [(96, 100, 102), (70, 78, 74), (150, 152, 150), (60, 58, 58)]
LIVERY = [(206, 166, 44), (196, 44, 40), (226, 226, 222)]
TARPAULIN = [(186, 182, 172), (58, 84, 140), (60, 104, 78)]
VESTS = [(228, 232, 70), (248, 140, 40)]
RED, BLUE, GREEN = (200, 30, 36), (36, 84, 172), (30, 116, 80)


class Body(NamedTuple):
    """The box around a vehicle, in meters: middle of its near end, width, length, height."""

    x: float
    z: float
    wide: float
    long: float
    tall: float

    @property
    def flank(self) -> float | None:
        """The x of the visible side, None if the camera looks straight at the end."""
        if abs(self.x) <= self.wide / 2:
            return None
        return self.x - np.sign(self.x) * self.wide / 2

    def end(self, a: float, b: float, low: float, high: float) -> list[tuple[float, float, float]]:
        """Return a rectangle on the near end, in shares of half the width and of the height."""
        half = self.wide / 2
        return front(self.z, self.x + a * half, self.x + b * half, low * self.tall, high * self.tall)


def _hull(c: Canvas, b: Body, shape: list[tuple[float, float]], color: np.ndarray, label: int) -> None:
    """Draw a side view extruded over the width: faces toward the camera or up, then the flank."""
    outline = [(b.z + share * b.long, up * b.tall) for share, up in shape]
    x0, x1 = b.x - b.wide / 2, b.x + b.wide / 2
    for (za, ya), (zb, yb) in list(pairwise(outline))[::-1]:
        if yb >= ya:
            light = 0.9 if zb - za < 0.2 else 1.15
            c.face([(x0, ya, za), (x0, yb, zb), (x1, yb, zb), (x1, ya, za)], color * light, label)
    if b.flank is not None:
        light = 1 - c.contrast if c.sun == np.sign(b.x) else 1.05
        c.face([(b.flank, y, z) for z, y in outline], color * light, label)


def _wheels(c: Canvas, b: Body, label: int, radius: float) -> None:
    for share in (0.18, 0.8):
        if b.flank is not None:
            for r, color in ((radius, BLACK), (0.55 * radius, (150, 150, 154))):
                z = b.z + share * b.long
                c.face([(b.flank, radius + r * dy, z + r * dz) for dz, dy in CIRCLE], color, label)
    for dx in (-0.42, 0.42):
        c.face(front(b.z, b.x + dx * b.wide - 0.12, b.x + dx * b.wide + 0.12, 0, radius), BLACK, label)


def _windows(c: Canvas, b: Body, spans: list[tuple[float, float]], low: float, high: float) -> None:
    """Draw windows on the flank; all in shares of length and height."""
    if b.flank is not None:
        for near, far in spans:
            c.face(side(b.flank, b.z + near * b.long, b.z + far * b.long, low * b.tall, high * b.tall), GLASS)


def _lamps(c: Canvas, b: Body, height: float, away: bool) -> None:
    for dx in (-0.4, 0.4):
        x = b.x + b.wide * dx
        c.face(front(b.z, x - 0.13, x + 0.13, height, height + 0.18), (210, 36, 30) if away else (250, 244, 214))


def car(c: Canvas, x: float, z: float, away: bool) -> None:
    """A car, driving away or towards the camera."""
    b = Body(x, z, 1.85, c.rng.uniform(3.9, 4.7), c.rng.uniform(1.45, 1.8))
    color, shape = c.pick(PAINT), CAR_FROM_BEHIND if away else CAR_FROM_AHEAD
    _hull(c, b, shape, color, CAR)
    _wheels(c, b, CAR, 0.34)
    _windows(c, b, [(0.2, 0.36), (0.4, 0.56)] if away else [(0.44, 0.6), (0.64, 0.8)], 0.66, 0.92)
    (near, low), (far, high) = shape[2:4] if away else shape[3:5]
    low, high = low * b.tall + 0.03, high * b.tall - 0.06
    pane = [(-0.42, low, near), (-0.36, high, far), (0.36, high, far), (0.42, low, near)]
    c.face([(x + b.wide * dx, y, z + share * b.long) for dx, y, share in pane], GLASS)
    _lamps(c, b, 0.42 * b.tall, away)
    c.face(front(z, x - 0.26, x + 0.26, 0.45, 0.58), WHITE)
    c.face(b.end(-1, 1, 0.16, 0.24), color * 0.5)


def bus(c: Canvas, x: float, z: float, away: bool) -> None:
    """A bus: rows of windows and a destination board."""
    b = Body(x, z, 2.5, c.rng.uniform(8, 11), c.rng.uniform(2.9, 3.3))
    _hull(c, b, VAN, c.pick(LIVERY), BUS)
    _wheels(c, b, BUS, 0.45)
    count = c.rng.randint(4, 7)
    _windows(c, b, [((i + 0.1) / count, (i + 0.9) / count) for i in range(count)], 0.48, 0.84)
    c.face(b.end(-0.86, 0.86, 0.45, 0.8), GLASS)
    c.face(b.end(-0.6, 0.6, 0.86, 0.95), BLACK)
    c.face(b.end(-0.4, 0.4, 0.885, 0.925), (250, 180, 40))
    _lamps(c, b, 0.24 * b.tall, away)


def truck(c: Canvas, x: float, z: float, away: bool) -> None:
    """A truck: a cab and a closed load, of two colors; the doors of the load show from behind."""
    tall, long = c.rng.uniform(3.1, 3.7), c.rng.uniform(5, 7)
    paint, cover = c.pick(PAINT), c.pick(TARPAULIN)
    load = Body(x, z if away else z + 2.2, 2.5, long, tall)
    cab = Body(x, z + long + 0.3 if away else z, 2.3, 2.0, tall * 0.78)
    c.face(front(z + 0.2, x - 1.1, x + 1.1, 0.35, tall * 0.3), BLACK, TRUCK)
    for b, color in ((cab, paint), (load, cover))[:: 1 if away else -1]:
        _hull(c, b, VAN, color, TRUCK)
        if b is load and b.flank is not None:  # ribs
            for share in np.arange(0.06, 1, 0.14):
                z = b.z + share * b.long
                c.face(side(b.flank, z, z + 0.25, 0.2 * tall, 0.96 * tall), color * 0.6)
        if b is cab:
            _windows(c, cab, [(0.25, 0.75)], 0.55, 0.85)
    _wheels(c, Body(x, z, 2.5, long + 2.2, tall), TRUCK, 0.5)
    if away:
        c.face(load.end(-0.024, 0.024, 0.14, 0.97), cover * 0.55)
        for dx in (-0.7, -0.35, 0.35, 0.7):
            c.face(load.end(dx - 0.04, dx + 0.04, 0.2, 0.94), cover * 0.6)
        c.face(load.end(-1, 1, 0.12, 0.18), BLACK)
    else:
        c.face(cab.end(-0.87, 0.87, 0.54, 0.88), GLASS)
        c.face(cab.end(-0.65, 0.65, 0.26, 0.44), paint * 0.4)
    _lamps(c, load if away else cab, tall * 0.16, away)


def person(c: Canvas, x: float, z: float) -> None:
    """A person who walks or stands."""
    rng, place = c.rng, c.board(x, z)
    tall, stride, face = rng.uniform(1.6, 1.95), rng.uniform(0.03, 0.3), int(rng.choice([-1, 1]))
    coat, trousers = c.pick(PAINT), c.pick(PAINT) * 0.7

    def draw(polygon: Any, color: Color) -> None:
        c.fill(place(np.asarray(polygon) * (face * tall, tall)), color, PERSON, z=z)

    for step, light in ((-1, 0.75), (1, 1)):
        foot = (step * stride * 0.6, 0.03)
        draw(stroke((step * 0.04, 0.48), foot, 0.1), trousers * light)
        draw(ellipse(foot[0] + 0.03, 0.02, 0.06, 0.022), BLACK)
    draw(stroke((-0.11, 0.8), (-0.13 - stride * 0.3, 0.48), 0.065), coat * 0.75)
    draw([(-0.14, 0.45), (-0.14, 0.76), (-0.09, 0.84), (0.09, 0.84), (0.14, 0.76), (0.14, 0.45)], coat)
    draw(stroke((0.12, 0.8), (0.14 + stride * 0.3, 0.48), 0.065), coat * 0.88)
    if rng.rand() < 0.35:
        draw(ellipse(-0.13, 0.66, 0.06, 0.11), c.pick(PAINT))  # a backpack
    draw(ellipse(0.005, 0.925, 0.062, 0.078), c.pick(SKIN, 8))
    draw(ellipse(-0.01, 0.955, 0.068, 0.058), c.pick(HAIR, 8))


def bicycle(c: Canvas, x: float, z: float, ridden: bool) -> None:
    """A bicycle from its side, slightly rotated, perhaps with a rider; labeled through spokes and frame."""
    rng, place = c.rng, c.board(x, z)
    turn = rng.choice([-1, 1]) * rng.uniform(0.6, 1)
    frame, coat, trousers = c.pick(PAINT), c.pick(VESTS), c.pick(PAINT) * 0.6

    def draw(polygon: Any, color: Any, label: int = BICYCLE) -> None:
        c.fill(place(np.asarray(polygon) * (1.15 * turn, 1.15)), color, label, z=z)

    def leg(knee: tuple[float, float], foot: tuple[float, float], light: float) -> None:
        draw(stroke((-0.2, 0.96), knee, 0.16), trousers * light, RIDER)
        draw(stroke(knee, foot, 0.13), trousers * light, RIDER)

    back, ahead, pedals, seat, bars, head = (
        (-0.52, 0.35),
        (0.52, 0.35),
        (-0.05, 0.3),
        (-0.2, 0.88),
        (0.36, 1),
        (0.34, 0.82),
    )
    if ridden:
        leg((0.14, 0.68), (-0.02, 0.2), 0.7)
    draw([back, seat, bars, ahead, pedals], None)
    for hub in (back, ahead):
        outer, inner = ellipse(*hub, 0.36, 0.36), ellipse(*hub, 0.28, 0.28)
        draw(outer, None)
        for i in range(-1, len(CIRCLE) - 1):  # a tire of short strokes: the background shows between the spokes
            draw([outer[i], outer[i + 1], inner[i + 1], inner[i]], BLACK)
    for a, b in ((back, pedals), (back, seat), (seat, pedals), (pedals, head), (seat, head), (ahead, bars)):
        draw(stroke(a, b, 0.07), frame)
    draw(stroke((-0.32, 0.92), (-0.1, 0.92), 0.08), BLACK)
    draw(stroke((0.26, 1.02), (0.42, 1.02), 0.06), BLACK)
    if ridden:
        leg((0.16, 0.78), (0.02, 0.34), 1)
        draw([(-0.34, 0.92), (-0.2, 1.42), (0.06, 1.55), (0.14, 1.4), (-0.04, 0.92)], coat, RIDER)
        draw(stroke((0.03, 1.43), (0.34, 1.05), 0.11), coat * 0.85, RIDER)
        draw(ellipse(0.12, 1.66, 0.11, 0.14), c.pick(SKIN, 8), RIDER)
        draw(ellipse(0.1, 1.73, 0.14, 0.09), c.pick(PAINT), RIDER)


def _mast(c: Canvas, x: float, z: float, tall: float, wide: float) -> Any:
    place, color, half = c.board(x, z), c.pick(METAL), wide / 2
    c.fill(place(box(-half, half, 0, tall)), color, POLE, z=z)
    c.fill(place(box(half * 0.2, half, 0, tall)), color * (1 + 0.25 * c.sun), z=z)
    return place


def lamp_post(c: Canvas, x: float, z: float) -> None:
    """A street lamp that reaches over the road; all its parts are labeled pole."""
    tall, reach = c.rng.uniform(5.5, 7.5), -np.sign(x) * c.rng.uniform(1, 1.8)
    place = _mast(c, x, z, tall, 0.36)
    c.fill(place(stroke((0, tall - 0.06), (reach, tall + 0.2), 0.15)), METAL[0], POLE, z=z)
    lamp = (255, 232, 170) if c.dusk else (180, 182, 180)
    c.fill(place(stroke((reach, tall + 0.2), (reach * 1.5, tall + 0.22), 0.24)), lamp, POLE, z=z)


def traffic_light(c: Canvas, x: float, z: float) -> None:
    """Three lights in a dark case on a mast, one of them lit."""
    tall, lit = c.rng.uniform(2.4, 3.4), c.rng.randint(3)
    place = _mast(c, x, z, tall, 0.32)
    c.fill(place(box(-0.45, 0.45, tall - 0.2, tall + 1.7)), WHITE, LIGHT, z=z)
    c.fill(place(box(-0.37, 0.37, tall - 0.12, tall + 1.62)), (34, 38, 36), z=z)
    for i, color in enumerate(((70, 235, 150), (255, 190, 50), (245, 50, 40))):
        c.fill(place(ellipse(0, tall + 0.2 + 0.55 * i, 0.25, 0.25)), np.array(color) * (1 if i == lit else 0.35), z=z)


def traffic_sign(c: Canvas, x: float, z: float) -> None:
    """A sign on a mast: no entry, a command, a warning or a way."""
    tall, size = c.rng.uniform(2.4, 3.2), c.rng.uniform(0.6, 0.8)
    square, triangle = np.array(box(-1, 1, -1, 1)), np.array([(-1.1, -0.8), (0, 1.1), (1.1, -0.8)])
    signs: tuple[tuple[np.ndarray, Color, Color, tuple[float, float], Color], ...] = (
        (CIRCLE, RED, WHITE, (0.5, 0.14), BLACK),
        (CIRCLE, WHITE, BLUE, (0.12, 0.45), WHITE),
        (triangle, RED, WHITE, (0.12, 0.4), BLACK),
        (square, WHITE, BLUE if c.rng.rand() < 0.5 else GREEN, (0.13, 0.45), WHITE),
    )
    shape, rim, field, bar, ink = signs[c.rng.randint(len(signs))]
    place = _mast(c, x, z, tall, 0.28)
    for polygon, color, label in ((shape, rim, SIGN), (shape * 0.72, field, None), (square * bar, ink, None)):
        c.fill(place(polygon * size + (0, tall)), color, label, z=z)
