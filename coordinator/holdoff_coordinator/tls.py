"""The certificate that the service shows, and those that its clients must show."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import structlog

if TYPE_CHECKING:
    from pathlib import Path

log = structlog.get_logger()

Stamp = tuple[tuple[int, int], ...]


class TlsError(Exception):
    """The files cannot be used; the message says which, and why."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Files in PEM form.

    Attributes:
        cert: Our certificate, and those between it and its authority.
        key: Its private key, without a password.
        client_ca: Authorities of which every client must show a certificate; None asks for none.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    def stamp(self) -> Stamp:
        """Return what changes when a file is written or replaced, also behind a link.

        Raises:
            OSError: A file cannot be read.
        """
        paths = (self.cert, self.key, *((self.client_ca,) if self.client_ca else ()))
        return tuple((stat.st_ino, stat.st_mtime_ns) for stat in (path.stat() for path in paths))

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Read all of them.

        Raises:
            TlsError: A file cannot be read, or they do not belong together.
        """
        path = self.cert
        try:
            before = self.stamp()
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.cert, self.key, password=lambda: "")
            if self.client_ca:
                path = self.client_ca
                context.load_verify_locations(path)
            pair = (self.key.read_bytes(), self.cert.read_bytes())
            authorities = self.client_ca.read_bytes() if self.client_ca else None
            if self.stamp() != before:
                raise TlsError(f"{path} is just being written")
        except ssl.SSLError as error:
            of = f" with the key {self.key}" if path is self.cert else ""
            raise TlsError(f"{path}{of} is of no use for TLS: {error.reason or error}") from None
        except OSError as error:
            raise TlsError(f"cannot read {error.filename or path}: {error.strerror}") from None
        return grpc.ssl_server_certificate_configuration([pair], authorities)


class Certificates:
    """What the files held when they last made sense; they are looked at for each new connection.

    Raises:
        TlsError: The files cannot be used at all.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._looked_at = self._stamp()
        self._first = files.read()

    def credentials(self) -> grpc.ServerCredentials:
        """Return what a port is opened with."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self._changed,  # type: ignore[arg-type] # None is documented, and its stub forgot it
            require_client_authentication=bool(self._files.client_ca),
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Tell gRPC what is new; None goes on with what it has."""
        stamp = self._stamp()
        if stamp == self._looked_at:
            return None
        self._looked_at = stamp
        try:
            new = self._files.read()
        except TlsError as error:
            log.warning("the certificate stays as it was", reason=str(error))
            return None
        log.info("certificate read again", file=str(self._files.cert))
        return new

    def _stamp(self) -> Stamp | None:
        try:
            return self._files.stamp()
        except OSError:
            return None
