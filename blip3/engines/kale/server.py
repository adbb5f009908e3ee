# SPDX-License-Identifier: Apache-2.0
"""A writer on a server that speaks OpenAI's words: vLLM, `transformers serve`, or a service.

    request --> at most `concurrency` under way --> POST chat/completions --+--> reply
                    ^                                                       |
                    +---- wait, as the server says or ever longer <---------+  429, 5xx, a connection that broke
                                                                            +--> one sentence: the request's error
                                                                            +--> RuntimeError: the run's fault

A fault of the run is what no request would survive: nobody listens, the key or the model is refused, request after
request fails, or every request from the first one on is refused, as a model that reads text alone refuses images. Rows
in error would then fill the output; instead the run ends, and the same command continues it.
"""

import asyncio
import base64
import datetime
import email.utils
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ...refusals import install
from .writers import Reply, Request, WriterOptions

MAX_IMAGE_SIDE = 2048  # of an image that is sent; larger ones are made smaller
MAX_REPLY_BYTES = 4 * 2**20
MAX_WAIT = 600.0  # seconds; a server that asks for longer is not waited for
FIRST_WAIT = 0.5  # doubled with each try
MAX_FAILURES_IN_A_ROW = 32  # requests, each after all its tries
MAX_REFUSALS_AT_FIRST = 32  # requests of a worker, before it has had any reply
_REFUSED = {401: "the key is missing or wrong", 403: "the key may not do this", 404: "the url or the model is another"}


class ServerWriter:
    """Sends requests to a server.

    Args:
        options: with a url.

    Raises:
        ImportError: if httpx is not installed.
    """

    def __init__(self, options: WriterOptions):
        self.options, self._http = options, _import_httpx()
        self._certificates = self._http.create_ssl_context()  # read once: that takes longer than a request
        self._failures = 0  # in a row, by the server's fault
        self._refusals = 0  # before the first reply, by whoever's fault
        self._has_replied = False
        self._not_before = 0.0  # no request starts earlier, by time.monotonic

    def write(self, requests: Sequence[Request]) -> list[Reply]:
        """Send the requests, a bounded number of them at a time.

        Raises:
            RuntimeError: if nobody listens, key or model are refused, or request after request fails.
        """
        return asyncio.run(self._write(requests))

    async def _write(self, requests: Sequence[Request]) -> list[Reply]:
        gate = asyncio.Semaphore(self.options.concurrency)
        timeout = self._http.Timeout(self.options.timeout)
        given = {"headers": _headers(self.options), "timeout": timeout, "verify": self._certificates}
        async with self._http.AsyncClient(**given) as client:

            async def reply(request: Request) -> Reply:
                async with gate:
                    return await self._reply(client, self._body(request))

            return await asyncio.gather(*map(reply, requests))

    def _body(self, request: Request) -> dict[str, Any]:
        content: Any = request.text
        if request.image is not None:
            image = {"type": "image_url", "image_url": {"url": data_url(request.image)}}
            content = [image, {"type": "text", "text": request.text}]
        return {
            "model": self.options.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.options.max_new_tokens,
            "temperature": 0,
            "seed": self.options.seed,
            "stream": False,
        }

    async def _reply(self, client: Any, body: dict[str, Any]) -> Reply:
        """Try until there is a reply, or an error that a further try would not change."""
        for attempt in range(1, self.options.tries + 1):
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            try:
                reply = read_reply(await self._try(client, body))
            except _FailedTry as failed:
                is_last = attempt == self.options.tries or not failed.may_pass or failed.wait > MAX_WAIT
                if is_last:
                    return self._give_up(failed)
                await self._wait(failed, attempt)
            else:
                self._failures, self._has_replied = 0, True
                return reply
        raise AssertionError("a reply or an error ends the last try")

    async def _wait(self, failed: "_FailedTry", attempt: int) -> None:
        if failed.wait:  # the server speaks of all requests
            self._not_before = max(self._not_before, time.monotonic() + failed.wait)
        else:
            await asyncio.sleep(FIRST_WAIT * 2 ** (attempt - 1))

    async def _try(self, client: Any, body: dict[str, Any]) -> bytes:
        """Send one request once and read what comes back, all within the time for it."""
        url = f"{self.options.url.rstrip('/')}/chat/completions"
        try:
            async with asyncio.timeout(self.options.timeout):
                async with client.stream("POST", url, json=body) as response:
                    return check_status(response.status_code, response.headers, await _read(response))
        except (TimeoutError, self._http.ReadTimeout, self._http.WriteTimeout, self._http.PoolTimeout):
            raise _FailedTry(f"The server did not reply within {self.options.timeout:g} s.", counts=True) from None
        except (self._http.ConnectError, self._http.ConnectTimeout):
            message = "The server could not be reached."
            raise _FailedTry(message, may_pass=True, counts=True, is_reached=False) from None
        except self._http.TransportError:
            raise _FailedTry("The server broke off its reply.", may_pass=True, counts=True) from None
        except self._http.HTTPError as error:
            raise _FailedTry(f"The server's reply cannot be read ({type(error).__name__}).") from None

    def _give_up(self, failed: "_FailedTry") -> Reply:
        """Turn the last failure into an error of the request, or into a fault of the run."""
        self._failures = self._failures + 1 if failed.counts else 0
        self._refusals += not self._has_replied
        if not failed.is_reached:
            raise RuntimeError(
                f"The server {self.options.url} was asked {self.options.tries} times and nobody listened, but it is "
                "to write captions. It probably ended, or runs elsewhere: start it, and repeat the command to go on."
            )
        if failed.status in _REFUSED:
            raise RuntimeError(
                f"The server {self.options.url} answered {failed.status} to a request for the model "
                f"{self.options.model!r}, but it is to write captions. Probably {_REFUSED[failed.status]}: correct "
                "it, and repeat the command to continue."
            )
        self._check_failures(failed)
        return Reply(error=str(failed))

    def _check_failures(self, failed: "_FailedTry") -> None:
        """End the run where failures are no longer those of single requests."""
        if self._failures >= MAX_FAILURES_IN_A_ROW:
            raise RuntimeError(
                f"{self._failures} requests in a row failed at the server {self.options.url}, each after all its "
                f"tries; the last: {failed} Replies are expected to nearly all of them. The server is probably "
                "overloaded or in trouble: look at its log, lower the concurrency or raise the time-out, and repeat "
                "the command to continue."
            )
        if self._refusals >= MAX_REFUSALS_AT_FIRST:
            raise RuntimeError(
                f"The first {self._refusals} requests to the server {self.options.url} for the model "
                f"{self.options.model!r} all failed; the last: {failed} Replies are expected to nearly all. The model "
                "probably cannot do what it is asked, such as read images or so many tokens: try one request with "
                "curl, name another model or other options, and repeat the command to continue."
            )


class _FailedTry(Exception):  # noqa: N818 - it is no error yet
    """A try without a reply.

    Args:
        message: one sentence, the same from run to run.
        may_pass: whether a further try may succeed.
        wait: seconds that the server asked for; 0 if it did not.
        counts: whether the server is at fault, not the request.
        status: of HTTP.
        is_reached: whether anybody listened.
    """

    def __init__(
        self,
        message: str,
        may_pass: bool = False,
        wait: float = 0.0,
        counts: bool = False,
        status: int = 200,
        is_reached: bool = True,
    ):
        super().__init__(message)
        self.may_pass, self.wait, self.counts, self.status, self.is_reached = (
            may_pass,
            wait,
            counts,
            status,
            is_reached,
        )


async def _read(response: Any) -> bytes:
    data = bytearray()
    async for chunk in response.aiter_bytes():
        data += chunk
        if len(data) > MAX_REPLY_BYTES:
            raise _FailedTry(f"The server's reply is longer than {MAX_REPLY_BYTES} bytes.")
    return bytes(data)


def check_status(status: int, headers: Mapping[str, str], body: bytes) -> bytes:
    """Give the body of a reply that succeeded.

    Raises:
        _FailedTry: for any other, with what a further try can hope for.
    """
    if status == 200:
        return body
    is_busy = status == 429 or 500 <= status < 600
    wait = retry_after(headers.get("retry-after", "")) if is_busy else 0.0
    raise _FailedTry(
        f"The server answered {status}{_reason(body)}.", may_pass=is_busy, wait=wait, counts=is_busy, status=status
    )


def _reason(body: bytes) -> str:
    """Give what a server says is wrong with a request, in brackets; nothing if it says it in other words."""
    try:
        values = json.loads(body)
        message = (values.get("error") or values)["message"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return ""
    return f" ({' '.join(str(message).split())[:200].rstrip('.')})"


def retry_after(value: str) -> float:
    """Read the seconds of a header Retry-After, a number or a date; 0 for anything else.

    >>> retry_after("3"), retry_after("soon")
    (3.0, 0.0)
    """
    if value.strip().isdecimal():
        return float(value)
    try:
        then = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return 0.0
    then = then if then.tzinfo else then.replace(tzinfo=datetime.UTC)
    return max(0.0, (then - datetime.datetime.now(datetime.UTC)).total_seconds())


def read_reply(body: bytes) -> Reply:
    """Read a chat completion.

    Raises:
        _FailedTry: if it is none.
    """
    try:
        choice = json.loads(body)["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise _FailedTry("The server's reply is no chat completion.") from None
    if not isinstance(text, str):
        raise _FailedTry("The server's reply holds no text.")
    return Reply(text.strip(), reason != "length")


def data_url(image: Image.Image) -> str:
    """Write an image as the data URL of a JPEG, made smaller where it is larger than `MAX_IMAGE_SIDE`."""
    if max(image.size) > MAX_IMAGE_SIDE:
        image = image.copy()
        image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def list_models(options: WriterOptions) -> list[str]:
    """Ask a server for its models, by their names.

    Raises:
        ImportError: if httpx is not installed.
        RuntimeError: if it does not say.
    """
    http, url = _import_httpx(), f"{options.url.rstrip('/')}/models"
    try:
        response = http.get(url, headers=_headers(options), timeout=options.timeout)
        response.raise_for_status()
        return [str(model["id"]) for model in response.json()["data"]]
    except (http.HTTPError, ValueError, TypeError, KeyError) as error:
        raise RuntimeError(
            f"{url} was asked for the server's models and gave {type(error).__name__}: {error}, but a list of them is "
            "expected. The server is probably not up yet, or the url does not end with /v1: try it with curl."
        ) from error


def served_model(options: WriterOptions) -> str:
    """Give the name of the model to ask for: the one in the options, or else the only one there.

    Raises:
        RuntimeError: if the server does not say which it has.
        ValueError: if it has several, or none.
    """
    if options.model:
        return options.model
    models = list_models(options)
    if len(models) != 1:
        raise ValueError(
            f"The server {options.url} has {len(models)} models ({', '.join(models[:8])}) and none was named, but one "
            "is to be asked. It probably serves several: name one of them."
        )
    return models[0]


def check_server(options: WriterOptions) -> None:
    """Refuse what no server could be asked with.

    Raises:
        ImportError: if httpx is not installed.
        ValueError: if the key is missing.
    """
    _import_httpx()
    _headers(options)


def _headers(options: WriterOptions) -> dict[str, str]:
    if not options.key_variable:
        return {}
    key = os.environ.get(options.key_variable)
    if not key:
        raise ValueError(
            f"The environment variable {options.key_variable} is empty, but it is to hold the key of {options.url}. "
            "It was probably not exported, or not to the workers: set it where they run."
        )
    return {"Authorization": f"Bearer {key}"}


def _import_httpx() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise ImportError(
            f"A server is to be asked but httpx cannot be imported ({error}). The extra was probably left out: run "
            f"{install('engines')}, or `pip install httpx`."
        ) from error
    return httpx
