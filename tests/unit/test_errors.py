"""Both sides' tables of errors, held together."""

from __future__ import annotations

import pytest
from google.rpc import status_pb2

from holdoff import _status, errors
from holdoff_coordinator.failures import CODES, Failure, invalid


def test_every_reason_has_an_exception_of_its_own() -> None:
    """No reason is left out on either side."""
    assert set(errors.BY_REASON) == set(CODES)


@pytest.mark.parametrize("reason", sorted(CODES))
def test_a_reason_arrives_as_its_exception(reason: str) -> None:
    """Message, metadata and retry time survive the wire, within 4 KiB.

    Fails when `from_status` maps by code alone.
    """
    failure = Failure(
        reason,
        "words " * 100,
        resource="apps/a/tokens/t",
        retry_after_seconds=1.5,
        metadata={"key": "value"},
    )
    wire = failure.to_status().SerializeToString()
    assert len(wire) < 4096
    error = _status.from_status(status_pb2.Status.FromString(wire))
    assert type(error) is errors.BY_REASON[reason]
    assert (error.reason, error.metadata, error.retry_after_seconds) == (
        reason,
        {"key": "value"},
        1.5,
    )
    assert str(error) == "words " * 100


def test_at_most_one_detail_of_each_kind() -> None:
    """As the design says; ErrorInfo is always there."""
    for reason in CODES:
        status = Failure(reason, "x", resource="r", field="f", retry_after_seconds=1).to_status()
        kinds = [detail.TypeName() for detail in status.details]
        assert len(kinds) == len(set(kinds))
        assert "google.rpc.ErrorInfo" in kinds


def test_a_bad_field_is_named() -> None:
    """The message says which field, and the detail too."""
    status = invalid("ttl", "too long").to_status()
    assert "ttl" in status.message
    assert "google.rpc.BadRequest" in [detail.TypeName() for detail in status.details]


def test_a_status_of_an_unknown_reason_is_mapped_by_its_code() -> None:
    """A newer coordinator's reasons still make sense."""
    status = Failure("LEASE_HELD", "x").to_status()
    del status.details[:]
    assert type(_status.from_status(status)) is errors.NotGranted
