# SPDX-License-Identifier: Apache-2.0
"""The record schema: what it takes, what it refuses and how, and its three conversions."""

import dataclasses
import json
import re

import pytest
from PIL import Image

from blip3.data.canvas import Box, Drawing, Line, Shape
from blip3.data.images import ImageSource, RecordError
from blip3.data.records import (
    KINDS,
    Record,
    Turn,
    read_jsonl,
    record_from_json,
    to_few_shot_prompt,
    to_messages,
    to_preference,
    to_pretraining_text,
    write_jsonl,
)
from blip3.world.tasks import TASKS, rendered_record
from support import ROOT

DOCUMENT = {
    "id": "a",
    "kind": "caption",
    "images": ["a.png"],
    "turns": [{"role": "document", "text": "<image>A cat."}],
}
QUESTION = {"role": "user", "text": "<image>\nWhat is it?"}
CHAT = {
    "id": "b",
    "kind": "instruction",
    "images": ["a.png"],
    "turns": [QUESTION, {"role": "assistant", "text": "A cat."}],
}
PAIR = {
    "id": "c",
    "kind": "preference",
    "images": ["a.png"],
    "turns": [QUESTION],
    "chosen": "A cat.",
    "rejected": "A dog.",
}


def with_turns(values: dict, *texts: tuple[str, str]) -> dict:
    return {**values, "turns": [{"role": role, "text": text} for role, text in texts]}


@pytest.mark.parametrize("values", [DOCUMENT, CHAT, PAIR], ids=lambda values: values["kind"])
def test_json_form_is_read_and_written_unchanged(values, tmp_path):
    assert record_from_json(values).to_json() == values
    write_jsonl([record_from_json(values)], tmp_path / "a.jsonl")
    (record,) = read_jsonl(tmp_path / "a.jsonl")
    assert record.images[0].path == str(tmp_path / "a.png")  # relative paths start at the file's folder


@pytest.mark.parametrize("task", TASKS)
def test_rendered_records_survive_json(task, tmp_path):
    record = rendered_record(task, "train", 3, 1)
    write_jsonl([record], tmp_path / "a.jsonl")
    (again,) = read_jsonl(tmp_path / "a.jsonl")
    assert again.to_json() == record.to_json()
    for one, other in zip(record.images, again.images, strict=True):
        assert one.open().tobytes() == other.open().tobytes()


FAULTS = [
    ({**DOCUMENT, "kind": "captoin"}, "kind"),
    ({**DOCUMENT, "image": "a.png"}, "image"),
    ({key: value for key, value in DOCUMENT.items() if key != "turns"}, "turns"),
    ({**DOCUMENT, "images": "a.png"}, "images"),
    ({**DOCUMENT, "images": [7]}, r"images\[0\]"),
    ({**DOCUMENT, "images": []}, "images"),
    ({**DOCUMENT, "images": ["a.png", "b.png"]}, "images"),
    ({**DOCUMENT, "turns": []}, "turns"),
    ({**DOCUMENT, "turns": ["A cat."]}, r"turns\[0\]"),
    (with_turns(DOCUMENT, ("narrator", "<image>")), r"turns\[0\]\.role"),
    (with_turns(DOCUMENT, ("user", "<image>")), "turns"),
    (with_turns(DOCUMENT, ("document", "<image>A cat.<|endofchunk|>")), r"turns\[0\]\.text"),
    (with_turns(CHAT, ("user", "<image>What?")), "turns"),
    (with_turns(CHAT, ("assistant", "A cat."), ("user", "<image>What?")), "turns"),
    (with_turns(CHAT, ("user", "What?"), ("assistant", "<image>")), r"turns\[1\]\.text"),
    (with_turns(CHAT, ("user", "<image>What?"), ("assistant", " ")), r"turns\[1\]\.text"),
    (with_turns(CHAT, ("user", "<image>What?"), ("assistant", "It is<|end|>")), r"turns\[1\]\.text"),
    ({**CHAT, "chosen": "A cat."}, "chosen"),
    ({key: value for key, value in PAIR.items() if key != "rejected"}, "rejected"),
    ({**PAIR, "rejected": "A cat."}, "rejected"),
    ({**DOCUMENT, "truth": []}, "truth"),
    ({**DOCUMENT, "images": [{"drawing": {"size": [0, 9], "background": ["plain", "#fff"], "marks": []}}]}, "drawing"),
    ({**DOCUMENT, "images": [{"drawing": {"size": [9, 9], "background": ["sky"], "marks": []}}]}, "drawing"),
    (
        {**DOCUMENT, "images": [{"drawing": {"size": [9, 9], "background": ["plain", "#fff"], "marks": [["x"]]}}]},
        "drawing",
    ),
    (["a"], "whole record"),
]


@pytest.mark.parametrize(("values", "field"), FAULTS, ids=range(len(FAULTS)))
def test_faults_name_file_line_and_field(values, field, tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(CHAT) + "\n\n" + json.dumps(values) + "\n")
    records = read_jsonl(path)
    assert next(records).id == "b"
    with pytest.raises(RecordError, match=rf"records\.jsonl line 3.*field .*{field}") as caught:
        next(records)
    given, expected = re.search(r"field \S+(?: \w+\))?: (.+?), but (.+)", str(caught.value)).groups()
    assert given
    assert expected.count(". ") >= 2  # expected, likely cause, next action


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(CHAT) + "\n" + json.dumps(CHAT)[:-9])
    with pytest.raises(RecordError, match=r"line 2, field \(whole line\): it is no JSON"):
        list(read_jsonl(path))


def test_records_are_frozen_and_every_field_is_documented():
    record = record_from_json(CHAT)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.kind = "caption"
    source = (ROOT / "blip3" / "data" / "records.py").read_text(encoding="utf-8")
    for field in dataclasses.fields(Record):
        assert re.search(rf'^    {field.name}: .*\n    """', source, flags=re.MULTILINE), field.name


def test_pretraining_text():
    assert to_pretraining_text(record_from_json(DOCUMENT)) == "<image>A cat.<|endofchunk|>"
    document = with_turns({**DOCUMENT, "kind": "interleaved", "images": ["a", "b"]}, *[
        ("document", "Two pets."), ("document", "<image> A cat. It sleeps. "), ("document", "<image>A dog.")
    ])  # fmt: skip
    assert to_pretraining_text(record_from_json(document)) == (
        "Two pets.<|endofchunk|><image>A cat. It sleeps.<|endofchunk|><image>A dog.<|endofchunk|>"
    )
    with pytest.raises(ValueError, match="to_messages"):
        to_pretraining_text(record_from_json(CHAT))


def test_few_shot_prompts():
    record = rendered_record("rule", "train", 0, 0)
    prompt, answer = to_few_shot_prompt(record, 4)
    shot = r"<image>Question:Which word\? Short answer:"
    assert re.fullmatch(rf"({shot}\w+<\|endofchunk\|>){{4}}{shot}", prompt)
    assert prompt.count("<image>") == 5
    assert answer == record.annotations["answer"]
    assert to_few_shot_prompt(record, 0)[0] == "<image>Question:Which word? Short answer:"
    assert to_pretraining_text(record) == f"{to_few_shot_prompt(record)[0]}{answer}<|endofchunk|>"
    with pytest.raises(ValueError, match="9 shots"):
        to_few_shot_prompt(record, 9)


def test_messages_render_to_the_prompt_of_the_recipe(processor):
    record = record_from_json({**CHAT, "images": ["a", "b", "c"]} | with_turns(
        CHAT, ("system", "Be brief."), ("user", "<image>\nCompare with <image> and <image>."), ("assistant", "Alike.")
    ) | {"images": ["a", "b", "c"]})  # fmt: skip
    text = processor.apply_chat_template(to_messages(record), tokenize=False)
    assert text == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\n<image>\nCompare with <image> and <image>.<|end|>\n"
        "<|assistant|>\nAlike.<|end|>\n"
    )
    with pytest.raises(ValueError, match="to_pretraining_text"):
        to_messages(record_from_json(DOCUMENT))


def test_a_rendered_record_goes_through_the_processor(processor):
    record = rendered_record("compare", "train", 0, 0)
    text = processor.apply_chat_template(to_messages(record), tokenize=False)
    images = [image.open() for image in record.images]
    batch = processor(text=[text], images=[images], return_tensors="pt", return_labels=True)
    assert len(batch["image_sizes"]) == 2
    assert (batch["labels"] != -100).any()


def test_preference_form():
    pair = to_preference(record_from_json(PAIR))
    assert pair["prompt"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert pair["chosen"] == [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]
    assert pair["rejected"][0]["content"][0]["text"] == "A dog."
    with pytest.raises(ValueError, match="DPO"):
        to_preference(record_from_json(CHAT))


def test_images_open_from_each_source_and_fail_clearly(tmp_path):
    Image.new("L", (3, 2), 9).save(tmp_path / "a.png")
    assert ImageSource("a.png").open(tmp_path).size == (3, 2)
    assert ImageSource(data=(tmp_path / "a.png").read_bytes()).open().mode == "RGB"
    marks = (Box((1, 1, 3, 3), "#000000"), Line((0, 0, 5, 5), "#00ff00"), Shape("square", "#ff0000", (10, 0), 10))
    drawing = Drawing((20, 30), ("down", "#ffffff", "#eeeeee"), marks)
    image = ImageSource(drawing=drawing).open()
    assert image.size == (30, 20)
    assert image.getpixel((15, 5)) == (255, 0, 0)
    assert image.getpixel((2, 3)) == (0, 0, 0)
    with pytest.raises(RecordError, match=r"b\.png.*no such file.*probably"):
        ImageSource("b.png").open(tmp_path)
    with pytest.raises(ValueError, match="cannot be decoded"):
        ImageSource(data=b"no image").open()
    with pytest.raises(RecordError, match="0 sources"):
        ImageSource()
    with pytest.raises(ValueError, match="no JSON form"):
        ImageSource(data=b"x").to_json()


def test_constructing_a_wrong_record_fails_too():
    with pytest.raises(RecordError, match="Record 'x', field images"):
        Record("x", "caption", (), (Turn("document", "<image>"),))
    assert len(KINDS) == 8
