# SPDX-License-Identifier: Apache-2.0
"""Similar demonstrations by the small model's own tower, from rendered data to the file that tasks read."""

import pyarrow.parquet as parquet
import pytest

from blip3.evaluation.harness import neighbours
from blip3.world.settings import load_settings
from support import ROOT
from support.near import MARKED, ROWS_OF_A_QUESTION, SAME, write_near

QUESTIONS = 6


@pytest.fixture
def near(tmp_path, monkeypatch) -> tuple[str, str]:
    """Both splits; what `datasets` reads is kept beside them, as it is found again by the name of a folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return write_near(tmp_path / "near", QUESTIONS, load_settings(ROOT / "recipes" / "small" / "world.yaml"))


@pytest.mark.parametrize("subfolder", ["", "base"])
def test_an_images_own_rows_stand_last_by_our_own_tower(near, subfolder, tmp_path):
    questions, training = near
    line = ["--benchmark", "textvqa", "--model", str(ROOT), "--subfolder", subfolder, "--questions", questions]
    found = tmp_path / "near.parquet"
    line += ["--demonstrations", training, "--count", "4", "--device", "cpu", "--output", str(found)]
    assert neighbours.main(line) == 0
    table = parquet.read_table(found).to_pydict()
    assert table["question"] == [str(number) for number in range(QUESTIONS)]
    for number, (rows, similarities) in enumerate(zip(table["rows"], table["similarities"], strict=True)):
        first = number * ROWS_OF_A_QUESTION
        assert rows[-2:] == [first + MARKED, first + SAME]
        assert len(set(rows)) == 4
        assert similarities == sorted(similarities)
        assert similarities[-1] == pytest.approx(1, abs=1e-5)
        assert similarities[-2] < 1 - 1e-5
