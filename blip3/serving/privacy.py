# SPDX-License-Identifier: Apache-2.0
"""What of a request may stand in a log: nothing but numbers, and names that hold for this process alone."""

import hashlib
import logging
import secrets
import traceback

# Loggers of libraries that write down what passes through them at DEBUG or INFO: tags and texts of images, URLs,
# headers, fields of forms.
LIBRARIES = (
    "PIL",
    "asyncio",
    "gradio",
    "gradio_client",
    "httpcore",
    "httpx",
    "multipart",
    "python_multipart",
    "requests",
    "starlette",
    "transformers",
    "urllib3",
    "uvicorn.access",
    "websockets",
)

_SALT = secrets.token_bytes(32)  # without it, whoever guesses a prompt finds it in the log by its hash


def pseudonym(text: str) -> str:
    """Name a text by a salted hash: the same within a process, worth nothing outside of it."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), key=_SALT, digest_size=6).hexdigest()


def silence_libraries() -> None:
    """Keep loggers of libraries, those below them too, from saying anything less than a warning."""
    beginnings = tuple(f"{name}." for name in LIBRARIES)
    below = [name for name in logging.root.manager.loggerDict if name.startswith(beginnings)]
    for name in {*LIBRARIES, *below}:
        logger = logging.getLogger(name)
        inherits = logger.level == logging.NOTSET and name not in LIBRARIES
        if logger.level < logging.WARNING and not inherits:
            logger.setLevel(logging.WARNING)


def describe_failure(error: BaseException) -> str:
    """Say what failed and where, without the error's message, which may repeat a request."""
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    return f"{type(error).__name__} at {' < '.join(reversed(places[-8:])) or 'an unknown place'}"
