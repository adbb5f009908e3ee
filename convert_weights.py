# SPDX-License-Identifier: Apache-2.0
"""Convert released weights to this repository's names, and back: `python convert_weights.py --help`.

Runs from any folder, without an installation; the parts are in `blip3/conversion`, whose docstring gives the order to
read them in.
"""

import sys

from blip3.conversion.cli import main

if __name__ == "__main__":
    sys.exit(main())
