# SPDX-License-Identifier: Apache-2.0
"""Metrics and intervals as pure functions: answers and references in, numbers out.

Shares are 0..1, not percent. Boxes are (x1, y1, x2, y2) in any unit, the same for both.
"""

import collections
import itertools
import re
import shutil
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from ..refusals import install

Box = Sequence[float]

# ------------------------------------------------------------------------------------------------------------ text


def normalise(text: str, ignore_case: bool = True) -> str:
    """Give the form in which exact match compares: one space between words, none around, no full stops at the end.

    >>> normalise("  The  first. "), normalise("B7K", ignore_case=False)
    ('the first', 'B7K')
    """
    text = " ".join(text.split()).rstrip(". ")
    return text.casefold() if ignore_case else text


def exact_match(answer: str, reference: str, ignore_case: bool = True) -> float:
    """Give 1.0 if answer and reference are equal after `normalise`, else 0.0.

    >>> exact_match("Left.", "left"), exact_match("b7k", "B7K", ignore_case=False)
    (1.0, 0.0)
    """
    return float(normalise(answer, ignore_case) == normalise(reference, ignore_case))


_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {name: str(number) for number, name in enumerate(_NUMBERS)}
_ARTICLES = {"a", "an", "the"}


def normalise_vqa(text: str) -> str:
    """Normalise an answer as the VQA challenge does (https://visualqa.org/evaluation.html).

    Small letters; commas between digits and full stops outside decimals go; other punctuation but apostrophe and colon
    becomes a space; number words become digits; articles go. The challenge also puts missing apostrophes back
    ("dont") from a table, which is not done here.

    >>> normalise_vqa("The two, red-ish dogs: 1,000.5 m.")
    '2 red ish dogs: 1000.5 m'
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower())
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s':.]|_", " ", text)
    words = (_DIGITS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


def word_f1(answer: str, reference: str) -> float:
    """Score a text by the words that it shares with a reference, as SQuAD does (Rajpurkar et al. 2016).

    2 n / (words of the answer + words of the reference), with n the words in both, repeated ones as often as both
    have them (arXiv:1606.05250). Words are compared after `normalise_vqa`.

    >>> word_f1("The red star", "a red car"), word_f1("", "a red car")
    (0.5, 0.0)
    """
    given, wanted = (collections.Counter(normalise_vqa(text).split()) for text in (answer, reference))
    total = given.total() + wanted.total()
    return 2 * (given & wanted).total() / total if total else 1.0


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Score an answer against those of several people, usually ten.

    min(n / 3, 1), with n how many people gave the answer, averaged over every way to leave one person out (Antol et
    al. 2015, arXiv:1505.00468; the average as in https://visualqa.org/evaluation.html). Answers are compared after
    `normalise_vqa`.

    Args:
        answer: the model's.
        references: one for each person.

    Raises:
        ValueError: for fewer than two people.

    >>> round(vqa_accuracy("a dog", ["dog", "dog", "dog", "cat", "cat", "cat", "cat", "cat", "cat", "cat"]), 3)
    0.9
    """
    if len(references) < 2:
        raise ValueError(
            f"VQA accuracy was given {len(references)} references but leaves one of several people out. The data set "
            "probably has one reference a question: use exact_match or anls."
        )
    given = normalise_vqa(answer)
    is_equal = [normalise_vqa(reference) == given for reference in references]
    total = sum(is_equal)
    return sum(min((total - left_out) / 3, 1.0) for left_out in is_equal) / len(references)


def edit_distance(first: str, second: str) -> int:
    """Count the characters to insert, delete or replace to turn one text into the other (Levenshtein).

    >>> edit_distance("kitten", "sitting")
    3
    """
    previous = list(range(len(second) + 1))
    for row, character in enumerate(first, start=1):
        current = [row]
        for column, other in enumerate(second, start=1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (character != other)))
        previous = current
    return previous[-1]


def anls(answer: str, references: Sequence[str], threshold: float = 0.5) -> float:
    """Score an answer by its edit distance to the nearest reference (Biten et al. 2019, arXiv:1905.13648, equation 1).

    1 - d for a normalised distance d below the threshold, else 0; d is `edit_distance` over the length of the longer
    text. Letters of either case are equal; spaces around and doubled ones do not count. The mean over questions is
    ANLS, average normalised Levenshtein similarity.

    Args:
        answer: the model's.
        references: accepted answers.
        threshold: the paper's is 0.5.

    Raises:
        ValueError: without references.

    >>> anls("Hallo", ["hello", "goodbye"]), anls("yes", ["no"])
    (0.8, 0.0)
    """
    if not references:
        raise ValueError("ANLS was given no reference to compare with. The row is probably incomplete: drop it.")
    best = 0.0
    for reference in references:
        one, other = (" ".join(text.casefold().split()) for text in (answer, reference))
        distance = edit_distance(one, other) / max(len(one), len(other), 1)
        best = max(best, 1 - distance if distance < threshold else 0.0)
    return best


def cider(answers: Sequence[str], references: Sequence[Sequence[str]], *, is_ptb: bool = False) -> list[float]:
    """Score captions by CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726), computed by `pycocoevalcap`.

    The scale is that of published tables (100 times the library's), where one reference repeated word by word gives
    up to 1000. Rarity of words is taken from the references given, so scores of different sets do not compare, and a
    caption of fewer than four words stays below 1000 even if it is right (it has no run of four words). Words are
    runs of letters and digits in small letters; the COCO tool takes Stanford's Java tokenizer instead, which agrees
    on plain English.

    Args:
        answers: N captions.
        references: N lists of references.
        is_ptb: take the COCO tool's own words; needs Java.

    Returns:
        N scores; their mean is the corpus score.

    Raises:
        ValueError: for lists of different lengths, fewer than two captions, or a caption without references.
        ImportError: without pycocoevalcap.
        FileNotFoundError: without Java, where it is asked for.
        RuntimeError: if the Java program gives another number of captions back.
    """
    if len(answers) != len(references) or len(answers) < 2 or not all(references):
        raise ValueError(
            f"CIDEr was given {len(answers)} captions and {len(references)} lists of references, "
            f"{sum(not each for each in references)} of them empty, but needs as many lists as captions, at "
            "least 2 (rarity is counted over images), each with a reference. Rows were probably lost: compare them."
        )
    try:
        from pycocoevalcap.cider.cider_scorer import CiderScorer
    except ImportError as error:
        raise ImportError(
            f"CIDEr is computed by pycocoevalcap, which cannot be imported ({error}). It is probably not installed: "
            f"run {install('evaluation')}, or `pip install pycocoevalcap`."
        ) from error
    scorer = CiderScorer()
    texts = [[answer, *several] for answer, several in zip(answers, references, strict=True)]
    for answer, *several in _ptb_words(texts) if is_ptb else [[_words(text) for text in row] for row in texts]:
        scorer += (answer, several)
    return [100.0 * float(score) for score in scorer.compute_score()[1]]


_LAST_LINE = "lastline"  # stands behind all captions and comes back as it is, if no line more or less came back


def _ptb_words(texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """Split captions as the COCO tool does, by Stanford's tokenizer, which `pycocoevalcap` brings and Java runs.

    The program reads and writes a caption a line, and a line ends at more characters for it than a line feed.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    if shutil.which("java") is None:
        raise FileNotFoundError(
            "CIDEr with the COCO tool's own words was asked for, which a Java program splits, but there is no java on "
            "PATH. Java is probably not installed: install a runtime (8 or later), or score without them."
        )
    lines = [" ".join(text.split()) for row in texts for text in row]
    asked = {row: [{"caption": line}] for row, line in enumerate([*lines, _LAST_LINE])}
    split = [words for (words,) in PTBTokenizer().tokenize(asked).values()]
    if len(split) != len(asked) or split[-1] != _LAST_LINE:
        raise RuntimeError(
            f"The COCO tool's Java program was given {len(asked)} lines and gave {len(split)} back, the last one "
            f"{split[-1:]!r} in place of {_LAST_LINE!r}: captions would be compared with the references of others. A "
            "caption probably holds a character that ends a line for it: look for one, or score without its words."
        )
    words = iter(split)
    return [[next(words) for _ in row] for row in texts]


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower()))


# ----------------------------------------------------------------------------------------------------------- boxes


def box_iou(first: Box, second: Box) -> float:
    """Give the area that two boxes share over the area they cover together; 0 for a box without area.

    >>> box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == 2 / 6
    True

    Raises:
        ValueError: for a box without four edges.
    """
    for box in (first, second):
        if len(box) != 4:
            raise ValueError(
                f"The box {tuple(box)} has {len(box)} numbers but a box is (x1, y1, x2, y2). It was probably parsed "
                "from a text that was cut off: check the text."
            )
    width = max(0.0, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(0.0, min(first[3], second[3]) - max(first[1], second[1]))
    areas = [max(0.0, x2 - x1) * max(0.0, y2 - y1) for x1, y1, x2, y2 in (first, second)]
    union = sum(areas) - width * height
    return width * height / union if min(areas) > 0 and union > 0 else 0.0


def share_above(values: Sequence[float], threshold: float = 0.5) -> float:
    """Give the share of values strictly above a threshold, such as of IoUs above 0.5.

    >>> share_above([0.4, 0.5, 0.6, 0.9])
    0.5

    Raises:
        ValueError: without values.
    """
    _check_any(len(values))
    return sum(value > threshold for value in values) / len(values)


# ------------------------------------------------------------------------------------------------------- intervals


def wilson_interval(successes: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Give the Wilson score interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), with p = successes / count. It stays inside
    0..1 and has a width even at 0 and 100 %.

    Raises:
        ValueError: for a count below 1, or successes outside 0..count.

    >>> tuple(round(edge, 3) for edge in wilson_interval(90, 100))
    (0.826, 0.945)
    """
    _check_any(count)
    if not 0 <= successes <= count:
        raise ValueError(
            f"{successes} successes of {count} were given but a share is from 0 to 1. The two numbers were probably "
            "swapped: pass successes first."
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, shrink = successes / count, 1 + z * z / count
    center = (share + z * z / (2 * count)) / shrink
    half = z / shrink * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    # At 0 and at all successes the formula gives exactly 0 and 1, which rounding may miss by a hair.
    low, high = 0.0 if successes == 0 else center - half, 1.0 if successes == count else center + half
    return max(0.0, low), min(1.0, high)


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Give the percentile bootstrap interval of a mean (Efron 1979, doi:10.1214/aos/1176344552).

    Args:
        values: one number for each item.
        confidence: share of resampled means inside.
        resamples: how many samples with repetition.
        seed: of the samples.

    Raises:
        ValueError: without values.
    """
    _check_any(len(values))
    numbers, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    means = [float(numbers[rng.integers(0, len(numbers), len(numbers))].mean()) for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _check_any(count: int) -> None:
    if count < 1:
        raise ValueError(
            f"{count} values were given but at least 1 is needed. The group is probably empty: leave it out."
        )


def mean_and_interval(values: Sequence[float], is_proportion: bool) -> tuple[float, float, float]:
    """Give (mean, low, high) at 95 %: Wilson's interval for values of 0 and 1, else the bootstrap's.

    Raises:
        ValueError: without values.
    """
    _check_any(len(values))
    if is_proportion:
        low, high = wilson_interval(sum(values), len(values))
    else:
        low, high = bootstrap_interval(values)
    return sum(values) / len(values), low, high


def commonest_share(references: Sequence[str]) -> float:
    """Give the share of the most frequent reference: what always answering it would score.

    >>> commonest_share(["left", "right", "left"]) == 2 / 3
    True

    Raises:
        ValueError: without references.
    """
    _check_any(len(references))
    runs = itertools.groupby(sorted(references))
    return max(len(list(run)) for _, run in runs) / len(references)
