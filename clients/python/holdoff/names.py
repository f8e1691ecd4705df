"""Resource names, as the API spells them: `apps/{app}/tokens/{token}/leases/{lease}`."""

import re
from dataclasses import dataclass
from typing import ClassVar, Self

from holdoff._text import quoted

# So narrow that no id can break a key's hash tag, a path, a shell line or a terminal.
_ID = re.compile(r"[a-z0-9-]{1,63}")


@dataclass(frozen=True, slots=True)
class AppName:
    """The name of an app: `apps/{app}`.

    Raises:
        ValueError: If the id is not `[a-z0-9-]{1,63}`.
    """

    PATTERN: ClassVar[str] = "apps/{app}"

    app: str

    def __post_init__(self) -> None:
        _check_id("app", self.app)

    def __str__(self) -> str:
        return f"apps/{self.app}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a name.

        Raises:
            ValueError: If the text is not the name of an app; the message says what to write.
        """
        return cls(*_split(text, cls.PATTERN, "an app", "apps/exact-nl"))


@dataclass(frozen=True, slots=True)
class TokenName:
    """The name of a token: `apps/{app}/tokens/{token}`.

    Raises:
        ValueError: If an id is not `[a-z0-9-]{1,63}`.
    """

    PATTERN: ClassVar[str] = "apps/{app}/tokens/{token}"

    app: str
    token: str

    def __post_init__(self) -> None:
        _check_id("app", self.app)
        _check_id("token", self.token)

    def __str__(self) -> str:
        return f"apps/{self.app}/tokens/{self.token}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a name.

        Raises:
            ValueError: If the text is not the name of a token; the message says what to write.
        """
        return cls(*_split(text, cls.PATTERN, "a token", "apps/exact-nl/tokens/finance"))


@dataclass(frozen=True, slots=True)
class GrantName:
    """The name of the grant of a token in custody: `apps/{app}/tokens/{token}/grant`.

    Raises:
        ValueError: If an id is not `[a-z0-9-]{1,63}`.
    """

    PATTERN: ClassVar[str] = "apps/{app}/tokens/{token}/grant"

    app: str
    token: str

    def __post_init__(self) -> None:
        _check_id("app", self.app)
        _check_id("token", self.token)

    def __str__(self) -> str:
        return f"apps/{self.app}/tokens/{self.token}/grant"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a name.

        Raises:
            ValueError: If the text is not the name of a grant; the message says what to write.
        """
        return cls(*_split(text, cls.PATTERN, "a grant", "apps/exact-nl/tokens/finance/grant"))

    @property
    def token_name(self) -> TokenName:
        """The token whose grant it is."""
        return TokenName(self.app, self.token)


@dataclass(frozen=True, slots=True)
class LeaseName:
    """The name of a lease: `apps/{app}/tokens/{token}/leases/{lease}`.

    Raises:
        ValueError: If an id is not `[a-z0-9-]{1,63}`.
    """

    PATTERN: ClassVar[str] = "apps/{app}/tokens/{token}/leases/{lease}"

    app: str
    token: str
    lease: str

    def __post_init__(self) -> None:
        _check_id("app", self.app)
        _check_id("token", self.token)
        _check_id("lease", self.lease)

    def __str__(self) -> str:
        return f"apps/{self.app}/tokens/{self.token}/leases/{self.lease}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a name.

        Raises:
            ValueError: If the text is not the name of a lease; the message says what to write.
        """
        return cls(*_split(text, cls.PATTERN, "a lease", "apps/exact-nl/tokens/finance/leases/1f6"))

    @property
    def token_name(self) -> TokenName:
        """The token that the lease is on."""
        return TokenName(self.app, self.token)


@dataclass(frozen=True, slots=True)
class BudgetName:
    """The name of a budget: `apps/{app}/budgets/{budget}`.

    Raises:
        ValueError: If an id is not `[a-z0-9-]{1,63}`.
    """

    PATTERN: ClassVar[str] = "apps/{app}/budgets/{budget}"

    app: str
    budget: str

    def __post_init__(self) -> None:
        _check_id("app", self.app)
        _check_id("budget", self.budget)

    def __str__(self) -> str:
        return f"apps/{self.app}/budgets/{self.budget}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a name.

        Raises:
            ValueError: If the text is not the name of a budget; the message says what to write.
        """
        example = "apps/exact-nl/budgets/errors-k7q2m3ab5cdefghi"
        return cls(*_split(text, cls.PATTERN, "a budget", example))


@dataclass(frozen=True, slots=True)
class BackOffName:
    """The name of a back-off: `apps/{app}/backOffs/{back_off}`.

    Raises:
        ValueError: If an id is not `[a-z0-9-]{1,63}`.
    """

    PATTERN: ClassVar[str] = "apps/{app}/backOffs/{back_off}"

    app: str
    back_off: str

    def __post_init__(self) -> None:
        _check_id("app", self.app)
        _check_id("back-off", self.back_off)

    def __str__(self) -> str:
        return f"apps/{self.app}/backOffs/{self.back_off}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a name.

        Raises:
            ValueError: If the text is not the name of a back-off; the message says what to write.
        """
        example = "apps/exact-nl/backOffs/block-k7q2m3ab5cdefghi"
        return cls(*_split(text, cls.PATTERN, "a back-off", example))


def _split(text: str, pattern: str, what: str, example: str) -> list[str]:
    """Take the ids out of a name; whether they are well-formed is for the name to check."""
    parts, segments = text.split("/"), pattern.split("/")
    if parts[::2] != segments[::2] or len(parts) != len(segments):
        raise ValueError(
            f"{quoted(text)} is not the name of {what}: write {pattern}, such as {example}"
        )
    return parts[1::2]


def _check_id(what: str, text: str) -> None:
    if not _ID.fullmatch(text):
        raise ValueError(
            f"{quoted(text)} is not the id of {'an' if what == 'app' else 'a'} {what}: "
            "write 1 to 63 characters of a-z, 0-9 and -"
        )
