# SPDX-License-Identifier: Apache-2.0
"""The one safe way to open an image that a stranger names, for every API; the page opens only its own uploads.

    http(s) URL --- check the URL --- resolve --- check every address --- connect to a checked address --- read --+
         ^                                                                                              |         |
         +------------------------------ redirect: all of it again -------------------------------------+         |
    data URL or base64 text --- check the length --- decode strictly ---------------------------------------------+
    PIL image (an image/* body) ----------------------------------------------------------------------------------+
                                                              check format and size by the header, then decode <--+

Nothing is opened by a path, environment proxies are not consulted, and no message or log line repeats a URL. On a
network that reaches IPv4 through NAT64 only, remote images are refused: the embedded address is not looked at.
"""

import base64
import dataclasses
import hashlib
import http.client
import io
import ipaddress
import logging
import math
import os
import queue
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from PIL import Image, ImageOps

logger = logging.getLogger("blip3.serving")

# TIFF is left out on purpose: it wraps many codecs, and browsers do not send it. MPO is what some cameras call JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_URL_CHARACTERS = 2048
MAX_ADDRESSES = 4  # tried one after the other
MAX_JPEG_SCANS = 32  # encoders write about ten; each scan costs a pass over the whole image
REDIRECTS = (301, 302, 303, 307, 308)
READ_BYTES = 65536

# IANA's special-purpose registries, spelled out because ipaddress.is_global changes between Python releases.
NOT_PUBLIC_4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network, unspecified
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT; Alibaba's metadata service
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's host agent, a public address that only its own machines reach
        "169.254.0.0/16",  # link-local; metadata service of most clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata service
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
# Outside it: loopback, link-local, unique local (AWS metadata), multicast, IPv4-mapped and -compatible, NAT64.
GLOBAL_UNICAST_6 = ipaddress.IPv6Network("2000::/3")
NOT_PUBLIC_6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
ISATAP = (0x00005EFE, 0x02005EFE)  # third quarter of an IPv6 address that embeds an IPv4 address

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """What one request may make a server fetch and decode.

    Attributes:
        allow_remote: False refuses every URL but data URLs.
        connect_seconds: for resolving a name, and again for connecting with the TLS handshake.
        total_seconds: for all remote images of one request, from the first name to the last byte.
        max_redirects: per image; 0 refuses redirects.
        allowed_ports: of http and https URLs.
        max_bytes: of one image's file, downloaded or decoded from base64.
        max_side: height and width of one image, in pixels.
        max_pixels: height x width of one image.
        max_total_pixels: of all images of one request.
        max_images: of one request; 0 refuses images.

    Raises:
        ValueError: if a limit is not a number that can be kept.
    """

    allow_remote: bool = True
    connect_seconds: float = 3.0
    total_seconds: float = 15.0
    max_redirects: int = 3
    allowed_ports: tuple[int, ...] = (80, 443)
    max_bytes: int = 10 * 2**20
    max_side: int = 16_384
    max_pixels: int = 50_000_000
    max_total_pixels: int = 200_000_000
    max_images: int = 16

    def __post_init__(self) -> None:
        check_limits(self, may_be_zero=("max_redirects", "max_images"))


def check_limits(limits: Any, may_be_zero: Collection[str] = ()) -> None:
    """Refuse a dataclass of limits whose values cannot be kept.

    Raises:
        ValueError: naming the field.
    """
    for field in dataclasses.fields(limits):
        value, kind = getattr(limits, field.name), type(field.default)
        if kind is bool and isinstance(value, bool):
            continue
        numbers = value if kind is tuple and isinstance(value, tuple) else (value,)
        allowed = (int, float) if kind is float else (int,)
        low = 0 if field.name in may_be_zero else 1 if kind is int else 1e-3
        for number in numbers:
            is_number = isinstance(number, allowed) and not isinstance(number, bool) and kind is not bool
            if not is_number or not math.isfinite(number) or number < low:
                raise ValueError(
                    f"{type(limits).__name__}.{field.name} is {shorten(value)} but must be like its default, "
                    f"{field.default!r}. It was probably meant to switch the limit off: write a number larger than "
                    "anything you trust."
                )


def read_limits(kind: type, prefix: str, environment: Mapping[str, str] | None = None) -> Any:
    """Build limits from environment variables, `prefix` and the field's name in capitals; others keep their default.

    Args:
        kind: a dataclass of limits.
        prefix: such as `BLIP3_PICTURE_`: `BLIP3_PICTURE_MAX_BYTES=1000000`.
        environment: the process's own by default.

    Raises:
        ValueError: naming the variable that cannot be read.
    """
    environment = os.environ if environment is None else environment
    values = {}
    for field in dataclasses.fields(kind):
        name = prefix + field.name.upper()
        text = environment.get(name, "").strip()
        if not text:
            continue
        try:
            values[field.name] = _parse_limit(text, type(field.default))
        except (ValueError, KeyError):
            raise ValueError(
                f"{name} is {shorten(text)} but must be written like {field.default!r}. It was probably given a unit "
                "or a word: write plain numbers, a list separated by commas."
            ) from None
    return kind(**values)


def _parse_limit(text: str, kind: type) -> Any:
    if kind is bool:
        return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
    if kind is tuple:
        return tuple(int(part) for part in text.split(","))
    return kind(text)


def shorten(value: Any) -> str:
    """Describe a value of a request in one short line of ASCII; texts are cut, containers only named.

    >>> shorten("x" * 500), shorten({"a": 1}), shorten(10**5000)
    ("'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'...", 'a dict', 'a number of 16610 bits')
    """
    if isinstance(value, str):
        return ascii(value[:40])[:80] + ("..." if len(value) > 40 else "")
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"a {type(value).__name__}"


# -- Addresses and URLs -----------------------------------------------------------------------------------------------


def is_public(address: Address) -> bool:
    """Tell whether an address is on the public internet and says so itself, without an address embedded in it.

    >>> is_public(ipaddress.ip_address("8.8.8.8")), is_public(ipaddress.ip_address("::ffff:8.8.8.8"))
    (True, False)
    """
    if not address.is_global or address.is_multicast:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in NOT_PUBLIC_4)
    if address.scope_id is not None or (int(address) >> 32) & 0xFFFFFFFF in ISATAP:
        return False
    return address in GLOBAL_UNICAST_6 and not any(address in network for network in NOT_PUBLIC_6)


@dataclasses.dataclass(frozen=True)
class _Target:
    """A checked http or https URL."""

    is_tls: bool
    host: str  # ASCII, without brackets
    port: int
    path: str  # with the query

    @property
    def host_header(self) -> str:
        """The Host header: brackets around IPv6, the port unless it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"


def _check_url(url: str, allowed_ports: Collection[int]) -> _Target:
    """Read a URL without contacting anything.

    Raises:
        ValueError: if it is not a plain http or https URL on an allowed port.
    """
    scheme = url.split(":", 1)[0].lower()
    if scheme not in ("http", "https"):
        raise ValueError(
            f"it has the scheme {shorten(scheme)} but only http, https and data URLs are read. It is probably a path "
            "on your side: send the image itself as a data URL."
        )
    if len(url) > MAX_URL_CHARACTERS or re.search(r"[\x00-\x20\x7f\\]", url):
        raise ValueError(
            f"its URL has {len(url)} characters, at most {MAX_URL_CHARACTERS} and no spaces, controls or backslashes "
            "are allowed. It was probably not percent-encoded: encode it, or send a data URL."
        )
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port if parts.port is not None else {"http": 80, "https": 443}[scheme]
        host = _ascii_host(parts.hostname or "")
        path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
        query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~?[]")
    except ValueError:  # UnicodeError is one
        raise ValueError(
            "its URL has no valid host or port. It was probably cut or joined wrongly: send a complete URL."
        ) from None
    if "@" in parts.netloc:
        raise ValueError(
            "its URL carries a user name or password, which are never sent. It was probably copied from a private "
            "service: send the image itself as a data URL."
        )
    if port not in allowed_ports:
        raise ValueError(
            f"its URL names port {port} but only {', '.join(map(str, allowed_ports))} may be read. It is probably an "
            "internal service: send the image itself as a data URL."
        )
    return _Target(scheme == "https", host, port, f"{path}?{query}" if query else path)


def _ascii_host(host: str) -> str:
    """Return a host name in ASCII; an IPv6 address as it is.

    Raises:
        ValueError: if it is neither.
    """
    if ":" in host:
        return str(ipaddress.IPv6Address(host))
    if not host.isascii():
        host = host.encode("idna").decode("ascii")
    if len(host) > 253 or not re.fullmatch(r"[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_.])?", host) or ".." in host:
        raise ValueError("not a host name")
    return host


def resolve_with_system(host: str, port: int) -> list[str]:
    """Resolve a name as the operating system does."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


# -- Time -------------------------------------------------------------------------------------------------------------


class _Deadline:
    """A moment after which nothing may wait any longer."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def remaining(self, at_most: float = math.inf) -> float:
        """Seconds left, at most `at_most`.

        Raises:
            TimeoutError: if none are left.
        """
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(left, at_most)


class _TimedReader(io.RawIOBase):
    """Bytes of a socket until a deadline, however slowly they drip."""

    def __init__(self, sock: socket.socket, deadline: _Deadline):
        self.sock, self.deadline = sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.sock.settimeout(self.deadline.remaining())
        return self.sock.recv_into(buffer)


class _TimedSocket:
    """The part of a socket that http.client uses, against a deadline."""

    def __init__(self, sock: socket.socket, deadline: _Deadline):
        self.sock, self.deadline = sock, deadline

    def sendall(self, data: bytes) -> None:
        self.sock.settimeout(self.deadline.remaining())
        self.sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self.sock, self.deadline))

    def close(self) -> None:
        """Leave it open: the response is still read after http.client is done; the fetcher closes the socket."""


# -- The fetcher ------------------------------------------------------------------------------------------------------


class ImageFetcher:
    """Opens the images of requests within limits, and nothing else.

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

    def fetch_images(self, sources: Sequence[str | Image.Image], upright: bool = True) -> list[Image.Image]:
        """Open the images of one request, in order, completely decoded.

        Args:
            sources: http(s) URLs, data URLs, base64 texts or PIL images.
            upright: turn files as their EXIF tag says; False gives them as stored.

        Raises:
            ValueError: naming the image, if one is refused or the request asks for too much.
        """
        limits, deadline = self.limits, _Deadline(self.limits.total_seconds)
        if len(sources) > limits.max_images:
            raise ValueError(
                f"The request has {len(sources)} images but at most {limits.max_images} are read. It is probably "
                "a batch: split it into several requests."
            )
        images: list[Image.Image] = []
        num_pixels = 0
        for index, source in enumerate(sources):
            try:
                image = self._open(source, deadline, limits.max_total_pixels - num_pixels, upright)
            except ValueError as error:
                raise ValueError(f"Image {index + 1} of {len(sources)}: {error}") from None
            num_pixels += image.height * image.width
            images.append(image)
        return images

    def _open(self, source: str | Image.Image, deadline: _Deadline, max_pixels: int, upright: bool) -> Image.Image:
        if isinstance(source, Image.Image):
            return check_image(source, self.limits, max_pixels, upright)
        if re.match(r"data:", source, re.IGNORECASE):
            data = decode_base64(_strip_data_header(source), self.limits.max_bytes)
        elif re.match(r"[a-z][a-z0-9+.-]*:", source[:64], re.IGNORECASE):
            data = self._fetch(source, deadline)
        else:
            data = decode_base64(source, self.limits.max_bytes)
        return decode_image(data, self.limits, max_pixels, upright)

    def _fetch(self, url: str, deadline: _Deadline) -> bytes:
        """Download one image's file.

        Raises:
            ValueError: if the URL, an address, a redirect or the answer is refused, or time runs out.
        """
        name, start = hashlib.sha256(url.encode("utf-8", "replace")).hexdigest()[:12], time.monotonic()
        for _ in range(self.limits.max_redirects + 1):
            target = _check_url(url, self.limits.allowed_ports)
            if not self.limits.allow_remote:
                raise ValueError(
                    "it is remote and this server reads no remote images. It was probably started with "
                    "allow_remote off: send the image itself as a data URL."
                )
            data, location = self._get(target, deadline)
            if location is None:
                logger.info("fetched url sha256 %s: %d bytes in %.2f s", name, len(data), time.monotonic() - start)
                return data
            url = _join(url, location)
        raise ValueError(
            f"its URL leads through more than {self.limits.max_redirects} redirects. It is probably a loop or a login "
            "page: send the last URL, or a data URL."
        )

    def _get(self, target: _Target, deadline: _Deadline) -> tuple[bytes, str | None]:
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

    def _checked_addresses(self, target: _Target, deadline: _Deadline) -> list[Address]:
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

    def _resolve_in_time(self, target: _Target, seconds: float) -> Sequence[str]:
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

    def _connect(self, target: _Target, deadline: _Deadline) -> socket.socket:
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

    def _ask(self, sock: socket.socket, target: _Target, deadline: _Deadline) -> tuple[bytes, str | None]:
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
            raise ValueError(_too_many_bytes("more", self.limits.max_bytes))
        return bytes(data)


def _join(url: str, location: str) -> str:
    """Follow a Location header, which http.client reads as Latin-1.

    Raises:
        ValueError: if it is empty or no URL.
    """
    try:
        joined = urllib.parse.urljoin(url, location.encode("latin-1").decode("utf-8"))
    except ValueError:
        joined = ""
    if not location.strip() or not joined:
        raise ValueError(
            "its server redirects to no valid URL. It is probably misconfigured: send the last URL, or a data URL."
        )
    return joined


# -- Files ------------------------------------------------------------------------------------------------------------


def _too_many_bytes(given: str, max_bytes: int) -> str:
    return (
        f"its file has {given} than {max_bytes} bytes, the limit. It is probably an original from a camera: scale it "
        "down or save it as JPEG."
    )


def _strip_data_header(url: str) -> str:
    header, _, encoded = url.partition(",")
    if not re.fullmatch(r"data:image/[\w.+-]{1,40}(;[\w.+-]{1,40}=[\w.+-]{1,40}){0,4};base64", header[:400], re.I):
        raise ValueError(
            f"its data URL begins with {shorten(header)} but 'data:image/...;base64,' is expected. It is probably of "
            "another type or percent-encoded: send base64."
        )
    return encoded


def decode_base64(text: str, max_bytes: int) -> bytes:
    """Decode base64 text strictly, after checking its length.

    Raises:
        ValueError: if it is too long, or anything but canonical base64.
    """
    if len(text) > 4 * math.ceil(max_bytes / 3):
        raise ValueError(_too_many_bytes("more", max_bytes))
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError(
            f"its text of {len(text)} characters is neither an http, https or data URL nor base64. It is probably the "
            "name of a file, which is never opened here, or was cut: send the file's bytes as base64, with padding "
            "and without line breaks."
        ) from None


def decode_image(data: bytes, limits: ImageLimits, max_pixels: int | None = None, upright: bool = True) -> Image.Image:
    """Decode an image's file; the first frame of animations.

    Args:
        data: the file.
        limits: which sizes are accepted.
        max_pixels: what is left of the request's pixels.
        upright: turn the image as its EXIF tag says.

    Raises:
        ValueError: if it is no complete image of an accepted format and size.
    """
    if len(data) > limits.max_bytes:
        raise ValueError(_too_many_bytes("more", limits.max_bytes))
    # In a JPEG's compressed data FF is always followed by 00, so this counts scans (and those of thumbnails).
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise ValueError(
            f"it is a JPEG of more than {MAX_JPEG_SCANS} scans, the limit. It was probably built to take long to "
            "decode: save it again with an ordinary encoder."
        )
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # decoders raise whatever a broken file makes them meet
        raise ValueError(
            f"its {len(data)} bytes are not the beginning of a {', '.join(FORMATS)} file of acceptable size. It is "
            "probably of another type, a web page or empty: save it as JPEG or PNG."
        ) from None
    image = _load(image, limits, max_pixels)
    return turn_upright(image) if upright else image


def turn_upright(image: Image.Image) -> Image.Image:
    """Turn an image that was just opened as its EXIF tag says, in place; returns it."""
    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # damaged tags; Pillow writes them anew after it has turned the pixels
        image.info.pop("exif", None)
    return image


def check_image(
    image: Image.Image, limits: ImageLimits, max_pixels: int | None = None, upright: bool = True
) -> Image.Image:
    """Check an image that a server has already opened from a body, and decode it by our own rules where it can.

    An image that is no longer a file is left as it is, not turned.

    Raises:
        ValueError: as `decode_image` does.
    """
    file = getattr(image, "fp", None)
    if isinstance(file, io.BytesIO) and not file.closed:
        return decode_image(file.getvalue(), limits, max_pixels, upright)
    if image.format not in (None, "MPO", *FORMATS):
        raise ValueError(
            f"it is a {shorten(image.format)} but {', '.join(FORMATS)} are read. It is probably an original from a "
            "scanner: save it as JPEG or PNG."
        )
    return _load(image, limits, max_pixels)


def _load(image: Image.Image, limits: ImageLimits, max_pixels: int | None) -> Image.Image:
    height, width, left = image.height, image.width, limits.max_pixels if max_pixels is None else max_pixels
    if max(height, width) > limits.max_side or height * width > min(limits.max_pixels, left):
        raise ValueError(
            f"it has {height} x {width} pixels (height x width) but at most {limits.max_side} a side, "
            f"{limits.max_pixels} in all and {left} left in this request are decoded. It is probably an original from "
            "a camera: scale it down."
        )
    try:
        image.load()
    except Exception:  # decoders raise whatever a broken file makes them meet
        raise ValueError(
            f"its {height} x {width} pixels (height x width) could not be decoded. It is probably cut or damaged: "
            "open it in a viewer and save it again."
        ) from None
    return image
