"""Which addresses a connection with a secret may go to. Pure.

Only public ones, and the networks that the operator allows. Names of hosts say nothing: what is
checked is the address that is then connected to.
"""

from __future__ import annotations

import ipaddress

TYPE_CHECKING = False  # `typing` would cost the sender time
if TYPE_CHECKING:
    from collections.abc import Iterable

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_METADATA = ipaddress.ip_address("168.63.129.16")
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
    for kind in ("loopback", "link_local", "multicast", "unspecified"):
        if getattr(address, f"is_{kind}"):
            return f"a {kind.replace('_', '-')} address".replace("a un", "an un")
    reserved = address.is_reserved and address.version == 4  # noqa: PLR2004
    return "" if address.is_global and not reserved else "a private or reserved address"


def _inner(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the IPv4 address that an IPv6 address leads to, or the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
