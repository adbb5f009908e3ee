# SPDX-License-Identifier: Apache-2.0
"""Sources that are damaged, or made to mislead: each ends in one line that says what is wrong."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from blip3.conversion import cli as convert_weights
from support import needs_reference
from support.conversion import TINY, TINY_VISION, refused, write_release

pytestmark = needs_reference
DEEP = "[" * 100_000 + "]" * 100_000
ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=8),
    st.lists(st.integers(-2, 2), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@pytest.fixture
def source(tmp_path, tiny) -> Path:
    return write_release(tmp_path / "source", tiny)


def test_a_tensor_in_two_shards_is_refused(source, tmp_path, capsys):
    """Which of the two is read must not hang on the order of the files."""
    first, last = sorted(source.glob("*.safetensors"))[:: len(list(source.glob("*.safetensors"))) - 1]
    name = next(iter(load_file(first)))
    tensors = load_file(last) | {name: torch.zeros_like(load_file(first)[name])}
    save_file(tensors, last)
    message = refused(capsys, source, tmp_path / "out")
    assert "1 tensors stand in two files" in message
    assert name in message
    assert first.name in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(source, tmp_path, capsys, value):
    path = sorted(source.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = next(name for name in tensors if tensors[name].ndim == 2)
    tensors[name][0, 0] = value
    save_file(tensors, path)
    message = refused(capsys, source, tmp_path / "out", "--vision-config", TINY_VISION)
    assert name.removeprefix("vlm.") in message
    assert "1 values that are no numbers" in message
    assert not (tmp_path / "out").exists()


def rewrite_header(path: Path, change) -> None:
    """Write a safetensors file again with its header, as text, changed."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_tensors_that_share_bytes_are_refused(source, tmp_path, capsys):
    path = sorted(source.glob("*.safetensors"))[0]

    def overlap(text: str) -> str:
        header = json.loads(text)
        names = [name for name in header if name != "__metadata__"]
        twin = next(
            (one, other)
            for one in names
            for other in names
            if one < other and header[one]["shape"] == header[other]["shape"]
        )
        header[twin[1]]["data_offsets"] = header[twin[0]]["data_offsets"]
        return json.dumps(header)

    rewrite_header(path, overlap)
    assert "share" in refused(capsys, source, tmp_path / "out")


def test_a_name_twice_in_a_header_is_refused(source, tmp_path, capsys):
    path = sorted(source.glob("*.safetensors"))[0]
    rewrite_header(path, lambda text: text[:-1].rstrip("} ") + "}," + text[text.index('"vlm.') :])
    assert "stands twice" in refused(capsys, source, tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/hostname", "a/b.safetensors", "a\\b.safetensors", "..", "", 7, None, ["x"], {}],
)
def test_an_index_reads_only_files_beside_it(source, tmp_path, capsys, name):
    shutil.copyfile(sorted(source.glob("*.safetensors"))[0], tmp_path / "secret.safetensors")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    path.write_text(json.dumps(index))
    assert "must name files beside it" in refused(capsys, source, tmp_path / "out")


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "null", DEEP, "\ufeff{}", "{", ""])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"])
def test_json_of_another_kind_is_one_line(source, tmp_path, capsys, name, content):
    (source / name).write_text(content, encoding="utf-8")
    assert name in refused(capsys, source, tmp_path / "out", "--vision-config", TINY_VISION)


def test_a_state_that_holds_itself_ends(tmp_path, capsys):
    state: dict = {}
    state["model"] = state
    torch.save(state, tmp_path / "loop.pt")
    assert "holds no state dict" in refused(capsys, tmp_path / "loop.pt", tmp_path / "out", "--vision", TINY)


def places(value, path=()):
    """Give the path of every value inside a JSON object."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))


CONFIGS = {name: json.loads((TINY / name).read_text()) for name in ("config.json", "preprocessor_config.json")} if (
    TINY.is_dir()
) else {"config.json": {"a": 1}}  # fmt: skip
PLACES = [(name, path) for name, config in CONFIGS.items() for path in places(config)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PLACES), ODD_VALUES)
def test_any_value_in_the_small_files_converts_or_is_one_line(tmp_path, tiny, capsys, place, value):
    """No value of any field of the configs ends in a traceback, a hang, or half an output."""
    name, path = place
    source, output = tmp_path / "source", tmp_path / "out"
    for folder in (source, output):
        shutil.rmtree(folder, ignore_errors=True)
    write_release(source, tiny)
    changed = copy.deepcopy(CONFIGS[name])
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (source / name).write_text(json.dumps(changed))
    status = convert_weights.main([str(source), str(output), "--vision-config", str(TINY_VISION)])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (status, len(errors), output.exists()) in ((0, 0, True), (1, 1, False))


def test_an_answer_must_have_an_end(source, tmp_path, capsys):
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    message = refused(capsys, source, tmp_path / "out", "--vision-config", TINY_VISION)
    assert "eos_token_id" in message
    assert "empty list" in message
