"""Where the coordinators are and how they are spoken to, as people say it and as gRPC takes it."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import NamedTuple

from holdoff._text import quoted

DEFAULT_ENDPOINT = "127.0.0.1:50051"
ENDPOINT_VARIABLE = "HOLDOFF_ENDPOINT"
CA_FILE_VARIABLE = "HOLDOFF_CA_FILE"
CERT_FILE_VARIABLE = "HOLDOFF_CERT_FILE"
KEY_FILE_VARIABLE = "HOLDOFF_KEY_FILE"


class Tls(NamedTuple):
    """What gRPC needs for TLS, in PEM form and in its order."""

    authorities: bytes
    key: bytes | None
    certificate: bytes | None


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


def channel_options(endpoint: str) -> list[tuple[str, str]]:
    """Return what gRPC must be told of an endpoint beside its target.

    With TLS each of several coordinators must have a certificate that names the first: gRPC
    would look for a name that is the whole list.
    """
    first, comma, _ = endpoint.partition(",")
    return [("grpc.default_authority", first)] if comma else []


def tls_of(
    ca_file: str | Path | None = None,
    cert_file: str | Path | None = None,
    key_file: str | Path | None = None,
) -> Tls | None:
    """Read the files for TLS, as given or named by the environment; None if there is no CA file.

    Raises:
        ValueError: One is missing, cannot be read, or is of no use.
    """
    ca_file = ca_file or os.environ.get(CA_FILE_VARIABLE)
    cert_file = cert_file or os.environ.get(CERT_FILE_VARIABLE)
    key_file = key_file or os.environ.get(KEY_FILE_VARIABLE)
    if not (ca_file or cert_file or key_file):
        return None
    if not ca_file:
        raise ValueError(
            f"a certificate is for TLS, which needs the authorities of the coordinator: give a CA "
            f"file ({CA_FILE_VARIABLE})"
        )
    if bool(cert_file) != bool(key_file):
        raise ValueError(
            f"a certificate and its key belong together: give both ({CERT_FILE_VARIABLE}, "
            f"{KEY_FILE_VARIABLE})"
        )
    import ssl  # noqa: PLC0415 - a tenth of the start-up, for those who use TLS

    path, context = ca_file, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(ca_file)
        authorities, key, certificate = Path(ca_file).read_bytes(), None, None
        if cert_file and key_file:
            path = cert_file
            context.load_cert_chain(cert_file, key_file, password=lambda: "")
            key, certificate = Path(key_file).read_bytes(), Path(cert_file).read_bytes()
    except ssl.SSLError as error:
        of = f" with the key {key_file}" if path == cert_file else ""
        raise ValueError(f"{path}{of} is of no use for TLS: {error.reason or error}") from None
    except OSError as error:
        raise ValueError(f"cannot read {error.filename or path}: {error.strerror}") from None
    return Tls(authorities, key, certificate)
