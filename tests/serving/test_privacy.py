# SPDX-License-Identifier: Apache-2.0
"""Nothing of a request stands in any log at any level: ours, libraries', warnings, standard output."""

import base64
import io
import logging
import subprocess
import sys
import warnings

import pytest
from PIL import ExifTags, Image, PngImagePlugin

from blip3.serving.endpoint import EndpointHandler
from blip3.serving.privacy import LIBRARIES, describe_failure, pseudonym, silence_libraries
from support import render_image
from support.hostile import encode

SECRET = "Zyxqwv"
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def telling_images():
    """An image of each format with the secret wherever a file may hold text, damaged tags among them."""
    image, exif, texts = render_image(40, 50), Image.Exif(), PngImagePlugin.PngInfo()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.ImageDescription] = SECRET, SECRET * 20
    exif[ExifTags.Base.Orientation] = 6
    texts.add_text("Comment", SECRET)
    texts.add_text(SECRET, SECRET, zip=True)
    profile = {"icc_profile": SECRET.encode() * 30}
    broken = exif.tobytes()[:40] + b"\xff" * 20 + SECRET.encode()
    return [
        encode(image, "JPEG", exif=exif, comment=SECRET, **profile),
        encode(image, "JPEG", exif=broken),
        encode(image, "PNG", exif=exif, pnginfo=texts, **profile),
        encode(image, "PNG", exif=broken),
        encode(image, "WEBP", exif=exif, xmp=SECRET.encode(), **profile),
        encode(image.convert("P"), "GIF", comment=SECRET),
    ]


def bodies():
    """Requests that are answered, refused, and fail; each holds the secret."""
    for data in telling_images():
        yield {"inputs": {"image": base64.b64encode(data).decode(), "text": SECRET}, "parameters": GREEDY}
        yield {"inputs": {"image": base64.b64encode(data[:-40]).decode(), "text": SECRET}, "parameters": GREEDY}
        yield {"inputs": Image.open(io.BytesIO(data)), "parameters": {**GREEDY, "text": SECRET}}
    yield {"inputs": {"messages": [{"role": "user", "content": SECRET}]}, "parameters": {**GREEDY, "num_beams": 2}}
    yield {"inputs": {"messages": [{"role": SECRET, "content": SECRET}]}}
    yield {"inputs": SECRET, "parameters": {SECRET: SECRET}}
    yield {"inputs": SECRET, "parameters": {"max_new_tokens": SECRET}}
    yield {"inputs": {"image": f"http://127.0.0.1/{SECRET}?{SECRET}", "text": SECRET}}
    yield {"inputs": {"image": f"/{SECRET}", "text": SECRET}}
    yield {SECRET: SECRET}


@pytest.fixture
def everything(caplog):
    """All that is logged, at any level: the root and every logger there is are opened."""
    handler = logging.StreamHandler(written := io.StringIO())
    root, before = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(1)
    yield written
    root.removeHandler(handler)
    root.setLevel(before)


def test_no_log_repeats_a_request(tiny_repo, everything, capfd):
    handler, num_answered = EndpointHandler(str(tiny_repo)), 0
    requests = list(bodies())
    everything.truncate(0)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        for body in requests:
            try:
                num_answered += len(handler(body))
            except ValueError:
                continue
        logging.captureWarnings(False)
    logged, printed = everything.getvalue(), capfd.readouterr()
    assert num_answered > 12
    assert logged.count("answered 1 prompts (") == num_answered
    for text in (logged, printed.out, printed.err):
        assert SECRET.lower() not in text.lower()
        assert base64.b64encode(SECRET.encode()).decode()[:7] not in text
        assert "EXIF" not in text
        assert "Tag" not in text
    assert "PIL" not in logged


def test_the_same_prompt_has_the_same_name_in_one_process_only():
    assert pseudonym("Hello") == pseudonym("Hello") != pseudonym("Hello ")
    script = "from blip3.serving.privacy import pseudonym; print(pseudonym('Hello'))"
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in "ab"]
    names = {run.stdout.strip() for run in runs} | {pseudonym("Hello")}
    assert len(names) == 3
    assert pseudonym("\ud800")


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_are_silent_below_warnings(library):
    child = logging.getLogger(f"{library}.connection")
    child.setLevel(logging.DEBUG)
    silence_libraries()
    for logger in (logging.getLogger(library), child, logging.getLogger(f"{library}.made.later")):
        assert not logger.isEnabledFor(logging.INFO)
        assert logger.isEnabledFor(logging.WARNING)
    child.setLevel(logging.NOTSET)


def test_a_louder_setting_is_kept():
    logger = logging.getLogger("httpx")
    logger.setLevel(logging.CRITICAL)
    silence_libraries()
    assert logger.level == logging.CRITICAL
    logger.setLevel(logging.WARNING)


def test_a_failure_is_described_without_its_message():
    try:
        int(SECRET)
    except ValueError as error:
        described = describe_failure(error)
    assert described.startswith("ValueError at ")
    assert "test_a_failure_is_described_without_its_message" in described
    assert SECRET not in described
    assert describe_failure(OSError(SECRET)) == "OSError at an unknown place"
