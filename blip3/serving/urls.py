# SPDX-License-Identifier: Apache-2.0
"""Which URLs and addresses may be contacted: the public internet, by http and https, and nothing near this server."""

import dataclasses
import ipaddress
import re
import urllib.parse
from collections.abc import Collection

from .limits import shorten

MAX_URL_CHARACTERS = 2048

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
class Target:
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


def check_url(url: str, allowed_ports: Collection[int]) -> Target:
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
    return Target(scheme == "https", host, port, f"{path}?{query}" if query else path)


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


def follow(url: str, location: str) -> str:
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
