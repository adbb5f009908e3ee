# SPDX-License-Identifier: Apache-2.0
"""Images over the network: which connections are made, servers that are slow, broken or lie, and images that pass."""

import base64
import dataclasses
import logging
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from blip3.serving import fetch
from blip3.serving.fetch import ImageFetcher
from support import render_image
from support.site import (
    IMAGE,
    IMPATIENT,
    LIMITS,
    PRIVATE,
    PUBLIC,
    RANDOM,
    TLS,
    data_url,
    encode,
    opened_or_refused,
    refused,
    start,
)

# -- Requests that pass -----------------------------------------------------------------------------------------------


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
    assert "fetched url " in caplog.text
    assert "secret" not in caplog.text


def test_counts_of_a_request(fetcher):
    assert len(fetcher.fetch_images([data_url(IMAGE)] * 4)) == 4
    refused(fetcher, [data_url(IMAGE)] * 5, "5 images but at most 4")
    large = data_url(encode(Image.new("1", (900, 900))))
    assert fetcher.fetch_images([large])
    refused(fetcher, [large, large], "Image 2 of 2: .*690000 left")


# -- Connections ------------------------------------------------------------------------------------------------------


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

    monkeypatch.setattr(fetch.socket, "socket", Recorder)
    fetcher.fetch_images([f"http://images.test:{servers[0].server_port}/ok.png"])
    assert connected == [(PUBLIC, servers[0].server_port)]


def test_only_loopback_can_be_opened_and_only_by_argument(monkeypatch):
    with pytest.raises(ValueError, match="loopback addresses only"):
        ImageFetcher(public_loopback=["10.0.0.1"])
    monkeypatch.setenv("BLIP3_PICTURE_PUBLIC_LOOPBACK", PRIVATE)
    monkeypatch.setenv("BLIP3_PICTURE_ALLOWED_PORTS", "80")
    refused(ImageFetcher(), f"http://{PRIVATE}/ok.png", "is not public")


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


HEADS = (b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 302 \r\nLocation: ", b"HTTP/1.1 100 Continue\r\n\r\n", b"ICY 200\r\n", b"")
HEADERS = (
    b"Content-Length: ", b"Content-Length: 99\r\n\r\n", b"Content-Length: -1\r\n\r\n", b"Content-Encoding: br\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n", b"ffffffffffffffffffff\r\n", b"5\r\nabcde\r\n", b"0\r\n\r\n",
    b"\r\n", b"\r\n\r\n",
)  # fmt: skip


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
