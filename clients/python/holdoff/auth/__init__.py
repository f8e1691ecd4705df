"""Access tokens in custody for HTTP libraries: requests and httpx.

::

    with holdoff.Client() as client, client.access_token(TOKEN) as access:
        session = requests.Session()
        session.auth = holdoff.auth.RequestsAuth(client, access)

Each call gets the current access token if it goes to an API host of the grant, waits while a scope
of it backs off or a budget is spent, and is counted with its answer. Calls of other hosts pass
unchanged.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdoff.auth._httpx import AsyncHttpxAuth, HttpxAuth
    from holdoff.auth._requests import RequestsAuth

__all__ = ["AsyncHttpxAuth", "HttpxAuth", "RequestsAuth"]

_LIBRARIES = {"AsyncHttpxAuth": "httpx", "HttpxAuth": "httpx", "RequestsAuth": "requests"}


# Hidden from type checkers, which would otherwise accept any name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import what is asked for (PEP 562): each needs a library that may not be there."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        library = _LIBRARIES[name]
        try:
            module = import_module(f"{__name__}._{library}")
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{name} needs {error.name}: pip install 'holdoff[{library}]'"
            ) from error
        value = globals()[name] = getattr(module, name)
        return value
