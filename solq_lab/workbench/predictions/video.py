"""Videos, frame by frame, by PyAV (the extra `video`)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from solq_lab.errors import UserError
from solq_lab.files import replacing, require_file

CRF = "20"  # constant quality of x264, 0..51; lower is better


class Frame(NamedTuple):
    """A frame and when it is shown."""

    pixels: np.ndarray  # (H, W, 3) uint8 RGB, turned as a player shows it
    time: int | None  # its time stamp, in units of `unit` seconds; None where the file has none
    unit: Any
    rate: Any  # frames per second of the video


def require_pyav() -> None:
    """Raise UserError where PyAV is not installed."""
    try:
        import av  # noqa: F401
    except ImportError:
        raise UserError("videos need PyAV: pip install 'solq-lab[video]', or pip install av") from None


def read_frames(path: Path, name: str) -> Iterator[Frame]:
    """The frames of the first video stream; the sound is left out.

    Raises:
        UserError: no video, or one that breaks off; `name` is for the message.
    """
    import av

    require_file(path, "video", name)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{name}: a file without a video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = stream.average_rate or stream.guessed_rate or 25
            first = last = None
            for frame in container.decode(stream):
                first = first or (frame.width, frame.height)
                if (frame.width, frame.height) != first:
                    found = f"a frame of {frame.width} x {frame.height} pixels after some of {first[0]} x {first[1]}"
                    raise UserError(f"{name}: {found}; cut the video there, or scale its frames to one size")
                turns = round(frame.rotation / 90)  # counterclockwise, as phones record upright videos
                pixels = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))

                # Damaged videos have times that do not rise, which no player and no writer takes.
                last = frame.pts if last is None or frame.pts is None else max(frame.pts, last + 1)
                yield Frame(pixels, last, frame.time_base, rate)
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{name}: not a video that can be read to its end ({error.strerror or error})") from None


class VideoWriter:
    """An MP4 with the frame rate and time stamps of the video it is made from; complete or not there."""

    def __init__(self, path: Path, first: Frame) -> None:
        """A video at `path` like the one that `first` is a frame of."""
        import av

        self._stack = contextlib.ExitStack()
        temporary = self._stack.enter_context(replacing(path))
        self._container = self._stack.enter_context(av.open(str(temporary), "w", format="mp4"))
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"  # PyAV built without it
        self._stream = cast(Any, self._container.add_stream(codec, rate=first.rate, options={"crf": CRF}))
        height, width = first.pixels.shape[:2]
        self._stream.width, self._stream.height = width + width % 2, height + height % 2  # half as many colour samples
        self._stream.pix_fmt = "yuv420p"
        if first.time is not None:
            self._stream.codec_context.time_base = first.unit

    def write(self, frame: Frame, pixels: np.ndarray) -> None:
        """Add an image (H, W, 3) uint8 in the place of a frame."""
        import av

        height, width = pixels.shape[:2]
        missing = (0, self._stream.height - height), (0, self._stream.width - width), (0, 0)
        drawn = av.VideoFrame.from_ndarray(np.pad(pixels, missing, mode="edge"), format="rgb24")
        if frame.time is not None:
            drawn.pts, drawn.time_base = frame.time, frame.unit
        self._container.mux(self._stream.encode(drawn))

    def close(self) -> None:
        """Write what the encoder has kept, and let the file appear."""
        with self._stack:
            self._container.mux(self._stream.encode())
