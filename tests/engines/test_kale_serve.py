# SPDX-License-Identifier: Apache-2.0
"""KALE's captioner on `transformers serve`, with this repository's model, on transformers 5."""

import argparse
import base64
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from blip3.answering import Answerer, render_question
from blip3.engines.kale.command import add_options, plan
from blip3.engines.kale.server import data_url
from blip3.engines.leaks import clean_caption, has_leak
from blip3.world.tasks import rendered_records
from support import IS_TRANSFORMERS_5
from support.chat import chatting, prompt_of, says
from support.engines import run_stages, sample_of
from support.serving import SMALL_MODEL, Server, complete_folder, serving

MISSING = [name for name in ("fastapi", "httpx", "uvicorn") if find_spec(name) is None]
START = "from transformers.cli.transformers import main; main()"
QUESTION = "What is in the picture?"  # the small model was trained on questions of this kind

pytestmark = [
    pytest.mark.skipif(
        not IS_TRANSFORMERS_5, reason="`transformers serve` of 4.57 loads classes of its own package only"
    ),
    pytest.mark.skipif(
        bool(MISSING), reason=f"pip install 'transformers[serving]' httpx: {', '.join(MISSING)} missing"
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete_folder(SMALL_MODEL, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    command = [sys.executable, "-c", START, "serve", str(folder), "--trust-remote-code", "--device", "cpu"]
    with serving(command, tmp_path_factory.mktemp("log"), seconds=180) as running:
        yield running


def fuse(body: dict, times: int):
    first, second = (
        line for line in prompt_of(body).splitlines() if line.startswith(("Sentence 1: ", "Sentence 2: "))
    )
    return says(f"It is {first[12:]}. Sentence 2 adds nothing. {second[12:]}")


def test_images_are_captioned_by_one_server_and_fused_by_another(server, folder):
    url = f"http://127.0.0.1:{server.port}/v1"
    records = list(rendered_records("fusion", count=4))
    samples = [sample_of(record, record.turns[0].text.removeprefix("<image>\n")) for record in records]
    parser = argparse.ArgumentParser()
    add_options(parser)
    with chatting(fuse, ["fuser"]) as fuser:
        given = ["--captioner-url", url, "--captioner", str(folder), "--caption-prompt", QUESTION]
        made = plan(parser.parse_args([*given, "--rewriter-url", fuser.url]))
        rows = run_stages([spec.stage(**spec.options) for spec in made.stages], samples, slice_size=4)
    assert [row.get("error") for row in rows] == [None] * 4
    assert all(row["caption"].startswith("It is ") and not has_leak(row["caption"]) for row in rows)
    assert made.settings["captioner"]["model"] == str(folder)

    alone = Answerer.load(folder, device="cpu")
    prompt = render_question(alone.processor, QUESTION, 1)
    sent = [base64.b64decode(data_url(record.images[0].open()).partition(",")[2]) for record in records]
    answers = alone.answer([prompt] * 4, [[jpeg] for jpeg in sent], max_new_tokens=256, do_sample=False)
    assert [row["cogvlm_caption"] for row in rows] == [clean_caption(answer.text) for answer in answers]
    assert len({row["cogvlm_caption"] for row in rows}) > 1
