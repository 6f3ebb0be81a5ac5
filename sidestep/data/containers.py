"""Find audio files that are cut off or miscounted, which the decoder would shorten without a word.

libsndfile plays what is left of a truncated WAV, MP3 or Ogg file and reports no error; of an MP3 without a length
header it plays as much as a constant bitrate would give, however long the song is; of several Ogg streams strung
together it plays the first. So the container is read first.
Sources: RIFF/WAVE, ISO 11172-3 and 13818-3 frame headers, the Xing/Info header, RFC 3533 (Ogg pages).
"""

import os
from dataclasses import dataclass
from pathlib import Path

from sidestep.errors import DataError

FOREIGN_MAGIC = (b"RIFF", b"RF64", b"riff", b"OggS", b"fLaC", b"FORM", b"caff")
TRAILING_TAGS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN")
# What encoders write when they do not know the length yet (a stream): no promise that could be broken.
UNKNOWN_RIFF_SIZE = 0x7FFF0000

BITRATES = {
    ("1", 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    ("1", 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    ("2", 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    ("2", 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
SAMPLE_RATES = {0b11: (44100, 48000, 32000), 0b10: (22050, 24000, 16000), 0b00: (11025, 12000, 8000)}


def check_whole(path: Path) -> int | None:
    """Make sure that the container ends where it says; for MP3 return how many samples a channel its frames hold.

    Raises DataError naming the file when it is cut off, holds no MPEG frames, or cannot be opened.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4)
        if head == b"RIFF":
            _check_wav(path)
        elif head == b"OggS":
            _check_ogg(path, path.read_bytes())
        elif head not in FOREIGN_MAGIC and _is_mpeg(path, head):
            return _check_mp3(path, path.read_bytes())
    except OSError as error:
        raise DataError(f"{path.name} cannot be opened: {error.strerror}.") from error
    return None


def cut_off(path: Path, why: str) -> DataError:
    """The error for a file that holds less than it says."""
    return DataError(
        f"{path.name} is cut off or damaged: {why}.",
        hint="Get the file again. If it plays to its end elsewhere, convert it to FLAC and use that.",
    )


def wrong_length(path: Path, why: str) -> DataError:
    """The error for a file whose length the decoder would get wrong, and leave out what lies behind."""
    return DataError(
        f"{path.name} has no length header or a wrong one, so its length would be misread: {why}.",
        hint=_conversion(path),
    )


def _conversion(path: Path) -> str:
    return f"Convert it to a new FLAC file, for example with `ffmpeg -i song{path.suffix} converted.flac`."


def _is_mpeg(path: Path, head: bytes) -> bool:
    """Whether the decoder will take the file for an MP3, which it does by the content, or the user does by the name."""
    if path.suffix.lower() == ".mp3":
        return True
    data = path.read_bytes() if head.startswith(b"ID3") else head
    return _frame_at(data, _skip_id3(data)) is not None


def _check_wav(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(12)
        while len(header := file.read(8)) == 8:
            length = int.from_bytes(header[4:], "little")
            if header[:4] == b"data":
                there = size - file.tell()
                if there < length < UNKNOWN_RIFF_SIZE:
                    raise cut_off(path, f"its header promises {length} bytes of sound, {there} are there")
                return
            file.seek(length + length % 2, os.SEEK_CUR)


def _check_ogg(path: Path, data: bytes) -> None:
    """Walk the pages of an Ogg file: the last one must say that it is, and no stream with sound may follow another."""
    at, has_begun, is_second, is_whole = 0, False, False, False
    while (at := data.find(b"OggS", at)) >= 0:
        header = data[at : at + 27]
        if len(header) < 27:
            is_whole = False
            break
        begins, ends = bool(header[5] & 2), bool(header[5] & 4)
        # Streams that play together all begin before the first page of sound; one that begins later is another song.
        is_second = is_second or (has_begun and begins)
        has_begun = has_begun or not begins
        if is_second and int.from_bytes(header[6:14], "little", signed=True) > 0:
            raise DataError(
                f"{path.name} holds several recordings one after the other, and only the first would be read.",
                hint=_conversion(path),
            )
        segments = data[at + 27 : at + 27 + header[26]]
        at += 27 + len(segments) + sum(segments)
        is_whole = ends and at <= len(data)
    if not is_whole:
        raise cut_off(path, "the end of its stream is missing")


@dataclass(frozen=True, slots=True)
class _Frame:
    kind: tuple[int, int, int]  # version, layer and sample rate bits: the same in every frame of a stream
    length: int  # bytes
    samples: int  # a channel


def _frame_at(data: bytes, at: int) -> _Frame | None:
    """Read the MPEG frame header at byte `at`, or None where there is none (layer I and free format included)."""
    if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] & 0xE0 != 0xE0:
        return None
    version, layer = data[at + 1] >> 3 & 3, 4 - (data[at + 1] >> 1 & 3)
    bitrate, rate = data[at + 2] >> 4, data[at + 2] >> 2 & 3
    if version == 0b01 or layer not in (2, 3) or bitrate in (0, 15) or rate == 3:
        return None
    generation = "1" if version == 0b11 else "2"
    samples = 576 if layer == 3 and generation == "2" else 1152
    hertz = SAMPLE_RATES[version][rate]
    padding = data[at + 2] >> 1 & 1
    length = samples // 8 * BITRATES[generation, layer][bitrate - 1] * 1000 // hertz + padding
    return _Frame((version, layer, rate), length, samples)


def _next_frame(data: bytes, at: int, kind: tuple[int, int, int] | None) -> int:
    """Return where the next frame begins that another one of its kind follows, or -1."""
    while (at := data.find(b"\xff", at)) >= 0:
        frame = _frame_at(data, at)
        if frame is not None and kind in (None, frame.kind):
            follower = _frame_at(data, at + frame.length)
            if follower is not None and follower.kind == frame.kind:
                return at
        at += 1
    return -1


def _declared_frames(frame: bytes) -> int | None:
    """Return the frame count of a Xing or Info header, -1 when it gives none; None when `frame` is no such header."""
    for mark in (b"Xing", b"Info"):
        at = frame.find(mark, 4, 44)
        if at >= 0:
            has_count = int.from_bytes(frame[at + 4 : at + 8], "big") & 1
            return int.from_bytes(frame[at + 8 : at + 12], "big") if has_count else -1
    return None


def _skip_id3(data: bytes, at: int = 0) -> int:
    while data[at : at + 3] == b"ID3" and len(data) >= at + 10:
        size = data[at + 6 : at + 10]
        at += 10 + (size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3])
    return at


def _check_mp3(path: Path, data: bytes) -> int:
    """Walk the frames of an MP3; return the samples a channel that they hold."""
    at = _next_frame(data, _skip_id3(data), None)
    first = _frame_at(data, at) if at >= 0 else None
    if first is None:
        raise DataError(
            f"{path.name} is not an MP3 file: it holds no MPEG audio.",
            hint="Check what the file really is; wav, flac, mp3, ogg and opus can be read.",
        )
    declared = _declared_frames(data[at : at + first.length])
    if declared is not None:
        at += first.length
    count, ends_within_frame = 0, False
    while 0 <= at < len(data):
        frame = _frame_at(data, at)
        if frame is None or frame.kind != first.kind:
            # Files strung together have the next one's tag in their middle.
            at = _skip_id3(data, at)
            at = -1 if data.startswith(TRAILING_TAGS, at) else _next_frame(data, at, first.kind)
        elif at + frame.length > len(data):
            ends_within_frame = True
            break
        else:
            count += 1
            at += frame.length
    # Encoders differ in whether the header frame counts itself.
    if declared is not None and count + 2 < declared:
        raise cut_off(path, f"its header counts {declared} frames, {count} are there")
    if declared is not None and 0 <= declared < count - 2:
        raise wrong_length(path, f"its header counts {declared} frames, {count} are there")
    if declared is None and ends_within_frame:
        raise cut_off(path, "it ends in the middle of a frame")
    return count * first.samples
