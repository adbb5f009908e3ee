# SPDX-License-Identifier: Apache-2.0
"""Ask pictures questions and see what the model looked at.

    python demo.py                                                          mini/ and its example pictures
    python demo.py --image FILE --question "What is written in the picture?"    your own
    python demo.py --model FOLDER --image FILE --question "..."             another checkpoint

The example pictures were drawn from the held-out split: no training sees what they show. The figure has the first
picture with its chosen tiles, the global view, the tokens each part takes, and every answer.
"""

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

from data.formats import parse_boxes
from data.records import Picture, Turn, to_message
from evaluation.checkpoints import find_code
from evaluation.metrics import box_iou

HERE = Path(__file__).resolve().parent
MINI = HERE / "mini"
WIDTH, MARGIN, LINE = 1320, 28, 24
INK, FAINT, GOOD, BAD = "#1d2430", "#7a8391", "#1f7a4d", "#b3402a"
TILE_COLOURS = ("#d9480f", "#1864ab", "#2b8a3e", "#862e9c", "#c92a2a", "#5c940d")


@dataclass
class Exchange:
    """A question about pictures, and its answer."""

    pictures: list[Image.Image]
    prompt: str
    """A question, or a few-shot prompt; one `<image>` a picture."""
    truth: str = ""
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


def main() -> None:
    """Load, ask, print and draw."""
    args = parse_arguments()
    folder = args.model
    start = time.perf_counter()
    exchanges = [own_question(args)] if args.image else load_examples(folder)
    models = {folder: load(folder)}
    for exchange in exchanges:
        wanted = folder / "base" if exchange.is_few_shot and (folder / "base").is_dir() else folder
        if wanted not in models:
            models[wanted] = load(wanted)
        processor, model = models[wanted]
        print(f"\n{exchange.question}\n  -> ", end="", flush=True)
        exchange.answer = ask(model, processor, exchange, args.max_new_tokens)
        if exchange.truth:
            print(f"     ({'right' if is_right(exchange) else f'it is {exchange.truth}'})")
    figure = draw_figure(exchanges, models[folder][0])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.save(args.output)
    print(f"\nFigure: {args.output}   ({time.perf_counter() - start:.0f} s in all)")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MINI, help="checkpoint folder (default: mini)")
    parser.add_argument("--image", type=Path, action="append", help="picture file; repeat for several")
    parser.add_argument("--question", default="What is written in the picture?", help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="length of an answer (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo.png"), help="figure (default: %(default)s)")
    return parser.parse_args()


def own_question(args: argparse.Namespace) -> Exchange:
    """Make an exchange of the user's pictures and question, pictures first unless the question places them."""
    pictures = [open_picture(path) for path in args.image]
    prompt = args.question if "<image>" in args.question else "<image>\n" * len(pictures) + args.question
    return Exchange(pictures, prompt)


def open_picture(path: Path) -> Image.Image:
    """Open an image file as RGB, upright.

    Raises:
        SystemExit: with one line, if there is no such file or it is no image.
    """
    try:
        return Picture(path=str(path)).open()
    except FileNotFoundError:
        raise SystemExit(
            f"error: The image {str(path)!r} cannot be opened: no such file. An image file is expected. The name is "
            "probably misspelt or starts in another folder: correct it, or pass the whole path."
        ) from None
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


def load_examples(model: Path) -> list[Exchange]:
    """Read the example pictures that stand beside a model.

    Raises:
        SystemExit: if there are none.
    """
    folder = (model if (model / "examples").is_dir() else MINI) / "examples"
    if not (folder / "examples.json").is_file():
        raise SystemExit(
            f"{folder} has no examples.json, so there is nothing to ask. The checkpoint was probably copied without "
            "its examples: pass --image FILE --question TEXT."
        )
    examples = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    return [
        Exchange(
            [open_picture(folder / name) for name in example["images"]],
            example["prompt"],
            example["truth"],
            example["task"],
        )
        for example in examples
    ]


def load(folder: Path) -> tuple[Any, Any]:
    """Load processor and model."""
    source, subfolder = find_code(folder)
    options = {"subfolder": subfolder, "trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(source, **options)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32, **options)
    print(f"{folder.name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")
    return processor, model.eval()


@torch.no_grad()
def ask(model: Any, processor: Any, exchange: Exchange, max_new_tokens: int) -> str:
    """Generate and stream the answer."""
    text = exchange.prompt
    if not exchange.is_few_shot:
        messages = [to_message(Turn("user", text))]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, images=exchange.pictures, return_tensors="pt").to(model.dtype)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def is_right(exchange: Exchange) -> bool:
    """Whether the answer is the truth; of a box, whether the two overlap by half."""
    if exchange.task == "box":
        given, true = (parse_boxes(text) for text in (exchange.answer, exchange.truth))
        return bool(given) and box_iou(given[0], true[0]) > 0.5
    return exchange.answer == exchange.truth


# ------------------------------------------------------------------------------------------------------ the figure


def draw_figure(exchanges: list[Exchange], processor: Any) -> Image.Image:
    """Draw what the model saw of the first picture, and every exchange below."""
    top = draw_parts(exchanges[0], processor)
    cards = [draw_card(exchange) for exchange in exchanges]
    rows = [cards[index : index + 3] for index in range(0, len(cards), 3)]
    heights = [max(card.height for card in row) for row in rows]
    figure = Image.new("RGB", (WIDTH, top.height + sum(heights) + MARGIN * (len(rows) + 1)), "white")
    figure.paste(top, (0, 0))
    y = top.height + MARGIN // 2
    for row, height in zip(rows, heights, strict=True):
        for index, card in enumerate(row):
            figure.paste(card, (MARGIN + index * (card.width + MARGIN), y))
        y += height + MARGIN
    return figure


def draw_parts(exchange: Exchange, processor: Any) -> Image.Image:
    """Draw the picture with its grid, the global view and the tiles, each with its tokens."""
    picture, image_processor = exchange.pictures[0], processor.image_processor
    rows, columns = image_processor.grid_of(picture.height, picture.width)
    tiles = image_processor(picture, return_tensors="pt")["pixel_values"][0]
    mean, std = (
        torch.tensor(value).view(-1, 1, 1) for value in (image_processor.image_mean, image_processor.image_std)
    )
    shown = [Image.fromarray(((t * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()) for t in tiles]
    height, side = 380, 380 // max(rows, 2)
    whole = picture.resize((round(picture.width * height / picture.height), height), Image.Resampling.BICUBIC)
    whole.thumbnail((460, height))
    outline_tiles(whole, rows, columns)
    figure = Image.new("RGB", (WIDTH, height + 150), "white")
    pen = ImageDraw.Draw(figure)
    tokens = processor.num_latents
    write(pen, (MARGIN, 20), "What the model looks at", 26)
    total = f"{1 + rows * columns} parts x {tokens} = {(1 + rows * columns) * tokens} image tokens"
    write(
        pen, (MARGIN, 56), f"{picture.height} x {picture.width} pixels, {rows} x {columns} tiles: {total}", 16, FAINT
    )
    figure.paste(whole, (MARGIN, 100))
    x = 2 * MARGIN + 460
    figure.paste(shown[0].resize((190, 190), Image.Resampling.NEAREST), (x, 100))
    pen.rectangle((x, 100, x + 189, 289), outline=FAINT)
    write(pen, (x, 298), f"global view: {tokens} tokens", 15, FAINT)
    x += 190 + MARGIN
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        corner = (x + column * (side + 10), 100 + row * (side + 10))
        figure.paste(shown[1 + index].resize((side, side), Image.Resampling.NEAREST), corner)
        colour = TILE_COLOURS[index % len(TILE_COLOURS)]
        pen.rectangle((corner[0], corner[1], corner[0] + side - 1, corner[1] + side - 1), outline=colour, width=4)
    write(pen, (x, 100 + rows * (side + 10) + 4), f"tiles: {tokens} tokens each", 15, FAINT)
    return figure


def outline_tiles(picture: Image.Image, rows: int, columns: int) -> None:
    """Draw the tiles over the picture, as far as they show it."""
    if not rows * columns:
        return
    scale = max(picture.height / rows, picture.width / columns)  # side of a tile in pixels of this picture
    top, left = (picture.height - rows * scale) / 2, (picture.width - columns * scale) / 2
    pen = ImageDraw.Draw(picture)
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        x, y = left + column * scale, top + row * scale
        box = (max(0, x), max(0, y), min(picture.width, x + scale) - 1, min(picture.height, y + scale) - 1)
        pen.rectangle(box, outline=TILE_COLOURS[index % len(TILE_COLOURS)], width=4)


def draw_card(exchange: Exchange) -> Image.Image:
    """Draw the pictures of an exchange with question and answer."""
    width = (WIDTH - 4 * MARGIN) // 3
    card = Image.new("RGB", (width, 330), "#f6f7f9")
    shown = [picture.copy() for picture in exchange.pictures]
    room = (width - 20 - 10 * (len(shown) - 1)) // len(shown)
    x = 10
    for picture in shown:
        picture.thumbnail((room, 190))
        card.paste(picture, (x, 10))
        x += room + 10
    if exchange.task == "box":
        outline_box(card, shown[0], exchange.answer)
    pen = ImageDraw.Draw(card)
    y = 210
    for line in wrap(exchange.question, width - 24, 16):
        write(pen, (12, y), line, 16)
        y += 21
    colour = INK if not exchange.truth else GOOD if is_right(exchange) else BAD
    for line in wrap(exchange.answer or "(nothing)", width - 24, 20)[:2]:
        write(pen, (12, y + 4), line, 20, colour)
        y += 26
    if exchange.truth and not is_right(exchange):
        write(pen, (12, y + 6), f"it is {exchange.truth}", 15, FAINT)
    return card


def outline_box(card: Image.Image, picture: Image.Image, answer: str) -> None:
    """Draw the box of an answer over the picture in the card's corner."""
    boxes = parse_boxes(answer)
    if not boxes:
        return
    x1, y1, x2, y2 = boxes[0]
    corners = (10 + x1 * picture.width, 10 + y1 * picture.height, 10 + x2 * picture.width, 10 + y2 * picture.height)
    if corners[0] < corners[2] and corners[1] < corners[3]:
        ImageDraw.Draw(card).rectangle(corners, outline="#d9480f", width=3)


def wrap(text: str, width: int, size: int) -> list[str]:
    """Break a text into lines of at most so many pixels."""
    font, lines = ImageFont.load_default(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, size: int, colour: str = INK) -> None:
    """Write a line of text."""
    pen.text(corner, text, fill=colour, font=ImageFont.load_default(size))


if __name__ == "__main__":
    main()
