# SPDX-License-Identifier: Apache-2.0
"""Conversations about images: what a visitor may ask, the model's answer piece by piece, and how to stop it.

The server keeps the conversation, so what a browser sends is one question. Images are opened from the page's own
uploads alone.
"""

import dataclasses
import html
import logging
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from transformers import BatchFeature, StoppingCriteriaList, TextIteratorStreamer

from ...answering import IMAGE_TOKEN, Answer, Answerer, StopWhen, render
from ...images import turns_upright
from ..bodies import RequestLimits, parse_parameters
from ..limits import ImageLimits
from ..privacy import describe_failure, silence_libraries
from ..room import busy
from .panel import describe_images, fetch_images, image_arguments, panel_html, panel_note

logger = logging.getLogger("blip3.serving")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one visitor may ask of a public page."""

    max_images: int = 6
    """Per conversation."""
    max_pixels: int = 24_000_000
    """Per image, checked before it is decoded."""
    max_megabytes: int = 16
    """Per uploaded file."""
    max_characters: int = 2000
    """Per question."""
    max_new_tokens: int = 512
    """Where the slider ends."""
    max_seconds: float = 120
    """Of writing one answer."""
    max_waiting: int = 16
    """Questions in the queue, for all visitors together; one is answered at a time."""
    max_sessions: int = 200
    """Conversations the server remembers."""
    keep_seconds: int = 3600
    """How long uploaded images are kept."""
    open_seconds: float = 15
    """Of decoding the images of a conversation, and again of waiting until another visitor's are done."""

    @property
    def of_images(self) -> ImageLimits:
        """What may be decoded for one conversation."""
        return ImageLimits(
            allow_remote=False,
            total_seconds=self.open_seconds,
            max_bytes=self.max_megabytes * 2**20,
            max_pixels=self.max_pixels,
            max_total_pixels=self.max_images * self.max_pixels,
            max_images=self.max_images,
        )


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message of a conversation; only those of the user have images."""

    role: str
    text: str
    images: tuple[Path, ...] = ()


@dataclasses.dataclass(frozen=True)
class Options:
    """What the visitor set beside the question."""

    max_new_tokens: int
    temperature: float
    splits: bool


# -- Conversations ----------------------------------------------------------------------------------------------------


def paths_of(turns: Sequence[Turn]) -> list[Path]:
    """The images of a conversation in reading order."""
    return [path for turn in turns for path in turn.images]


def messages_of(turns: Sequence[Turn], images: Sequence[Image.Image]) -> list[dict]:
    """Write a conversation as the chat template reads it, each image in the turn it was sent with.

    Args:
        turns: the conversation.
        images: all of its images in reading order.
    """
    remaining = iter(images)
    messages = []
    for turn in turns:
        parts: list[dict] = [{"type": "image", "image": next(remaining)} for _ in turn.images]
        # A model may spell <image> in an answer, where no image belongs.
        messages.append({"role": turn.role, "content": [*parts, {"type": "text", "text": _plain(turn)}]})
    return messages


def _plain(turn: Turn) -> str:
    return turn.text.replace(IMAGE_TOKEN, "") if turn.role == "assistant" else turn.text


def chat_view(turns: Sequence[Turn]) -> list[dict]:
    """Write a conversation as the page shows it."""
    messages = []
    for turn in turns:
        files: list[dict] = [{"path": str(path)} for path in turn.images]
        messages.append({"role": turn.role, "content": [*files, {"type": "text", "text": turn.text}]})
    return messages


def check_question(question: Turn, earlier: Sequence[Turn], limits: Limits) -> None:
    """Refuse a question before anything is opened.

    Raises:
        ValueError: if it is empty, too long, holds the image marker, or brings too many images.
    """
    if not question.text:
        raise ValueError("The question is empty. It was probably sent too soon: write what you want to know.")
    if len(question.text) > limits.max_characters:
        raise ValueError(
            f"The question has {len(question.text)} characters but at most {limits.max_characters} are read. It was "
            "probably pasted: shorten it."
        )
    if IMAGE_TOKEN in question.text:
        raise ValueError(
            f"The question holds {IMAGE_TOKEN}, which marks an image in the model's input. It was probably copied "
            "from a prompt: attach the image instead."
        )
    num_images = len(paths_of([*earlier, question]))
    if num_images > limits.max_images:
        raise ValueError(
            f"This conversation would have {num_images} images but at most {limits.max_images} are read. "
            "Remove some, or start a new conversation."
        )


def shorten_error(error: ValueError, max_characters: int = 320) -> str:
    """The first lines of a message, for a notice on the page."""
    return textwrap.shorten(str(error), max_characters, placeholder=" ...")


# -- Answers ----------------------------------------------------------------------------------------------------------


def input_box(limits: Limits, sent: dict | None = None, is_busy: bool = False) -> gr.MultimodalTextbox:
    """The box for question and images: empty, with what failed to be answered, or waiting for the answer."""
    return gr.MultimodalTextbox(
        value=sent or {"text": "", "files": []},
        placeholder=f"Ask about your images; add up to {limits.max_images} with the clip, or drop them here",
        file_count="multiple",
        file_types=["image"],
        sources=["upload"],
        submit_btn=False if is_busy else "Send",
        stop_btn="Stop" if is_busy else False,
        max_plain_text_length=limits.max_characters,
        show_label=False,
        interactive=True,
        elem_id="question",
    )


def options_of(max_new_tokens: float, temperature: float, splits: bool, limits: Limits) -> Options:
    """Check what the browser says was set, by the ranges of the endpoint: a slider's ends bind nobody.

    Raises:
        ValueError: naming what is out of range.
    """
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    whole = {name: int(value) if is_whole(value) else value for name, value in given.items()}
    checked = parse_parameters(whole, 1, RequestLimits(max_new_tokens=limits.max_new_tokens)).generation
    return Options(checked["max_new_tokens"], checked.get("temperature", 0.0), bool(splits))


def is_whole(value: Any) -> bool:
    """Whether a number that a slider sends as 3.0 is meant as 3."""
    return isinstance(value, float) and value.is_integer()


class Chat:
    """One model and the conversations with it.

    Args:
        answerer: of a checkpoint with a chat template.
        uploads: the folder the page keeps uploaded images in.
        limits: of the page.
    """

    def __init__(self, answerer: Answerer, uploads: Path, limits: Limits | None = None):
        self.answerer, self.processor, self.uploads = answerer, answerer.processor, uploads
        self.limits = Limits() if limits is None else limits
        self._running: dict[str, threading.Event] = {}  # by session
        self._model_lock = threading.Lock()  # a stopped answer may still be at its last token
        self._opening = threading.Lock()  # one visitor's images at a time, so that memory is that of one
        silence_libraries()

    def prepare(self, turns: Sequence[Turn], options: Options) -> BatchFeature:
        """Turn a conversation that ends with a question into model inputs.

        Raises:
            ValueError: if an image cannot be read, or the model's context cannot hold it all.
        """

        def prepare(images: list[Image.Image]) -> BatchFeature:
            text = render(self.processor, messages_of(turns, images))
            return self.answerer.prepare([text], [images], **image_arguments(self.processor, options.splits))

        inputs = self._with_images(paths_of(turns), prepare)
        self.answerer.check_context(inputs["input_ids"].shape[1], options.max_new_tokens)
        return inputs

    def _with_images(self, paths: Sequence[Path], use: Callable[[list[Image.Image]], Any]) -> Any:
        """Open images and use them, while nobody else's are open.

        Raises:
            ValueError: if an image cannot be read, or other visitors' take too long.
        """
        if not self._opening.acquire(timeout=self.limits.open_seconds):
            raise ValueError(busy("other visitors' images are being read"))
        try:
            return use(fetch_images(paths, self.uploads, self.limits.of_images, turns_upright(self.processor)))
        finally:
            self._opening.release()

    def stream(self, inputs: BatchFeature, options: Options, stop: threading.Event) -> Iterator[tuple[str, int]]:
        """Generate in a thread and yield the text so far with the number of its tokens; the last is the whole answer.

        Args:
            inputs: of `prepare`.
            options: length and temperature, 0 for greedy.
            stop: set it to end after the next token.

        Raises:
            Exception: whatever the thread raised.
        """
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        is_sampled = options.temperature > 0
        sampling = {"do_sample": True, "temperature": options.temperature} if is_sampled else {"do_sample": False}
        outcome: list[Answer | Exception] = []

        def generate() -> None:
            try:
                with self._model_lock:
                    outcome[:] = self.answerer.generate(
                        inputs,
                        **sampling,
                        max_new_tokens=options.max_new_tokens,
                        max_time=self.limits.max_seconds,
                        stopping_criteria=StoppingCriteriaList([StopWhen(stop.is_set)]),
                        streamer=streamer,
                    )
            except Exception as error:  # it is raised again where the answer is read
                outcome[:] = [error]
            finally:
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True, name="generate")
        thread.start()
        text = ""
        try:
            for count, piece in enumerate(streamer, 1):
                text += piece
                yield text, count
        finally:
            stop.set()  # the reader may have gone
        thread.join()
        (found,) = outcome
        if isinstance(found, Exception):
            raise found
        # Pieces are decoded a few tokens at a time; a character of several tokens may differ from the whole.
        yield found.text, found.num_tokens

    def answer(
        self,
        sent: dict,
        turns: list[Turn],
        max_new_tokens: int,
        temperature: float,
        splits: bool,
        request: gr.Request,
    ) -> Iterator[tuple]:
        """Answer what was sent: yields the input box, the conversation shown, the conversation kept and a status."""
        question = Turn("user", (sent["text"] or "").strip(), tuple(map(Path, sent["files"])))
        asked = [*turns, question]
        stop = self._running[request.session_hash] = threading.Event()
        start = time.perf_counter()
        try:
            check_question(question, turns, self.limits)
            options = options_of(max_new_tokens, temperature, splits, self.limits)
            inputs = self.prepare(asked, options)
            num_images = int((inputs["input_ids"] == self.processor.image_token_id).sum())
            status = f"prompt: {inputs['input_ids'].shape[1]} tokens, {num_images} from images"
            yield input_box(self.limits, is_busy=True), chat_view(asked), asked, status
            text, count = "", 0
            for text, count in self.stream(inputs, options, stop):
                yield gr.skip(), chat_view([*asked, Turn("assistant", text)]), asked, f"{status} · {count} written"
            status += f" · answer: {count} tokens in {time.perf_counter() - start:.1f} s"
            kept = [*asked, Turn("assistant", text or "(no text)")]
            yield input_box(self.limits), chat_view(kept), kept, status
        except Exception as error:  # a visitor sees what went wrong and gets the question back
            message = html.escape(self._explain(error), quote=False)
            gr.Warning(message)
            yield input_box(self.limits, sent), chat_view(turns), turns, message
        finally:
            if self._running.get(request.session_hash) is stop:
                del self._running[request.session_hash]

    def stop(self, request: gr.Request) -> None:
        """End the answer of one visitor after its next token."""
        event = self._running.get(request.session_hash)
        if event is not None:
            event.set()

    def preview(self, sent: dict, turns: list[Turn], splits: bool, shown: tuple | None) -> tuple[Any, Any]:
        """Show what the model sees of all images, sent or about to be; yields the panel and what it shows."""
        paths = [*paths_of(turns), *map(Path, sent["files"])]
        wanted = (tuple(paths), splits)
        if wanted == shown:
            return gr.skip(), gr.skip()
        try:
            if len(paths) > self.limits.max_images:
                check_question(Turn("user", "?", tuple(paths)), [], self.limits)
            views = self._with_images(paths, lambda images: describe_images(self.processor, images, splits))
            panel = panel_html(views)
        except Exception as error:  # Gradio would print it, with what it holds of the request
            panel = panel_note(self._explain(error), is_error=True)
        return panel, wanted

    def _explain(self, error: Exception) -> str:
        if isinstance(error, ValueError):
            return shorten_error(error)
        logger.error("an answer failed: %s", describe_failure(error))
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            return "The model ran out of memory. The conversation is probably too long: start a new one."
        return f"The answer failed on the server ({type(error).__name__}). Its log says why; try again."
