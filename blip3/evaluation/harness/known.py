# SPDX-License-Identifier: Apache-2.0
"""Where each harness has the number that published tables call by a benchmark's name, and on which scale.

Facts of lmms-eval 0.7.3, and of VLMEvalKit at e8e78f0: its letters are shares of 1 and its words are percents.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

MME_MAXIMUM = 2800  # of perception and cognition together; published tables give the share of it
SPLITS = tuple(f"split={name}|Overall" for name in ("validation", "val", "test", "dev", "none"))
"""Metrics of the kit's benchmarks with letters: by the table's column of splits, which not every one has."""

Together = Callable[[Iterable[float]], float]


@dataclass(frozen=True)
class Place:
    """A benchmark's number in a harness's results."""

    task: str
    """Of lmms-eval, or a table of VLMEvalKit."""
    metrics: tuple[str, ...]
    """In order of preference; all of them where `together` is given."""
    scale: float = 1
    """What makes it a number on the scale of published tables."""
    together: Together | None = None
    """Makes one number of all the metrics."""
    note: str = ""
    """What a reader must know."""

    def read(self, numbers: Mapping[str, float]) -> tuple[str, float | None]:
        """Give what the number is called, and its value as the harness gives it; None where a metric is missing.

        >>> Place("mme", ("a", "b"), together=sum).read({"a": 1.0, "b": 2.0})
        ('a and b', 3.0)
        >>> Place("mmstar", ("a", "b")).read({"b": 2.0})
        ('b', 2.0)
        """
        if self.together is None:
            name = next((name for name in self.metrics if name in numbers), self.metrics[0])
            return name, numbers.get(name)
        found = [numbers[name] for name in self.metrics if name in numbers]
        return " and ".join(self.metrics), self.together(found) if len(found) == len(self.metrics) else None


def _by_benchmark(*places: tuple[str, str, str | tuple[str, ...], float]) -> dict[str, Place]:
    return {
        name: Place(task, (metrics,) if isinstance(metrics, str) else metrics, scale)
        for name, task, metrics, scale in places
    }


_OF_ALL_QUESTIONS = "share of all questions"
_THREE, _ALONE = "mean of aAcc, fAcc and qAcc", "aAcc alone"

LMMS_EVAL = _by_benchmark(
    ("vqav2", "vqav2_val", "exact_match", 100),
    ("textvqa", "textvqa_val", "exact_match", 100),
    ("okvqa", "ok_vqa_val2014", "exact_match", 100),
    ("docvqa", "docvqa_val", "anls", 100),
    ("chartqa", "chartqa", "relaxed_overall", 100),
    ("coco", "coco_karpathy_test", "coco_CIDEr", 100),
    ("nocaps", "nocaps_val", "nocaps_CIDEr", 100),
    ("textcaps", "textcaps_val", "textcaps_CIDEr", 100),
    ("seed-img", "seedbench", "seed_image", 100),
    ("mmbench", "mmbench_en_dev", "gpt_eval_score", 1),
    ("mmstar", "mmstar", "average", 100),
    ("realworldqa", "realworldqa", "exact_match", 100),
    ("mm-vet", "mmvet", "gpt_eval_score", 1),
    ("mmmu", "mmmu_val", "mmmu_acc", 100),
    ("mathvista", "mathvista_testmini", "gpt_eval_score", 1),
    ("sciqa", "scienceqa_img", "exact_match", 100),
    ("ai2d", "ai2d", "exact_match", 100),
    ("cvb-3d", "cv_bench_3d", "cv_bench_acc", 100),
    ("ocrbench", "ocrbench", "ocrbench_accuracy", 100),
    ("pope", "pope", "pope_f1_score", 100),
    ("qbench2", "qbench2_dev", "qbench_acc", 100),
    ("muirbench", "muirbench", "muirbench_score_overall", 100),
    ("mantis", "mantis", "mantis_score", 100),
    ("vlguard", "vlguard_unsafes", "attack_success", 100),
    ("vlguard-safe-images", "vlguard_safe_unsafes", "attack_success", 100),
    ("vlguard-over-refusal", "vlguard_safe_safes", "over_refusal", 100),
) | {
    "cvb-2d": Place("cv_bench_2d", ("cv_bench_acc",), 100, note=_OF_ALL_QUESTIONS),
    "mme-norm": Place("mme", ("mme_perception_score", "mme_cognition_score"), 100 / MME_MAXIMUM, sum),
    "hallusionbench-mean": Place("hallusion_bench_image", ("aAcc", "fAcc", "qAcc"), 1, fmean, _THREE),
    "hallusionbench-aacc": Place("hallusion_bench_image", ("aAcc",), 1, note=_ALONE),
}
"""Benchmark as `published.yaml` calls it -> where lmms-eval has its number. BLINK is the mean of several tasks."""

KIT = _by_benchmark(
    ("textvqa", "TextVQA_VAL", "Overall", 1),
    ("docvqa", "DocVQA_VAL", "Overall", 1),
    ("chartqa", "ChartQA_TEST", "Overall", 1),
    ("seed-img", "SEEDBench_IMG", SPLITS, 100),
    ("mmbench", "MMBench_DEV_EN", SPLITS, 100),
    ("mmstar", "MMStar", SPLITS, 100),
    ("realworldqa", "RealWorldQA", SPLITS, 100),
    ("mm-vet", "MMVet", "Category=Overall|acc", 1),
    ("mmmu", "MMMU_DEV_VAL", SPLITS, 100),
    ("mathvista", "MathVista_MINI", "Task&Skill=Overall|acc", 1),
    ("sciqa", "ScienceQA_TEST", SPLITS, 100),
    ("ai2d", "AI2D_TEST", SPLITS, 100),
    ("ocrbench", "OCRBench", "Final Score Norm", 1),
    ("pope", "POPE", "split=Overall|Overall", 1),
    ("muirbench", "MUIRBench", SPLITS, 100),
) | {
    "cvb-2d": Place("CV-Bench-2D", ("split=2D|Overall",), 100, note="mean of its two sources"),
    "cvb-3d": Place("CV-Bench-3D", ("split=3D|Overall",), 100),
    "blink": Place("BLINK", SPLITS, 100, note=_OF_ALL_QUESTIONS),
    "mme-norm": Place("MME", ("perception", "reasoning"), 100 / MME_MAXIMUM, sum),
    "hallusionbench-mean": Place(
        "HallusionBench", tuple(f"split=Overall|{name}" for name in ("aAcc", "fAcc", "qAcc")), 1, fmean, _THREE
    ),
    "hallusionbench-aacc": Place("HallusionBench", ("split=Overall|aAcc",), 1, note=_ALONE),
}
"""The same of VLMEvalKit, whose own first metric is a share of one split for letters and a sum for OCRBench."""


def places_of(tables: Mapping[str, Place], task: str) -> dict[str, Place]:
    """Give the benchmarks whose numbers are in a task's results.

    >>> list(places_of(LMMS_EVAL, "hallusion_bench_image"))
    ['hallusionbench-mean', 'hallusionbench-aacc']
    """
    return {name: place for name, place in tables.items() if place.task == task}
