# SPDX-License-Identifier: Apache-2.0
"""vLLM's OpenAI server and OpenAI's client."""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from support.serving import serving, user_message

from .vllm_support import IMAGES, MAX_LENGTH, MOST_IMAGES, NUM_TOKENS, answer_text_of_transformers

CONVERSATIONS = {
    "text only": ("How many dogs are there?",),
    "one image": (IMAGES["wide"], "What is in the image?"),
    "another image": (IMAGES["square"], "What is in the image?"),
    "images between words": ("Is", IMAGES["high"], "above", IMAGES["square"], "or not?", IMAGES["tiny"]),
}
MODEL = "blip3"


@pytest.fixture(scope="module", params=["fused", "unfused"])
def folder(folders, request):
    return folders[request.param]


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--trust-remote-code", "--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", str(MAX_LENGTH), "--limit-mm-per-prompt", f'{{"image": {MOST_IMAGES}}}']
    command += ["--trust-request-mm-kwargs"]  # for the test that sends some
    with serving(command, tmp_path_factory.mktemp("log"), seconds=300) as running:
        yield running
    assert running.stop() == 0, running.log.read_text(encoding="utf-8", errors="replace")[-2000:]


@pytest.fixture(scope="module")
def expected(folder, elsewhere) -> dict[str, tuple[int, str]]:
    """Prompt length and answer of `generate` by conversation."""
    return {name: elsewhere(answer_text_of_transformers, folder, *parts) for name, parts in CONVERSATIONS.items()}


def ask(server: Any, name: str, **options: Any) -> Any:
    return server.client().chat.completions.create(
        model=MODEL, messages=user_message(*CONVERSATIONS[name]), max_tokens=NUM_TOKENS, temperature=0, **options
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_answer_is_that_of_generate(server, expected, name):
    reply = ask(server, name)
    length, text = expected[name]
    assert reply.usage.prompt_tokens == length
    assert reply.choices[0].message.content == text


def test_the_chat_template_is_read_as_openai_messages(server, expected):
    ask(server, "text only")
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert "Detected the chat template content format to be 'openai'" in log


def test_the_answers_are_words_and_differ(expected):
    texts = [text for _, text in expected.values()]
    assert len(set(texts)) == len(texts)
    assert all(len(text) >= NUM_TOKENS // 2 for text in texts)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_streamed_answer_is_the_same_in_several_pieces(server, expected, name):
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(server, name, stream=True) if chunk.choices]
    assert "".join(pieces) == expected[name][1]
    assert len([piece for piece in pieces if piece]) > 1


def test_eight_requests_at_once(server, expected):
    names = list(CONVERSATIONS) * 2
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda name: ask(server, name), names))
    assert [reply.choices[0].message.content for reply in replies] == [expected[name][1] for name in names]


def test_one_request_asks_for_the_global_view_alone(server, expected):
    name = "one image"
    reply = ask(server, name, extra_body={"mm_processor_kwargs": {"do_image_splitting": False}})
    assert reply.usage.prompt_tokens == expected[name][0] - 3 * 8  # 3 tiles of 8 latents
    assert ask(server, name).usage.prompt_tokens == expected[name][0]


def test_a_bad_request_is_refused_and_the_server_lives_on(server, expected):
    from openai import BadRequestError

    broken = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    with pytest.raises(BadRequestError):
        server.client().chat.completions.create(model=MODEL, messages=[{"role": "user", "content": broken}])
    assert ask(server, "one image").choices[0].message.content == expected["one image"][1]
