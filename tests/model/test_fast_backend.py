# SPDX-License-Identifier: Apache-2.0
"""`resize_backend="torch"`: JPEGs at the scale that is needed, pixels read where Pillow keeps them, threads."""

import base64
import io
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, JpegImagePlugin

from blip3.hub import model_code
from support import SHARED, needs_reference, render_image
from support.exif import STORED

image_processing_blip3 = model_code("image_processing_blip3")
Blip3ImageProcessor = model_code("image_processing_blip3.Blip3ImageProcessor")
resize_with_pil = model_code("image_processing_blip3.resize_with_pil")
resize_with_torch = model_code("image_processing_blip3.resize_with_torch")

FIXTURES = SHARED / "reference" / "fixtures" / "preprocess_384"
TILE = 28
BICUBIC = Image.Resampling.BICUBIC


@pytest.fixture
def fast():
    return Blip3ImageProcessor(size={"height": TILE, "width": TILE}, resize_backend="torch", pixel_dtype="uint8")


@pytest.fixture
def exact():
    return Blip3ImageProcessor(size={"height": TILE, "width": TILE}, pixel_dtype="uint8")


@pytest.fixture
def scales(monkeypatch):
    """Scale at which each JPEG was decoded since the test began."""
    found, load = [], JpegImagePlugin.JpegImageFile.load

    def watch(image):
        if image.fp is not None:  # not decoded yet
            found.append(Fraction(1, image.decoderconfig[0]) if image.decoderconfig else Fraction(1))
        return load(image)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", watch)
    return found


@pytest.fixture
def threads():
    """Set torch's number of threads, and leave it as it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def photograph(height, width, seed=0):
    """An image with detail of every size, of an amplitude that falls with its frequency as in photographs."""
    generator, canvas = np.random.default_rng(seed), np.zeros((height, width, 3), dtype=np.float32)
    for cell in (256, 64, 16, 4, 1):
        shape = (max(2, height // cell), max(2, width // cell), 3)
        coarse = generator.normal(0, 60 * (cell / 256) ** 0.5, shape).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(coarse[..., channel]).resize((width, height), BICUBIC)
            canvas[..., channel] += np.asarray(layer)
    return Image.fromarray((canvas + 128).clip(0, 255).astype(np.uint8))


def as_jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 95, **options})
    return file.getvalue()


def difference(one, other):
    """Absolute differences of bytes."""
    return (one["pixel_values"].int() - other["pixel_values"].int()).abs().float()


def run(processor, image, **options):
    return processor(image, return_tensors="pt", **options)


# -- JPEGs at the scale that is needed --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((111, 111), Fraction(1)),  # 2 x 2 tiles: 56 x 56 are needed twice
        ((112, 112), Fraction(1)),
        ((224, 224), Fraction(1, 2)),
        ((446, 448), Fraction(1, 2)),
        ((448, 448), Fraction(1, 4)),
        ((896, 1344), Fraction(1, 8)),
        ((8000, 800), Fraction(1, 8)),
        ((900, 900), Fraction(1, 4)),  # 1/8 would leave half a pixel
        ((901, 900), Fraction(1)),
        ((300, 900), Fraction(1, 4)),  # 1 x 3 tiles: 28 x 84
        ((100, 900), Fraction(1)),  # 10 rows of the tiles, but 28 of the global view, are needed twice
    ],
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_of_at_least_twice_what_is_needed(fast, scales, size, expected):
    inputs = run(fast, as_jpeg(render_image(*size)))
    assert scales == [expected]
    assert inputs["image_sizes"].tolist() == [list(size)]


def test_the_global_view_alone_needs_less(fast, scales):
    data = as_jpeg(render_image(448, 448))
    run(fast, data, do_image_splitting=False)
    assert scales == [Fraction(1, 8)]


def test_the_exact_backend_decodes_everything(exact, scales, tmp_path):
    data = as_jpeg(photograph(900, 900))
    (tmp_path / "a.jpg").write_bytes(data)
    for source in (data, tmp_path / "a.jpg", {"bytes": data, "path": None}):
        decoded = run(exact, Image.open(io.BytesIO(data)))
        assert torch.equal(run(exact, source)["pixel_values"], decoded["pixel_values"])
    assert set(scales) == {1}


def test_every_way_to_name_a_file_is_decoded_alike(fast, scales, tmp_path):
    data = as_jpeg(photograph(900, 700))
    (tmp_path / "a.jpg").write_bytes(data)
    text = base64.b64encode(data).decode()
    sources = [data, bytearray(data), str(tmp_path / "a.jpg"), tmp_path / "a.jpg", io.BytesIO(data), text]
    sources += [f"data:image/jpeg;base64,{text}", {"bytes": data}, {"path": str(tmp_path / "a.jpg")}]
    inputs = run(fast, sources)
    assert scales == [Fraction(1, 4)] * len(sources)
    assert all(torch.equal(image, inputs["pixel_values"][0]) for image in inputs["pixel_values"])


def test_images_that_were_opened_elsewhere_and_other_formats_are_decoded_whole(fast, scales):
    image, file = photograph(900, 900), io.BytesIO()
    given = Image.open(io.BytesIO(as_jpeg(image)))
    run(fast, given)
    assert scales == [1]
    assert given.size == (900, 900)
    image.save(file, "PNG")
    assert torch.equal(run(fast, file.getvalue())["pixel_values"], run(fast, image)["pixel_values"])


def test_an_image_that_was_fetched_keeps_all_of_its_pixels(fast, exact):
    """`fetch_images` is public: who holds its result may read it again, at another size."""
    data = as_jpeg(photograph(900, 900))
    image = fast.fetch_images(data)
    first, again = run(fast, image), run(fast, image)
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert torch.equal(run(exact, image)["pixel_values"], run(exact, data)["pixel_values"])
    assert image.size == fast.open_image(data).size == (900, 900)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_is_what_its_upright_pixels_are(fast, scales, orientation):
    """Grid, size and scale follow from the upright image: (1, 3) tiles need less height than width."""
    upright = render_image(300, 900)
    stored = upright.transpose(STORED[orientation]) if orientation in STORED else upright
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    inputs = run(fast, as_jpeg(stored, exif=exif))
    assert inputs["image_sizes"].tolist() == [[300, 900]]
    assert scales == [Fraction(1, 4)]
    assert difference(inputs, run(fast, as_jpeg(upright))).max() <= 4
    as_stored = run(fast, as_jpeg(stored, exif=exif), do_exif_transpose=False)
    assert as_stored["image_sizes"].tolist() == [[stored.height, stored.width]]
    assert difference(as_stored, run(fast, as_jpeg(stored))).max() == 0


@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"subsampling": 0}, {"subsampling": 2}, {"optimize": True}]
)
def test_every_kind_of_jpeg_is_decoded_at_its_scale(fast, exact, scales, options):
    data = as_jpeg(render_image(896, 1024), **options)
    found = run(fast, data)
    assert scales == [Fraction(1, 8)]
    assert difference(found, run(exact, data)).max() <= 8


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_other_colour_spaces_are_decoded_at_their_scale(fast, exact, scales, mode):
    data = as_jpeg(render_image(896, 1024).convert(mode))
    found = run(fast, data)
    assert scales == [Fraction(1, 8)]
    assert difference(found, run(exact, data)).max() <= 8


def test_a_file_of_several_jpegs_gives_the_first(fast, exact, scales):
    file = io.BytesIO()
    render_image(896, 896).save(file, "MPO", save_all=True, append_images=[render_image(896, 896, seed=1)], quality=95)
    found = run(fast, file.getvalue())
    assert scales == [Fraction(1, 8)]
    assert difference(found, run(exact, file.getvalue())).max() <= 16


def test_a_broken_or_huge_jpeg_is_named_as_before(fast):
    data = as_jpeg(photograph(600, 600))
    with pytest.raises(ValueError, match="Image 2 of 2: it could not be decoded"):
        run(fast, [data, data[: len(data) // 2]])
    with pytest.raises(ValueError, match="Image 1 of 1: it has 360000 pixels but at most 1000"):
        run(fast, data, max_image_pixels=1000)


@pytest.mark.parametrize("size", [(1800, 2400), (3200, 2400)])
def test_detailed_photographs_differ_by_little(size):
    """Seen at 1/2 on detail of every frequency: 0.3 of 255 on average, 1.2 % of values by more than 1, 4 at most."""
    data = as_jpeg(photograph(*size), quality=92)
    found, wanted = (
        run(Blip3ImageProcessor(resize_backend=backend, pixel_dtype="uint8"), data) for backend in ("torch", "pil")
    )
    assert torch.equal(found["image_sizes"], wanted["image_sizes"])
    off = difference(found, wanted)
    assert 0 < off.mean() < 0.5
    assert (off > 1).float().mean() < 0.02
    assert off.max() <= 8


@needs_reference
@pytest.mark.parametrize("name", ["img_0.jpg", "img_1.jpg", "img_2.jpg", "img_3.jpg"])
def test_the_reference_photographs_are_decoded_whole_and_stay_within_one_step(name, scales):
    found, wanted = (
        run(Blip3ImageProcessor(resize_backend=backend, pixel_dtype="uint8"), FIXTURES / name)
        for backend in ("torch", "pil")
    )
    assert set(scales) == {1}
    assert difference(found, wanted).max() <= 1


# -- pixels read where Pillow keeps them ------------------------------------------------------------------------------


@pytest.fixture
def small_blocks():
    """Let Pillow keep images of more than 64 KiB in several pieces, as it does from 16 MiB on by itself."""
    before = Image.core.get_block_size()
    Image.core.set_block_size(2**16)
    yield
    Image.core.set_block_size(before)


SIZES = [(300, 700), (700, 300), (31, 900), (900, 31), (400, 400), (56, 28), (28, 28), (100, 56)]
TARGETS = [(28, 28), (56, 28), (28, 84), (17, 56)]


@pytest.mark.parametrize("size", SIZES)
def test_strips_and_shared_passes_change_no_value(size, request, monkeypatch):
    image = photograph(*size)
    one_by_one = [resize_with_torch(image, [target], BICUBIC)[0] for target in TARGETS]
    together = resize_with_torch(image, TARGETS, BICUBIC)
    request.getfixturevalue("small_blocks")
    monkeypatch.setattr(image_processing_blip3, "STRIP_BYTES", 2**15)
    in_pieces = image.copy()
    if image.width * image.height * 4 > 2**16:
        with pytest.raises(ValueError, match=r"contiguous|block"):
            in_pieces.__arrow_c_array__()
    pieces = resize_with_torch(in_pieces, TARGETS, BICUBIC)
    for target, *found in zip(TARGETS, one_by_one, together, pieces, strict=True):
        assert all(values.shape == (*target, 3) for values in found)
        assert all(np.array_equal(found[0], values) for values in found[1:])
        wanted = resize_with_pil(image, [target], BICUBIC)[0]
        assert np.abs(found[0].astype(int) - wanted).max() <= 2


def test_strips_that_pillow_keeps_in_pieces_change_no_value(small_blocks, monkeypatch):
    """The last strip is smaller and fits into a block: some strips are copied, and one is read where it is."""
    image = photograph(300, 800).copy()
    monkeypatch.setattr(image_processing_blip3, "STRIP_BYTES", 96 * 800 * 4)
    found = resize_with_torch(image, TARGETS, BICUBIC)
    monkeypatch.setattr(image_processing_blip3, "STRIP_BYTES", 2**15)
    assert all(map(np.array_equal, found, resize_with_torch(image, TARGETS, BICUBIC)))


def test_what_is_resized_outlives_its_image():
    image = photograph(64, 64)
    wanted = np.asarray(image)
    found = resize_with_torch(image.copy(), [(64, 64)], BICUBIC)[0]
    garbage = [Image.new("RGB", (64, 64), "white") for _ in range(50)]
    assert np.array_equal(found, wanted), len(garbage)


# -- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "pil"])
def test_a_batch_on_several_threads_is_the_batch_on_one(backend, threads, monkeypatch):
    processor = Blip3ImageProcessor(size={"height": TILE, "width": TILE}, resize_backend=backend)
    images = [photograph(200 + 40 * index, 400, seed=index) for index in range(6)]
    sources = [*images[:3], *map(as_jpeg, images[3:])]
    threads(1)
    wanted, seen = run(processor, sources), set()
    module = sys.modules[Blip3ImageProcessor.__module__]
    fit_inside = module.fit_inside

    def watch(*sizes):
        seen.add(threading.get_ident())
        return fit_inside(*sizes)

    monkeypatch.setattr(module, "fit_inside", watch)
    threads(3)
    found = run(processor, sources)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert threading.get_ident() not in seen
    assert len(seen) <= 3
    with pytest.raises(ValueError, match="Image 2 of 3: it could not be decoded"):
        run(processor, [sources[3], sources[4][:900], sources[5][:900]])


@pytest.mark.parametrize("kind", ["twice the same object", "lazy", "one file twice"])
def test_images_that_share_a_file_or_are_still_being_read_stay_on_one_thread(kind, threads, monkeypatch):
    settings = {"size": {"height": TILE, "width": TILE}, "resize_backend": "torch"}
    processor, data = Blip3ImageProcessor(**settings), as_jpeg(photograph(200, 300))
    image, file = photograph(200, 300), io.BytesIO(data)
    sources = {
        "twice the same object": [image, image],
        "lazy": [Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data))],
        "one file twice": [file, file],
    }[kind]
    monkeypatch.setattr(
        sys.modules[Blip3ImageProcessor.__module__],
        "ThreadPoolExecutor",
        lambda number: pytest.fail(f"{number} threads"),
    )
    threads(3)
    inputs = run(processor, sources)
    assert torch.equal(*inputs["pixel_values"])


@pytest.mark.parametrize("is_in_pieces", [False, True], ids=["one piece", "several pieces"])
def test_filling_slots_asks_torch_for_no_parallel_loop(is_in_pieces, request):
    """Beside a busy program a barrier takes longer than the loop: what torch does are the resizes, in one thread."""
    if is_in_pieces:  # as every image of 4.2 megapixels is that was decoded whole
        request.getfixturevalue("small_blocks")
    processor = Blip3ImageProcessor(resize_backend="torch")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(processor, photograph(500, 800))
    names = {event.key for event in profile.key_averages()}
    assert "aten::_upsample_bicubic2d_aa" in names
    assert names.isdisjoint({"aten::copy_", "aten::div_", "aten::sub_", "aten::mul_", "aten::zero_", "aten::fill_"})
    assert "aten::cat" not in names
