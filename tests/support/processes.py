# SPDX-License-Identifier: Apache-2.0
"""Interpreters that a test starts, and waits for."""

import os
import subprocess
import sys
from pathlib import Path


def start(*command: object, modules: Path, **variables: str) -> subprocess.Popen:
    """Start an interpreter on one thread, with a cache of remote code of its own."""
    environment = os.environ | {"HF_MODULES_CACHE": str(modules), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def expect_success(process: subprocess.Popen, seconds: float = 600) -> str:
    """Wait for a process and give what it wrote; one that failed or takes longer fails the test."""
    try:
        output = process.communicate(timeout=seconds)[0]
    finally:
        process.kill()
    assert process.returncode == 0, output[-6000:]
    return output
