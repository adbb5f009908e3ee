# SPDX-License-Identifier: Apache-2.0
"""Fixtures: a public site, a trap that nobody may connect to, fetchers; and a chat about images."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from blip3.answering import Answerer
from blip3.serving.fetch import ImageFetcher
from support.serving import silence_bytes
from support.site import IMPATIENT, LIMITS, PRIVATE, PUBLIC, resolve, start


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


@pytest.fixture(scope="module")
def fetcher(servers):
    ports = (80, 443, *(server.server_port for server in servers))
    return ImageFetcher(dataclasses.replace(LIMITS, allowed_ports=ports), [PUBLIC], resolve)


@pytest.fixture(scope="module")
def impatient(servers):
    return ImageFetcher(dataclasses.replace(IMPATIENT, allowed_ports=(servers[0].server_port,)), [PUBLIC])


@pytest.fixture(scope="module")
def legible_repo(tiny_repo, tmp_path_factory):
    """The tiny checkpoint, answering in letters."""
    return silence_bytes(Path(shutil.copytree(tiny_repo, tmp_path_factory.mktemp("app") / "legible")))


@pytest.fixture(scope="module")
def loaded(legible_repo):
    return Answerer.load(legible_repo, must_chat=True)


@pytest.fixture
def chat(loaded, tmp_path):
    from blip3.serving.page.chat import Chat  # needs gradio

    uploads = tmp_path / "uploads"
    uploads.mkdir()
    return Chat(loaded, uploads)
