"""Leases on OAuth refresh tokens, so that jobs on many servers refresh and run as one.

::

    with holdoff.Client() as client, client.acquire("apps/exact-nl/tokens/finance") as lease:
        ...  # the only holder, and no sooner than the provider's interval after the last one

`holdoff.aio` is the same for asyncio.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdoff import aio, auth, errors
    from holdoff._client import BudgetGuard, Client
    from holdoff._lease import HeldLease
    from holdoff.custody.access_tokens import AccessToken
    from holdoff.errors import (
        AlreadyExists,
        BudgetSpent,
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
    "AccessToken",
    "AlreadyExists",
    "BudgetGuard",
    "BudgetSpent",
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
    "aio",
    "auth",
    "errors",
]


_MODULES = {
    "AccessToken": "custody.access_tokens",
    "BudgetGuard": "_client",
    "Client": "_client",
    "HeldLease": "_lease",
}


# Hidden from type checkers, which would otherwise accept any name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import what is asked for (PEP 562): gRPC takes longer than all of `holdoff --help`."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in {"aio", "auth", "errors"}:
            return import_module(f"{__name__}.{name}")
        module = _MODULES.get(name, "errors")
        value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
        return value
