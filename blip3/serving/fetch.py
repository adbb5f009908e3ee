# SPDX-License-Identifier: Apache-2.0
"""The one safe way to open an image that a stranger names, for every API; the page opens only its own uploads.

    http(s) URL --- check the URL --- resolve --- check every address --- connect to a checked address --- read --+
         ^                                                                                              |         |
         +------------------------------ redirect: all of it again -------------------------------------+         |
    data URL or base64 text --- check the length --- decode strictly ---------------------------------------------+
    PIL image (an image/* body) ----------------------------------------------------------------------------------+
                                                            check structure, format and size, then decode in time <--+

Nothing is opened by a path, environment proxies are not consulted, and no message or log line repeats a URL. On a
network that reaches IPv4 through NAT64 only, remote images are refused: the embedded address is not looked at.
"""

import contextlib
import http.client
import io
import ipaddress
import logging
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from PIL import Image

from .decode import check_file, check_opened, decode_base64, decode_image, strip_data_header, too_many_bytes
from .limits import Deadline, ImageLimits, read_limits, shorten
from .privacy import pseudonym, silence_libraries
from .structure import Outline
from .urls import Address, Target, check_url, follow, is_public

logger = logging.getLogger("blip3.serving")

MAX_ADDRESSES = 4  # tried one after the other
REDIRECTS = (301, 302, 303, 307, 308)
READ_BYTES = 65536

Source = str | Image.Image
Checked = Outline | Image.Image
"""An image's file, or what a server has decoded already."""
Resolver = Callable[[str, int], Sequence[str]]


def resolve_with_system(host: str, port: int) -> list[str]:
    """Resolve a name as the operating system does."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


# -- Sockets ----------------------------------------------------------------------------------------------------------


class _TimedReader(io.RawIOBase):
    """Bytes of a socket until a deadline, however slowly they drip."""

    def __init__(self, sock: socket.socket, deadline: Deadline):
        self.sock, self.deadline = sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.sock.settimeout(self.deadline.remaining())
        return self.sock.recv_into(buffer)


class _TimedSocket:
    """The part of a socket that http.client uses, against a deadline."""

    def __init__(self, sock: socket.socket, deadline: Deadline):
        self.sock, self.deadline = sock, deadline

    def sendall(self, data: bytes) -> None:
        self.sock.settimeout(self.deadline.remaining())
        self.sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self.sock, self.deadline))

    def close(self) -> None:
        """Leave it open: the response is still read after http.client is done; the fetcher closes the socket."""


@contextlib.contextmanager
def _named(index: int, num_images: int) -> Iterator[None]:
    """Say in an error which image it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Image {index + 1} of {num_images}: {error}") from None


# -- The fetcher ------------------------------------------------------------------------------------------------------


class ImageFetcher:
    """Opens the images of requests within limits, and nothing else; libraries that would log them are silenced.

    Args:
        limits: from the environment (`BLIP3_PICTURE_...`) by default.
        public_loopback: loopback addresses to treat as public, for tests against servers on this machine.
        resolve: (host, port) to addresses; the system's by default.
        tls_context: verifies certificates and host names; the system's authorities by default.

    Raises:
        ValueError: if `public_loopback` names another address, or a limit in the environment cannot be read.
    """

    def __init__(
        self,
        limits: ImageLimits | None = None,
        public_loopback: Collection[str] = (),
        resolve: Resolver = resolve_with_system,
        tls_context: ssl.SSLContext | None = None,
    ):
        silence_libraries()
        self.limits = read_limits(ImageLimits, "BLIP3_PICTURE_") if limits is None else limits
        self._public_loopback = frozenset(ipaddress.ip_address(address) for address in public_loopback)
        if not all(address.is_loopback for address in self._public_loopback):
            raise ValueError(
                f"public_loopback holds {', '.join(sorted(map(str, self._public_loopback)))} but may hold loopback "
                "addresses only. It is probably meant to open a private network, which is not offered: send data URLs."
            )
        self._resolve = resolve
        self._lookups = threading.BoundedSemaphore(8)  # a lookup cannot be stopped, so only so many may hang
        self._tls_context = ssl.create_default_context() if tls_context is None else tls_context

    def fetch_images(self, sources: Sequence[Source], upright: bool = True) -> list[Image.Image]:
        """Open the images of one request: `fetch_files` and `decode_files` in one."""
        return self.decode_files(self.fetch_files(sources), upright)

    def fetch_files(
        self,
        sources: Sequence[Source],
        deadline: Deadline | None = None,
        hold: Callable[[int], None] = lambda num_bytes: None,
    ) -> list[Checked]:
        """Fetch and check the files of one request's images, in order, and decode none.

        Args:
            sources: http(s) URLs, data URLs, base64 texts or PIL images.
            deadline: of the request; `total_seconds` hold besides.
            hold: is told how many more bytes are about to be held, fewer where negative; may refuse.

        Raises:
            ValueError: naming the image, if one is refused or the request asks for too much.
        """
        limits, deadline = self.limits, self._within(deadline)
        if len(sources) > limits.max_images:
            raise ValueError(
                f"The request has {len(sources)} images but at most {limits.max_images} are read. It is probably "
                "a batch: split it into several requests."
            )
        files: list[Checked] = []
        num_pixels = 0
        for index, source in enumerate(sources):
            expected = self._expected_bytes(source)
            hold(expected)
            with _named(index, len(sources)):
                file = self._read_file(source, deadline, limits.max_total_pixels - num_pixels)
            hold((len(file.data) if isinstance(file, Outline) else 0) - expected)
            num_pixels += file.height * file.width
            files.append(file)
        return files

    def decode_files(
        self, files: Sequence[Checked], upright: bool = True, deadline: Deadline | None = None
    ) -> list[Image.Image]:
        """Decode what `fetch_files` gave.

        Args:
            files: of one request.
            upright: turn files as their EXIF tag says; False gives them as stored.
            deadline: of the request; `total_seconds` hold besides.

        Raises:
            ValueError: naming the image, if one is damaged or time runs out.
        """
        deadline = self._within(deadline)
        images = []
        for index, file in enumerate(files):
            with _named(index, len(files)):
                images.append(
                    decode_image(file, self.limits, deadline, upright) if isinstance(file, Outline) else file
                )
        return images

    def _within(self, deadline: Deadline | None) -> Deadline:
        seconds = self.limits.total_seconds
        return Deadline(seconds if deadline is None else deadline.remaining(seconds))

    def _expected_bytes(self, source: Source) -> int:
        if isinstance(source, Image.Image):
            return 0
        is_url = re.match(r"https?:", source[:8], re.IGNORECASE)
        return self.limits.max_bytes if is_url else min(len(source), self.limits.max_bytes)

    def _read_file(self, source: Source, deadline: Deadline, max_pixels: int) -> Checked:
        if isinstance(source, Image.Image):
            return check_opened(source, self.limits, max_pixels)
        if re.match(r"data:", source, re.IGNORECASE):
            data = decode_base64(strip_data_header(source), self.limits.max_bytes)
        elif re.match(r"[a-z][a-z0-9+.-]*:", source[:64], re.IGNORECASE):
            data = self._fetch(source, deadline)
        else:
            data = decode_base64(source, self.limits.max_bytes)
        return check_file(data, self.limits, max_pixels)

    def _fetch(self, url: str, deadline: Deadline) -> bytes:
        """Download one image's file.

        Raises:
            ValueError: if the URL, an address, a redirect or the answer is refused, or time runs out.
        """
        name, start = pseudonym(url), time.monotonic()
        for _ in range(self.limits.max_redirects + 1):
            target = check_url(url, self.limits.allowed_ports)
            if not self.limits.allow_remote:
                raise ValueError(
                    "it is remote and this server reads no remote images. It was probably started with "
                    "allow_remote off: send the image itself as a data URL."
                )
            data, location = self._get(target, deadline)
            if location is None:
                logger.info("fetched url %s: %d bytes in %.2f s", name, len(data), time.monotonic() - start)
                return data
            url = follow(url, location)
        raise ValueError(
            f"its URL leads through more than {self.limits.max_redirects} redirects. It is probably a loop or a login "
            "page: send the last URL, or a data URL."
        )

    def _get(self, target: Target, deadline: Deadline) -> tuple[bytes, str | None]:
        """Ask one server once; returns the body, or where it redirects to."""
        try:
            with self._connect(target, deadline) as sock:
                return self._ask(sock, target, deadline)
        except TimeoutError:
            raise ValueError(
                f"its server did not deliver it in time ({self.limits.connect_seconds:g} s to connect, "
                f"{self.limits.total_seconds:g} s for all images of a request). It is probably slow or down: try "
                "again, or send a data URL."
            ) from None
        except ssl.SSLError:
            raise ValueError(
                "its server could not prove its name by TLS. Its certificate is probably expired, self-signed or for "
                "another host: use another server, or send a data URL."
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(
                f"its server could not be read ({type(error).__name__}). It is probably down or not a web server: "
                "check the URL, or send a data URL."
            ) from None

    def _checked_addresses(self, target: Target, deadline: Deadline) -> list[Address]:
        """Resolve a host and refuse it if any of its addresses is not public.

        A name that does not exist gets the same message, so that answers do not map an internal network.

        Raises:
            ValueError: if it has no address or one that is not public.
            TimeoutError: if resolving takes too long.
        """
        addresses: list[Address] = []
        answer = self._resolve_in_time(target, deadline.remaining(self.limits.connect_seconds))
        is_allowed = bool(answer)
        for text in answer:
            try:
                address = ipaddress.ip_address(text)
            except ValueError:
                is_allowed = False
                break
            is_allowed = is_allowed and (is_public(address) or address in self._public_loopback)
            addresses.append(address)
        if not is_allowed:
            raise ValueError(
                "its host has no address, or one that is not public, and only public ones are read. It is probably "
                "misspelt or inside a private network: send the image itself as a data URL."
            )
        return list(dict.fromkeys(addresses))[:MAX_ADDRESSES]

    def _resolve_in_time(self, target: Target, seconds: float) -> Sequence[str]:
        """Resolve in a thread, because the system's resolver knows no timeout; an unknown name gives no addresses."""
        answers: queue.SimpleQueue = queue.SimpleQueue()

        def look_up() -> None:
            try:
                answers.put(list(self._resolve(target.host, target.port)))
            except (OSError, ValueError):
                answers.put([])
            finally:
                self._lookups.release()

        if not self._lookups.acquire(timeout=seconds):
            raise TimeoutError
        threading.Thread(target=look_up, daemon=True, name="resolve").start()
        try:
            return answers.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None

    def _connect(self, target: Target, deadline: Deadline) -> socket.socket:
        """Connect to an address that was checked: the name is never resolved again."""
        addresses = self._checked_addresses(target, deadline)
        for index, address in enumerate(addresses):
            sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
            try:
                sock.settimeout(deadline.remaining(self.limits.connect_seconds))
                sock.connect((str(address), target.port))
                if target.is_tls:
                    sock.settimeout(deadline.remaining(self.limits.connect_seconds))
                    sock = self._tls_context.wrap_socket(sock, server_hostname=target.host)
                return sock
            except OSError:
                sock.close()
                if index == len(addresses) - 1:
                    raise
        raise OSError

    def _ask(self, sock: socket.socket, target: Target, deadline: Deadline) -> tuple[bytes, str | None]:
        """Send one GET over a connected socket and read the answer within the limits."""
        connection = http.client.HTTPConnection(target.host_header)
        connection.auto_open = 0
        connection.sock = _TimedSocket(sock, deadline)  # type: ignore[assignment]
        connection.putrequest("GET", target.path, skip_host=True, skip_accept_encoding=True)
        headers = {"Host": target.host_header, "User-Agent": "blip3-serving", "Accept": "image/*"}
        for name, value in (headers | {"Accept-Encoding": "identity", "Connection": "close"}).items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        if response.status in REDIRECTS:
            return b"", response.getheader("Location", "")
        encoding = response.getheader("Content-Encoding", "identity").strip().lower()
        if response.status != 200 or encoding != "identity":
            raise ValueError(
                f"its server answered with status {response.status} and encoding {shorten(encoding)} but 200 and "
                "'identity' are expected. The image has probably moved or needs a login: check the URL, or send a "
                "data URL."
            )
        return self._read(response), None

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        data = bytearray()
        is_too_long = response.length is not None and response.length > self.limits.max_bytes
        while not is_too_long and (chunk := response.read(READ_BYTES)):
            data += chunk
            is_too_long = len(data) > self.limits.max_bytes
        if is_too_long:
            raise ValueError(too_many_bytes("more", self.limits.max_bytes))
        return bytes(data)
