"""Where the coordinators are, as people write it and as gRPC takes it."""

import ipaddress
import os

from holdoff._text import quoted

DEFAULT_ENDPOINT = "127.0.0.1:50051"
ENDPOINT_VARIABLE = "HOLDOFF_ENDPOINT"


def endpoint_of(endpoint: str | None) -> str:
    """Return where the coordinator is: as given, by the environment, or by default."""
    return endpoint or os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT


def target(endpoint: str) -> str:
    """Return gRPC's target for `host:port`, or for several addresses with commas in between.

    A connection goes to the first address that answers. Targets in gRPC's own syntax, such as
    `dns:///coordinator:50051`, stay as they are.

    Raises:
        ValueError: Several that are not all IPv4, or all IPv6, addresses with a port.
    """
    if "," not in endpoint or endpoint.startswith(("ipv4:", "ipv6:")):
        return endpoint
    versions = set()
    for address in endpoint.split(","):
        host, _, port = address.rpartition(":")
        try:
            versions.add(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).version)
        except ValueError:
            port = ""
        if not port.isdecimal():
            raise ValueError(
                f"{quoted(address)} is no address with a port: write several coordinators as "
                "10.0.0.1:50051,10.0.0.2:50051, or give one host name that has several addresses"
            )
    if len(versions) > 1:
        raise ValueError(f"{quoted(endpoint)} mixes IPv4 and IPv6 addresses: write one kind")
    return f"ipv{versions.pop()}:{endpoint}"
