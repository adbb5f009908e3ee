# SPDX-License-Identifier: Apache-2.0
"""Similar demonstrations by the small model's own tower, from rendered data to the file that tasks read."""

from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from datasets import Dataset
from PIL import Image

from blip3.evaluation.harness import neighbours, write_tasks
from blip3.evaluation.harness.few_shot import BENCHMARKS, Place, load_place, parse_place
from blip3.evaluation.harness.own_rows import OwnRows
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


# -- without a tower: the mean colour of an image ---------------------------------------------------------------------


class MeanColour:
    """Stands for a tower, and counts the images that it saw."""

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return torch.tensor([list(image.resize((1, 1)).getpixel((0, 0))) for image in images]).float() - 100


def write_colours(folder: Path, split: str, colours: list[tuple[int, int, int]], **columns: list) -> Place:
    """Write a split with an image of each colour."""
    images = [Image.new("RGB", (4, 4), colour) for colour in colours]
    names = [str(number) if split == "test" else f"{split} {number}" for number in range(len(colours))]
    rows = {"question_id": names, "image": images, "question": ["What?"] * len(colours)} | columns
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows | {"answers": [["red"]] * len(colours)}).to_parquet(
        str(folder / f"{split}-00000-of-00001.parquet")
    )
    return parse_place(f"{folder}:{split}", split)


RED, GREEN, BLUE = (250, 0, 0), (0, 250, 0), (0, 0, 250)


@pytest.fixture
def colours(tmp_path, monkeypatch) -> tuple[Place, Place]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    questions = write_colours(tmp_path / "asked", "test", [RED, RED, BLUE], image_id=["r", "r", "b"])
    training = write_colours(tmp_path / "shown", "train", [BLUE, GREEN, RED, GREEN], image_id=["b", "g", "r", "g"])
    return questions, training


def test_blocks_of_questions_give_what_all_at_once_gives():
    generator = torch.Generator().manual_seed(0)
    questions, training = (
        torch.nn.functional.normalize(torch.randn(count, 16, generator=generator), dim=-1) for count in (23, 40)
    )
    whole = neighbours.nearest(questions, training, 8)
    for block_numbers in (1, 40, 120, 200):
        rows, similarities = neighbours.nearest(questions, training, 8, block_numbers)
        assert torch.equal(rows, whole[0])
        torch.testing.assert_close(similarities, whole[1])


def test_no_more_similarities_are_in_memory_than_a_block_has(monkeypatch):
    sizes = []
    topk = torch.topk

    def watched(similarities, *arguments, **options):
        sizes.append(similarities.numel())
        return topk(similarities, *arguments, **options)

    monkeypatch.setattr(torch, "topk", watched)
    neighbours.nearest(torch.eye(10), torch.eye(10), 2, block_numbers=35)
    assert sizes == [30, 30, 30, 10]


def test_an_image_is_encoded_once_however_many_rows_ask_about_it(colours):
    encode = MeanColour()
    names, rows, _, origin = neighbours.find("textvqa", *colours, encode, 2)
    assert encode.seen == 2 + 3  # distinct images of each split
    assert names == ["0", "1", "2"]
    assert [row[-1] for row in rows.tolist()] == [2, 2, 0]
    assert (origin.questions.count, origin.demonstrations.count, origin.count) == (3, 4, 2)


def test_a_questions_own_rows_are_no_neighbours_of_it(tmp_path, monkeypatch):
    """Questions and demonstrations of one split: the nearest image is the question's, and its row has the answer."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    place = write_colours(tmp_path / "both", "test", [RED, RED, BLUE, GREEN], image_id=["r", "r", "b", "g"])
    for count, expected in ((2, 2), (9, 3)):
        names, rows, similarities, origin = neighbours.find("textvqa", place, place, MeanColour(), count)
        assert rows.shape == similarities.shape == (4, expected)
        assert origin.count == expected
        assert all(int(name) not in shown for name, shown in zip(names, rows.tolist(), strict=True))
        assert [row[-1] for row in rows.tolist()][:2] == [1, 0]  # the other question about the red image
        assert (similarities.diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("has_group", [True, False])
def test_a_split_without_rows_says_so(has_group, colours, tmp_path):
    questions, _ = colours
    empty = write_colours(tmp_path / "empty", "train", [RED])
    path = tmp_path / "empty" / "train-00000-of-00001.parquet"
    table = parquet.read_table(path)
    with parquet.ParquetWriter(path, table.schema) as file:
        if has_group:
            file.write_table(table.slice(0, 0))
    with pytest.raises(ValueError, match=r"empty gives 0 rows of the split train \("):
        neighbours.find("textvqa", questions, empty, MeanColour(), 2)


@pytest.fixture
def written(colours, tmp_path) -> list[str]:
    """A command line for tasks that show neighbours."""
    path = tmp_path / "near.parquet"
    neighbours.write_neighbours(path, *neighbours.find("textvqa", *colours, MeanColour(), 4))
    line = [str(tmp_path / "tasks"), "--benchmark", "textvqa", "--shots", "4", "--neighbours", f"textvqa={path}"]
    questions, training = colours
    return [
        *line,
        "--questions",
        f"textvqa={questions.path}:test",
        "--demonstrations",
        f"textvqa={training.path}:train",
    ]


def test_tasks_of_the_same_data_show_neighbours_and_are_named_after_them(written, capsys):
    assert write_tasks.main(written) == 0
    assert capsys.readouterr().out == "few_shot_textvqa_4_similar\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line[:-2], "was computed for the demonstrations"),
        (lambda line: [*line[:-1], line[-1].replace("shown", "asked")], "was computed for the demonstrations"),
        (lambda line: [*line[:-1], line[-1].replace(":train", ":test")], "was computed for the demonstrations"),
        (lambda line: [*line[:7], *line[9:]], "was computed for the questions"),
        (lambda line: [*line, "--shots", "5"], "has 4 neighbours of each question, but 5 shots were asked for"),
        (lambda line: [*line, "--seed", "1", "2"], "whose demonstrations are the most similar ones"),
    ],
)
def test_neighbours_of_other_data_are_refused(written, change, message, capsys):
    assert write_tasks.main(change(written)) == 1
    assert message in capsys.readouterr().err


def test_neighbours_of_another_number_of_rows_are_refused(written, tmp_path, capsys, monkeypatch):
    write_colours(tmp_path / "shown", "train", [BLUE, GREEN, RED, GREEN, RED])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "another cache")
    assert write_tasks.main(written) == 1
    assert "was computed for 4 demonstrations, but" in capsys.readouterr().err


def test_a_file_that_does_not_say_what_it_was_computed_for_is_refused(written, tmp_path, capsys):
    path = tmp_path / "near.parquet"
    parquet.write_table(parquet.read_table(path).replace_schema_metadata(None), path)
    assert write_tasks.main(written) == 1
    assert "does not say for which data it was computed" in capsys.readouterr().err


def test_a_data_set_of_the_hub_may_be_a_folder_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "owner" / "data").mkdir(parents=True)
    place = Place("owner/data", "train")
    monkeypatch.chdir(tmp_path)
    rows = neighbours.Rows.of(place, 4)
    assert rows.is_same_place(place)
    assert rows.is_same_place(Place(str(tmp_path / "owner" / "data"), "train"))
    monkeypatch.chdir(tmp_path / "owner")
    assert rows.is_same_place(place)
    assert not rows.is_same_place(Place("data", "train", "other"))
    assert not rows.is_same_place(Place("other/data", "train"))


# -- which rows are the question itself -------------------------------------------------------------------------------


def own_rows(benchmark: str, asked: Place, shown: Place, **options) -> list[set[int]]:
    """The own rows of each question."""
    questions, identity = load_place(asked), BENCHMARKS[benchmark].identity
    found = OwnRows(questions, load_place(shown), BENCHMARKS[benchmark], **options)
    return [found.of(str(name)) for name in questions[identity]]


@pytest.fixture
def asked(tmp_path, monkeypatch) -> Place:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return write_colours(tmp_path / "asked", "test", [RED, RED, BLUE], question=["A?", "B?", "A?"], image_id=[1, 2, 3])


def test_rows_of_the_same_identity_are_the_question(asked, tmp_path):
    shown = write_colours(tmp_path / "shown", "train", [RED, GREEN, BLUE], question_id=["1", "7", "1"])
    assert own_rows("textvqa", asked, shown) == [set(), {0, 2}, set()]
    assert own_rows("textvqa", asked, shown, among=[1, 2]) == [set(), {2}, set()]


def test_without_identities_rows_with_the_same_question_about_the_same_image_are_the_question(asked, tmp_path):
    nothing = [None] * 4
    shown = write_colours(
        tmp_path / "shown", "train", [RED, RED, BLUE, GREEN], question=["A?", "C?", "A?", "A?"], question_id=nothing
    )
    assert own_rows("textvqa", asked, shown) == [{0}, set(), {2}]
    assert own_rows("textvqa", asked, shown, among=[1, 2, 3]) == [set(), set(), {2}]


def test_without_identities_rows_of_the_same_image_are_the_caption(asked, tmp_path):
    shown = write_colours(tmp_path / "shown", "train", [BLUE, RED, GREEN, BLUE])
    assert own_rows("nocaps", asked, shown) == [{1}, {1}, {0, 3}]
    named = write_colours(tmp_path / "named", "test", [RED, RED], imgid=[5, 6], url=["a", "b"])
    other = write_colours(tmp_path / "other", "train", [RED, RED, BLUE], url=["b", "c", "b"])
    assert own_rows("coco", named, other) == [set(), {0, 2}]  # by URL where both have one: nothing is opened
