"""Which addresses a connection with a secret may go to."""

from __future__ import annotations

import pytest

from holdoff_coordinator.custody.addresses import refusal


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "2001:4860:4860::8888",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",  # the same behind NAT64
    ],
)
def test_public_addresses(address: str) -> None:
    """A public address is allowed, also inside an IPv6 address."""
    assert refusal(address) == ""


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "::1", "0.0.0.0", "::"),  # noqa: S104
        *("10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "fd00::1"),
        *("169.254.169.254", "fe80::1%eth0", "fd00:ec2::254", "168.63.129.16"),
        *("100.100.100.200", "192.0.0.192"),
        *("224.0.0.1", "ff0e::1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe", "2002:a00:1::1"),
        *("2002:7f00:1::", "2001:0:a00:1::", "64:ff9b:1::a00:1"),
    ],
)
def test_refused_addresses(address: str) -> None:
    """Addresses that are not public are refused, and so are those of metadata services."""
    assert refusal(address)
    assert refusal(address, ["203.0.113.0/24"])


def test_allowed_networks() -> None:
    """The operator may allow networks, of either version."""
    allowed = ["10.1.0.0/16", "fd00:1::/32", "169.254.169.254/32"]
    assert refusal("10.1.2.3", allowed) == ""
    assert refusal("::ffff:10.1.2.3", allowed) == ""
    assert refusal("fd00:1::5", allowed) == ""
    assert refusal("169.254.169.254", allowed) == ""
    assert refusal("10.2.0.1", allowed)
    assert refusal("fd00:2::5", allowed)


@pytest.mark.parametrize("address", ["8.8.8.8", "10.0.0.1", "2001:4860:4860::8888"])
def test_plain_stays_on_this_machine(address: str) -> None:
    """A connection without TLS goes to loopback addresses alone, whatever is allowed."""
    assert refusal(address, ["0.0.0.0/0", "::/0"], plain=True)
    assert refusal("127.0.0.1", plain=True) == refusal("::1", plain=True) == ""
