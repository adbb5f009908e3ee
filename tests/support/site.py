# SPDX-License-Identifier: Apache-2.0
"""What tests of images from strangers share: a public site with bad manners, a trap, and what a refusal looks like.

Servers run on loopback. The guard takes PUBLIC for a public address; on PRIVATE a trap counts who connects.
"""

import base64
import dataclasses
import io
import ssl
import threading
import zlib
from http.server import BaseHTTPRequestHandler

import pytest
from hypothesis import settings

from blip3.serving.fetch import ImageFetcher, resolve_with_system
from blip3.serving.limits import ImageLimits
from support import QuietServer, render_image

PUBLIC, PRIVATE = "127.0.0.5", "127.0.0.1"
LIMITS = ImageLimits(
    connect_seconds=10.0, total_seconds=20.0, max_bytes=300_000, max_side=2_000, max_pixels=1_000_000,
    max_total_pixels=1_500_000, max_images=4,
)  # fmt: skip
IMPATIENT = dataclasses.replace(LIMITS, connect_seconds=0.4, total_seconds=0.8)
NAMES = {
    "images.test": [PUBLIC],
    "private.test": [PRIVATE],
    "mixed.test": [PUBLIC, PRIVATE],
    "mapped.test": ["::ffff:127.0.0.5"],
    "metadata.google.internal": ["169.254.169.254"],
    "nonsense.test": ["not an address"],
    "scoped.test": ["fe80::1%lo"],
    "missing.test": [],
}


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def data_url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


IMAGE = encode(render_image(60, 80))


RANDOM = settings(max_examples=1000, deadline=None, derandomize=True, database=None)

TLS = ssl.create_default_context()
OFFLINE = ImageFetcher(LIMITS, (), lambda host, port: [PRIVATE], TLS)  # knows no public host


class Site(BaseHTTPRequestHandler):
    """A public server with good images and bad manners."""

    def log_message(self, *arguments):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.requests.append((self.path, self.headers))
        route, _, query = self.path.partition("?")
        try:
            getattr(self, "get_" + route.strip("/").replace("-", "_").replace(".png", ""))(query)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def get_ok(self, query):
        self.answer(200, IMAGE, Content_Type="text/plain")  # the decoder decides, not the header

    def get_to(self, query):
        self.answer(302, Location=self.server.locations[query])

    def get_hops(self, query):
        number = int(query)
        self.answer(301, Location=f"/hops?{number - 1}" if number else "/ok.png")

    def get_chunked(self, query):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in (IMAGE[:100], IMAGE[100:], b""):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))

    def get_endless_chunks(self, query):
        self.answer(200, Transfer_Encoding="chunked")
        while True:
            self.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")

    def get_endless(self, query):
        self.answer(200)
        while True:
            self.wfile.write(bytes(65536))

    def get_huge(self, query):
        self.answer(200, IMAGE, Content_Length="1000000000000")

    def get_drip(self, query):
        self.answer(200, Content_Length="1000")
        while not self.server.stopped.wait(0.05):
            self.wfile.write(b"x")

    def get_drip_headers(self, query):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not self.server.stopped.wait(0.05):
            self.wfile.write(b"x")

    def get_continue(self, query):
        while not self.server.stopped.wait(0.001):
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def get_silent(self, query):
        self.server.stopped.wait(10)

    def get_gzip(self, query):
        self.answer(200, zlib.compress(IMAGE), Content_Encoding="gzip")

    def get_html(self, query):
        self.answer(200, b"<html><body>secret</body></html>", Content_Type="image/png")

    def get_svg(self, query):
        self.answer(200, b'<svg xmlns="http://www.w3.org/2000/svg"/>', Content_Type="image/svg+xml")

    def get_gone(self, query):
        self.answer(404, b"secret")

    def get_empty(self, query):
        self.answer(200)

    def get_cut(self, query):
        self.answer(200, IMAGE[:-200], Content_Length=str(len(IMAGE)))

    def get_garbage(self, query):
        self.wfile.write(b"\x00\xff SSH-2.0 not http\r\n\r\n")

    def get_many_headers(self, query):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n")


def start(address):
    server = QuietServer((address, 0), Site)
    server.daemon_threads, server.block_on_close = True, False
    server.requests, server.locations, server.stopped = [], {}, threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def resolve(host, port):
    return NAMES[host] if host in NAMES else resolve_with_system(host, port)


def refused(fetcher, source, match):
    """Expect one short ValueError that repeats little of what was sent."""
    with pytest.raises(ValueError, match=match) as caught:
        fetcher.fetch_images(source if isinstance(source, list) else [source])
    message = str(caught.value)
    assert caught.type is ValueError
    assert "probably" in message
    assert "\n" not in message
    assert "secret" not in message
    assert len(message) < 500
    return message


def opened_or_refused(fetcher, source):
    refusal = None
    try:
        fetcher.fetch_images([source])
    except ValueError as error:
        refusal = error
    assert type(refusal) in (ValueError, type(None))
    assert refusal is None or "probably" in str(refusal)
    assert str(refusal).isprintable(), str(refusal)
    assert len(str(refusal)) < 500
