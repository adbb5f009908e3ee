# SPDX-License-Identifier: Apache-2.0
"""The mixture: sample i is the same whenever, wherever and in whichever order it is asked for."""

import gc
import json
import multiprocessing
import pickle
import random
import tracemalloc
from collections import Counter

import pytest
from torch.utils.data import DataLoader, Dataset

from blip3.data.images import ImageSource, RecordError
from blip3.data.records import Record, Turn, write_jsonl
from blip3.training.mixture import Mixture
from blip3.world import build
from blip3.world.settings import settings_from
from blip3.world.splits import split_of
from blip3.world.tasks import TASKS, content_keys, rendered_record
from support import write_tar
from support.training import WORLD

RATINGS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


def mixture_of(*entries: dict, count: int = 60, seed: int = 0, **others: object) -> Mixture:
    return Mixture(entries, count, seed, WORLD, **others)


def ids_of(mixture: Mixture, indices=None) -> list[str]:
    return [mixture[index].id for index in (range(len(mixture)) if indices is None else indices)]


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    """Ten records in a file."""
    folder = tmp_path_factory.mktemp("records")
    turns = (Turn("user", "What?"), Turn("assistant", "It."))
    write_jsonl((Record(f"r{n}", "instruction", (), turns) for n in range(10)), folder / "ten.jsonl")
    (folder / "empty.jsonl").write_text("")
    return folder / "ten.jsonl"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three webdataset shards of four captions and three parquet shards of four rows."""
    from datasets import Dataset as Rows

    folder = tmp_path_factory.mktemp("shards")
    image = build.encode(rendered_record("caption", settings=settings_from(WORLD)).images[0], "png")
    for shard in range(3):
        pairs = {f"{shard}{number}": {"png": image, "txt": f"caption {shard}{number}".encode()} for number in range(4)}
        write_tar(folder / f"shard-{shard}.tar", pairs)
        captions = json.dumps([["a caption", 0, False]])
        rows = [{"uid": f"{shard}{number}", "captions": captions, "image": image} for number in range(4)]
        Rows.from_list(rows).to_parquet(str(folder / f"shard-{shard}.parquet"))
    return folder


IN_ORDER = [f"{shard}{number}" for shard in range(3) for number in range(4)]


def streams(folder) -> list[dict]:
    tar = {"stream": str(folder / "*.tar"), "reader": "captions", "options": {"column": "txt"}}
    return [tar, {"stream": str(folder / "*.parquet"), "reader": "ocr"}]


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_respected():
    entries = [{"rendered": "count", "weight": 6}, {"rendered": "name", "weight": 3}, {"rendered": "relation"}]
    mixture = mixture_of(*entries, count=20_000)
    shares = Counter(mixture.choice.tolist())
    for source, share in enumerate((0.6, 0.3, 0.1)):
        assert shares[source] / 20_000 == pytest.approx(share, abs=0.012)  # 3.5 standard deviations
    assert [record.id.split("-")[0] for record in map(mixture.__getitem__, range(30))] == [
        ("count", "name", "relation")[source] for source in mixture.choice[:30]
    ]


def test_weights_need_no_sum():
    one, other = (
        mixture_of({"rendered": "count", "weight": w}, {"rendered": "name", "weight": 2 * w}) for w in (1, 45)
    )
    assert ids_of(one) == ids_of(other)


# -- sample i is a function of seed and i -----------------------------------------------------------------------------


def test_samples_depend_on_seed_and_index_alone(jsonl):
    entries = ({"rendered": "count"}, {"records": str(jsonl), "weight": 2})
    straight = ids_of(mixture_of(*entries))
    assert ids_of(mixture_of(*entries), range(59, -1, -1)) == straight[::-1]
    assert mixture_of(*entries)[33].id == straight[33]
    assert ids_of(mixture_of(*entries, count=25)) == straight[:25]  # a longer run begins like a shorter one
    assert ids_of(mixture_of(*entries, seed=1)) != straight


def test_rendered_samples_are_those_of_the_world():
    mixture = mixture_of({"rendered": "read", "world": {"max_characters": 2}})
    settings = settings_from(WORLD | {"max_characters": 2})
    assert mixture[5] == rendered_record("read", "train", 0, 5, settings)
    assert all(len(mixture[index].annotations["answer"]) <= 2 for index in range(20))


def test_entries_of_one_task_draw_different_records():
    mixture = mixture_of({"rendered": "rule", "world": {"num_shots": 2}}, {"rendered": "name"}, {"rendered": "rule"})
    ids = ids_of(mixture)
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("task", TASKS)
def test_splits_stay_apart(task):
    for split in ("train", "held_out"):
        mixture = mixture_of({"rendered": task}, count=8, split=split)
        for index in range(8):
            assert {split_of(key) for key in content_keys(mixture[index])} <= {split}


# -- lists ------------------------------------------------------------------------------------------------------------


def test_lists_repeat_nothing_within_a_pass(jsonl):
    mixture = mixture_of({"records": str(jsonl)})
    ids = ids_of(mixture)
    passes = [ids[first : first + 10] for first in range(0, 60, 10)]
    assert all(len(set(each)) == 10 for each in passes)
    assert len({tuple(each) for each in passes}) > 1, "each pass has its own order"


def test_llava_files_and_mixtures_are_lists(tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It."}]
    entries = [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in range(5)]
    (tmp_path / "five.json").write_text(json.dumps(entries))
    (tmp_path / "mix.yaml").write_text("five.json: 3\n")
    five = mixture_of({"llava": str(tmp_path / "five.json"), "images": "images"}, count=10)
    assert sorted(ids_of(five, range(5))) == sorted(ids_of(five, range(5, 10))) == list("01234")
    assert five[0].images == (ImageSource(path=f"images/{five[0].id}.png"),)
    assert len(set(ids_of(mixture_of({"llava": str(tmp_path / "mix.yaml")}, count=9)))) == 3


def test_pairs_of_vlfeedback_as_json_lines_are_a_list(tmp_path):
    """As its authors publish them: a list is put into a new order on each pass, and its images lie in a folder."""
    answers = [
        {"annotations": {name: {"Rating": rating} for name in RATINGS}, "response": text}
        for text, rating in (("Yes.", "5"), ("No.", "2"))
    ]
    rows = [{"id": f"p{n}", "prompt": "Is it?", "completions": answers, "img_path": f"{n}.jpg"} for n in range(5)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = mixture_of({"preferences": str(path), "images": "images"}, count=10)
    assert sorted(ids_of(mixture, range(5))) == sorted(ids_of(mixture, range(5, 10))) == [f"p{n}" for n in range(5)]
    assert mixture[0].images == (ImageSource(path=f"images/{mixture[0].id[1:]}.jpg"),)
    assert (mixture[0].chosen, mixture[0].rejected) == ("Yes.", "No.")
    with pytest.raises(ValueError, match="holds no record"):
        mixture_of({"preferences": str(path), "options": {"min_chosen_rating": 5.5}}, count=2)
    for name in ("shuffle", "lanes"):
        with pytest.raises(ValueError, match=f"{name} for .* but JSON lines are a list"):
            mixture_of({"preferences": str(path), name: 2}, count=2)


def test_pairs_of_vlfeedback_are_a_stream_and_vlguard_is_a_list(shards, tmp_path):
    from datasets import Dataset as Rows

    image = build.encode(rendered_record("caption", settings=settings_from(WORLD)).images[0], "png")
    ratings = {name: {"Rating": "5"} for name in RATINGS}
    poor = {name: {"Rating": "2"} for name in RATINGS}
    completions = [{"annotations": ratings, "response": "Yes."}, {"annotations": poor, "response": "No."}]
    rows = [{"id": f"p{n}", "prompt": "Is it?", "completions": completions, "image": image} for n in range(3)]
    Rows.from_list(rows).to_parquet(str(tmp_path / "pairs.parquet"))
    mixture = mixture_of({"preferences": str(tmp_path / "*.parquet"), "options": {"min_chosen_rating": 4.5}}, count=5)
    assert ids_of(mixture) == ["p0", "p1", "p2", "p0", "p1"]
    assert {(mixture[index].kind, mixture[index].chosen) for index in range(5)} == {("preference", "Yes.")}

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(image)
    both = [{"safe_instruction": "What?", "response": "A dog."}, {"unsafe_instruction": "Hurt.", "response": "Sorry."}]
    guard = [{"id": f"g{n}", "image": "a.png", "instr-resp": both} for n in range(4)]
    (tmp_path / "train.json").write_text(json.dumps(guard))
    mixture = mixture_of({"safety": str(tmp_path / "train.json"), "images": str(tmp_path / "images")}, count=8)
    assert Counter(ids_of(mixture, range(4))) == Counter(f"g{n}" for n in range(4))
    assert mixture[0].images[0].open().width >= 48
    assert len(mixture[0].turns) == 4
    with pytest.raises(ValueError, match=r"unknown key 'min_rating'.*'min_chosen_rating'"):
        mixture_of({"preferences": "x", "options": {"min_rating": 4}})


# -- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, 1], ids=["webdataset", "parquet"])
def test_streams_are_read_in_order_and_wrap_round(shards, kind):
    entry = streams(shards)[kind]
    assert ids_of(mixture_of(entry, count=30)) == (IN_ORDER * 3)[:30]
    record = mixture_of(entry)[0]
    assert record.images[0].open().width >= 48
    for resumed_at in (1, 11, 12, 17, 29):
        assert ids_of(mixture_of(entry, count=30), range(resumed_at, 30)) == (IN_ORDER * 3)[resumed_at:30]


def test_streams_give_earlier_records_again(shards):
    mixture = mixture_of(streams(shards)[1], count=40)
    assert ids_of(mixture, [0, 1, 0, 1, 2]) == ["00", "01", "00", "01", "02"]
    assert ids_of(mixture, [30, 3, 31, 0]) == [(IN_ORDER * 3)[index] for index in (30, 3, 31, 0)]


@pytest.mark.parametrize("kind", [0, 1], ids=["webdataset", "parquet"])
def test_shuffled_streams_repeat_nothing_within_a_pass_and_hold_few_rows(shards, kind):
    entry = streams(shards)[kind] | {"shuffle": 5}
    ids = ids_of(mixture_of(entry, count=36))
    passes = [ids[first : first + 12] for first in range(0, 36, 12)]
    assert all(sorted(each) == IN_ORDER for each in passes)
    assert len({tuple(each) for each in passes}) == 3, "each pass has its own order"
    for each in passes:  # a block of five rows lies in two shards next to each other
        assert all(len({name[0] for name in each[first : first + 5]}) <= 2 for first in (0, 5))
    assert ids_of(mixture_of(entry, count=36), [35, 17, 3]) == [ids[35], ids[17], ids[3]]
    assert ids_of(mixture_of(entry, count=36, seed=1)) != ids


def test_lanes_keep_shards_apart(shards):
    entry = streams(shards)[1] | {"shuffle": 4, "lanes": 3}
    ids = ids_of(mixture_of(entry, count=72, batch_size=2))
    for lane in range(3):
        own = [ids[index] for index in range(72) if index // 2 % 3 == lane]
        assert {name[0] for name in own} == {str(lane)}, "a process that takes every third batch opens one shard"
        assert all(sorted(own[first : first + 4]) == IN_ORDER[4 * lane : 4 * lane + 4] for first in range(0, 24, 4))
    with pytest.raises(ValueError, match=r"lanes 4 but 3 shards.* probably .*: lower lanes"):
        mixture_of(entry | {"lanes": 4}).count_streams()
    assert mixture_of(entry, *streams(shards)).count_streams() == 36


def test_rows_without_a_record_are_left_out(tmp_path):
    """An engine's rows without a result, and those that a reader's options do not want."""
    from datasets import Dataset as Rows

    image = build.encode(rendered_record("caption", settings=settings_from(WORLD)).images[0], "png")
    rows = [
        {"uid": str(n), "captions": json.dumps([["text", int(n == 5), False]]), "image": image,
         "error": "It is none." if n in (2, 3) else None, "filtered_by": None}
        for n in range(8)
    ]  # fmt: skip
    Rows.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    mixture = mixture_of({"stream": str(tmp_path / "*.parquet"), "reader": "ocr"}, count=12)
    assert ids_of(mixture) == (["0", "1", "4", "6", "7"] * 3)[:12]


def rated_pair(number: int, rating: int) -> dict:
    answers = [
        {"annotations": {name: {"Rating": str(each)} for name in RATINGS}, "response": text}
        for text, each in (("Yes.", rating), ("No.", 2))
    ]
    return {"id": f"p{number}", "prompt": "Is it?", "completions": answers, "img_path": f"{number}.jpg"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Three parquet files of VLFeedback's rows, of which 22 % give no pair, and the ids of those that do."""
    from datasets import Dataset as Rows

    folder, chance = tmp_path_factory.mktemp("pairs"), random.Random(0)
    rows = [rated_pair(n, 5 if chance.random() < 0.78 else 3) for n in range(300)]
    for shard in range(3):
        Rows.from_list(rows[100 * shard : 100 * (shard + 1)]).to_parquet(str(folder / f"{shard}.parquet"))
    return folder, [row["id"] for row in rows if row["completions"][0]["annotations"][RATINGS[0]]["Rating"] == "5"]


@pytest.mark.parametrize("options", [{}, {"shuffle": 70}, {"shuffle": 70, "lanes": 3}], ids=str)
def test_each_pair_of_a_stream_comes_once_a_pass(pairs, options):
    folder, expected = pairs
    assert 200 < len(expected) < 250
    entry = {"preferences": str(folder / "*.parquet"), "images": "x", **options}
    mixture = mixture_of(entry, count=3 * len(expected) + 30)
    lanes = options.get("lanes", 1)
    for lane in range(lanes):
        own = [index for index in range(len(mixture)) if index % lanes == lane]
        of_lane = [name for name in expected if lanes == 1 or int(name[1:]) // 100 == lane]
        ids = ids_of(mixture, own)
        passes = [ids[first : first + len(of_lane)] for first in (0, len(of_lane))]
        assert all(Counter(each) == Counter(of_lane) for each in passes)
        assert (passes[0] == passes[1]) == (not options)
        for resumed_at in (len(of_lane) - 1, len(of_lane) + 7):
            assert ids_of(mixture_of(entry, count=len(mixture)), own[resumed_at:]) == ids[resumed_at:]


@pytest.mark.parametrize("options", [{}, {"shuffle": 4}], ids=str)
def test_each_record_of_a_row_with_several_comes_once_a_pass(options, tmp_path):
    from datasets import Dataset as Rows

    both = [{"safe_instruction": "What?", "response": "A dog."}, {"unsafe_instruction": "Hurt.", "response": "Sorry."}]
    rows = [{"id": f"g{n}", "image": "a.png", "instr-resp": both[: 1 + n % 2]} for n in range(6)]
    Rows.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    ids = ids_of(mixture_of({"stream": str(tmp_path / "a.parquet"), "reader": "safety", **options}, count=18))
    expected = ["g0-0", "g1-0", "g1-1", "g2-0", "g3-0", "g3-1", "g4-0", "g5-0", "g5-1"]
    assert sorted(ids[:9]) == sorted(ids[9:]) == expected


def test_a_stream_looks_through_no_shard_that_it_does_not_need(pairs, monkeypatch, tmp_path):
    monkeypatch.setenv("BLIP3_CACHE", str(tmp_path))
    mixture = mixture_of({"preferences": str(pairs[0] / "*.parquet"), "images": "x"}, count=200)
    looked_through = lambda: len(list((tmp_path / "records").glob("*/rows.npy")))  # noqa: E731
    mixture.count_streams()
    assert looked_through() == 1
    mixture[99]
    assert looked_through() == 2


class Ids(Dataset):
    """Ids of a mixture's records, for a DataLoader."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> str:
        return self.mixture[index].id


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [1, 2, 4])  # more workers than shards as well
def test_worker_processes_change_nothing(shards, jsonl, num_workers):
    entries = [*streams(shards), {"records": str(jsonl)}, {"rendered": "count"}]
    loader = DataLoader(Ids(mixture_of(*entries)), batch_size=3, num_workers=num_workers, collate_fn=list)
    assert [each for batch in loader for each in batch] == ids_of(mixture_of(*entries))


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"weight": 1}, r"mixture\[0\] is .* must name exactly one of rendered, records, llava, stream"),
        ({"rendered": "count", "records": "a"}, "exactly one of"),
        ({"rendered": "count", "wieght": 2}, "unknown key 'wieght'.*Did you mean 'weight'"),
        ({"rendered": "count", "images": "x"}, "unknown key 'images'"),
        ({"rendered": "count", "weight": 0}, "weight 0 but it must be a positive number"),
        ({"rendered": "count", "weight": "2"}, "weight '2' but it must be a positive number"),
        ({"rendered": "count", "weight": True}, "weight True"),
        ({"rendered": "count", "weight": float("nan")}, "weight nan"),
        ({"rendered": "cuont"}, "names the task 'cuont' but it must be one of read, name.*Did you mean 'count'"),
        (
            {"rendered": "count", "world": {"side": [1, 2]}},
            r"mixture\[0\].world has the unknown field 'side'.*sides",
        ),
        ({"stream": "x", "reader": "orc"}, "reader 'orc' but it must be one of captions"),
        ({"stream": "x"}, "reader None"),
        ({"stream": "x", "reader": "captions", "options": {"colum": "a"}}, "unknown key 'colum'.*'column'"),
        ({"stream": "x", "reader": "captions", "lanes": 0}, "has lanes 0 but it must be a positive integer"),
        ({"stream": "x", "reader": "captions", "shuffle": "many"}, "has shuffle 'many' but it must be a positive"),
    ],
)
def test_wrong_entries_are_refused_at_the_start(entry, message):
    with pytest.raises(ValueError, match=message):
        mixture_of(entry)


def test_empty_sources_are_refused(jsonl, shards, tmp_path):
    with pytest.raises(ValueError, match="holds no record"):
        mixture_of({"records": str(jsonl.with_name("empty.jsonl"))})
    unwanted = {"stream": str(shards / "*.parquet"), "reader": "ocr", "options": {"granularities": [5]}}
    with pytest.raises(ValueError, match="holds no record"):
        mixture_of(unwanted)[0]
    with pytest.raises(FileNotFoundError, match="No file matches"):
        mixture_of({"stream": str(tmp_path / "*.parquet"), "reader": "ocr"})[0]


def test_a_list_without_a_record_says_why(tmp_path):
    turns = [{"from": "human", "value": "What? <image> <image>"}, {"from": "gpt", "value": "It."}]
    entries = [{"id": str(n), "image": ["a.png", "b.png", "c.png"], "conversations": turns} for n in range(4)]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"all 4 that it has were skipped.*first reason: .*3 images and .* 2 <im"):
        mixture_of({"llava": str(path)}, skip_faulty=True)
    good = {"id": "g", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It."}]}
    path.write_text(json.dumps([*entries, good]))
    assert mixture_of({"llava": str(path)}, skip_faulty=True)[0].id == "g"
    path.write_text(json.dumps(entries * 10 + [good] * 39))
    with pytest.raises(ValueError, match=r"Of 79 samples of .*llava.json 40 cannot be used.* One reason: .*3 images"):
        mixture_of({"llava": str(path)}, skip_faulty=True)


def test_a_stream_most_of_whose_rows_are_faulty_is_refused(tmp_path):
    from datasets import Dataset as Rows

    rows = [rated_pair(n, 5) | {"img_path": "a.jpg" if n % 2 else None} for n in range(100)]
    for name, count in (("few", 49), ("half", 100)):
        Rows.from_list(rows[:count]).to_parquet(str(tmp_path / f"{name}.parquet"))
        entry = {"preferences": str(tmp_path / f"{name}.parquet"), "images": "x"}
        assert mixture_of(entry, skip_faulty=True).count_streams() == count
    Rows.from_list([row | {"img_path": None} for row in rows[:2]] + rows).to_parquet(str(tmp_path / "most.parquet"))
    mixture = mixture_of({"preferences": str(tmp_path / "most.parquet"), "images": "x"}, skip_faulty=True)
    with pytest.raises(ValueError, match=r"Of 50 samples of .*most.parquet 26 cannot be used.*row 1, field img_path"):
        mixture.count_streams()
    with pytest.raises(RecordError, match="row 1, field img_path"):
        mixture_of({"preferences": str(tmp_path / "most.parquet"), "images": "x"})[0]


# -- memory -----------------------------------------------------------------------------------------------------------


def bytes_taken(entry) -> int:
    """What a mixture with a list keeps, beyond what is imported or cached at the first time."""
    mixture_of(entry)
    gc.collect()
    tracemalloc.start()
    mixture = mixture_of(entry)
    gc.collect()
    assert len(mixture)
    return tracemalloc.get_traced_memory()[0]


def test_a_list_takes_little_more_than_its_text(tmp_path):
    """As objects of Python a record of such a conversation takes 3 kB, in each process that reads it."""
    text = "word " * 40
    turns = [{"from": who, "value": f"{who} {text}"} for who in ("human", "gpt", "human", "gpt")]
    entries = [{"id": str(n), "image": f"train/{n:012}.jpg", "conversations": turns} for n in range(3000)]
    (tmp_path / "many.json").write_text(json.dumps(entries))
    entry = {"llava": str(tmp_path / "many.json"), "images": "images"}
    # In a process of its own: what other tests have imported keeps objects of its own while a file is read.
    with multiprocessing.get_context("spawn").Pool(1) as alone:
        taken = alone.apply(bytes_taken, (entry,)) / len(entries)
    mixture = mixture_of(entry)
    size = (tmp_path / "many.json").stat().st_size / len(entries)
    assert size < taken < 1.3 * size
    assert mixture[0].turns[0].text.startswith("<image>\nhuman word")
    assert pickle.loads(pickle.dumps(mixture.sources[0]))(0, 5) == mixture.sources[0](0, 5)
