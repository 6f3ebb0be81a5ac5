"""Sounds and pictures small enough to live inside a page. Loads no torch."""

import base64
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from sidestep.data.spectrogram import spectrogram

# 160 kbit/s: MP3 plays in every browser, which Opus and FLAC do not.
_COMPRESSION = 0.5


def sound_and_picture(path: Path) -> tuple[str, str, float]:
    """Return an audio file as data URLs, an MP3 and the PNG of its spectrogram, and its length in seconds."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    buffer = io.BytesIO()
    soundfile.write(
        buffer,
        samples,
        rate,
        format="MP3",
        subtype="MPEG_LAYER_III",
        compression_level=_COMPRESSION,
        bitrate_mode="CONSTANT",
    )
    picture = png(spectrogram(samples.T, rate))
    return data_url("audio/mpeg", buffer.getvalue()), data_url("image/png", picture), len(samples) / rate


def data_url(kind: str, content: bytes) -> str:
    """Return content as a URL that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def png(picture: NDArray[np.uint8]) -> bytes:
    """Return a picture [height, width, RGB] as a PNG file (ISO/IEC 15948: signature, IHDR, IDAT, IEND)."""
    height, width, _ = picture.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), picture.reshape(height, width * 3)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
