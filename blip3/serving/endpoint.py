# SPDX-License-Identifier: Apache-2.0
"""Hugging Face Inference Endpoints: what `handler.py` at the root of a repository gives to the container.

Bodies and parameters are described in `bodies.py`, how images are opened in `fetch.py`.

    {"inputs": {"image": "https://...", "text": "What does the sign say?"}, "parameters": {"max_new_tokens": 64}}
    [{"generated_text": "No. 47", "finish_reason": "stop", "prompt_tokens": 402, "generated_tokens": 4}]
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from ..answering import Answerer, StopWhen, render, render_question
from ..images import turns_upright
from .bodies import Options, Prompt, RequestLimits, check_slots, parse_body
from .decode import PIXEL_BYTES
from .fetch import Checked, ImageFetcher
from .limits import Deadline, ImageLimits, read_limits
from .privacy import pseudonym
from .room import Room, busy, bytes_of

logger = logging.getLogger("blip3.serving")

DEFAULT_QUESTION = "Describe the picture."  # for an image without text; base checkpoints just continue
POLL_SECONDS = 0.25  # between two looks at whether a client is still there
CONVERTING_BYTES = 12  # a pixel of the image that is being made RGB takes beside itself, at most

Answers = list[dict[str, Any]]


@dataclasses.dataclass
class _Job:
    """What one request leaves for the model's thread."""

    texts: list[str]
    files: list[list[Checked]]
    options: Options
    deadline: Deadline
    is_dropped: threading.Event = dataclasses.field(default_factory=threading.Event)

    def drop(self) -> None:
        """Let go of all it holds: a queue may keep the job itself until its turn comes."""
        self.is_dropped.set()
        self.texts, self.files = [], []


class EndpointHandler:
    """Answers requests with one model, whichever thread asks; images are fetched and checked in the caller's.

    The model has a thread to itself and takes one request at a time: any thread that ran it would keep the memory of
    its largest request. Images are decoded there too, so that only the request whose turn it is holds pixels; those
    that wait hold their body and the files of their images, whose number and bytes are limited.

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
        self.room = Room(self.limits.max_requests, self.limits.max_held_bytes)
        self._model_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="blip3-model")

    def __call__(self, data: dict[str, Any], is_gone: Callable[[], bool] | None = None) -> Answers:
        """Answer one body.

        Args:
            data: `inputs` and, optionally, `parameters`.
            is_gone: says whether the client has gone away, for servers that know; its request is dropped then. The
                container gives none.

        Returns:
            One answer per prompt: `generated_text`, `finish_reason` ("stop" or "length", which includes running out
            of time), `prompt_tokens` and `generated_tokens`.

        Raises:
            ValueError: if the body is refused, or the server is busy.
            ConnectionAbortedError: if the client is gone.
        """
        start, deadline = time.perf_counter(), Deadline(self.limits.total_seconds)
        with self.room.enter() as guest:
            request = parse_body(data, self.limits)
            guest.hold(bytes_of(data))
            texts = [self.render(prompt) for prompt in request.prompts]
            files = self._fetch_files(request.prompts, deadline, guest.hold)
            num_images, name = sum(map(len, files)), pseudonym("\0".join(texts))
            answers = self._take_turn(_Job(texts, files, request.options, deadline), is_gone)
        num_generated = sum(answer["generated_tokens"] for answer in answers)
        logger.info(
            "answered %d prompts (%s, %d characters, %d images) with %d tokens in %.2f s",
            len(texts), name, sum(map(len, texts)), num_images, num_generated, time.perf_counter() - start,
        )  # fmt: skip
        return answers

    def render(self, prompt: Prompt) -> str:
        """Write a prompt as the model reads it, one `<image>` for each image."""
        processor = self.answerer.processor
        if prompt.messages is not None:
            rendered = render(processor, prompt.messages)
        else:
            default = DEFAULT_QUESTION if processor.chat_template else ""
            rendered = render_question(processor, default if prompt.text is None else prompt.text, len(prompt.images))
        check_slots(rendered, prompt)
        return rendered

    def _fetch_files(
        self, prompts: Collection[Prompt], deadline: Deadline, hold: Callable[[int], None]
    ) -> list[list[Checked]]:
        """Fetch and check the images of all rows, under limits that hold for the request."""
        sources = [source for prompt in prompts for source in prompt.images]
        found = self.fetcher.fetch_files(sources, deadline, hold)
        num_bytes = self._opened_bytes(found)
        if num_bytes > self.limits.max_opened_bytes:
            raise ValueError(
                f"The request's {len(found)} images would take {num_bytes} bytes once they are decoded, but at most "
                f"{self.limits.max_opened_bytes} are given to one request. They are probably originals from a camera: "
                "send fewer, or scale them down."
            )
        files = iter(found)
        return [[next(files) for _ in prompt.images] for prompt in prompts]

    def _opened_bytes(self, files: Sequence[Checked]) -> int:
        """Bytes of decoded images, of those being converted, one a thread, and of model inputs in two dtypes."""
        images = self.answerer.processor.image_processor
        pixels = [file.height * file.width for file in files]
        input_bytes = images.num_view_slots * 3 * images.tile_size**2 * 2 * torch.float32.itemsize
        converting = sum(sorted(pixels)[-torch.get_num_threads() :])
        return PIXEL_BYTES * sum(pixels) + CONVERTING_BYTES * converting + input_bytes * len(files)

    def _take_turn(self, job: _Job, is_gone: Callable[[], bool] | None) -> Answers:
        """Wait for the model and its answers, as long as the deadline allows and the client is there."""
        future = self._model_thread.submit(self._answer, job)
        try:
            return self._wait(future, job, is_gone)
        finally:
            future.cancel()  # if it never began
            job.drop()

    def _wait(self, future: "Future[Answers]", job: _Job, is_gone: Callable[[], bool] | None) -> Answers:
        while not future.done():
            if is_gone is not None and is_gone():
                raise ConnectionAbortedError("The client went away before its answer was ready.")
            seconds = job.deadline.end - time.monotonic()
            if seconds <= 0 and future.cancel():
                raise ValueError(busy(f"the model was not free within {self.limits.total_seconds:g} s"))
            # After the deadline generation ends by itself: what is written until then is the answer.
            wait([future], timeout=POLL_SECONDS if is_gone is not None else max(seconds, POLL_SECONDS))
        return future.result()

    def _answer(self, job: _Job) -> Answers:
        """Answer all prompts in one forward, unless the model's context cannot hold them."""
        texts, files, options = job.texts, job.files, job.options
        splitting = options.do_image_splitting
        image_options = {} if splitting is None else {"do_image_splitting": splitting}
        inputs = self.answerer.prepare(texts, self._decode(files, job.deadline), **image_options)
        num_tokens, generation = inputs["input_ids"].shape[1], options.generation
        self.answerer.check_context(num_tokens, generation["max_new_tokens"])
        try:
            answers = self.answerer.generate(
                inputs,
                seed=options.seed,
                max_time=max(min(self.limits.generate_seconds, job.deadline.end - time.monotonic()), 0.0),
                stopping_criteria=[StopWhen(job.is_dropped.is_set)],
                **generation,
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

    def _decode(self, rows: Sequence[Sequence[Checked]], deadline: Deadline) -> list[list[Any]]:
        """Decode the images of all rows.

        Raises:
            ValueError: if one is damaged, or time runs out.
        """
        files = [file for row in rows for file in row]
        upright = turns_upright(self.answerer.processor)
        try:
            images = iter(self.fetcher.decode_files(files, upright, deadline))
        except TimeoutError:
            raise ValueError(busy(f"the model was not free within {self.limits.total_seconds:g} s")) from None
        return [[next(images) for _ in row] for row in rows]
