# SPDX-License-Identifier: Apache-2.0
"""Ask the small model about images: `python demo.py --help`. The rest is in `blip3/demo.py`."""

import sys

from blip3.demo import main

if __name__ == "__main__":
    sys.exit(main())
