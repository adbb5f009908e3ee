# SPDX-License-Identifier: Apache-2.0
"""Ask images questions and see what the model looked at.

    python demo.py                                                          the small model and its example images
    python demo.py --image FILE --question "What is written in the picture?"    your own
    python demo.py --model FOLDER --image FILE --question "..."             another checkpoint

The example images were rendered from the held-out split: no training sees what they show. The figure has the first
image with its chosen tiles, the global view, the tokens they become, and every answer.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from transformers import TextStreamer

from .answering import Answerer, render
from .checkpoints import folder_of, locate
from .data.fonts import wrap
from .data.formats import parse_boxes
from .data.images import ImageSource
from .data.records import Turn, to_message
from .evaluation.metrics import box_iou
from .hub import ROOT, model_code

WIDTH, MARGIN, GAP, LABEL, CARDS_IN_A_ROW = 1320, 28, 10, 26, 3
INK, FAINT, GOOD, BAD = "#1d2430", "#7a8391", "#1f7a4d", "#b3402a"
TILE_COLOURS = ("#d9480f", "#1864ab", "#2b8a3e", "#862e9c", "#c92a2a", "#5c940d")


@dataclass
class Exchange:
    """A question about images, and its answer."""

    images: list[Image.Image]
    prompt: str
    """A question, or a few-shot prompt; one `<image>` an image."""
    reference: str = ""
    task: str = "question"
    answer: str = field(default="", init=False)

    @property
    def is_few_shot(self) -> bool:
        """Whether the base model continues the prompt."""
        return self.task == "rule"

    @property
    def question(self) -> str:
        """What a person reads."""
        if self.is_few_shot:
            return self.prompt.split("<image>")[-1]
        return " ".join(self.prompt.replace("<image>", "").split())


@dataclass(frozen=True)
class Line:
    """A line of text in the figure."""

    text: str
    size: int
    colour: str

    @property
    def height(self) -> int:
        """Pixels from this line to the next."""
        return round(1.3 * self.size)


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, ask, print and make the figure."""
    args = parse_arguments(arguments)
    try:
        folder = folder_of(args.model)
        locate(folder)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    start = time.perf_counter()
    exchanges = [own_question(args)] if args.image else load_examples(folder)
    models = {folder: load(folder)}
    for exchange in exchanges:
        wanted = folder / "base" if exchange.is_few_shot and (folder / "base").is_dir() else folder
        if wanted not in models:
            models[wanted] = load(wanted)
        print(f"\n{exchange.question}\n  -> ", end="", flush=True)
        exchange.answer = ask(models[wanted], exchange, args.max_new_tokens)
        if exchange.reference:
            print(f"     ({'right' if is_right(exchange) else f'it is {exchange.reference}'})")
    figure = render_figure(exchanges, models[folder].processor)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.save(args.output)
    print(f"\nFigure: {args.output}   ({time.perf_counter() - start:.0f} s in all)")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ROOT, help="checkpoint folder, or owner/name (default: this repository)")
    parser.add_argument("--image", type=Path, action="append", help="image file; repeat for several")
    parser.add_argument("--question", default="What is written in the picture?", help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="length of an answer (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo.png"), help="figure (default: %(default)s)")
    return parser.parse_args(arguments)


def own_question(args: argparse.Namespace) -> Exchange:
    """Make an exchange of the user's images and question, images first unless the question places them."""
    images = [open_image(path) for path in args.image]
    prompt = args.question if "<image>" in args.question else "<image>\n" * len(images) + args.question
    return Exchange(images, prompt)


def open_image(path: Path) -> Image.Image:
    """Open an image file as RGB, upright.

    Raises:
        SystemExit: with one line, if there is no such file or it is no image.
    """
    if not path.exists():
        raise SystemExit(
            f"error: The image {str(path)!r} cannot be opened: no such file. An image file is expected. The name is "
            "probably misspelt or starts in another folder: correct it, or pass the whole path."
        )
    try:
        return ImageSource(path=str(path)).open()
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


def load_examples(model: Path) -> list[Exchange]:
    """Read the example images that stand beside a model.

    Raises:
        SystemExit: if there are none.
    """
    folder = (model if (model / "examples" / "images").is_dir() else ROOT) / "examples" / "images"
    if not (folder / "examples.json").is_file():
        raise SystemExit(
            f"{folder} has no examples.json, so there is nothing to ask. The checkpoint was probably copied without "
            "its examples: pass --image FILE --question TEXT."
        )
    examples = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    return [
        Exchange(
            [open_image(folder / name) for name in example["images"]],
            example["prompt"],
            example["truth"],
            example["task"],
        )
        for example in examples
    ]


def load(folder: Path) -> Answerer:
    """Load processor and model, on a GPU if there is one."""
    answerer = Answerer.load(folder, dtype="float32")
    print(f"{folder.name}: {sum(p.numel() for p in answerer.model.parameters()) / 1e6:.1f} million parameters")
    return answerer


def ask(answerer: Answerer, exchange: Exchange, max_new_tokens: int) -> str:
    """Generate and stream the answer."""
    processor, prompt = answerer.processor, exchange.prompt
    continues = exchange.is_few_shot or not processor.chat_template
    text = render(processor, prompt if continues else [to_message(Turn("user", prompt))])
    inputs = answerer.prepare([text], [exchange.images])
    answerer.check_context(inputs["input_ids"].shape[1], max_new_tokens)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    (answer,) = answerer.generate(inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    return answer.text


def is_right(exchange: Exchange) -> bool:
    """Whether the answer is the reference; of a box, whether the two overlap by half."""
    if exchange.task == "box":
        given, true = (parse_boxes(text) for text in (exchange.answer, exchange.reference))
        return bool(given) and box_iou(given[0], true[0]) > 0.5
    return exchange.answer == exchange.reference


# ------------------------------------------------------------------------------------------------------ the figure


def render_figure(exchanges: list[Exchange], processor: Any) -> Image.Image:
    """Show what the model saw of the first image, and every exchange below, up to three side by side."""
    top = render_views(exchanges[0], processor)
    columns = min(CARDS_IN_A_ROW, len(exchanges))
    width = (WIDTH - MARGIN * (columns + 1)) // columns
    cards = [render_card(exchange, width) for exchange in exchanges]
    rows = [cards[index : index + columns] for index in range(0, len(cards), columns)]
    heights = [max(card.height for card in row) for row in rows]
    figure = Image.new("RGB", (WIDTH, top.height + sum(heights) + MARGIN * (len(rows) + 1)), "white")
    figure.paste(top, (0, 0))
    y = top.height + MARGIN // 2
    for row, height in zip(rows, heights, strict=True):
        for index, card in enumerate(row):
            figure.paste(card, (MARGIN + index * (width + MARGIN), y))
        y += height + MARGIN
    return figure


def render_views(exchange: Exchange, processor: Any) -> Image.Image:
    """Show the first image with its grid, the global view and the tiles, each with its tokens."""
    image, image_processor = exchange.images[0], processor.image_processor
    rows, columns = image_processor.grid_of(image.height, image.width)
    views = views_of(image, image_processor)
    top, height, global_side = 100, 380, 190
    x = 2 * MARGIN + 460
    tiles_x = x + global_side + MARGIN
    side = min(  # the largest with which all tiles stay inside the figure
        (WIDTH - tiles_x - MARGIN - GAP * (columns - 1)) // max(1, columns),
        (height - GAP * (rows - 1)) // max(1, rows),
        global_side,
    )
    whole = fit(image, 460, height)
    height = max(whole.height, global_side + LABEL, rows * (side + GAP) + LABEL)
    figure = Image.new("RGB", (WIDTH, top + height + GAP), "white")
    pen = ImageDraw.Draw(figure)
    write(pen, (MARGIN, 20), "What the model looks at", 26)
    write(pen, (MARGIN, 56), count_tokens(image, processor, rows, columns), 16, FAINT)
    outline_tiles(whole, rows, columns)
    figure.paste(whole, (MARGIN, top))
    figure.paste(views[0].resize((global_side, global_side), Image.Resampling.NEAREST), (x, top))
    pen.rectangle((x, top, x + global_side - 1, top + global_side - 1), outline=FAINT)
    write(pen, (x, top + global_side + 4), "global view", 15, FAINT)
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        corner = (tiles_x + column * (side + GAP), top + row * (side + GAP))
        figure.paste(views[1 + index].resize((side, side), Image.Resampling.NEAREST), corner)
        colour = TILE_COLOURS[index % len(TILE_COLOURS)]
        pen.rectangle((corner[0], corner[1], corner[0] + side - 1, corner[1] + side - 1), outline=colour, width=4)
    if rows * columns:
        write(pen, (tiles_x, top + rows * (side + GAP) + 2), "tiles", 15, FAINT)
    return figure


def views_of(image: Image.Image, image_processor: Any) -> list[Image.Image]:
    """Give the global view and the tiles as the model sees them: padded, at the tower's resolution."""
    return image_processor.tiles_to_images(image_processor(image, return_tensors="pt")["pixel_values"][0])


def count_tokens(image: Image.Image, processor: Any, rows: int, columns: int) -> str:
    """Say how many tokens the image becomes."""
    shown = processor.image_processor.image_size_for_model(image.height, image.width)
    num_tokens = processor.count_image_tokens(shown)
    num_views = model_code("tiling_blip3.count_views")((rows, columns))
    product = f"{num_views} x {processor.num_latents} = "
    is_product = num_tokens == num_views * processor.num_latents  # each view is resampled by itself
    return (
        f"{image.height} x {image.width} pixels, global view and {rows} x {columns} tiles: "
        f"{product if is_product else ''}{num_tokens} image tokens"
    )


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize an image to the largest size within a box."""
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def outline_tiles(image: Image.Image, rows: int, columns: int) -> None:
    """Outline the tiles over the image, as far as they show it."""
    if not rows * columns:
        return
    places = model_code("tiling_blip3.view_places")((image.height, image.width), (rows, columns), 1)
    pen = ImageDraw.Draw(image)
    for index, (scale, _, x, y) in enumerate(places[1:]):
        x, y, side = -x / scale, -y / scale, 1 / scale  # the tile in pixels of this image
        box = (max(0, x), max(0, y), min(image.width, x + side) - 1, min(image.height, y + side) - 1)
        if box[0] <= box[2] and box[1] <= box[3]:
            pen.rectangle(box, outline=TILE_COLOURS[index % len(TILE_COLOURS)], width=4)


def render_card(exchange: Exchange, width: int) -> Image.Image:
    """Show the images of an exchange with question and answer, both whole: the card is as high as they need."""
    images, room = place_images(exchange.images, width)
    lines = card_lines(exchange, width - 2 * GAP)
    text_top = room + 4
    card = Image.new("RGB", (width, text_top + sum(line.height for line in lines) + 12), "#f6f7f9")
    for image, corner in images:
        card.paste(image, corner)
    if exchange.task == "box":
        outline_box(card, images[0][0], exchange.answer)
    pen, y = ImageDraw.Draw(card), text_top
    for line in lines:
        write(pen, (GAP, y), line.text, line.size, line.colour)
        y += line.height
    return card


def place_images(images: list[Image.Image], width: int) -> tuple[list[tuple[Image.Image, tuple[int, int]]], int]:
    """Shrink images and place them in rows.

    Returns:
        each image with its corner, and the height they take.
    """
    per_row = min(len(images), max(1, (width - GAP) // (80 + GAP)))
    height = 190 if len(images) <= per_row else 110
    column = (width - GAP * (per_row + 1)) // per_row
    shrunk, placed, y = [fit(image, column, height) for image in images], [], GAP
    for first in range(0, len(shrunk), per_row):
        row = shrunk[first : first + per_row]
        placed += [(image, (GAP + place * (column + GAP), y)) for place, image in enumerate(row)]
        y += max(image.height for image in row) + GAP
    return placed, y


def card_lines(exchange: Exchange, width: int) -> list[Line]:
    """Give question, answer and, where it differs, the reference answer, wrapped."""
    is_wrong = bool(exchange.reference) and not is_right(exchange)
    colour = INK if not exchange.reference else BAD if is_wrong else GOOD
    texts = [(exchange.question, 16, INK), (exchange.answer or "(nothing)", 20, colour)]
    texts += [(f"it is {exchange.reference}", 15, FAINT)] if is_wrong else []
    return [
        Line(text, size, colour)
        for whole, size, colour in texts
        for text in wrap(whole, width, ImageFont.load_default(size))
    ]


def outline_box(card: Image.Image, image: Image.Image, answer: str) -> None:
    """Outline the box of an answer over the image in the card's corner."""
    boxes = parse_boxes(answer)
    if not boxes:
        return
    x1, y1, x2, y2 = boxes[0]
    corners = (GAP + x1 * image.width, GAP + y1 * image.height, GAP + x2 * image.width, GAP + y2 * image.height)
    if corners[0] < corners[2] and corners[1] < corners[3]:
        ImageDraw.Draw(card).rectangle(corners, outline="#d9480f", width=3)


def write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, size: int, colour: str = INK) -> None:
    """Write a line of text."""
    pen.text(corner, text, fill=colour, font=ImageFont.load_default(size))


if __name__ == "__main__":
    main()
