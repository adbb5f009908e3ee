# SPDX-License-Identifier: Apache-2.0
"""Files that are built to take long are refused at once; whatever passes is decoded in bounded time and memory."""

import io
import struct
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from blip3.images import orientation_in, turn_upright
from blip3.serving.decode import check_file, decode_image
from blip3.serving.limits import Deadline, ImageLimits
from blip3.serving.structure import FORMATS, outline_of
from support import render_image
from support.hostile import (
    SLOW_FILES,
    bmp_of_runs,
    encode,
    exif_of_overlapping_tags,
    inside_gif,
    inside_jpeg,
    inside_png,
    inside_scan,
    inside_webp,
    jpeg_segment,
    png_chunk,
)

LIMITS = ImageLimits()
SIZE = 9 * 2**20
REFUSAL_SECONDS = 0.5  # of CPU; measured: 0.01
DECODE_SECONDS = 2.0  # measured: 0.13 for the slowest, run lengths at their limit
RANDOM = settings(
    max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def opened(data, seconds=60.0, upright=True):
    return decode_image(check_file(data, LIMITS), LIMITS, Deadline(seconds), upright)


@pytest.mark.parametrize("name", SLOW_FILES)
def test_slow_files_are_refused_at_once(name):
    make, match = SLOW_FILES[name]
    data = make(SIZE)
    start = time.process_time()
    with pytest.raises(ValueError, match=match) as caught:
        opened(data)
    assert time.process_time() - start < REFUSAL_SECONDS
    assert "probably" in str(caught.value)
    assert str(caught.value).isprintable()


BLOCK, BYTES = st.binary(max_size=6), st.binary(min_size=1, max_size=4)
SEGMENTS = st.builds(jpeg_segment, st.integers(0, 255), BLOCK)
CHUNKS = st.builds(png_chunk, st.sampled_from([b"IDAT", b"tEXt", b"zTXt", b"iTXt", b"fcTL", b"abCd"]), BLOCK)
EXTENSIONS = st.builds(
    lambda label, count: bytes([0x21, label]) + b"\2ab" * count + b"\0", st.integers(0, 255), st.integers(0, 3)
)
BUILDS = {  # what puts blocks into a file -> one block
    "JPEG": (inside_jpeg, SEGMENTS | BYTES),
    "JPEG scan": (inside_scan, SEGMENTS | BYTES),
    "PNG": (inside_png, CHUNKS | BYTES),
    "GIF": (inside_gif, EXTENSIONS | BYTES),
    "WebP": (inside_webp, st.sampled_from([b"ANMF", b"EXIF", b"abcd"]).map(lambda name: name + bytes(4)) | BYTES),
    "BMP": (lambda data: bmp_of_runs(1000, 1000, data), st.tuples(st.integers(0, 3), st.integers(0, 255)).map(bytes)),
}
BLOCKS = st.sampled_from(sorted(BUILDS)).flatmap(lambda kind: st.tuples(st.just(kind), BUILDS[kind][1]))


@RANDOM
@given(BLOCKS, st.sampled_from([200, 20_000, 2_000_000]))
def test_any_block_repeated_takes_bounded_time(block, size):
    """Opened or refused: 2 MB of any block, anywhere."""
    kind, unit = block
    file = BUILDS[kind][0](unit * (size // len(unit)))
    start, refusal = time.process_time(), None
    try:
        opened(file)
    except ValueError as error:
        refusal = error
    assert time.process_time() - start < DECODE_SECONDS, (kind, unit, size)
    assert refusal is None or (type(refusal) is ValueError and "probably" in str(refusal))


@pytest.mark.parametrize("seconds", [1e-9, 0.005])
def test_no_byte_is_read_after_the_deadline(seconds):
    limits = ImageLimits(max_bytes=2**27)
    outline = check_file(encode(Image.new("RGB", (4000, 4000)), "PNG", compress_level=0), limits)
    start = time.process_time()
    with pytest.raises(ValueError, match="not decoded in time"):
        decode_image(outline, limits, Deadline(seconds), True)
    assert time.process_time() - start < DECODE_SECONDS


# -- What ordinary encoders write -------------------------------------------------------------------------------------

PHOTO = render_image(90, 120, seed=4)
ORDINARY = {
    "JPEG": encode(PHOTO, "JPEG"),
    "JPEG, progressive": encode(PHOTO, "JPEG", progressive=True),
    "JPEG, restarts": encode(PHOTO, "JPEG", restart_marker_rows=1),
    "JPEG, CMYK": encode(PHOTO.convert("CMYK"), "JPEG"),
    "JPEG, grey": encode(PHOTO.convert("L"), "JPEG"),
    "JPEG, a profile": encode(PHOTO, "JPEG", icc_profile=bytes(300_000), comment=b"hello"),
    "MPO": encode(PHOTO, "MPO", save_all=True, append_images=[PHOTO]),
    "PNG": encode(PHOTO, "PNG"),
    "PNG, palette": encode(PHOTO.convert("P"), "PNG", transparency=3),
    "PNG, alpha": encode(PHOTO.convert("RGBA"), "PNG"),
    "PNG, 16 bits": encode(PHOTO.convert("I;16"), "PNG"),
    "APNG": encode(PHOTO, "PNG", save_all=True, append_images=[PHOTO.rotate(90), PHOTO.rotate(180)]),
    "GIF": encode(PHOTO.convert("P"), "GIF", comment=b"hello" * 200),
    "GIF, animated": encode(PHOTO, "GIF", save_all=True, append_images=[PHOTO.rotate(180)], loop=0),
    "WebP": encode(PHOTO, "WEBP"),
    "WebP, lossless": encode(PHOTO, "WEBP", lossless=True),
    "WebP, alpha": encode(PHOTO.convert("RGBA"), "WEBP"),
    "WebP, animated": encode(PHOTO, "WEBP", save_all=True, append_images=[PHOTO.rotate(180)]),
    "BMP": encode(PHOTO, "BMP"),
    "BMP, palette": encode(PHOTO.convert("P"), "BMP"),
    "BMP, top down": encode(PHOTO, "BMP")[:22] + struct.pack("<i", -90) + encode(PHOTO, "BMP")[26:],
    "BMP, runs": bmp_of_runs(30, 40, b"\x28\7\0\0" * 30),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_files_give_what_pillow_gives(name):
    with Image.open(io.BytesIO(ORDINARY[name])) as expected:
        found = opened(ORDINARY[name])
        outline = outline_of(ORDINARY[name])
        assert outline.kind == expected.format.replace("MPO", "JPEG")
        assert outline.kind in FORMATS
        assert (outline.width, outline.height) == found.size == expected.size
        assert found.mode == expected.mode
        assert found.info.get("transparency") == expected.info.get("transparency")
        assert np.array_equal(np.asarray(found.convert("RGBA")), np.asarray(expected.convert("RGBA")))


@pytest.mark.parametrize("name", ORDINARY)
def test_cut_files_are_refused_in_words(name):
    for length in {*range(0, 64, 7), len(ORDINARY[name]) // 3}:
        with pytest.raises(ValueError, match="probably"):
            opened(ORDINARY[name][:length])


# -- EXIF -------------------------------------------------------------------------------------------------------------


@RANDOM
@given(st.integers(0, 10) | st.none(), st.binary(max_size=12), st.sampled_from(["JPEG", "PNG", "WEBP"]), st.booleans())
def test_the_orientation_is_the_one_pillow_reads(orientation, maker, kind, has_xmp):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = maker
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    xmp = {"xmp": b'<x tiff:Orientation="6"/>'} if has_xmp and kind != "PNG" else {}
    data = encode(PHOTO, kind, exif=exif, **xmp)
    with Image.open(io.BytesIO(data)) as image:
        expected = image.getexif().get(ExifTags.Base.Orientation, 1)
        found = orientation_in(image.info)
    outline = outline_of(data)
    assert found == expected
    if kind == "JPEG":
        assert orientation_in(outline.info) == expected
    assert (opened(data).size == PHOTO.size) is (expected not in (5, 6, 7, 8))


@RANDOM
@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda data: b"II*\0\x08\0\0\0" + data))
def test_any_exif_is_read_or_left(exif):
    assert isinstance(orientation_in({"exif": exif}), int)
    assert isinstance(orientation_in({"Raw profile type exif": f"\nexif\n  9\n{exif.hex()}"}), int)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_overlapping_tags_take_no_memory(kind):
    """65 KB that Pillow's own reader would make 350 MB of."""
    data = encode(PHOTO, kind, exif=b"Exif\0\0" + exif_of_overlapping_tags(65_000))
    tracemalloc.start()
    opened(data)
    with Image.open(io.BytesIO(encode(PHOTO, "PNG", exif=exif_of_overlapping_tags(65_000)))) as image:
        turn_upright(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


@pytest.mark.parametrize("name", ORDINARY)
def test_a_decoded_image_keeps_nothing_of_its_file(name):
    image = opened(ORDINARY[name])
    assert set(image.info) <= {"transparency"}
    assert getattr(image, "fp", None) is None
    assert not any(isinstance(value, bytes) and len(value) > 1000 for value in vars(image).values())
