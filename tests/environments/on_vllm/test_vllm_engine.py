# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU engine: its tokens are those of `generate`, whatever shares the batch or comes from a cache."""

import random

import pytest

from support.serving import user_message

from .vllm_support import (
    GLOBAL_ROWS,
    IMAGES,
    MOST_IMAGES,
    ROWS,
    Row,
    answers_of_transformers,
    answers_of_vllm,
    as_answer,
    chat_of_transformers,
    engine,
    greedy,
    turn,
)


@pytest.fixture(scope="module", params=["fused", "unfused"])
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def llm(folders, layout):
    with engine(folders[layout]) as running:
        yield running


@pytest.fixture(scope="module")
def expected(folders, layout, elsewhere) -> dict:
    rows = ROWS + GLOBAL_ROWS
    return dict(zip(rows, elsewhere(answers_of_transformers, folders[layout], rows), strict=True))


def forget(llm) -> None:
    """Empty the caches of processed images, encoded images and prefixes."""
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
    assert llm.llm_engine.reset_prefix_cache()


@pytest.fixture
def images_prepared(llm, monkeypatch) -> list[int]:
    """Collects, per call of the image processor, how many images it got."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    processor = MULTIMODAL_REGISTRY.create_processor(llm.model_config).info.get_hf_processor().image_processor
    calls: list[int] = []
    preprocess = type(processor).preprocess

    def counted(self, images, *arguments, **options):
        calls.append(len(images) if isinstance(images, list) else 1)
        return preprocess(self, images, *arguments, **options)

    monkeypatch.setattr(type(processor), "preprocess", counted)
    return calls


def test_rows_with_no_one_two_and_three_images_in_one_batch(llm, expected):
    assert answers_of_vllm(llm, ROWS) == [expected[row] for row in ROWS]


def test_answers_differ_from_row_to_row(expected):
    """So that equal answers mean something: order, shape and content of images all count."""
    answers = [tuple(expected[row].ids) for row in ROWS]
    assert len(set(answers)) == len(answers)


def test_global_views_beside_tiled_images_in_one_batch(llm, expected):
    rows = [row for pair in zip(GLOBAL_ROWS, ROWS[1:], strict=True) for row in pair]
    forget(llm)
    assert answers_of_vllm(llm, rows) == [expected[row] for row in rows]


def test_images_from_the_cache_give_the_same_tokens(llm, expected, images_prepared):
    forget(llm)
    assert answers_of_vllm(llm, ROWS) == [expected[row] for row in ROWS]
    distinct = len({name for row in ROWS for name in row.names})
    assert sum(images_prepared) >= distinct
    images_prepared.clear()
    assert answers_of_vllm(llm, ROWS) == [expected[row] for row in ROWS]
    assert images_prepared == []


def test_images_seen_together_are_encoded_again_apart(llm, expected):
    """Cached pixels beside other neighbours than the ones they were prepared with."""
    forget(llm)
    answers_of_vllm(llm, ROWS)
    for seed in range(3):
        llm.llm_engine.reset_encoder_cache()
        assert llm.llm_engine.reset_prefix_cache()
        rows = random.Random(seed).sample(ROWS, len(ROWS) - seed)
        assert answers_of_vllm(llm, rows) == [expected[row] for row in rows]


def test_the_same_row_twice_in_one_batch(llm, expected):
    rows = [row for row in ROWS[1:5] for _ in range(2)]
    forget(llm)
    assert answers_of_vllm(llm, rows) == [expected[row] for row in rows]


@pytest.mark.parametrize(
    "parts",
    [
        ("How many dogs are there?",),
        (IMAGES["wide"], "What is in the image?"),
        ("Is", IMAGES["high"], "above", IMAGES["square"], "or not?", IMAGES["tiny"]),
    ],
    ids=["text", "one image", "images between words"],
)
def test_a_chat_is_that_of_the_chat_template(llm, folders, layout, elsewhere, parts):
    output = llm.chat(user_message(*parts), greedy(), use_tqdm=False)[0]
    assert as_answer(output) == elsewhere(chat_of_transformers, folders[layout], *parts)


def test_too_many_images_are_refused_and_the_engine_lives_on(llm, expected):
    from vllm.exceptions import VLLMValidationError

    num_images = MOST_IMAGES + 1
    with pytest.raises(VLLMValidationError, match=f"At most {MOST_IMAGES} image"):
        answers_of_vllm(llm, [Row(turn("<image>" * num_images), ("wide",) * num_images)])
    assert answers_of_vllm(llm, ROWS[:2]) == [expected[row] for row in ROWS[:2]]
