# SPDX-License-Identifier: Apache-2.0
"""Nothing here is collected outside the environment of run.py."""

import os

collect_ignore_glob = [] if os.environ.get("BLIP3_HARNESS_TESTS") else ["test_*.py"]
