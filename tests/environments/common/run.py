# SPDX-License-Identifier: Apache-2.0
"""Run the common tests of the installed transformers against BLIP-3's classes.

    python tests/run.py common                  everything
    python tests/run.py common -k save_load     the tests whose name matches

transformers keeps these tests in its source distribution only. This script fetches the one of the installed version
into `.cache/common_tests/`, unpacks its `tests/`, adds stand-ins for the modules a source distribution lacks, and runs
the test files beside it without network. The exit status is pytest's; 2 when the distribution cannot be fetched.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CACHE = ROOT / ".cache" / "common_tests"

# What tests/test_*_common.py import and a source distribution leaves out. The generation and export tests are among
# it; their mixins are empty here, and generation is left to the repository's own tests.
STAND_INS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "utils/fetch_hub_objects_for_ci.py": '''\
"""Local files in place of the Hub's: one picture for every picture, nothing for the rest."""
from pathlib import Path

from PIL import Image

IMAGE = Path(__file__).with_name("picture.png")
if not IMAGE.exists():
    Image.radial_gradient("L").resize((64, 48)).convert("RGB").save(IMAGE)


def url_to_local_path(url, *args, **kwargs):
    return str(IMAGE if url.endswith((".png", ".jpg", ".jpeg")) else IMAGE.with_name("absent"))
''',
}


def fetch_source(release: str) -> Path:
    """Download the source distribution of a transformers release unless it is in the cache.

    Raises:
        RuntimeError: if pip cannot fetch it.
    """
    folder = CACHE / release
    folder.mkdir(parents=True, exist_ok=True)
    (CACHE.parent / ".gitignore").write_text("*\n", encoding="utf-8")
    archive = folder / f"transformers-{release}.tar.gz"
    if not archive.exists():
        with tempfile.TemporaryDirectory(dir=folder) as download:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--no-binary", "transformers", "--dest", download, f"transformers=={release}"]
            if subprocess.run(command, check=False).returncode or not (Path(download) / archive.name).exists():
                raise RuntimeError(
                    f"pip did not fetch {archive.name}, which holds the tests of the installed transformers "
                    f"{release}. The package index is probably out of reach, or this environment has no pip: see the "
                    f"message above, or put the file into {folder.relative_to(ROOT)}."
                )
            (Path(download) / archive.name).rename(archive)
    return archive


def unpack(archive: Path) -> Path:
    """Unpack `tests/` beside the archive, with the stand-ins; returns the folder to import `tests` from."""
    tree = archive.parent / "tree"
    if not (tree / "tests").exists():
        with tempfile.TemporaryDirectory(dir=archive.parent) as partial, tarfile.open(archive) as source:
            members = [member for member in source if "/tests/" in f"{member.name}/"]
            source.extractall(partial, members=members, filter="data")
            (Path(partial) / archive.name.removesuffix(".tar.gz")).rename(tree)
    for name, text in STAND_INS.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tree / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")  # in place of any setting of the repository
    return tree


def offline_environment(tree: Path) -> dict[str, str]:
    """Environment for the tests: paths set, the Hub switched off, the web out of reach, an empty model cache."""
    environment = dict(os.environ)
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(tree), str(ROOT)]),
        "BLIP3_COMMON_TESTS": "1",  # conftest.py collects nothing without it
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(CACHE / "hf_home"),
    }
    environment |= dict.fromkeys(("NO_PROXY", "no_proxy"), "localhost,127.0.0.1")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        environment[name] = "http://127.0.0.1:9"  # nobody listens there
    environment.setdefault("TRANSFORMERS_TEST_DEVICE", "cpu")
    return environment


def main() -> int:
    """Fetch, unpack, run."""
    parser = argparse.ArgumentParser(description="Run transformers' common tests against BLIP-3's classes.")
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="run only the tests that match, as pytest's -k")
    parser.add_argument("--durations", type=int, default=0, metavar="N", help="list the N slowest tests")
    options = parser.parse_args()
    try:
        tree = unpack(fetch_source(version("transformers")))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["-W", "default::FutureWarning", "--disable-warnings"]  # the tests look for some of them
    command += ["-c", str(tree / "pytest.ini"), "--rootdir", str(HERE), "--confcutdir", str(HERE), "--tb=short"]
    command += ["-k", options.k] if options.k else []
    command += ["--durations", str(options.durations)] if options.durations else []
    command += [str(path) for path in sorted(HERE.glob("test_*.py"))]
    return subprocess.run(command, cwd=tree, env=offline_environment(tree), check=False).returncode
