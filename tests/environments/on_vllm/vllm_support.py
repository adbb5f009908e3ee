# SPDX-License-Identifier: Apache-2.0
"""What the vLLM tests share: prompts with images, transformers' answers to them, and engines.

vLLM changes transformers' classes in its process for good, so `generate` runs in another one: what it needs is at the
top of this file, and vLLM is imported inside functions only.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor

from support import load_model, render_image
from support.serving import local_message

MAX_LENGTH = 512
NUM_TOKENS = 12
MOST_IMAGES = 4

# By name, so that rows can travel between processes.
IMAGES = {
    "square": render_image(150, 150, seed=1),
    "wide": render_image(60, 300, seed=2),
    "high": render_image(300, 70, seed=3),
    "landscape": render_image(76, 150, seed=4),
    "portrait": render_image(150, 60, seed=5),
    "tiny": render_image(9, 7, seed=6),
    "grey": render_image(140, 155, seed=7).convert("L"),
}


@dataclass(frozen=True)
class Row:
    """A prompt and the names of its images."""

    prompt: str
    names: tuple[str, ...] = ()
    splits: bool = True  # False: every image as its global view alone

    @property
    def images(self) -> list[Image.Image]:
        return [IMAGES[name] for name in self.names]

    @property
    def image_options(self) -> dict[str, bool]:
        return {} if self.splits else {"do_image_splitting": False}

    def for_vllm(self) -> dict[str, Any]:
        """The row as `LLM.generate` takes it."""
        images = {"multi_modal_data": {"image": self.images}} if self.names else {}
        return {"prompt": self.prompt, "mm_processor_kwargs": self.image_options, **images}


def turn(text: str) -> str:
    return f"<|user|>\n{text}<|end|>\n<|assistant|>\n"


ROWS = [
    Row(turn("How many dogs are there?")),
    Row(turn("<image>\nWhat is in the image?"), ("square",)),
    Row(turn("<image>\nWhat is in the image?"), ("tiny",)),
    Row(turn("<image>\nWhat is in the image?"), ("grey",)),
    Row(turn("Is <image> above <image>?"), ("wide", "high")),
    Row(turn("Is <image> above <image>?"), ("high", "wide")),
    Row(turn("<image>\n<image>Read <image>, please."), ("landscape", "portrait", "square")),
    Row(turn("<image>\n<image>Read <image>, please."), ("portrait", "portrait", "wide")),
]
GLOBAL_ROWS = [Row(row.prompt, row.names, splits=False) for row in ROWS if row.names]


@dataclass(frozen=True)
class Answer:
    """What a model read and wrote."""

    prompt_ids: list[int]
    ids: list[int]


# -- transformers, in a process of its own ----------------------------------------------------------------------------


@torch.no_grad()
def answers_of_transformers(folder: Path, rows: Sequence[Row], adapter: Path | None = None) -> list[Answer]:
    """Greedy answers of `generate`, one row at a time."""
    processor, model = _load(folder, adapter)
    return [
        _answer(model, processor(text=row.prompt, images=row.images or None, return_tensors="pt", **row.image_options))
        for row in rows
    ]


@torch.no_grad()
def chat_of_transformers(folder: Path, *parts: str | Image.Image) -> Answer:
    """Greedy answer of `apply_chat_template` and `generate` to one message."""
    processor, model = _load(folder)
    return _answer(
        model,
        processor.apply_chat_template(
            local_message(*parts), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ),
    )


@torch.no_grad()
def answer_text_of_transformers(folder: Path, *parts: str | Image.Image) -> tuple[int, str]:
    """Length of the prompt, and the answer to one message as the text that goes on from it.

    vLLM decodes an answer so, and therefore keeps the space before a first word that `decode` of the answer drops.
    """
    answer = chat_of_transformers(folder, *parts)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    prompt, whole = (
        processor.decode(ids, skip_special_tokens=True) for ids in (answer.prompt_ids, answer.prompt_ids + answer.ids)
    )
    return len(answer.prompt_ids), whole.removeprefix(prompt)


def save_random_adapter(folder: Path, target_modules: str, output: Path) -> None:
    """Save a LoRA adapter that is not the identity."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=32, target_modules=target_modules, init_lora_weights=False)
    get_peft_model(load_model(folder), config).save_pretrained(output)


def _load(folder: Path, adapter: Path | None = None) -> tuple[Any, torch.nn.Module]:
    processor, model = AutoProcessor.from_pretrained(folder, trust_remote_code=True), load_model(folder)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return processor, model.eval()


def _answer(model: torch.nn.Module, inputs: Any) -> Answer:
    ids = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)[0].tolist()
    prompt_ids = inputs["input_ids"][0].tolist()
    return Answer(prompt_ids, ids[len(prompt_ids) :])


# -- vLLM -------------------------------------------------------------------------------------------------------------


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """A vLLM engine in float32, taken down when the block ends."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "trust_remote_code": True,
        "dtype": "float32",
        "max_model_len": MAX_LENGTH,
        "max_num_seqs": len(ROWS),
        "limit_mm_per_prompt": {"image": MOST_IMAGES},
        "enforce_eager": True,
    }
    llm = LLM(str(folder), **defaults | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def answers_of_vllm(llm: Any, rows: Sequence[Row], **options: Any) -> list[Answer]:
    """Greedy answers of an engine to all rows in one batch."""
    outputs = llm.generate([row.for_vllm() for row in rows], greedy(), use_tqdm=False, **options)
    return [as_answer(output) for output in outputs]


def as_answer(output: Any) -> Answer:
    return Answer(list(output.prompt_token_ids), list(output.outputs[0].token_ids))


def greedy() -> Any:
    """As `generate` is called here; the stop tokens are those of generation_config.json."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
