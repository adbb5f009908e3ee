# SPDX-License-Identifier: Apache-2.0
"""Writing the shipped models: only their own files are replaced, and never the repository's code."""

import shutil

import pytest

from blip3.checkpoints import CODE_FILES
from blip3.training.small.publish import publish
from support.training import write_recipe


@pytest.fixture
def finished(small_model, tmp_path):
    """A finished stage: the small model with a recipe beside it."""
    folder = shutil.copytree(small_model, tmp_path / "final")
    write_recipe(folder / "recipe.yaml", small_model)
    return folder


def test_files_beside_a_published_model_stay(finished, tmp_path):
    output = tmp_path / "mini"
    output.mkdir()
    for name, text in (("plot.py", "mine"), ("README.md", "mine"), ("model-00001-of-00009.safetensors", "stale")):
        (output / name).write_text(text)
    publish(finished, output, max_shard_size="100KB")
    assert (output / "plot.py").read_text() == "mine"
    assert (output / "README.md").read_text() == "mine"
    assert not (output / "model-00001-of-00009.safetensors").exists()
    assert len(list(output.glob("model-*.safetensors"))) > 1
    assert not any((output / name).exists() for name in CODE_FILES)


def test_code_beside_a_published_model_stays(finished, tmp_path):
    """As at the root of the repository, whose own code a saved model carries a copy of."""
    output = tmp_path / "repository"
    output.mkdir()
    for name in CODE_FILES:
        (output / name).write_text("mine")
    publish(finished, output)
    assert all((output / name).read_text() == "mine" for name in CODE_FILES)
