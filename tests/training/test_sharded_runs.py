# SPDX-License-Identifier: Apache-2.0
"""Runs of processes that share a model, by FSDP2 or ZeRO: as one process, killed, resumed, in other numbers."""

import importlib.util
import json
import signal
import textwrap
from pathlib import Path

import pytest

from blip3.data.records import Record, Turn, write_jsonl
from blip3.training import train as stage
from blip3.training.resume import MANIFEST, resume_or_refuse
from support import load_model
from support.processes import expect_success, start
from support.training import losses_of, newest_checkpoint, tiny_recipe, weights_in, write_recipe

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
FORMS = [
    pytest.param({"fsdp": True}, id="FSDP2"),
    pytest.param({"deepspeed": "zero2"}, id="ZeRO-2", marks=needs_deepspeed),
    pytest.param({"deepspeed": "zero3"}, id="ZeRO-3", marks=needs_deepspeed),
]
STEPS = 6
TOLERANCE = 1e-5  # of a loss of about 6; seen: 5e-7 with ZeRO-3
SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from blip3.training import train

    killed_at, real_step = int(sys.argv.pop(1)), train.StageTrainer.training_step
    kinds = Path(__file__).with_name(f"kinds-{os.environ['RANK']}")

    def check_shards(recipe, engine, parameters):
        if recipe.fsdp:
            assert all(type(each).__name__ == "DTensor" for each in parameters)
            assert sum(each.to_local().numel() for each in parameters) < 0.6 * sum(each.numel() for each in parameters)
            kinds = {type(module).__name__ for module in engine.modules()}
            assert {"FSDPPhi3DecoderLayer", "FSDPSiglipEncoderLayer", "FSDPBlip3ResamplerLayer"} <= kinds, kinds
        elif recipe.deepspeed == "zero3":
            whole = sum(each.ds_numel for each in parameters)
            assert sum(each.ds_tensor.numel() for each in parameters) < 0.6 * whole
        else:
            assert engine.zero_optimization_stage() == 2

    def training_step(self, model, inputs, *arguments, **options):
        if self.state.global_step == killed_at and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        check_shards(self.recipe, self.model_wrapped, list(self.model.parameters()))
        with kinds.open("a") as file:
            file.write("i" if "pixel_values" in inputs else "t")
        return real_step(self, model, inputs, *arguments, **options)

    train.StageTrainer.training_step = training_step
    train.main()
    assert not torch.distributed.is_initialized(), "its threads would outlive Python"
"""


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> list[dict]:
    """Samples without, with one and with several images of several shapes."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    turns = [(Turn("user", f"What follows {n}?"), Turn("assistant", f"It is {n + 1}.")) for n in range(8)]
    write_jsonl((Record(f"t{n}", "instruction", (), each) for n, each in enumerate(turns)), path)
    return [{"rendered": "name"}, {"rendered": "compare"}, {"records": str(path), "weight": 2}]


@pytest.fixture(scope="module")
def straight(small_model, mixture, tmp_path_factory) -> Path:
    """The folder of a run in one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    stage.train(tiny_recipe(folder / "run.yaml", small_model, mixture=mixture, max_steps=STEPS))
    return folder / "run"


def launch(path: Path, processes: int = 2, killed_at: int = -1, launcher: tuple = ()):
    """Start a run of several processes that talk through gloo."""
    script = path.with_name("sharded.py")
    script.write_text(textwrap.dedent(SCRIPT))
    launcher = launcher or ("torch.distributed.run", "--standalone", "--nproc_per_node", processes)
    return start("-m", *launcher, script, killed_at, path, modules=path.parent / "modules")


def kinds_of(path: Path) -> list[str]:
    return [path.with_name(f"kinds-{rank}").read_text() for rank in (0, 1)]


@pytest.mark.parametrize("form", FORMS)
def test_shards_train_as_one_process_and_a_killed_run_resumes(form, straight, small_model, mixture, tmp_path):
    path = write_recipe(tmp_path / "run.yaml", small_model, mixture=mixture, max_steps=STEPS, batch_size=2, **form)
    process = launch(path, killed_at=4)
    output = process.communicate(timeout=600)[0]
    assert process.returncode != 0
    assert str(-signal.SIGKILL) in output
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-3", output[-4000:]
    first, other = kinds_of(path)
    assert "i" in first
    assert any(a != b for a, b in zip(first, other, strict=False)), f"text on one side alone: {first}, {other}"

    expect_success(launch(path))
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(straight), abs=TOLERANCE)
    found, expected = (weights_in(folder / "final") for folder in (tmp_path / "run", straight))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().mean() < 1e-4, name  # Adam enlarges rounding
    load_model(tmp_path / "run" / "final")


@needs_deepspeed
def test_accelerate_launch_starts_the_same_run(straight, small_model, mixture, tmp_path):
    settings = {"mixture": mixture, "max_steps": STEPS, "batch_size": 2, "deepspeed": "zero3"}
    path = write_recipe(tmp_path / "run.yaml", small_model, **settings)
    launcher = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1)
    expect_success(launch(path, launcher=(*launcher, "--mixed_precision", "no", "--dynamo_backend", "no")))
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(straight), abs=TOLERANCE)


@pytest.mark.slow
def test_a_sharded_run_resumes_in_another_number_of_processes(small_model, mixture, tmp_path):
    common = {"mixture": mixture, "max_steps": 4, "save_every": 2, "batch_size": 1}
    stage.train(tiny_recipe(tmp_path / "one.yaml", small_model, **common, accumulation=6))
    path = write_recipe(tmp_path / "run.yaml", small_model, **common, accumulation=3, fsdp=True)
    assert launch(path, killed_at=3).wait(timeout=600) != 0
    assert json.loads((tmp_path / "run" / "checkpoint-2" / MANIFEST).read_text())["processes"] == 2
    write_recipe(path, small_model, **common, accumulation=2, fsdp=True)
    expect_success(launch(path, processes=3))
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "one"), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({}, 2, r"of 1 processes with accumulation 2, and now there are 2 with 2; .* times accumulation stay 2"),
        ({"accumulation": 1, "batch_size": 2}, 2, r"batch_size was 4, and now it is 2"),
        ({"accumulation": 1}, 1, r"accumulation was 2, and now it is 1"),
    ],
)
def test_other_numbers_of_processes_need_the_same_samples_a_step(
    small_model, tmp_path, monkeypatch, changes, processes, message
):
    common = {"max_steps": 1, "save_every": 1, "accumulation": 2}
    stage.train(tiny_recipe(tmp_path / "run.yaml", small_model, **common))
    recipe = tiny_recipe(tmp_path / "run.yaml", small_model, **(common | changes))
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ValueError, match=message):
        resume_or_refuse(recipe)
    monkeypatch.setenv("WORLD_SIZE", "2")
    fits = tiny_recipe(tmp_path / "run.yaml", small_model, **(common | {"accumulation": 1}))
    assert resume_or_refuse(fits).endswith("checkpoint-1")
