# SPDX-License-Identifier: Apache-2.0
"""What the model sees, as the page shows it: the tiles are the model's own, and only uploads are opened."""

import html
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e .[app]")

from blip3.images import turns_upright
from blip3.serving.page.chat import Chat, Limits
from blip3.serving.page.panel import describe_images, fetch_images, panel_html
from support import render_image
from support.exif import turned_and_upright
from support.hostile import SLOW_FILES
from support.page import ask, upload


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("splits", [True, False])
def test_the_tiles_shown_are_the_tiles_the_model_gets(chat, monkeypatch, splits, default):
    monkeypatch.setattr(chat.processor.image_processor, "do_image_splitting", default)
    sizes = [(80, 240), (200, 190), (300, 90)]
    images = [render_image(height, width, seed) for seed, (height, width) in enumerate(sizes)]
    views = describe_images(chat.processor, images, splits)
    inputs = chat.processor(text="<image>" * 3, images=images, return_tensors="pt", do_image_splitting=splits)
    side = chat.processor.image_processor.tile_size
    for index, (image, view) in enumerate(zip(images, views, strict=True)):
        rows, columns = view.grid
        assert (view.height, view.width) == sizes[index]
        assert view.grid == ((1, 3), (2, 2), (3, 1))[index] if splits else view.grid == (0, 0)
        assert len(view.tiles) == 1 + rows * columns
        expected = image.resize((side, side), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(view.tiles[0]), np.asarray(expected)), "the global view, bit for bit"
        shown = torch.stack([torch.from_numpy(np.array(tile)) for tile in view.tiles]).permute(0, 3, 1, 2)
        assert torch.allclose(shown / 127.5 - 1, inputs["pixel_values"][index, : len(view.tiles)], atol=1e-6)
    num_tokens = int((inputs["input_ids"] == chat.processor.image_token_id).sum())
    assert sum(view.num_tokens for view in views) == num_tokens
    panel = panel_html(views)
    assert f"3 images, {num_tokens} image tokens" in panel
    assert panel.count("<img") == sum(len(view.tiles) for view in views)


def open_upload(chat, name):
    upright = turns_upright(chat.processor)
    return fetch_images([chat.uploads / name], chat.uploads, chat.limits.of_images, upright)


def test_turned_images_are_shown_upright(chat):
    image = render_image(100, 300)
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(chat.uploads / "turned.jpg", exif=exif)
    opened = open_upload(chat, "turned.jpg")
    (view,) = describe_images(chat.processor, opened, True)
    assert (view.height, view.width, view.grid) == (300, 100, (3, 1))


def test_the_processors_switch_holds_on_the_page(chat, monkeypatch):
    monkeypatch.setattr(chat.processor.image_processor, "do_exif_transpose", False)
    (chat.uploads / "stored.png").write_bytes(turned_and_upright()[0])
    opened = open_upload(chat, "stored.png")
    (view,) = describe_images(chat.processor, opened, True)
    assert (view.height, view.width, view.grid) == (200, 60, (3, 1))


def test_damaged_exif_refuses_no_image(chat):
    render_image(100, 300).save(chat.uploads / "damaged.png", exif=b"Exif\0\0garbage")
    opened = open_upload(chat, "damaged.png")
    (view,) = describe_images(chat.processor, opened, True)
    assert (view.height, view.width, view.grid) == (100, 300, (1, 3))


def test_only_uploads_are_opened(chat, tmp_path):
    render_image(20, 20).save(tmp_path / "secret.png")
    (chat.uploads / "link.png").symlink_to(tmp_path / "secret.png")
    for path in (tmp_path / "secret.png", chat.uploads / ".." / "secret.png", chat.uploads / "link.png"):
        with pytest.raises(ValueError, match="not uploaded here"):
            fetch_images([path], chat.uploads, chat.limits.of_images)


def test_bad_images_get_a_message_without_their_path(chat):
    (chat.uploads / "page.png").write_text("<html>", encoding="utf-8")
    whole = upload(chat, "whole.png", 60, 60).read_bytes()
    (chat.uploads / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name, message in (
        ("page.png", "not the beginning of a JPEG"),
        ("cut.png", "could not be decoded"),
        ("gone.png", "no longer"),
    ):
        (*_, (_, view, turns, status)) = ask(chat, "What?", [chat.uploads / "whole.png", chat.uploads / name])
        assert message in status
        assert "Image 2 of 2" in status
        assert str(chat.uploads) not in status
        assert view == turns == []
        panel, _ = chat.preview({"text": "", "files": [str(chat.uploads / name)]}, [], True, None)
        assert message in html.unescape(panel)


def test_large_images_are_refused_before_they_are_decoded(chat, loaded):
    small = Chat(loaded, chat.uploads, Limits(max_pixels=1000))
    (*_, (*_, status)) = ask(small, "What?", [upload(chat, "large.png", 40, 40)])
    assert "40 x 40 pixels" in status
    assert "1000 in all" in status


@pytest.mark.parametrize("name", ["JPEG, comments", "PNG, empty chunks", "BMP, runs"])
def test_files_that_are_built_to_take_long_are_refused(chat, name):
    make, _ = SLOW_FILES[name]
    (chat.uploads / "slow").write_bytes(make(2**20))
    start = time.process_time()
    panel, _ = chat.preview({"text": "", "files": [str(chat.uploads / "slow")]}, [], True, None)
    assert "built to take long" in html.unescape(panel)
    assert time.process_time() - start < 0.5


def test_one_visitors_images_are_open_at_a_time(chat, loaded, monkeypatch):
    """So that previews, which wait in no queue, hold the memory of one."""
    patient, hurried = (Chat(loaded, chat.uploads, Limits(open_seconds=seconds)) for seconds in (60, 0.1))
    sent = {"text": "", "files": [str(upload(chat, "a.png", 60, 60))]}
    inside, most, count = threading.Lock(), [], [0]

    def watched(*arguments):
        with inside:
            count[0] += 1
            most.append(count[0])
        time.sleep(0.02)
        with inside:
            count[0] -= 1
        return []

    monkeypatch.setattr("blip3.serving.page.chat.describe_images", watched)
    with ThreadPoolExecutor(8) as visitors:
        panels = list(visitors.map(lambda splits: patient.preview(sent, [], splits, None), [True] * 8))
    assert len(panels) == len(most) == 8
    assert max(most) == 1

    entered, go = threading.Event(), threading.Event()
    monkeypatch.setattr(
        "blip3.serving.page.chat.describe_images", lambda *arguments: entered.set() or go.wait(60) or []
    )
    with ThreadPoolExecutor(1) as visitors:
        first = visitors.submit(hurried.preview, sent, [], True, None)
        assert entered.wait(60)
        assert "busy" in hurried.preview(sent, [], True, None)[0]
        go.set()
        first.result(60)


def test_a_failing_preview_says_nothing_of_the_request(chat, monkeypatch, caplog, capfd):
    def fail(*arguments):
        raise RuntimeError("a secret of the visitor")

    monkeypatch.setattr("blip3.serving.page.chat.describe_images", fail)
    panel, _ = chat.preview({"text": "", "files": [str(upload(chat, "a.png", 60, 60))]}, [], True, None)
    assert "failed on the server (RuntimeError)" in panel
    assert "RuntimeError at " in caplog.text
    assert "secret" not in panel + caplog.text + "".join(capfd.readouterr())
