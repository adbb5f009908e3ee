# SPDX-License-Identifier: Apache-2.0
"""What tests of servers share: a folder whose answers are legible, a server process, an OpenAI client."""

import base64
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from blip3.conversion.output_folder import CODE_FILES, ENDPOINT_FILES
from support import ROOT

SMALL_MODEL = ROOT


def silence_bytes(folder: Path) -> Path:
    """Keep a random model from answering in single bytes and markers, by its output bias; returns the folder.

    Random bytes are no UTF-8, which a server that decodes token by token cannot stream. A trained model does not
    write them.
    """
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
    silent = [index for token, index in vocabulary.items() if re.fullmatch(r"<.+>", token)]
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.bias"][silent] = -1e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def beside_the_checkpoint(model: Path) -> Callable[[str, list[str]], set[str]]:
    """What `shutil.copytree` must leave out: around the repository's own checkpoint, everything but its files."""

    def ignored(folder: str, names: list[str]) -> set[str]:
        is_root = Path(folder).resolve() == ROOT
        kept = (".json", ".jinja", ".safetensors")
        return {name for name in names if is_root and not name.endswith(kept)}

    return ignored


def complete_folder(model: Path, folder: Path) -> Path:
    """Copy a checkpoint and whatever it lacks of the files that go with it.

    Args:
        model: the checkpoint; its code may be that of this repository.
        folder: to write below.
    """
    output = Path(shutil.copytree(model, folder / model.resolve().name, ignore=beside_the_checkpoint(model)))
    for name in (*CODE_FILES, *ENDPOINT_FILES):
        if not (output / name).exists():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, output / name)
    return output


def data_url(image: Image.Image) -> str:
    """Write an image as a data URL, without loss."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return url_of_bytes(buffer.getvalue())


def url_of_bytes(data: bytes) -> str:
    """Write a file as the data URL of a PNG, whatever it is."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def user_message(*parts: str | Image.Image) -> list[dict]:
    """A conversation of one message in OpenAI's words: strings are text, images become data URLs."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def local_message(*parts: str | Image.Image) -> list[dict]:
    """The same conversation in transformers' words."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


def free_port() -> int:
    """A loopback port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server process and where it listens."""

    def __init__(self, process: subprocess.Popen, port: int, log: Path):
        self.process, self.port, self.log = process, port, log

    def client(self) -> Any:
        """OpenAI's own client, without retries."""
        from openai import OpenAI

        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=120)

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def wait(self, seconds: float) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: with the end of its log, if it dies or takes longer.
        """
        deadline = time.monotonic() + seconds
        while not self.is_healthy():
            status = self.process.poll()
            if status is not None or time.monotonic() > deadline:
                end = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
                state = f"ended with status {status}" if status is not None else f"did not answer in {seconds} s"
                raise RuntimeError(f"The server {state}. Its log ends:\n{end}")
            time.sleep(0.5)

    def stop(self, seconds: float = 60) -> int:
        """Ask it to end as Ctrl-C does, and return its exit status; kill its whole group if it does not."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()


@contextmanager
def serving(command: list[str], folder: Path, seconds: float, environment: dict | None = None) -> Iterator[Server]:
    """Run `command --port PORT` in a session of its own until the block ends.

    Args:
        command: without the port.
        folder: for its log.
        seconds: to wait for its first answer.
        environment: variables to add.
    """
    port, log = free_port(), folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
    server = Server(process, port, log)
    try:
        server.wait(seconds)
        yield server
    finally:
        server.stop()
