"""Where the coordinators are."""

from pathlib import Path

import pytest

from holdoff._endpoint import CredentialFile, Endpoint, endpoint_of


@pytest.mark.parametrize(
    ("endpoint", "expected", "stays_here"),
    [
        ("coordinator:50051", "dns:coordinator:50051", False),
        ("localhost:1", "dns:localhost:1", True),
        ("dns:localhost:1", "dns:localhost:1", True),
        ("dns:///coordinator:50051", "dns:coordinator:50051", False),
        ("dns://127.0.0.1:53/localhost:1", "dns://127.0.0.1:53/localhost:1", False),
        ("unix:/run/holdoff.sock", "unix:/run/holdoff.sock", True),
        ("unix-abstract:holdoff", "unix-abstract:holdoff", True),
        ("127.0.0.1:50051", "ipv4:127.0.0.1:50051", True),
        ("ipv6:[::1]:50051", "ipv6:[::1]:50051", True),
        ("[fe80::1%eth0]:1", "ipv6:[fe80::1%eth0]:1", False),
        ("10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2", False),
        ("127.0.0.1:1,10.0.0.2:2", "ipv4:127.0.0.1:1,10.0.0.2:2", False),
        ("ipv4:127.0.0.1:1,127.0.0.2:2", "ipv4:127.0.0.1:1,127.0.0.2:2", True),
        ("[::1]:1,[::2]:2", "ipv6:[::1]:1,[::2]:2", False),
    ],
)
def test_targets(endpoint: str, expected: str, *, stays_here: bool) -> None:
    """Hosts and addresses get the scheme that gRPC wants, and are known to be local or not."""
    parsed = Endpoint.parse(endpoint)
    assert (parsed.target(), parsed.stays_here) == (expected, stays_here)


@pytest.mark.parametrize(
    "endpoint",
    [
        "127.0.0.1",
        "coordinator",
        "coordinator:",
        ":50051",
        "coordinator:grpc",
        "coordinator:0",
        "coordinator:65536",
        "http://127.0.0.1:50051",
        "https://coordinator:50051/",
        "xds:///coordinator:50051",
        "dns:",
        "dns:///",
        "dns:///coordinator",
        "unix:",
        "ipv4:",
        "ipv4:[::1]:50051",
        "ipv6:::1:50051",
        "::1:50051",
        "a b:1",
        "a:1,b:2",
        "10.0.0.1:1,",
        "10.0.0.1,10.0.0.2:1",
        "10.0.0.1:1,[::1]:1",
        ",",
    ],
)
def test_what_is_no_endpoint(endpoint: str) -> None:
    """What gRPC would misread, or look for without end, is refused with what to write."""
    with pytest.raises(ValueError, match="write"):
        Endpoint.parse(endpoint)


def test_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given wins over the environment, which wins over the default."""
    monkeypatch.delenv("HOLDOFF_ENDPOINT", raising=False)
    assert endpoint_of(None) == "127.0.0.1:50051"
    monkeypatch.setenv("HOLDOFF_ENDPOINT", "b:1")
    assert endpoint_of(None) == "b:1"
    assert endpoint_of("a:1") == "a:1"


@pytest.mark.parametrize(
    ("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)]
)
def test_a_credential_that_others_can_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, *, warned: bool
) -> None:
    """Its path and what to do are said once, however many clients use it.

    Fails when the mode is not looked at, and when each client warns.
    """
    path = tmp_path / "a credential\x1b[2J"
    path.write_text("holdoff_x_y\n")
    path.chmod(mode)
    for _ in range(3):
        CredentialFile(path, "localhost:1", None)
    assert len(caplog.records) == int(warned)
    if warned:
        assert "chmod 600 '" in caplog.text
        assert "\x1b" not in caplog.text
