# SPDX-License-Identifier: Apache-2.0
"""Test training on several processes, DeepSpeed, 4-bit weights, shards in object stores, ONNX files, towers of timm.

    python tests/run.py scale              all of it
    python tests/run.py scale -k ZeRO      the tests whose name matches

`make test` skips what is not installed; here a skipped test fails the run, unless it looks at an environment without
DeepSpeed or bitsandbytes. The environment, `.venv-scale` at the root of the repository, is made on the first run and
again when constraints/scale.txt changes: 2.7 GB. The exit status is pytest's; 1 when a test was skipped, 2 when
something could not be installed.
"""

from pathlib import Path

from ..own_environment import ROOT, run_in_environment

ENVIRONMENT = ROOT / ".venv-scale"
CONSTRAINTS = ROOT / "constraints" / "scale.txt"
TOOLS = ["aiohttp", "hypothesis", "psutil", "pytest", "requests"]
PACKAGES = [*TOOLS, "--editable", f"{ROOT}[deepspeed,onnx,quantize,timm]"]
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
    "DS_ACCELERATOR": "cpu",  # DeepSpeed looks for a GPU otherwise
    "PYTHONPATH": str(Path(__file__).with_name("without_cuda")),
}
MAY_LACK = ("bitsandbytes is installed", "deepspeed is installed")


def main() -> int:
    """Install what is missing, run the tests."""
    return run_in_environment(
        "Test sharding, 4-bit weights, streams, ONNX files and towers of timm.",
        ENVIRONMENT,
        CONSTRAINTS,
        PACKAGES,
        [ROOT / "tests" / name for name in TESTS],
        VARIABLES,
        may_lack=MAY_LACK,
    )
