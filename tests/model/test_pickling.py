# SPDX-License-Identifier: Apache-2.0
"""What is loaded with `trust_remote_code` crosses process borders: dill, `datasets.map`, spawned workers.

A script does it as a user would. It runs twice, each time in a process and with a hash seed of its own.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from support import ROOT

SCRIPT = textwrap.dedent(
    """
    import json, pickle, sys

    import dill
    import torch
    from datasets import Dataset
    from datasets.fingerprint import Hasher
    from PIL import Image
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor

    ROOT, CACHE = sys.argv[1:]
    TEXTS = ["<image>a", "a <image>b", "<image>", "<image>c"]


    def image_of(row):
        return Image.new("RGB", (60 + 90 * row, 70), "teal")


    class Collator:
        def __init__(self, processor):
            self.processor = processor

        def __call__(self, rows):
            return self.processor(text=[TEXTS[row] for row in rows], images=[[image_of(row)] for row in rows],
                                  padding=True, return_tensors="pt", return_labels=True)


    def main():
        options = {"trust_remote_code": True}
        loaders = {"processor": AutoProcessor, "image processor": AutoImageProcessor, "config": AutoConfig}
        loaded = {name: loader.from_pretrained(ROOT, **options) for name, loader in loaders.items()}
        processor = loaded["processor"]

        def encode(row):
            return {"ids": processor(text=row["text"], images=image_of(row["row"]))["input_ids"][0]}

        found = {"hashes": {name: Hasher.hash(value) for name, value in loaded.items()}}
        found["hashes"]["closure"] = Hasher.hash(encode)
        for name, value in loaded.items():
            for library in (pickle, dill):
                copy = library.loads(library.dumps(value))
                assert type(copy) is type(value), name
                assert copy.to_dict() == value.to_dict(), name
        rows = Dataset.from_dict({"text": TEXTS, "row": list(range(4))})
        path = CACHE + "/rows"
        rows.save_to_disk(path)
        rows = Dataset.load_from_disk(path)
        expected = [encode(row)["ids"] for row in rows]
        mapped = rows.map(encode, num_proc=2)
        assert mapped["ids"][:] == expected
        found["fingerprint"] = mapped._fingerprint
        loader = torch.utils.data.DataLoader(
            range(4), batch_size=2, num_workers=1, collate_fn=Collator(processor), multiprocessing_context="spawn"
        )
        for batch, rows in zip(loader, ([0, 1], [2, 3]), strict=True):
            expected = Collator(processor)(rows)
            assert type(batch) is type(expected)
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[name], expected[name]) for name in expected)
        print(json.dumps(found))


    if __name__ == "__main__":
        main()
    """
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the script finds in two processes."""
    folder = tmp_path_factory.mktemp("pickling")
    (folder / "script.py").write_text(SCRIPT)
    return [run_script(folder, hash_seed) for hash_seed in (1, 2)]


def run_script(folder: Path, hash_seed: int) -> dict:
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "PYTHONHASHSEED": str(hash_seed)}
    environment["OMP_NUM_THREADS"] = "1"
    data = folder / str(hash_seed)
    data.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(folder / "script.py"), str(ROOT), str(data)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "random hash" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_processor_maps_a_dataset_in_workers_and_is_found_in_the_cache_again(runs):
    first, second = runs
    assert first["fingerprint"] == second["fingerprint"]


@pytest.mark.parametrize("name", ["processor", "image processor", "config", "closure"])
def test_hashes_are_the_same_in_every_process(runs, name):
    first, second = runs
    assert first["hashes"][name] == second["hashes"][name]
