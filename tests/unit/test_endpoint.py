"""Where the coordinators are."""

import pytest

from holdoff._endpoint import endpoint_of, target


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("coordinator:50051", "coordinator:50051"),
        ("dns:///coordinator:50051", "dns:///coordinator:50051"),
        ("unix:/run/holdoff.sock", "unix:/run/holdoff.sock"),
        ("10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2"),
        ("ipv4:10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2"),
        ("[::1]:1,[::2]:2", "ipv6:[::1]:1,[::2]:2"),
    ],
)
def test_targets(endpoint: str, expected: str) -> None:
    """One host stays as it is; several addresses get the scheme that gRPC wants."""
    assert target(endpoint) == expected


@pytest.mark.parametrize(
    "endpoint", ["a:1,b:2", "10.0.0.1:1,", "10.0.0.1,10.0.0.2:1", "10.0.0.1:1,[::1]:1", ","]
)
def test_what_is_no_target(endpoint: str) -> None:
    """What gRPC would misread is refused with what to write."""
    with pytest.raises(ValueError, match="write"):
        target(endpoint)


def test_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given wins over the environment, which wins over the default."""
    monkeypatch.delenv("HOLDOFF_ENDPOINT", raising=False)
    assert endpoint_of(None) == "127.0.0.1:50051"
    monkeypatch.setenv("HOLDOFF_ENDPOINT", "b:1")
    assert endpoint_of(None) == "b:1"
    assert endpoint_of("a:1") == "a:1"
