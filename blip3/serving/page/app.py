# SPDX-License-Identifier: Apache-2.0
"""A page to talk with BLIP-3 about images: streamed answers, and the tiles and tokens each image becomes.

    python -m blip3.serving.page.app                               this repository's small model
    python -m blip3.serving.page.app --model FOLDER                any converted checkpoint

    question, images --+--> chat.py: messages --> answering.py, in a thread --> text, piece by piece
                       |
                       +--> panel.py: sizes, grids, tokens and tiles of each image

A Hugging Face Space carries this folder; the card is blip3/serving/space/README.md.
"""

import argparse
import json
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ...answering import IMAGE_TOKEN, Answerer
from ...checkpoints import folder_of
from ...hub import ROOT
from .chat import Chat, Limits, input_box
from .panel import panel_html

STYLE = Path(__file__).with_name("style.css")


# -- The page ---------------------------------------------------------------------------------------------------------


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
            answerer = Answerer.load(checkpoint, subfolder, must_chat=True)
        except (FileNotFoundError, ValueError) as error:
            raise SystemExit(f"error: {error}") from None
        folder = folder_of(checkpoint, subfolder)
        chat = Chat(answerer, Path(scratch) / "uploads")
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
        css=STYLE.read_text(encoding="utf-8"),
        prevent_thread_lock=not is_blocking,
    )
    return address


if __name__ == "__main__":
    main()
