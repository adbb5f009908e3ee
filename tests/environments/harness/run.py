# SPDX-License-Identifier: Apache-2.0
"""Run lmms-eval, and VLMEvalKit where a copy of it is, on the small model and look-alikes of benchmarks.

    python tests/run.py harness                            everything
    python tests/run.py harness -k rule                    the tests whose name matches
    BLIP3_VLMEVALKIT=KIT BLIP3_VLMEVALKIT_PYTHON=... python tests/run.py harness -k kit

The environment, `.venv-harness` at the root of the repository, is made on the first run and again when
constraints/harness.txt changes: 2.4 GB. lmms-eval asks for torchvision; its builds for CUDA fail beside torch's CPU
build and take transformers' import with them, and these tests need none of it. The tests of VLMEvalKit need a copy of
it and the interpreter of an environment with its requirements; without them they are skipped. The exit status is
pytest's; 2 when the environment cannot be made.
"""

from ..own_environment import ROOT, run_in_environment

ENVIRONMENT = ROOT / ".venv-harness"
CONSTRAINTS = ROOT / "constraints" / "harness.txt"
PACKAGES = ["pytest", "--editable", f"{ROOT}[lmms-eval,serve]"]
HARMFUL = ["torchvision"]
ADVICE = "The package index is probably out of reach, or lacks the CPU build of torch: see the message above."
VARIABLES = {"BLIP3_HARNESS_TESTS": "1"}  # conftest.py collects nothing without the first


def main() -> int:
    """Make the environment, run the tests."""
    folder = ROOT / "tests" / "environments" / "harness"
    description = "Run harnesses on the small model and look-alikes of benchmarks."
    return run_in_environment(
        description, ENVIRONMENT, CONSTRAINTS, PACKAGES, [folder], VARIABLES, harmful=HARMFUL, advice=ADVICE
    )
