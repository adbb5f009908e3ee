# SPDX-License-Identifier: Apache-2.0
"""What the model sees, as the page shows it: the tiles are the model's own, and only uploads are opened."""

import html

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e .[app]")

from blip3.serving.page.chat import Chat, Limits
from blip3.serving.page.panel import describe_images, fetch_images, panel_html
from support import render_image
from support.exif import turned_and_upright
from support.page import ask, upload


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("splits", [True, False])
def test_the_tiles_shown_are_the_tiles_the_model_gets(chat, monkeypatch, splits, default):
    monkeypatch.setattr(chat.processor.image_processor, "do_image_splitting", default)
    sizes = [(80, 240), (200, 190), (300, 90)]
    images = [render_image(height, width, seed) for seed, (height, width) in enumerate(sizes)]
    views = describe_images(chat.processor, images, splits, chat.limits.max_pixels)
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


def test_turned_images_are_shown_upright(chat):
    image = render_image(100, 300)
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(chat.uploads / "turned.jpg", exif=exif)
    opened = fetch_images([chat.uploads / "turned.jpg"], chat.uploads)
    (view,) = describe_images(chat.processor, opened, True, chat.limits.max_pixels)
    assert (view.height, view.width, view.grid) == (300, 100, (3, 1))


def test_the_processors_switch_holds_on_the_page(chat, monkeypatch):
    monkeypatch.setattr(chat.processor.image_processor, "do_exif_transpose", False)
    (chat.uploads / "stored.png").write_bytes(turned_and_upright()[0])
    opened = fetch_images([chat.uploads / "stored.png"], chat.uploads)
    (view,) = describe_images(chat.processor, opened, True, chat.limits.max_pixels)
    assert (view.height, view.width, view.grid) == (200, 60, (3, 1))


def test_damaged_exif_refuses_no_image(chat):
    render_image(100, 300).save(chat.uploads / "damaged.png", exif=b"Exif\0\0garbage")
    opened = fetch_images([chat.uploads / "damaged.png"], chat.uploads)
    (view,) = describe_images(chat.processor, opened, True, chat.limits.max_pixels)
    assert (view.height, view.width, view.grid) == (100, 300, (1, 3))


def test_only_uploads_are_opened(chat, tmp_path):
    render_image(20, 20).save(tmp_path / "secret.png")
    (chat.uploads / "link.png").symlink_to(tmp_path / "secret.png")
    for path in (tmp_path / "secret.png", chat.uploads / ".." / "secret.png", chat.uploads / "link.png"):
        with pytest.raises(ValueError, match="not uploaded here"):
            fetch_images([path], chat.uploads)


def test_bad_images_get_a_message_without_their_path(chat):
    (chat.uploads / "page.png").write_text("<html>", encoding="utf-8")
    whole = upload(chat, "whole.png", 60, 60).read_bytes()
    (chat.uploads / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name, message in (("page.png", "not a JPEG"), ("cut.png", "could not be decoded"), ("gone.png", "no longer")):
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
    assert "1600 pixels but at most 1000" in status
