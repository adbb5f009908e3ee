# SPDX-License-Identifier: Apache-2.0
"""The adapter to lmms-eval and its few-shot tasks, on stand-ins for the harness's own classes.

The suite of harnesses runs the real ones, in an environment of its own.
"""

import dataclasses
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from PIL import Image
from transformers import AutoProcessor

from blip3.evaluation.harness import few_shot, neighbours
from blip3.evaluation.harness.few_shot import Place
from blip3.evaluation.harness.models import ChatModel
from support import ROOT, render_image
from support.tiny_peers import save_peer

HARNESS = "blip3.evaluation.harness"
ONE, TWO = render_image(60, 90, seed=1), render_image(90, 60, seed=2)


@dataclasses.dataclass
class Instance:
    """A request: `args` as lmms-eval gives them to a chat model."""

    args: tuple[Any, ...]


@dataclasses.dataclass
class TokenCounts:
    output_tokens: int


@dataclasses.dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts


class StandInModel:
    """What the harness's base class of models gives."""

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.kept: list[tuple[Any, ...]] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *each: self.kept.append(each))

    @property
    def rank(self) -> int:
        return self._rank


class StandInTask:
    """What the harness's base class of tasks takes."""

    def __init__(self, config: dict[str, Any]):
        self.config = config


@pytest.fixture
def harness(monkeypatch):
    """Import a module of the package that needs lmms-eval, on the stand-ins."""
    stand_ins = {
        "instance": {"Instance": Instance, "GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
        "model": {"lmms": StandInModel},
        "task": {"ConfigurableMessagesTask": StandInTask},
    }
    for name in ("lmms_eval", "lmms_eval.api"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, classes in stand_ins.items():
        module = ModuleType(f"lmms_eval.api.{name}")
        vars(module).update(classes)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    loaded: list[str] = []

    def load(name: str) -> ModuleType:
        loaded.append(f"{HARNESS}.{name}")
        sys.modules.pop(loaded[-1], None)
        return importlib.import_module(loaded[-1])

    yield load
    for name in loaded:
        sys.modules.pop(name, None)


def messages_of(doc: dict[str, Any]) -> list[dict[str, Any]]:
    seen = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*seen, {"type": "text", "text": doc["text"]}]}]


ROWS = [
    {"text": "How many things are there?", "images": [ONE]},
    {"text": "What?", "images": []},
    {"text": "Which of both has more things?", "images": [ONE, TWO]},
    {"text": "What is to the left of the circle in this image?", "images": [TWO]},
    {"text": "Name one.", "images": [TWO]},
]
SHORT, LONG = {"max_new_tokens": 4, "until": ["zz"]}, {"max_new_tokens": 6}
SETTINGS = [SHORT, SHORT, SHORT, SHORT, LONG]


def load_adapter(harness, **arguments: Any) -> Any:
    """The adapter around the small model, with the rows as its task."""
    model = harness("lmms_model").InterleavedModel(str(ROOT), device="cpu", dtype="float32", **arguments)
    model.task_dict = {"task": {"test": ROWS}}
    return model


def requests() -> list[Instance]:
    return [Instance(("", messages_of, settings, row, "task", "test")) for row, settings in enumerate(SETTINGS)]


def test_answers_come_in_the_order_of_the_requests_and_do_not_depend_on_the_batch(harness):
    together, alone = (load_adapter(harness, batch_size=size) for size in (8, 1))
    sizes: list[int] = []
    answer = together.chat_model.answer

    def watched(prompts, **options):
        sizes.append(len(prompts))
        return answer(prompts, **options)

    together.chat_model.answer = watched
    found = together.generate_until(requests())
    assert found == alone.generate_until(requests())
    assert sorted(sizes) == [1, 1, 3]  # with images and the same settings; without images; of other settings
    assert all(result.token_counts.output_tokens <= 6 for result in found)
    assert [text for *_, text in sorted(together.kept, key=str)] == [text for *_, text in sorted(alone.kept, key=str)]
    assert len(together.kept) == len(ROWS)


def test_batches_are_no_larger_than_asked_for_and_begin_with_the_longest(harness):
    model = load_adapter(harness, batch_size="2")
    asked: list[list[str]] = []
    answer = model.chat_model.answer

    def watched(prompts, **options):
        asked.append([prompt.text for prompt in prompts])
        return answer(prompts, **options)

    model.chat_model.answer = watched
    model.generate_until(requests())
    assert [len(texts) for texts in asked] == [2, 1, 1, 1]
    assert ROWS[2]["text"] in asked[0][0]
    assert ROWS[3]["text"] in asked[0][1]
    assert ROWS[0]["text"] in asked[1][0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"max_new_tokens": 9, "num_beams": 1, "do_sample": False, "seed": None}),
        ({"temperature": 0, "top_p": 1.0, "do_sample": True}, {"do_sample": False, "seed": None}),
        ({"do_sample": False, "temperature": 0.7}, {"do_sample": False, "seed": None}),
        ({"temperature": 0.7, "top_k": 5}, {"do_sample": True, "temperature": 0.7, "top_k": 5, "seed": 3}),
        ({"num_beams": 3, "length_penalty": 0.0}, {"num_beams": 3, "length_penalty": 0.0, "do_sample": False}),
        ({"max_new_tokens": 5, "until": ["a"], "image_aspect_ratio": "pad"}, {"max_new_tokens": 5}),
        (
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 5, "early_stopping": True},
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 5, "early_stopping": True},
        ),
        ({"do_sample": True, "top_p": 0.9}, {"do_sample": True, "top_p": 0.9, "seed": 3}),
        ({"do_sample": "false", "temperature": 0.7, "min_p": 0.1}, {}),
        ({"num_return_sequences": 2, "eos_token_id": 5, "max_length": 4, "return_dict_in_generate": True}, {}),
    ],
)
def test_a_tasks_settings_become_those_of_generate(settings, expected, harness):
    model = load_adapter(harness, max_new_tokens=9, seed=3)
    seen: dict[str, Any] = {}

    def answer(prompts, **options):
        seen.update(options)
        return [SimpleNamespace(text="", num_tokens=0)] * len(prompts)

    model.chat_model.answer = answer
    model.generate_until([Instance(("", messages_of, settings, 0, "task", "test"))])
    whole = {"max_new_tokens": 9, "num_beams": 1, "do_sample": False, "seed": None} | expected
    assert seen == whole


def test_settings_without_effect_are_named_once(harness, caplog):
    model = load_adapter(harness)
    model.chat_model.answer = lambda prompts, **_: [SimpleNamespace(text="", num_tokens=0)] * len(prompts)
    quiet = {
        "temperature": 0,
        "top_p": 1.0,
        "top_k": None,
        "do_sample": False,
        "until": ["a"],
        "repetition_penalty": 2,
    }
    for settings in (
        quiet,
        {"image_aspect_ratio": "pad"},
        {"image_aspect_ratio": "a"},
        {"top_p": 0.9},
        {"top_p": 0.8},
    ):
        model.generate_until([Instance(("", messages_of, settings, 0, "task", "test"))])
    assert [record.getMessage() for record in caplog.records if record.name.endswith("lmms_model")] == [
        "A task or --gen_kwargs sets image_aspect_ratio, which is not passed to the model.",
        "A task or --gen_kwargs sets top_p, but nothing is sampled: answers are greedy.",
    ]


def test_a_tasks_settings_reach_the_model(harness):
    model = load_adapter(harness)

    def tokens(**settings: Any) -> int:
        (found,) = model.generate_until([Instance(("", messages_of, settings, 0, "task", "test"))])
        return found.token_counts.output_tokens

    assert tokens(max_new_tokens=12) < 12 == tokens(max_new_tokens=12, min_new_tokens=12, no_repeat_ngram_size=2)


def test_an_answer_ends_before_the_first_of_the_tasks_stops(harness):
    cut_at = harness("lmms_model").cut_at
    assert cut_at(["Answer", "Question"], "a dog Question: Answer:") == "a dog"
    assert cut_at("Answer", "a dog Answer") == "a dog"
    assert cut_at(["", "Answer"], " a dog") == " a dog"
    model = load_adapter(harness)
    model.chat_model.answer = lambda prompts, **_: [SimpleNamespace(text="red\n\nblue", num_tokens=3)]
    (found,) = model.generate_until([Instance(("", messages_of, {"until": ["\n\n"]}, 0, "task", "test"))])
    assert found == GenerationResult("red", TokenCounts(3))


def test_requests_that_are_not_for_answers_are_refused(harness):
    model = load_adapter(harness)
    with pytest.raises(NotImplementedError, match=r"2 requests for likelihoods .*choose its generating variant"):
        model.loglikelihood(requests()[:2])
    with pytest.raises(NotImplementedError, match="1 requests of several rounds"):
        model.generate_until_multi_round(requests()[:1])


@pytest.mark.parametrize(("chat", "is_chat"), [("False", False), (" true", True), (False, False), ("auto", True)])
def test_texts_of_true_and_false_are_read_as_such(chat, is_chat, harness):
    """Any text counts as true in Python, also "False"."""
    arguments = {"chat": chat, "trust_remote_code": "False", "do_image_splitting": str(is_chat), "max_new_tokens": "5"}
    model = load_adapter(harness, **arguments)
    assert model.chat_model.render.is_chat is is_chat
    assert model.chat_model.image_options == {"do_image_splitting": is_chat}
    assert model.max_new_tokens == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [("chat", "no"), ("chat", 0), ("trust_remote_code", "yes"), ("do_image_splitting", "off"), ("batch_size", "0"),
     ("max_new_tokens", "many"), ("seed", -1)],
)  # fmt: skip
def test_other_values_are_refused(name, value, harness):
    with pytest.raises(ValueError, match=rf"{name} is {value!r}, but .* is expected"):
        load_adapter(harness, **{name: value})


def test_a_misspelt_argument_of_the_adapter_is_refused(harness):
    with pytest.raises(ValueError, match=r"subfoder='base' was given, but .*Did you mean 'subfolder'?"):
        load_adapter(harness, subfoder="base")


# -- another model, through its own chat template ---------------------------------------------------------------------

SMOLVLMS = (
    "{% for message in messages %}{{ message.role.capitalize() }}: "
    "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def test_another_model_answers_conversations_through_its_own_chat_template(tmp_path):
    save_peer("smolvlm", tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    processor.chat_template = SMOLVLMS
    processor.save_pretrained(tmp_path)
    model = ChatModel(str(tmp_path), device="cpu", dtype="float32")
    shot = [*messages_of({"text": "what is red ?", "images": [ONE]}), {"role": "assistant", "content": "a dog"}]
    prompts = [model.render([*shot, *messages_of({"text": text, "images": [TWO]})]) for text in ("a cat ?", "is ?")]
    assert prompts[0].text == (
        "User: <image>what is red ?<end_of_utterance>\nAssistant: a dog<end_of_utterance>\n"
        "User: <image>a cat ?<end_of_utterance>\nAssistant:"
    )
    options = {"max_new_tokens": 8, "do_sample": False}
    together = [answer.text for answer in model.answer(prompts, **options)]
    assert together == [model.answer([prompt], **options)[0].text for prompt in prompts]
    assert len(set(together)) == 2


# -- few-shot tasks ---------------------------------------------------------------------------------------------------


def write_captions(folder: Path, split: str, count: int) -> Place:
    """Rows that name their images, as COCO's do."""
    images = folder.with_name(f"images of {split}")  # `datasets` would read those beside the table in its place
    folder.mkdir()
    images.mkdir()
    rows = []
    for number in range(count):
        path = images / f"{number}.png"
        Image.new("RGB", (4, 4), (40 * number, 0, 0)).save(path)
        identity = number if split == "test" else 100 + number
        rows.append({"imgid": identity, "url": path.as_uri(), "sentences": [f"Thing {number}.", "A thing."]})
    Dataset.from_list(rows).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return Place(str(folder), split)


@pytest.fixture
def captions(tmp_path, monkeypatch) -> dict[str, Any]:
    """What a task of COCO's says of itself: eight training rows, two questions."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    places = {
        "questions": write_captions(tmp_path / "asked", "test", 2),
        "demonstrations": write_captions(tmp_path / "shown", "train", 6),
    }
    asked = {"benchmark": "coco", "form": "openflamingo", "shots": 2, "seed": 42}
    return asked | {name: dataclasses.asdict(place) for name, place in places.items()}


def test_a_task_opens_the_images_that_rows_name(captions, harness, tmp_path):
    task = harness("few_shot_task").FewShotTask({"task": "coco", "metadata": captions})
    doc = {"imgid": 0, "url": (tmp_path / "images of test" / "0.png").as_uri(), "sentences": ["A thing."]}
    chosen = task.choose(doc)
    messages = task.doc_to_messages(doc)
    images = [part["url"] for turn in messages for part in turn["content"] if part["type"] == "image"]
    assert [image.getpixel((0, 0))[0] for image in images] == [40 * row for row in chosen] + [0]
    texts = [part["text"] for turn in messages for part in turn["content"] if part["type"] == "text"]
    assert [text for text in texts if "Thing" in text] == [f"Thing {row}." for row in chosen]


def test_a_task_says_what_it_showed_and_scores_what_counts(captions, harness):
    task = harness("few_shot_task").FewShotTask({"task": "coco", "metadata": captions})
    doc = {"imgid": 0, "url": "file:///closed.png", "sentences": ["A thing."]}  # scored without opening it
    found = task.process_results(doc, ['"A thing." Output:A dog'])
    assert found["CIDEr"] == {"caption": "A thing.", "references": ["A thing."]}
    assert found["prompts"]["demonstrations"] == task.choose(doc)
    assert task.config["generation_kwargs"] == {
        "num_beams": 3,
        "length_penalty": 0.0,
        "do_sample": False,
        "max_new_tokens": 20,
    }


@pytest.mark.parametrize("shots", [1, 2])
def test_a_question_is_no_demonstration_of_its_own(shots, captions, harness):
    """With questions and demonstrations of one split: neither in the prompt nor in what is said of it."""
    metadata = captions | {"questions": captions["demonstrations"], "shots": shots}
    task = harness("few_shot_task").FewShotTask({"task": "coco", "metadata": metadata})
    for number, doc in enumerate(task.training_rows):
        assert number not in task.choose(doc)
        found = task.process_results({"imgid": doc["imgid"], "sentences": ["A thing."], "url": ""}, ["A thing."])
        assert found["prompts"]["demonstrations"] == task.choose(doc)
        texts = [
            part["text"] for turn in task.doc_to_messages(doc) for part in turn["content"] if part["type"] == "text"
        ]
        assert f"Thing {number}." not in texts
    with pytest.raises(ValueError, match="6 shots were asked for, but up to 5 can be chosen from 5 rows"):
        few_shot.sample_demonstrations(range(6), 42, "1", 6, own={1})


def test_a_task_refuses_neighbours_of_another_number_of_rows(captions, harness, tmp_path):
    places = {name: Place(**captions[name]) for name in ("questions", "demonstrations")}

    def origin(count: int) -> neighbours.Origin:
        rows = (neighbours.Rows.of(places["questions"], 2), neighbours.Rows.of(places["demonstrations"], count))
        return neighbours.Origin(*rows, 3)

    rows = neighbours.nearest(*(2 * [neighbours.torch.eye(6)[:, :3]]), 3)
    doc = {"imgid": 1, "url": "", "sentences": ["A thing."]}
    for count in (6, 5):
        path = tmp_path / f"{count}.parquet"
        neighbours.write_neighbours(path, [str(number) for number in range(6)], *rows, origin(count))
        metadata = captions | {"neighbours": str(path)}
        task = harness("few_shot_task").FewShotTask({"task": "coco", "metadata": metadata})
        if count == 6:
            assert task.choose(doc) == rows[0][1].tolist()[-2:]
        else:
            with pytest.raises(ValueError, match=r"was computed for 5 demonstrations, but .*shown has 6 rows"):
                task.choose(doc)


def test_a_rule_with_fewer_demonstrations_than_asked_for_is_refused(harness):
    doc = {"id": "r1", "questions": ["a", "b", "c"], "answers": ["x", "y"], "answer": "z"}
    for shots in (2, 3):
        metadata = {"form": "plain", "shots": shots}
        task = harness("few_shot_task").RuleTask({"task": "rule", "metadata": metadata})
        if shots == 2:
            assert len(task.write(doc, None)) == 5
        else:
            with pytest.raises(ValueError, match="3 shots were asked for, but the row 'r1' has 2"):
                task.write(doc, None)


def test_the_coco_tools_own_words_are_refused_at_once_without_java(captions, harness, monkeypatch):
    monkeypatch.setattr("blip3.evaluation.metrics.shutil.which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="there is no java on PATH"):
        harness("few_shot_task").FewShotTask({"task": "coco", "metadata": captions | {"ptb": True}})
