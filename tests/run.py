# SPDX-License-Identifier: Apache-2.0
"""Run the tests that `make test` leaves out: each takes minutes, or packages of its own.

    python tests/run.py backends                          the page in a browser, batches on Ray Data, quantization
    python tests/run.py common -k save_load               transformers' own tests, those whose name matches
    python tests/run.py engines                           the data engines, with killed workers
    python tests/run.py harness                           lmms-eval and VLMEvalKit on look-alikes of benchmarks
    python tests/run.py kills                             conversions, training and batches, killed a hundred times
    python tests/run.py memory                            peaks at the largest inputs allowed, against their bounds
    python tests/run.py scale                             sharding, shards in object stores, ONNX, towers of timm
    python tests/run.py soak --backend http --minutes 10  a server under load
    python tests/run.py soak --hostile --minutes 10       the handler, a quarter of whose requests are hostile files
    python tests/run.py vllm                              vLLM on the CPU
    python tests/run.py wheel                             the package installed without the repository

`python tests/run.py NAME --help` describes one. `backends`, `engines`, `harness`, `scale`, `vllm` and `wheel` make
their environment themselves and need nothing but Python; the others run in the environment they are started from.
"""

import argparse
import sys
from importlib import import_module

RUNNERS = {
    "backends": "environments.backends.run",
    "common": "environments.common.run",
    "engines": "environments.engines.run",
    "harness": "environments.harness.run",
    "kills": "environments.kills.run",
    "memory": "environments.memory.run",
    "scale": "environments.scale.run",
    "soak": "environments.soak.run",
    "vllm": "environments.on_vllm.run",
    "wheel": "environments.wheel.run",
}


def main() -> int:
    """Read the name, hand the rest of the command line to its runner; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RUNNERS)
    name = parser.parse_args(sys.argv[1:2]).name
    sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
    return import_module(RUNNERS[name]).main()  # imported here: some need packages that others must do without


if __name__ == "__main__":
    sys.exit(main())
