# SPDX-License-Identifier: Apache-2.0
"""A page to talk with BLIP-3 about images: streamed answers, and the tiles and tokens each image becomes.

    python -m blip3.serving.app                                    this repository's small model
    python -m blip3.serving.app --model FOLDER                     any converted checkpoint

    question, images --+--> answer --- messages_of --> processor --> generate in a thread --> text, piece by piece
                         |
                         +--> preview --- describe_images --> panel_html: sizes, grids, tokens, tiles

On a Hugging Face Space this file, checkpoints.py, the requirements and a checkpoint are enough; the card is
blip3/serving/space/README.md.
The conversation is kept by the server, so what a browser sends is one question, and images are opened only from the
folder of this page's own uploads. Nothing is fetched from the hub, and nothing is reported to anyone.
"""

import argparse
import base64
import dataclasses
import html
import io
import json
import logging
import os
import shutil
import signal
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Before the imports: both libraries read these once.
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "HF_HUB_OFFLINE": "1"}

import gradio as gr
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from ..checkpoints import folder_of, locate
from ..hub import ROOT, model_code

logger = logging.getLogger("blip3.serving")

HERE = Path(__file__).resolve().parent
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
EXIF_ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # these swap height and width
IMAGE_TOKEN = "<image>"
SEEN_TITLE = "What the model sees"


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


@dataclasses.dataclass(frozen=True)
class ImageView:
    """What an image became: its size in pixels, grid of (rows, columns), image tokens, global view and tiles."""

    height: int
    width: int
    grid: tuple[int, int]
    num_tokens: int
    tiles: tuple[Image.Image, ...]


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


# -- Images ---------------------------------------------------------------------------------------------------------


def fetch_images(paths: Sequence[Path], uploads: Path) -> list[Image.Image]:
    """Open uploaded images by their headers; the processor decodes and checks them.

    Args:
        paths: where the page put them.
        uploads: the only folder they may lie in.

    Raises:
        ValueError: naming the image, if it lies elsewhere, is gone or is no image.
    """
    images: list[Image.Image] = []
    for index, path in enumerate(paths):
        which = f"Image {index + 1} of {len(paths)}"
        if not path.resolve().is_relative_to(uploads.resolve()):
            raise ValueError(f"{which}: it was not uploaded here, and nothing else is opened. Upload it.")
        try:
            images.append(Image.open(io.BytesIO(path.read_bytes()), formats=FORMATS))
        except FileNotFoundError:
            raise ValueError(
                f"{which}: it is no longer kept. The page was probably left open for long: start a new conversation."
            ) from None
        except Exception:  # decoders raise whatever a broken file makes them meet
            raise ValueError(
                f"{which}: it is not a {', '.join(FORMATS)} file of acceptable size. It is probably of another type "
                "or damaged: save it as JPEG or PNG."
            ) from None
    return images


def image_arguments(processor: Any, splits: bool, limits: Limits) -> dict[str, Any]:
    """What the processor is told about images, for prompts and for the panel alike."""
    turns = processor.image_processor.do_exif_transpose is not False
    return {"do_image_splitting": splits, "max_image_pixels": limits.max_pixels, "do_exif_transpose": turns}


def describe_images(processor: Any, images: Sequence[Image.Image], splits: bool, limits: Limits) -> list[ImageView]:
    """Say what each image becomes.

    Args:
        processor: the model's.
        images: opened, not necessarily decoded.
        splits: whether tiles are cut, or the global view is all.
        limits: of the page.

    Raises:
        ValueError: naming the image that cannot be read.
    """
    if not images:
        return []
    tiler, count_views = processor.image_processor, model_code("tiling_blip3.count_views")
    arguments = image_arguments(processor, splits, limits)
    inputs = tiler(list(images), return_tensors="pt", **arguments)
    views = []
    for index, image in enumerate(images):
        is_turned = arguments["do_exif_transpose"] and is_stored_sideways(image)
        height, width = image.size if is_turned else image.size[::-1]
        grid = tiler.grid_of(height, width, splits)
        shown = tiler.tiles_to_images(inputs["pixel_values"][index, : count_views(grid)])
        num_tokens = processor.count_image_tokens(tuple(inputs["image_sizes"][index].tolist()))
        views.append(ImageView(height, width, grid, num_tokens, tuple(shown)))
    return views


def is_stored_sideways(image: Image.Image) -> bool:
    """Whether showing an image upright swaps its height and width."""
    try:
        return image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS
    except Exception:  # damaged EXIF, which says nothing about the pixels
        return False


def panel_html(views: Sequence[ImageView]) -> str:
    """Lay out what the model sees of each image."""
    if not views:
        return panel_note("Add an image to see its global view, its tiles and its tokens.")
    total = sum(view.num_tokens for view in views)
    blocks = []
    for index, view in enumerate(views):
        rows, columns = view.grid
        layout = f"grid {rows} x {columns}, and the global view" if rows else "global view alone"
        tiles = "".join(_img(tile, f"tile {place + 1}") for place, tile in enumerate(view.tiles[1:]))
        grid = (
            f'<figure class="tiles{" tall" if rows > columns else ""}">'
            f'<div style="grid-template-columns: repeat({columns}, 1fr)">{tiles}</div>'
            f"<figcaption>{rows * columns} tiles</figcaption></figure>"
        )
        blocks.append(
            f'<section><h4>Image {index + 1} <span class="count">{view.num_tokens} tokens</span></h4>'
            f"<p>{view.height} x {view.width} pixels (height x width), {layout}</p>"
            f'<div class="parts"><figure class="global"><div>{_img(view.tiles[0], "global view")}</div>'
            f"<figcaption>global view</figcaption></figure>{grid if rows else ''}</div></section>"
        )
    title = f"{len(views)} image{'s' if len(views) > 1 else ''}, {total} image tokens"
    return f'<div class="seen"><h3>{SEEN_TITLE} <small>{title}</small></h3>{"".join(blocks)}</div>'


def panel_note(text: str, is_error: bool = False) -> str:
    """The panel when there is nothing to lay out."""
    kind = "error" if is_error else "empty"
    return f'<div class="seen"><h3>{SEEN_TITLE}</h3><p class="{kind}">{html.escape(text)}</p></div>'


def _img(tile: Image.Image, title: str) -> str:
    buffer = io.BytesIO()
    tile.save(buffer, "WEBP", quality=90)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{title}" title="{title}" src="data:image/webp;base64,{encoded}">'


# -- Answers ----------------------------------------------------------------------------------------------------------


class StopWhenAsked(StoppingCriteria):
    """Ends generation at the next token once `event` is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Say for each row whether it is finished."""
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class Chat:
    """One model and the conversations about it.

    Args:
        processor: the model's.
        model: in evaluation mode, on its device.
        uploads: the folder the page keeps uploaded images in.
        limits: of the page.
    """

    def __init__(self, processor: Any, model: Any, uploads: Path, limits: Limits | None = None):
        self.processor, self.model, self.uploads = processor, model, uploads
        self.limits = Limits() if limits is None else limits
        self._running: dict[str, threading.Event] = {}  # by session
        self._model_lock = threading.Lock()  # a stopped answer may still be at its last token

    def prepare(self, turns: Sequence[Turn], options: Options) -> Any:
        """Turn a conversation that ends with a question into model inputs.

        Raises:
            ValueError: if an image cannot be read, or the model's context cannot hold it all.
        """
        images = fetch_images(paths_of(turns), self.uploads)
        inputs = self.processor.apply_chat_template(
            messages_of(turns, images),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=image_arguments(self.processor, options.splits, self.limits) if images else {},
        )
        num_tokens, context = inputs["input_ids"].shape[1], self.model.config.text_config.max_position_embeddings
        if num_tokens + options.max_new_tokens > context:
            raise ValueError(
                f"The conversation takes {num_tokens} tokens and the answer may take {options.max_new_tokens} but the "
                f"model reads {context} in all. It probably has too many images: start a new conversation, switch "
                "tiles off or ask for a shorter answer."
            )
        return inputs.to(self.model.device, self.model.dtype)

    def stream(self, inputs: Any, options: Options, stop: threading.Event) -> Iterator[tuple[str, int]]:
        """Generate in a thread and yield the text so far with the number of its tokens; the last is the whole answer.

        Args:
            inputs: of `prepare`.
            options: length and temperature, 0 for greedy.
            stop: set it to end after the next token.

        Raises:
            Exception: whatever the thread raised.
        """
        tokenizer = self.processor.tokenizer
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        is_sampled = options.temperature > 0
        sampling = {"do_sample": True, "temperature": options.temperature} if is_sampled else {"do_sample": False}
        outcome: dict[str, Any] = {}

        def generate() -> None:
            try:
                with self._model_lock, torch.inference_mode():
                    outcome["ids"] = self.model.generate(
                        **inputs,
                        **sampling,
                        max_new_tokens=options.max_new_tokens,
                        max_time=self.limits.max_seconds,
                        stopping_criteria=StoppingCriteriaList([StopWhenAsked(stop)]),
                        streamer=streamer,
                    )[0, inputs["input_ids"].shape[1] :]
            except Exception as error:  # it is raised again where the answer is read
                outcome["error"] = error
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
        if "error" in outcome:
            raise outcome["error"]
        # Pieces are decoded a few tokens at a time; a character of several tokens may differ from the whole.
        yield tokenizer.decode(outcome["ids"], skip_special_tokens=True).strip(), len(outcome["ids"])

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
        asked, options = [*turns, question], Options(int(max_new_tokens), temperature, splits)
        stop = self._running[request.session_hash] = threading.Event()
        start = time.perf_counter()
        try:
            check_question(question, turns, self.limits)
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
            images = fetch_images(paths, self.uploads)
            panel = panel_html(describe_images(self.processor, images, splits, self.limits))
        except ValueError as error:
            panel = panel_note(shorten_error(error), is_error=True)
        return panel, wanted

    def _explain(self, error: Exception) -> str:
        if isinstance(error, ValueError):
            return shorten_error(error)
        logger.error("an answer failed", exc_info=error)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            return "The model ran out of memory. The conversation is probably too long: start a new one."
        return f"The answer failed on the server ({type(error).__name__}). Its log says why; try again."


# -- The page ---------------------------------------------------------------------------------------------------------

CSS = """
.gradio-container { max-width: 1320px !important; margin: 0 auto !important; }
#title h1 { margin-bottom: 0; }
#notice { border-left: 4px solid #d97706; background: #d9770618; padding: 10px 14px; border-radius: 6px; }
#clear { align-self: center; }
#status { align-self: center; font-size: 13px; color: var(--body-text-color-subdued); padding: 0 4px; }
#chat button.example { border: 1px solid var(--border-color-primary); border-radius: 8px; }
#chat .message img { max-height: 120px; width: auto; margin: 0; border-radius: 6px; }
#chat .user > .message { width: fit-content; margin-left: auto; }
#chat .user > .message.component { display: inline-block; margin: 0 0 6px 6px; }
#chat .user.message { text-align: right; }
#chat .message-buttons-right { display: none; }
#question .submit-button { background: var(--button-primary-background-fill); color: white; padding: 6px 16px;
    border-radius: 8px; }
#question .stop-button { background: #b91c1c; color: white; padding: 6px 16px; border-radius: 8px; width: auto; }
.seen h3 { margin: 4px 0 8px; display: flex; justify-content: space-between; align-items: baseline; }
.seen small, .seen p, .seen figcaption { font-size: 13px; font-weight: 400; color: var(--body-text-color-subdued); }
.seen section { border-top: 1px solid var(--border-color-primary); padding: 10px 0 14px; }
.seen h4 { margin: 0; display: flex; justify-content: space-between; font-weight: 600; }
.seen p { margin: 2px 0 8px; }
.seen .count { font-weight: 500; color: var(--color-accent); }
.seen .parts { display: flex; gap: 16px; align-items: flex-start; }
.seen figure { margin: 0; }
.seen .global { flex: 0 0 30%; }
.seen .tiles { flex: 0 1 66%; }
.seen .tiles.tall { flex-basis: 30%; }
.seen .tiles > div { display: grid; gap: 3px; }
.seen img { display: block; width: 100%; border-radius: 3px; margin: 0; }
.seen figcaption { padding-top: 4px; }
.seen .error { color: #b91c1c; }
"""


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


def chat_log(examples: Sequence[dict]) -> gr.Chatbot:
    """The conversation, and questions to start with while it is empty."""
    log = gr.Chatbot(
        show_label=False,
        height=520,
        render_markdown=False,  # an answer is text: it draws no images and makes no links
        buttons=["copy"],
        feedback_options=None,
        placeholder="Add one image or several, and ask about them.",
        examples=[{"text": example["text"], "icon": example["files"][0]} for example in examples] or None,
        elem_id="chat",
    )
    log.keep_in_cache |= log.temp_files  # the icons
    return log


def refuse_urls(box: gr.MultimodalTextbox) -> None:
    """Keep Gradio from downloading a URL that a visitor sends in place of an uploaded file."""
    move = box.async_move_resource_to_block_cache

    async def move_files_only(name: Any) -> Any:
        if str(name).lower().startswith(("http:", "https:")):
            raise gr.Error("Images are read from uploads only, not from URLs.")
        return await move(name)

    box.async_move_resource_to_block_cache = move_files_only


def build_page(chat: Chat, name: str, examples: Sequence[dict] = ()) -> gr.Blocks:
    """Lay the page out and connect its parts.

    Args:
        chat: answers; its folder of uploads becomes Gradio's.
        name: of the checkpoint, shown under the title.
        examples: `text` and `files` of questions to start with.
    """
    limits = chat.limits
    os.environ["GRADIO_TEMP_DIR"] = str(chat.uploads)  # read when a component is made
    with gr.Blocks(
        title="BLIP-3", analytics_enabled=False, delete_cache=(limits.keep_seconds // 4, limits.keep_seconds)
    ) as page:
        turns, shown = gr.State([]), gr.State(None)
        gr.Markdown(f"# BLIP-3\nTalk about images with `{name}`, and see what the model sees.", elem_id="title")
        with gr.Row():
            with gr.Column(scale=3, min_width=420):
                shown_chat = chat_log(examples)
                box = input_box(limits)
                with gr.Row():
                    status = gr.HTML(elem_id="status")
                    clear = gr.Button("New conversation", size="sm", scale=0, min_width=160, elem_id="clear")
            with gr.Column(scale=2, min_width=340):
                splits = gr.Checkbox(
                    chat.processor.image_processor.do_image_splitting,
                    label="Split into tiles (off: the global view alone)",
                    elem_id="splits",
                )
                with gr.Row():
                    length = gr.Slider(
                        1, limits.max_new_tokens, 128, step=1, label="Max new tokens", min_width=150, elem_id="length"
                    )
                    temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: greedy)", min_width=150)
                panel = gr.HTML(panel_html([]), elem_id="seen")
        refuse_urls(box)
        private: dict = {"api_visibility": "private", "show_progress": "hidden"}
        asking = box.submit(
            chat.answer,
            [box, turns, length, temperature, splits],
            [box, shown_chat, turns, status],
            concurrency_limit=1,
            **private | {"show_progress": "minimal"},
        )
        box.stop(chat.stop, queue=False, **private)
        seeing: dict = {"inputs": [box, turns, splits, shown], "outputs": [panel, shown], "queue": False} | private
        gr.on([box.change, splits.change], chat.preview, trigger_mode="always_last", **seeing)
        forgetting = gr.on([clear.click, shown_chat.clear], chat.stop, queue=False, cancels=[asking], **private)
        emptied = forgetting.then(
            lambda: (input_box(limits), [], [], ""), None, [box, shown_chat, turns, status], queue=False, **private
        )
        emptied.then(chat.preview, **seeing)
        page.unload(chat.stop)

        def choose(chosen: gr.SelectData) -> dict:
            """Fill in an example; the browser says which one, and the server knows what it is."""
            return examples[int(chosen.index)]

        shown_chat.example_select(choose, None, box, queue=False, **private)
    return page


# -- Starting ---------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; Spaces and containers set host and port by Gradio's own variables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ROOT, help="checkpoint folder (default: this repository)")
    parser.add_argument("--subfolder", default="", help="checkpoint inside it (default: none)")
    host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    parser.add_argument("--host", default=host, help="address to listen on; 0.0.0.0 for all (default: %(default)s)")
    parser.add_argument("--port", type=int, default=port, help="default: %(default)s")
    return parser.parse_args(arguments)


def load(checkpoint: str | Path, subfolder: str = "") -> tuple[Any, Any]:
    """Load processor and model, on the GPU if there is one.

    Args:
        checkpoint: as `checkpoints.locate` takes it.
        subfolder: inside it.

    Raises:
        ValueError: if it is a base checkpoint, which has no chat template.
        FileNotFoundError: if there is no such checkpoint.
    """
    source = locate(checkpoint, subfolder)
    processor = AutoProcessor.from_pretrained(**source)
    if not processor.chat_template:
        raise ValueError(
            f"{subfolder or checkpoint} has no chat template but this page holds conversations. It is probably a base "
            "checkpoint, which continues text: pass an instruct checkpoint as --model."
        )
    model = AutoModelForImageTextToText.from_pretrained(**source, dtype="auto")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if model.device.type != device:  # a quantized model is there already, and refuses to be moved
        model = model.to(device)
    return processor, model.eval()


def load_examples(source: Path, folder: Path) -> list[dict]:
    """Copy the questions that stand beside a checkpoint, with their images, to where the page may read them.

    Args:
        source: with examples.json, as examples/images is; without it there are no examples.
        folder: to make.
    """
    if not (source / "examples.json").is_file():
        return []
    shutil.copytree(source, folder)
    examples = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    return [
        {
            "text": " ".join(example["prompt"].replace(IMAGE_TOKEN, " ").split()),
            "files": [str(folder / name) for name in example["images"]],
        }
        for example in examples
        if example["task"] != "rule"  # a few-shot prompt, for base checkpoints
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, build the page and serve it until it is interrupted."""
    args = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # containers end so; uploads are deleted as on Ctrl-C
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
    checkpoint, subfolder = args.model, args.subfolder
    with tempfile.TemporaryDirectory(prefix="blip3-page-") as scratch:
        try:
            processor, model = load(checkpoint, subfolder)
        except (FileNotFoundError, ValueError) as error:
            raise SystemExit(f"error: {error}") from None
        folder = folder_of(checkpoint, subfolder)
        chat = Chat(processor, model, Path(scratch) / "uploads")
        examples = load_examples(folder / "examples" / "images", Path(scratch) / "examples")
        name = folder.name
        launch(build_page(chat, name, examples), chat.limits, args.host, args.port)


def launch(page: gr.Blocks, limits: Limits, host: str, port: int | None, is_blocking: bool = True) -> str:
    """Serve the page; returns its address, at once where `is_blocking` is False."""
    page.queue(max_size=limits.max_waiting, default_concurrency_limit=1)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from the network
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        footer_links=[],
        max_file_size=f"{limits.max_megabytes}mb",
        state_session_capacity=limits.max_sessions,
        theme=gr.themes.Soft(primary_hue="teal", neutral_hue="slate", **fonts).set(
            block_border_width="1px",
            block_label_border_width="1px",
            block_title_background_fill="transparent",
            block_title_text_color="*body_text_color",
            block_title_text_weight="500",
            block_title_padding="0",
        ),
        css=CSS,
        prevent_thread_lock=not is_blocking,
    )
    return address


if __name__ == "__main__":
    main()
