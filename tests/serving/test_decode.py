# SPDX-License-Identifier: Apache-2.0
"""Files and base64 of strangers: bombs, damage and other formats are refused, images pass."""

import base64
import io
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from support import render_image
from support.site import IMAGE, OFFLINE, RANDOM, data_url, encode, opened_or_refused, refused


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "MPO"])
def test_every_format_passes(fetcher, kind):
    [image] = fetcher.fetch_images([data_url(encode(render_image(60, 80), kind))])
    assert image.size == (80, 60)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_claimed_size(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(9)))


def png_with_text_bomb():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("x", "y" * 5_000_000, zip=True)
    return encode(Image.new("L", (2, 2)), pnginfo=texts)


def gif_with_large_frame():
    data = bytearray(encode(Image.new("L", (4, 4)), "GIF"))
    place = data.index(b"\x2c")  # the frame's own size, larger than the screen's
    data[place + 5 : place + 9] = struct.pack("<HH", 60_000, 60_000)
    return bytes(data)


def jpeg_of_many_scans():
    data = encode(render_image(200, 200), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * 100 + data[-2:]


FILES = {
    "bomb-flat-png": (lambda: encode(Image.new("1", (1400, 1400))), "1400 x 1400"),
    "bomb-flat-webp": (lambda: encode(Image.new("RGB", (1400, 1400)), "WEBP"), "1400 x 1400"),
    "bomb-claimed-size": (lambda: png_of_claimed_size(2**31 - 1, 2**31 - 1), "2147483647 x 2147483647"),
    "bomb-claimed-13000": (lambda: png_of_claimed_size(13_000, 13_000), "13000 x 13000"),
    "bomb-text-chunk": (png_with_text_bomb, "not the beginning|could not be decoded"),
    "bomb-gif-frame": (gif_with_large_frame, "60000|not the beginning"),
    "bomb-jpeg-scans": (jpeg_of_many_scans, "more than 32 scans"),
    "too-wide": (lambda: encode(Image.new("1", (2001, 1))), "1 x 2001"),
    "too-high": (lambda: encode(Image.new("1", (1, 2001))), "2001 x 1"),
    "too-many-bytes": (lambda: IMAGE + bytes(300_000), "300000 bytes"),
    "claimed-size-cut": (lambda: png_of_claimed_size(900, 900), "could not be decoded"),
    "cut": (lambda: IMAGE[: len(IMAGE) // 2], "could not be decoded"),
    "header-only": (lambda: IMAGE[:8], "not the beginning"),
    "nothing": (lambda: b"", "not the beginning"),
    "noise": (lambda: bytes(range(256)), "not the beginning"),
    "tiff": (lambda: encode(render_image(8, 8), "TIFF"), "not the beginning"),
    "ico": (lambda: encode(render_image(16, 16), "ICO"), "not the beginning"),
    "ppm": (lambda: encode(render_image(8, 8), "PPM"), "not the beginning"),
    "eps": (lambda: encode(render_image(8, 8), "EPS"), "not the beginning"),
    "pdf": (lambda: encode(render_image(8, 8), "PDF"), "not the beginning"),
    "svg": (lambda: b"<svg><image href='file:///etc/passwd'/></svg>", "not the beginning"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("make", "match"), FILES.values(), ids=FILES.keys())
def test_files_that_are_refused(fetcher, make, match):
    refused(fetcher, data_url(make()), match)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", ["bomb-flat-png", "bomb-claimed-13000", "bomb-jpeg-scans", "cut", "tiff", "ppm"])
def test_bodies_that_a_container_opened_are_checked_again(fetcher, name):
    make, match = FILES[name]
    refused(fetcher, Image.open(io.BytesIO(make())), match)


def test_an_opened_file_of_another_kind_is_refused(fetcher, tmp_path):
    for kind, match in (("tiff", "'TIFF'"), ("png", "1400 x 1400")):
        path = tmp_path / f"image.{kind}"
        Image.new("1", (1400, 1400) if kind == "png" else (4, 4)).save(path)
        with Image.open(path) as image:
            refused(fetcher, image, match)


BASE64 = base64.b64encode(IMAGE).decode()
TEXTS = {
    "line-breaks": BASE64[:76] + "\n" + BASE64[76:],
    "spaces": BASE64[:76] + " " + BASE64[76:],
    "no-padding": base64.b64encode(IMAGE[:100]).decode().rstrip("="),
    "url-safe": "-_" + BASE64[2:],
    "percent": BASE64[:-4] + "%3D%3D",
    "inner-padding": "QQ==" + BASE64,
    "other-letters": "ÄÖÜß" * 4,
    "too-long": "A" * 400_004,
}


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_base64_is_strict(fetcher, prefix, text):
    refused(fetcher, prefix + text, "nor base64|300000 bytes")


def test_too_long_base64_is_not_decoded(fetcher, monkeypatch):
    monkeypatch.setattr(base64, "b64decode", lambda *arguments, **options: pytest.fail("it was decoded"))
    refused(fetcher, "data:image/png;base64," + TEXTS["too-long"], "300000 bytes")


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@RANDOM
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "MPO"]), st.data())
def test_damaged_files_are_opened_or_refused(kind, data):
    damaged = bytearray(encode(render_image(20, 30), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(damaged)))
        damaged[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    opened_or_refused(OFFLINE, data_url(bytes(damaged)))
