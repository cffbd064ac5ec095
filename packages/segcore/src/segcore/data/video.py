"""Read and write videos and cameras. Needs PyAV (segcore[video])."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from segcore.errors import UserError
from segcore.files import writing

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
CAMERAS = {"linux": ("/dev/video{}", "v4l2"), "darwin": ("{}", "avfoundation")}
"""By system: the device path, with a slot for the camera's number, and FFmpeg's name of the camera interface."""


def is_video(source: Path) -> bool:
    """Return whether `source` has a video's suffix or is the number of a camera."""
    return source.suffix.lower() in SUFFIXES or is_camera(source)


def is_camera(source: Path) -> bool:
    """Return whether `source` is the number of a camera, and not an existing file."""
    return str(source).isdecimal() and not source.exists()


def plan(source: Path, target: Path) -> Path:
    """Return the file to write: `target` itself if it has a video's suffix, else NAME_overlay.mp4 in that folder.

    Raises UserError when the source does not exist or would be overwritten, or PyAV is not installed.
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
    path = target if target.suffix.lower() in SUFFIXES else target / f"{name}_overlay.mp4"
    if os.path.realpath(path) == os.path.realpath(source):  # `Path.resolve` raises for a link to itself
        raise UserError(f"{path}: would overwrite the video; choose another output")
    return path


@contextmanager
def reading(source: Path) -> Iterator[tuple[Iterable[np.ndarray], Fraction, int]]:
    """Yield the frames (H, W, 3) uint8 RGB, their rate per second and their number, 0 if that is unknown."""
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
            yield (frame.to_ndarray(format="rgb24") for frame in container.decode(stream)), rate, total
    except av.FFmpegError as error:
        kind = "camera" if is_camera(source) else "video"
        raise UserError(f"{source}: cannot be read as a {kind} ({error.strerror}); choose another one") from None


@contextmanager
def writer(path: Path, rate: Fraction) -> Iterator[Any]:
    """Yield a function that appends a frame (H, W, 3) uint8 RGB; the file appears only on success."""
    import av

    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    stream: Any = None
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with av.open(str(temporary), "w") as container:

                def write(image: np.ndarray) -> None:
                    nonlocal stream
                    height, width = image.shape[:2]
                    if stream is None:
                        stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
                        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
                    even = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))

                yield write
                if stream is not None:
                    container.mux(stream.encode())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
