# SPDX-License-Identifier: Apache-2.0
"""Attacks by name: addresses that are not public, forged URLs, redirects."""

import doctest
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip3.serving import urls
from blip3.serving.urls import is_public
from support.site import IMAGE, OFFLINE, PRIVATE, RANDOM, data_url, opened_or_refused, refused

# -- Addresses --------------------------------------------------------------------------------------------------------

HOSTS = {
    "loopback": "127.0.0.1",
    "loopback-other": "127.0.0.6",
    "loopback-short": "127.1",
    "loopback-decimal": "2130706433",
    "loopback-hex": "0x7f000001",
    "loopback-hex-dotted": "0x7f.0.0.1",
    "loopback-octal": "017700000001",
    "loopback-full-width": "１２７.0.0.1",  # noqa: RUF001
    "loopback-ideographic-dots": "127。0。0。1",
    "localhost": "localhost",
    "localhost-capitals": "LOCALHOST",
    "localhost-dot": "localhost.",
    "loopback-6": "[::1]",
    "loopback-6-long": "[0:0:0:0:0:0:0:1]",
    "unspecified": "0.0.0.0",
    "unspecified-short": "0",
    "unspecified-6": "[::]",
    "private-10": "10.0.0.1",
    "private-172": "172.16.0.1",
    "private-192": "192.168.0.1",
    "cgnat": "100.64.0.1",
    "link-local": "169.254.1.1",
    "link-local-6": "[fe80::1]",
    "unique-local-6": "[fd12:3456::1]",
    "site-local-6": "[fec0::1]",
    "multicast": "224.0.0.1",
    "multicast-6": "[ff02::1]",
    "multicast-6-global": "[ff0e::1]",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "benchmarking": "198.18.0.1",
    "documentation": "203.0.113.7",
    "documentation-6": "[2001:db8::1]",
    "metadata": "169.254.169.254",
    "metadata-aws-6": "[fd00:ec2::254]",
    "metadata-alibaba": "100.100.100.200",
    "metadata-oracle": "192.0.0.192",
    "metadata-azure": "168.63.129.16",
    "metadata-by-name": "metadata.google.internal",
    "mapped": "[::ffff:127.0.0.1]",
    "mapped-of-the-public-one": "[::ffff:127.0.0.5]",
    "mapped-global": "[::ffff:8.8.8.8]",
    "compatible": "[::7f00:1]",
    "6to4": "[2002:7f00:1::]",
    "nat64": "[64:ff9b::7f00:1]",
    "nat64-local": "[64:ff9b:1::7f00:1]",
    "teredo": "[2001:0:7f00:1::]",
    "isatap": "[2a00::5efe:7f00:1]",
    "name-of-a-private-address": "private.test",
    "name-of-both": "mixed.test",
    "name-of-a-mapped-address": "mapped.test",
    "name-of-a-scoped-address": "scoped.test",
    "name-of-nonsense": "nonsense.test",
    "name-of-nothing": "missing.test",
}


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS.keys())
@pytest.mark.parametrize("how", ["direct", "redirected"])
def test_no_address_but_public_ones(fetcher, servers, site, host, how):
    url = f"http://{host}:{servers[1].server_port}/ok.png"
    if how == "redirected":
        servers[0].locations["host"] = url.encode().decode("latin-1")
        url = site + "/to?host"
    message = refused(fetcher, url, "is not public")
    assert "169.254" not in message
    assert PRIVATE not in message


def test_public_addresses_are_public():
    for address in ("8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700:4700::1111", "2a00:1450::1"):
        assert is_public(ipaddress.ip_address(address)), address
    for host in HOSTS.values():
        try:
            address = ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            continue
        assert not is_public(address), host
    assert not is_public(ipaddress.ip_address("2606:4700:4700::1111%eth0"))


def test_doctests():
    found = doctest.testmod(urls)
    assert found.attempted
    assert not found.failed


# -- URLs and redirects -----------------------------------------------------------------------------------------------

URLS = {
    "file": ("file:///etc/passwd", "scheme"),
    "file-capitals": ("FILE:///etc/passwd", "scheme"),
    "file-host": ("file://localhost/etc/passwd", "scheme"),
    "ftp": ("ftp://images.test/a.png", "scheme"),
    "gopher": ("gopher://127.0.0.1:70/_x", "scheme"),
    "javascript": ("javascript:secret", "scheme"),
    "drive": ("C:\\secret.png", "scheme"),
    "absolute-path": ("/etc/passwd", "neither"),
    "relative-path": ("../secret.png", "neither"),
    "home-path": ("~/secret.png", "neither"),
    "network-path": ("//127.0.0.1/secret.png", "neither"),
    "device": ("/dev/zero", "neither"),
    "null-byte": ("\0secret", "neither"),
    "port-ssh": ("http://images.test:22/", "port 22"),
    "port-redis": ("http://images.test:6379/", "port 6379"),
    "port-zero": ("http://images.test:0/", "port 0"),
    "port-too-high": ("http://images.test:99999/", "no valid host or port"),
    "port-word": ("http://images.test:secret/", "no valid host or port"),
    "credentials": ("http://user:secret@images.test/", "user name or password"),
    "user": ("http://secret@images.test/", "user name or password"),
    "empty-user": ("http://@images.test/", "user name or password"),
    "backslash": ("http://images.test\\@127.0.0.1/", "backslashes"),
    "line-break": ("http://images.test/\r\nHost: secret", "controls"),
    "space": ("http://images.test/a secret", "spaces"),
    "long": ("http://images.test/" + "a" * 3000, "3019 characters"),
    "no-host": ("http:///a.png", "no valid host"),
    "no-slashes": ("http:images.test", "no valid host"),
    "only-scheme": ("http://", "no valid host"),
    "percent-host": ("http://%31%32%37.0.0.1/", "no valid host"),
    "broken-brackets": ("http://[::1/", "no valid host"),
    "zone": ("http://[fe80::1%25lo]/", "(no valid host|is not public)"),
    "long-label": ("http://" + "ä" * 100 + ".test/", "no valid host"),
    "surrogate": ("http://\ud800.test/", "no valid host"),
    "data-text": ("data:text/html;base64,PGI+", "image/"),
    "data-percent": ("data:image/png,%89PNG", "image/"),
    "data-no-comma": ("data:image/png;base64", "not the beginning"),
    "data-long-header": ("data:image/" + "a" * 5000 + ";base64,AAAA", "image/"),
}


@pytest.mark.parametrize(("url", "match"), URLS.values(), ids=URLS.keys())
def test_urls_that_are_refused(fetcher, site, monkeypatch, url, match):
    monkeypatch.setattr("builtins.open", lambda *arguments, **options: pytest.fail("a file was opened"))
    refused(fetcher, url, match)


LOCATIONS = {
    "to-a-file": ("file:///etc/passwd", "scheme"),
    "to-data": (data_url(IMAGE), "scheme"),
    "to-ftp": ("ftp://images.test/", "scheme"),
    "to-another-port": ("http://images.test:22/", "port 22"),
    "to-credentials": ("http://user:secret@images.test/", "user name or password"),
    "to-localhost-without-scheme": ("//localhost/secret", "is not public"),
    "to-nothing": ("", "no valid URL"),
    "to-itself": ("/to?to-itself", "more than 3 redirects"),
    "to-broken-brackets": ("http://[::1/", "no valid"),
    "too-often": ("/hops?3", "more than 3 redirects"),
}


@pytest.mark.parametrize(("location", "match"), LOCATIONS.values(), ids=LOCATIONS.keys())
def test_redirects_that_are_refused(fetcher, servers, site, request, location, match):
    name = request.node.callspec.id
    servers[0].locations[name] = location
    refused(fetcher, f"{site}/to?{name}", match)


@RANDOM
@given(st.sampled_from(["http://", "https://", "HTTP:", "data:image/", "//", ""]), st.text(st.characters()), st.text())
def test_random_urls_are_refused(scheme, host, path):
    with pytest.raises(ValueError, match="probably"):
        OFFLINE.fetch_images([f"{scheme}{host}/{path}"])
    opened_or_refused(OFFLINE, f"{scheme}{host}/{path}")
