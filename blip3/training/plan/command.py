# SPDX-License-Identifier: Apache-2.0
r"""Plan a run before renting: tokens, arithmetic, memory of a GPU, hours, cores for images, disk.

    python -m blip3.training.plan.command recipes/4b/1_pretrain.yaml --gpus 64 --gpu h100 --tokens 100B
    python -m blip3.training.plan.command recipes/4b/4_dpo.yaml --gpus 8 --gpu a100-80 [key=value ...]
    python -m blip3.training.plan.command --check      the formulas beside what torch counts, on this machine

Nothing is trained and no weights are read. Rendered samples are encoded to know their length. Of other data the mean
sample is assumed; options give your own. What was assumed stands at the end of the plan.
"""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ...checkpoints import locate
from ...hub import ROOT
from ...refusals import check_positive
from ..recipe import Recipe, load_recipe, plain_errors
from .gpus import GPUS
from .report import Plan, standing_assumptions, write
from .samples import assume_sample, can_measure, measure_sample, time_decoding
from .sizes import Sizes, sizes_of
from .work import Sample

SHARE = 0.35  # of the peak; published runs with sharding and recomputation lie around 0.3 to 0.45
MEASURED = 64  # samples
LETTERS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def main() -> None:
    """Read the command line and print the plan."""
    args = _arguments().parse_intermixed_args()
    if args.check:
        from .check import table

        print(table())
        return
    with plain_errors(ValueError):
        if args.recipe is None:
            raise ValueError(
                "No recipe was given but a plan is of one. It was probably left out: name it, for example "
                "recipes/4b/1_pretrain.yaml, or ask for --check."
            )
        print(write(make_plan(args)))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("recipe", type=Path, nargs="?", help="YAML file")
    add("overrides", nargs="*", metavar="key=value", help="in place of the recipe's values")
    add("--gpus", type=int, default=8, help="how many (default: %(default)s)")
    add("--gpu", choices=GPUS, default="h100", help="kind (default: %(default)s)")
    add(
        "--model",
        help="folder or owner/name whose sizes count (default: the recipe's model, or configs/ of its folder's name)",
    )
    add("--tokens", help="to train on, such as 100B, in place of the recipe's steps")
    add("--share", type=float, default=SHARE, help="of the GPU's peak that is reached (default: %(default)s)")
    add("--sample-tokens", type=float, help="of a sample, image tokens and one answer included")
    add("--images", type=float, help="of a sample")
    add("--views", type=float, help="of an image, the global one included")
    add("--answer-tokens", type=float, help="of one answer of a pair")
    add("--padding", type=float, help="share of a batch that is padding")
    add("--image-ms", type=float, help="of one core for an image (default: timed here)")
    add("--gpu-price", type=float, help="of an hour of a GPU, in your currency")
    add("--core-price", type=float, help="of an hour of a core")
    add("--check", action="store_true", help="print the errors of the formulas in place of a plan")
    return parser


def make_plan(args: argparse.Namespace) -> Plan:
    """Make the plan that a command line asks for.

    Raises:
        ValueError: for numbers that cannot be, or a model of unknown sizes.
        FileNotFoundError: if no configuration is found.
    """
    for name in ("gpus", "share", "sample_tokens", "views", "answer_tokens", "image_ms"):
        if getattr(args, name) is not None:
            check_positive(f"--{name.replace('_', '-')} is", getattr(args, name), int if name == "gpus" else float)
    recipe = load_recipe(args.recipe, Recipe, args.overrides)
    folder = find_model(args.recipe, recipe, args.model)
    located = locate(folder, only_small_files=True)
    sizes = sizes_of(AutoConfig.from_pretrained(**located))
    sample, assumed = _sample(args, recipe, sizes, located)
    seconds = args.image_ms / 1000 if args.image_ms else time_decoding(located, recipe.any_resolution)
    how = "as given" if args.image_ms else "timed on this machine, a JPEG of 1,024 x 768"
    return Plan(
        recipe=recipe,
        sizes=sizes,
        sample=sample,
        gpus=args.gpus,
        gpu=args.gpu,
        share=args.share,
        image_seconds=seconds,
        assumed=(
            *assumed,
            f"an image takes {1000 * seconds:.1f} ms of a core ({how})",
            *standing_assumptions(recipe, args.share),
        ),
        tokens=parse_tokens(args.tokens) if args.tokens else None,
        gpu_price=args.gpu_price,
        core_price=args.core_price,
    )


def find_model(path: Path, recipe: Recipe, asked: str | None) -> str:
    """Say whose sizes a plan uses.

    Args:
        path: of the recipe.
        recipe: read from it.
        asked: on the command line.

    Returns:
        what was asked for; else the recipe's model if it is there; else the architecture of the recipe folder's name.

    Raises:
        FileNotFoundError: if there is none.
    """
    if asked:
        return asked
    if (Path(recipe.model) / "config.json").is_file():
        return recipe.model
    named = ROOT / "configs" / path.resolve().parent.name
    if (named / "config.json").is_file():
        return str(named)
    raise FileNotFoundError(
        f"{recipe.model}, the recipe's model, has no config.json, and there is no {named.relative_to(ROOT)}; a plan "
        "needs the sizes of the model. The stage before has probably not been run yet: name a model of the same sizes "
        "with --model, for example --model ."
    )


def parse_tokens(text: str) -> float:
    """Read a number of tokens with a letter for thousands, millions, billions or trillions.

    Raises:
        ValueError: for other text.

    >>> parse_tokens("100B"), parse_tokens("1.5m"), parse_tokens("2000")
    (100000000000.0, 1500000.0, 2000.0)
    """
    match = re.fullmatch(r"([\d.]+)([a-z]?)", text.strip().lower().replace(",", "").replace("_", ""))
    if match is None or match[2] not in LETTERS or match[1].count(".") > 1 or match[1] == ".":
        raise ValueError(
            f"--tokens is {text!r} but must be a number, perhaps with k, M, B or T behind it. It was probably "
            "mistyped: write for example 100B."
        )
    return float(match[1]) * LETTERS[match[2]]


def _sample(
    args: argparse.Namespace, recipe: Recipe, sizes: Sizes, located: dict[str, Any]
) -> tuple[Sample, Sequence[str]]:
    """Measure or assume the mean sample, and put what was given in its place; also say which."""
    if can_measure(recipe):
        sample, why = measure_sample(recipe, located, MEASURED), f"the mean of {MEASURED} rendered samples"
    else:
        sample, why = assume_sample(recipe, sizes)
    changes: dict[str, float] = {}
    if args.images is not None or args.views is not None:
        images = sample.images if args.images is None else args.images
        each = args.views or (sample.views / sample.images if sample.images else sizes.views)
        changes |= {"images": images, "views": images * each}
    given = {"tokens": args.sample_tokens, "answer_tokens": args.answer_tokens, "padding": args.padding}
    changes |= {name: value for name, value in given.items() if value is not None}
    sample = dataclasses.replace(sample, **changes)
    options = {"sample_tokens", "images", "views", "answer_tokens", "padding"}
    named = sorted(f"--{name.replace('_', '-')}" for name in options if getattr(args, name) is not None)
    text = f"sample: {sample.tokens:.0f} tokens, {sample.images:.2f} images with {sample.views:.2f} views: {why}"
    return sample, [text + (f"; as given: {', '.join(named)}" if named else "")]


if __name__ == "__main__":
    main()
