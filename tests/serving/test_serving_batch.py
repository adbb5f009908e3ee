# SPDX-License-Identifier: Apache-2.0
"""Batch inference on Ray Data: every image gets one line, whatever happens on the way."""

import hashlib
import io
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from blip3.jobs.inputs import plan_rows, read_unit
from blip3.serving import batch
from support import ROOT, render_image
from support.exif import FORMATS, turned_and_upright

pytest.importorskip("ray.data", reason="batches run on Ray: pip install 'ray[data]'")
psutil = pytest.importorskip("psutil", reason="finds the processes of a run: pip install psutil")
pyarrow = pytest.importorskip("pyarrow", reason="ray[data] brings it")
parquet = pytest.importorskip("pyarrow.parquet", reason="ray[data] brings it")

QUESTION, NEW_TOKENS = "What is in the image?", 24
SIZES = [(150, 150), (60, 300), (200, 90), (40, 40), (300, 420), (77, 99), (120, 360), (30, 20)]
BROKEN = {"cut.jpg": "truncated", "empty.jpg": "0 bytes", "words.jpg": "12 bytes"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images, three of them broken and one in a folder below, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "below").mkdir()
    for index, size in enumerate(SIZES):
        render_image(*size, seed=index).save(folder / f"{index}.{'png' if index % 2 else 'jpg'}")
    render_image(90, 120, seed=50).save(folder / "below" / "nine.webp")
    whole = (folder / "4.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "words.jpg").write_text("not an image", encoding="utf-8")
    (folder / "notes.txt").write_text("kept out", encoding="utf-8")
    return folder


@pytest.fixture
def arguments(tiny_repo, images, tmp_path) -> dict[str, object]:
    """The options of a run on the folder."""
    names = ("--model", "--input", "--output", "--question", "--max-new-tokens", "--batch-size")
    return dict(zip(names, (tiny_repo, images, tmp_path / "out", QUESTION, NEW_TOKENS, 1), strict=True))


@pytest.fixture
def settings(tiny_repo, images, tmp_path) -> batch.BatchSettings:
    return batch.BatchSettings(tiny_repo, images, tmp_path / "out", QUESTION, max_new_tokens=NEW_TOKENS)


def words(arguments: dict[str, object]) -> list[str]:
    return [str(word) for pair in arguments.items() for word in pair]


def command(arguments: dict[str, object]) -> list[str]:
    return [sys.executable, "-m", "blip3.serving.batch", *words(arguments)]


def run(arguments: dict[str, object], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command(arguments), capture_output=True, text=True, timeout=300, cwd=folder, check=False)


def lines_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / batch.ANSWERS).read_text(encoding="utf-8").split("\n")[:-1]]


def ask(model, processor, image, question: str) -> str:
    """One image on its own, as the README does it."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def kill_after_first_line(arguments: dict[str, object], folder: Path) -> None:
    """Start a run and kill it with SIGKILL as soon as it has written something; its workers must end with it."""
    with (folder / "killed.log").open("wb") as log:
        process = subprocess.Popen(command(arguments), stdout=log, stderr=log, cwd=folder)
    answers, deadline = Path(arguments["--output"]) / batch.ANSWERS, time.monotonic() + 240
    while not (answers.is_file() and answers.stat().st_size):
        assert process.poll() is None, (folder / "killed.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    started = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in started if "MapWorker" in child.name()]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    alive = [worker for worker in workers if is_alive(worker)]
    for child in filter(is_alive, started):  # Ray's own helpers, which hold no model, may take a minute
        child.kill()
    assert len(workers) == 2
    assert not alive


def is_alive(process: object) -> bool:
    """Whether a process still runs; in a container its parent may never collect it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_killed_run_continues_and_every_image_gets_one_line(arguments, images, tiny_model, processor, tmp_path):
    kill_after_first_line(arguments, tmp_path)
    output = arguments["--output"]
    with (output / batch.ANSWERS).open("ab") as file:  # a line that was half on the disk
        file.write(b'{"id": "half')
    finished = [json.loads(line) for line in (output / batch.ANSWERS).read_bytes().split(b"\n")[:-1]]
    assert 0 < len(finished) < 12

    again = run({**arguments, "--batch-size": 4}, tmp_path)  # batches may differ, answers may not
    assert again.returncode == 0, again.stderr
    assert f"Done: {12 - len(finished)} of 12 rows" in again.stdout
    assert f"{len(finished)} done earlier; 1 files are no images" in again.stdout
    assert "rows/s" in again.stdout
    assert "12/12" in again.stderr  # the progress bar
    rows = lines_of(output)
    assert rows[: len(finished)] == finished
    assert sorted(row["id"] for row in rows) == sorted(
        path.relative_to(images).as_posix() for path in images.rglob("*.*") if path.suffix != ".txt"
    )
    for row in rows:
        assert list(row) == ["id", "question", "answer", "error"]
        assert row["question"] == QUESTION
        if row["id"] in BROKEN:
            assert row["answer"] is None
            assert BROKEN[row["id"]] in row["error"]
            assert row["error"].endswith(".")
            assert str(images) not in row["error"]
            assert "0x" not in row["error"]
        else:
            assert row["error"] is None
            assert row["answer"] == ask(tiny_model, processor, str(images / row["id"]), QUESTION)

    before = (output / batch.ANSWERS).read_bytes()
    third = batch.run_batch(batch.parse_args(words(arguments)))  # nothing is missing: Ray is not started
    assert (third.rows, third.done, third.earlier) == (12, 0, 12)
    assert (output / batch.ANSWERS).read_bytes() == before


def write_parquet(folder: Path, images: Path) -> list[dict]:
    """Two parquet files: bytes, a struct as `datasets` writes it; each with row groups of three."""
    names = ["0.jpg", "1.png", "2.jpg", "cut.jpg", "3.png", "4.jpg", "5.png"]
    rows = []
    for index, name in enumerate(names):
        question = None if index == 1 else f"How many are there in number {index}?"
        rows.append({"key": 100 + index, "image": (images / name).read_bytes(), "ask": question})
    rows.append({"key": 107, "image": None, "ask": "What is missing?"})
    rows.append({"key": 108, "image": rows[0]["image"], "ask": "Where is <image>?"})
    folder.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows[:5]), folder / "a.parquet", row_group_size=3)
    structs = [{**row, "image": {"bytes": row["image"], "path": "unused.jpg"}} for row in rows[5:]]
    structs[2]["image"] = None
    parquet.write_table(pyarrow.Table.from_pylist(structs), folder / "b.parquet", row_group_size=3)
    return rows


def test_parquet_with_a_question_for_each_row(arguments, images, tiny_model, processor, tmp_path):
    expected = write_parquet(tmp_path / "rows", images)
    columns = {"--id-column": "key", "--question-column": "ask", "--input": tmp_path / "rows", "--batch-size": 4}
    done = run(arguments | columns, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Done: 9 of 9 rows, 3 of them errors" in done.stdout
    rows = {row["id"]: row for row in lines_of(arguments["--output"])}
    assert sorted(rows) == [row["key"] for row in expected]
    for row in expected:
        answered = rows[row["key"]]
        assert answered["question"] == (row["ask"] or QUESTION)
        if row["key"] not in (103, 107, 108):
            image = io.BytesIO(row["image"])
            assert answered["answer"] == ask(tiny_model, processor, image, answered["question"])
    assert "truncated" in rows[103]["error"]
    assert rows[107]["error"] == "The row has no image."
    assert "<image>" in rows[108]["error"]


@pytest.mark.parametrize(
    ("option", "value"), [("--question", "Why?"), ("--max-new-tokens", 3), ("--dtype", "bfloat16"), ("--input", ROOT)]
)
def test_answers_of_two_kinds_are_not_mixed(arguments, settings, capsys, option, value):
    with batch.open_output(settings) as answers:
        answers.append(['{"id": "0.jpg"}'])
    before = (settings.output / batch.ANSWERS).read_bytes()
    assert batch.main(words(arguments | {option: value})) == 1
    assert "name another output" in capsys.readouterr().err.replace("\n", " ")
    assert (settings.output / batch.ANSWERS).read_bytes() == before


def test_another_model_is_refused(settings, unfused_repo):
    with batch.open_output(settings) as answers:
        answers.append(['{"id": "0.jpg"}'])
    with pytest.raises(ValueError, match="holds answers with model"):
        batch.open_output(batch.dataclasses.replace(settings, model=unfused_repo))


def test_answers_of_a_former_version_are_continued(settings, unfused_repo):
    """A manifest and answers as they were written when batches had a fingerprint of their own."""
    digest = hashlib.sha256()
    for path in sorted(settings.model.iterdir()):
        if path.suffix in (".jinja", ".json", ".model", ".py", ".safetensors"):
            data = path.read_bytes()
            digest.update(f"{path.name} {len(data)}\n".encode() + data[: 2**20] + data[-(2**20) :])
    compared = {
        "question": QUESTION,
        "question_column": None,
        "image_column": "image",
        "id_column": None,
        "engine": "transformers",
        "max_new_tokens": NEW_TOKENS,
        "dtype": "auto",
        "input": str(settings.input.resolve()),
        "model": f"sha256:{digest.hexdigest()[:32]}",
    }
    manifest = {"settings": compared, "made_with": {"model": str(settings.model), "torch": "2.9.0"}}
    settings.output.mkdir()
    (settings.output / batch.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    (settings.output / batch.ANSWERS).write_text('{"id": "0.jpg", "question": "a", "answer": "b", "error": null}\n')
    with batch.open_output(settings) as answers:
        assert answers.done == {'"0.jpg"'}
    with pytest.raises(ValueError, match="holds answers with model"):
        batch.open_output(batch.dataclasses.replace(settings, model=unfused_repo))


def test_answers_that_are_in_use_damaged_or_foreign_are_refused(settings):
    with batch.open_output(settings) as answers:
        with pytest.raises(ValueError, match="another process"):
            batch.open_output(settings)
        answers.append(['{"id": 1}', '{"answer": 2}', '{"id": 3}'])
    with pytest.raises(ValueError, match="Line 2 of"):
        batch.open_output(settings)
    (settings.output / batch.MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        batch.open_output(settings)


def test_paths_in_parquet_are_beside_it(settings, images, tmp_path, processor):
    table = pyarrow.Table.from_pylist([{"image": "0.jpg"}, {"image": "gone.jpg"}])
    parquet.write_table(table, images / "paths.parquet")
    try:
        plan = plan_rows(images / "paths.parquet", ())
        (rows,) = read_unit(plan.units[0], 8)
    finally:
        (images / "paths.parquet").unlink()
    engine = types.SimpleNamespace(
        prepare=lambda image, question: (image, question), generate=lambda rows: [f"{len(rows[0][0])}"]
    )
    first, second = [json.loads(line) for line in batch.RowAnswerer(settings, engine)(rows)["line"].to_pylist()]
    assert first["answer"] == str((images / "0.jpg").stat().st_size)
    assert second["error"] == "The file 'gone.jpg' could not be read (no such file)."


@pytest.mark.parametrize(
    "change",
    [
        {"engine": "x"},
        {"dtype": "int4"},
        {"workers": 0},
        {"batch_size": 0},
        {"question": " "},
        {"num_gpus_per_worker": 2},
        {"num_gpus_per_worker": -1},
        {"num_gpus_per_worker": 1.5, "engine": "vllm"},
    ],
)
def test_settings_that_cannot_work_are_refused(settings, change):
    with pytest.raises(ValueError, match=r"It (was|is) probably"):
        batch.dataclasses.replace(settings, **change)


def test_a_folder_without_a_model_is_refused_before_ray_starts(arguments, tmp_path, capsys):
    assert batch.main(words(arguments | {"--model": tmp_path})) == 1
    assert "no config.json" in capsys.readouterr().err


def test_names_that_are_no_text_survive(settings):
    name = os.fsdecode(b"\xe9t\xe9 \xff.jpg")
    rows = [{"id": name, "answer": "Là."}, {"id": "plain", "answer": "Là."}]
    table = batch.line_table(rows, [False, True]).to_pylist()
    assert [json.loads(row["line"].encode("utf-8")) for row in table] == rows
    assert [json.loads(row["id"]) for row in table] == [name, "plain"]
    assert [row["num_errors"] for row in table] == [0, 1]
    assert "Là." in table[1]["line"]


def test_a_batch_that_does_not_fit_is_halved(settings, images, tiny_repo, monkeypatch):
    engine = batch.TransformersEngine(batch.dataclasses.replace(settings, dtype="float32"))
    prepared = [engine.prepare((images / name).read_bytes(), QUESTION) for name in ("0.jpg", "1.png", "2.jpg")]
    model, seen = engine.answerer.model, []
    whole, generate = engine.generate(prepared), model.generate

    def with_little_memory(**inputs: object) -> torch.Tensor:
        seen.append(len(inputs["input_ids"]))
        if seen[-1] > 1:
            raise torch.OutOfMemoryError
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", with_little_memory)
    assert engine.generate(prepared) == whole
    assert seen == [3, 1, 2, 1, 1]


def test_a_prompt_longer_than_the_context_is_an_error_of_its_row(settings, images):
    engine = batch.TransformersEngine(settings)
    with pytest.raises(ValueError, match=r"^The prompt takes \d+ tokens and its answer up to 24 .* the model reads"):
        engine.prepare((images / "0.jpg").read_bytes(), "Why? " * 5000)


@pytest.mark.parametrize("file_format", FORMATS)
def test_files_stored_turned_are_read_upright(settings, file_format):
    engine = batch.TransformersEngine(settings)
    inputs = [engine.prepare(data, QUESTION) for data in turned_and_upright(file_format)]
    for name in ("input_ids", "pixel_values", "image_sizes"):
        assert torch.equal(inputs[0][name], inputs[1][name]), name


def test_an_input_that_does_not_exist_is_named_in_one_line(arguments, tmp_path, capsys):
    assert batch.main(words(arguments | {"--input": tmp_path / "nowhere"})) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "no such file or folder" in message
    assert message.count("\n") == 1


def test_requests_to_vllm(settings, images, processor, monkeypatch):
    made = {}

    class FakeLLM:
        def __init__(self, **options: object):
            made["options"] = options

        def generate(self, requests: list[dict], sampling: object, use_tqdm: bool) -> list:
            made["sampling"] = sampling
            answers = [f" {request['multi_modal_data']['image'].size} " for request in requests]
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(text=answer)]) for answer in answers]

    fake = types.SimpleNamespace(LLM=FakeLLM, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    engine = batch.VllmEngine(batch.dataclasses.replace(settings, engine="vllm", num_gpus_per_worker=2))
    assert made["options"]["trust_remote_code"] is True
    assert made["options"]["limit_mm_per_prompt"] == {"image": 1}
    assert made["options"]["tensor_parallel_size"] == 2
    request = engine.prepare((images / "1.png").read_bytes(), QUESTION)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    assert request["prompt"] == processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert engine.generate([request]) == ["(300, 60)"]
    assert made["sampling"] == {"temperature": 0, "max_tokens": NEW_TOKENS}
    turned, upright = turned_and_upright()
    opened = [engine.prepare(data, QUESTION)["multi_modal_data"]["image"] for data in (turned, upright)]
    assert opened[0].tobytes() == opened[1].tobytes()
    for name in BROKEN:
        with pytest.raises(ValueError, match="could not be"):
            engine.prepare((images / name).read_bytes(), QUESTION)
    with pytest.raises(ValueError, match="but the model reads"):
        engine.prepare((images / "1.png").read_bytes(), "Why? " * 5000)


def test_vllm_that_is_not_installed_is_named(arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(batch.importlib.util, "find_spec", lambda name: None if name == "vllm" else object())
    assert batch.main(words(arguments | {"--engine": "vllm"})) == 1
    assert "pip install vllm" in capsys.readouterr().err


def test_a_row_that_is_never_opened_has_its_line(settings):
    answerer = batch.RowAnswerer(settings, types.SimpleNamespace())
    row = {"id": '"a.tar:7"', "kind": "bytes", "image": b"", "question": '"Why?"'}
    assert answerer.refuse(row, "It died.") == {
        "id": "a.tar:7",
        "question": "Why?",
        "answer": None,
        "error": "It died.",
    }
    assert answerer.refuse({**row, "question": "null"}, "It died.")["question"] == QUESTION
