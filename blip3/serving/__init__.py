# SPDX-License-Identifier: Apache-2.0
"""What a server needs beyond the model itself.

endpoint.py   what handler.py at the root gives to Inference Endpoints
bodies.py     the body of a request to prompts and generation options
limits.py     what a request may ask for, from environment variables
room.py       how many requests are inside at once, and how many bytes they hold
fetch.py      the one way an image named by a request is opened, with urls.py (what may be contacted),
              structure.py (what a file is built of) and decode.py
privacy.py    what of a request may stand in a log
page/         a page in the browser; opens only its own uploads
space/        the files of a Hugging Face Space that serves the page
memory.py     what a checkpoint needs in memory, by dtype
batch.py      a folder or parquet of images to JSON lines, on Ray Data
"""
