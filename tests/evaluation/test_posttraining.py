# SPDX-License-Identifier: Apache-2.0
"""The command that scores checkpoints before and after post-training, with respondents whose scores are known."""

import importlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from blip3.evaluation.answer import Checkpoint
from blip3.evaluation.asking import FIRST_REPORTED_SEED, seed_of_series
from blip3.evaluation.grader import ChatGrader, StringParser, verdicts_of
from blip3.evaluation.posttraining import PostTrainingSettings, main, parse_arguments, score
from blip3.evaluation.posttraining_report import TaskResult
from blip3.evaluation.posttraining_tasks import KEPT, RENDERED, Files
from blip3.evaluation.tasks import Question
from blip3.world import build
from blip3.world.settings import WorldSettings

WORLD = WorldSettings(sides=(60, 120), document_sides=(160, 200), fonts=("Aileron",), num_shots=4)


class Stub:
    """Answers by a function of the question, and counts what it is asked."""

    def __init__(self, reply: Callable[[Question], str]):
        self.reply, self.asked = reply, 0

    def length(self, question: Question) -> int:
        return len(question.text)

    def answer(self, questions: Sequence[Question]) -> list[str]:
        self.asked += len(questions)
        return [self.reply(question) for question in questions]


def oracle() -> Stub:
    return Stub(lambda question: question.reference)


def mute() -> Stub:
    return Stub(lambda question: "")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two folders that look like checkpoints, for stubs."""
    found = {name: tmp_path / name for name in ("before", "after")}
    for folder in found.values():
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    return found


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """Look-alikes of the three benchmarks."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("pope", "hallusionbench", "vlguard"):
        build.LAYOUTS[name](folder / name, 6, 0, WORLD)
    return {
        "pope": Files((folder / "pope",), folder / "pope" / "val2014"),
        "hallusionbench": Files((folder / "hallusionbench" / "HallusionBench.json",), folder / "hallusionbench"),
        "vlguard": Files((folder / "vlguard" / "test.json",), folder / "vlguard" / "test"),
    }


def run(settings: PostTrainingSettings, stubs: dict[str, Stub]) -> dict[str, TaskResult]:
    return {result.task: result for result in score(settings, lambda _, name: stubs[name])}


def values(result: TaskResult, model: str) -> dict[str, float | None]:
    return {ratio.name: ratio.value for ratio in result.scores[model]}


def test_references_score_everything_and_silence_nothing(folders, tmp_path):
    """A model that says nothing has no hallucination and no helpfulness, and the table shows both."""
    settings = PostTrainingSettings(folders, tmp_path / "out", world=WORLD, count=12)
    results = run(settings, {"before": oracle(), "after": mute()})
    assert set(results) == {*RENDERED, *KEPT}
    right = {name: values(result, "before") for name, result in results.items()}
    silent = {name: values(result, "after") for name, result in results.items()}

    assert right["describe"] == {"CHAIRi": 0, "CHAIRs": 0, "coverage": 1, "names nothing": 0}
    assert silent["describe"] == {"CHAIRi": None, "CHAIRs": 0, "coverage": 0, "names nothing": 1}
    for name, value in right["exist"].items():
        if name.startswith(("accuracy", "F1", "strict accuracy")):
            assert value in (1, None), name
    assert silent["exist"]["strict accuracy, mean of 3"] == 0
    assert right["decline"]["attack success, unsafes (our list)"] == 0
    assert right["decline"]["over-refusal, safe_safes (our list)"] == 0
    assert right["decline"]["helpfulness, safe_safes (word F1)"] == 1
    assert silent["decline"]["attack success, unsafes (our list)"] == 1
    assert silent["decline"]["gives the answer away, unsafes"] == 0
    assert silent["decline"]["helpfulness, safe_safes (word F1)"] == 0
    assert silent["decline"]["says nothing"] == 1
    for name in KEPT:
        assert list(right[name].values()) == [1], name
        assert list(silent[name].values()) == [0], name

    table = (settings.output / "table.md").read_text()
    assert "| score | better | clusters | before | after | after - before |" in table
    assert "| coverage | higher | 12 | 100.0 [100.0, 100.0] | 0.0 [0.0, 0.0] | -100.0 [-100.0, -100.0] * |" in table
    assert "| CHAIRi | lower | 12 | 0.0 [0.0, 0.0] | - | - |" in table


def test_results_hold_every_number_and_the_series(folders, tmp_path):
    settings = PostTrainingSettings(folders, tmp_path / "out", ("describe",), world=WORLD, count=4, series="report")
    run(settings, {"before": oracle(), "after": mute()})
    saved = json.loads((settings.output / "results.json").read_text())
    assert saved["settings"]["series"] == "report"
    assert (saved["settings"]["number_in_series"], saved["settings"]["seed"]) == (0, FIRST_REPORTED_SEED)
    assert saved["settings"]["grader"] == "string parser"
    (row,) = (row for row in saved["differences"] if row["score"] == "coverage")
    assert row == {
        "task": "describe",
        "score": "coverage",
        "model": "after",
        "minus": "before",
        "difference": -1,
        "low": -1,
        "high": -1,
    }
    (row,) = (row for row in saved["results"] if row["score"] == "CHAIRi" and row["model"] == "after")
    assert (row["value"], row["low"], row["better"], row["clusters"]) == (None, None, "lower", 0)
    assert "| describe-held_out-1000000-0 |" in (settings.output / "samples.md").read_text()


def test_a_run_resumes_and_refuses_other_settings(folders, tmp_path, capsys):
    settings = PostTrainingSettings(folders, tmp_path / "out", ("exist",), world=WORLD, count=6)
    stubs = {"before": oracle(), "after": mute()}
    first = run(settings, stubs)
    assert [stub.asked for stub in stubs.values()] == [6, 6]
    again = run(settings, {})
    assert values(again["exist"], "before") == values(first["exist"], "before")
    other = PostTrainingSettings(folders, tmp_path / "out", ("exist",), world=WORLD, count=6, series="report")
    with pytest.raises(ValueError, match="seed = 0, but this run has 1000000"):
        run(other, stubs)


# ---------------------------------------------------------------------------------------------------------- series


def test_series_share_no_seed(folders, tmp_path):
    chosen = {seed_of_series("choose", seed) for seed in (0, 1, FIRST_REPORTED_SEED - 1)}
    assert not chosen & {seed_of_series("report", seed) for seed in (0, 1, FIRST_REPORTED_SEED - 1)}
    for series in ("choose", "report"):
        for seed in (-1, FIRST_REPORTED_SEED):
            with pytest.raises(ValueError, match="what a choice was made on"):
                PostTrainingSettings(folders, tmp_path, series=series, seed=seed)
    with pytest.raises(ValueError, match="must be one of choose, report"):
        PostTrainingSettings(folders, tmp_path, series="test")


def test_published_files_are_for_reports_alone(folders, tmp_path, published):
    with pytest.raises(ValueError, match="pope is to be asked in the series choose"):
        PostTrainingSettings(folders, tmp_path, published={"pope": published["pope"]})


# -------------------------------------------------------------------------------------------------- published files


@pytest.fixture
def report(folders, tmp_path, published) -> PostTrainingSettings:
    return PostTrainingSettings(folders, tmp_path / "out", (), published, world=WORLD, series="report")


def test_published_files_are_scored(report):
    results = run(report, {"before": oracle(), "after": mute()})
    right = {name: values(result, "before") for name, result in results.items()}
    silent = {name: values(result, "after") for name, result in results.items()}
    assert list(right) == ["pope", "hallusionbench", "vlguard"]
    assert (right["pope"]["accuracy, mean of 3"], right["pope"]["F1, mean of 3"]) == (1, 1)
    assert right["pope"]["says yes, adversarial"] == 0.5
    # Everything that is not a no is a yes.
    assert (silent["pope"]["accuracy, mean of 3"], silent["pope"]["says yes, random"]) == (0.5, 1)
    assert silent["pope"]["strict accuracy, mean of 3"] == 0
    names = ("aAcc", "qAcc", "fAcc", "unclear")
    assert [right["hallusionbench"][f"{name} (string parser)"] for name in names] == [1, 1, 1, 0]
    # 3 sets of VD with 4 questions, 3 of VS with 6, of which the two without a figure may stay unanswered.
    assert silent["hallusionbench"]["aAcc (string parser)"] == pytest.approx(6 / 30)
    assert [silent["hallusionbench"][f"{name} (string parser)"] for name in names[1:]] == [0, 0, 1]
    assert right["vlguard"]["attack success, safe_unsafes (our list)"] == 0
    assert silent["vlguard"]["attack success, unsafes (our list)"] == 1
    assert results["pope"].scores["before"][0].is_asked.sum() == 6  # images, not questions


def test_the_published_list_is_named_beside_ours(report, tmp_path):
    path = tmp_path / "utils.py"
    path.write_text("def check(answer):\n    reject_list = ['private']\n")
    settings = PostTrainingSettings(**{**report.__dict__, "phrases": path})
    found = values(run(settings, {"before": Stub(lambda _: "It is private."), "after": mute()})["vlguard"], "before")
    assert found["attack success, unsafes (VLGuard's list)"] == 0
    assert found["attack success, unsafes (our list)"] == 1


def test_coco_is_scored_by_synonyms(folders, tmp_path):
    (tmp_path / "synonyms.txt").write_text("dog, puppy\ncar\nbench\n")
    (tmp_path / "instances.json").write_text(
        json.dumps(
            {"categories": [{"id": 1, "name": "dog"}], "annotations": [{"image_id": 5, "category_id": 1}]},
        )
    )
    captions = {"images": [{"id": 5, "file_name": "5.jpg"}], "annotations": [{"image_id": 5, "caption": "A bench."}]}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    files = [tmp_path / f"{name}" for name in ("instances.json", "captions.json", "synonyms.txt")]
    published = {"coco": Files(tuple(files), tmp_path)}
    settings = PostTrainingSettings(folders, tmp_path / "out", (), published, series="report")
    results = run(settings, {"before": Stub(lambda _: "Two puppies in a car"), "after": mute()})
    found = values(results["coco"], "before")
    assert found == {"CHAIRi": 1 / 2, "CHAIRs": 1, "coverage": 1 / 2, "names nothing": 0}


def test_questions_of_one_id_are_told_apart(folders, tmp_path, published):
    """Answers are kept by id: a file that repeats one would lose an answer."""
    rows = json.loads(published["vlguard"].questions[0].read_text())
    for row in rows:
        row["id"] = "the same"
    path = tmp_path / "test.json"
    path.write_text(json.dumps(rows))
    files = {"vlguard": Files((path,), published["vlguard"].images)}
    settings = PostTrainingSettings(folders, tmp_path / "out", (), files, series="report")
    result = run(settings, {"before": oracle(), "after": mute()})["vlguard"]
    assert len({question.id for question in result.questions}) == len(result.questions) == 9
    assert list(result.answers["before"]) == [question.reference for question in result.questions]


# ----------------------------------------------------------------------------------------------------------- grader


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict]]]:
    """A chat model that calls an answer correct if it says red, and incorrect if it says blue."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            text = body["messages"][0]["content"].splitlines()[-1]
            verdict = "Correct." if "red" in text else "It is INCORRECT" if "blue" in text else "Hard to say"
            reply = json.dumps({"choices": [{"message": {"content": verdict}}]}).encode()
            self.send_response(404 if body["model"] == "absent" else 200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None:
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1", asked
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def hallusion_questions(count: int) -> list[Question]:
    facts = {"details": "The car is red."}
    return [Question(str(index), "Is it red?", (), "yes", facts, {}) for index in range(count)]


def test_a_chat_model_grades_and_is_asked_once(server, tmp_path, monkeypatch):
    url, asked = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    grader, path = ChatGrader(f"{url}/", "small"), tmp_path / "verdicts.jsonl"
    questions, answers = hallusion_questions(3), ["It is red", "It is blue", "?"]
    expected = ["correct", "incorrect", "unclear"]
    assert verdicts_of(grader, questions, answers, path) == expected
    assert [each["path"] for each in asked] == ["/v1/chat/completions"] * 3
    assert asked[0]["key"] == "Bearer secret"
    assert (asked[0]["model"], asked[0]["temperature"]) == ("small", 0)
    assert "Reference answer: The car is red." in asked[0]["messages"][0]["content"]
    assert verdicts_of(grader, questions, answers, path) == expected
    assert len(asked) == 3
    assert verdicts_of(grader, questions, ["It is red"] * 3, path) == ["correct"] * 3
    assert len(asked) == 5
    assert "secret" not in path.read_text()


def test_the_grader_is_named_in_the_scores(report, server):
    settings = PostTrainingSettings(**{**report.__dict__, "grader": ChatGrader(server[0], "small-model")})
    results = run(settings, {"before": Stub(lambda _: "red"), "after": Stub(lambda _: "")})
    found = values(results["hallusionbench"], "before")
    assert found["aAcc (small-model)"] == 1
    assert (settings.output / "verdicts" / "before" / "hallusionbench.jsonl").is_file()


def test_a_grader_without_a_reply_is_an_error(server, tmp_path):
    for grader in (ChatGrader(server[0], "absent"), ChatGrader("http://127.0.0.1:9/v1", "small", 2.0)):
        with pytest.raises(ConnectionError, match="gave no verdict"):
            verdicts_of(grader, hallusion_questions(1), [""], tmp_path / f"{grader.model}.jsonl")
    with pytest.raises(ValueError, match="must begin with http"):
        ChatGrader("file:///etc/hosts", "small")


def test_the_string_parser_writes_no_file(tmp_path):
    assert verdicts_of(StringParser(), hallusion_questions(2), ["Yes.", "?"], tmp_path / "x") == ["correct", "unclear"]
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------- command line


def test_the_command_line(folders, tmp_path):
    line = ["before=a", "after=b", "--output", "out", "--series", "report", "--seed", "3", "--task", "none"]
    line += ["--pope", "p", "q", "--vlguard-phrases", "u.py", "--grader", "http://x/v1", "m", "--base-resolution"]
    settings = parse_arguments(line)
    assert settings.models == {"before": Path("a"), "after": Path("b")}
    assert settings.tasks == ()
    assert settings.published == {"pope": Files((Path("p"),), Path("q"))}
    assert settings.phrases == Path("u.py")
    assert settings.grader == ChatGrader("http://x/v1", "m")
    assert settings.sources.seed == FIRST_REPORTED_SEED + 3
    assert settings.base_resolution == ("before", "after")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "none"], "1 models and 0 tasks"),
        (["--pope", "a", "b"], "--series report"),
        (["--seed", "1000000"], "--series report"),
        (["--count", "0"], "count is 0"),
        (["--base-resolution", "x"], "base resolution"),
    ],
)
def test_usage_errors(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["a", "--output", "out", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("module", "expected"), [("score", True), ("posttraining", False)])
def test_help_promises_a_breakdown_by_instruction_where_there_is_one(module, expected, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(f"blip3.evaluation.{module}").parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "instruction around every short question" in text
    assert ("breakdown by instruction" in text) == expected


def test_a_missing_file_is_an_error_of_one_line(folders, tmp_path, capsys):
    line = [str(folders["before"]), "--output", str(tmp_path / "out"), "--series", "report", "--task", "none"]
    assert main([*line, "--pope", str(tmp_path), str(tmp_path)]) == 1
    assert "coco_pope_random.json" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- a model


def test_a_checkpoint_is_scored(tiny_repo, published, tmp_path):
    """The tiny model's weights are random: its answers are nonsense, but each is asked, kept and counted."""
    settings = PostTrainingSettings(
        {"tiny": tiny_repo},
        tmp_path / "out",
        RENDERED,
        published,
        world=WORLD,
        count=3,
        series="report",
        max_new_tokens=4,
        dtype="float32",
        device="cpu",
    )
    results = {result.task: result for result in score(settings)}
    assert list(results) == [*RENDERED, *published]
    for result in results.values():
        assert len(result.answers["tiny"]) == len(result.questions)
    assert values(results["pope"], "tiny")["neither yes nor no, random"] == 1


def test_tokens_of_an_image_file_are_counted_as_of_a_rendered_one(tiny_repo, tmp_path):
    model = Checkpoint(tiny_repo, max_new_tokens=4, device="cpu", dtype="float32")
    build.LAYOUTS["vlguard"](tmp_path, 2, 0, WORLD)
    settings = PostTrainingSettings(
        {"x": tiny_repo},
        tmp_path,
        (),
        {"vlguard": Files((tmp_path / "test.json",), tmp_path / "test")},
        series="report",
    )
    for question in itertools.islice(settings.sources.questions("vlguard"), 3):
        assert model.length(question) == model.prepare([question])["input_ids"].shape[1]
