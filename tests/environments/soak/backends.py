# SPDX-License-Identifier: Apache-2.0
"""The servers a soak runs, and how a client asks each of them."""

import dataclasses
import http.client
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor

from support import ROOT
from support.serving import Server, local_message, serving

from .cases import NUM_TOKENS, PUBLIC, Case, ImageServer, handler_cases, openai_cases

HERE = Path(__file__).resolve().parent
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
SERVER_SECONDS = 300  # to load
REQUEST_SECONDS = 120

# What each server answers to a bad request; those it accepts are not asked.
SERVE_REFUSALS = {
    "not an image": (500, "Internal Server Error"),
    "cut image": (500, "Internal Server Error"),
    "missing page": (500, "Internal Server Error"),
    "a web page": (500, "Internal Server Error"),
    "unknown parameter": (422, "best_off"),
    "another model": (400, "pinned"),
}
VLLM_REFUSALS = {
    "not an image": (400, ""),
    "cut image": (400, ""),
    "missing page": (422, "404"),
    "a web page": (400, ""),
    "another model": (404, "another"),
    "no length": (400, "max_tokens"),
}


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a server said: an answer with status 200, or an error's text."""

    status: int
    answer: Any


def generate_texts(folder: Path, cases: list[Case], dtype: str) -> dict[str, str]:
    """Answers of `generate` by case, one prompt at a time; cases without parts are left out."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
    texts = {}
    for case in cases:
        if case.parts is None:
            continue
        inputs = processor.apply_chat_template(
            local_message(*case.parts), add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt", do_image_splitting=case.splits,
        ).to(model.dtype)  # fmt: skip
        ids = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
        text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        texts[case.name] = text.strip()
    return texts


class HandlerBackend:
    """`EndpointHandler` in a process of its own, behind a stand-in for the container."""

    dtype = "auto"

    def __init__(self, folder: Path, site: ImageServer):
        ports = ",".join(map(str, (80, 443, *site.ports)))
        self.command = [
            sys.executable,
            "-P",
            str(HERE / "container.py"),
            str(folder),
            "--public",
            PUBLIC,
        ]
        self.environment = {"BLIP3_PICTURE_ALLOWED_PORTS": ports}
        self.cases = handler_cases(site)
        self._local = threading.local()

    def ask(self, server: Server, case: Case) -> Reply:
        """Post one body over this thread's connection."""
        if not hasattr(self._local, "connection"):
            self._local.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=REQUEST_SECONDS)
        is_image = case.is_raw and not case.body.startswith(b"{")
        data = case.body if case.is_raw else json.dumps(case.body).encode()
        headers = {"Content-Type": "image/jpeg" if is_image else "application/json"}
        try:
            self._local.connection.request("POST", "/", data, headers)
            response = self._local.connection.getresponse()
            answer = json.loads(response.read())
        except Exception:
            self._local.connection.close()
            raise
        return Reply(response.status, answer if response.status == 200 else str(answer["error"]))

    @staticmethod
    def text_of(answer: Any) -> str:
        return answer[0]["generated_text"]


class OpenAIBackend:
    """A server that speaks OpenAI's protocol, asked by OpenAI's own client."""

    environment: dict[str, str] = {}

    def __init__(self, command: list[str], model: str, dtype: str, cases: list[Case]):
        self.command, self.model, self.dtype, self.cases = command, model, dtype, cases
        self._local = threading.local()

    def ask(self, server: Server, case: Case) -> Reply:
        """Ask with this thread's client; a stream is read to its end."""
        from openai import APIStatusError

        if getattr(self._local, "client", None) is None:
            self._local.client = server.client()
        arguments = {"model": self.model, "max_tokens": NUM_TOKENS, "temperature": 0} | case.body
        try:
            reply = self._local.client.chat.completions.create(**arguments)
            if not arguments.get("stream"):
                return Reply(200, reply.choices[0].message.content)
            return Reply(200, "".join(chunk.choices[0].delta.content or "" for chunk in reply if chunk.choices))
        except APIStatusError as error:
            if error.status_code >= 500:  # uvicorn closes the connection, and the client would find out too late
                self._local.client = None
            return Reply(error.status_code, f"{error.message} {error.response.text}")

    @staticmethod
    def text_of(answer: Any) -> str:
        return answer.strip()  # vLLM keeps the space before the first word


def transformers_backend(folder: Path, site: ImageServer) -> OpenAIBackend:
    """`transformers serve`: one request after the other, in the order they come."""
    program = str(Path(sys.executable).with_name("transformers"))
    command = [program, "serve", str(folder), "--trust-remote-code", "--device", "cpu"]
    return OpenAIBackend(command, str(folder), "auto", openai_cases(site, SERVE_REFUSALS))


def vllm_backend(folder: Path, site: ImageServer) -> OpenAIBackend:
    """The server of vLLM from the environment of `make test-vllm`, batching what comes together."""
    command = [str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--trust-remote-code", "--served-model-name", "blip3", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-num-seqs", "8", "--limit-mm-per-prompt", '{"image": 4}']
    backend = OpenAIBackend(command, "blip3", "float32", openai_cases(site, VLLM_REFUSALS))
    backend.environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return backend


BACKENDS = {"handler": HandlerBackend, "http": transformers_backend, "vllm": vllm_backend}


@contextmanager
def running(backend: HandlerBackend | OpenAIBackend) -> Iterator[Server]:
    """Run a door's server until the block ends."""
    with tempfile.TemporaryDirectory(prefix="blip3-soak-") as scratch:
        environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch) / "modules")} | backend.environment
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
        with serving(backend.command, Path(scratch), SERVER_SECONDS, environment) as server:
            try:
                yield server
            except Exception:
                log = server.log.read_text(encoding="utf-8", errors="replace")
                print(f"The server's log ends:\n{log[-4000:]}", file=sys.stderr)
                raise
