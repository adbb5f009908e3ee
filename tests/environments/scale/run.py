# SPDX-License-Identifier: Apache-2.0
"""Test training on several processes, DeepSpeed, shards in object stores, ONNX files and towers of timm.

    python tests/run.py scale              all of it
    python tests/run.py scale -k ZeRO      the tests whose name matches

`make test` skips what is not installed; here a skipped test fails the run, unless it needs a GPU. The environment,
`.venv-scale` at the root of the repository, is made on the first run and again when constraints/scale.txt changes:
2.5 GB. The exit status is pytest's; 1 when a test was skipped, 2 when something could not be installed.
"""

import sys
import tempfile
from pathlib import Path

from ..own_environment import ROOT, check_nothing_was_skipped, make_environment, parse_expression, run_pytest

ENVIRONMENT = ROOT / ".venv-scale"
CONSTRAINTS = ROOT / "constraints" / "scale.txt"
TOOLS = ["aiohttp", "hypothesis", "psutil", "pytest", "requests"]
PACKAGES = [*TOOLS, "--editable", f"{ROOT}[deepspeed,onnx,timm]"]
TESTS = [
    "conversion/test_conversion_towers.py",
    "data/test_shards.py",
    "elsewhere",
    "model/test_sharded_order.py",
    "training/test_adapter_runs.py",
    "training/test_sharded_runs.py",
    "training/test_streams_in_processes.py",
    "training/test_training_recipe.py",
]
VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",  # DeepSpeed looks for a GPU otherwise
    "PYTHONPATH": str(Path(__file__).with_name("without_cuda")),
}


def main() -> int:
    """Install what is missing, run the tests."""
    expression = parse_expression("Test sharding, streams, ONNX files and towers of timm.")
    install = ["install", "--quiet", "--constraint", str(CONSTRAINTS), *PACKAGES]
    try:
        make_environment(
            ENVIRONMENT, CONSTRAINTS, [install], "The package index is probably out of reach: see the message above."
        )
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        files = ["--junitxml", report, *(ROOT / "tests" / name for name in TESTS)]
        status = run_pytest(ENVIRONMENT, expression, files, VARIABLES)
        return status or check_nothing_was_skipped(report, ["GPU", "bitsandbytes", "transformers"])
