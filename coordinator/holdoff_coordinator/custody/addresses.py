"""Which addresses a connection with a secret may go to. Pure.

Only public ones, and the networks that the operator allows. The address that is checked is the
one that is then connected to.
"""

from __future__ import annotations

import ipaddress

TYPE_CHECKING = False  # `typing` would cost the sender time
if TYPE_CHECKING:
    from collections.abc import Iterable

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_UNICAST = ipaddress.IPv6Network("2000::/3")
_PROTOCOLS = ipaddress.IPv4Network("192.0.0.0/24")
"""Not for public use, which older versions of Python do not know."""
_METADATA = ipaddress.IPv4Address("168.63.129.16")
"""Azure's; those of the other clouds are link-local, private or shared addresses."""


def refusal(text: str, allowed: Iterable[str] = (), *, plain: bool = False) -> str:
    """Say why an address is refused; return an empty text where it is not.

    Args:
        text: An address in numbers.
        allowed: Networks that the operator allows, such as `10.1.0.0/16`.
        plain: Whether the connection is not encrypted; it must then stay on this machine.
    """
    address = _inner(ipaddress.ip_address(text.partition("%")[0]))
    if plain:
        return "" if address.is_loopback else "plain http is for loopback addresses only"
    if any(address in ipaddress.ip_network(network) for network in allowed):
        return ""
    if address == _METADATA:
        return "a metadata address"
    if address.is_loopback:
        return "a loopback address"
    if address.is_link_local:
        return "a link-local address"
    return "" if _public(address) else "a private or reserved address"


def _public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if address.is_multicast or not address.is_global:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return not address.is_reserved and address not in _PROTOCOLS
    return address in _UNICAST


def _inner(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the IPv4 address that an IPv6 address leads to, or the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
