# SPDX-License-Identifier: Apache-2.0
r"""Write what a model answers when the image is noised: the rejected answers of the preference loss's second term.

    python -m blip3.training.noised_answers recipes/small/4_dpo.yaml --scan          which noise step suits the model
    python -m blip3.training.noised_answers recipes/small/4_dpo.yaml noise_step=250   the recipe's noised_answers
    python -m blip3.training.noised_answers recipes/4b/4_dpo.yaml --processes 8       for a run of 8 processes
    python -m blip3.training.noised_answers recipes/4b/4_dpo.yaml --processes 8 --part 1/4     a quarter of it

The pairs are those that the recipe's run will see, and the model is the one it starts from. Answers are greedy, and
the noise on an image follows from the recipe's seed and the record's id, so the same command writes the same file; an
interrupted one goes on where it was. Parts may be answered at the same time, on a GPU each; the command without
--part then puts them together, and answers what is missing.

Left out are answers that equal the chosen one and malformed ones: without an end, without a word, or with the same
words three times in a row. With --hallucinated those that are wrong in another way are left out too, such as a wrong
number. Only pairs of the rendered world say what an image shows, so other pairs are refused there.

The scan shows why: too little noise repeats the clean answer, too much gives no sentences. Neither teaches anything.
"""

import argparse
import contextlib
import glob
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..answering import Answer, Answerer
from ..data.images import open_images
from ..data.records import IMAGE_TOKEN, MARKERS, Record, to_messages, to_preference
from ..files import JsonLines
from ..world.descriptions import named_kinds
from .mixture import mixture_of
from .noise import Noiser, noise_deviation
from .noised_file import KEPT, can_be_seen, made_with, write_noised_file
from .pairs import pair_key
from .recipe import Recipe, RecipeError, load_recipe, plain_errors, recipe_arguments

SCANNED_STEPS = (0, 100, 200, 250, 300, 350, 400, 500, 700, 900)
SCANNED_PAIRS = 64
_REPEATED = re.compile(r"\b(\w+(?:\W+\w+){0,7})\W+\1\W+\1\b", re.IGNORECASE)

Measure = Callable[[Record, str], float | None]
"""(pair, answer) -> how much of the answer the image does not show, 0 to 1; None where that has no meaning."""

logger = logging.getLogger(__name__)


def main() -> None:
    """Read the command line, and scan or write."""
    parser = recipe_arguments(__doc__)
    parser.add_argument("--processes", type=int, default=1, help="of the run that will train (default: %(default)s)")
    parser.add_argument("--pairs", type=int, help="so many from the start (default: those of the run; scan: 64)")
    parser.add_argument("--batch-size", type=int, default=16, help="answers at once (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer (default: %(default)s)")
    parser.add_argument("--scan", action="store_true", help="write nothing, print a table of noise steps")
    parser.add_argument(
        "--hallucinated", action="store_true", help="keep answers only that name what their image does not show"
    )
    parser.add_argument("--part", type=parse_part, default=(1, 1), metavar="I/N", help="answer every N-th batch alone")
    args = parser.parse_intermixed_args()
    with plain_errors(ValueError):
        recipe = load_recipe(args.recipe, Recipe, args.overrides)
        count = recipe.max_steps * recipe.batch_size * recipe.accumulation * args.processes
        pairs = pairs_of(recipe, args.pairs or (SCANNED_PAIRS if args.scan else count))
        heading, measure = measure_for(pairs)
        if not args.scan:
            path_of(recipe)
        if args.hallucinated:
            _check_knows_images(measure, len(pairs))
        answerer = Answerer.load(recipe.model, dtype="bfloat16" if recipe.bf16 else "float32", must_chat=True)
        source = NoisedAnswers(answerer, recipe, args.batch_size, args.max_new_tokens)
        if not args.scan:
            write(source, pairs, recipe, measure if args.hallucinated else None, args.part)
            return
        print(f"step  deviation  well-formed  as chosen  {heading}")
        for row in scan(source, pairs, SCANNED_STEPS, measure):
            line = "{step:4}  {deviation:9.3f}  {well_formed:11.0%}  {same:9.0%}  ".format(**row)
            print(line + f"{row['measured']:{len(heading)}.1%}", flush=True)


def parse_part(text: str) -> tuple[int, int]:
    """Read `--part`.

    >>> parse_part("2/8")
    (2, 8)

    Raises:
        ArgumentTypeError: for anything but one of so many.
    """
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(
            f"--part is {text!r} but it must be one of so many, such as 2/8. It was probably counted from 0: count "
            "from 1."
        )
    return int(number), int(parts)


def _check_knows_images(measure: Measure, count: int) -> None:
    if measure is not things_not_there:
        raise RecipeError(
            f"--hallucinated was given for {count} pairs of which some do not say what their image shows, but that "
            "must be known to find what an answer adds to it. The pairs are probably real data: leave the option out."
        )


def pairs_of(recipe: Recipe, count: int) -> list[Record]:
    """List the different pairs with images among the first samples of a run.

    Raises:
        RecipeError: for records of another kind, or if there is none.
    """
    mixture = mixture_of(recipe, count)
    found: dict[str, Record] = {}
    for index in range(count):
        record = mixture[index]
        try:
            to_preference(record)
        except ValueError as error:
            raise RecipeError(f"{mixture.name_of(index)}, record {record.id!r}: {error}") from error
        key = pair_key(record)
        if record.images and key not in found and (recipe.strict or can_be_seen(record)):
            found[key] = record
    if not found:
        raise RecipeError(
            f"None of the first {count} pairs of the recipe's mixture has an image, but noise needs one. The mixture "
            "probably holds text alone: leave the second term out with noised_weight: 0."
        )
    return list(found.values())


class NoisedAnswers:
    """A model that answers about noised images.

    Args:
        answerer: the model.
        recipe: `noise_pixels`, `seed`, `any_resolution`.
        batch_size: answers at once.
        max_new_tokens: of an answer.
    """

    def __init__(self, answerer: Answerer, recipe: Recipe, batch_size: int, max_new_tokens: int):
        self.answerer, self.recipe = answerer, recipe
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens

    def answer(self, records: Sequence[Record], step: int) -> list[Answer]:
        """Answer the last question of each pair; one batch."""
        processor, options = self.answerer.processor, {"do_image_splitting": self.recipe.any_resolution}
        noiser = Noiser(step, self.recipe.noise_pixels, self.recipe.seed)
        rows = []
        for record in records:
            prompt = processor.apply_chat_template(to_messages(record), tokenize=False, add_generation_prompt=True)
            rows.append(noiser.prepare(processor, prompt, open_images(record.images, processor), record.id, **options))
        return self.answerer.generate_rows(rows, do_sample=False, max_new_tokens=self.max_new_tokens)

    def groups_of(self, records: Sequence[Record]) -> Iterator[Sequence[Record]]:
        """Cut a list of pairs into batches."""
        for first in range(0, len(records), self.batch_size):
            yield records[first : first + self.batch_size]


# -- what is kept -----------------------------------------------------------------------------------------------------


def is_well_formed(text: str, is_finished: bool) -> bool:
    """Tell sentences from what a model writes when it sees nothing.

    >>> is_well_formed("Two dogs.", True), is_well_formed("three three three", True), is_well_formed("...", True)
    (True, False, False)
    """
    has_marker = any(marker in text for marker in (*MARKERS, IMAGE_TOKEN))
    return is_finished and not has_marker and bool(re.search(r"\w", text)) and not _REPEATED.search(text)


def is_same(text: str, other: str) -> bool:
    """Whether two answers differ in blanks, case and final dots at most."""
    one, two = (" ".join(each.casefold().split()).rstrip(".") for each in (text, other))
    return one == two


def words_not_in_chosen(record: Record, answer: str) -> float | None:
    """Give the share of an answer's words that its pair's chosen answer lacks: hallucination at its roughest.

    It serves any data. Where more is known of an image, `scan` takes a measure that knows it.
    """
    words = re.findall(r"\w+", answer.casefold())
    known = set(re.findall(r"\w+", (record.chosen or "").casefold()))
    return sum(word not in known for word in words) / len(words) if words else None


def things_not_there(record: Record, answer: str) -> float | None:
    """Give the share of the coloured things an answer names that a rendered image does not show: CHAIRi of one answer.

    Args:
        record: of the rendered world, whose annotations list the objects.
        answer: None comes back for one that names nothing.
    """
    named = named_kinds(answer)
    there = {
        (shown["colour"], shown["thing"]) for image in record.annotations["pictures"] for shown in image["objects"]
    }
    return sum(kind not in there for kind in named) / len(named) if named else None


def measure_for(pairs: Sequence[Record]) -> tuple[str, Measure]:
    """Choose what a scan measures: hallucinated things (CHAIR, arXiv:1809.02156) where each image's objects are known.

    Returns:
        the heading of its column, and the measure.
    """
    if all("pictures" in record.annotations for record in pairs):
        return "CHAIRi", things_not_there
    return "words not in chosen", words_not_in_chosen


def scan(
    source: NoisedAnswers, pairs: Sequence[Record], steps: Iterable[int], measure: Measure = words_not_in_chosen
) -> Iterator[dict[str, float]]:
    """Answer the same pairs under more and more noise.

    Args:
        source: of the answers.
        pairs: to answer.
        steps: of the noise schedule.
        measure: of what an image does not show.

    Yields:
        `step`; `deviation` of the noise; shares `well_formed` and `same` (as chosen) of all answers; `measured`, the
        mean of the measure over the well-formed ones, or NaN.
    """
    for step in steps:
        answers = [answer for group in source.groups_of(pairs) for answer in source.answer(group, step)]
        formed = [
            (record, answer.text)
            for record, answer in zip(pairs, answers, strict=True)
            if is_well_formed(answer.text, answer.is_finished)
        ]
        values = [value for record, text in formed if (value := measure(record, text)) is not None]
        yield {
            "step": step,
            "deviation": noise_deviation(step),
            "well_formed": len(formed) / len(pairs),
            "same": sum(is_same(text, record.chosen or "") for record, text in formed) / len(pairs),
            "measured": sum(values) / len(values) if values else float("nan"),
        }


# -- the file ---------------------------------------------------------------------------------------------------------


def path_of(recipe: Recipe) -> Path:
    """Give the file that a recipe names for its noised answers.

    Raises:
        RecipeError: if it names none.
    """
    if not recipe.noised_answers:
        raise RecipeError(
            "The recipe has no noised_answers but it must name the file to write. The recipe probably takes "
            "teacher-forced answers, which need no file: add noised_answers=FILE.parquet."
        )
    return Path(recipe.noised_answers)


def write(
    source: NoisedAnswers,
    pairs: Sequence[Record],
    recipe: Recipe,
    measure: Measure | None = None,
    part: tuple[int, int] = (1, 1),
) -> Path:
    """Write the recipe's file of noised answers, or what is missing of one that was interrupted.

    Args:
        source: of the answers.
        pairs: to answer.
        recipe: names the file.
        measure: of what an image does not show; answers of which it gives 0 or None are left out. None keeps them.
        part: (i, n) answers every n-th batch alone, from the i-th on, and leaves the file to a call without it.

    Returns:
        the file, or that of the part.

    Raises:
        RecipeError: if the recipe names no file, or no answer is kept.
        ValueError: if another process is writing it.
    """
    path, (number, parts) = path_of(recipe), part
    stem = f".{path.name}.{_digest_of_settings(source, recipe)}"
    own = path.with_name(f"{stem}.jsonl" if parts == 1 else f"{stem}.{number}-of-{parts}.jsonl")
    others = [] if parts > 1 else sorted(path.parent.glob(f"{glob.escape(stem)}.*-of-*.jsonl"))
    rest = {"what": "an answer", "remedy": "remove the line"}
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(JsonLines(each, ("key", "text", "is_finished"), **rest)) for each in (own, *others)
        ]
        done = {line["key"]: line for file in files for line in file}
        for group in list(source.groups_of(pairs))[number - 1 :: parts]:
            if all(pair_key(record) in done for record in group):
                continue
            answers = zip(group, source.answer(group, recipe.noise_step), strict=True)
            new = [
                {"key": pair_key(record), "text": answer.text, "is_finished": answer.is_finished}
                for record, answer in answers
            ]
            files[0].append(json.dumps(line) for line in new)
            done |= {line["key"]: line for line in new}
        if parts > 1:
            logger.warning("Part %d of %d is answered. When all are, give the command without --part.", number, parts)
            return own
        counts = write_noised_file(path, _outcomes(pairs, done, measure), recipe)
        logger.warning("Of %d noised answers: %s.", len(pairs), ", ".join(f"{n} {kind}" for kind, n in counts.items()))
        for file in files:
            file.remove()
    return path


def _digest_of_settings(source: NoisedAnswers, recipe: Recipe) -> str:
    """Tell commands apart whose answers may differ; the model counts by its files, not by its name alone."""
    settings = made_with(recipe) | {"seed": recipe.seed, "bf16": recipe.bf16}
    settings |= {"batch_size": source.batch_size, "max_new_tokens": source.max_new_tokens}
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]


def _outcomes(
    pairs: Sequence[Record], done: Mapping[str, Any], measure: Measure | None
) -> Iterator[tuple[Record, str, str]]:
    for record in pairs:
        text, is_finished = (done[pair_key(record)][name] for name in ("text", "is_finished"))
        outcome = KEPT
        if not is_well_formed(text, is_finished):
            outcome = "malformed"
        elif is_same(text, record.chosen or ""):
            outcome = "as chosen"
        elif measure and not measure(record, text):
            outcome = "without hallucination"
        yield record, outcome, text


if __name__ == "__main__":
    main()
