# SPDX-License-Identifier: Apache-2.0
"""What the clients of a soak ask: good requests of many sizes, and bad ones with the refusal each must get."""

import base64
import io
import json
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler

from PIL import Image

from support import QuietServer, render_image
from support.hostile import SLOW_FILES
from support.serving import data_url, url_of_bytes, user_message

PUBLIC, PRIVATE = "127.0.0.5", "127.0.0.1"  # the guard is told to take PUBLIC for a public address
NUM_TOKENS = 16
QUESTION = "What is in the image?"
SIZES = {  # height, width
    "tiny": (12, 9), "square": (150, 150), "wide": (60, 300), "high": (300, 70), "page": (1100, 850),
    "screen": (720, 1280), "photo": (1500, 2000),
}  # fmt: skip


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


IMAGES = {name: render_image(*size, seed=seed) for seed, (name, size) in enumerate(SIZES.items())}
PHOTO = Image.open(io.BytesIO(encode(IMAGES["photo"], "JPEG")))  # as the servers decode it
FILES = {"wide.png": encode(IMAGES["wide"]), "photo.jpg": encode(IMAGES["photo"], "JPEG"), "cut.png": b""}
FILES["cut.png"] = FILES["wide.png"][: len(FILES["wide.png"]) // 2]


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        name: unique.
        body: of the handler, or arguments of OpenAI's `chat.completions.create`.
        parts: texts and images of a user's turn that `generate` must answer the same way; None is not compared.
        refusal: what an answer's error must hold, None for a good request.
        status: of the refusal.
        is_raw: the body is sent as it is: bytes, not JSON.
        splits: `do_image_splitting` of the comparison.
    """

    name: str
    body: object
    parts: tuple[str | Image.Image, ...] | None = None
    refusal: str | None = None
    status: int = 400
    is_raw: bool = False
    splits: bool = True


# -- Images by URL --------------------------------------------------------------------------------------------------


class ImageServer:
    """Images, redirects and bad answers on PUBLIC; on PRIVATE a trap that counts who connects."""

    def __init__(self) -> None:
        outer = self
        self.trapped = 0

        class Site(BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                outer.answer(self)

        class Trap(BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                outer.trapped += 1
                self.send_error(418)

        self.servers = [QuietServer((PUBLIC, 0), Site), QuietServer((PRIVATE, 0), Trap)]
        self.url, self.private_url = (f"http://{s.server_address[0]}:{s.server_address[1]}" for s in self.servers)
        self.ports = [server.server_address[1] for server in self.servers]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path[1:]
        if name.startswith("to-"):
            target = self.private_url if name == "to-private" else f"{self.url}/wide.png"
            request.send_response(302)
            request.send_header("Location", target)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        body = FILES.get(name, b"<html>No such image.</html>")
        request.send_response(200 if name in FILES or name == "page.html" else 404)
        request.send_header("Content-Type", "image/png" if name in FILES else "text/html")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


@contextmanager
def image_server() -> Iterator[ImageServer]:
    """Run a `ImageServer` until the block ends."""
    site = ImageServer()
    threads = [threading.Thread(target=server.serve_forever, daemon=True) for server in site.servers]
    for thread in threads:
        thread.start()
    try:
        yield site
    finally:
        for server in site.servers:
            server.shutdown()
            server.server_close()


# -- The handler ------------------------------------------------------------------------------------------------------


def bomb() -> str:
    """A PNG of a few bytes that says it has 8,000 x 8,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8_000, 8_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return url_of_bytes(data)


def handler_cases(site: ImageServer) -> list[Case]:
    """Requests to `EndpointHandler`."""
    greedy = {"max_new_tokens": NUM_TOKENS, "do_sample": False}
    urls = {name: data_url(image) for name, image in IMAGES.items()}

    def good(name: str, inputs: object, *parts: str | Image.Image, **parameters: object) -> Case:
        splits = bool(parameters.get("do_image_splitting", True))
        body = {"inputs": inputs, "parameters": greedy | parameters}
        return Case(name, body, parts or None, splits=splits)

    def bad(name: str, refusal: str, inputs: object, **parameters: object) -> Case:
        return Case(name, {"inputs": inputs, "parameters": greedy | parameters}, refusal=refusal)

    def look(url: str) -> dict:
        return {"image": url, "text": QUESTION}

    turns = [
        *user_message(IMAGES["wide"], QUESTION),
        {"role": "assistant", "content": "A red square."},
        *user_message("Are you sure?", IMAGES["tiny"]),
    ]
    three = [{"images": [urls["wide"], urls["high"]], "text": "Is <image> above <image>?"}, look(urls["page"]), "Hi"]
    return [
        good("text", "How many dogs are there?", "How many dogs are there?"),
        *(good(f"one image, {name}", look(url), IMAGES[name], QUESTION) for name, url in urls.items()),
        good("by URL", look(f"{site.url}/wide.png"), IMAGES["wide"], QUESTION),
        good("by URL, JPEG", look(f"{site.url}/photo.jpg"), PHOTO, QUESTION),
        good("by redirect", look(f"{site.url}/to-wide"), IMAGES["wide"], QUESTION),
        good("two images", three[0], "Is ", IMAGES["wide"], " above ", IMAGES["high"], "?"),
        good("eight images", {"images": [*urls.values(), urls["tiny"]], "text": "Compare."}),
        good("a conversation", {"messages": turns}),
        good("three rows", three),
        good("global view", look(urls["page"]), IMAGES["page"], QUESTION, do_image_splitting=False),
        good("sampled", look(urls["high"]), do_sample=True, temperature=1.0, seed=7),
        Case("image body", FILES["photo.jpg"], is_raw=True),
        bad("broken base64", "base64", look(urls["wide"][:-3] + "!")),
        bad("cut image", "could not be decoded", look(url_of_bytes(FILES["cut.png"]))),
        bad("bomb", "8000 x 8000", look(bomb())),
        bad("not an image", "not the beginning of a", look("data:image/png;base64,AAAA")),
        bad("cut image by URL", "could not be decoded", look(f"{site.url}/cut.png")),
        bad("missing page", "status 404", look(f"{site.url}/none.png")),
        bad("a web page", "not the beginning of a", look(f"{site.url}/page.html")),
        bad("private address", "not public", look(f"{site.private_url}/secret.png")),
        bad("redirect to a private address", "not public", look(f"{site.url}/to-private")),
        bad("metadata address", "not public", look("http://169.254.169.254/latest/meta-data")),
        bad("file", "scheme 'file'", look("file:///etc/passwd")),
        bad("path", "never opened", look("/etc/passwd")),
        bad("17 images", "at most 16", {"images": [urls["tiny"]] * 17, "text": "Compare."}),
        bad("one slot too many", "2 <image> and 1 images", {"image": urls["tiny"], "text": "<image> <image>"}),
        bad("unknown parameter", "'best_of'", "Hello", best_of=2),
        bad("absurd length", "max_new_tokens", "Hello", max_new_tokens=10**9),
        bad("too long a prompt", "reads ", "word " * 6000),
        bad("no rows", "inputs", []),
        bad("unknown role", "role 'tool'", {"messages": [{"role": "tool", "content": "Hello"}]}),
        Case("not JSON", b'{"inputs": ', refusal="JSON", is_raw=True),
    ]


HOSTILE_BYTES = 2**19  # of each file
SIXTEEN = ("JPEG, padding", "JPEG, comments", "PNG, empty chunks", "BMP, runs")  # as many as a body may name


def hostile_cases() -> list[Case]:
    """Requests to `EndpointHandler` with files that are built to take long; some name 16."""
    cases = []
    for name, (make, _) in SLOW_FILES.items():
        text = base64.b64encode(make(HOSTILE_BYTES)).decode()
        for count in (1, 16) if name in SIXTEEN else (1,):
            body = json.dumps({"inputs": {"images": [text] * count, "text": QUESTION}}).encode()
            cases.append(Case(f"{name}, {count}", body, refusal=f"Image 1 of {count}: it", is_raw=True))
    return cases


# -- OpenAI's servers -------------------------------------------------------------------------------------------------


def openai_cases(site: ImageServer, refusals: dict[str, tuple[int, str]]) -> list[Case]:
    """Requests to an OpenAI server.

    Args:
        site: serves images.
        refusals: status and error of the bad requests that this server refuses, by name.
    """

    def good(name: str, *parts: str | Image.Image, **options: object) -> Case:
        return Case(name, {"messages": user_message(*parts), **options}, parts)

    def by_url(name: str) -> list[dict]:
        parts = [{"type": "image_url", "image_url": {"url": name}}, {"type": "text", "text": QUESTION}]
        return [{"role": "user", "content": parts}]

    bad = {
        "not an image": {"messages": by_url("data:image/png;base64,AAAA")},
        "cut image": {"messages": by_url(url_of_bytes(FILES["cut.png"]))},
        "missing page": {"messages": by_url(f"{site.url}/none.png")},
        "a web page": {"messages": by_url(f"{site.url}/page.html")},
        "unknown parameter": {"messages": user_message("Hello"), "extra_body": {"best_off": 2}},
        "another model": {"messages": user_message("Hello"), "model": "another"},
        "no length": {"messages": user_message("Hello"), "max_tokens": -1},
    }
    return [
        good("text", "How many dogs are there?"),
        *(good(f"one image, {name}", image, QUESTION) for name, image in IMAGES.items()),
        good("two images", "Is", IMAGES["wide"], "above", IMAGES["high"], "or not?"),
        good(
            "three images, streamed",
            *(part for n in ("tiny", "page", "wide") for part in (f"Image {n}:", IMAGES[n])),
            "What does the second image show?",
            stream=True,
        ),
        good("streamed", IMAGES["screen"], QUESTION, stream=True),
        Case("by URL", {"messages": by_url(f"{site.url}/wide.png")}, (IMAGES["wide"], QUESTION)),
        Case("by URL, JPEG", {"messages": by_url(f"{site.url}/photo.jpg")}, (PHOTO, QUESTION)),
        *(Case(name, bad[name], refusal=error, status=status) for name, (status, error) in refusals.items()),
    ]
