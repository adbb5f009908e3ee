# SPDX-License-Identifier: Apache-2.0
"""Ask a picture a question and see what the model looked at.

    python demo.py                                                   a drawn picture, a tiny model with random weights
    python demo.py --model FOLDER --image FILE --question "..."      your own

Writes one figure: the picture with its chosen tiles, the global view, the tokens each part takes, and the answer.
Until the repository ships trained weights, the run without --model converts a random checkpoint made on the spot: it
shows that every part works, and its answer means nothing.
"""

import argparse
import tempfile
import textwrap
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

import convert_weights
from random_checkpoint import write_release_layout

PANEL, MARGIN, LINE = 420, 24, 22


def main() -> None:
    """Load, ask, print and draw."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        model_folder = args.model or make_random_model(Path(scratch))
        start = time.perf_counter()
        processor = AutoProcessor.from_pretrained(model_folder, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(model_folder, trust_remote_code=True, dtype="auto").eval()
        picture = Image.open(args.image).convert("RGB") if args.image else draw_scene()
        print(
            f"Loaded {sum(p.numel() for p in model.parameters()):,} parameters in {time.perf_counter() - start:.1f} s."
        )
        inputs = prepare(processor, picture, args.question).to(model.dtype)
        parts = describe_parts(processor, picture, inputs)
        print(f"\nQuestion: {args.question}\nAnswer:   ", end="", flush=True)
        answer = ask(model, processor, inputs, args.max_new_tokens)
    note = "" if args.model else "The weights are random: the answer is noise, the pipeline is real."
    print(f"\n{note}")
    figure = draw_figure(picture, inputs, processor, args.question, answer, [*parts, note])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.save(args.output)
    print(f"Figure: {args.output}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="converted folder (default: a random tiny model)")
    parser.add_argument("--image", type=Path, help="picture file (default: a drawn scene of 960 x 1280 pixels)")
    parser.add_argument("--question", default="What is written on the sign?", help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="length of the answer (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo.png"), help="figure (default: %(default)s)")
    return parser.parse_args()


def make_random_model(scratch: Path) -> Path:
    """Make a random checkpoint in the release's layout and convert it."""
    source = write_release_layout(scratch / "release")
    output = scratch / "blip3-random"
    arguments = [str(source), str(output), "--vision-config", str(source / "siglip_vision_config.json"), "--verify"]
    if convert_weights.main(arguments):
        raise SystemExit("The random checkpoint could not be converted; the lines above say why.")
    return output


def prepare(processor, picture: Image.Image, question: str):
    """Turn a question about a picture into model inputs."""
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@torch.no_grad()
def ask(model: torch.nn.Module, processor, inputs, max_new_tokens: int) -> str:
    """Generate and stream the answer."""
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def describe_parts(processor, picture: Image.Image, inputs) -> list[str]:
    """Say what the picture became, in pixels, tiles and tokens."""
    rows, columns = processor.image_processor.grid_of(picture.height, picture.width)
    image_tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    side = processor.image_processor.tile_size
    parts = [
        f"picture: {picture.height} x {picture.width} pixels (height x width)",
        f"grid: {rows} x {columns} tiles of {side} pixels, and the global view",
        f"image tokens: {1 + rows * columns} parts x {processor.num_latents} = {image_tokens}",
        f"prompt: {inputs['input_ids'].shape[1]} tokens in all",
    ]
    print("\n".join(parts))
    return parts


def draw_scene() -> Image.Image:
    """Draw a street at dusk with a sign: 960 x 1280 pixels, every pixel ours."""
    height, width = 960, 1280
    sky = Image.linear_gradient("L").resize((width, height))
    scene = Image.composite(Image.new("RGB", sky.size, "#ffb37a"), Image.new("RGB", sky.size, "#27408b"), sky)
    pen = ImageDraw.Draw(scene)
    pen.ellipse((900, 470, 1080, 650), fill="#ffe08a")
    pen.polygon([(0, 640), (330, 470), (700, 660), (1010, 540), (1280, 640), (1280, 960), (0, 960)], fill="#2f5d3a")
    pen.polygon([(520, 960), (690, 660), (730, 660), (960, 960)], fill="#4a4a4f")
    for index, left in enumerate((60, 250, 1010)):
        top = 520 + 30 * index
        pen.rectangle((left, top, left + 150, 860), fill=("#8c3b2e", "#b98b5e", "#5b6c8f")[index])
        pen.polygon([(left - 20, top), (left + 75, top - 90), (left + 170, top)], fill="#3b2a26")
        for row in range(3):
            pen.rectangle((left + 25, top + 40 + 90 * row, left + 60, top + 90 + 90 * row), fill="#ffe9a8")
            pen.rectangle((left + 90, top + 40 + 90 * row, left + 125, top + 90 + 90 * row), fill="#ffe9a8")
    pen.rectangle((455, 560, 467, 880), fill="#d8d8d8")
    pen.rectangle((380, 470, 545, 570), fill="white", outline="#1a1a1a", width=5)
    pen.text((462, 520), "No. 47", fill="#b00020", font=ImageFont.load_default(40), anchor="mm")
    return scene


def draw_figure(picture, inputs, processor, question: str, answer: str, notes: list[str]) -> Image.Image:
    """Lay out the picture with its grid, the global view, the tiles and the answer."""
    rows, columns = processor.image_processor.grid_of(picture.height, picture.width)
    tiles = (inputs["pixel_values"][0].float().mul(0.5).add(0.5).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
    tiled = picture.copy()
    tiled.thumbnail((PANEL, PANEL))
    global_view = Image.fromarray(tiles[0]).resize((PANEL // 2, PANEL // 2))
    side = PANEL // max(rows, columns, 1) - 6
    lefts = (MARGIN, 2 * MARGIN + PANEL, 3 * MARGIN + PANEL + PANEL // 2)
    figure = Image.new("RGB", (lefts[2] + PANEL + MARGIN, PANEL + 3 * MARGIN + 9 * LINE), "white")
    pen, font = ImageDraw.Draw(figure), ImageFont.load_default(16)
    top = MARGIN + LINE
    titles = ("picture", "global view", f"tiles ({rows} x {columns}), padding black")
    for left, title in zip(lefts, titles, strict=True):
        pen.text((left, MARGIN - 6), title, fill="black", font=font)
    figure.paste(tiled, (lefts[0], top))
    figure.paste(global_view, (lefts[1], top))
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        tile = Image.fromarray(tiles[1 + index]).resize((side, side))
        figure.paste(tile, (lefts[2] + column * (side + 6), top + row * (side + 6)))
    lines = [*notes, "", *textwrap.wrap(f"Question: {question}", 110), *textwrap.wrap(f"Answer: {answer}", 110)]
    for index, line in enumerate(lines[:9]):
        pen.text((MARGIN, PANEL + 2 * MARGIN + index * LINE), line, fill="black", font=font)
    return figure


if __name__ == "__main__":
    main()
