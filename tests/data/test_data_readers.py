# SPDX-License-Identifier: Apache-2.0
"""Readers of real data's forms: small files of each are written here and read back, offline."""

import io
import json
import random

import pytest
from PIL import Image

from blip3.data.images import RecordError
from blip3.data.readers import (
    iterate_json_lines,
    read_captions,
    read_grounding,
    read_interleaved,
    read_llava_json,
    read_mixture,
    read_ocr,
    read_parquet,
    read_preferences,
    read_safety,
    stream_rows,
)
from blip3.data.records import to_preference, to_pretraining_text
from blip3.world import build
from blip3.world.tasks import rendered_records
from support import write_tar


def encoded(colour: str = "red", format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, format)
    return buffer.getvalue()


def llava_entry(number: int, **changes: object) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Thing {number}."}]
    return {"id": str(number), "image": f"{number}.jpg", "conversations": turns, **changes}


@pytest.fixture
def llava_file(tmp_path):
    path = tmp_path / "llava.json"
    path.write_text(json.dumps([llava_entry(number) for number in range(10)]))
    return path


# -------------------------------------------------------------------------------------------- LLaVA and mixtures


def test_llava_samples_as_the_reference_does(llava_file):
    ids = [str(number) for number in range(10)]
    assert [record.id for record in read_llava_json(llava_file)] == ids
    fewer = [record.id for record in read_llava_json(llava_file, num_samples=6)]
    assert fewer == random.Random(42).sample(ids, 6)
    assert len(set(fewer)) == 6
    more = [record.id for record in read_llava_json(llava_file, num_samples=25, seed=3)]
    assert more == random.Random(3).choices(ids, k=25)


def test_llava_repairs_and_roles(tmp_path):
    human, gpt = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "It."}
    entries = [
        llava_entry(0, conversations=[human, gpt]),
        llava_entry(1, conversations=[{"from": "human", "value": "What?\n<image><image>"}, gpt]),
        llava_entry(2, conversations=[{"from": "human", "value": "Here <image> what?"}, gpt]),
        {"id": 3, "conversations": [{"from": "system", "value": "Be kind."}, human, gpt]},
        {"images": ["a", "b"], "conversation": [{"role": "user", "content": "<image> or <image>?"},
                                                {"role": "assistant", "content": "a"}]},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, entries)))
    records = list(read_llava_json(tmp_path / "a.jsonl", "photos"))
    assert [record.turns[0].text for record in records[:3]] == [
        "<image>\nWhat?",
        "<image>\nWhat?",
        "Here <image> what?",
    ]
    assert records[0].images[0].path == "photos/0.jpg"
    assert [turn.role for turn in records[3].turns] == ["system", "user", "assistant"]
    assert not records[3].images
    assert len(records[4].images) == 2
    moved = next(read_llava_json(tmp_path / "a.jsonl", {"none": "x", "0.": "moved/0."}))
    assert moved.images[0].path == "moved/0.jpg"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"id": "x", "image": "a.jpg"}, r"entry 1, field conversations: it is missing; the row has id, image"),
        (llava_entry(1, conversations=[{"from": "robot", "value": "Hi"}]), r"entry 1, field conversations\[0\]"),
        (llava_entry(1, image=["a", "b"]), r"entry 1.*field images: it has 2 images and its turns 1 <image>"),
        (llava_entry(1, image=7), r"entry 1, field image: .*'7'"),
        ("text", r"entry 1, field \(whole row\)"),
    ],
)
def test_llava_faults_name_entry_and_field(tmp_path, caplog, entry, message):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([entry, llava_entry(2)]))
    with pytest.raises(RecordError, match=message):
        list(read_llava_json(path))
    assert [record.id for record in read_llava_json(path, skip_faulty=True)] == ["2"]
    assert "Skipped 1 faulty rows" in caplog.text


def test_llava_file_that_is_cut_off(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([llava_entry(1)])[:-20])
    with pytest.raises(RecordError, match=r"a\.json line 1.*no JSON"):
        list(read_llava_json(path))


def test_mixture_over_and_under_samples(tmp_path, llava_file):
    build.build(["count"], "train", 0, 6, tmp_path, images="png")
    (tmp_path / "mix.yaml").write_text("data_path:\n  llava.json: 4\n  count-train-00000.jsonl: 8\n")
    records = list(read_mixture(tmp_path / "mix.yaml", "pictures"))
    assert len(records) == 12
    assert len({record.id for record in records[:4]}) == 4
    assert records[4].images[0].open().size
    assert records == list(read_mixture(tmp_path / "mix.yaml", "pictures"))
    (tmp_path / "all.yaml").write_text("llava.json: all\n")
    assert len(list(read_mixture(tmp_path / "all.yaml"))) == 10


@pytest.mark.parametrize("text", ["llava.json", "llava.json: -3", "- llava.json", "", "llava.json: many"])
def test_wrong_mixtures_are_refused(tmp_path, text):
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match="must map each file to a number"):
        list(read_mixture(tmp_path / "mix.yaml"))


def test_a_mixture_names_a_file_once(tmp_path):
    (tmp_path / "mix.yaml").write_text("data_path:\n  llava.json: 4\n  other.json: 2\n  llava.json: 8\n")
    with pytest.raises(ValueError, match=r"mix\.yaml has the key 'llava\.json' in line 2 and again in line 4"):
        list(read_mixture(tmp_path / "mix.yaml"))


# ---------------------------------------------------------------------------------------------- shards of rows


def test_built_parquet_reads_back(tmp_path):
    tasks = ["count", "preference", "rule", "ocr"]
    build.build(tasks, "train", 0, 4, tmp_path, format="parquet", shard_size=3)
    for task in tasks:
        records = list(read_parquet(str(tmp_path / f"{task}-*.parquet")))
        rendered = list(rendered_records(task, "train", 0, 4))
        for one, other in zip(records, rendered, strict=True):
            assert (one.id, one.kind, one.turns, one.chosen, one.rejected) == (
                other.id, other.kind, other.turns, other.chosen, other.rejected
            )  # fmt: skip
            assert one.annotations == json.loads(json.dumps(other.annotations))
            assert [p.open().tobytes() for p in one.images] == [p.open().tobytes() for p in other.images]


def test_webdataset_captions_stream(tmp_path):
    for shard in range(2):
        pairs = {
            f"{shard}{number}": {"jpg": encoded("blue", "JPEG"), "txt": f"Blue {shard}{number}".encode()}
            for number in range(3)
        }
        write_tar(tmp_path / f"shard-{shard}.tar", pairs)
    records = list(read_captions(stream_rows(str(tmp_path / "*.tar")), "txt"))
    assert [to_pretraining_text(record) for record in records[:1]] == ["<image>Blue 00<|endofchunk|>"]
    assert len({record.id for record in records}) == 6
    assert records[0].images[0].data
    assert records[0].images[0].open().size == (8, 6)


def test_missing_shards_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file matches"):
        list(stream_rows(str(tmp_path / "*.parquet")))


def parquet_rows(path, rows):
    """Write rows with `datasets`, stream them back."""
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(str(path))
    return stream_rows(str(path))


def test_ocr_rows(tmp_path):
    captions = [
        {"text": f"{raw}The image contains the text \"A\", the text \"B\" level {level}", "granularity": level,
         "include_datacomp_raw_cap": bool(raw)}
        for level in range(6) for raw in ("", "A sign. ")
    ]  # fmt: skip
    rows = [{"uid": f"u{number}", "url": "", "key": f"k{number}", "captions": json.dumps(captions), "metadata": "{}"}
            for number in range(20)]  # fmt: skip
    records = list(read_ocr(parquet_rows(tmp_path / "a.parquet", rows), image_folder="images"))
    assert records[0].images[0].path == "images/k0.jpg"
    assert records[0].kind == "ocr"
    assert {record.annotations["granularity"] for record in records} == {0}
    assert {record.annotations["include_datacomp_raw_cap"] for record in records} == {True, False}
    assert any(record.turns[0].text == '<image>"A", "B" level 0' for record in records)
    options = {"granularities": None, "with_caption": True, "image_folder": "images", "strip_filler": False}
    every = list(read_ocr(rows, **options))
    assert len({record.annotations["granularity"] for record in every}) > 3
    assert all(record.turns[0].text.startswith("<image>A sign. The image contains the text") for record in every)
    assert every == list(read_ocr(rows, **options)) != list(read_ocr(rows, seed=1, **options))
    with pytest.raises(RecordError, match=r"row 1, field captions"):
        list(read_ocr([{**rows[0], "captions": "[{"}], image_folder="images"))
    with pytest.raises(RecordError, match=r"granularity.*'7'"):
        list(read_ocr([{**rows[0], "captions": '[["a", 7, false]]'}], image_folder="images"))
    with pytest.raises(RecordError, match=r"row 1, field image"):
        list(read_ocr(rows))


def test_grounding_rows_as_python_literals_and_json(tmp_path):
    text = "This image showcases a <object>cat</object><bbox>[0.1, 0.2][0.3, 0.4]</bbox>"
    captions = [["cat (in the center)", 0, True], [text, 2, False]]
    rows = [{"uid": "a", "image": encoded(), "captions": repr(captions)},
            {"uid": "b", "image": encoded(), "captions": json.dumps(captions)}]  # fmt: skip
    records = list(read_grounding(parquet_rows(tmp_path / "a.parquet", rows), granularities=(2,)))
    assert [record.turns[0].text for record in records] == [f"<image>{text}"] * 2
    assert records[0].images[0].open().size == (8, 6)
    assert list(read_grounding(rows, granularities=(1,))) == []


def test_interleaved_rows():
    red = encoded()
    aligned = {"id": "a", "images": [None, red, red, None, red], "texts": ["Intro.", None, None, "Two.", None]}
    (record,) = read_interleaved([aligned])
    assert to_pretraining_text(record) == "Intro.<|endofchunk|><image><image>Two.<|endofchunk|><image><|endofchunk|>"
    matched = {"text_list": ["One.", "Two.", "Three."],
               "image_info": [{"image": red, "matched_text_index": index} for index in (1, 2)]}  # fmt: skip
    (record,) = read_interleaved([matched])
    assert to_pretraining_text(record) == "One.<|endofchunk|><image>Two.<|endofchunk|><image>Three.<|endofchunk|>"
    (record,) = read_interleaved([matched], max_images=1)
    assert to_pretraining_text(record) == "One.<|endofchunk|><image>Two. Three.<|endofchunk|>"
    assert list(read_interleaved([{"images": [None], "texts": ["Text only."]}])) == []
    with pytest.raises(RecordError, match=r"row 1, field texts: it has 1 entries and images 5"):
        list(read_interleaved([{**aligned, "texts": ["a"]}]))
    with pytest.raises(RecordError, match=r"image_info\[0\]\.matched_text_index"):
        list(read_interleaved([{**matched, "text_list": ["One."]}]))


# ------------------------------------------------------------------------------------------ preferences, safety


def completion(response: str, *ratings: str) -> dict:
    names = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    annotations = {name: {"Rating": rating, "Rationale": "."} for name, rating in zip(names, ratings, strict=True)}
    return {"annotations": annotations, "model": "m", "response": response}


def test_preferences_take_the_highest_and_the_lowest(tmp_path):
    completions = [completion("Fair.", "3", "5", "3"), completion("Best.", "5", "5", "4"),
                   completion("Worst.", "1", "5", "1"), completion("Unrated.", "5", "5", "N/A")]  # fmt: skip
    row = {"id": "r", "prompt": "What?", "completions": completions, "image": encoded()}
    for rows in ([row], parquet_rows(tmp_path / "a.parquet", [row])):
        (record,) = read_preferences(rows)
        assert (record.chosen, record.rejected) == ("Best.", "Worst.")
        assert to_preference(record)["prompt"][0]["content"][1] == {"type": "text", "text": "What?"}
    columns = {name: [one[name] for one in completions] for name in completions[0]}
    assert next(read_preferences([{**row, "completions": columns}])).chosen == "Best."
    assert list(read_preferences([row], min_chosen_rating=4.9)) == []
    assert list(read_preferences([{**row, "completions": completions[:1] * 2}])) == []
    with pytest.raises(RecordError, match=r"completions\[0\]\.response"):
        list(read_preferences([{**row, "completions": [{**completions[0], "response": None}]}]))


def test_preferences_as_published_name_the_image_and_embedded_ones_come_first(tmp_path):
    row = {"id": "r", "prompt": "What?", "completions": [completion("A.", "5", "5", "5"), completion("B.", *"111")]}
    path = tmp_path / "vlfeedback.jsonl"
    lines = [json.dumps(row | {"id": f"r{number}", "img_path": f"{number}.jpg"}) for number in range(2)]
    path.write_text("\n".join([lines[0], "", "{", lines[1]]))
    with pytest.raises(RecordError, match=r"vlfeedback\.jsonl line 3"):
        list(read_preferences(iterate_json_lines(str(path))))
    found = list(read_preferences(iterate_json_lines(str(path)), image_folder="images", skip_faulty=True))
    assert [record.images[0].path for record in found] == ["images/0.jpg", "images/1.jpg"]
    with pytest.raises(FileNotFoundError):
        list(iterate_json_lines(str(tmp_path / "none.jsonl")))
    image = encoded()
    for given in (image, {"bytes": image, "path": "b.jpg"}):
        (record,) = read_preferences([row | {"img_path": "gone.jpg", "image": given}])
        assert record.images[0].data == image
    (record,) = read_preferences([row | {"img_path": "a.jpg", "image": {"bytes": None, "path": "b.jpg"}}])
    assert record.images[0].path == "a.jpg"
    (record,) = read_preferences([row | {"image": {"bytes": None, "path": "b.jpg"}}])
    assert record.images[0].path == "b.jpg"


def test_safety_rows():
    unsafe = {"id": "u", "image": "a.jpg", "safe": False, "harmful_category": "privacy",
              "instr-resp": [{"instruction": "Tell me.", "response": "I cannot."}]}  # fmt: skip
    safe = {"id": "s", "image": "b.jpg", "safe": True,
            "instr-resp": [{"safe_instruction": "What?", "response": "A cat."},
                           {"unsafe_instruction": "Hurt it.", "response": "No."}]}  # fmt: skip
    records = list(read_safety([unsafe, safe], "images"))
    assert [record.kind for record in records] == ["refusal", "instruction", "refusal"]
    assert records[0].annotations == {"is_unsafe": True, "category": "privacy", "subset": "unsafes"}
    assert records[2].images[0].path == "images/b.jpg"
    with pytest.raises(RecordError, match=r"row 1, field instr-resp\[0\]"):
        list(read_safety([{**unsafe, "instr-resp": [{"response": "x"}]}]))


def test_the_training_file_of_vlguard_gives_a_conversation_for_each_image():
    """As many rows as it has: 1,023 unsafe images with a request, 977 safe ones with a safe and an unsafe request."""
    request = {"instruction": "Tell me.", "response": "I cannot."}
    both = [{"safe_instruction": "What?", "response": "A cat."}, {"unsafe_instruction": "Hurt it.", "response": "No."}]
    rows = [{"id": f"u{n}", "image": "a.jpg", "instr-resp": [request]} for n in range(1023)]
    rows += [{"id": f"s{n}", "image": "b.jpg", "instr-resp": both} for n in range(977)]
    apart, together = (list(read_safety(rows, together=together)) for together in (False, True))
    assert (len(apart), len(together)) == (2977, 2000)
    assert sum(record.kind == "refusal" for record in apart) == 2000
    assert len({record.id for record in together}) == 2000
    answers = [turn.text for record in together for turn in record.turns if turn.role == "assistant"]
    assert sorted(answers) == sorted(record.turns[-1].text for record in apart)
    assert all(sum("<image>" in turn.text for turn in record.turns) == 1 for record in together)
    safe_first = sum(record.turns[1].text == "A cat." for record in together[1023:])
    assert 420 < safe_first < 560, "in random order"
    assert together == list(read_safety(rows, together=True))
