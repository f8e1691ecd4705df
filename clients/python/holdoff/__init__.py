"""Leases on OAuth refresh tokens, so that jobs on many servers refresh and run as one.

::

    with holdoff.Client() as client, client.acquire("apps/exact-nl/tokens/finance") as lease:
        ...  # the only holder, and no sooner than the provider's interval after the last one
"""

from holdoff._client import Client, HeldLease
from holdoff.errors import (
    AlreadyExists,
    HoldoffError,
    InvalidRequest,
    LeaseLost,
    NotFound,
    NotGranted,
    Refused,
    Unavailable,
    UnexpectedError,
)

__all__ = [
    "AlreadyExists",
    "Client",
    "HeldLease",
    "HoldoffError",
    "InvalidRequest",
    "LeaseLost",
    "NotFound",
    "NotGranted",
    "Refused",
    "Unavailable",
    "UnexpectedError",
]
