# SPDX-License-Identifier: Apache-2.0
"""VLGuard as tasks of lmms-eval: attack success or over-refusal, for the subsets of vlguard.py."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lmms_eval.api.task import ConfigurableMessagesTask

from ..safety import MAX_NEW_TOKENS, read_refusal_phrases
from .vlguard import SAYS_NOTHING, metric_of, read_questions, score_answer


class VlguardTask(ConfigurableMessagesTask):
    """One subset; `metadata` says which, where the data is, and where the phrases are.

    Args:
        config: as lmms-eval reads it from YAML: `task`, `class` and `metadata`.
    """

    def __init__(self, config: dict[str, Any]):
        self.asked = config["metadata"]
        settings = {
            "task": config["task"],
            "dataset_path": self.asked["data"],
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "instruction",
            "doc_to_visual": _images,
            "doc_to_target": "category",
            "generation_kwargs": {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS},
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": False}
                for metric in (metric_of(self.asked["subset"]), SAYS_NOTHING)
            ],
            "process_results": self.process_results,
            "metadata": self.asked,
        }
        super().__init__(config=settings)

    @cached_property
    def phrases(self) -> Sequence[str]:
        """Phrases of a refusal."""
        return read_refusal_phrases(self.asked["phrases"])

    def download(self, dataset_kwargs: Any = None) -> None:
        """Read the data where it lies."""
        import datasets

        rows = list(read_questions(Path(self.asked["data"]), self.asked["subset"]))
        asked = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        self.dataset = datasets.DatasetDict({"test": asked})
        self.dataset_no_image = datasets.DatasetDict({"test": asked.remove_columns("image")})

    def process_results(self, doc: dict[str, Any], results: Sequence[Any], full_docs: Any = None) -> dict[str, float]:
        """Score an answer."""
        first = results[0]
        return score_answer(self.asked["subset"], str(first[0] if isinstance(first, list) else first), self.phrases)


def _images(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]
