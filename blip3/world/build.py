# SPDX-License-Identifier: Apache-2.0
r"""Write rendered records to disk, or render a sheet of samples to look at.

    python -m blip3.world.build --task count relation --count 10000 --output rendered
    python -m blip3.world.build --preview sheet.png
    python -m blip3.world.build --layout pope --count 100 --output look-alikes

    rendered/build.json                             what was asked for; another request in the same folder is refused
    rendered/count-train-00000.jsonl                   records, a shard each; complete or absent
    rendered/images/count-train-00000/0000-0.png       their images; none with --images drawing
    rendered/count-train-00000.parquet                 with --format parquet instead, images inside

Run the same command again after an interruption: complete shards are kept.
"""

import argparse
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from ..data.fonts import load_font, shorten, wrap
from ..data.images import ImageSource
from ..data.records import IMAGE_TOKEN, Record, write_jsonl
from ..files import only_writer_in, write_text, writing
from ..refusals import check_positive
from .layouts.lmms_lab import write_lmms_lab
from .layouts.posttraining import write_hallusionbench, write_pope, write_vlguard
from .layouts.vlmevalkit import write_vlmevalkit
from .settings import WorldSettings, load_settings, with_defaults
from .splits import SPLITS
from .tasks import TASKS, rendered_records

COUNT = 1000
LAYOUTS: dict[str, Callable[..., Any]] = {
    "hallusionbench": write_hallusionbench,
    "lmms-lab": write_lmms_lab,
    "pope": write_pope,
    "vlguard": write_vlguard,
    "vlmevalkit": write_vlmevalkit,
}
"""Files of public benchmarks to write held-out records in: (folder, count, seed, settings) -> files."""


def build(
    tasks: Sequence[str],
    split: str,
    seed: int,
    count: int,
    output: str | Path,
    settings: WorldSettings | None = None,
    *,
    shard_size: int = 1000,
    format: str = "jsonl",
    images: str = "png",
) -> list[Path]:
    """Write `count` records of each task, in shards.

    Args:
        tasks: keys of `TASKS`.
        split: `train` or `held_out`.
        seed: of every task's series.
        count: records of each task.
        output: folder, created if missing.
        settings: what may be rendered; the defaults if None.
        shard_size: records in a file.
        format: `jsonl` or `parquet`.
        images: `png`, `webp` (lossless) or `drawing`: descriptions instead of image files, for `jsonl` only.

    Returns:
        The shards, in order.

    Raises:
        ValueError: if the folder holds records of another request, or parquet was asked for with drawings.
    """
    check_positive("count is", count)
    check_positive("shard_size is", shard_size)
    if format == "parquet" and images == "drawing":
        raise ValueError(
            f"The format {format} with images {images} was asked for, but parquet holds png or webp. The images were "
            "probably meant for jsonl: ask for that format, or for png."
        )
    output, settings = Path(output), settings or WorldSettings()
    output.mkdir(parents=True, exist_ok=True)
    _check_request(output, {"seed": seed, "shard_size": shard_size, "pictures": images, "settings": settings.__dict__})
    shards = []
    with tqdm(total=count * len(tasks), unit="record", disable=None) as bar:
        for task, start in itertools.product(tasks, range(0, count, shard_size)):
            size = min(shard_size, count - start)
            shard = output / f"{task}-{split}-{start // shard_size:05d}.{format}"
            bar.set_description(shard.stem)
            if not _is_complete(shard, size):
                records = rendered_records(task, split, seed, size, settings, start)
                _write_shard(records, shard, images)
            shards.append(shard)
            bar.update(size)
    return shards


def _check_request(output: Path, request: dict[str, Any]) -> None:
    path, text = output / "build.json", json.dumps(request, indent=2, default=list) + "\n"
    if path.is_file() and _complete(json.loads(path.read_text(encoding="utf-8"))) != json.loads(text):
        raise ValueError(
            f"The folder {output} holds records of another request (see build.json), but a folder holds one seed, "
            "shard size, kind of images and settings. An option was probably changed: write to another folder, or "
            "delete this one."
        )
    write_text(path, text)


def _complete(request: dict[str, Any]) -> dict[str, Any]:
    """Add the settings that an earlier version of this software had not to a request that it wrote."""
    return {**request, "settings": with_defaults(request["settings"])}


def _is_complete(shard: Path, size: int) -> bool:
    """Tell whether a shard is there; a shorter last shard of a smaller request is not complete."""
    if not shard.is_file():
        return False
    if shard.suffix == ".parquet":
        import pyarrow.parquet as parquet

        return parquet.ParquetFile(shard).metadata.num_rows == size
    with shard.open("rb") as lines:
        return sum(1 for _ in lines) == size


def encode(image: ImageSource, images: str) -> bytes:
    """Paint an image and encode it as `png` or lossless `webp`."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"compress_level": 4} if images == "png" else {"lossless": True, "quality": 30}
    image.open().save(buffer, images.upper(), **options)
    return buffer.getvalue()


def _write_shard(records: Iterator[Record], shard: Path, images: str) -> None:
    if shard.suffix == ".parquet":
        _write_parquet(records, shard, images)
    elif images == "drawing":
        write_jsonl(records, shard)
    else:
        folder = shard.parent / "images" / shard.stem
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl((_save_images(record, row, folder, images) for row, record in enumerate(records)), shard)


def _save_images(record: Record, row: int, folder: Path, encoding: str) -> Record:
    saved = []
    for position, image in enumerate(record.images):
        name = f"{row:04d}-{position}.{encoding}"
        (folder / name).write_bytes(encode(image, encoding))
        saved.append(ImageSource(path=f"images/{folder.name}/{name}"))
    return replace(record, images=tuple(saved))


def _write_parquet(records: Iterator[Record], shard: Path, encoding: str) -> None:
    """Write a shard as parquet, in the columns that `readers.read_parquet` takes."""
    from datasets import Dataset, Features, Image, List, Value

    string = Value("string")
    features = Features(
        {
            "id": string,
            "kind": string,
            "images": List(Image()),
            "turns": List({"role": string, "text": string}),
            "chosen": string,
            "rejected": string,
            "truth": string,
        }
    )
    rows = []
    for record in records:
        images = [{"bytes": encode(image, encoding), "path": None} for image in record.images]
        turns = [{"role": turn.role, "text": turn.text} for turn in record.turns]
        rows.append(
            {
                "id": record.id,
                "kind": record.kind,
                "images": images,
                "turns": turns,
                "chosen": record.chosen,
                "rejected": record.rejected,
                "truth": json.dumps(record.annotations),
            }
        )
    with writing(shard) as unfinished:
        Dataset.from_list(rows, features=features).to_parquet(str(unfinished))


# ------------------------------------------------------------------------------------------------------ the sheet

_CELL, _IMAGE_HEIGHT, _TEXT_HEIGHT, _MARGIN = 300, 190, 128, 12
_LINE, _FONT_SIZE = 15, 12


def render_contact_sheet(
    tasks: Sequence[str], split: str = "train", seed: int = 0, settings: WorldSettings | None = None, columns: int = 6
) -> Image.Image:
    """Render a grid of samples, a row of `columns` samples for each task, with their questions and answers.

    Samples without images show their text from the top of the cell.
    """
    row_height = _IMAGE_HEIGHT + _TEXT_HEIGHT
    sheet = Image.new("RGB", (columns * _CELL + _MARGIN, len(tasks) * row_height + _MARGIN), "#d9dde3")
    pen = ImageDraw.Draw(sheet)
    for row, task in enumerate(tasks):
        for column, record in enumerate(rendered_records(task, split, seed, columns, settings)):
            _render_cell(sheet, pen, record, task, (_MARGIN + column * _CELL, _MARGIN + row * row_height))
    return sheet


def _render_cell(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, record: Record, task: str, corner: tuple[int, int]
) -> None:
    x, y = corner
    right, bottom = x + _CELL - _MARGIN, y + _IMAGE_HEIGHT + _TEXT_HEIGHT - _MARGIN
    pen.rounded_rectangle((x, y, right, bottom), radius=8, fill="#ffffff")
    if record.images:
        _render_images(sheet, pen, record.images, corner)
    top = y + (_IMAGE_HEIGHT if record.images else 8)
    pen.text((x + 8, top), f"{task} ({record.kind})", "#8a5a00", load_font("Aileron", 13))
    _render_lines(pen, _sheet_lines(record), (x + 8, top + 18, right - 8, bottom - 2))


def _render_images(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, images: Sequence[ImageSource], corner: tuple[int, int]
) -> None:
    """Paste up to six images of a sample side by side, in the upper part of its cell."""
    x, y = corner
    shown = images[:4] if len(images) < 5 else (*images[:5], images[-1])
    columns = min(len(shown), 2) if len(shown) < 5 else 3
    rows = -(-len(shown) // columns)
    room = ((_CELL - _MARGIN - 12) // columns - 4, (_IMAGE_HEIGHT - 8) // rows - 4)
    for index, source in enumerate(shown):
        image = source.open()
        image.thumbnail(room, Image.Resampling.LANCZOS)
        left = x + 6 + (index % columns) * (room[0] + 4) + (room[0] - image.width) // 2 + 2
        top = y + 6 + (index // columns) * (room[1] + 4) + (room[1] - image.height) // 2 + 2
        sheet.paste(image, (left, top))
        pen.rectangle((left - 1, top - 1, left + image.width, top + image.height), outline="#b8bec8")


def _sheet_lines(record: Record) -> list[tuple[str, str]]:
    """Give what is written about a sample: (text, colour) each."""
    lines = []
    turns = record.turns if record.kind != "few_shot" else (*record.turns[:4], *record.turns[-2:])
    for turn in turns:
        text = turn.text.replace(IMAGE_TOKEN + "\n", "").replace(IMAGE_TOKEN, "[img] ").strip()
        lines.append((text, "#0b6b3a" if turn.role == "assistant" else "#222222"))
    if record.chosen and record.rejected:
        lines += [(f"+ {record.chosen}", "#0b6b3a"), (f"- {record.rejected}", "#b01818")]
    return lines


def _render_lines(pen: ImageDraw.ImageDraw, lines: Sequence[tuple[str, str]], box: tuple[int, int, int, int]) -> None:
    """Write wrapped lines into a box (left, top, right, bottom); what does not fit ends in dots."""
    font, (left, top, right, bottom) = load_font("Aileron", _FONT_SIZE), box
    wrapped = [(line, colour) for text, colour in lines for line in wrap(text, right - left, font)]
    num_shown = (bottom - top) // _LINE
    for row, (text, colour) in enumerate(wrapped[:num_shown]):
        is_cut = row == num_shown - 1 and len(wrapped) > num_shown
        pen.text((left, top + _LINE * row), shorten(text, right - left, font) if is_cut else text, colour, font)


# -------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = _parse(arguments)
    chosen: dict[str, Any] = {name: tuple(getattr(given, name)) for name in ("sides", "fonts") if getattr(given, name)}
    try:
        _check_used(given)
        settings = replace(load_settings(given.world) if given.world else WorldSettings(), **chosen)
        _write(given, settings)
    except (ValueError, ImportError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _write(given: argparse.Namespace, settings: WorldSettings) -> None:
    """Write what is asked for; options that were not given have their defaults here."""
    count = COUNT if given.count is None else given.count
    if given.layout:
        check_positive("count is", count)
        LAYOUTS[given.layout](given.output, count, given.seed, settings)
        return
    tasks = list(TASKS) if not given.task or "all" in given.task else given.task
    split = given.split or "train"
    if given.preview:
        render_contact_sheet(tasks, split, given.seed, settings).save(given.preview)
        return
    options = {name: getattr(given, name) for name in ("shard_size", "format", "images")}
    options = {name: value for name, value in options.items() if value is not None}
    with only_writer_in(given.output):
        build(tasks, split, given.seed, count, given.output, settings, **options)


_IGNORED = {
    "layout": ("task", "split", "shard_size", "format", "images"),
    "preview": ("count", "shard_size", "format", "images", "layout"),
}
"""Options that nothing reads beside another one."""


def _check_used(given: argparse.Namespace) -> None:
    """Refuse options that would be ignored."""
    for option, ignored in _IGNORED.items():
        left = [name for name in ignored if getattr(given, name) is not None]
        if getattr(given, option) and left:
            name = left[0].replace("_", "-")
            raise ValueError(
                f"--{name} {getattr(given, left[0])} was given with --{option}, which does not read it: it "
                f"says itself what is written. It is probably left from another command: leave --{name} out."
            )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m blip3.world.build", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--task", nargs="+", choices=["all", *TASKS], help="tasks (default: all)")
    add("--split", choices=SPLITS, help="(default: train)")
    add("--seed", type=int, default=0, help="of the series (default: 0)")
    add("--count", type=int, help=f"records of each task (default: {COUNT})")
    add("--shard-size", type=int, help="records in a file (default: 1000)")
    add("--format", choices=["jsonl", "parquet"], help="(default: jsonl)")
    add(
        "--images",
        "--pictures",
        choices=["png", "webp", "drawing"],
        help="files, or descriptions painted on reading (default: png)",
    )
    add("--layout", choices=LAYOUTS, help="the columns and names of public benchmarks instead of records")
    add("--world", metavar="FILE", help="settings of the world (default: those of settings.py)")
    add("--sides", type=int, nargs=2, metavar=("MIN", "MAX"), help="of scenes and pages, in pixels")
    add("--fonts", nargs="+", help="faces (default: all)")
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--output", help="folder to write records to")
    goal.add_argument(
        "--preview", metavar="FILE", help="render a contact sheet of samples into this image file instead"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
