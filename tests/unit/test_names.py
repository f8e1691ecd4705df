"""Resource names."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdoff.names import AppName, LeaseName, TokenName

IDS = st.from_regex(r"[a-z0-9-]{1,63}", fullmatch=True)
Names = type[AppName | TokenName | LeaseName]


@given(IDS, IDS, IDS)
def test_round_trip(app: str, token: str, lease: str) -> None:
    """Every name made of good ids is read back as itself."""
    for name in (AppName(app), TokenName(app, token), LeaseName(app, token, lease)):
        assert type(name).parse(str(name)) == name


@given(st.text(max_size=200), st.sampled_from([AppName, TokenName, LeaseName]))
def test_hostile_text_is_refused_in_one_short_printable_line(text: str, kind: Names) -> None:
    """Whatever is no name gives a ValueError that is safe on a terminal and says what to write."""
    for candidate in (text, f"apps/{text}", f"apps/a/tokens/{text}"):
        try:
            name = kind.parse(candidate)
        except ValueError as error:
            message = str(error)
        else:
            assert str(name) == candidate
            continue
        assert "write " in message
        assert message.isascii()
        assert message.isprintable()
        assert len(message) < 900


@pytest.mark.parametrize(
    "text",
    [
        "", "a", "apps", "apps/", "/apps/a/tokens/t", "apps/a/tokens/t/", "apps/a/tokens",
        "apps/a/tokens/", "apps//tokens/t", "apps/a/token/t", "Apps/a/tokens/t", "apps/A/tokens/t",
        "apps/a/tokens/t\n", "apps/a/tokens/t ", "apps/a/tokens/t_1", "apps/{a}/tokens/t",
        "apps/a/tokens/\u0430", "apps/a/tokens/\u0661", "apps/a/tokens/../t",
        f"apps/a/tokens/{'t' * 64}", "apps/a/tokens/t/leases/l", "apps/a",
    ],
)  # fmt: skip
def test_refuses(text: str) -> None:
    """What is not exactly the name of a token is refused.

    Fails when the ids are matched instead of matched in full.
    """
    with pytest.raises(ValueError, match="write "):
        TokenName.parse(text)


def test_says_what_to_write() -> None:
    """A message carries what was typed, the pattern and an example."""
    with pytest.raises(ValueError, match=r"write apps/\{app\}/tokens/\{token\}, such as apps/"):
        TokenName.parse("exact-nl/finance")
    with pytest.raises(ValueError, match=r"'Acme' is not the id of an app: write 1 to 63"):
        TokenName.parse("apps/Acme/tokens/finance")


def test_a_name_that_exists_is_good() -> None:
    """Names made of parts are checked like those that are read, and don't change afterwards."""
    with pytest.raises(ValueError, match="id of a lease"):
        LeaseName("a", "t", "l}{")
    with pytest.raises(dataclasses.FrozenInstanceError):
        TokenName("a", "t").app = "}"  # type: ignore[misc]


def test_the_token_of_a_lease() -> None:
    """A lease knows the token that it is on."""
    assert LeaseName("a", "t", "l").token_name == TokenName("a", "t")
