# SPDX-License-Identifier: Apache-2.0
"""Tests of the row ranges: chunks, ranges of dtypes, and memory."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from blip3.conversion.tensors import InitialisedReader, chunks
from support import ROOT, convert, needs_reference
from support.conversion import TINY_VISION, refused, tensors_of, write_release, write_sparse_release

pytestmark = needs_reference


def test_no_chunk_is_larger_than_asked(monkeypatch):
    monkeypatch.setattr("blip3.conversion.tensors.CHUNK_BYTES", 4096)
    view = InitialisedReader().add("latents", (100, 64), 0.02)
    sizes = [chunk.nbytes for chunk in chunks(view.rows(3, 97))]
    assert max(sizes) <= 4096
    assert sum(sizes) == 94 * 64 * 4
    whole = np.concatenate(list(chunks(view)))
    parts = itertools.chain(chunks(view.rows(0, 3)), chunks(view.rows(3, 100)))
    assert np.array_equal(whole, np.concatenate(list(parts)))


def test_float16_overflow_is_refused(tmp_path, tiny, capsys):
    big = tiny | {"vlm.vision_tokenizer.norm.weight": torch.full((24,), 1e5)}
    folder = write_release(tmp_path / "big", big)
    args = (folder, tmp_path / "out", "--vision-config", TINY_VISION, "--dtype")
    assert "float16 ends at 65504" in refused(capsys, *args, "float16")
    convert(*args, "bfloat16")
    assert tensors_of(tmp_path / "out")["lm_head.bias"].dtype == torch.bfloat16


MEMORY = """
    import resource, sys
    from blip3.hub import model_code
    configuration_blip3 = model_code("configuration_blip3")
    from blip3.conversion import cli as convert_weights
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = convert_weights.main(sys.argv[2:])
    print("GROWTH_MIB", code, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def memory_growth_mib(*args) -> float:
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(ROOT), *map(str, args)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    match = re.search(r"GROWTH_MIB 0 ([\d.]+)", run.stdout)
    assert match, run.stdout + run.stderr
    return float(match[1])


def test_memory_stays_under_a_shard(tmp_path):
    """The promise is a shard plus 1 GiB; the conversion buffers and the allocator's slack need no shard at all."""
    source = write_sparse_release(tmp_path / "source", num_layers=2)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert size > 600e6
    growth = memory_growth_mib(source, tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "100MB")
    assert growth < 400
    growth = memory_growth_mib(source, tmp_path / "out", "--max-shard-size", "5GB")
    assert growth < 400


def test_memory_of_a_mapped_torch_file(tmp_path):
    source = write_sparse_release(tmp_path / "source", num_layers=2)
    tensors = {name.removeprefix("vlm."): tensor for name, tensor in tensors_of(source).items()}
    torch.save(tensors, tmp_path / "checkpoint.pt")
    del tensors
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    size = (tmp_path / "checkpoint.pt").stat().st_size / 2**20
    growth = memory_growth_mib(tmp_path / "checkpoint.pt", tmp_path / "out")
    assert size > 1000
    assert growth < 1000


@pytest.mark.slow
def test_memory_at_true_size(tmp_path):
    source = write_sparse_release(tmp_path / "source", num_layers=32, shard_bytes=5 * 10**9, real=True)
    assert sum(path.stat().st_size for path in source.glob("*.safetensors")) > 17_437_028_876
    growth = memory_growth_mib(source, tmp_path / "out", "--dtype", "bfloat16")
    assert growth < 1024
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == 704
    shutil.rmtree(tmp_path / "out")
