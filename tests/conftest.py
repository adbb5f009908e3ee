# SPDX-License-Identifier: Apache-2.0
"""What several test files share: a tiny converted repository, its model and processor."""

import os
import tempfile

# Before transformers is imported: no hub, and remote code cached apart from the user's and from other runs.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="blip3-modules-")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from blip3.conversion.random_checkpoint import write_release_layout
from support import convert, load_model

torch.set_num_threads(1)  # tiny models: two test processes beat two threads


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in the release's layout."""
    return write_release_layout(tmp_path_factory.mktemp("source") / "xgen-mm-tiny")


@pytest.fixture(scope="session")
def tiny_repo(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint converted: a complete repository."""
    output = tmp_path_factory.mktemp("converted") / "blip3-tiny"
    convert(tiny_source, output, "--vision-config", tiny_source / "siglip_vision_config.json")
    return output


@pytest.fixture(scope="session")
def unfused_repo(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint with the text model's projections split."""
    output = tmp_path_factory.mktemp("converted") / "blip3-tiny-unfused"
    vision_config = tiny_source / "siglip_vision_config.json"
    convert(tiny_source, output, "--vision-config", vision_config, "--text-layout", "unfused")
    return output


@pytest.fixture(scope="session")
def tiny_model(tiny_repo: Path) -> torch.nn.Module:
    """The tiny model in evaluation mode; tests must not change it."""
    return load_model(tiny_repo).eval()


@pytest.fixture(scope="session")
def processor(tiny_repo: Path) -> object:
    """The tiny model's processor; tests must not change it."""
    return AutoProcessor.from_pretrained(tiny_repo, trust_remote_code=True)


@pytest.fixture
def model(tiny_repo: Path) -> torch.nn.Module:
    """A model of the test's own, to train."""
    return load_model(tiny_repo)


@pytest.fixture
def own_processor(tiny_repo: Path) -> object:
    """A processor of the test's own: trainers may change its settings."""
    return AutoProcessor.from_pretrained(tiny_repo, trust_remote_code=True)


@pytest.fixture(scope="session")
def unfused_model(unfused_repo: Path) -> torch.nn.Module:
    """The tiny model with split projections, in evaluation mode; tests must not change it."""
    return load_model(unfused_repo).eval()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small untrained model of the rendered world; tests must not change it."""
    from support.training import make_small_model  # imports what only training needs

    return make_small_model(tmp_path_factory.mktemp("small"))


# With two processes that take files whole, the suite ends when the last file does: the longest go first.
LONGEST_FILES = (
    "test_training_runs.py",
    "test_examples.py",
    "test_adapter_runs.py",
    "test_soak.py",
    "test_conversion_tensors.py",
    "test_readme.py",
    "test_every_module.py",
    "test_small_recipes.py",
    "test_hostile_training.py",
    "test_conversion_output_folder.py",
    "test_ablate.py",
    "test_transformers_serve.py",
    "test_serving_docs.py",
    "test_small_model.py",
    "test_conversion_trained.py",
    "test_finetuning_forms.py",
    "test_pickling.py",
    "test_benchmarks.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the rest keeps its order."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
