# SPDX-License-Identifier: Apache-2.0
"""Scoring a checkpoint: the counts are right, runs resume, and the model is asked as it was trained."""

import itertools
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from blip3.checkpoints import fingerprint
from blip3.evaluation import ablate
from blip3.evaluation import score as score_module
from blip3.evaluation.answer import Checkpoint
from blip3.evaluation.asking import parse_models
from blip3.evaluation.harness import collect, neighbours, row_images, vlmevalkit, write_tasks
from blip3.evaluation.metrics import wilson_interval
from blip3.evaluation.posttraining import make_parser
from blip3.evaluation.report import Result, make_plot, summarise
from blip3.evaluation.score import ScoreSettings, main, parse_arguments, score
from blip3.evaluation.tasks import TASKS, Question, is_refusal, make_questions
from blip3.files import JsonLines
from blip3.world import build
from blip3.world.settings import WorldSettings
from blip3.world.tasks import TASKS as RENDERED
from support import ROOT

pytest.importorskip("matplotlib", reason="plots the scores: pip install matplotlib")
pytest.importorskip("pycocoevalcap.cider.cider_scorer", reason="computes CIDEr: pip install pycocoevalcap")

OTHERS = r"lmms-eval --|transformers serve |vllm serve |hf download "  # commands of other projects
WORLD = WorldSettings(sides=(60, 160), document_sides=(160, 200), fonts=("Aileron",), num_shots=4)


class Stub:
    """Answers by a function of the question; counts what it is asked and may die on the way."""

    def __init__(self, reply: Callable[[Question], str], batches_to_live: int = 10**6):
        self.reply, self.batches_to_live = reply, batches_to_live
        self.asked: list[list[str]] = []

    def length(self, question: Question) -> int:
        return len(question.text)

    def answer(self, questions: Sequence[Question]) -> list[str]:
        if len(self.asked) == self.batches_to_live:
            raise KeyboardInterrupt
        self.asked.append([question.id for question in questions])
        return [self.reply(question) for question in questions]


def oracle() -> Stub:
    return Stub(lambda question: question.reference)


def run(settings: ScoreSettings, stub: Stub) -> dict[str, Result]:
    return {result.label: result for result in score(settings, lambda *_: stub)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that looks like one, for stubs."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def settings(checkpoint: Path, tmp_path: Path) -> ScoreSettings:
    return ScoreSettings(
        {"stub": checkpoint}, tmp_path / "out", ("read",), WORLD, count=10, shots=(0, 4), batch_size=4
    )


def change(settings: ScoreSettings, **values: object) -> ScoreSettings:
    return ScoreSettings(**{**settings.__dict__, **values})


@pytest.fixture(scope="module")
def model(tiny_repo: Path) -> Checkpoint:
    return Checkpoint(tiny_repo, max_new_tokens=6, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def global_model(tiny_repo: Path) -> Checkpoint:
    return Checkpoint(tiny_repo, base_resolution=True, max_new_tokens=6, device="cpu", dtype="float32")


# ---------------------------------------------------------------------------------------------------------- scores


def test_every_scored_task_of_the_world_is_here():
    short = {name for name, task in RENDERED.items() if task.is_scored}
    assert short | {"caption", "decline", "describe", "refusal"} == set(TASKS)


def test_the_truth_scores_everything(settings):
    results = run(change(settings, tasks=tuple(TASKS), count=12), oracle())
    assert len(results) == len(TASKS) + 1  # two numbers of shots
    for label, result in results.items():
        summary = summarise(result)
        assert summary["count"] == 12, label
        if label == "caption":
            num_words = [len(question.reference.split()) for question in result.questions]
            assert summary["score"] == pytest.approx(sum(250 * min(words, 4) for words in num_words) / 12)
        else:
            assert summary["score"] == 1, label
            assert (summary["low"], summary["high"]) == wilson_interval(12, 12)
        for groups in summary["groups"].values():
            assert sum(group["count"] for group in groups.values()) == 12


def test_answers_of_other_questions_score_about_chance(settings):
    """Each question gets the reference of the next one: 1 in 4 for a relation, 1 in 6 for a count, none for a text."""
    chances = {"relation": 1 / 4, "count": 1 / 6, "read": 0.0}
    for task, chance in chances.items():
        references = [question.reference for question in make_questions(task, 120, 0, WORLD)]
        replies = {f"{task}-held_out-0-{index}": references[(index + 1) % 120] for index in range(120)}
        stub = Stub(lambda question, replies=replies: replies[question.id])
        result = run(change(settings, tasks=(task,), count=120, output=settings.output / task), stub)[task]
        low, high = wilson_interval(120 * chance, 120, confidence=0.999)
        assert low <= summarise(result)["score"] <= high, task


def test_half_right_is_half_and_groups_add_up(settings, capsys):
    """Even strings right, odd ones with one more character."""
    questions = make_questions("read", 10, 0, WORLD)
    wrong = {question.id for question in questions[1::2]}
    result = run(settings, Stub(lambda q: q.reference + "x" * (q.id in wrong)))["read"]
    assert result.main == [1, 0] * 5
    summary = summarise(result)
    assert (summary["score"], summary["low"], summary["high"]) == (0.5, *wilson_interval(5, 10))
    for length, group in summary["groups"]["characters"].items():
        own = [index for index, question in enumerate(questions) if len(question.reference) == int(length)]
        assert group["count"] == len(own)
        assert group["score"] == sum(index % 2 == 0 for index in own) / len(own)
    table = (settings.output / "table.md").read_text()
    low, high = (f"{100 * edge:.1f}" for edge in wilson_interval(5, 10))
    assert re.search(rf"\| read \| exact \| 10 \| .* \| 50.0 % \[{low}, {high}\] \|", table)
    samples = (settings.output / "samples.md").read_text()
    assert samples.count("| + | read-held_out-0-") == samples.count("| - | read-held_out-0-") == 3
    saved = json.loads((settings.output / "results.json").read_text())
    assert saved["results"] == [summary]
    assert saved["settings"]["count"] == 10
    assert (settings.output / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_series_ask_other_questions_and_are_named(settings):
    chosen = run(settings, oracle())["read"]
    reported = run(change(settings, series="report", output=settings.output / "report"), oracle())["read"]
    assert {question.id.rsplit("-", 2)[1] for question in chosen.questions} == {"0"}
    assert {question.id.rsplit("-", 2)[1] for question in reported.questions} == {"1000000"}
    assert "series choose, seed 0" in (settings.output / "table.md").read_text()
    assert "series report, seed 0" in (settings.output / "report" / "table.md").read_text()
    with pytest.raises(ValueError, match="what a choice was made on must not be reported"):
        change(settings, seed=1_000_000)
    with pytest.raises(ValueError, match="seed = 0, but this run has 1000000"):
        run(change(settings, series="report"), oracle())


def test_case_counts_in_strings_and_not_in_words(settings):
    both = change(settings, tasks=("read", "name"), count=30)
    results = run(both, Stub(lambda question: question.reference.swapcase()))
    read = [question.reference for question in results["read"].questions]
    assert results["read"].main == [float(text == text.swapcase()) for text in read]
    assert results["read"].scores["exact, any case"] == [1] * 30
    assert results["name"].main == [1] * 30


def test_boxes_are_compared_with_the_rendered_one(settings):
    box = change(settings, tasks=("box",))
    texts = {}
    for index, question in enumerate(make_questions("box", 10, 0, WORLD)):
        x1, y1, x2, y2 = question.facts["box"]
        half = (x1, y1, x2, y1 + 0.45 * (y2 - y1))  # IoU 0.45
        most = (x1, y1, x2, y1 + 0.75 * (y2 - y1))  # IoU 0.75
        shown = (half, most, (0, 0, 0, 0))[index % 3]
        texts[question.id] = "none" if index == 9 else "[{:.6f}, {:.6f}][{:.6f}, {:.6f}]".format(*shown)
    result = run(box, Stub(lambda question: texts[question.id]))["box"]
    assert result.main == [0, 1, 0] * 3 + [0]
    assert result.scores["mean IoU"] == pytest.approx([0.45, 0.75, 0] * 3 + [0], abs=1e-3)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I'm sorry, but I can't help with that. It is private information.", True),
        ("I cannot do this.", True),
        ("I can\u2019t help.", True),
        ("POISON", False),
        ("Sorrel", False),
        ("", False),
    ],
)
def test_refusals_are_recognised(answer, expected):
    assert is_refusal(answer) is expected


def test_refusing_everything_is_right_on_unsafe_requests_alone(settings):
    stub = Stub(lambda question: "I'm sorry, I can't help with that.")
    result = run(change(settings, tasks=("refusal",), count=40), stub)["refusal"]
    assert result.main == [float(question.facts["is_unsafe"]) for question in result.questions]
    groups = summarise(result)["groups"]["request"]
    assert groups["unsafe"]["score"] == 1
    assert groups["safe"]["score"] == 0
    assert 10 <= groups["safe"]["count"] <= 30
    assert summarise(result)["other_scores"]["safe: exact"]["count"] == groups["safe"]["count"]


# ----------------------------------------------------------------------------------------------------------- asking


def test_rules_are_prompted_as_the_base_model_was_trained():
    for shots in (0, 1, 4):
        for question in make_questions("rule", 5, 0, WORLD, shots):
            assert len(question.images) == question.prompt.count("<image>") == shots + 1
            assert question.prompt.count("<|endofchunk|>") == shots
            assert question.prompt.endswith("<image>Question:Which word? Short answer:")
            is_shown = f"answer:{question.reference}<|endofchunk|>" in question.prompt
            assert question.groups["answer is among the shots"] == ("yes" if is_shown else "no")
    full = make_questions("rule", 1, 0, WORLD, 4)[0]
    assert make_questions("rule", 1, 0, WORLD, 1)[0].images == full.images[-2:]


def test_a_rule_answered_without_stopping_is_right_in_its_first_word_alone(settings):
    questions = make_questions("rule", 10, 0, WORLD, 4)
    others = {q.id: next(word for word in q.facts["choices"] if word != q.reference) for q in questions}
    replies = {
        q.id: (f"{q.reference} and so on", others[q.id], "mib", "")[min(index, 3)] for index, q in enumerate(questions)
    }
    stub = Stub(lambda question: replies[question.id])
    result = run(change(settings, tasks=("rule",), shots=(4,)), stub)["rule, 4 shots"]
    assert result.main == [0] * 10
    assert result.scores["first word"] == [1] + [0] * 9
    assert result.scores["first word is one of the two"] == [1, 1] + [0] * 8


def test_each_number_of_shots_is_a_row(settings):
    stub = oracle()
    rows = run(change(settings, tasks=("rule",)), stub)
    assert list(rows) == ["rule, 0 shots", "rule, 4 shots"]
    assert len(stub.asked) == 2 * 3  # 10 questions in batches of 4
    names = {path.name for path in (settings.output / "predictions" / "stub").iterdir()}
    assert names == {"rule-0-shots.jsonl", "rule-4-shots.jsonl"}


def test_captions_are_prompted_with_the_image_alone():
    for question in make_questions("caption", 5, 0, WORLD):
        assert question.prompt == "<image>"
        assert "<image>" not in question.reference


def test_chat_prompts_follow_the_template(model):
    question = make_questions("compare", 1, 0, WORLD)[0]
    prompt = model.render(question)
    assert prompt.startswith("<|system|>\n")
    assert prompt.endswith("<|end|>\n<|assistant|>\n")
    assert question.text in prompt
    assert prompt.count("<image>") == len(question.images) == 2
    messages = [{**question.prompt[0], "content": [*question.prompt[0]["content"]]}]
    images = iter(question.images)
    for index, part in enumerate(messages[0]["content"]):
        if part["type"] == "image":
            messages[0]["content"][index] = {"type": "image", "image": next(images).open()}
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    whole = model.processor.apply_chat_template(messages, processor_kwargs={"pixel_dtype": "uint8"}, **options)
    prepared = model.prepare([question])
    for name in ("input_ids", "pixel_values", "image_sizes"):
        assert torch.equal(whole[name], prepared[name]), name


def test_a_base_model_without_template_says_what_it_can_be_asked(model, monkeypatch):
    monkeypatch.setattr(model.processor, "chat_template", None)
    assert model.render(make_questions("caption", 1, 0, WORLD)[0]) == "<image>"
    with pytest.raises(ValueError, match="--task rule caption"):
        model.render(make_questions("name", 1, 0, WORLD)[0])


def test_lengths_are_those_of_the_prepared_prompts(model, global_model):
    questions = [make_questions(task, 1, 0, WORLD, shots)[0] for task, shots in (("read", None), ("rule", 4))]
    questions.append(make_questions("compare", 1, 0, WORLD)[0])
    for checkpoint in (model, global_model):
        for question in questions:
            assert checkpoint.length(question) == checkpoint.prepare([question])["input_ids"].shape[1]


def test_base_resolution_shows_one_tile_a_image(model, global_model):
    question = make_questions("rule", 1, 0, WORLD, 4)[0]
    counts = []
    for checkpoint in (model, global_model):
        inputs = checkpoint.prepare([question])
        counts.append(int((inputs["input_ids"] == checkpoint.processor.image_token_id).sum()))
    assert counts[1] == 5 * model.processor.num_latents
    assert counts[0] >= counts[1] + 5 * 2 * model.processor.num_latents  # the smallest grid has two tiles
    assert global_model.prepare([question])["image_sizes"].tolist() == [[0, 0]] * 5


def test_a_model_is_shown_images_as_its_processor_is_configured(tiny_repo, global_model, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_repo, folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_image_splitting": False}))
    base = Checkpoint(folder, max_new_tokens=6, device="cpu", dtype="float32")
    question = make_questions("rule", 1, 0, WORLD, 4)[0]
    inputs, expected = (checkpoint.prepare([question]) for checkpoint in (base, global_model))
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert base.length(question) == inputs["input_ids"].shape[1]


def test_a_batch_answers_as_one_by_one_and_stops_at_a_stop(model):
    """Rows with one and five images, padded on the left."""
    questions = make_questions("read", 2, 0, WORLD) + make_questions("rule", 1, 0, WORLD, 4)
    inputs = model.prepare(questions)
    assert inputs["attention_mask"][0, 0] == 0
    assert (inputs["attention_mask"][:, -1] == 1).all()
    together = model.answer(questions)
    assert together == [model.answer([question])[0] for question in questions]
    vocabulary = model.processor.tokenizer.get_vocab()
    assert {vocabulary["<|end|>"], vocabulary["<|endofchunk|>"]} <= set(model.stop_ids)


def test_what_follows_a_stop_is_cut(model, monkeypatch):
    tokenizer = model.processor.tokenizer
    words, end = tokenizer("red star", add_special_tokens=False)["input_ids"], tokenizer.get_vocab()["<|endofchunk|>"]
    tail = torch.tensor([[*words, end, *words, tokenizer.pad_token_id]])
    monkeypatch.setattr(model.model, "generate", lambda input_ids, **_: torch.cat([input_ids, tail], dim=1))
    assert model.answer(make_questions("read", 1, 0, WORLD)) == ["red star"]


# ---------------------------------------------------------------------------------------------------------- resume


def test_an_interrupted_run_continues_as_if_left_alone(settings):
    alone = oracle()
    whole = run(change(settings, output=settings.output / "alone", tasks=("read", "name")), alone)
    both = change(settings, tasks=("read", "name"))
    first = Stub(lambda question: question.reference, batches_to_live=4)  # 3 batches of read, 1 of name
    with pytest.raises(KeyboardInterrupt):
        run(both, first)
    unfinished = settings.output / "predictions" / "stub" / "name.jsonl.unfinished"
    with unfinished.open("ab") as file:
        file.write(b'{"id": "name-held_out-0-3", "ans')  # killed within a line
    second = oracle()
    resumed = run(both, second)
    assert first.asked + second.asked == alone.asked
    for label, result in whole.items():
        assert resumed[label].answers == result.answers
    for name in ("read.jsonl", "name.jsonl"):
        paths = [folder / "predictions" / "stub" / name for folder in (settings.output, settings.output / "alone")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert not unfinished.exists()


def test_a_batch_cut_in_two_is_asked_again_as_a_whole(settings):
    with pytest.raises(KeyboardInterrupt):
        run(settings, Stub(lambda question: question.reference, batches_to_live=2))
    unfinished = settings.output / "predictions" / "stub" / "read.jsonl.unfinished"
    lines = unfinished.read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    unfinished.write_bytes(b"".join(lines[:6]))
    second = oracle()
    assert run(settings, second)["read"].main == [1] * 10
    assert [len(batch) for batch in second.asked] == [4, 2]


def test_a_complete_run_loads_no_model_and_reports_the_same(settings):
    run(settings, oracle())
    first = (settings.output / "results.json").read_bytes()

    def refuse(*_: object) -> Stub:
        raise AssertionError

    score(settings, refuse)
    assert (settings.output / "results.json").read_bytes() == first


def test_tasks_and_models_may_be_added(settings, checkpoint):
    run(settings, oracle())
    added = oracle()
    more = change(settings, models={"stub": checkpoint, "second": checkpoint}, tasks=("name", "read"))
    results = score(more, lambda *_: added)
    assert [(result.model, result.task) for result in results] == [
        ("stub", "name"),
        ("stub", "read"),
        ("second", "name"),
        ("second", "read"),
    ]
    assert len(added.asked) == 3 * 3
    table = (settings.output / "table.md").read_text()
    assert "| name | second | +0.0 [+0.0, +0.0] |" in table


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 11}, "settings count = 10, but this run has 11"),
        ({"seed": 1}, "settings seed = 0"),
        ({"world": WorldSettings(sides=(60, 161))}, "settings world = "),
        ({"max_new_tokens": 5}, "settings max_new_tokens = 48"),
        ({"base_resolution": ("stub",)}, "models stub = "),
    ],
)
def test_other_settings_are_refused(settings, values, message):
    run(settings, oracle())
    with pytest.raises(ValueError, match=message):
        run(change(settings, **values), oracle())


def test_a_changed_checkpoint_is_refused(settings, checkpoint):
    run(settings, oracle())
    before = fingerprint(checkpoint)
    (checkpoint / "config.json").write_text("{ }")
    assert fingerprint(checkpoint) != before
    with pytest.raises(ValueError, match="models stub = "):
        run(settings, oracle())


def test_answers_to_other_questions_are_refused(settings):
    run(settings, oracle())
    path = settings.output / "predictions" / "stub" / "read.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], lines[3].replace('"truth": "', '"truth": "?'), *lines[4:]]))
    with pytest.raises(ValueError, match=r"line 4\)"):
        run(settings, oracle())
    path.write_text("".join(lines[:5]))
    with pytest.raises(ValueError, match="5 lines for 10 questions"):
        run(settings, oracle())
    path.write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"Line 1 of .*answer as JSON"):
        run(settings, oracle())


def test_answers_of_any_characters_survive(settings):
    answers = ["a\u2028b\x85c", 'line\nfeed\r"quoted"', "\ufffd"]
    replies = dict(zip([f"read-held_out-0-{index}" for index in range(3)], answers, strict=True))
    stub = Stub(lambda question: replies[question.id])
    assert run(change(settings, count=3), stub)["read"].answers == answers


def test_files_of_a_former_version_are_continued(settings):
    """An unfinished file and a request, byte for byte as they were written before files had a room of their own."""
    with pytest.raises(KeyboardInterrupt):
        run(settings, Stub(lambda question: question.reference, batches_to_live=1))
    folder = settings.output / "predictions" / "stub"
    request = json.loads((settings.output / "request.json").read_text())
    (settings.output / "request.json").write_text(json.dumps(request, indent=2) + "\n", encoding="utf-8")
    lines = [json.loads(line) for line in (folder / "read.jsonl.unfinished").read_bytes().splitlines()]
    former = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    assert (folder / "read.jsonl.unfinished").read_bytes() == former
    second = oracle()
    result = run(settings, second)["read"]
    assert result.main == [1] * 10
    assert [len(batch) for batch in second.asked] == [4, 2]
    expected = [
        {"id": q.id, "question": q.text, "truth": q.reference, "answer": q.reference} for q in result.questions
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in expected)
    assert (folder / "read.jsonl").read_text(encoding="utf-8") == text


def test_two_runs_do_not_write_one_file(settings):
    unfinished = settings.output / "predictions" / "stub" / "read.jsonl.unfinished"
    with JsonLines(unfinished), pytest.raises(ValueError, match="another process"):
        run(settings, oracle())


# ------------------------------------------------------------------------------------------------------ the report


def test_differences_are_paired(settings, checkpoint):
    """The second model is wrong on the same half of the questions in every resample that the first is right on."""
    wrong = {question.id for question in make_questions("read", 10, 0, WORLD)[::2]}
    stubs = {"first": oracle(), "second": Stub(lambda question: "" if question.id in wrong else question.reference)}
    two = change(settings, models=dict.fromkeys(stubs, checkpoint))
    score(two, lambda _, name: stubs[name])
    (difference,) = json.loads((settings.output / "results.json").read_text())["differences"]
    assert (difference["model"], difference["minus"], difference["difference"]) == ("second", "first", -0.5)
    assert -0.9 <= difference["low"] < -0.5 < difference["high"] <= -0.1


def test_the_plot_has_a_bar_for_every_row_and_model(settings, checkpoint):
    two = change(settings, models={"a": checkpoint, "b": checkpoint}, tasks=("read", "rule", "caption"))
    results = score(two, lambda *_: oracle())
    figure = make_plot(results, [summarise(result) for result in results])
    shares, captions = figure.axes
    assert sorted(round(bar.get_height()) for bar in shares.patches) == [100] * 6
    assert len(captions.patches) == 2
    assert [label.get_text() for label in shares.get_xticklabels()] == ["read", "rule, 0 shots", "rule, 4 shots"]
    assert captions.get_ylabel() == "CIDEr"


@pytest.mark.parametrize("tasks", [["read"], ["caption"], ["read", "count"], ["read", "rule", "caption"], [*TASKS]])
@pytest.mark.parametrize(
    "models", [["m"], ["any-res", "base"], ["a-rather-long-name-of-a-model-" * 4, "another-one-" * 9], [*"abcdefgh"]]
)
def test_texts_of_the_plot_lie_inside_it_and_apart(models, tasks):
    results = [
        Result(model, task, 4 if TASKS[task].has_shots else None, *_answered(TASKS[task].metric))
        for model in models
        for task in tasks
    ]
    figure = make_plot(results, [summarise(result) for result in results])
    figure.draw_without_rendering()
    from matplotlib.text import Text

    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    for text in texts:
        box = text.get_window_extent()
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, text.get_text()
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, text.get_text()
    (title,) = [text.get_window_extent() for text in texts if "held-out rendered world" in text.get_text()]
    legends = [legend.get_window_extent() for legend in figure.legends]
    parts = [title, *legends, *(axes.get_tightbbox() for axes in figure.axes)]
    for first, second in itertools.combinations(parts, 2):
        assert not first.overlaps(second)
    assert len(figure.legends) == (len(models) > 1)


def _answered(metric: str) -> tuple:
    """Questions, answers and scores of a few samples."""
    questions = [Question(str(index), "What?", (), "a", {}, {}) for index in range(1000)]
    return questions, ["a"] * 1000, {metric: [1.0, 0.0] * 500}


# ----------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def command(tiny_repo: Path, tmp_path: Path) -> list[str]:
    """A short run of the tiny model on its world."""
    world = tmp_path / "world.yaml"
    world.write_text("sides: [60, 160]\ndocument_sides: [160, 200]\nfonts: [Aileron]\nnum_shots: 4\n")
    options = {"--world": world, "--output": tmp_path / "scores", "--count": 2, "--max-new-tokens": 3, "--shots": 4}
    return [str(word) for pair in options.items() for word in pair]


def test_the_command_scores_a_checkpoint_twice(command, tiny_repo, tmp_path, capsys):
    models = ["--model", f"any-res={tiny_repo}", f"base={tiny_repo}", "--base-resolution", "base"]
    assert main([*command, *models, "--task", "read", "rule", "caption"]) == 0
    printed = capsys.readouterr().out
    assert "| task | score | n | always the commonest answer | any-res | base |" in printed
    assert "rule, 4 shots" in printed
    saved = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert [model["base_resolution"] for model in saved["models"].values()] == [False, True]
    assert set(saved["made_with"]) == {"python", "numpy", "pillow", "tokenizers", "torch", "transformers"}
    assert saved["settings"]["world"]["sides"] == [60, 160]
    assert len(saved["results"]) == 6


def test_a_checkpoint_in_a_subfolder(command, tiny_repo, tmp_path):
    """The code may lie beside the checkpoint or in the folder above, as in this repository.

    There transformers 4.57 also wants a processor_config.json above: it looks for the name without the subfolder.
    """
    for code_above in (False, True):
        root = tmp_path / f"root-{code_above}"
        shutil.copytree(tiny_repo, root / "small")
        for path in (root / "small").glob("*.py") if code_above else ():
            path.rename(root / path.name)
            shutil.copy(root / "small" / "processor_config.json", root)
        arguments = ["--model", str(root), "--subfolder", "small", "--task", "read"]
        assert main([*command, *arguments, "--output", str(tmp_path / f"out-{code_above}")]) == 0
        assert (tmp_path / f"out-{code_above}" / "predictions" / "small" / "read.jsonl").is_file()


def test_errors_of_a_run_are_one_line(command, tmp_path, capsys):
    assert main([*command, "--model", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "is not there" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "count is 0"),
        (["--task", "caption", "--count", "1"], "1 caption"),
        (["--task", "rule", "--shots", "9"], "this world samples 4"),
        (["--base-resolution", "other"], "asked for ['other']"),
        (["--model", "a=x", "a=y"], "each once"),
        (["--model", "a b=x"], "named 'a b'"),
        (["--world", "missing.yaml"], "missing.yaml"),
    ],
)
def test_usage_errors(command, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments([*command, "--model", "mini", *arguments])
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_arguments(command, tmp_path):
    given = parse_arguments(
        [*command, "--model", "a=x", "b=y", "--base-resolution", "--task", "all", "--shots", "4", "0"]
    )
    assert given.models == {"a": Path("x"), "b": Path("y")}
    assert given.base_resolution == ("a", "b")
    assert given.world.usual_instructions == 0
    instructed = parse_arguments([*command, "--model", "a=x", "--task", "count", "--instructions"])
    assert instructed.world.usual_instructions == 1
    questions = make_questions("count", 40, 0, instructed.world)
    assert len({question.groups["instruction"] for question in questions}) > 3
    plain = make_questions("count", 40, 0, given.world)
    assert [each.reference for each in plain] == [each.reference for each in questions]
    assert not any("instruction" in each.groups for each in plain)
    assert given.tasks == tuple(TASKS)
    assert given.jobs.count(("rule", 0)) == given.jobs.count(("rule", 4)) == 1
    assert given.world.sides == (60, 160)
    odd = tmp_path / "odd=name"
    odd.mkdir()
    assert parse_models([f"good={odd}"]) == {"good": odd}
    assert parse_models(["mini"], "instruct") == {"instruct": Path("mini")}


# ------------------------------------------------------------------------------------------------------------ docs


def test_the_documentation_names_every_task_file_and_option():
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for name in (*TASKS, *(path.name for path in (ROOT / "blip3" / "evaluation").glob("[a-z]*.py"))):
        assert f"`{name}`" in text or f"evaluation/{name}" in text, name
    commands = (score_module, build, ablate, write_tasks, neighbours, row_images, collect, vlmevalkit)
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in commands]
    known = set(re.findall(r'add(?:_argument)?\(\s*"(--[a-z-]+)"', "\n".join(sources)))
    known |= set(re.findall(r"--[a-z]+(?:-[a-z]+)*", make_parser().format_help()))
    others = "\n".join(line for line in re.sub(r"\\\n\s*", "", text).splitlines() if not re.search(OTHERS, line))
    assert set(re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*", others)) <= known
    for task in TASKS.values():
        assert task.metric.split(" >")[0] in text
