# SPDX-License-Identifier: Apache-2.0
"""Yes or no: POPE and HallusionBench.

    answer --- read_as_pope, read_strictly ---> yes, no (or neither) ---> pope_scores
    answer --- verdict_of (or a grader) ------> correct, incorrect, unclear ---> hallusion_scores

POPE is arXiv:2305.10355 (github.com/RUCAIBox/POPE), HallusionBench arXiv:2310.14566
(github.com/tianyi-lab/HallusionBench).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..refusals import check_choice
from .ratios import HIGHER, LOWER, NEITHER, Counts, Ratio, make_mean, make_ratio

YES, NO = "yes", "no"
PROBES = ("random", "popular", "adversarial")
CORRECT, INCORRECT, UNCLEAR = "correct", "incorrect", "unclear"
STRING_PARSER = "string parser"

# --------------------------------------------------------------------------------------------------------- parsers


def read_as_pope(answer: str) -> str:
    """Read an answer as POPE's published script does: no if the words before the first full stop say so, else yes.

    Commas are removed, words are split at single spaces, and only `No`, `no` and `not` say no. Everything else is a
    yes: an empty answer, "NO", "no!" and a text about something else.

    >>> [read_as_pope(answer) for answer in ("No, it is not.", "There is not", "Nope", "NO", "Yes. Not sure.", "")]
    ['no', 'no', 'yes', 'yes', 'yes', 'yes']
    """
    words = answer.split(".", 1)[0].replace(",", "").split(" ")
    return NO if {"No", "not", "no"} & set(words) else YES


def read_strictly(answer: str) -> str | None:
    """Read an answer as yes or no if exactly one of the two words is in it, in any case; otherwise it is neither.

    >>> [read_strictly(answer) for answer in ("NO!", "Yes. Not sure.", "yes and no", "", "a knot")]
    ['no', 'yes', None, None, None]
    """
    found = {YES, NO} & set(re.findall(r"[^\W_]+", answer.casefold()))
    return found.pop() if len(found) == 1 else None


# ------------------------------------------------------------------------------------------------------------ POPE


@dataclass(frozen=True)
class Probe:
    """What a question about existence asks, and of which image."""

    image: str
    """Name of the image, whose questions depend on each other."""
    kind: str
    """How an absent thing was chosen, one of `PROBES`."""
    label: str
    """`yes` or `no`."""


def pope_scores(probes: Sequence[Probe], answers: Sequence[str]) -> list[Ratio]:
    """Score answers about existence: each kind of probe, then the mean over the kinds.

    Yes is the positive class. F1 is 2 TP / (2 TP + FP + FN). The published numbers come from `read_as_pope`; the
    strict ones, beside, count an answer that is neither yes nor no as wrong.

    Returns:
        accuracy, precision, recall, F1, share of yes, strict accuracy and share of answers that are neither, for
        each kind of `PROBES` that was asked, and, for several kinds, the mean of each score over them.

    Raises:
        ValueError: for another kind.
    """
    for kind in {probe.kind for probe in probes}:
        check_choice("The kind of a probe is", kind, PROBES)
    pairs = list(zip(probes, answers, strict=True))
    kinds = [kind for kind in PROBES if any(probe.kind == kind for probe in probes)]
    by_kind = [_pope_scores_of([pair for pair in pairs if pair[0].kind == kind]) for kind in kinds]
    scores = [_named(ratio, kind) for kind, ratios in zip(kinds, by_kind, strict=True) for ratio in ratios]
    if len(kinds) > 1:
        scores += [
            make_mean(f"{ratios[0].name}, mean of {len(kinds)}", ratios) for ratios in zip(*by_kind, strict=True)
        ]
    return scores


def _named(ratio: Ratio, kind: str) -> Ratio:
    return Ratio(f"{ratio.name}, {kind}", ratio.clusters, ratio.counted, ratio.total, ratio.better)


def _pope_scores_of(pairs: Sequence[tuple[Probe, str]]) -> list[Ratio]:
    read = [(probe.image, read_as_pope(answer) == YES, probe.label == YES) for probe, answer in pairs]
    strict = [(probe.image, read_strictly(answer), probe.label) for probe, answer in pairs]

    def ratio(name: str, better: str, counts: Callable[[bool, bool], tuple[float, float]]) -> Ratio:
        return make_ratio(name, [(image, *counts(said, asked)) for image, said, asked in read], better)

    return [
        ratio("accuracy", HIGHER, lambda said, asked: (said == asked, 1)),
        ratio("precision", HIGHER, lambda said, asked: (said and asked, said)),
        ratio("recall", HIGHER, lambda said, asked: (said and asked, asked)),
        ratio("F1", HIGHER, lambda said, asked: (2 * (said and asked), said + asked)),
        ratio("says yes", NEITHER, lambda said, asked: (said, 1)),
        make_ratio("strict accuracy", [(image, said == label, 1) for image, said, label in strict]),
        make_ratio("neither yes nor no", [(image, said is None, 1) for image, said, _ in strict], LOWER),
    ]


# -------------------------------------------------------------------------------------------------- HallusionBench


@dataclass(frozen=True)
class HallusionKey:
    """Where a question of HallusionBench belongs."""

    category: str
    """`VD` (the image is needed) or `VS` (it supplements)."""
    subcategory: str
    """Such as `illusion` or `chart`."""
    set_id: str
    """Of related figures and questions."""
    figure_id: str
    """Within the set; figure 0 of `VS` stands for no figure at all."""
    question_id: str
    """Within the set; asked about several figures."""

    @property
    def is_without_figure(self) -> bool:
        """Whether the question is asked without its figure."""
        return self.category == "VS" and self.figure_id == "0"

    @property
    def cluster(self) -> str:
        """The set, whose questions depend on each other."""
        return " ".join((self.category, self.subcategory, self.set_id))


def verdict_of(answer: str, reference: str) -> str:
    """Compare a yes/no answer by `read_strictly`: correct, incorrect, or unclear if it is neither.

    >>> verdict_of("No, it is longer.", "no"), verdict_of("It is longer.", "no")
    ('correct', 'unclear')
    """
    read = read_strictly(answer)
    return UNCLEAR if read is None else CORRECT if read == reference else INCORRECT


def hallusion_scores(keys: Sequence[HallusionKey], verdicts: Sequence[str], grader: str) -> list[Ratio]:
    """Score verdicts on HallusionBench's questions.

    aAcc is the share of questions that are right, qAcc the share of questions that are right about all their figures,
    fAcc the share of figures about which all questions are right; figure 0 of VS, where there is none, is no figure.
    There, and only there, an unclear answer is right: without a figure, not to know is the right thing.

    Args:
        keys: of the questions.
        verdicts: `correct`, `incorrect` or `unclear`, one for each question.
        grader: what gave the verdicts, for the names of the scores.
    """
    pairs = list(zip(keys, verdicts, strict=True))
    right = [(key, verdict == CORRECT or (verdict == UNCLEAR and key.is_without_figure)) for key, verdict in pairs]
    questions = _all_right((key.cluster, key.question_id, is_right) for key, is_right in right)
    figures = _all_right(
        (key.cluster, key.figure_id, is_right) for key, is_right in right if not key.is_without_figure
    )
    unclear = [(key.cluster, verdict == UNCLEAR, 1) for key, verdict in pairs]
    return [
        make_ratio(f"aAcc ({grader})", [(key.cluster, is_right, 1) for key, is_right in right]),
        make_ratio(f"qAcc ({grader})", questions),
        make_ratio(f"fAcc ({grader})", figures),
        make_ratio(f"unclear ({grader})", unclear, NEITHER),
    ]


def _all_right(answers: Iterable[tuple[str, str, bool]]) -> list[Counts]:
    """Give a count for each (cluster, member): whether all its answers are right."""
    groups: dict[tuple[str, str], bool] = {}
    for cluster, member, is_right in answers:
        groups[cluster, member] = groups.get((cluster, member), True) and is_right
    return [(cluster, is_right, 1) for (cluster, _), is_right in groups.items()]
