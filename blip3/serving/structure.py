# SPDX-License-Identifier: Apache-2.0
"""What an image's file is built of, found by a walk over its blocks that costs less than any decoder does.

    JPEG: markers    PNG, WebP: chunks    GIF: blocks    BMP: header --> Outline: format, size, what a decoder needs

Pillow reads many of these blocks in Python, one by one: 10 MiB of padding, comments or empty chunks take it seconds.
A file of more blocks than an encoder writes is refused here, before Pillow sees it. A file that is only damaged passes
as far as it could be read: to say so is the decoder's part.
"""

import dataclasses
import re
import struct
from collections.abc import Iterator
from typing import NoReturn

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # TIFF is left out on purpose: it wraps many codecs

MAX_SCANS = 32  # of a JPEG; encoders write about ten, and each costs a pass over the whole image
MAX_SEGMENTS = 1024  # of a JPEG before its first scan
MAX_TABLE_BYTES = 2**18  # of those segments that are no metadata: tables take some hundred bytes, a thumbnail 64 KiB
MAX_PADDING = 4096  # bytes between the blocks of a JPEG or a GIF
MAX_DATA_CHUNKS = 16_384  # of pixels, in PNG and WebP: the smallest that encoders write have some hundred bytes
MAX_OTHER_CHUNKS = 256
MAX_GIF_BLOCKS = 4096  # before the first frame
MAX_RUN_LENGTH_BYTES, MAX_RUN_LENGTH_PIXELS = 2**18, 2**20  # of a BMP of run lengths, which Pillow decodes in Python

_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # markers that give a JPEG's size
_LONE = frozenset({0x01, *range(0xD0, 0xDA)})  # markers without a segment
_START_OF_SCAN = 0xDA
_KEPT = frozenset({0xE0, 0xEE})  # of the segments of applications: JFIF's and Adobe's say how to read the pixels
_BESIDE_PIXELS = frozenset({*range(0xE0, 0xF0), 0xFE} - _KEPT)
_RUN = re.compile(b"\xff+")
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_PNG_PIXELS = (b"IDAT", b"fdAT", b"fcTL")
_PNG_ONCE = (b"IHDR", b"PLTE", b"iCCP", b"eXIf")


@dataclasses.dataclass(frozen=True)
class Outline:
    """What a walk over a file found.

    Attributes:
        kind: one of `FORMATS`.
        height: in pixels, as stored.
        width: in pixels, as stored.
        data: what a decoder needs of the file; of a JPEG without comments and metadata.
        info: metadata that was left out of `data`, under Pillow's names: `exif` and `xmp`.
    """

    kind: str
    height: int
    width: int
    data: bytes = dataclasses.field(repr=False)
    info: dict[str, bytes] = dataclasses.field(default_factory=dict, repr=False)


def outline_of(data: bytes) -> Outline | None:
    """Walk over a file's blocks.

    Returns:
        the outline, None where the file is not the beginning of one of `FORMATS`.

    Raises:
        ValueError: if it is built so that decoding would take long.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _outline_jpeg(data)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _outline_png(data)
        if data.startswith((b"GIF87a", b"GIF89a")):
            return _outline_gif(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _outline_webp(data)
        return _outline_bmp(data) if data.startswith(b"BM") else None
    except (struct.error, IndexError):  # it ends within its header
        return None


def _refuse(kind: str, found: str) -> NoReturn:
    raise ValueError(
        f"it is a {kind} of {found}. It was probably built to take long to decode: save it again with an ordinary "
        "encoder."
    )


# -- JPEG -------------------------------------------------------------------------------------------------------------


def _outline_jpeg(data: bytes) -> Outline | None:
    kept, size = [data[:2]], (0, 0)
    info: dict[str, list[bytes]] = {"exif": [], "xmp": []}
    num_bytes = place = 2
    for marker, start, place in _jpeg_segments(data):
        if marker in _FRAMES:
            if any(size):
                _refuse("JPEG", "more than one frame")
            size = struct.unpack_from(">HH", data, start + 5)
        if marker == 0xE1:
            _keep_metadata(info, data[start + 4 : place])
        if marker not in _BESIDE_PIXELS:
            kept.append(data[start:place])
            num_bytes += place - start
        if num_bytes > MAX_TABLE_BYTES:
            _refuse("JPEG", f"more than {MAX_TABLE_BYTES} bytes of tables, the limit")
    # In a JPEG's compressed data FF is always followed by 00, so this counts scans.
    if data.count(b"\xff\xda", place) >= MAX_SCANS:
        _refuse("JPEG", f"more than {MAX_SCANS} scans, the limit")
    if data.find(b"\xff" * (MAX_PADDING + 1), place) >= 0:
        _refuse("JPEG", f"more than {MAX_PADDING} bytes of padding, the limit")
    kept.append(data[place:])
    height, width = size
    found = {name: b"".join(parts) for name, parts in info.items() if parts}
    return Outline("JPEG", height, width, b"".join(kept), found)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, where it starts, where it ends) up to the first scan, or to the file's end."""
    place, num_padding, num_segments = 2, 0, 0
    while (found := data.find(b"\xff", place)) >= 0:
        run = _RUN.match(data, found)
        end_of_run = run.end() if run else found + 1
        num_padding += end_of_run - 1 - place
        if num_padding > MAX_PADDING:
            _refuse("JPEG", f"more than {MAX_PADDING} bytes of padding, the limit")
        if end_of_run >= len(data):
            return
        marker, start = data[end_of_run], end_of_run - 1
        if marker == 0:
            place = end_of_run + 1
            num_padding += 2
            continue
        length = 0 if marker in _LONE else struct.unpack_from(">H", data, start + 2)[0]
        place = start + 2 + length
        num_segments += 1
        if num_segments > MAX_SEGMENTS:
            _refuse("JPEG", f"more than {MAX_SEGMENTS} segments before its pixels, the limit")
        yield marker, start, place
        if marker == _START_OF_SCAN or (length < 2 and marker not in _LONE):
            return


def _keep_metadata(info: dict[str, list[bytes]], segment: bytes) -> None:
    if segment.startswith(b"Exif\0\0"):
        info["exif"].append(segment[6:])
    elif segment.startswith(_XMP):
        info["xmp"][:] = [segment[len(_XMP) :]]


# -- PNG and WebP -----------------------------------------------------------------------------------------------------


def _outline_png(data: bytes) -> Outline | None:
    width, height = struct.unpack_from(">II", data, 16)
    if data[12:16] != b"IHDR":
        return None
    once: set[bytes] = set()
    counts = [0, 0]  # of pixels, others
    place = 8
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind in _PNG_ONCE and kind in once:
            _refuse("PNG", f"a second {kind.decode()} chunk")
        once.add(kind)
        _count_chunk("PNG", counts, kind in _PNG_PIXELS)
        place += 12 + length
        if kind == b"IEND":
            break
    return Outline("PNG", height, width, data)


def _count_chunk(kind: str, counts: list[int], has_pixels: bool) -> None:
    """Count one more chunk, and refuse it where there are too many."""
    counts[not has_pixels] += 1
    limit = MAX_DATA_CHUNKS if has_pixels else MAX_OTHER_CHUNKS
    if counts[not has_pixels] > limit:
        _refuse(kind, f"more than {limit} chunks {'of pixels' if has_pixels else 'beside its pixels'}, the limit")


def _outline_webp(data: bytes) -> Outline | None:
    size = _webp_size(data)
    counts, place = [0, 0], 12
    while place + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        _count_chunk("WEBP", counts, kind == b"ANMF")
        place += 8 + length + (length & 1)
    return None if size is None else Outline("WEBP", *size, data)


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of the canvas, which the first chunk says."""
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[start : start + 3], "little") + 1 for start in (24, 27))
        return height, width
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    return None


# -- GIF and BMP ------------------------------------------------------------------------------------------------------


def _outline_gif(data: bytes) -> Outline | None:
    """Walk to the first frame, which may be larger than the screen."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    place = 13 + _palette_bytes(flags)
    num_blocks = num_padding = 0
    while (introducer := data[place]) != 0x2C:
        if introducer == 0x3B:
            return None
        if introducer != 0x21:
            num_padding += 1
            place += 1
        else:
            place += 2
            while data[place] and num_blocks <= MAX_GIF_BLOCKS:
                place += 1 + data[place]
                num_blocks += 1
            place += 1
            num_blocks += 1
        if num_padding > MAX_PADDING:
            _refuse("GIF", f"more than {MAX_PADDING} bytes of padding, the limit")
        if num_blocks > MAX_GIF_BLOCKS:
            _refuse("GIF", f"more than {MAX_GIF_BLOCKS} blocks before its first frame, the limit")
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, place + 1)
    return Outline("GIF", max(height, top + frame_height), max(width, left + frame_width), data)


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _outline_bmp(data: bytes) -> Outline | None:
    (header,) = struct.unpack_from("<I", data, 14)
    if header == 12:
        width, height = struct.unpack_from("<HH", data, 18)
        return Outline("BMP", height, width, data)
    width, height, _, _, compression = struct.unpack_from("<iiHHI", data, 18)
    num_pixels = abs(height) * width
    if compression in (1, 2) and (len(data) > MAX_RUN_LENGTH_BYTES or num_pixels > MAX_RUN_LENGTH_PIXELS):
        _refuse(
            "BMP",
            f"run lengths of {len(data)} bytes and {num_pixels} pixels, more than {MAX_RUN_LENGTH_BYTES} or "
            f"{MAX_RUN_LENGTH_PIXELS}, the limits",
        )
    return Outline("BMP", abs(height), width, data)
