# SPDX-License-Identifier: Apache-2.0
"""Hugging Face Inference Endpoints: what `handler.py` at the root of a repository gives to the container.

Bodies and parameters are described in `bodies.py`, how images are opened in `fetch.py`.

    {"inputs": {"image": "https://...", "text": "What does the sign say?"}, "parameters": {"max_new_tokens": 64}}
    [{"generated_text": "No. 47", "finish_reason": "stop", "prompt_tokens": 402, "generated_tokens": 4}]
"""

import hashlib
import logging
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image

from ..answering import Answerer, render, render_question
from ..images import turns_upright
from .bodies import Options, Prompt, RequestLimits, check_slots, parse_body
from .fetch import ImageFetcher
from .limits import ImageLimits, read_limits

logger = logging.getLogger("blip3.serving")

DEFAULT_QUESTION = "Describe the picture."  # for an image without text; base checkpoints just continue


class EndpointHandler:
    """Answers requests with one model, whichever thread asks; images are fetched in the caller's.

    The model has a thread to itself and takes one request at a time: any thread that ran it would keep the memory of
    its largest request.

    Args:
        path: the repository's folder.
        image_limits: what may be fetched and decoded; from `BLIP3_PICTURE_...` variables by default.
        request_limits: what may be asked of the model; from `BLIP3_REQUEST_...` variables by default.
        public_loopback: loopback addresses to fetch images from, for tests only.

    Raises:
        ValueError: if a limit cannot be read.
    """

    def __init__(
        self,
        path: str = "",
        image_limits: ImageLimits | None = None,
        request_limits: RequestLimits | None = None,
        public_loopback: Collection[str] = (),
    ):
        self.fetcher = ImageFetcher(image_limits, public_loopback)
        self.limits = read_limits(RequestLimits, "BLIP3_REQUEST_") if request_limits is None else request_limits
        self.answerer = Answerer.load(path)
        self._model_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="blip3-model")

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Answer one body.

        Args:
            data: `inputs` and, optionally, `parameters`.

        Returns:
            One answer per prompt: `generated_text`, `finish_reason` ("stop" or "length", which includes running out
            of time), `prompt_tokens` and `generated_tokens`.

        Raises:
            ValueError: if the body is refused.
        """
        start = time.perf_counter()
        request = parse_body(data, self.limits)
        texts = [self._render(prompt) for prompt in request.prompts]
        rows = self._fetch_images(request.prompts)
        answers = self._model_thread.submit(self._answer, texts, rows, request.options).result()
        digest = hashlib.sha256("\0".join(texts).encode("utf-8")).hexdigest()[:12]
        num_generated = sum(answer["generated_tokens"] for answer in answers)
        logger.info(
            "answered %d prompts (sha256 %s, %d characters, %d images) with %d tokens in %.2f s",
            len(texts), digest, sum(map(len, texts)), sum(map(len, rows)), num_generated, time.perf_counter() - start,
        )  # fmt: skip
        return answers

    def _render(self, prompt: Prompt) -> str:
        """Write a prompt as the model reads it, one `<image>` for each image."""
        processor = self.answerer.processor
        if prompt.messages is not None:
            rendered = render(processor, prompt.messages)
        else:
            default = DEFAULT_QUESTION if processor.chat_template else ""
            rendered = render_question(processor, default if prompt.text is None else prompt.text, len(prompt.images))
        check_slots(rendered, prompt)
        return rendered

    def _fetch_images(self, prompts: Collection[Prompt]) -> list[list[Image.Image]]:
        """Open the images of all rows, under limits that hold for the request."""
        upright = turns_upright(self.answerer.processor)
        sources = [source for prompt in prompts for source in prompt.images]
        images = iter(self.fetcher.fetch_images(sources, upright))
        return [[next(images) for _ in prompt.images] for prompt in prompts]

    def _answer(self, texts: list[str], rows: list[list[Image.Image]], options: Options) -> list[dict[str, Any]]:
        """Answer all prompts in one forward, unless the model's context cannot hold them."""
        splitting = options.do_image_splitting
        image_options = {} if splitting is None else {"do_image_splitting": splitting}
        inputs = self.answerer.prepare(texts, rows, **image_options)
        num_tokens, generation = inputs["input_ids"].shape[1], options.generation
        self.answerer.check_context(num_tokens, generation["max_new_tokens"])
        try:
            answers = self.answerer.generate(
                inputs, seed=options.seed, max_time=self.limits.generate_seconds, **generation
            )
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise ValueError(
                f"{len(texts)} prompts of up to {num_tokens} tokens do not fit into the memory of this server. The "
                "batch is probably too large: send fewer prompts, images or beams."
            ) from None
        return [
            {
                "generated_text": answer.text,
                "finish_reason": "stop" if answer.is_finished else "length",
                "prompt_tokens": answer.num_prompt_tokens,
                "generated_tokens": answer.num_tokens,
            }
            for answer in answers
        ]
