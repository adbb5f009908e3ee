# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a GPU, on the CPU at sizes whose times mean nothing: every part runs, and a stop loses nothing."""

import json
import os
import re
import signal
import time
from multiprocessing import parent_process
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from blip3.benchmarks import candidates, clock, generation, gpu, gpu_child, gpu_parts, gpu_report, memory_child
from blip3.benchmarks.bench import Bench
from blip3.benchmarks.candidates import LLAVA, OURS, QUICK
from blip3.benchmarks.clock import Comparison, Effort
from blip3.benchmarks.generation import COMPILED, EAGER, STATIC
from blip3.benchmarks.gpu_parts import BY_REGION, PARTS, WINDOW
from blip3.benchmarks.regions import Regions
from blip3.benchmarks.run import RESULTS
from support import ROOT

PAGE = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## On a GPU")[1]
QUICKLY = ["--device", "cpu", "--quick", "--threads", "1", "--minutes", "60"]


def bench_of(**changes):
    settings = {"device": "cpu", "sizes": QUICK, "effort": Effort(rounds=1, seconds=0.1), "threads": 1, "rates": {}}
    return Bench(**{**settings, "say": lambda line: None, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of a whole quick run."""
    folder = tmp_path_factory.mktemp("gpu")
    assert gpu.main([*QUICKLY, "--output", str(folder)]) == 0
    return folder


def results_of(folder):
    return json.loads((folder / gpu.NAME).read_text())


@pytest.mark.slow
def test_every_part_and_step_is_measured(folder):
    results = results_of(folder)
    assert list(results["parts"]) == list(PARTS)
    for name, part in results["parts"].items():
        assert list(part["steps"]) == list(PARTS[name].steps(bench_of()))
        for step, found in part["steps"].items():
            assert found["error"] == "", (name, step)
            assert found["seconds"] >= 0
            assert any(row["values"] for row in found["comparisons"]), (name, step)
    assert results["machine"]["packages"]["torch"]
    assert results["sizes"]["name"] == "quick"
    assert str(ROOT) not in json.dumps(results)


@pytest.mark.slow
def test_every_target_finds_what_it_measures(folder):
    """A renamed comparison would silently be "not measured"."""
    scored = gpu_report.compare_with_targets(results_of(folder))
    missing = [target["what"] for target in scored if target["result"] is None]
    # a quick run compiles once, has batches of 1 and 4, and small images
    assert all(re.search(r"compiled|batch 16|1920x1080", what) for what in missing), missing
    measured = [target["what"] for target in scored if target["result"]]
    assert any("batch 1, compiled by region, share of the rate" in what for what in measured)
    assert len(measured) >= 15


def test_true_sizes_have_a_row_for_every_target():
    steps = PARTS["generation"].steps(bench_of(sizes=candidates.TRUE, device="cuda"))
    modes = (EAGER, STATIC, COMPILED, BY_REGION)
    wanted = [gpu_parts.token_name(mode, batch) for mode in modes for batch in (1, 4, 16)]
    wanted += [gpu_parts.prefill_name(batch) for batch in (1, 4, 16)] + [gpu_parts.token_name(WINDOW, 1)]
    assert set(steps) == set(wanted)
    assert list(steps)[:4] == [*wanted[:1], wanted[9], wanted[6], gpu_parts.prefill_name(4)], "targets come first"
    images = PARTS["images"].steps(bench_of(sizes=candidates.TRUE, device="cuda"))
    assert gpu_parts.image_name((1080, 1920), 8) in images
    without = PARTS["generation"].steps(bench_of(sizes=candidates.TRUE, device="cuda", compiles=False))
    assert set(without) == {name for name in wanted if "compiled" not in name}


@pytest.mark.slow
def test_a_second_run_measures_nothing_again(folder, capfd):
    before = (folder / gpu.NAME).read_bytes()
    assert gpu.main([*QUICKLY, "--output", str(folder)]) == 0
    assert (folder / gpu.NAME).read_bytes() == before
    printed = capfd.readouterr().out
    assert printed.count("measured before") == len(PARTS)
    assert "| first token, one image, batch 1, eager, LLaVA-NeXT takes | at least 3x | " in printed
    assert re.search(r"\d+ of \d+ targets met, \d+ not measured", printed)


@pytest.mark.slow
def test_again_measures_one_part_anew(folder):
    before = results_of(folder)["parts"]
    assert gpu.main([*QUICKLY, "--part", "rates", "--again", "--output", str(folder)]) == 0
    after = results_of(folder)["parts"]
    assert after["rates"]["steps"]["rates"]["comparisons"] != before["rates"]["steps"]["rates"]["comparisons"]
    assert after["images"] == before["images"]


@pytest.mark.slow
def test_the_page_is_filled_between_its_marks_only(folder, tmp_path):
    page = tmp_path / "speed.md"
    page.write_text(PAGE)
    assert gpu_report.update_speed_page(folder / gpu.NAME, page)
    filled = page.read_text()
    assert "sizes `quick`" in filled
    assert not gpu_report.update_speed_page(folder / gpu.NAME, page), "the second time nothing changes"
    strip = re.compile(r"<!-- benchmarks:gpu:\w+ -->.*?<!-- end -->", flags=re.DOTALL)
    assert strip.sub("", filled) == strip.sub("", PAGE)


# -- stops, errors and crashes ----------------------------------------------------------------------------------------


def misbehave(task, pipe):
    """Stands in for `measure_part` in the process of a part: memory crashes once, images never end."""
    for step in task.steps:
        pipe.send({"step": step})
        pipe.send({"step": step, "comparison": Comparison(f"row of {step}", "s", {"ours": [1.0]}).to_json()})
        if step == "prefill, 1 image":
            os._exit(9)
        if task.part == "images":
            Path(os.environ["BLIP3_TEST_FOLDER"], "time is over").touch()
            time.sleep(600)
        pipe.send({"step": step, "seconds": 1.0, "error": ""})


@pytest.fixture
def misbehaving(monkeypatch, tmp_path):
    """Parts that misbehave, and a clock that jumps to the end when the last of them has begun."""
    sign = tmp_path / "time is over"
    monkeypatch.setenv("BLIP3_TEST_FOLDER", str(tmp_path))
    monkeypatch.setattr(gpu, "measure_part", misbehave)
    monkeypatch.setattr(
        gpu, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + (1e6 if sign.exists() else 0.0))
    )


@pytest.mark.slow
def test_what_fails_is_noted_and_the_rest_goes_on(misbehaving, tmp_path, capfd):
    names = ["memory", "images"]
    parts = [word for name in names for word in ("--part", name)]
    assert gpu.main([*QUICKLY, "--output", str(tmp_path), *parts]) == 1
    steps = {name: part["steps"] for name, part in results_of(tmp_path)["parts"].items()}
    assert list(steps) == names
    first, *others = steps["memory"].values()
    assert first["error"] == f"{gpu.CRASHED} 9"
    assert first["comparisons"], "what was measured before the crash is kept"
    assert others
    assert all(step["error"] == "" and step["seconds"] == 1.0 for step in others), "another process took them on"
    first, *others = steps["images"].values()
    assert (first["error"], len(first["comparisons"])) == (gpu.STOPPED, 1)
    assert all((step["error"], step["comparisons"]) == (gpu.STOPPED, []) for step in others)
    printed = capfd.readouterr().out
    assert "not complete: memory, prefill, 1 image: its process ended with status 9" in printed
    assert f"not complete: images, {next(iter(steps['images']))}: {gpu.STOPPED}" in printed


@pytest.mark.slow
def test_a_signal_loses_nothing_and_the_same_command_continues(tmp_path, capfd, monkeypatch):
    arguments = [*QUICKLY, "--output", str(tmp_path), "--part", "training"]
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(gpu, "measure_part", stop_the_parent)
    assert gpu.main(arguments) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    steps = results_of(tmp_path)["parts"]
    assert steps["training"]["steps"]["adapters"]["comparisons"]
    assert steps["training"]["steps"]["adapters"]["error"] == ""
    assert steps["training"]["steps"]["all weights"]["error"] == gpu.STOPPED
    assert "the same command continues" in capfd.readouterr().out
    monkeypatch.setattr(gpu, "measure_part", behave)
    assert gpu.main(arguments) == 0
    assert results_of(tmp_path)["parts"]["training"]["steps"]["all weights"]["error"] == ""
    assert results_of(tmp_path)["parts"]["training"]["steps"]["adapters"] == steps["training"]["steps"]["adapters"]


def behave(task, pipe):
    """Measures every step."""
    for step in task.steps:
        pipe.send({"step": step, "seconds": 1.0, "error": ""})


def stop_the_parent(task, pipe):
    """Measures the first step, then has the benchmark told to stop."""
    step = task.steps[0]
    pipe.send({"step": step})
    pipe.send({"step": step, "comparison": Comparison("row", "s", {"ours": [1.0]}).to_json()})
    pipe.send({"step": step, "seconds": 1.0, "error": ""})
    time.sleep(1)
    os.kill(parent_process().pid, signal.SIGTERM)
    time.sleep(600)


def test_a_step_that_raises_does_not_end_its_process(monkeypatch):
    sent = []

    def raising():
        raise torch.OutOfMemoryError("no memory")

    def steps(bench):
        measure = lambda: bench.compare("fine", {OURS: lambda: {"s": 1.0}}, {"s": ("", "s", 1.0)})  # noqa: E731
        return {"bad": raising, "good": measure}

    monkeypatch.setitem(PARTS, "images", gpu_parts.Part("", 1, steps))
    task = gpu_child.Task("images", ["bad", "good"], "cpu", "quick", Effort(rounds=1, seconds=0.1), False, 1)
    gpu_child.measure_part(task, SimpleNamespace(send=sent.append))
    assert [message["step"] for message in sent] == ["bad", "bad", "good", "good", "good", "good"]
    assert sent[1]["error"].splitlines()[0] == "torch.OutOfMemoryError: no memory"
    assert "Traceback" in sent[1]["error"]
    assert sent[3]["comparison"]["values"] == {OURS: [1.0]}
    assert sent[-1]["error"] == ""


# -- what a GPU would do ----------------------------------------------------------------------------------------------


@pytest.fixture
def synchronized(monkeypatch):
    """Notes when the accelerator is waited for."""
    events = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: events.append("wait"))
    return events


def test_clocks_wait_for_the_accelerator_before_and_after(synchronized):
    clock.timed(lambda: synchronized.append("work"), "cuda")()
    assert synchronized == ["wait", "work", "wait"]
    synchronized.clear()
    clock.timed(lambda: synchronized.append("work"), "cpu")()
    assert synchronized == ["work"]


def test_every_token_is_waited_for(synchronized):
    model = candidates.build(OURS, QUICK, "float32", "cpu")
    generation.time_generation(model, candidates.make_inputs(OURS, QUICK, [1], "cpu", "float32"), 3, "cuda")
    assert len(synchronized) == 1 + 3, "once at the start, then for each token"


def test_memory_on_a_gpu_is_what_torch_allocated(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    peak = memory_child.Peak("cuda")
    peak.start()
    assert calls == ["reset"]
    assert peak.stop()["own_bytes"] == 2 * 2**20


@pytest.mark.parametrize("kind", [OURS, LLAVA])
def test_layers_of_a_kind_share_one_compilation(kind):
    """More decoder layers than torch would compile one by one; the logits stay, and so does the model."""
    graphs = {}
    for num_layers in (2, 10):
        sizes = candidates.Sizes(**{**vars(QUICK), "text_layers": num_layers})
        model = candidates.build(kind, sizes, "float32", "cpu")
        inputs = candidates.make_inputs(kind, sizes, [1], "cpu", "float32")
        expected = candidates.prefill(model, inputs)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        regions = Regions(model, backend="eager")
        with regions.used():
            found = candidates.prefill(model, inputs)
            graphs[num_layers] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            candidates.prefill(model, inputs)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs[num_layers]
        torch.testing.assert_close(found.logits, expected.logits)
        for name in ("keys", "values"):
            pairs = zip(cache_of(found).layers, cache_of(expected).layers, strict=True)
            assert all(torch.allclose(getattr(ours, name), getattr(theirs, name), atol=1e-5) for ours, theirs in pairs)
        layers = model.model.language_model.layers
        assert [layer.self_attn.layer_idx for layer in layers] == list(range(num_layers))
        assert all("forward" not in vars(layer) for layer in layers)
    assert 0 < graphs[2] == graphs[10]


def cache_of(outputs):
    return outputs["past_key_values" if "past_key_values" in outputs else "cache"]


def test_compiled_models_have_no_window_to_count():
    models = gpu_parts.Models(bench_of())
    inputs = bench_of().inputs(OURS, "bfloat16", [1])
    static = generation.cache_options(STATIC, True)
    for has_window in (True, False):
        model = models.get(OURS, has_window=has_window)
        outputs = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True, do_sample=False, **static)
        assert {layer.is_sliding for layer in cache_of(outputs).layers} == {has_window}


# -- options and documentation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu"], "without --quick"),
        (["--device", "cpu", "--quick", "--update-docs"], "times mean nothing"),
        (["--device", "cpu", "--quick", "--minutes", "0"], "--minutes is 0"),
        (["--device", "cpu", "--quick", "--only-report"], "is not there"),
        (["--device", "cpu", "--quick", "--threads", "4096"], "threads were asked for"),
    ],
)
def test_bad_options_are_refused(options, message, tmp_path, capsys):
    assert gpu.main([*options, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / gpu.NAME).exists()


def test_results_of_another_machine_are_not_mixed(tmp_path, capsys):
    other = {"machine": {"processor": "other"}, "sizes": {"name": "4B"}, "effort": {}, "parts": {}}
    (tmp_path / gpu.NAME).write_text(json.dumps(other))
    arguments = ["--device", "cpu", "--quick", "--output", str(tmp_path)]
    assert gpu.main([*arguments, "--part", "rates"]) == 2
    assert "another machine" in capsys.readouterr().err
    assert results_of(tmp_path) == other


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert "CUDA build" in capsys.readouterr().err


def test_the_documentation_names_every_part_and_only_real_options(capsys):
    table = dict(re.findall(r"^\| `(\w+)` \| (\d+) s \|", SECTION, flags=re.MULTILINE))
    assert table == {name: str(part.seconds) for name, part in PARTS.items()}
    assert sum(part.seconds for part in PARTS.values()) == 60 * gpu.MINUTES
    with pytest.raises(SystemExit):
        gpu.main(["--help"])
    usage = capsys.readouterr().out
    commands = "\n".join(line for line in SECTION.splitlines() if "benchmarks.gpu" in line)
    assert set(re.findall(r"--[a-z][a-z-]+", commands)) <= set(re.findall(r"--[a-z][a-z-]+", usage))


def test_the_documentation_says_what_the_results_say():
    path = RESULTS / gpu.NAME
    results = gpu_report.read_results(path) if path.is_file() else {"parts": {}}
    table = "\n".join(gpu_report.targets_table(gpu_report.compare_with_targets(results)))
    assert f"<!-- benchmarks:gpu:targets -->\n{table}\n<!-- end -->" in PAGE
