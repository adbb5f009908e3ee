# SPDX-License-Identifier: Apache-2.0
"""What a server needs beyond the model itself.

endpoint.py   what handler.py at the root gives to Inference Endpoints
images.py   the one way an image named by a request is opened, and everything that is refused on the way
bodies.py     the body of a request to prompts and generation options
app.py        a page in the browser, one file so that a Space can carry it; opens only its own uploads
memory.py     what a checkpoint needs in memory, by dtype
batch.py      a folder or parquet of images to JSON lines, on Ray Data
"""
