# SPDX-License-Identifier: Apache-2.0
"""Rendered pages as a reader read them: a training source to compare with the reference.

FOLDER/read.jsonl        records of the rendered task `ocr`, with the strings and boxes that the reader found
FOLDER/reference.jsonl   the same pages, captions and granularities, with the strings and boxes that were rendered

What differs between two models trained on the two files is what the reader got wrong. Pages on which it found nothing
are in neither file. Images are descriptions of a few hundred bytes, rendered when they are opened.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ...data.formats import write_ocr
from ...data.records import IMAGE_TOKEN, Record, Turn, read_jsonl, write_jsonl
from ...files import JsonLines, to_json
from ...refusals import check_positive
from ...world.settings import WorldSettings, load_settings
from ...world.splits import SPLITS
from ...world.tasks import rendered_record, rendered_records
from ...world.wording import side_of_center
from . import command
from .choice import make_reader
from .readers import OcrReader
from .rows import Entry, keep_lines


def as_read(record: Record, entries: Sequence[Entry]) -> Record:
    """Give a record of the rendered task `ocr` the strings and boxes that a reader found on its page."""
    granularity = record.annotations["granularity"]
    (page,) = record.annotations["pictures"]
    strings = [(string["text"], string["box"]) for string in page["strings"]]
    rendered = write_ocr(strings, granularity, "", side_of_center)
    caption = record.turns[0].text.removeprefix(IMAGE_TOKEN).removesuffix(rendered).strip()
    text = write_ocr([(entry.text, entry.box) for entry in entries], granularity, caption, side_of_center)
    found = [{"text": entry.text, "box": list(entry.box)} for entry in entries]
    annotations = {**record.annotations, "answer": text, "pictures": [{**page, "strings": found}]}
    return replace(record, turns=(Turn("document", IMAGE_TOKEN + text),), annotations=annotations)


def read_pages(
    reader: OcrReader, records: Iterator[Record], min_confidence: float, min_letters: float
) -> Iterator[Record]:
    """Read the pages of rendered records; pages without text are left out."""
    for record in records:
        image = record.images[0].open().convert("RGB")
        size = (image.height, image.width)
        entries = keep_lines(reader.read(image), size, reader.dilation, min_confidence, min_letters).entries
        if entries:
            yield as_read(record, entries)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m blip3.engines.ocr.rendered", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to write to; the same command continues")
    parser.add_argument("--count", type=int, default=10_000, help="pages (default: 10000)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="(default: train)")
    parser.add_argument("--seed", type=int, default=0, help="of the series (default: 0)")
    parser.add_argument("--world", help="YAML file of world settings (default: those of the world)")
    command.add_reading_options(parser)
    given = parser.parse_args(arguments)
    check_positive("--count is", given.count)
    settings = load_settings(given.world) if given.world else WorldSettings()
    reader = make_reader(given.reader, command.reader_options(given))
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / "read.jsonl"
    with JsonLines(path, ("id",), "a record") as lines:
        done = {line["id"] for line in lines}
        missing = (
            record
            for record in rendered_records("ocr", given.split, given.seed, given.count, settings)
            if record.id not in done
        )
        for record in read_pages(reader, missing, *command.thresholds(given)):
            lines.append([to_json(record.to_json())])
    indices = (int(record.id.rsplit("-", 1)[1]) for record in read_jsonl(path))
    pages = (rendered_record("ocr", given.split, given.seed, index, settings) for index in indices)
    num_pages = write_jsonl(pages, given.output / "reference.jsonl")
    print(f"{num_pages} of {given.count} pages have text that was read: {path} and reference.jsonl beside it")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
