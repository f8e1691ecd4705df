"""The coordinator's settings: one field an option, each also a variable `HOLDOFF_…`."""

import contextlib
import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from holdoff_coordinator.access import CERTIFIED_BY, CERTIFIED_TYPES
from holdoff_coordinator.durability import Durability
from holdoff_coordinator.limits import LIMITS
from holdoff_coordinator.store import Access, Assumed
from holdoff_coordinator.tls import TlsFiles

LogFormat = Literal["auto", "json", "console"]
Seconds = Annotated[float, Field(ge=0, le=366 * 24 * 3600, allow_inf_nan=False)]

_ADDRESS: Final = re.compile(r"(?:\[[^][\s]+\]|[^][:/\s]+):(?P<port>[0-9]{1,5})")
_MOST_PORT: Final = 65535
_LIMIT: Final = re.compile(r"([a-z-]+)=([1-9][0-9]{0,8})")
_ASSUMABLE: Final = re.compile(r"noeviction|fsync=(always|everysec|no)")


def is_loopback(address: str) -> bool:
    """Tell whether only processes of this host can reach an address to listen on."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def default_data_dir() -> Path:
    """Return where the embedded store lives when nobody says otherwise.

    A service or an image presets it with HOLDOFF_DEFAULT_DATA_DIR: that is no choice, so that a
    store URL may still be given. Root gets /var/lib/holdoff (FHS: state of a service), a user the
    XDG state directory.
    """
    if preset := os.environ.get("HOLDOFF_DEFAULT_DATA_DIR"):
        return Path(preset)
    if os.geteuid() == 0:
        return Path("/var/lib/holdoff")
    # The XDG specification tells us to ignore a relative path.
    state_home = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state_home.is_absolute():
        state_home = Path("~/.local/state")
        # A user without a home needs none with a store URL; else the embedded store tells.
        with contextlib.suppress(RuntimeError):
            state_home = state_home.expanduser()
    return state_home / "holdoff"


_OPENS: Final = {
    "redis_password_file": "password_file",
    "redis_sentinel_password_file": "sentinel_password_file",
    "redis_ca_file": "ca_file",
    "redis_cert_file": "cert_file",
    "redis_key_file": "key_file",
}
"""Settings that open an external store, and what `Access` calls them."""


class Settings(BaseSettings):
    """What `holdoff-coordinator serve` is told by options and environment.

    A store URL may carry a password: it is kept as a secret, and a validation error never
    repeats the value that it refuses.
    """

    model_config = SettingsConfigDict(
        env_prefix="HOLDOFF_",
        # An empty variable, as `docker run -e HOLDOFF_REDIS_URL=` leaves it, means "not set".
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    listen: str = "127.0.0.1:50051"
    """Address of the gRPC port, `host:port`; port 0 takes a free one."""

    health_listen: str | None = None
    """Address of a second port, for health checks alone and without TLS."""

    metrics_listen: str | None = None
    """Address of a third port, for metrics: HTTP, and without TLS."""

    tls_cert_file: Path | None = None
    """Our certificate (PEM, with those between it and its authority)."""

    tls_key_file: Path | None = None
    """Its key (PEM)."""

    tls_client_ca_file: Path | None = None
    """Authorities (PEM) of which every client must show a certificate."""

    access_file: Path | None = None
    """Who may do what (TOML, see `access`). None: whoever can connect may do everything."""

    client_identity: str = ",".join(CERTIFIED_BY)
    """Types of names (SAN) in a client's certificate that identify it, the preferred one first."""

    insecure: bool = False
    """Listen beyond loopback without TLS, or although nobody is asked who they are."""

    data_dir: Path = Field(default_factory=default_data_dir)
    """Directory of the embedded store; unused when a store URL is given."""

    redis_url: SecretStr | None = None
    """External store, see `store.connect`. None means the embedded store."""

    redis_url_file: Path | None = None
    """File that holds the store URL, so that no password stands in the environment."""

    redis_password_file: Path | None = None
    """File that holds the store's password alone, when the URL has none."""

    redis_sentinel_password_file: Path | None = None
    """The same for the Sentinels, whose password is one of their own."""

    redis_ca_file: Path | None = None
    """Authorities (PEM) that the store's certificate may come from."""

    redis_cert_file: Path | None = None
    """Our certificate (PEM), for a store that wants one."""

    redis_key_file: Path | None = None
    """The key of our certificate (PEM)."""

    assume: str = ""
    """What to believe of a store that does not tell: `noeviction`, `fsync=always`."""

    policy_dir: Path | None = None
    """Directory of `*.toml` files with policies beside the presets."""

    custody_key_dir: Path | None = None
    """Directory of custody's master keys, `ID.key`. None: nothing is taken into custody."""

    custody_spool_dir: Path | None = None
    """Directory of this replica alone, where answers with access tokens lie sealed until they are
    stored. None: `spool` in `data_dir`."""

    custody_network: str = ""
    """Networks in which token URLs may be although they are not public: `10.1.0.0/16,fd00::/8`."""

    custody_ca_file: Path | None = None
    """Authorities (PEM) for token URLs, besides those of the system."""

    custody_loopback_http: bool = False
    """Grants in custody may have token URLs with http:// on this host, such as a simulator's."""

    log_format: LogFormat = "auto"
    """`auto` is `console` on a terminal and `json` elsewhere."""

    quarantine_seconds: Seconds = 900.0
    """How long nothing is granted after the store may have forgotten something."""

    wait_replicas: Annotated[int, Field(ge=0, le=100)] = 0
    """How many replicas must have a grant, a refresh or a report before it is acknowledged."""

    wait_fsync: bool = False
    """They and the primary must have it on their disks."""

    wait_seconds: Annotated[float, Field(gt=0, le=4, allow_inf_nan=False)] = 0.5
    """How long to wait for them; less than the time limit of a connection to the store."""

    limit: str = ""
    """Limits on what one caller may use that differ from the default: `watches=50,calls=200`."""

    drain_seconds: Seconds = 5.0
    """How long a stopping coordinator gives open calls to end."""

    @field_validator("listen", "health_listen", "metrics_listen")
    @classmethod
    def _address(cls, text: str | None) -> str | None:
        """Refuse what gRPC would take for something else.

        It listens on port 443 when none is given, and on port 34463 for 99999.
        """
        if text is None:
            return None
        match = _ADDRESS.fullmatch(text)
        if match is None or int(match["port"]) > _MOST_PORT:
            raise ValueError(
                f"write HOST:PORT with a port of up to {_MOST_PORT}, such as 127.0.0.1:50051, "
                "[::1]:50051, or 0.0.0.0:50051 for every address of this machine"
            )
        return text

    @field_validator("client_identity")
    @classmethod
    def _types(cls, text: str) -> str:
        types = text.split(",")
        if not set(types) <= set(CERTIFIED_TYPES) or len(set(types)) != len(types):
            known = ", ".join(CERTIFIED_TYPES)
            raise ValueError(f"write some of {known}, separated by commas")
        return text

    @field_validator("assume")
    @classmethod
    def _assumable(cls, text: str) -> str:
        for word in filter(None, text.split(",")):
            if not _ASSUMABLE.fullmatch(word):
                raise ValueError(
                    "write noeviction, fsync=always, fsync=everysec or fsync=no, with a comma "
                    "between two of them"
                )
        return text

    @field_validator("custody_network")
    @classmethod
    def _networks(cls, text: str) -> str:
        for word in filter(None, text.split(",")):
            try:
                ipaddress.ip_network(word)
            except ValueError:
                raise ValueError(
                    "write a network such as 10.1.0.0/16 or fd00:1::/32, without bits after its "
                    "prefix"
                ) from None
        return text

    @field_validator("limit")
    @classmethod
    def _limits(cls, text: str) -> str:
        for word in filter(None, text.split(",")):
            match = _LIMIT.fullmatch(word)
            if match is None or match[1] not in LIMITS:
                raise ValueError(f"write NAME=N, with N from 1; NAME is one of {', '.join(LIMITS)}")
        return text

    @model_validator(mode="after")
    def _one_store(self) -> Self:
        """Refuse two answers to the question where the state is kept."""
        stores = {"data_dir", "redis_url", "redis_url_file"}
        given = sorted(
            name for name in stores & self.model_fields_set if getattr(self, name) is not None
        )
        if len(given) > 1:
            raise ValueError(f"only one of {', '.join(given)} can be given: each names the store")
        keys = sorted(name for name in _OPENS if getattr(self, name) is not None)
        if keys and self.redis_url is None and self.redis_url_file is None:
            raise ValueError(f"{keys[0]} is for an external store: give redis_url too")
        if self.wait_replicas and self.redis_url is None and self.redis_url_file is None:
            raise ValueError("wait_replicas is for an external store: give redis_url too")
        if self.redis_key_file and not self.redis_cert_file:
            raise ValueError("redis_key_file is the key of a certificate: give redis_cert_file too")
        return self

    def spool(self) -> Path | None:
        """Return the directory of the spool; None without custody."""
        if not self.custody_key_dir:
            return None
        return (self.custody_spool_dir or self.data_dir / "spool").absolute()

    @model_validator(mode="after")
    def _tls(self) -> Self:
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            raise ValueError("tls_cert_file and tls_key_file belong together: give both")
        if self.tls_client_ca_file and not self.tls_cert_file:
            raise ValueError("tls_client_ca_file needs tls_cert_file and tls_key_file")
        if (dangers := self.dangers()) and not self.insecure:
            raise ValueError(
                f"{self.listen} can be reached from other hosts: {dangers}. Serve TLS "
                "(tls_cert_file and tls_key_file), and authenticate callers (access_file, "
                "tls_client_ca_file, or both); or set insecure if you trust that network"
            )
        return self

    def dangers(self) -> str:
        """Say what other hosts could do that they should not."""
        if is_loopback(self.listen):
            return ""
        known = self.tls_client_ca_file or self.access_file
        found = [
            "any of them could take and break leases" if not known else "",
            "" if self.tls_cert_file else "anyone on the network could read and repeat all calls",
        ]
        return ", and ".join(filter(None, found))

    def tls(self) -> TlsFiles | None:
        """Return the files for TLS, if it is to be served."""
        if not (self.tls_cert_file and self.tls_key_file):
            return None
        return TlsFiles(self.tls_cert_file, self.tls_key_file, self.tls_client_ca_file)

    def store_url(self) -> str | None:
        """Return the external store's URL with its password, or None for the embedded store.

        Raises:
            OSError: `redis_url_file` cannot be read.
            UnicodeDecodeError: It holds something else than text.
        """
        if self.redis_url_file is not None:
            return self.redis_url_file.read_text(encoding="utf-8").strip()
        return None if self.redis_url is None else self.redis_url.get_secret_value()

    def access(self) -> Access:
        """Return what opens the external store beside its URL.

        Raises:
            OSError: A file cannot be read.
        """
        files: dict[str, Path | None] = {ours: getattr(self, name) for name, ours in _OPENS.items()}
        for path in filter(None, files.values()):
            path.open("rb").close()
        return Access(**files)

    def limits(self) -> dict[str, int]:
        """Return the limits that differ from the default."""
        words = (word.partition("=") for word in filter(None, self.limit.split(",")))
        return {name: int(value) for name, _, value in words}

    def networks(self) -> tuple[str, ...]:
        """Return the networks in which token URLs may be although they are not public."""
        return tuple(filter(None, self.custody_network.split(",")))

    def durability(self) -> Durability:
        """Return how many copies of a change the store must have."""
        return Durability(self.wait_replicas, self.wait_fsync, self.wait_seconds)

    def assumed(self) -> Assumed:
        """Return what to believe of a store that does not tell."""
        words = self.assume.split(",")
        fsync = next((word for word in words if word.startswith("fsync=")), "")
        return Assumed(noeviction="noeviction" in words, fsync=fsync.removeprefix("fsync="))
