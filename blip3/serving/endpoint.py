# SPDX-License-Identifier: Apache-2.0
"""Hugging Face Inference Endpoints: what `handler.py` at the root of a repository gives to the container.

Bodies and parameters are described in `bodies.py`, how images are opened in `images.py`.

    {"inputs": {"image": "https://...", "text": "What does the sign say?"}, "parameters": {"max_new_tokens": 64}}
    [{"generated_text": "No. 47", "finish_reason": "stop", "prompt_tokens": 402, "generated_tokens": 4}]
"""

import contextlib
import hashlib
import logging
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..checkpoints import locate
from .bodies import IMAGE_TOKEN, Options, Prompt, RequestLimits, check_slots, parse_body
from .images import ImageFetcher, ImageLimits, read_limits

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
        source = locate(path)
        self.processor = AutoProcessor.from_pretrained(**source)
        model = AutoModelForImageTextToText.from_pretrained(**source, dtype="auto")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if model.device.type != device:  # a quantized model is there already, and refuses to be moved
            model = model.to(device)
        self.model = model.eval()
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
        has_template = bool(self.processor.chat_template)
        if prompt.messages is not None and not has_template:
            raise ValueError(
                "messages were sent but this model has no chat template. It is probably a base checkpoint, which "
                f"continues text: send images and a text with {IMAGE_TOKEN} where each belongs."
            )
        text = (DEFAULT_QUESTION if has_template else "") if prompt.text is None else prompt.text
        images_first = 0 if IMAGE_TOKEN in text else len(prompt.images)
        if not has_template:
            rendered = IMAGE_TOKEN * images_first + text
        else:
            parts = [{"type": "image"}] * images_first + [{"type": "text", "text": text}]
            messages = list(prompt.messages or [{"role": "user", "content": parts}])
            rendered = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        check_slots(rendered, prompt)
        return rendered

    def _fetch_images(self, prompts: Collection[Prompt]) -> list[list[Image.Image]]:
        """Open the images of all rows, under limits that hold for the request."""
        upright = self.processor.image_processor.do_exif_transpose is not False
        sources = [source for prompt in prompts for source in prompt.images]
        images = iter(self.fetcher.fetch_images(sources, upright))
        return [[next(images) for _ in prompt.images] for prompt in prompts]

    def _answer(self, texts: list[str], rows: list[list[Image.Image]], options: Options) -> list[dict[str, Any]]:
        """Answer all prompts in one forward."""
        return self._generate(self._prepare(texts, rows, options), options)

    def _prepare(self, texts: list[str], rows: list[list[Image.Image]], options: Options) -> Any:
        """Prepare the model's inputs and refuse what its context cannot hold."""
        splitting = options.do_image_splitting
        kwargs = {} if splitting is None or not any(rows) else {"do_image_splitting": splitting}
        images = rows if any(rows) else None
        inputs = self.processor(text=texts, images=images, padding=True, return_tensors="pt", **kwargs)
        num_tokens = inputs["input_ids"].shape[1]
        context = self.model.config.text_config.max_position_embeddings
        if num_tokens + options.generation["max_new_tokens"] > context:
            raise ValueError(
                f"The longest prompt takes {num_tokens} tokens and max_new_tokens is "
                f"{options.generation['max_new_tokens']} but the model reads {context} in all. There are probably too "
                "many images: send fewer, shorten the text, lower max_new_tokens or set do_image_splitting to false."
            )
        return inputs.to(self.model.device, self.model.dtype)

    def _generate(self, inputs: Any, options: Options) -> list[dict[str, Any]]:
        """Generate all rows in one forward and cut each at its end."""
        try:
            with torch.inference_mode(), _seeded(options.seed, self.model.device):
                ids = self.model.generate(**inputs, **options.generation, max_time=self.limits.generate_seconds)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise ValueError(
                f"{len(inputs['input_ids'])} prompts of up to {inputs['input_ids'].shape[1]} tokens do not fit into "
                "the memory of this server. The batch is probably too large: send fewer prompts, images or beams."
            ) from None
        stops = self.model.generation_config.eos_token_id
        stops = set(stops) if isinstance(stops, list) else {stops}
        answers = []
        for row, mask in zip(ids[:, inputs["input_ids"].shape[1] :].tolist(), inputs["attention_mask"], strict=True):
            length = next((index + 1 for index, token in enumerate(row) if token in stops), None)
            kept = row if length is None else row[:length]
            answers.append(
                {
                    "generated_text": self.processor.tokenizer.decode(kept, skip_special_tokens=True).strip(),
                    "finish_reason": "length" if length is None else "stop",
                    "prompt_tokens": int(mask.sum()),
                    "generated_tokens": len(kept),
                }
            )
        return answers


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed sampling for one request, and leave the generators of later requests as they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
