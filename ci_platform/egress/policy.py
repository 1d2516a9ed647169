"""Which hosts a command may connect to, and which addresses nobody may. Pure, stdlib only.

A host is judged by its name, before it is looked up, and each of its addresses again, after that. What is connected
to is the address that was judged: a name that leads elsewhere a moment later (DNS rebinding) changes nothing.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

WEB_PORTS = (80, 443)
"""What a rule without a port allows."""

_MAIL = 25
"""Refused where everything is open: a machine that sends strangers' mail is on every blocklist the next day."""

MOST_RULES = 200
_LONGEST_HOST = 253
_NAME = re.compile(r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?)*", re.ASCII)
_RULE = re.compile(r"(\*\.)?(\[[0-9a-fA-F:.]+\]|[^\s:\[\]/@%*]+)(?::([0-9]{1,5}|\*))?", re.ASCII)

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NOT_PUBLIC = [
    (why, ipaddress.ip_network(network))
    for why, networks in {
        "a cloud's metadata address": "169.254.169.254/32 169.254.170.2/32 168.63.129.16/32 100.100.100.200/32 "
        "192.0.0.192/32 fd00:ec2::254/128 fd20:ce::254/128",
        "a loopback address": "127.0.0.0/8 ::1/128",
        "an unspecified address": "0.0.0.0/8 ::/128",
        "a link-local address": "169.254.0.0/16 fe80::/10",
        "a private address": "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10 fc00::/7 fec0::/10",
        "a multicast address": "224.0.0.0/4 ff00::/8",
        "a reserved address": "192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 "
        "240.0.0.0/4 64:ff9b:1::/48 100::/64 2001:db8::/32 3fff::/20 5f00::/16 2001:10::/28",
        # They lead to whatever address of version 4 is inside of them.
        "a tunnel's address": "2001::/32 2002::/16",
    }.items()
    for network in networks.split()
]
"""IANA's registries of special-purpose addresses, and what clouds serve to their machines. The first that fits is
told. Some clouds' metadata has an address that looks public."""

_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
"""NAT64: its last 32 bits are an address of version 4."""


def why_not_public(text: str) -> str:
    """Return why nobody may connect to this address; empty where it is one of the public internet."""
    address = _plain(ipaddress.ip_address(text))
    for why, network in _NOT_PUBLIC:
        if address.version == network.version and address in network:
            return why
    return "" if address.is_global else "a reserved address"


def _plain(address: _Address) -> _Address:
    """Return the address of version 4 inside of one of version 6 that only means that."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    low = int(address) & 0xFFFF_FFFF
    # ::a.b.c.d, which nothing uses any more; ::1 and :: stay what they are.
    if address in _TRANSLATED or (int(address) >> 32 == 0 and low > 1):
        return ipaddress.IPv4Address(low)
    return address


def host_name(text: str) -> str:
    """Return a host as it is compared: small letters, no dot at the end. Raises ValueError for what is none.

    Names are ASCII; a client turns others into their `xn--` form, as DNS needs it.
    """
    inner = text.removeprefix("[").removesuffix("]")
    if ":" in inner:
        return str(ipaddress.IPv6Address(inner))
    name = text.lower().removesuffix(".")
    if len(name) > _LONGEST_HOST or not _NAME.fullmatch(name):
        raise ValueError(f"{text[:100]!r} is not the name of a host")
    return name


@dataclass(frozen=True, slots=True)
class Rule:
    """Hosts and ports that may be connected to. `below`: what ends with the name, but not the name itself.

    `ports` empty: all of them.
    """

    host: str
    below: bool = False
    ports: tuple[int, ...] = WEB_PORTS

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read `example.org`, `*.example.org`, `example.org:22`, `example.org:*`. Raises ValueError."""
        found = _RULE.fullmatch(text)
        if found is None:
            raise ValueError(f"{text[:100]!r} is not a host, *.domain, host:port or host:*")
        star, name, port = found.groups()
        host = host_name(name)
        if star and ("." not in host or ":" in host):
            raise ValueError(f"{text[:100]!r} allows a whole top-level domain: name one below it")
        if port is None:
            return cls(host, bool(star))
        if port != "*" and not 0 < int(port) < 65_536:
            raise ValueError(f"{text[:100]!r} has no port between 1 and 65535")
        return cls(host, bool(star), () if port == "*" else (int(port),))

    def allows(self, host: str, port: int) -> bool:
        """Whether this is about `host`, which is as `host_name` returns it, and `port`."""
        named = host.endswith("." + self.host) if self.below else host == self.host
        return named and (not self.ports or port in self.ports)


class Policy:
    """What one command may connect to.

    `hosts` are rules, None allows every name. `inner` are rules of the operator's, for hosts that may have an
    address that is not public: a mirror of packages in the operator's own network.
    """

    def __init__(self, hosts: Sequence[str] | None, inner: Sequence[str] = ()) -> None:
        self._rules = None if hosts is None else [Rule.parse(text) for text in hosts]
        self._inner = [Rule.parse(text) for text in inner]

    def why_not_host(self, host: str, port: int) -> str:
        """Return why this host and port are refused, before anything is looked up; empty where they are not."""
        if self._rules is None:
            return "mail is not sent from here" if port == _MAIL else ""
        if any(rule.allows(host, port) for rule in self._rules):
            return ""
        return "it is not on the command's list of hosts"

    def why_not_address(self, host: str, port: int, address: str) -> str:
        """Return why this address of an allowed host is refused."""
        if self.is_inner(host, port):
            return ""
        why = why_not_public(address)
        return f"{address} is {why}" if why else ""

    def is_inner(self, host: str, port: int) -> bool:
        """Whether the operator has opened this host, whatever its address."""
        return any(rule.allows(host, port) for rule in self._inner)
