# SPDX-License-Identifier: Apache-2.0
"""Runs that read shards of an object store: the same samples in any number of processes, also after a kill."""

import json
import textwrap
from pathlib import Path

import pytest

from blip3.training.mixture import mixture_of
from blip3.training.recipe import Recipe, load_recipe
from blip3.world import build
from blip3.world.settings import settings_from
from blip3.world.tasks import rendered_record
from support import object_store
from support.processes import expect_success, start
from support.training import WORLD, write_recipe

STEPS, SAVED_AT, PER_STEP = 6, 3, 6  # samples
SCRIPT = """
    import json, os, signal, sys
    from pathlib import Path
    import torch
    from blip3.training import mixture, train

    killed_at, asked = int(sys.argv.pop(1)), Path(__file__).with_name(f"asked-{os.environ['RANK']}")
    real_get, real_step = mixture.Mixture.__getitem__, train.StageTrainer.training_step

    def get(self, index):
        record = real_get(self, index)
        with asked.open("a") as file:
            file.write(json.dumps([index, record.id]) + "\\n")
        return record

    def training_step(self, *arguments, **options):
        if self.state.global_step == killed_at and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return real_step(self, *arguments, **options)

    mixture.Mixture.__getitem__, train.StageTrainer.training_step = get, training_step
    train.main()
    assert not torch.distributed.is_initialized(), "its threads would outlive Python"
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Six parquet files of five captions."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("shards")
    image = build.encode(rendered_record("caption", settings=settings_from(WORLD)).images[0], "png")
    for shard in range(6):
        rows = [{"uid": f"{shard}{n}", "image": image, "caption": f"Number {n}."} for n in range(5)]
        Dataset.from_list(rows).to_parquet(str(folder / f"{shard}.parquet"))
    return folder


def recipe_for(folder: Path, model: Path, url: str, processes: int) -> Path:
    stream = {"stream": f"{url}/*.parquet", "reader": "captions", "shuffle": 4, "lanes": 6}
    settings = {"mixture": [stream, {"rendered": "caption"}], "max_steps": STEPS, "save_every": SAVED_AT}
    return write_recipe(folder / "run.yaml", model, **settings, batch_size=1, accumulation=PER_STEP // processes)


def run(path: Path, processes: int, killed_at: int) -> list[dict[int, str]]:
    """Train in several processes, and give what each asked the mixture for: index -> id."""
    script = path.with_name("read.py")
    script.write_text(textwrap.dedent(SCRIPT))
    for file in path.parent.glob("asked-*"):
        file.unlink()
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", processes)
    process = start("-m", *launcher, script, killed_at, path, modules=path.parent / "modules")
    if killed_at < 0:
        expect_success(process)
    else:
        assert process.communicate(timeout=600)
        assert process.returncode != 0
    lines = [path.with_name(f"asked-{rank}").read_text().splitlines() for rank in range(processes)]
    return [dict(json.loads(line) for line in own) for own in lines]


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_share_the_samples_of_one_and_resume_after_a_kill(shards, small_model, tmp_path, processes):
    path = recipe_for(tmp_path, small_model, f"file://{shards}", processes)
    count = STEPS * PER_STEP
    alone = mixture_of(load_recipe(path, Recipe), count)
    expected = {index: alone[index].id for index in range(count)}
    assert list(expected.values()) != sorted(expected.values())

    before = run(path, processes, killed_at=SAVED_AT + 1)
    assert {index for own in before for index in own} >= set(range((SAVED_AT + 1) * PER_STEP))
    after = run(path, processes, killed_at=-1)
    assert sorted(index for own in after for index in own) == list(range(SAVED_AT * PER_STEP, count))
    for own in before + after:
        assert own.items() <= expected.items()
    for rank, own in enumerate(after):  # 6 lanes, so a process has a sixth of them each for as many as it takes
        lanes = {int(name[0]) for index, name in own.items() if alone.choice[index] == 0}
        assert lanes <= {lane for lane in range(6) if lane % processes == rank}


def test_a_resumed_run_reads_no_shard_for_what_it_has_seen(shards, small_model, tmp_path):
    with object_store(shards) as (url, asked):
        recipe = load_recipe(recipe_for(tmp_path, small_model, url, 1), Recipe)
        whole = mixture_of(recipe, 36)
        straight = [whole[index].id for index in range(36)]
        asked.clear()
        resumed = mixture_of(recipe, 36)
        assert not asked, "the shards have been looked through"
        last = [index for index in range(36) if resumed.choice[index] == 0][-2:]
        assert [resumed[index].id for index in last] == [straight[index] for index in last]
        assert set(asked) <= {f"{straight[index][0]}.parquet" for index in last}
