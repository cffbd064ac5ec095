"""Read and write videos and cameras. Needs PyAV (segcore[video])."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from segcore.data.images import IMAGE_SUFFIXES
from segcore.errors import UserError
from segcore.files import replacing

ENCODERS = {
    **dict.fromkeys((".mp4", ".m4v", ".mov", ".mkv"), ("libx264", {"crf": "18"})),
    ".webm": ("libvpx-vp9", {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "5", "row-mt": "1"}),
}
"""FFmpeg's encoder and its options by the ending of the file that is written. A WebM holds no H.264."""
SUFFIXES = (*ENCODERS, ".avi", ".mpg", ".mpeg", ".wmv", ".ts", ".mts", ".m2ts", ".3gp", ".flv", ".ogv")
"""Endings of the videos that are read."""
CAMERAS = {"linux": ("/dev/video{}", "v4l2"), "darwin": ("{}", "avfoundation")}
"""By system: the device path, with a slot for the camera's number, and FFmpeg's name of the camera interface."""


class CutVideoError(UserError):
    """Raised behind the last frame that can be read of a video that was cut or is damaged."""


def is_video(source: Path) -> bool:
    """Return whether `source` has a video's suffix or is the number of a camera."""
    return source.suffix.lower() in SUFFIXES or is_camera(source)


def is_camera(source: Path) -> bool:
    """Return whether `source` is the number of a camera, and not an existing file."""
    return str(source).isdecimal() and not source.exists()


def plan(source: Path, target: Path) -> Path:
    """Return the file to write: `target` itself if it has a video's suffix, else NAME_overlay.mp4 in that folder.

    Raises UserError when the source does not exist or would be overwritten, `target` ends like a file of another kind,
    or PyAV is not installed.
    """
    try:
        import av  # noqa: F401
    except ImportError:
        raise UserError(f"{source}: videos and cameras need PyAV; install segcore[video]") from None
    if not is_camera(source) and not source.is_file():
        raise UserError(f"{source}: no such video; check the path")
    if is_camera(source) and sys.platform not in CAMERAS:
        raise UserError(f"{source}: cameras work on Linux and macOS only; record a video and pass its file")
    name = f"camera{source}" if is_camera(source) else source.stem
    kind = "" if target.is_dir() else target.suffix.lower()
    if kind in (*SUFFIXES, *IMAGE_SUFFIXES, ".gif") and kind not in ENCODERS:
        raise UserError(f"{target}: videos are written as {', '.join(ENCODERS)}; choose one of these, or a folder")
    path = target if kind in ENCODERS else target / f"{name}_overlay.mp4"
    if os.path.realpath(path) == os.path.realpath(source):  # `Path.resolve` raises for a link to itself
        raise UserError(f"{path}: would overwrite the video; choose another output")
    return path


@contextmanager
def reading(source: Path) -> Iterator[tuple[Iterable[np.ndarray], Fraction, int]]:
    """Yield the frames (H, W, 3) uint8 RGB, their rate per second and their number, 0 if that is unknown.

    Frames stand upright, as a player shows them. A file that was cut yields its frames and then raises CutVideoError.
    """
    import av

    place, kind = CAMERAS.get(sys.platform, ("{}", None)) if is_camera(source) else ("{}", None)
    try:
        with av.open(place.format(source), format=kind) as container:
            if not container.streams.video:
                raise UserError(f"{source}: contains no video; choose another file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = stream.average_rate or Fraction(25)
            total = stream.frames or int((container.duration or 0) / av.time_base * rate)
            yield _frames(source, container, stream, rate), rate, total
    except av.FFmpegError as error:
        kind = "camera" if is_camera(source) else "video"
        raise UserError(f"{source}: cannot be read as a {kind} ({error.strerror}); choose another one") from None


def _frames(source: Path, container: Any, stream: Any, rate: Fraction) -> Iterator[np.ndarray]:
    """Yield the upright frames of a video stream; then raise CutVideoError if any is missing.

    Frames are missing if one cannot be decoded, the last packet or frame is incomplete, or all streams end before the
    length that the header states.
    """
    import av
    from av.sidedata.sidedata import Type

    start, end, incomplete, damaged = math.inf, 0.0, False, False
    for packet in container.demux():
        if packet.pts is not None:
            start = min(start, float(packet.pts * packet.time_base))
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream is not stream:
            continue
        incomplete = packet.is_corrupt if packet.size else incomplete
        try:
            frames = packet.decode()
        except av.FFmpegError:
            frames, damaged = [], True
        for frame in frames:
            incomplete |= frame.is_corrupt
            yield upright(frame.to_ndarray(format="rgb24"), frame.side_data.get(Type.DISPLAYMATRIX))
    # The formats of broadcasts and cameras state no length; FFmpeg estimates one.
    stated = 0 if container.format.name in ("mpegts", "mpeg") else (container.duration or 0) / av.time_base
    if damaged or incomplete or end - start + 1.5 / rate < stated:
        raise CutVideoError(f"{source}: is cut or damaged")


def upright(image: np.ndarray, matrix: Any | None) -> np.ndarray:
    """Return a frame (H, W, 3) turned and mirrored as FFmpeg's display matrix, nine int32, says for quarter turns."""
    if matrix is None:
        return image
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()  # x' = a x + c y, y' = b x + d y
    if abs(b) > abs(a):
        image, a, d = image.swapaxes(0, 1), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


@contextmanager
def writer(path: Path, rate: Fraction) -> Iterator[Any]:
    """Yield a function that appends a frame (H, W, 3) uint8 RGB; the file appears only on success."""
    import av

    stream: Any = None
    with replacing(path, f".tmp{path.suffix}") as temporary, av.open(str(temporary), "w") as container:

        def write(image: np.ndarray) -> None:
            nonlocal stream
            height, width = image.shape[:2]
            if stream is None:
                codec, options = ENCODERS[path.suffix.lower()]
                stream = container.add_stream(codec, rate=rate, options=options)
                stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
            even = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))

        yield write
        if stream is not None:
            container.mux(stream.encode())
