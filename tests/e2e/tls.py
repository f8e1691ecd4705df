"""A coordinator that serves TLS, and certificates for it and its clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trustme

from tests.e2e.service import Service

if TYPE_CHECKING:
    import datetime as dt
    from pathlib import Path


class Files:
    """A certificate, its key, and the authorities that one side trusts."""

    def __init__(self, folder: Path, name: str) -> None:
        self.ca, self.cert, self.key = (folder / f"{name}.{kind}" for kind in ("ca", "pem", "key"))

    def write(self, leaf: trustme.LeafCert, *trusted: trustme.CA) -> None:
        """Replace all of them, each at once."""
        chain = b"".join(one.bytes() for one in leaf.cert_chain_pems)
        authorities = b"".join(ca.cert_pem.bytes() for ca in trusted)
        contents = {self.ca: authorities, self.cert: chain, self.key: leaf.private_key_pem.bytes()}
        for path, content in contents.items():
            draft = path.with_suffix(".draft")
            draft.write_bytes(content)
            draft.replace(path)


class TlsService(Service):
    """A coordinator that serves TLS, and asks for certificates if it is `mutual`."""

    def __init__(self, folder: Path, *, mutual: bool = True) -> None:
        super().__init__(folder)
        self.authority, self.files = trustme.CA(), Files(folder, "server")
        self.files.write(self.authority.issue_cert("127.0.0.1"), self.authority)
        self.environment |= {
            "HOLDOFF_TLS_CERT_FILE": str(self.files.cert),
            "HOLDOFF_TLS_KEY_FILE": str(self.files.key),
            "HOLDOFF_CA_FILE": str(self.files.ca),
        }
        if mutual:
            self.environment["HOLDOFF_TLS_CLIENT_CA_FILE"] = str(self.files.ca)
            self.environment["HOLDOFF_CLIENT_IDENTITY"] = "email"

    def named(self, folder: Path, name: str, not_after: dt.datetime | None = None) -> Files:
        """Give a client a certificate of the coordinator's authority."""
        files = Files(folder, name.partition("@")[0])
        files.write(self.authority.issue_cert(name, not_after=not_after), self.authority)
        return files


def with_certificate(files: Files) -> dict[str, str]:
    """Return the variables that name a client's files."""
    return {
        "HOLDOFF_CA_FILE": str(files.ca),
        "HOLDOFF_CERT_FILE": str(files.cert),
        "HOLDOFF_KEY_FILE": str(files.key),
    }
