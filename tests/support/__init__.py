# SPDX-License-Identifier: Apache-2.0
"""Functions several test files use; fixtures are in conftest.py."""

import contextlib
import functools
import io
import sys
import tarfile
import threading
from collections.abc import Iterator, Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText

from blip3.conversion import cli as convert_weights

ROOT = Path(__file__).resolve().parents[2]
RELEASE = ROOT / "configs" / "4b"  # the architecture of the released checkpoints
SHARED = ROOT.parent / "shared"  # facts about the reference, beside the repository; not part of it
IS_TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5

TRL_ARGUMENTS = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "report_to": "none",
    "trust_remote_code": True,
}  # one step of any of TRL's trainers

needs_reference = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the reference fixtures are not beside the repository"
)


def convert(*arguments: object) -> None:
    """Run the converter's command line and expect success."""
    assert convert_weights.main([str(argument) for argument in arguments]) == 0


def load_model(folder: Path, **kwargs: object) -> torch.nn.Module:
    """Load a repository as a user does, in float32."""
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **kwargs)


def render_image(height: int, width: int, seed: int = 0) -> Image.Image:
    """Render smooth random colours: content that survives a resize."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> None:
    """Write a shard of webdataset: the files of each sample side by side, by suffix."""
    with tarfile.open(path, "w") as tar:
        for name, suffix, data in ((n, s, data) for n, files in samples.items() for s, data in files.items()):
            info = tarfile.TarInfo(f"{name}.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


class QuietServer(ThreadingHTTPServer):
    """A server that says nothing when a client hangs up.

    The traceback that the standard one prints in its thread calls `ast.parse`, which before Python 3.11.8 breaks an
    `ast.parse` of the main thread (python/cpython#106905): transformers reading a repository's code, for one.
    """

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class RangeHandler(SimpleHTTPRequestHandler):
    """Serves files as object stores do: the part of a file that is asked for. Notes what was asked."""

    asked: list[str]

    def do_GET(self) -> None:
        """Answer with the bytes of a `Range`, or with the whole file or the list of a folder."""
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range", "")
        if path.is_file():
            self.asked.append(path.name)
        if not path.is_file() or not wanted:
            super().do_GET()
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        data = path.read_bytes()
        part = data[int(first) : int(last or len(data) - 1) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self) -> None:
        """Say that parts may be asked for."""
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *args: object) -> None:
        """Write no log."""


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder over HTTP; gives its URL, and the names of files in the order they are asked for."""
    asked: list[str] = []
    handler = type("Handler", (RangeHandler,), {"asked": asked})
    with QuietServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
