"""Where the coordinators are and how they are spoken to, as people say it and as gRPC takes it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import shlex
import sys
from dataclasses import dataclass
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
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?\]")


class Tls(NamedTuple):
    """What gRPC needs for TLS, in PEM form and in its order."""

    authorities: bytes
    key: bytes | None
    certificate: bytes | None


def endpoint_of(endpoint: str | None) -> str:
    """Return where the coordinator is: as given, by the environment, or by default."""
    return endpoint or os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the coordinators are, taken apart."""

    scheme: str
    """`ipv4` or `ipv6` for addresses, `dns` for a name, `unix` or `unix-abstract` for a socket."""
    addresses: tuple[str, ...]
    """`host:port` each, or the one name, or the one path."""
    resolver: str = ""
    """The DNS server to ask, for a name that was given with one."""

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read `host:port`, several addresses with commas in between, or a target as gRPC has it.

        Raises:
            ValueError: It is none of these; the message says what to write.
        """
        scheme, colon, rest = text.partition(":")
        if colon and scheme in ("unix", "unix-abstract") and rest.strip("/"):
            return cls(scheme, (rest,))
        if colon and scheme == "dns":
            resolver, _, name = rest.removeprefix("//").rpartition("/")
            _host_and_port(name, text)
            return cls("dns", (name,), resolver)
        if "://" in text:
            raise ValueError(
                f"{quoted(text)} is not an endpoint: write host:port, without {quoted(f'{scheme}://')}"
            )
        given = scheme if colon and scheme in ("ipv4", "ipv6") else ""
        addresses = tuple((rest if given else text).split(","))
        families = {_family(address, text, alone=len(addresses) == 1) for address in addresses}
        if len(families) > 1:
            raise ValueError(f"{quoted(text)} mixes IPv4 and IPv6 addresses: write one kind")
        [family] = families
        if given not in ("", family):
            raise ValueError(f"{quoted(text)} has no {given} address: write {given}:ADDRESS:PORT")
        return cls(family, addresses)

    @property
    def is_name(self) -> bool:
        """Whether it takes a look-up, which may bring several addresses."""
        return self.scheme == "dns"

    @property
    def authority(self) -> str:
        """What the certificates of several coordinators must name: the first of them.

        Empty where gRPC finds that by itself.
        """
        return self.addresses[0] if len(self.addresses) > 1 else ""

    @property
    def stays_here(self) -> bool:
        """Whether what is sent there stays on this host."""
        if self.scheme.startswith("unix"):
            return True
        hosts = [address.rpartition(":")[0].strip("[]") for address in self.addresses]
        if self.is_name:
            return hosts == ["localhost"] and not self.resolver
        return all(ipaddress.ip_address(host).is_loopback for host in hosts)

    def target(self, first: int = 0) -> str:
        """Return gRPC's target: its connection goes to the first address that answers.

        Args:
            first: The index of the address to begin with; the others follow in turn.
        """
        rotated = ",".join(self.addresses[first:] + self.addresses[:first])
        resolver = f"//{self.resolver}/" if self.resolver else ""
        return f"{self.scheme}:{resolver}{rotated}"


def _family(address: str, text: str, *, alone: bool) -> str:
    """Return the scheme of a `host:port`.

    Raises:
        ValueError: It is none, or a name among several.
    """
    host = _host_and_port(address, text)
    try:
        return f"ipv{ipaddress.ip_address(host.strip('[]')).version}"
    except ValueError:
        if alone:
            return "dns"
    raise ValueError(
        f"{quoted(address)} is not an address: write several coordinators as "
        "10.0.0.1:50051,10.0.0.2:50051, or give one host name that has several addresses"
    )


def _host_and_port(address: str, text: str) -> str:
    """Return the host of a `host:port`.

    Raises:
        ValueError: It is none.
    """
    host, _, port = address.rpartition(":")
    if _HOST.fullmatch(host) and port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16:
        return host
    raise ValueError(
        f"{quoted(text)} is not an endpoint: write host:port, such as coordinator:50051 or "
        "[::1]:50051, or several addresses, separated by commas"
    )


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


_warned: set[Path] = set()


def _warn_of_readers(path: Path) -> None:
    """Warn once about a credential that others can read.

    A group may read a file that is not ours: that is how we can read it too.
    """
    with contextlib.suppress(OSError):
        stat = path.stat()
        readable = stat.st_mode & (0o044 if stat.st_uid == os.geteuid() else 0o004)
        if readable and path not in _warned:
            from holdoff._log import log  # noqa: PLC0415 - for those who need the warning

            _warned.add(path)
            name = shlex.quote(str(path))
            log.warning("holdoff: others can read the credential file %s: chmod 600 %s", name, name)


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
        if not (tls or Endpoint.parse(endpoint).stays_here):
            raise ValueError(
                f"the credential would go to {endpoint} in the clear: let the coordinator serve "
                f"TLS, and give its authorities ({CA_FILE_VARIABLE})"
            )
        try:
            self._metadata = self._read(self._path)
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is no text"
            raise ValueError(f"cannot read the credential file {self._path}: {why}") from None
        if sys.platform != "win32":
            _warn_of_readers(Path(self._path))

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
                "`holdoff-coordinator token issue` wrote, and nothing else"
            )
        return (("authorization", f"Bearer {text}"),)
