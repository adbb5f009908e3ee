# SPDX-License-Identifier: Apache-2.0
"""Files stored turned are shown upright through every entry point; images that a caller made stay as given."""

import base64
import io
import struct
import threading
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoProcessor, pipeline

from blip3.data.images import ImageSource, open_images
from blip3.data.records import Record, Turn
from blip3.evaluation.golden import SHIPPED
from blip3.hub import model_code
from blip3.serving.fetch import ImageFetcher
from blip3.serving.limits import ImageLimits
from blip3.training.encode import Encoder
from support import QuietServer, load_model
from support.exif import FORMATS, STORED, encode, turned_and_upright, write_both

Blip3ImageProcessor = model_code("image_processing_blip3.Blip3ImageProcessor")

SIZE = {"height": 28, "width": 28}


@pytest.fixture(scope="module")
def image_processor():
    return Blip3ImageProcessor(size=SIZE)


@pytest.fixture(scope="module", params=FORMATS)
def files(request, tmp_path_factory):
    """Paths of a file stored turned by a quarter, and of its upright equal."""
    return write_both(tmp_path_factory.mktemp("turned"), request.param)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Address of a server on this machine alone with the files of both formats."""
    folder = tmp_path_factory.mktemp("site")
    for kind in FORMATS:
        write_both(folder, kind)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = (folder / self.path.lstrip("/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = QuietServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("no_proxy", "NO_PROXY"):
            patch.setenv(name, "127.0.0.1")
        yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


FORMS = {
    "path": lambda path, site: path,
    "path as text": lambda path, site: str(path),
    "bytes": lambda path, site: path.read_bytes(),
    "file object": lambda path, site: io.BytesIO(path.read_bytes()),
    "base64": lambda path, site: base64.b64encode(path.read_bytes()).decode(),
    "data URL": lambda path, site: f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}",
    "URL": lambda path, site: f"{site}/{path.name}",
    "cell of bytes": lambda path, site: {"bytes": path.read_bytes(), "path": None},
    "cell of a path": lambda path, site: {"bytes": None, "path": str(path)},
}


def pixels(image):
    return np.asarray(image.convert("RGB"))


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(torch.as_tensor(got[name]), torch.as_tensor(wanted[name])), name


# -- the image processor ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations(orientation, file_format, image_processor):
    options = {"lossless": True} if file_format == "WEBP" else {}
    turned, upright = turned_and_upright(file_format, orientation)
    if options:
        exif = Image.open(io.BytesIO(turned)).getexif()
        stored = Image.open(io.BytesIO(upright))
        stored = stored.transpose(STORED[orientation]) if orientation in STORED else stored
        turned = encode(stored, file_format, exif=exif, **options)
    got = image_processor(turned, return_tensors="pt")
    assert got["image_sizes"].tolist() == [[60, 200]]
    assert_same(got, image_processor(upright, return_tensors="pt"))


@pytest.mark.parametrize("form", FORMS)
def test_every_door_of_the_image_processor(form, files, site, image_processor):
    turned, upright = files
    got = image_processor(FORMS[form](turned, site), return_tensors="pt")
    assert_same(got, image_processor(FORMS[form](upright, site), return_tensors="pt"))
    assert_same(got, image_processor(Image.open(upright), return_tensors="pt"))


def test_images_that_a_caller_made_stay_as_given(files, image_processor):
    turned, _ = files
    stored = np.asarray(Image.open(turned))
    image = Image.open(turned)
    wanted = image_processor(stored, return_tensors="pt")
    assert wanted["image_sizes"].tolist() == [[200, 60]]
    for given in (image, image.copy(), torch.from_numpy(stored.copy()).permute(2, 0, 1)):
        assert_same(image_processor(given, return_tensors="pt"), wanted)
    assert np.array_equal(np.asarray(image), stored), "nor are they changed in place"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("set_by", ["call", "attribute"])
def test_false_turns_nothing(set_by, form, files, site):
    turned, _ = files
    wanted = Blip3ImageProcessor(size=SIZE)(np.asarray(Image.open(turned)), return_tensors="pt")
    switch = {"do_exif_transpose": False}
    loaded = Blip3ImageProcessor(size=SIZE, **(switch if set_by == "attribute" else {}))
    got = loaded(FORMS[form](turned, site), return_tensors="pt", **(switch if set_by == "call" else {}))
    assert_same(got, wanted)


@pytest.mark.parametrize("form", [*FORMS, "PIL"])
@pytest.mark.parametrize("set_by", ["call", "attribute"])
def test_true_turns_everything_once(set_by, form, files, site):
    turned, upright = files
    switch = {"do_exif_transpose": True}
    loaded = Blip3ImageProcessor(size=SIZE, **(switch if set_by == "attribute" else {}))
    given = Image.open(turned) if form == "PIL" else FORMS[form](turned, site)
    got = loaded(given, return_tensors="pt", **(switch if set_by == "call" else {}))
    assert_same(got, loaded(Image.open(upright), return_tensors="pt"))
    if form == "PIL":
        assert given.size == Image.open(turned).size, "the caller's image is not changed"


@pytest.mark.parametrize("value", [None, True, False])
def test_the_switch_is_saved_and_loaded(value, tmp_path):
    Blip3ImageProcessor(do_exif_transpose=value).save_pretrained(tmp_path)
    assert Blip3ImageProcessor.from_pretrained(tmp_path).do_exif_transpose is value
    for other in (True, False):
        loaded = Blip3ImageProcessor.from_pretrained(tmp_path, do_exif_transpose=other)
        assert loaded.do_exif_transpose is other


def test_converted_and_shipped_folders_leave_the_switch_open(tiny_repo, small_model):
    for folder in (tiny_repo, small_model, *SHIPPED):
        assert Blip3ImageProcessor.from_pretrained(folder).do_exif_transpose is None


def test_what_fetch_images_opened_is_turned_later(files, image_processor):
    turned, upright = files
    opened = image_processor.fetch_images([turned])
    for _ in range(2):
        assert_same(image_processor(opened, return_tensors="pt"), image_processor([upright], return_tensors="pt"))
    as_stored = image_processor(opened, do_exif_transpose=False, return_tensors="pt")
    assert as_stored["image_sizes"].tolist() == [[200, 60]]


def exif_of(*entries):
    """EXIF bytes of (tag, type, count, value) entries."""
    tags = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + tags + struct.pack("<I", 0)


ORIENTATION = (0x0112, 3, 1, struct.pack("<HH", 6, 0))
DAMAGED = {
    "resolution as text": (exif_of(ORIENTATION, (0x011A, 2, 4, b"abc\0")), True),
    "cut": (exif_of(ORIENTATION)[:20], False),
    "garbage": (b"Exif\0\0garbage", False),
    "orientation 9": (exif_of((0x0112, 3, 1, struct.pack("<HH", 9, 0))), False),
    "orientation as text": (exif_of((0x0112, 2, 2, b"6\0\0\0")), False),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_exif_refuses_no_image(name, file_format, image_processor):
    exif, is_turned = DAMAGED[name]
    data = encode(Image.new("RGB", (40, 20), "red"), file_format, exif=exif)
    size = (20, 40) if is_turned else (40, 20)
    fetcher = ImageFetcher(ImageLimits())
    assert image_processor(data)["image_sizes"].tolist() == [list(size[::-1])]
    assert ImageSource(data=data).open().size == size
    assert fetcher.fetch_images([base64.b64encode(data).decode()])[0].size == size


# -- the processor, the chat template and the pipeline ----------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_door_of_the_processor(form, files, site, processor):
    turned, upright = files
    prompt = "<image>\nWhat is it?"
    got = processor(text=prompt, images=FORMS[form](turned, site), return_tensors="pt")
    assert_same(got, processor(text=prompt, images=Image.open(upright), return_tensors="pt"))
    stored = processor(text=prompt, images=FORMS[form](turned, site), return_tensors="pt", do_exif_transpose=False)
    assert_same(stored, processor(text=prompt, images=Image.open(turned), return_tensors="pt"))


@pytest.mark.parametrize("form", ["path as text", "URL", "base64"])
def test_the_chat_template_counts_tiles_of_the_upright_image(form, files, site, processor):
    turned, upright = files
    key = {"path as text": "path", "URL": "url", "base64": "base64"}[form]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}

    def inputs_of(part):
        content = [{"type": "image", **part}, {"type": "text", "text": "What is it?"}]
        return processor.apply_chat_template([{"role": "user", "content": content}], **options)

    got = inputs_of({key: FORMS[form](turned, site)})
    assert got["image_sizes"].tolist() == [[60, 200]]
    assert_same(got, inputs_of({"image": Image.open(upright)}))
    assert_same(got, inputs_of({"image": FORMS[form](turned, site)}))


@pytest.mark.parametrize("form", ["path as text", "URL", "base64"])
def test_the_pipeline(form, files, site, tiny_repo, processor):
    turned, upright = files
    pipe = pipeline("image-text-to-text", model=load_model(tiny_repo), processor=processor)
    prompt = "<image>\nWhat is it?"
    got = pipe.preprocess({"images": FORMS[form](turned, site), "text": prompt})
    wanted = processor(text=prompt, images=Image.open(upright), return_tensors="pt")
    for name in ("input_ids", "pixel_values", "image_sizes"):
        assert torch.equal(got[name], wanted[name]), name
    options = {"generate_kwargs": {"max_new_tokens": 4, "do_sample": False}, "return_full_text": False}
    answers = [pipe(images=str(path), text=prompt, **options)[0]["generated_text"] for path in files]
    assert answers[0] == answers[1]


# -- records, training, evaluation, demo ------------------------------------------------------------------------------


def test_records(files, processor, tiny_repo):
    turned, upright = files
    for image in (ImageSource(path=str(turned)), ImageSource(data=turned.read_bytes())):
        assert np.array_equal(pixels(image.open()), pixels(Image.open(upright)))
        assert np.array_equal(pixels(image.open(upright=False)), pixels(Image.open(turned)))
        assert image.size() == (60, 200)
        assert image.size(upright=False) == (200, 60)
        assert open_images([image], processor)[0].size == (200, 60)
    forbidden = AutoProcessor.from_pretrained(tiny_repo, trust_remote_code=True, do_exif_transpose=False)
    assert open_images([ImageSource(path=str(turned))], forbidden)[0].size == (60, 200)


def test_tiff_is_not_turned_twice(tmp_path):
    turned, upright = write_both(tmp_path, "TIFF")
    assert ImageSource(path=str(turned)).size() == (60, 200)
    assert np.array_equal(pixels(ImageSource(path=str(turned)).open()), pixels(Image.open(upright)))


def test_training_samples(files, processor):
    turned, upright = files
    samples = []
    for path in (turned, upright):
        turns = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A photo."))
        samples.append(Encoder(processor, 4096)(Record("a", "instruction", (ImageSource(path=str(path)),), turns)))
    assert_same(*samples)


def test_evaluation(files, tiny_repo):
    from blip3.evaluation.answer import Checkpoint
    from blip3.evaluation.tasks import Question

    checkpoint = Checkpoint(tiny_repo, dtype="float32", device="cpu")
    got, wanted = (
        checkpoint.prepare([Question("a", "<image>", (ImageSource(path=str(path)),), "", {}, {})]) for path in files
    )
    assert_same(got, wanted)


def test_the_demo(files):
    from blip3 import demo

    turned, upright = files
    assert np.array_equal(pixels(demo.open_image(turned)), pixels(Image.open(upright)))


def test_webdataset_and_parquet_shards(files, tmp_path):
    datasets = pytest.importorskip("datasets", reason="pip install -e '.[data]'")
    import tarfile

    from blip3.data.readers import read_captions, stream_rows

    turned, upright = files
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for name, content in ((f"a{turned.suffix}", turned.read_bytes()), ("a.txt", b"A photo.")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    table = {"image": [{"bytes": turned.read_bytes(), "path": None}], "caption": ["A photo."]}
    datasets.Dataset.from_dict(table).to_parquet(str(tmp_path / "shard.parquet"))
    for shard, column in (("shard.tar", "txt"), ("shard.parquet", "caption")):
        (record,) = read_captions(stream_rows(str(tmp_path / shard)), column)
        assert np.array_equal(pixels(record.images[0].open()), pixels(Image.open(upright))), shard


def test_images_in_rows_stay_as_given(files):
    from blip3.data.readers import read_captions

    turned, _ = files
    with Image.open(turned) as image:
        (record,) = read_captions([{"image": image, "caption": "A photo."}])
        assert np.array_equal(pixels(record.images[0].open()), pixels(image))


# -- servers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["base64", "data URL"])
def test_the_servers_fetcher(form, files):
    turned, upright = files
    fetcher = ImageFetcher(ImageLimits())
    source = FORMS[form](turned, "")
    assert np.array_equal(pixels(fetcher.fetch_images([source])[0]), pixels(Image.open(upright)))
    assert np.array_equal(pixels(fetcher.fetch_images([source], upright=False)[0]), pixels(Image.open(turned)))


def test_an_image_body_is_a_file_and_an_image_in_memory_is_not(files):
    turned, upright = files
    fetcher = ImageFetcher(ImageLimits())
    body = Image.open(io.BytesIO(turned.read_bytes()))
    assert np.array_equal(pixels(fetcher.fetch_images([body])[0]), pixels(Image.open(upright)))
    in_memory = ImageOps.exif_transpose(Image.open(turned)).transpose(STORED[6])
    assert np.array_equal(pixels(fetcher.fetch_images([in_memory])[0]), pixels(in_memory))
