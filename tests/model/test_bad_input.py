# SPDX-License-Identifier: Apache-2.0
"""Nonsense in, one clear error out: files, arrays, configurations, prompts, tensors; then random ones by thousands."""

import io
import struct
import zlib
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from blip3.hub import model_code

RELEASED_TILE_GRIDS = model_code("configuration_blip3.RELEASED_TILE_GRIDS")
TWELVE_TILE_GRIDS = model_code("configuration_blip3.TWELVE_TILE_GRIDS")
Blip3Config = model_code("configuration_blip3.Blip3Config")
Blip3ResamplerConfig = model_code("configuration_blip3.Blip3ResamplerConfig")
Blip3ImageProcessor = model_code("image_processing_blip3.Blip3ImageProcessor")
Blip3ForConditionalGeneration = model_code("modeling_blip3.Blip3ForConditionalGeneration")
Blip3Processor = model_code("processing_blip3.Blip3Processor")
choose_grid = model_code("tiling_blip3.choose_grid")
count_views = model_code("tiling_blip3.count_views")
grid_of = model_code("tiling_blip3.grid_of")

TILE = 28
SIZE = {"height": TILE, "width": TILE}
MARKERS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<pad>", "<image>"]
NUM_LATENTS = 2


@contextmanager
def refused(match, *given_values):
    """Expect a plain ValueError whose message has four parts.

    What was given (each of `given_values` is named) and what was expected (`match`), the likely cause ("probably") and
    the next action (a further clause or sentence).
    """
    with pytest.raises(ValueError, match=match) as caught:
        yield caught
    message = str(caught.value)
    assert caught.type is ValueError, f"{caught.type.__name__}: {message}"
    for value in given_values:
        assert str(value) in message, f"{value} is not named in: {message}"
    assert "probably" in message, message
    sentences = [part for part in message.replace("?", ".").split(". ") if part.strip()]
    assert len(sentences) >= 2, message
    assert message[-1] in ".?", message
    assert 80 < len(message) < 1000, message


def make_tokenizer(*tokens):
    words = ["<unk>", "look", "what", "is", "this", *tokens]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(tokens))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


TOKENIZER = make_tokenizer(*MARKERS)


def make_config(**changes):
    values = {
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": 14,
        },
        "resampler_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 8,
            "intermediate_size": 16,
            "num_latents": NUM_LATENTS,
        },
        "text_config": {
            "model_type": "phi3",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": len(TOKENIZER),
            "pad_token_id": TOKENIZER.pad_token_id,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        "image_token_id": TOKENIZER.convert_tokens_to_ids("<image>"),
    }
    for name, change in changes.items():
        values[name] = {**values[name], **change} if isinstance(change, dict) and name in values else change
    return Blip3Config(**values)


def make_processor(**changes):
    values = {"size": SIZE, "tile_grids": RELEASED_TILE_GRIDS, **changes}
    return Blip3Processor(Blip3ImageProcessor(**values), TOKENIZER, num_latents=NUM_LATENTS)


@pytest.fixture(scope="module")
def image_processor():
    return Blip3ImageProcessor(size=SIZE)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Blip3ForConditionalGeneration(make_config()).eval()


def make_rgb(height=40, width=60):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# -- files ------------------------------------------------------------------------------------------------------------


def encode(file_format, **kwargs):
    buffer = io.BytesIO()
    Image.fromarray(make_rgb()).save(buffer, file_format, **kwargs)
    return buffer.getvalue()


FILES = {
    "jpeg": encode("jpeg"),
    "progressive jpeg": encode("jpeg", progressive=True),
    "png": encode("png"),
    "webp": encode("webp"),
    "lossless webp": encode("webp", lossless=True),
    "gif": encode("gif"),
    "bmp": encode("bmp"),
    "tiff": encode("tiff"),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("name", FILES)
def test_truncated_files_are_refused_and_never_read_as_another_image(name, image_processor):
    whole = FILES[name]
    wanted = image_processor(whole)["pixel_values"]
    cuts = {0, 1, 4, 12, 30, *np.linspace(50, len(whole) - 1, 60).astype(int).tolist()}
    num_refused = 0
    for cut in sorted(cuts):
        try:
            got = image_processor(whole[:cut])["pixel_values"]
        except ValueError:
            num_refused += 1
        else:  # only a missing end mark: every pixel was there
            assert np.array_equal(got, wanted), f"cut at {cut} of {len(whole)} bytes"
    assert num_refused >= 0.9 * len(cuts)


@pytest.mark.parametrize("name", ["jpeg", "png", "gif"])
def test_a_half_file_is_named_by_its_place_and_probable_cause(name, image_processor):
    whole = FILES[name]
    with refused("Image 2 of 3: it could not be decoded .*truncated", 2, 3):
        image_processor([make_rgb(), whole[: len(whole) // 2], make_rgb()])


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00", bytes(range(256)), b"This is not an image.\n" * 9, b"<svg xmlns='http://www.w3.org/2000/svg'/>"],
    ids=["empty", "zero byte", "random bytes", "text", "svg"],
)
def test_other_content_is_refused_from_every_door(content, image_processor, tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    for image in (content, bytearray(content)):
        with refused("could not be opened as an image", f"{len(content)} bytes"):
            image_processor(image)
    for image in (path, str(path)):
        with refused("could not be opened as an image", "image.jpg"):
            image_processor(image)
    with refused("could not be opened as an image", "BytesIO"):
        image_processor(io.BytesIO(content))


def test_missing_paths_and_folders_are_refused_by_name(image_processor, tmp_path):
    for missing in (tmp_path / "no.jpg", tmp_path):
        with refused("could not be opened as an image", missing.name):
            image_processor(missing)
    with refused(r"'no-such-picture\.jpg' could not be opened as an image"):
        image_processor("no-such-picture.jpg")
    with refused("'' could not be opened as an image"):
        image_processor("")
    with refused("could not be opened as an image"):
        image_processor("data:image/png;base64,AAAA")
    with refused("could not be opened as an image"):
        image_processor("nul\0byte.jpg")


NOT_IMAGES = {
    "missing name": (lambda folder: "no-such-picture.jpg", "'no-such-picture.jpg' could not be .* .no such file"),
    "missing path": (lambda folder: folder / "no.jpg", r"no\.jpg' could not be .* .no such file"),
    "name without an ending": (lambda folder: "picture", "'image' could not be .* .no such file"),
    "long name": (lambda folder: "x" * 300 + ".jpg", r"x'\.\.\. .304 characters. could not be .* .no such file"),
    "longer than any path": (lambda folder: "x" * 5000 + ".jpg", "5004 characters. could not be .* .no such file"),
    "long path": (lambda folder: folder / ("x" * 300), "characters. could not be .*File name too long"),
    "line break": (lambda folder: "a\nb.jpg", r"'a\\nb\.jpg' could not be .* .no such file"),
    "folder": (lambda folder: folder, "could not be .* .it is a folder"),
    "folder by name": (lambda folder: str(folder), "could not be .* .it is a folder"),
    "empty file": (lambda folder: folder / "empty.jpg", r"empty\.jpg' could not be .* .the file is empty"),
    "text file": (lambda folder: folder / "text.jpg", r"text\.jpg' could not be .* .UnidentifiedImageError"),
    "no server": (lambda folder: "http://127.0.0.1:9/a.jpg", r"a\.jpg' could not be .* .Connect"),
    "empty cell": (lambda folder: {"bytes": None, "path": None}, "could not be .* .it has neither bytes nor path"),
    "cell of a missing file": (lambda folder: {"bytes": None, "path": "no.jpg"}, "'no.jpg' .* .no such file"),
    "cell of other bytes": (lambda folder: {"bytes": b"abc", "path": "no.jpg"}, "3 bytes could not be"),
}


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_what_is_no_image_says_why_in_one_line(name, image_processor, processor, tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    make, match = NOT_IMAGES[name]
    for call in (image_processor, lambda images: processor(images=[[images]], text=["<image>"])):
        with refused(match) as caught:
            call(make(tmp_path))
        message = str(caught.value)
        assert "\n" not in message
        assert "0x" not in message
        assert "Incorrect padding" not in message


SWAPPED = {
    "PIL image": lambda: Image.fromarray(make_rgb()),
    "array": make_rgb,
    "bytes": lambda: FILES["png"],
    "open file": lambda: io.BytesIO(FILES["png"]),
    "list": lambda: [Image.fromarray(make_rgb())],
    "name": lambda: "street.jpg",
}


@pytest.mark.parametrize("name", SWAPPED)
def test_swapped_images_and_text_are_named(name, processor):
    for text in ("<image>\nlook", ["<image>\nlook"]):
        with refused(r"images holds a str '<image>.nlook' and text holds a .* swapped.*images=\.\.\., text="):
            processor(text, SWAPPED[name]())


def test_a_swapped_question_without_a_placeholder_is_named_too(processor):
    with refused("images holds a str 'look' and text holds a Image, .* swapped"):
        processor("look", Image.fromarray(make_rgb()))


def test_a_closed_image_is_refused(image_processor, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(FILES["png"])
    image = Image.open(path)
    image.close()
    with refused("Image 1 of 1: it could not be decoded"):
        image_processor(image)


def png_header(height, width):
    """A PNG that claims a size and holds almost nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def test_bombs_are_refused_by_pillow_s_limit(image_processor):
    with refused("could not be opened as an image .DecompressionBombError", "3600000000 pixels"):
        image_processor(png_header(60000, 60000))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [13400, 60000])
def test_bombs_are_refused_by_our_limit_when_pillow_s_is_off(side, image_processor, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with refused(f"it has {side * side} pixels but at most 178956970 are decoded"):
        image_processor(png_header(side, side))


def test_the_pixel_limit_can_be_set_and_counts_pixels(image_processor):
    assert image_processor(make_rgb(30, 40), max_image_pixels=1200)["image_sizes"].tolist() == [[30, 40]]
    with refused("it has 1200 pixels but at most 1199 are decoded"):
        image_processor(make_rgb(30, 40), max_image_pixels=1199)


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 10, 3), (10, 0, 3), (0, 0, 3), (0, 10), (3, 10, 0)])
@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_images_without_pixels_are_refused(shape, convert, image_processor):
    with refused("Image 1 of 1: it (is|has)", 0):
        image_processor(convert(np.zeros(shape, dtype=np.uint8)))


def test_pil_images_without_pixels_are_refused(image_processor):
    with refused("it is 0 x 5 pixels .height x width. but both sides must be positive"):
        image_processor(Image.new("RGB", (5, 0)))


@pytest.mark.parametrize("backend", ["pil", "torch"])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (100, 10000), (5000, 50), (1, 20000), (20000, 1)])
def test_thin_and_tiny_images_work(size, backend, image_processor):
    inputs = image_processor(np.full((*size, 3), 200, dtype=np.uint8), resize_backend=backend, do_normalize=False)
    assert inputs["image_sizes"].tolist() == [list(size)]
    rows, columns = choose_grid(size, RELEASED_TILE_GRIDS, TILE)
    num_views = count_views(grid_of(size, RELEASED_TILE_GRIDS, TILE))
    assert num_views == 1 + rows * columns
    views = inputs["pixel_values"][0]
    assert np.abs(views[0] - np.float32(200 / 255)).max() < 1e-6
    assert views[1:num_views].any()
    assert not views[num_views:].any()


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-3, 5), (0, -1)])
def test_sizes_without_area_have_no_grid(size):
    with refused("both sides must be positive", f"{size[0]} x {size[1]}"):
        grid_of(size, RELEASED_TILE_GRIDS, TILE)
    with refused("Cannot choose among 0 tile grids"):
        choose_grid((5, 5), [], TILE)


# -- arrays -----------------------------------------------------------------------------------------------------------

BAD_ARRAYS = {
    "NaN": (np.full((9, 9, 3), np.nan), "its values run from nan to nan"),
    "one NaN": (np.where(np.eye(9)[..., None], np.nan, np.ones((9, 9, 3))), "its values run from nan"),
    "infinite": (np.full((9, 9, 3), np.inf), "its values run from inf"),
    "minus infinite": (np.full((9, 9, 3), -np.inf), "its values run from -inf"),
    "negative": (np.full((9, 9, 3), -1.5), "its values run from -1.5"),
    "normalised": (np.linspace(-1, 1, 243).reshape(9, 9, 3), "its values run from -1 to 1"),
    "negative integers": (np.full((9, 9, 3), -1), "its values run from -1"),
    "above 255": (np.full((9, 9, 3), 256), "to 256 but must be within 0 to 255"),
    "float above 255": (np.full((9, 9, 3), 256.0), "to 256 but must be within 0 to 255 or 0 to 1"),
    "12-bit integers": (np.full((9, 9), 4095, dtype=np.int32), "to 4095 but must be"),
    "neither scale": (np.linspace(0, 1.3, 243).reshape(9, 9, 3), "to 1.3, where 0 to 1 and 0 to 255 cannot be told"),
    "2 channels": (np.zeros((9, 9, 2), np.uint8), r"the shape \(9, 9, 2\), where neither end is a channel count"),
    "5 channels": (np.zeros((9, 9, 5), np.uint8), r"the shape \(9, 9, 5\)"),
    "5 channels first": (np.zeros((5, 9, 9), np.uint8), r"the shape \(5, 9, 9\)"),
    "0-D": (np.zeros((), np.uint8), r"it has 0 dimensions \(\)"),
    "1-D": (np.zeros(9, np.uint8), r"it has 1 dimensions \(9,\)"),
    "5-D": (np.zeros((1, 1, 9, 9, 3), np.uint8), r"it has 5 dimensions \(1, 1, 9, 9, 3\)"),
    "complex": (np.ones((9, 9), complex), "its values are of type complex128"),
    "text": (np.array([["a", "b"]]), "its values are of type <U1"),
    "objects": (np.array([[None, 1], [2, 3]]), "its values are of type object"),
    "dates": (np.zeros((9, 9), "datetime64[s]"), "its values are of type datetime64"),
    "torch NaN": (torch.full((3, 9, 9), torch.nan, dtype=torch.bfloat16), "its values run from nan"),
    "torch 2 channels": (torch.zeros(2, 9, 9), r"the shape \(2, 9, 9\)"),
    "torch 5-D": (torch.zeros(1, 1, 3, 9, 9), r"it has 5 dimensions"),
    "PIL F above 255": (Image.new("F", (9, 9), 300.0), "to 300 but must be"),
    "PIL I above 65535": (Image.new("I", (9, 9), 70000), "to 70000 but must be within 0 to 65535"),
    "PIL I below 0": (Image.new("I", (9, 9), -5), "run from -5"),
}


@pytest.mark.parametrize(("image", "match"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_arrays_that_are_no_image_are_refused_by_place_and_value(image, match, image_processor):
    with refused(f"Image 3 of 3: .*{match}", 3):
        image_processor([make_rgb(), make_rgb(), image])


def test_sixteen_bit_arrays_are_reduced_not_clipped(image_processor):
    wanted = image_processor(np.full((9, 9), 100, dtype=np.uint8))["pixel_values"]
    assert np.array_equal(image_processor(np.full((9, 9), 25700, dtype=np.uint16))["pixel_values"], wanted)
    dark = image_processor(np.full((9, 9), 200, dtype=np.uint16), do_normalize=False)["pixel_values"]
    assert dark.max() == np.float32(1 / 255)


@pytest.mark.parametrize("format_name", ["channels_first", "channels_last"])
def test_a_wrong_channel_format_is_refused(format_name, image_processor):
    array = np.zeros((9, 9, 3) if format_name == "channels_first" else (3, 9, 9), np.uint8)
    with refused(f"'{format_name}' does not find a channel count", array.shape):
        image_processor(array, input_data_format=format_name)


# -- things that are no images --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "name"),
    [
        (5, "int"),
        (2.5, "float"),
        (None, "NoneType"),
        ({"image": make_rgb()}, "dict"),
        (object(), "object"),
        ([1, 2, 3], "int"),
        ([[[0, 1], [2, 3]]], "int"),
        ({1, 2}, "set"),
    ],
    ids=["int", "float", "None", "dict", "object", "numbers", "nested numbers", "set"],
)
def test_other_objects_are_refused_by_type(images, name, image_processor):
    with refused(f"Image 1 of .*: it is a {name} but images are"):
        image_processor(images)


def test_none_inside_a_list_is_refused_by_its_place(image_processor):
    with refused("Image 2 of 3: it is a NoneType"):
        image_processor([make_rgb(), None, make_rgb()])


@pytest.mark.parametrize("images", [[], [[]], (), [[], []], np.zeros((0, 9, 9, 3), np.uint8), torch.zeros(0, 3, 9, 9)])
def test_no_image_at_all_is_refused(images, image_processor):
    with refused("images is empty but at least one image is needed"):
        image_processor(images)


# -- settings of the image processor ----------------------------------------------------------------------------------

BAD_SETTINGS = {
    "unknown backend": ({"resize_backend": "pill"}, "resize_backend is 'pill' but must be 'pil'"),
    "backend None": ({"resize_backend": None}, "resize_backend is None"),
    "filter by name": ({"resample": "bicubic"}, "resample is 'bicubic' but the pil backend knows"),
    "unknown filter": ({"resample": 99}, "resample is 99"),
    "filter torch lacks": (
        {"resample": 1, "resize_backend": "torch"},
        r"resample is 1 but the torch backend .*\[2, 3\]",
    ),
    "two means": ({"image_mean": [0.5, 0.5]}, r"image_mean is \[0.5, 0.5\]"),
    "text mean": ({"image_mean": "0.5"}, "image_mean is '0.5'"),
    "NaN mean": ({"image_mean": float("nan")}, r"image_mean is \[nan, nan, nan\]"),
    "zero deviation": ({"image_std": [0.5, 0, 0.5]}, r"image_std is \[0.5, 0, 0.5\]"),
    "text factor": ({"rescale_factor": "1/255"}, "rescale_factor is '1/255'"),
    "no limit": ({"max_image_pixels": 0}, "max_image_pixels is 0"),
    "infinite limit": ({"max_image_pixels": float("inf")}, "max_image_pixels is inf"),
    "misspelt": ({"do_normalise": False}, "'do_normalise' .*Did you mean 'do_normalize'"),
    "grid, not grids": ({"tile_grid": [[1, 2]]}, "'tile_grid' .*Did you mean 'tile_grids'"),
    "splitting misspelt": ({"do_image_spliting": False}, "'do_image_spliting' .*Did you mean 'do_image_splitting'"),
}
BAD_CONSTRUCTION = {
    "size number": ({"size": 384}, "size is 384 but tiles are square"),
    "size shortest edge": ({"size": {"shortest_edge": 384}}, "size is {'shortest_edge': 384}"),
    "size zero": ({"size": {"height": 0, "width": 0}}, "size is {'height': 0, 'width': 0}"),
    "size float": ({"size": {"height": 28.0, "width": 28.0}}, "size is {'height': 28.0"),
    "size oblong": ({"size": {"height": 384, "width": 768}}, "size is {'height': 384, 'width': 768}"),
    "size grid": ({"size": [2, 1]}, r"size is \[2, 1\]"),
}
BAD_GRIDS = {
    "pixels": ([(384, 768)], r"tile_grids\[0\] is .384, 768. but must be \(rows, columns\)"),
    "second in pixels": ([(1, 2), (768, 384)], r"tile_grids\[1\] is .768, 384."),
    "zero": ([(0, 1)], r"tile_grids\[0\] is .0, 1."),
    "negative": ([(2, -1)], r"tile_grids\[0\] is .2, -1."),
    "three": ([(1, 2, 3)], r"tile_grids\[0\] is .1, 2, 3."),
    "empty pair": ([()], r"tile_grids\[0\] is (\(\)|\[\])"),
    "floats": ([(1.0, 2.0)], r"tile_grids\[0\] is .1.0, 2.0."),
    "empty text": ([""], r"tile_grids\[0\] is (''|\[\])"),
    "text": (["12"], r"tile_grids\[0\] is ('12'|\['1', '2'\])"),
    "flat": ([1, 2], r"tile_grids\[0\] is 1"),
    "number": (5, "tile_grids is 5"),
    "all text": ("2x1", "tile_grids is '2x1'"),
    "mapping": ({"rows": 1}, "tile_grids is {'rows': 1}"),
}


@pytest.mark.parametrize(("kwargs", "match"), [*BAD_SETTINGS.values(), *BAD_CONSTRUCTION.values()])
def test_the_constructor_refuses_settings_that_cannot_work(kwargs, match):
    with refused(match):
        Blip3ImageProcessor(**kwargs)


@pytest.mark.parametrize(("kwargs", "match"), [*BAD_SETTINGS.values(), *BAD_CONSTRUCTION.values()])
def test_from_pretrained_refuses_settings_that_cannot_work(kwargs, match, tmp_path):
    Blip3ImageProcessor(size=SIZE).save_pretrained(tmp_path)
    with refused(match):
        Blip3ImageProcessor.from_pretrained(tmp_path, **kwargs)


@pytest.mark.parametrize(("kwargs", "match"), [bad for name, bad in BAD_SETTINGS.items() if name != "backend None"])
def test_a_call_refuses_settings_that_cannot_work(kwargs, match, image_processor):
    with refused(match):
        image_processor(make_rgb(), **kwargs)


@pytest.mark.parametrize("name", ["nonsense", "return_tensor_", "input_data_formt"])
def test_a_call_refuses_unknown_arguments(name, image_processor):
    with refused(f"unknown argument '{name}' .7.", 7):
        image_processor(make_rgb(), **{name: 7})


def test_an_unknown_channel_format_is_refused(image_processor):
    with refused("input_data_format is 'HWC' but must be 'channels_first'"):
        image_processor(make_rgb(), input_data_format="HWC")


@pytest.mark.parametrize(("tile_grids", "match"), BAD_GRIDS.values(), ids=BAD_GRIDS)
@pytest.mark.parametrize("make", [Blip3ImageProcessor, make_config], ids=["image processor", "config"])
def test_grids_that_are_no_grids_are_refused(tile_grids, match, make):
    with refused(match):
        make(tile_grids=tile_grids)


# -- configuration ----------------------------------------------------------------------------------------------------

BAD_CONFIGS = {
    "image smaller than patch": (
        {"vision_config": {"image_size": 7}},
        "vision_config has image_size 7 and patch_size 14",
    ),
    "patch of zero": ({"vision_config": {"patch_size": 0}}, "patch_size 0"),
    "widths differ": (
        {"vision_config": {"hidden_size": 32}},
        "resampler_config.hidden_size is 16 but vision_config.hidden_size is 32",
    ),
    "vision heads do not divide": (
        {"vision_config": {"num_attention_heads": 3}},
        "vision_config.hidden_size 16 is not a multiple of its num_attention_heads 3",
    ),
    "text heads do not divide": (
        {"text_config": {"num_attention_heads": 5, "num_key_value_heads": 5}},
        "text_config.hidden_size 16 is not a multiple of its num_attention_heads 5",
    ),
    "no heads": ({"vision_config": {"num_attention_heads": 0}}, "num_attention_heads 0"),
    "image token out of vocabulary": ({"image_token_id": 99}, "image_token_id is 99 but text_config.vocab_size is 12"),
    "image token negative": ({"image_token_id": -1}, "image_token_id is -1"),
    "image token None": ({"image_token_id": None}, "image_token_id is None"),
    "image token text": ({"image_token_id": "<image>"}, "image_token_id is '<image>'"),
    "unknown vision type": ({"vision_config": {"model_type": "siglipp"}}, "vision_config.model_type is 'siglipp'"),
    "unknown text type": ({"text_config": {"model_type": "phi-3"}}, "text_config.model_type is 'phi-3'"),
    "vision not a mapping": ({"vision_config": "siglip"}, "vision_config is 'siglip'"),
    "text not a mapping": ({"text_config": 5}, "text_config is 5"),
    "resampler not a mapping": ({"resampler_config": "perceiver"}, "resampler_config is 'perceiver'"),
    "misspelt grids": ({"tile_grid": [[1, 2]]}, "unknown key 'tile_grid' .*Did you mean 'tile_grids'"),
    "misspelt image token": ({"image_token_idx": 3}, "unknown key 'image_token_idx' .*Did you mean 'image_token_id'"),
    "misspelt resampler key": (
        {"resampler_config": {"num_latent": 64}},
        "resampler_config has the unknown key 'num_latent' .*Did you mean 'num_latents'",
    ),
    "foreign resampler key": ({"resampler_config": {"depth": 6}}, "resampler_config has the unknown key 'depth'"),
    "unknown sampling": (
        {"resampler_config": {"token_sampling": "pach"}},
        "token_sampling is 'pach' but must be one of 'patch', 'fixed'",
    ),
    "unknown grouping": (
        {"resampler_config": {"tile_grouping": "rows"}},
        "tile_grouping is 'rows' but must be one of 'stripes', 'tiles'",
    ),
}


@pytest.mark.parametrize(("changes", "match"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_impossible_configurations_are_refused(changes, match):
    with refused(match):
        make_config(**changes)


@pytest.mark.parametrize("value", [0, -1, 1.5, "128", None, True])
@pytest.mark.parametrize(
    "name", ["num_latents", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"]
)
def test_resampler_sizes_must_be_positive_integers(name, value):
    with refused(f"resampler_config.{name} is {value!r} but must be a positive integer"):
        Blip3ResamplerConfig(**{name: value})


def test_a_foreign_key_of_the_whole_configuration_is_only_carried_along():
    assert make_config(note_of_the_trainer=3).note_of_the_trainer == 3


# -- processor --------------------------------------------------------------------------------------------------------

ONE, TWO = "<|user|> <image> what is this", "<|user|> <image> <image> look"


@pytest.mark.parametrize(
    ("images", "text", "slots", "counts"),
    [
        ([make_rgb()], [TWO], [2], [1]),
        ([make_rgb()] * 2, [ONE], [1], [2]),
        (make_rgb(), "no place for it", [0], [1]),
        ([[make_rgb()], [make_rgb()]], [TWO, "none"], [2, 0], [1, 1]),
        ([[make_rgb(), make_rgb()], []], [ONE, ONE], [1, 1], [2, 0]),
        ([[], [make_rgb()]], [ONE, "none"], [1, 0], [0, 1]),
        ([[make_rgb()]], [ONE, ONE], [1, 1], [1]),
        (np.stack([make_rgb()] * 3), [TWO], [2], [3]),
        (None, ONE, [1], [0]),
        ([], ONE, [1], [0]),
        ([[]], [ONE], [1], [0]),
    ],
)
def test_images_and_places_must_match_row_by_row(images, text, slots, counts, processor):
    with refused("the prompts hold", slots, counts):
        processor(images=images, text=text)


def test_images_without_text_give_pixels_only(processor):
    inputs = processor(images=make_rgb(), return_tensors="pt")
    assert sorted(inputs) == ["image_sizes", "pixel_values"]


def test_neither_images_nor_text_is_refused(processor):
    with refused("without images and without text"):
        processor()


@pytest.mark.parametrize("given_name", ["videos", "audio"])
def test_video_and_audio_are_refused(given_name, processor):
    with refused("video or audio"):
        processor(text=ONE, images=make_rgb(), **{given_name: [make_rgb()]})


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ([1, 2, 3], "int"),
        (5, "int"),
        (b"<image>", "bytes"),
        ([["<image>"]], "list"),
        ([None], "NoneType"),
        ({"role": "user", "content": "look"}, "dict"),
        ([{"role": "user", "content": "look"}], "dict"),
        (torch.tensor([1, 2]), "Tensor"),
    ],
    ids=str,
)
def test_text_that_is_no_text_is_refused_by_type(text, name, processor):
    with refused(f"text (is|holds) a {name} but must be a string"):
        processor(text=text)


@pytest.mark.parametrize("max_length", [1, 3, 5, 9])
def test_truncation_inside_a_image_is_refused(max_length, processor):
    assert len(processor(text=ONE, images=make_rgb())["input_ids"][0]) == 14
    with refused("Mismatch in `image` token count between text and `input_ids`", 10):
        processor(text=[ONE], images=[make_rgb()], truncation=True, max_length=max_length)


def test_truncation_after_the_images_works(processor):
    inputs = processor(text=[ONE], images=[make_rgb()], truncation=True, max_length=12)
    assert len(inputs["input_ids"][0]) == 12


def test_a_tokenizer_without_the_image_token_is_refused():
    with refused("has no token '<image>'", len(TOKENIZER) - 1):
        Blip3Processor(Blip3ImageProcessor(), make_tokenizer(*MARKERS[:-1]))


@pytest.mark.parametrize("kwargs", [{"num_latents": 0}, {"num_latents": 1.5}, {"token_sampling": "pach"}], ids=str)
def test_a_processor_that_would_count_wrongly_is_refused(kwargs):
    (name, value), *_ = kwargs.items()
    with refused(f"{name} is {value!r} but must be"):
        Blip3Processor(Blip3ImageProcessor(), TOKENIZER, **kwargs)


@pytest.mark.parametrize("parts", [(None, TOKENIZER), (Blip3ImageProcessor(), None), (None, None)])
def test_a_processor_with_a_part_missing_is_refused(parts):
    with refused("(image_processor|tokenizer) is (a )?None"):
        Blip3Processor(*parts)


def test_a_broken_image_is_named_through_the_processor_too(processor):
    with refused("Image 2 of 2: it is a NoneType"):
        processor(text=TWO, images=[make_rgb(), None])


# -- model ------------------------------------------------------------------------------------------------------------


def run(model, inputs, **changes):
    with torch.no_grad():
        return model(**{**inputs, **changes})


@pytest.fixture
def inputs(processor):
    return processor(text=[TWO], images=[make_rgb(), make_rgb(100, 20)], return_tensors="pt")


def test_well_formed_inputs_run(model, inputs):
    assert run(model, inputs).logits.shape == (1, inputs["input_ids"].shape[1], len(TOKENIZER))


def test_pixels_without_sizes_are_refused(model, inputs):
    with refused("came without image_sizes", tuple(inputs["pixel_values"].shape), 2):
        run(model, inputs, image_sizes=None)


@pytest.mark.parametrize("size", [(20, 80), (90, 10)])
def test_swapped_sizes_are_refused_where_tile_counts_differ(size):
    tile_grids = [(1, 2), (3, 1)]
    model = Blip3ForConditionalGeneration(make_config(tile_grids=tile_grids)).eval()
    inputs = make_processor(tile_grids=tile_grids)(text=ONE, images=make_rgb(*size), return_tensors="pt")
    assert run(model, inputs).logits is not None
    with refused("Image features and image tokens do not match: tokens: .*features"):
        run(model, inputs, image_sizes=inputs["image_sizes"].flip(1))


@pytest.mark.parametrize(
    ("image_sizes", "match"),
    [
        ([[40, 60]], "pixel_values is .2, 5, 3, 28, 28. but the 1 rows of image_sizes"),
        ([[40, 60]] * 3, "pixel_values is .2, 5, 3, 28, 28. but the 3 rows of image_sizes"),
        ([[40, 0], [40, 60]], "image of 40 x 0 pixels"),
        ([[-40, 60], [40, 60]], "image of -40 x 60 pixels"),
        ([[40, 60, 3], [40, 60, 3]], "image_sizes"),
        ([40, 60], "image_sizes"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_the_pixels_are_refused(image_sizes, match, model, inputs):
    with refused(match):
        run(model, inputs, image_sizes=torch.tensor(image_sizes))


@pytest.mark.parametrize(
    "shape",
    [
        (2, 5, 3, 14, 14),
        (2, 5, 3, 28, 56),
        (2, 2, 3, 28, 28),
        (3, 28, 28),
        (2, 3, 28, 28),
        (2, 5, 1, 28, 28),
        (28, 28),
    ],
    ids=str,
)
def test_pixels_of_another_shape_are_refused(shape, model, inputs):
    with refused(r"pixel_values is .* but the 2 rows of image_sizes call for \[5, 4\] tiles", shape):
        run(model, inputs, pixel_values=torch.zeros(shape))


@pytest.mark.parametrize(
    "tile_grids", [TWELVE_TILE_GRIDS, [(1, 1)], [], [(1, 2)]], ids=["twelve", "one", "none", "wide"]
)
def test_a_processor_of_other_grids_is_refused(tile_grids, model):
    inputs = make_processor(tile_grids=tile_grids)(text=ONE, images=make_rgb(200, 300), return_tensors="pt")
    with refused("(Image features and image tokens do not match|The processor's tile_grids)"):
        run(model, inputs)


def test_exactly_one_of_ids_and_embeddings_must_be_given(model, inputs):
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    for changes in ({"inputs_embeds": embeddings}, {"input_ids": None}):
        with refused("exactly one of input_ids or inputs_embeds"):
            run(model, inputs, **changes)


@pytest.mark.parametrize("dropped", [1, 7])
def test_fewer_image_tokens_than_features_are_refused(dropped, model, inputs):
    is_image = inputs["input_ids"][0] == model.config.image_token_id
    keep = ~is_image | (is_image.cumsum(0) > dropped)
    changes = {name: inputs[name][:, keep] for name in ("input_ids", "attention_mask")}
    with refused("Image features and image tokens do not match", f"tokens: {18 - dropped}, features: 18"):
        run(model, inputs, **changes)


# -- random images --------------------------------------------------------------------------------------------------

LONGEST_SIDE, LARGEST_AREA = 3000, 1_000_000
NOISE = np.random.default_rng(7).integers(0, 256, 4 * LARGEST_AREA, dtype=np.uint8)
GRID_SETS = {
    "released": RELEASED_TILE_GRIDS,
    "twelve": TWELVE_TILE_GRIDS,
    "with one tile": ((1, 1), *RELEASED_TILE_GRIDS),
    "none": (),
}
side = st.integers(0, 1000).map(lambda step: round(LONGEST_SIDE ** (step / 1000)))  # log-uniform in 1..3000


def noise(height, width, channels):
    pixels = NOISE[: height * width * channels]
    return pixels.reshape(height, width, channels) if channels > 1 else pixels.reshape(height, width)


def sample_palette(height, width):
    image = Image.fromarray(noise(height, width, 1))
    image.putpalette(NOISE[:768].tobytes())
    image.info["transparency"] = NOISE[:256].tobytes()
    return image


KINDS = {
    "PIL 1": lambda h, w: Image.fromarray(noise(h, w, 1) > 99),
    "PIL L": lambda h, w: Image.fromarray(noise(h, w, 1)),
    "PIL LA": lambda h, w: Image.frombytes("LA", (w, h), noise(h, w, 2).tobytes()),
    "PIL P": sample_palette,
    "PIL RGB": lambda h, w: Image.fromarray(noise(h, w, 3)),
    "PIL RGBA": lambda h, w: Image.fromarray(noise(h, w, 4)),
    "PIL CMYK": lambda h, w: Image.frombytes("CMYK", (w, h), noise(h, w, 4).tobytes()),
    "PIL YCbCr": lambda h, w: Image.frombytes("YCbCr", (w, h), noise(h, w, 3).tobytes()),
    "PIL I;16": lambda h, w: Image.fromarray(noise(h, w, 1).astype(np.uint16) * 257),
    "PIL I": lambda h, w: Image.fromarray(noise(h, w, 1).astype(np.int32) * 257),
    "PIL F": lambda h, w: Image.fromarray(noise(h, w, 1).astype(np.float32)),
    "numpy HWC": lambda h, w: noise(h, w, 3),
    "numpy HWC alpha": lambda h, w: noise(h, w, 4),
    "numpy HW": lambda h, w: noise(h, w, 1),
    "numpy float": lambda h, w: noise(h, w, 3) / 255,
    "numpy uint16": lambda h, w: noise(h, w, 3).astype(np.uint16) * 257,
    "torch CHW": lambda h, w: torch.from_numpy(noise(h, w, 3)).permute(2, 0, 1),
    "torch bfloat16": lambda h, w: (torch.from_numpy(noise(h, w, 3)).permute(2, 0, 1) / 255).bfloat16(),
}


@cache
def make_pair(grids):
    """A processor and a model for one of `GRID_SETS`."""
    config = make_config(tile_grids=GRID_SETS[grids])
    return make_processor(tile_grids=GRID_SETS[grids]), Blip3ForConditionalGeneration(config).model


def check_inputs(image_processor, inputs, size, splits=True):
    """What must hold of the inputs of one image of (height, width)."""
    pixel_values, image_sizes = inputs["pixel_values"], inputs["image_sizes"]
    slots, tile = image_processor.num_view_slots, image_processor.tile_size
    assert pixel_values.shape == (1, slots, 3, tile, tile)
    assert pixel_values.dtype == torch.float32
    assert image_sizes.dtype == torch.int64
    assert image_sizes.tolist() == [list(size if splits else (0, 0))]
    assert float(pixel_values.min()) >= -1
    assert float(pixel_values.max()) <= 1
    used = count_views(grid_of(size, image_processor.tile_grids, tile)) if splits else 1
    assert not pixel_values[0, used:].any()
    assert all(bool(tile.any()) for tile in pixel_values[0, :used])  # padding alone is -1, not 0
    return used


@settings(max_examples=2500, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    height=side,
    width=side,
    kind=st.sampled_from(sorted(KINDS)),
    grids=st.sampled_from(sorted(GRID_SETS)),
    splits=st.sampled_from([True, True, True, False]),
    backend=st.sampled_from(["pil", "torch"]),
)
def test_any_image_of_any_size_becomes_inputs_the_model_counts_alike(height, width, kind, grids, splits, backend):
    width = min(width, LARGEST_AREA // height)
    processor, model = make_pair(grids)
    image = KINDS[kind](height, width)
    inputs = processor(
        text="<image>", images=image, return_tensors="pt", do_image_splitting=splits, resize_backend=backend
    )
    used = check_inputs(processor.image_processor, inputs, (height, width), splits)
    num_image_tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert num_image_tokens == used * NUM_LATENTS
    assert num_image_tokens == model.count_image_tokens(tuple(inputs["image_sizes"][0].tolist()))


def attempt(image_processor, image, **kwargs):
    """The inputs, or None after a clear ValueError; any other exception goes through."""
    failure = None
    try:
        return image_processor(image, return_tensors="pt", **kwargs)
    except ValueError as error:
        failure = error
    assert type(failure) is ValueError, failure
    assert "probably" in str(failure), failure
    return None


@settings(max_examples=600, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    image=st.one_of(
        nps.arrays(
            dtype=nps.scalar_dtypes() | nps.unsigned_integer_dtypes() | nps.floating_dtypes(),
            shape=st.one_of(
                nps.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6),
                st.sampled_from([(7, 9, 3), (3, 7, 9), (7, 9), (7, 9, 4), (1, 7, 9)]),
            ),
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=60),
            lambda entry: st.lists(entry, max_size=3) | st.dictionaries(st.text(max_size=3), entry, max_size=2),
            max_leaves=5,
        ),
    )
)
def test_anything_else_becomes_inputs_or_one_value_error(image, image_processor):
    inputs = attempt(image_processor, image)
    if inputs is not None:
        pixel_values = inputs["pixel_values"]
        assert pixel_values.shape[1:] == (image_processor.num_view_slots, 3, TILE, TILE)
        assert float(pixel_values.abs().max()) <= 1


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@settings(max_examples=600, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), name=st.sampled_from(sorted(FILES)))
def test_damaged_files_become_inputs_or_one_value_error(data, name, image_processor):
    damaged = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    inputs = attempt(image_processor, damaged, max_image_pixels=LARGEST_AREA)
    if inputs is not None:
        size = tuple(inputs["image_sizes"][0].tolist())
        check_inputs(image_processor, inputs, size)
