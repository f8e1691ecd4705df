"""Where the coordinators are and how they are spoken to, as people say it and as gRPC takes it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from pathlib import Path
from typing import NamedTuple

from holdoff._text import quoted

DEFAULT_ENDPOINT = "127.0.0.1:50051"
ENDPOINT_VARIABLE = "HOLDOFF_ENDPOINT"
CA_FILE_VARIABLE = "HOLDOFF_CA_FILE"
CERT_FILE_VARIABLE = "HOLDOFF_CERT_FILE"
KEY_FILE_VARIABLE = "HOLDOFF_KEY_FILE"
CREDENTIAL_FILE_VARIABLE = "HOLDOFF_CREDENTIAL_FILE"

_CREDENTIAL = re.compile(r"[!-~]{1,4096}")


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


class CredentialFile:
    """The file with the credential that says who we are; read anew for each call.

    Args:
        path: As given, or None for what the environment names, if it does.
        endpoint: Where it would go.
        tls: How.

    Raises:
        ValueError: It cannot be read, is of no use, or would go over a network in the clear.
    """

    def __init__(self, path: str | Path | None, endpoint: str, tls: Tls | None) -> None:
        self._path = path or os.environ.get(CREDENTIAL_FILE_VARIABLE)
        self._metadata: tuple[tuple[str, str], ...] = ()
        if not self._path:
            return
        if not (tls or _stays_here(endpoint)):
            raise ValueError(
                f"the credential would go to {endpoint} in the clear: let the coordinator serve "
                f"TLS, and give its authorities ({CA_FILE_VARIABLE})"
            )
        try:
            self._metadata = self._read(self._path)
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is no text"
            raise ValueError(f"cannot read the credential file {self._path}: {why}") from None

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what to send with a call; what was last read while the file cannot be."""
        if self._path:
            with contextlib.suppress(OSError, ValueError):
                self._metadata = self._read(self._path)
        return self._metadata

    def _read(self, path: str | Path) -> tuple[tuple[str, str], ...]:
        text = Path(path).read_text(encoding="utf-8").strip()
        if not _CREDENTIAL.fullmatch(text):
            raise ValueError(
                f"the credential file {path} holds no credential: write into it what "
                "`holdoff-coordinator token issue` printed, and nothing else"
            )
        return (("authorization", f"Bearer {text}"),)


def _stays_here(endpoint: str) -> bool:
    """Whether nobody but this host hears what is sent to an endpoint."""
    if endpoint.startswith("unix:"):
        return True
    for address in endpoint.removeprefix("dns:///").split(","):
        host = address.rpartition(":")[0].strip("[]")
        try:
            if not ipaddress.ip_address(host.removeprefix("ipv4:")).is_loopback:
                return False
        except ValueError:
            if host != "localhost":
                return False
    return True
