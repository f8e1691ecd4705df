"""Durations as people write and read them."""

import re
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from holdoff.durations import format_duration, parse_duration

SECONDS = {
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "m": Decimal(60),
    "h": Decimal(3600),
    "d": Decimal(86400),
    "": Decimal(1),
}
PIECE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([dhms])")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("570s", "570"),
        ("570", "570"),
        ("9.5m", "570"),
        ("2h", "7200"),
        ("1d", "86400"),
        ("570ms", "0.570"),
        ("9m28s", "568"),
        ("1d2h3m4.5s", "93784.5"),
        ("0.000000001", "0.000000001"),
        ("0s", "0"),
        ("007s", "7"),
        ("315576000000", "315576000000"),
    ],
)
def test_reads(text: str, seconds: str) -> None:
    """A number with a unit is read exactly, and a bare number is in seconds."""
    assert parse_duration(text) == Decimal(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "s", ".", ".5s", "5.s", "-5s", "+5s", "5 s", " 5s", "5s ", "5s\n", "5S", "5M",
        "1e3", "0x10", "1_000", "1,5s", "inf", "nan", "infinity", "28s9m", "9.5m28s", "1h30",
        "5min", "5us", "\u0665s", "\u00bds", "1/2h", "9" * 16, "0." + "0" * 10,
        "\x1b[31m5s", "\x005s",
    ],
)  # fmt: skip
def test_refuses(text: str) -> None:
    """Anything but one plain number with a known unit is refused, and the message says how."""
    with pytest.raises(ValueError, match=r"write a number with ms, s, m, h or d, such as 570s"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["315576000000.000000001", "3652501d", "999999999999999d"])
def test_refuses_what_no_message_can_carry(text: str) -> None:
    """More than the 10,000 years of protobuf's Duration is refused as too long."""
    with pytest.raises(ValueError, match="10,000 years"):
        parse_duration(text)


@given(
    number=st.decimals(0, 10**6, allow_nan=False, allow_infinity=False, places=9),
    unit=st.sampled_from(sorted(SECONDS)),
)
def test_reading_is_exact(number: Decimal, unit: str) -> None:
    """Every number with every unit means exactly that number of that unit."""
    assert parse_duration(f"{number:f}{unit}") == number * SECONDS[unit]


@given(st.text(max_size=200) | st.from_regex(r"[-+ ]?[0-9.eE_]{1,40}(ms|s|m|h|d|\n)?"))
@example("0" * 100_000)
def test_hostile_text_gives_a_duration_or_one_short_printable_line(text: str) -> None:
    """Whatever is typed gives a finite number, or a ValueError that is safe on a terminal."""
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        message = str(error)
    else:
        assert 0 <= seconds <= 315_576_000_000
        return
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 900


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (568, "9m28s"),
        (0.57, "0.57s"),
        (0.07, "0.07s"),
        (0, "0s"),
        (0.004, "0s"),
        (9.5, "9.5s"),
        (9.999, "10s"),
        (10, "10s"),
        (12.4, "12s"),
        (59.6, "1m"),
        (3600, "1h"),
        (3601, "1h1s"),
        (93_784, "1d2h3m4s"),
        (-90, "-1m30s"),
        (Decimal(572), "9m32s"),
        (315_576_000_000, "3652500d"),
    ],
)
def test_writes(seconds: float | Decimal, text: str) -> None:
    """A duration is written in the units that are not zero."""
    assert format_duration(seconds) == text


@given(st.floats(0, 10**9))
def test_writing_is_no_further_off_than_it_says(seconds: float) -> None:
    """What is written adds up to the duration within half of its last place.

    Fails when a unit is dropped, or when rounding does not carry into the next unit.
    """
    text = format_duration(seconds)
    pieces = PIECE.findall(text)
    assert "".join(number + unit for number, unit in pieces) == text
    for (_, larger), (number, unit) in pairwise(pieces):
        assert Decimal(number) * SECONDS[unit] < SECONDS[larger]
    total = sum((Decimal(number) * SECONDS[unit] for number, unit in pieces), Decimal(0))
    assert abs(total - Decimal(str(seconds))) <= Decimal("0.005" if seconds < 10 else "0.5")


@given(st.integers(0, 10**9))
def test_round_trip(seconds: int) -> None:
    """Whole seconds come back from what is written."""
    assert parse_duration(format_duration(seconds)) == seconds
