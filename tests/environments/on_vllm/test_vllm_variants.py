# SPDX-License-Identifier: Apache-2.0
"""What an engine is started with, one engine each: other configurations, no cache, compiled, adapters, two ranks."""

import os

import pytest

from .vllm_support import GLOBAL_ROWS, ROWS, Row, answers_of_transformers, answers_of_vllm, engine, save_random_adapter

ADAPTED = {
    "unfused": r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    "fused": r".*language_model\..*\.(o_proj|down_proj)",  # vLLM refuses adapters of the fused qkv_proj
}


@pytest.fixture(scope="module")
def expected(folders, elsewhere) -> dict:
    """Answers of `generate` by folder."""
    return {name: elsewhere(answers_of_transformers, folder, ROWS) for name, folder in folders.items()}


@pytest.mark.parametrize("name", ["short window", "fixed sampling", "no tiles"])
def test_another_configuration(folders, expected, name):
    with engine(folders[name]) as llm:
        assert answers_of_vllm(llm, ROWS) == expected[name]


def test_the_other_configurations_answer_differently(expected):
    assert all(expected["fused"] != expected[name] for name in ("short window", "fixed sampling", "no tiles"))
    assert expected["fused"] == expected["unfused"]


def test_no_cache_of_images(folders, expected):
    with engine(folders["fused"], mm_processor_cache_gb=0, enable_prefix_caching=False) as llm:
        for _ in range(2):
            assert answers_of_vllm(llm, ROWS) == expected["fused"]


def test_prompts_read_in_pieces_shorter_than_their_images(folders, expected):
    with engine(folders["fused"], max_num_batched_tokens=64, enable_prefix_caching=False) as llm:
        assert answers_of_vllm(llm, ROWS) == expected["fused"]


def test_global_views_alone_for_every_request(folders, elsewhere):
    rows = [Row(row.prompt, row.names) for row in GLOBAL_ROWS]
    with engine(folders["fused"], mm_processor_kwargs={"do_image_splitting": False}) as llm:
        answers = answers_of_vllm(llm, rows)
    assert answers == elsewhere(answers_of_transformers, folders["fused"], GLOBAL_ROWS)


def test_images_as_bytes_are_answered_alike(folders, expected):
    with engine(folders["fused"], mm_processor_kwargs={"pixel_dtype": "uint8"}) as llm:
        assert answers_of_vllm(llm, ROWS) == expected["fused"]


def test_a_compiled_decoder(folders, expected):
    with engine(folders["fused"], enforce_eager=False) as llm:
        assert answers_of_vllm(llm, ROWS) == expected["fused"]


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_answers_as_peft_does(folders, expected, elsewhere, tmp_path, name):
    from vllm.lora.request import LoRARequest

    adapter = tmp_path / "adapter"
    elsewhere(save_random_adapter, folders[name], ADAPTED[name], adapter)
    adapted = elsewhere(answers_of_transformers, folders[name], ROWS, adapter)
    assert adapted != expected[name]
    with engine(folders[name], enable_lora=True, max_lora_rank=8) as llm:
        request = LoRARequest("adapter", 1, str(adapter))
        assert answers_of_vllm(llm, ROWS, lora_request=request) == adapted
        assert answers_of_vllm(llm, ROWS) == expected[name]


def test_an_adapter_of_fused_projections_is_refused(folders, elsewhere, tmp_path):
    """One reason for `--text-layout unfused`; when this fails, vLLM has learned to serve them."""
    from vllm.lora.request import LoRARequest

    adapter = tmp_path / "adapter"
    elsewhere(save_random_adapter, folders["fused"], r".*language_model\..*\.qkv_proj", adapter)
    request = LoRARequest("adapter", 1, str(adapter))
    refusal = pytest.raises(ValueError, match="expected target modules")
    with engine(folders["fused"], enable_lora=True, max_lora_rank=8) as llm, refusal:
        answers_of_vllm(llm, ROWS[:1], lora_request=request)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")
def test_two_tensor_parallel_ranks(folders, expected, monkeypatch):
    first, second = sorted(os.sched_getaffinity(0))[:2]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{second}")
    with engine(folders["unfused"], tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        assert answers_of_vllm(llm, ROWS) == expected["unfused"]
