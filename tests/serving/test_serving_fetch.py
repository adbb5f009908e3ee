# SPDX-License-Identifier: Apache-2.0
"""Attacks on the image fetcher, by name: forged addresses, redirects, slow servers, bombs; and images that pass.

Servers run on loopback. The guard takes PUBLIC for a public address; on PRIVATE a trap counts who connects.
"""

import base64
import dataclasses
import doctest
import io
import ipaddress
import logging
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from blip3.serving import images
from blip3.serving.images import ImageFetcher, ImageLimits, is_public, read_limits, resolve_with_system
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


@pytest.fixture(scope="module")
def servers():
    """A public site, and a trap that nobody may connect to."""
    site, trap = start(PUBLIC), start(PRIVATE)
    yield site, trap
    for server in (site, trap):
        server.stopped.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def site(servers):
    """The public site's address; the trap must stay empty."""
    yield f"http://{PUBLIC}:{servers[0].server_port}"
    assert servers[1].requests == []


def resolve(host, port):
    return NAMES[host] if host in NAMES else resolve_with_system(host, port)


@pytest.fixture(scope="module")
def fetcher(servers):
    ports = (80, 443, *(server.server_port for server in servers))
    return ImageFetcher(dataclasses.replace(LIMITS, allowed_ports=ports), [PUBLIC], resolve)


@pytest.fixture(scope="module")
def impatient(servers):
    return ImageFetcher(dataclasses.replace(IMPATIENT, allowed_ports=(servers[0].server_port,)), [PUBLIC])


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


# -- Images that pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "MPO"])
def test_every_format_passes(fetcher, kind):
    [image] = fetcher.fetch_images([data_url(encode(render_image(60, 80), kind))])
    assert image.size == (80, 60)


@pytest.mark.parametrize("path", ["/ok.png", "/chunked", "/hops?2", "/ok.png?a=b&c=%20#fragment", "/ok.png?ä=[ö]"])
def test_a_remote_image_passes(fetcher, site, path):
    [image] = fetcher.fetch_images([site + path])
    assert image.convert("RGB").tobytes() == render_image(60, 80).tobytes()


def test_order_names_and_headers(fetcher, servers, site):
    """Several images keep their order; the server learns the host asked for and nothing about us."""
    port = servers[0].server_port
    other = render_image(30, 40, seed=1)
    remote, plain = f"http://images.test:{port}/ok.png", base64.b64encode(IMAGE).decode()
    sources = [data_url(encode(other)), remote, plain, other]
    assert [image.size for image in fetcher.fetch_images(sources)] == [(40, 30), (80, 60), (80, 60), (40, 30)]
    headers = dict(servers[0].requests[-1][1])
    assert headers.pop("Host") == f"images.test:{port}"
    assert set(headers) == {"User-Agent", "Accept", "Accept-Encoding", "Connection"}


def test_proxies_of_the_environment_are_not_used(fetcher, servers, site, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, f"http://{PRIVATE}:{servers[1].server_port}")
    assert fetcher.fetch_images([site + "/ok.png"])


def test_urls_are_not_logged(fetcher, site, caplog):
    with caplog.at_level(logging.DEBUG):
        fetcher.fetch_images([site + "/ok.png?token=secret"])
        refused(fetcher, site + "/gone?token=secret", "404")
    assert "fetched url sha256" in caplog.text
    assert "secret" not in caplog.text


# -- Addresses --------------------------------------------------------------------------------------------------------

HOSTS = {
    "loopback": "127.0.0.1",
    "loopback-other": "127.0.0.6",
    "loopback-short": "127.1",
    "loopback-decimal": "2130706433",
    "loopback-hex": "0x7f000001",
    "loopback-hex-dotted": "0x7f.0.0.1",
    "loopback-octal": "017700000001",
    "loopback-full-width": "１２７.0.0.1",  # noqa: RUF001
    "loopback-ideographic-dots": "127。0。0。1",
    "localhost": "localhost",
    "localhost-capitals": "LOCALHOST",
    "localhost-dot": "localhost.",
    "loopback-6": "[::1]",
    "loopback-6-long": "[0:0:0:0:0:0:0:1]",
    "unspecified": "0.0.0.0",
    "unspecified-short": "0",
    "unspecified-6": "[::]",
    "private-10": "10.0.0.1",
    "private-172": "172.16.0.1",
    "private-192": "192.168.0.1",
    "cgnat": "100.64.0.1",
    "link-local": "169.254.1.1",
    "link-local-6": "[fe80::1]",
    "unique-local-6": "[fd12:3456::1]",
    "site-local-6": "[fec0::1]",
    "multicast": "224.0.0.1",
    "multicast-6": "[ff02::1]",
    "multicast-6-global": "[ff0e::1]",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "benchmarking": "198.18.0.1",
    "documentation": "203.0.113.7",
    "documentation-6": "[2001:db8::1]",
    "metadata": "169.254.169.254",
    "metadata-aws-6": "[fd00:ec2::254]",
    "metadata-alibaba": "100.100.100.200",
    "metadata-oracle": "192.0.0.192",
    "metadata-azure": "168.63.129.16",
    "metadata-by-name": "metadata.google.internal",
    "mapped": "[::ffff:127.0.0.1]",
    "mapped-of-the-public-one": "[::ffff:127.0.0.5]",
    "mapped-global": "[::ffff:8.8.8.8]",
    "compatible": "[::7f00:1]",
    "6to4": "[2002:7f00:1::]",
    "nat64": "[64:ff9b::7f00:1]",
    "nat64-local": "[64:ff9b:1::7f00:1]",
    "teredo": "[2001:0:7f00:1::]",
    "isatap": "[2a00::5efe:7f00:1]",
    "name-of-a-private-address": "private.test",
    "name-of-both": "mixed.test",
    "name-of-a-mapped-address": "mapped.test",
    "name-of-a-scoped-address": "scoped.test",
    "name-of-nonsense": "nonsense.test",
    "name-of-nothing": "missing.test",
}


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS.keys())
@pytest.mark.parametrize("how", ["direct", "redirected"])
def test_no_address_but_public_ones(fetcher, servers, site, host, how):
    url = f"http://{host}:{servers[1].server_port}/ok.png"
    if how == "redirected":
        servers[0].locations["host"] = url.encode().decode("latin-1")
        url = site + "/to?host"
    message = refused(fetcher, url, "is not public")
    assert "169.254" not in message
    assert PRIVATE not in message


def test_public_addresses_are_public():
    for address in ("8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700:4700::1111", "2a00:1450::1"):
        assert is_public(ipaddress.ip_address(address)), address
    for host in HOSTS.values():
        try:
            address = ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            continue
        assert not is_public(address), host
    assert not is_public(ipaddress.ip_address("2606:4700:4700::1111%eth0"))


def test_rebinding_changes_nothing_between_check_and_connection(servers, site):
    answers = iter([[PUBLIC], [PRIVATE]])
    ports = (servers[0].server_port, servers[1].server_port)
    limits = dataclasses.replace(LIMITS, allowed_ports=ports)
    rebinding = ImageFetcher(limits, [PUBLIC], lambda host, port: next(answers))
    assert rebinding.fetch_images([f"http://rebinding.test:{ports[0]}/ok.png"])  # one lookup, one connection
    refused(rebinding, f"http://rebinding.test:{ports[0]}/ok.png", "is not public")


def test_rebinding_across_a_redirect_to_the_same_host(servers, site):
    answers = iter([[PUBLIC], [PRIVATE]])
    limits = dataclasses.replace(LIMITS, allowed_ports=(servers[0].server_port,))
    rebinding = ImageFetcher(limits, [PUBLIC], lambda host, port: next(answers))
    refused(rebinding, f"http://rebinding.test:{servers[0].server_port}/hops?1", "is not public")


def test_the_connection_goes_to_the_checked_address_only(fetcher, servers, site, monkeypatch):
    """No name reaches the socket, so no second lookup can happen."""
    connected = []

    class Recorder(socket.socket):
        def connect(self, address):
            connected.append(address)
            return super().connect(address)

    monkeypatch.setattr(images.socket, "socket", Recorder)
    fetcher.fetch_images([f"http://images.test:{servers[0].server_port}/ok.png"])
    assert connected == [(PUBLIC, servers[0].server_port)]


def test_only_loopback_can_be_opened_and_only_by_argument(monkeypatch):
    with pytest.raises(ValueError, match="loopback addresses only"):
        ImageFetcher(public_loopback=["10.0.0.1"])
    monkeypatch.setenv("BLIP3_PICTURE_PUBLIC_LOOPBACK", PRIVATE)
    assert not ImageFetcher()._public_loopback


# -- URLs and redirects -----------------------------------------------------------------------------------------------

URLS = {
    "file": ("file:///etc/passwd", "scheme"),
    "file-capitals": ("FILE:///etc/passwd", "scheme"),
    "file-host": ("file://localhost/etc/passwd", "scheme"),
    "ftp": ("ftp://images.test/a.png", "scheme"),
    "gopher": ("gopher://127.0.0.1:70/_x", "scheme"),
    "javascript": ("javascript:secret", "scheme"),
    "drive": ("C:\\secret.png", "scheme"),
    "absolute-path": ("/etc/passwd", "neither"),
    "relative-path": ("../secret.png", "neither"),
    "home-path": ("~/secret.png", "neither"),
    "network-path": ("//127.0.0.1/secret.png", "neither"),
    "device": ("/dev/zero", "neither"),
    "null-byte": ("\0secret", "neither"),
    "port-ssh": ("http://images.test:22/", "port 22"),
    "port-redis": ("http://images.test:6379/", "port 6379"),
    "port-zero": ("http://images.test:0/", "port 0"),
    "port-too-high": ("http://images.test:99999/", "no valid host or port"),
    "port-word": ("http://images.test:secret/", "no valid host or port"),
    "credentials": ("http://user:secret@images.test/", "user name or password"),
    "user": ("http://secret@images.test/", "user name or password"),
    "empty-user": ("http://@images.test/", "user name or password"),
    "backslash": ("http://images.test\\@127.0.0.1/", "backslashes"),
    "line-break": ("http://images.test/\r\nHost: secret", "controls"),
    "space": ("http://images.test/a secret", "spaces"),
    "long": ("http://images.test/" + "a" * 3000, "3021 characters"),
    "no-host": ("http:///a.png", "no valid host"),
    "no-slashes": ("http:images.test", "no valid host"),
    "only-scheme": ("http://", "no valid host"),
    "percent-host": ("http://%31%32%37.0.0.1/", "no valid host"),
    "broken-brackets": ("http://[::1/", "no valid host"),
    "zone": ("http://[fe80::1%25lo]/", "(no valid host|is not public)"),
    "long-label": ("http://" + "ä" * 100 + ".test/", "no valid host"),
    "surrogate": ("http://\ud800.test/", "no valid host"),
    "data-text": ("data:text/html;base64,PGI+", "image/"),
    "data-percent": ("data:image/png,%89PNG", "image/"),
    "data-no-comma": ("data:image/png;base64", "not the beginning"),
    "data-long-header": ("data:image/" + "a" * 5000 + ";base64,AAAA", "image/"),
}


@pytest.mark.parametrize(("url", "match"), URLS.values(), ids=URLS.keys())
def test_urls_that_are_refused(fetcher, site, monkeypatch, url, match):
    monkeypatch.setattr("builtins.open", lambda *arguments, **options: pytest.fail("a file was opened"))
    refused(fetcher, url, match)


LOCATIONS = {
    "to-a-file": ("file:///etc/passwd", "scheme"),
    "to-data": (data_url(IMAGE), "scheme"),
    "to-ftp": ("ftp://images.test/", "scheme"),
    "to-another-port": ("http://images.test:22/", "port 22"),
    "to-credentials": ("http://user:secret@images.test/", "user name or password"),
    "to-localhost-without-scheme": ("//localhost/secret", "is not public"),
    "to-nothing": ("", "no valid URL"),
    "to-itself": ("/to?to-itself", "more than 3 redirects"),
    "to-broken-brackets": ("http://[::1/", "no valid"),
    "too-often": ("/hops?3", "more than 3 redirects"),
}


@pytest.mark.parametrize(("location", "match"), LOCATIONS.values(), ids=LOCATIONS.keys())
def test_redirects_that_are_refused(fetcher, servers, site, request, location, match):
    name = request.node.callspec.id
    servers[0].locations[name] = location
    refused(fetcher, f"{site}/to?{name}", match)


def test_remote_images_can_be_switched_off(site):
    offline = ImageFetcher(dataclasses.replace(LIMITS, allow_remote=False), [PUBLIC])
    refused(offline, "http://images.test/ok.png", "no remote images")
    assert offline.fetch_images([data_url(IMAGE)])


# -- Servers ----------------------------------------------------------------------------------------------------------

ANSWERS = {
    "endless": "300000 bytes",
    "endless-chunks": "300000 bytes",
    "huge": "300000 bytes",
    "gzip": "gzip",
    "html": "not the beginning",
    "svg": "not the beginning",
    "empty": "not the beginning",
    "gone": "404",
    "cut": "could not be decoded",
    "garbage": "BadStatusLine",
    "many-headers": "HTTPException",
}


@pytest.mark.parametrize(("path", "match"), ANSWERS.items(), ids=ANSWERS.keys())
def test_servers_that_are_given_up(fetcher, site, path, match):
    refused(fetcher, f"{site}/{path}", match)


@pytest.mark.parametrize("path", ["silent", "drip", "drip-headers", "continue", "to?drip"])
def test_slow_servers_are_given_up(impatient, servers, site, path):
    servers[0].locations["drip"] = "/drip"
    begin = time.monotonic()
    refused(impatient, f"{site}/{path}", "in time")
    assert time.monotonic() - begin < 2 * IMPATIENT.total_seconds


def test_time_is_shared_by_all_images(impatient, site):
    begin = time.monotonic()
    refused(impatient, [data_url(IMAGE), f"{site}/drip", f"{site}/drip"], "Image 2 of 3")
    assert time.monotonic() - begin < 2 * IMPATIENT.total_seconds


def test_a_slow_resolver_is_given_up():
    release = threading.Event()
    limits = dataclasses.replace(LIMITS, connect_seconds=0.1)
    slow = ImageFetcher(limits, [PUBLIC], lambda host, port: release.wait(20) and [PUBLIC])
    begin = time.monotonic()
    for _ in range(9):  # more than may hang at once
        refused(slow, "http://slow.test/", "in time")
    release.set()
    assert time.monotonic() - begin < 9 * 2 * limits.connect_seconds


def test_a_server_that_is_down():
    with socket.create_server((PUBLIC, 0)) as free:
        port = free.getsockname()[1]
    down = ImageFetcher(dataclasses.replace(LIMITS, allowed_ports=(port,)), [PUBLIC])
    refused(down, f"http://{PUBLIC}:{port}/", "ConnectionRefusedError")


def test_a_silent_tls_server_is_given_up():
    with socket.create_server((PUBLIC, 0)) as silent:
        port = silent.getsockname()[1]
        limited = ImageFetcher(dataclasses.replace(IMPATIENT, allowed_ports=(port,)), [PUBLIC])
        refused(limited, f"https://{PUBLIC}:{port}/", "in time")


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """A TLS server that proves to be images.test; its port and a context that trusts it."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl program makes the certificate and is not installed")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", folder / "key", "-out",
         folder / "cert", "-days", "2", "-subj", "/CN=images.test", "-addext", "subjectAltName=DNS:images.test"],
        check=True, capture_output=True,
    )  # fmt: skip
    server = start(PUBLIC)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert", folder / "key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    yield server.server_port, ssl.create_default_context(cafile=folder / "cert")
    server.shutdown()
    server.server_close()


def test_tls_verifies_the_name_and_not_the_address(tls):
    port, trusting = tls
    limits = dataclasses.replace(LIMITS, allowed_ports=(port,))
    fetcher = ImageFetcher(limits, [PUBLIC], lambda host, port: [PUBLIC], trusting)
    assert fetcher.fetch_images([f"https://images.test:{port}/ok.png"])
    refused(fetcher, f"https://other.test:{port}/ok.png", "by TLS")
    refused(fetcher, f"https://{PUBLIC}:{port}/ok.png", "by TLS")
    distrusting = ImageFetcher(limits, [PUBLIC], lambda host, port: [PUBLIC])
    refused(distrusting, f"https://images.test:{port}/ok.png", "by TLS")
    refused(fetcher, f"http://images.test:{port}/ok.png", "could not be read|status 400")


def test_doctests():
    assert doctest.testmod(images).failed == 0


# -- Files ------------------------------------------------------------------------------------------------------------


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_claimed_size(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(9)))


def png_with_text_bomb():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("x", "y" * 5_000_000, zip=True)
    return encode(Image.new("L", (2, 2)), pnginfo=texts)


def gif_with_large_frame():
    data = bytearray(encode(Image.new("L", (4, 4)), "GIF"))
    place = data.index(b"\x2c")  # the frame's own size, larger than the screen's
    data[place + 5 : place + 9] = struct.pack("<HH", 60_000, 60_000)
    return bytes(data)


def jpeg_of_many_scans():
    data = encode(render_image(200, 200), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * 100 + data[-2:]


FILES = {
    "bomb-flat-png": (lambda: encode(Image.new("1", (1400, 1400))), "1400 x 1400"),
    "bomb-flat-webp": (lambda: encode(Image.new("RGB", (1400, 1400)), "WEBP"), "1400 x 1400"),
    "bomb-claimed-size": (lambda: png_of_claimed_size(2**31 - 1, 2**31 - 1), "not the beginning"),
    "bomb-claimed-13000": (lambda: png_of_claimed_size(13_000, 13_000), "13000 x 13000"),
    "bomb-text-chunk": (png_with_text_bomb, "not the beginning|could not be decoded"),
    "bomb-gif-frame": (gif_with_large_frame, "60000|not the beginning"),
    "bomb-jpeg-scans": (jpeg_of_many_scans, "more than 32 scans"),
    "too-wide": (lambda: encode(Image.new("1", (2001, 1))), "1 x 2001"),
    "too-high": (lambda: encode(Image.new("1", (1, 2001))), "2001 x 1"),
    "too-many-bytes": (lambda: IMAGE + bytes(300_000), "300000 bytes"),
    "claimed-size-cut": (lambda: png_of_claimed_size(900, 900), "could not be decoded"),
    "cut": (lambda: IMAGE[: len(IMAGE) // 2], "could not be decoded"),
    "header-only": (lambda: IMAGE[:8], "not the beginning"),
    "nothing": (lambda: b"", "not the beginning"),
    "noise": (lambda: bytes(range(256)), "not the beginning"),
    "tiff": (lambda: encode(render_image(8, 8), "TIFF"), "not the beginning"),
    "ico": (lambda: encode(render_image(16, 16), "ICO"), "not the beginning"),
    "ppm": (lambda: encode(render_image(8, 8), "PPM"), "not the beginning"),
    "eps": (lambda: encode(render_image(8, 8), "EPS"), "not the beginning"),
    "pdf": (lambda: encode(render_image(8, 8), "PDF"), "not the beginning"),
    "svg": (lambda: b"<svg><image href='file:///etc/passwd'/></svg>", "not the beginning"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("make", "match"), FILES.values(), ids=FILES.keys())
def test_files_that_are_refused(fetcher, make, match):
    refused(fetcher, data_url(make()), match)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", ["bomb-flat-png", "bomb-claimed-13000", "bomb-jpeg-scans", "cut", "tiff", "ppm"])
def test_bodies_that_a_container_opened_are_checked_again(fetcher, name):
    make, match = FILES[name]
    refused(fetcher, Image.open(io.BytesIO(make())), match)


def test_an_opened_file_of_another_kind_is_refused(fetcher, tmp_path):
    for kind, match in (("tiff", "'TIFF'"), ("png", "1400 x 1400")):
        path = tmp_path / f"image.{kind}"
        Image.new("1", (1400, 1400) if kind == "png" else (4, 4)).save(path)
        with Image.open(path) as image:
            refused(fetcher, image, match)


BASE64 = base64.b64encode(IMAGE).decode()
TEXTS = {
    "line-breaks": BASE64[:76] + "\n" + BASE64[76:],
    "spaces": BASE64[:76] + " " + BASE64[76:],
    "no-padding": base64.b64encode(IMAGE[:100]).decode().rstrip("="),
    "url-safe": "-_" + BASE64[2:],
    "percent": BASE64[:-4] + "%3D%3D",
    "inner-padding": "QQ==" + BASE64,
    "other-letters": "ÄÖÜß" * 4,
    "too-long": "A" * 400_004,
}


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_base64_is_strict(fetcher, prefix, text):
    refused(fetcher, prefix + text, "nor base64|300000 bytes")


def test_too_long_base64_is_not_decoded(fetcher, monkeypatch):
    monkeypatch.setattr(base64, "b64decode", lambda *arguments, **options: pytest.fail("it was decoded"))
    refused(fetcher, "data:image/png;base64," + TEXTS["too-long"], "300000 bytes")


def test_counts_of_a_request(fetcher):
    assert len(fetcher.fetch_images([data_url(IMAGE)] * 4)) == 4
    refused(fetcher, [data_url(IMAGE)] * 5, "5 images but at most 4")
    large = data_url(encode(Image.new("1", (900, 900))))
    assert fetcher.fetch_images([large])
    refused(fetcher, [large, large], "Image 2 of 2: .*690000 left")


# -- Random ones ------------------------------------------------------------------------------------------------------

RANDOM = settings(max_examples=1000, deadline=None, derandomize=True, database=None)
HEADS = (b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 302 \r\nLocation: ", b"HTTP/1.1 100 Continue\r\n\r\n", b"ICY 200\r\n", b"")
HEADERS = (
    b"Content-Length: ", b"Content-Length: 99\r\n\r\n", b"Content-Length: -1\r\n\r\n", b"Content-Encoding: br\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n", b"ffffffffffffffffffff\r\n", b"5\r\nabcde\r\n", b"0\r\n\r\n",
    b"\r\n", b"\r\n\r\n",
)  # fmt: skip


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


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@RANDOM
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "MPO"]), st.data())
def test_damaged_files_are_opened_or_refused(kind, data):
    damaged = bytearray(encode(render_image(20, 30), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(damaged)))
        damaged[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    opened_or_refused(OFFLINE, data_url(bytes(damaged)))


@RANDOM
@given(st.sampled_from(["http://", "https://", "HTTP:", "data:image/", "//", ""]), st.text(st.characters()), st.text())
def test_random_urls_are_refused(scheme, host, path):
    with pytest.raises(ValueError, match="probably"):
        OFFLINE.fetch_images([f"{scheme}{host}/{path}"])
    opened_or_refused(OFFLINE, f"{scheme}{host}/{path}")


@RANDOM
@given(st.lists(st.sampled_from(HEADS + HEADERS) | st.binary(max_size=30), max_size=6).map(b"".join))
def test_random_answers_are_refused(answer):
    ours, theirs = socket.socketpair()
    fetcher = ImageFetcher(IMPATIENT, (), lambda host, port: [PRIVATE], TLS)
    fetcher._connect = lambda target, deadline: ours
    with theirs:
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        opened_or_refused(fetcher, "http://images.test/")


# -- Limits -----------------------------------------------------------------------------------------------------------


def test_limits_are_frozen_documented_and_read_from_the_environment():
    for field in dataclasses.fields(ImageLimits):
        assert f"        {field.name}: " in ImageLimits.__doc__
    with pytest.raises(dataclasses.FrozenInstanceError):
        LIMITS.max_bytes = 1
    environment = {"MAX_BYTES": "1000", "TOTAL_SECONDS": "2.5", "ALLOWED_PORTS": "80, 8080", "ALLOW_REMOTE": "0"}
    limits = read_limits(ImageLimits, "P_", {f"P_{name}": value for name, value in environment.items()})
    expected = {"max_bytes": 1000, "total_seconds": 2.5, "allowed_ports": (80, 8080), "allow_remote": False}
    assert limits == dataclasses.replace(ImageLimits(), **expected)


@pytest.mark.parametrize("value", ["10MB", "-1", "0", "nan", "1.5", "1e400", "true", "1,2"])
def test_limits_that_cannot_be_kept(value):
    with pytest.raises(ValueError, match=r"(?i)max_bytes.*probably"):
        read_limits(ImageLimits, "P_", {"P_MAX_BYTES": value})


@pytest.mark.parametrize(
    "values", [{"connect_seconds": float("inf")}, {"connect_seconds": True}, {"allow_remote": 1}, {"max_side": 0}]
)
def test_limits_of_a_wrong_type(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        ImageLimits(**values)
