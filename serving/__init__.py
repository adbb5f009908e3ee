# SPDX-License-Identifier: Apache-2.0
"""What a server needs beyond the model itself.

pictures.py   the one way a picture named by a request is opened, and everything that is refused on the way
bodies.py     the body of a request to prompts and generation options
"""
