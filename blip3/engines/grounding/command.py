# SPDX-License-Identifier: Apache-2.0
"""The options of `blip3 engines grounding`, and the plan they make.

blip3 engines grounding --input SHARDS --output ROWS --ram RAM_FOLDER --detector GROUNDING_DINO_FOLDER
blip3 engines grounding --input SHARDS --output ROWS --boxes BOXES.parquet
"""

import argparse
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...checkpoints import digest_of, fingerprint, folder_of
from ...files import to_json
from ...refusals import check_unread
from ..stages import EnginePlan, StageSpec
from .boxes import TidyBoxes
from .boxes_file import MISSING, UNITS, FileBoxes
from .captions import WriteCaptions
from .detectors import DTYPES, DetectTags, kind_of
from .tags import ColumnTags, ListTags, RamFiles, RamTags, clean_tags, read_list
from .verify import verify_rendered

THRESHOLDS = {"grounding-dino": 0.25, "mm-grounding-dino": 0.25, "owlv2": 0.1}  # as transformers has them
OPTIONS_OF: dict[str, dict[str, Any]] = {
    "ram": {"ram_threshold": None, "ram_batch": 8, "ram_gpus": 0},
    "detector": {"detector_batch": 4, "detector_gpus": 0, "detector_dtype": "float32"},
    "boxes": {"boxes_name": "key", "boxes_unit": UNITS[0], "boxes_missing": MISSING[0]},
}
"""Where tags or boxes come from -> options of it alone, and their defaults."""
SCHEMA = {"cogvlm_caption": "string", "captions": "string", "metadata": "string"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the engine's own options to a parser."""
    _add_tag_options(parser.add_argument_group("tags, one of"))
    _add_box_options(parser.add_argument_group("boxes, --detector or --boxes"))
    _add_caption_options(parser.add_argument_group("captions"))


def _add_tag_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--ram", metavar="FOLDER", help="RAM++ as ONNX, its tags and thresholds (or the .onnx in it)")
    group.add_argument("--tags-column", metavar="NAME", help="a column of the shards with the tags of each image")
    group.add_argument("--tags", metavar="FILE", help="the same tags for every image, one a line")
    group.add_argument("--ram-threshold", type=float, metavar="P", help="one for all tags of RAM++ (default: its own)")
    group.add_argument("--ram-batch", type=int, metavar="N", help="images a call of RAM++")
    group.add_argument("--ram-gpus", type=float, metavar="N", help="graphics cards a tagger, such as 0.25")
    group.set_defaults(**OPTIONS_OF["ram"])


def _add_box_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--detector", metavar="MODEL", help="Grounding DINO, MM-Grounding-DINO or OWLv2: a checkpoint")
    group.add_argument("--boxes", metavar="FILE", help="boxes of any tool: parquet, a folder of it, or .jsonl")
    group.add_argument("--boxes-name", choices=("key", "uid"), help="what names an image in that file")
    group.add_argument("--boxes-unit", choices=UNITS, help="of the boxes in that file")
    group.add_argument(
        "--boxes-missing",
        choices=MISSING,
        help="an image that the file does not name is an error, or has none (tools that write no row where they find "
        "nothing)",
    )
    group.add_argument(
        "--threshold", type=float, metavar="P", help="lowest score of a box (default: the detector's; of --boxes 0)"
    )
    group.add_argument("--tag-thresholds", metavar="FILE", help="the same for single tags: lines of `tag: number`")
    group.add_argument("--max-area", type=float, default=0.9, help="of a box, as a share of the image (default 0.9)")
    group.add_argument(
        "--max-overlap", type=float, default=0.5, help="of two boxes of one tag, intersection over union (default 0.5)"
    )
    group.add_argument("--detector-batch", type=int, metavar="N", help="images of one size at once")
    group.add_argument("--detector-gpus", type=float, metavar="N", help="graphics cards a detector")
    group.add_argument("--detector-dtype", choices=DTYPES)
    group.set_defaults(**OPTIONS_OF["detector"], **OPTIONS_OF["boxes"])


def _add_caption_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--base-caption",
        default="cogvlm_caption",
        metavar="COLUMN",
        help="the caption to ground; `caption` is the raw one (default cogvlm_caption). Where an image has none, its "
        "things are listed",
    )
    group.add_argument("--only-lists", action="store_true", help="list the things where there is a caption, too")
    group.add_argument("--vocabulary", metavar="FILE", help="all tags that a tagger knows (default: RAM++'s, --tags)")
    group.add_argument("--synonyms", metavar="FILE", help="lines of `tag: word, word`: words that mean the tag")
    group.add_argument(
        "--max-text-overlap",
        type=float,
        default=0.9,
        help="of two boxes in one text (default 0.9): a nearer one is left out",
    )
    _add_spelling(group)


def add_verify_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `verify`."""
    _add_spelling(parser)


def _add_spelling(group: argparse._ActionsContainer) -> None:
    group.add_argument("--as-published", action="store_true", help='write "upto", as the published rows do')


def plan(options: argparse.Namespace) -> EnginePlan:
    """Say what to do, from the parsed options.

    Raises:
        FileNotFoundError: if a file or checkpoint is not there.
        ValueError: for options that do not fit together.
    """
    _check(options)
    stages: list[StageSpec] = []
    settings: dict[str, Any] = {}
    made_with: dict[str, Any] = {}
    vocabulary: list[str] = []
    for part in (_tag_stage, _box_stage):
        stage, its_settings, its_models, its_tags = part(options)
        stages += [stage] if stage else []
        settings |= its_settings
        made_with |= its_models
        vocabulary += its_tags
    vocabulary = clean_tags(read_list(options.vocabulary) if options.vocabulary else vocabulary)
    boxes = {"max_area": options.max_area, "max_overlap": options.max_overlap}
    captions = {
        "caption_column": options.base_caption,
        "vocabulary": vocabulary,
        "synonyms": read_synonyms(options.synonyms) if options.synonyms else {},
        "max_overlap": options.max_text_overlap,
        "only_lists": options.only_lists,
        "as_published": options.as_published,
    }
    stages += [StageSpec(TidyBoxes, boxes), StageSpec(WriteCaptions, captions)]
    settings |= {"boxes": boxes, "captions": captions | {"vocabulary": _digest(vocabulary)}}
    return EnginePlan("grounding", tuple(stages), SCHEMA, settings, made_with)


def verify(options: argparse.Namespace) -> dict[str, float]:
    """Ground 1,000 rendered captions with reference boxes; gives the figures of `verify.verify_rendered`."""
    return verify_rendered(as_published=options.as_published)


Part = tuple[StageSpec | None, dict[str, Any], dict[str, Any], list[str]]
"""A stage, what its rows depend on, its models, and all tags it knows."""


def _check(options: argparse.Namespace) -> None:
    tags = [name for name in ("ram", "tags_column", "tags") if getattr(options, name)]
    boxes = [name for name in ("detector", "boxes") if getattr(options, name)]
    if len(boxes) != 1:
        raise ValueError(
            f"{len(boxes)} of --detector and --boxes are given but boxes come from one. One was probably forgotten: "
            "name a detector's checkpoint, or a file of boxes."
        )
    if len(tags) != (1 if options.detector else 0):
        given = ", ".join(f"--{name.replace('_', '-')}" for name in tags) or "none"
        wanted = "a detector needs the tags of exactly one" if options.detector else "a file of boxes has its own tags"
        raise ValueError(
            f"Of --ram, --tags-column and --tags {given} is given, but {wanted}. An option is probably left over from "
            "another run, or missing: see --help."
        )
    for name, its_options in OPTIONS_OF.items():
        if not getattr(options, name):
            check_unread(vars(options), its_options, f"it is an option of --{name} alone")
    if options.only_lists:
        check_unread(vars(options), {"vocabulary": None, "synonyms": None}, "--only-lists looks for no word")
    for name in ("threshold", "ram_threshold", "max_area", "max_overlap", "max_text_overlap"):
        value = getattr(options, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(
                f"--{name.replace('_', '-')} is {value} but must be 0 to 1. It was probably written in percent: "
                "divide it by 100."
            )


def _tag_stage(options: argparse.Namespace) -> Part:
    if options.ram:
        files = RamFiles(options.ram)
        stage = StageSpec(
            RamTags,
            {
                "path": str(files.model.resolve()),
                "threshold": options.ram_threshold,
                "batch_size": options.ram_batch,
                "use_gpu": options.ram_gpus > 0,
            },
            num_gpus=options.ram_gpus,
        )
        limits = options.ram_threshold if options.ram_threshold is not None else _digest(files.thresholds)
        tagger = {"model": digest_of(files.model).hex(), "tags": _digest(files.tags), "thresholds": limits}
        about = {"model": files.model.name, "licence": licence_of(files.model.parent)}
        return stage, {"tagger": tagger}, {"tagger": about}, files.tags
    if options.tags_column:
        return (
            StageSpec(ColumnTags, {"column": options.tags_column}),
            {"tagger": {"column": options.tags_column}},
            {},
            [],
        )
    if options.tags:
        tags = read_list(options.tags)
        return StageSpec(ListTags, {"tags": tags}), {"tagger": {"tags": _digest(tags)}}, {}, tags
    return None, {}, {}, []


def _box_stage(options: argparse.Namespace) -> Part:
    if options.boxes:
        given: dict[str, Any] = {
            "path": str(Path(options.boxes).resolve()),
            "name": options.boxes_name,
            "unit": options.boxes_unit,
        }
        if options.boxes_missing != MISSING[0]:
            given["missing"] = options.boxes_missing
        if options.threshold is not None:
            given["threshold"] = options.threshold
        if options.tag_thresholds:
            given["tag_thresholds"] = read_thresholds(options.tag_thresholds)
        FileBoxes(**given)  # a file that is none is refused before the run
        files = sorted(path for path in _files_of(Path(options.boxes)) if path.is_file())
        digest = _digest([[path.name, digest_of(path).hex()] for path in files])
        return StageSpec(FileBoxes, given), {"detector": {**given, "path": None, "files": digest}}, {}, []
    kind = kind_of(options.detector)
    threshold = THRESHOLDS[kind] if options.threshold is None else options.threshold
    limits = read_thresholds(options.tag_thresholds) if options.tag_thresholds else {}
    stage = StageSpec(
        DetectTags,
        {
            "model": options.detector,
            "threshold": threshold,
            "tag_thresholds": limits,
            "batch_size": options.detector_batch,
            "dtype": options.detector_dtype,
            "device": "cuda" if options.detector_gpus > 0 else "cpu",
        },
        num_gpus=options.detector_gpus,
    )
    settings = {"model": fingerprint(options.detector), "threshold": threshold, "tag_thresholds": limits}
    settings |= {"dtype": options.detector_dtype}
    about = {"model": options.detector, "kind": kind, "licence": licence_of(folder_of(options.detector))}
    return stage, {"detector": settings}, {"detector": about}, []


def _files_of(path: Path) -> list[Path]:
    return list(path.rglob("*")) if path.is_dir() else [path]


def _digest(value: Any) -> str:
    return hashlib.sha256(to_json(value).encode()).hexdigest()[:32]


def licence_of(folder: Path) -> str:
    """Give the licence that a model's card states.

    Args:
        folder: of the model, where README.md begins with the card's fields.
    """
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found = re.search(r"^license:[ \t]*(\S+)", text, re.MULTILINE)
    return found[1] if found else "not stated: there is no README.md with a license field beside the model"


def read_thresholds(path: str | Path) -> dict[str, float]:
    """Read thresholds of single tags: lines of `tag: number`.

    Raises:
        ValueError: naming the first line that is none.
    """
    return {tag.lower(): _number(path, tag, text) for tag, text in _read_pairs(path).items()}


def _number(path: str | Path, tag: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number <= 1:
        raise ValueError(
            f"{path} has the threshold {text!r} for {tag!r} but it must be 0 to 1. It was probably written in percent "
            "or as a word: write a number such as 0.3."
        )
    return number


def read_synonyms(path: str | Path) -> dict[str, str]:
    """Read words that mean a tag: lines of `tag: word, word`.

    Returns:
        word -> tag.

    Raises:
        ValueError: for a line without a colon.
    """
    return {word.strip(): tag for tag, text in _read_pairs(path).items() for word in text.split(",") if word.strip()}


def _read_pairs(path: str | Path) -> Mapping[str, str]:
    pairs = {}
    for line in read_list(path):
        name, colon, text = line.partition(":")
        if not colon or not name.strip():
            raise ValueError(
                f"{path} has the line {line[:60]!r} but each line is a tag, a colon and what belongs to it. The file "
                "is probably of another form: write `bicycle: bike, cycle`, or `dog: 0.3`."
            )
        pairs[name.strip()] = text.strip()
    return pairs
