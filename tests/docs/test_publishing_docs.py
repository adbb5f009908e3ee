# SPDX-License-Identifier: Apache-2.0
"""What docs/publishing.md and the endpoint's part of docs/serving.md say: commands, bodies, clients, tables.

python tests/docs/test_publishing_docs.py      writes the tables into docs/serving.md
"""

import dataclasses
import inspect
import json
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from packaging.requirements import Requirement
from transformers import AutoConfig

from blip3.conversion import card
from blip3.hub import files_behind
from blip3.serving import memory
from blip3.serving.bodies import DEFAULT_NEW_TOKENS, PARAMETERS, SAMPLING, RequestLimits, parse_body
from blip3.serving.limits import ImageLimits, variable_of

ROOT = Path(__file__).resolve().parents[2]
PUBLISHING = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
SERVING = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
ENDPOINTS = SERVING.split("## Inference Endpoints")[1].split("\n## ")[0]
GPUS = {"16 GB (T4)": 16, "24 GB (L4, A10G)": 24, "48 GB (L40S)": 48, "80 GB (A100, H100)": 80}
ALLOWANCE = 1.5 * memory.GIB
HUB_ID = r"""["'][\w<>.-]+/[\w<>.-]+["']"""


# -- Tables -----------------------------------------------------------------------------------------------------------


def variables_table() -> str:
    """One row a limit: variable, default as it would be written, what the class's docstring says."""
    rows = ["| variable | default | |", "|---|---|---|"]
    for kind, prefix in ((ImageLimits, "BLIP3_PICTURE_"), (RequestLimits, "BLIP3_REQUEST_")):
        meanings = dict(re.findall(r"^    (\w+): (.+)$", inspect.cleandoc(kind.__doc__), flags=re.MULTILINE))
        for field in dataclasses.fields(kind):
            value = field.default
            plain = (
                ",".join(map(str, value)) if isinstance(value, tuple) else str(int(value) if value is True else value)
            )
            rows.append(f"| `{variable_of(field, prefix)}` | `{plain}` | {meanings[field.name].rstrip('.')} |")
    return "\n".join(rows)


def parameters_table() -> str:
    """One row a parameter: name and what it may be."""
    rows = ["| parameter | |", "|---|---|"]
    for name, allowed in PARAMETERS.items():
        text = str(allowed)
        if name == "max_new_tokens":
            text = f"an integer from 1 to `BLIP3_REQUEST_MAX_NEW_TOKENS`; {DEFAULT_NEW_TOKENS} by default"
        rows.append(f"| `{name}` | {text}{'; sampling' if name in SAMPLING else ''} |")
    return "\n".join(rows)


def instances_table() -> str:
    """Sequences of a full cache that fit beside the weights, by dtype and GPU."""
    config = AutoConfig.from_pretrained(ROOT, subfolder="configs/4b", trust_remote_code=True)
    needs, window = memory.needs_of(config), config.text_config.sliding_window - 1
    rows = ["| folder | weights | " + " | ".join(GPUS) + " |", "|---|---|" + "---|" * len(GPUS)]
    for kind in memory.BYTES:
        left = [size * 1e9 - needs.weight_bytes(kind) - ALLOWANCE for size in GPUS.values()]
        fitting = [max(0, int(number // (window * needs.token_bytes(kind)))) for number in left]
        cells = [str(number) if number else "no" for number in fitting]
        rows.append(f"| {kind} | {needs.weight_bytes(kind) / memory.GIB:.2f} GiB | " + " | ".join(cells) + " |")
    return "\n".join(rows)


TABLES = {"variables": variables_table, "parameters": parameters_table, "instances": instances_table}


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_are_what_the_code_says(name):
    found = ENDPOINTS.split(f"<!-- {name} -->\n")[1].split("\n<!-- end -->")[0]
    assert found == TABLES[name](), "run python tests/docs/test_publishing_docs.py"


def test_every_variable_that_is_named_exists():
    known = set(re.findall(r"`(BLIP3_\w+)`", variables_table()))
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "blip3" / "serving" / "endpoint.py"):
        for name in re.findall(r"\bBLIP3_(?:PICTURE|REQUEST)_[A-Z_]*[A-Z]\b", path.read_text(encoding="utf-8")):
            assert name in known, f"{path.name}: {name}"


# -- Bodies and clients -----------------------------------------------------------------------------------------------


def test_every_body_of_the_documentation_is_accepted():
    bodies = re.findall(r"```json\n(.*?)```", ENDPOINTS, flags=re.DOTALL)
    bodies += re.findall(r"-d '(\{.*?\})'", ENDPOINTS)
    requests = [parse_body(json.loads(body), RequestLimits()) for body in bodies]
    assert len(requests) >= 6
    prompts = [prompt for request in requests for prompt in request.prompts]
    assert {len(prompt.images) for prompt in prompts} == {0, 1, 2}
    assert any(prompt.messages for prompt in prompts)
    assert any(len(request.prompts) > 1 for request in requests)


@pytest.fixture
def endpoint(tmp_path, monkeypatch):
    """A server that checks bodies as the container would hand them over, and answers with what it read."""
    seen = []

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.headers["Authorization"] == "Bearer secret"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(parse_body(body, RequestLimits()))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps([{"generated_text": "No. 47"}]).encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "secret")
    (tmp_path / "street.jpg").write_bytes(b"not read here")
    monkeypatch.chdir(tmp_path)
    yield seen
    server.shutdown()


def test_the_python_client_asks_and_prints_the_answer(endpoint, capsys):
    (client,) = re.findall(r"<!-- client -->\n```python\n(.*?)```", ENDPOINTS, flags=re.DOTALL)
    exec(compile(client, "docs/serving.md", "exec"), {"__name__": "client"})
    assert capsys.readouterr().out == "No. 47\n"
    (request,) = endpoint
    assert request.options.generation["max_new_tokens"] == 64
    assert len(request.prompts[0].images) == 1


def test_the_handlers_requirements_admit_the_older_line_and_fit_the_package():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    required = {requirement.name.lower(): requirement.specifier for requirement in map(Requirement, lines)}
    pinned = {}
    for name in ("constraints/5.txt", "constraints/4.txt"):
        text = (ROOT / name).read_text(encoding="utf-8")
        pinned[name] = dict(re.findall(r"^(\w+)==(\S+)$", text.lower(), flags=re.MULTILINE))
    assert pinned["constraints/4.txt"]["transformers"] in required["transformers"]
    assert pinned["constraints/5.txt"]["transformers"] not in required["transformers"]
    for versions in pinned.values():
        assert versions["pillow"] in required["pillow"]
        assert versions["jinja2"] in required["jinja2"]
    package = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name, least in re.findall(r'"(transformers|Pillow|jinja2)>=([\d.]+)"', package):
        assert least in required[name.lower()], name
    for name, specifier in required.items():
        first = str(specifier).split(",")[-1] if name != "transformers" else ">=4.57.6,<5"
        assert f"{name}{first}".lower() in SERVING.lower() or name == "jinja2"
    space = (ROOT / "blip3" / "serving" / "space" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert set(space) - {"jinja2>=3.1"} <= set(re.findall(r'"([^"]+)"', package))


# -- Commands of the Hub ----------------------------------------------------------------------------------------------


def hub_commands() -> list[str]:
    version = "0.36" if huggingface_hub.__version__.startswith("0.") else "2"
    found = []
    for line in re.findall(r"^(?:    )?(hf .*)$", PUBLISHING, flags=re.MULTILINE):
        command, _, comment = line.partition("    #")
        if "huggingface_hub" not in comment or comment.split()[-1] == version:
            found.append(command)
    return found


@pytest.mark.parametrize("command", hub_commands())
def test_the_hubs_command_line_has_these_commands_and_options(command):
    words = shlex.split(command)
    sub_commands = words[1 : 3 if words[1] in ("repo", "repos", "auth") else 2]
    run = [str(Path(sys.executable).with_name("hf")), *sub_commands, "--help"]
    found = subprocess.run(run, capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1", "COLUMNS": "200"})
    assert found.returncode == 0, found.stderr
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{option}\b", found.stdout), f"{option} of {command}"


def test_both_versions_have_a_command_to_create():
    assert len(hub_commands()) == 6
    for what in ("hf repo create", "hf repos create"):
        assert PUBLISHING.count(what + " OWNER") == 2


def test_the_files_of_the_space_are_copied(tmp_path, tiny_repo):
    (line,) = re.findall(r"^mkdir space .*$", PUBLISHING, flags=re.MULTILINE)
    (tmp_path / "blip3").symlink_to(ROOT / "blip3")
    (tmp_path / "blip3-4b").symlink_to(tiny_repo)
    subprocess.run(line, shell=True, check=True, cwd=tmp_path)
    named = re.findall(r"^\| `([\w./]+)`", (tmp_path / "space" / "README.md").read_text(), flags=re.MULTILINE)
    assert {"README.md", "app.py", "requirements.txt"} < set(named)
    _, *imported = files_behind("blip3/serving/space/app.py")
    for name in (*named, *imported, "config.json"):
        assert (tmp_path / "space" / name).exists(), name
    for name in ("README.md", "app.py", "requirements.txt"):
        written = (tmp_path / "space" / name).read_text(encoding="utf-8")
        assert written == (ROOT / "blip3" / "serving" / "space" / name).read_text(encoding="utf-8"), name


# -- Pinned revisions -------------------------------------------------------------------------------------------------


def hub_calls() -> list[tuple[str, str]]:
    """Calls and commands that load from the Hub: its id is a literal, or the name `repository`."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
    texts |= {str(path): path.read_text(encoding="utf-8") for path in (ROOT / "README.md",)}
    texts["the card"] = card.LOADING
    calls = []
    for name, text in texts.items():
        calls += [(name, found) for found in re.findall(rf"\w+\(\s*(?:{HUB_ID}|repository)[^()]*\)", text)]
        calls += [
            (name, found) for found in re.findall(r"^ +(?:vllm|transformers) serve [A-Z]+/.*$", text, re.MULTILINE)
        ]
    return [(name, call) for name, call in calls if re.search(r"from_pretrained|pipeline| serve ", call)]


def test_every_load_from_the_hub_pins_a_revision():
    calls = hub_calls()
    assert len(calls) >= 5
    for name, call in calls:
        assert "trust_remote_code=True" in call or "--trust-remote-code" in call, f"{name}: {call}"
        assert re.search(r"\brevision=|--revision ", call), f"{name}: {call}"


def test_the_examples_of_publishing_parse():
    for block in re.findall(r"```python\n(.*?)```", PUBLISHING, flags=re.DOTALL):
        compile(block, "docs/publishing.md", "exec")


def write_tables() -> None:
    """Write the tables into docs/serving.md."""
    text = SERVING
    for name, table in TABLES.items():
        before, rest = text.split(f"<!-- {name} -->\n")
        text = before + f"<!-- {name} -->\n{table()}\n<!-- end -->" + rest.split("<!-- end -->", 1)[1]
    (ROOT / "docs" / "serving.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    write_tables()
