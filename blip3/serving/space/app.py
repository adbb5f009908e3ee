# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Space: the page of `blip3/serving/page`, with the model that lies beside this file."""

from blip3.serving.page.app import main

if __name__ == "__main__":
    main()
