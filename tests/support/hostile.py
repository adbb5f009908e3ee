# SPDX-License-Identifier: Apache-2.0
"""Files that a decoder would read for seconds, or make hundreds of MiB of, each with the refusal it must get."""

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image

from support import render_image

SIDE = (60, 80)  # height, width of the images inside


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """Write an image's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def jpeg_segment(marker: int, data: bytes) -> bytes:
    """One segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def repeated(block: bytes, num_bytes: int) -> bytes:
    """As many of a block as fit."""
    return block * max(1, num_bytes // len(block))


def inside_jpeg(data: bytes) -> bytes:
    """A JPEG with something after its first two bytes."""
    file = encode(render_image(*SIDE), "JPEG")
    return file[:2] + data + file[2:]


def inside_scan(data: bytes) -> bytes:
    """A JPEG with something at the beginning of its compressed pixels."""
    file = encode(render_image(*SIDE), "JPEG")
    scan = file.index(b"\xff\xda")
    place = scan + 2 + struct.unpack_from(">H", file, scan + 2)[0]
    return file[:place] + data + file[place:]


def inside_png(data: bytes, place: int = 33) -> bytes:
    """A PNG with something after its header, or elsewhere."""
    file = encode(render_image(*SIDE), "PNG")
    return file[:place] + data + file[place:]


def inside_gif(data: bytes) -> bytes:
    """A GIF with something before its first frame."""
    file = encode(render_image(*SIDE).convert("P"), "GIF")
    place = 13 + (3 << (file[10] & 7) + 1)
    return file[:place] + data + file[place:]


def inside_webp(data: bytes) -> bytes:
    """A WebP with something behind its pixels."""
    file = encode(render_image(*SIDE), "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0") + data
    return file[:4] + struct.pack("<I", len(file) - 8) + file[8:]


def bmp_of_runs(height: int, width: int, runs: bytes) -> bytes:
    """A BMP compressed by run lengths."""
    start = 54 + 1024
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + header + bytes(1024) + runs


def jpeg_of_many_scans(num_scans: int = 100) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    file = encode(render_image(*SIDE), "JPEG", progressive=True)
    return file[:-2] + file[file.rindex(b"\xff\xda") : -2] * num_scans + file[-2:]


def exif_of_overlapping_tags(num_bytes: int) -> bytes:
    """A TIFF block each of whose tags takes the whole block for its value; Pillow copies it for every tag."""
    num_tags = (num_bytes - 14) // 12
    tags = b"".join(struct.pack(">HHLL", 0x200 + tag, 7, num_bytes - 8, 8) for tag in range(num_tags))
    return (b"MM\0*" + struct.pack(">LH", 8, num_tags) + tags + bytes(4)).ljust(num_bytes, b"\0")


# Refused: what makes a file of about so many bytes, and words of the refusal.
SLOW_FILES: dict[str, tuple[Callable[[int], bytes], str]] = {
    "JPEG, padding": (lambda size: inside_jpeg(b"\xff" * size), "bytes of padding"),
    "JPEG, junk": (lambda size: inside_jpeg(repeated(b"\xff\0", size)), "bytes of padding"),
    "JPEG, other junk": (lambda size: inside_jpeg(bytes(size)), "bytes of padding|not the beginning"),
    "JPEG, padding in the scan": (lambda size: inside_scan(b"\xff" * size), "bytes of padding"),
    "JPEG, comments": (lambda size: inside_jpeg(repeated(jpeg_segment(0xFE, b""), size)), "segments before"),
    "JPEG, profiles": (lambda size: inside_jpeg(repeated(jpeg_segment(0xE2, b"ICC"), size)), "segments before"),
    "JPEG, restarts": (lambda size: inside_jpeg(repeated(b"\xff\xd0", size)), "segments before"),
    "JPEG, tables": (
        lambda size: inside_jpeg(repeated(jpeg_segment(0xDB, (b"\0" + bytes(range(1, 65))) * 1000), size)),
        "bytes of tables",
    ),
    "JPEG, scans": (lambda size: jpeg_of_many_scans(), "more than 32 scans"),
    "PNG, empty chunks": (lambda size: inside_png(repeated(png_chunk(b"IDAT", b""), size)), "chunks of pixels"),
    "PNG, texts": (lambda size: inside_png(repeated(png_chunk(b"tEXt", b"a\0b"), size)), "beside its pixels"),
    "PNG, texts at the end": (
        lambda size: inside_png(repeated(png_chunk(b"tEXt", b"a\0b"), size), -12),
        "beside its pixels",
    ),
    "PNG, unknown chunks": (lambda size: inside_png(repeated(png_chunk(b"abCd", b""), size)), "beside its pixels"),
    "PNG, profiles": (
        lambda size: inside_png(png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**6))) * 200),
        "a second iCCP",
    ),
    "GIF, junk": (lambda size: inside_gif(bytes(size)), "bytes of padding"),
    "GIF, comments": (
        lambda size: inside_gif(b"\x21\xfe" + repeated(b"\1a", size) + b"\0"),
        "blocks before its first frame",
    ),
    "GIF, extensions": (lambda size: inside_gif(repeated(b"\x21\xf9\0", size)), "blocks before its first frame"),
    "WebP, empty chunks": (lambda size: inside_webp(repeated(b"abcd" + bytes(4), size)), "beside its pixels"),
    "BMP, runs": (lambda size: bmp_of_runs(7000, 7000, repeated(b"\1\1", size)), "run lengths"),
    "BMP, ends of lines": (lambda size: bmp_of_runs(3000, 16_000, b"\1\1\0\0" * 3000), "run lengths"),
}
