"""Durations as people write and read them."""

import re
from decimal import ROUND_HALF_UP, Decimal

from holdoff._text import quoted

_UNIT_SECONDS = {
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "m": Decimal(60),
    "h": Decimal(3600),
    "d": Decimal(86_400),
}

# The digits are bounded so that the product with any unit fits into the 28 digits of Decimal's
# arithmetic, and is exact, wherever it is not too long anyway.
_NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,9})?"
_DURATION = re.compile(rf"({_NUMBER})(ms|s|m|h|d)?")
# As `format_duration` writes it: from days to seconds, of which there may be a fraction.
_SEVERAL_UNITS = re.compile(
    rf"(?:([0-9]{{1,15}})d)?(?:([0-9]{{1,15}})h)?(?:([0-9]{{1,15}})m)?(?:({_NUMBER})s)?"
)

# The longest that google.protobuf.Duration carries: 10,000 years.
_MAX_SECONDS = 315_576_000_000


def parse_duration(text: str) -> Decimal:
    """Read a duration: one decimal number with ms, s, m, h or d; a bare number is in seconds.

    What `format_duration` writes is read too.

    Args:
        text: Such as `570s`, `9.5m`, `0.5`, `2h` or `9m32s`.

    Returns:
        The duration in seconds, exactly.

    Raises:
        ValueError: If the text is anything else: signs, exponents, spaces, infinity, units that
            do not get smaller, or more than 10,000 years.
    """
    if match := _DURATION.fullmatch(text):
        pieces = [(match[1], match[2] or "s")]
    elif text and (match := _SEVERAL_UNITS.fullmatch(text)):
        pieces = list(zip(match.groups(default="0"), "dhms", strict=True))
    else:
        raise ValueError(
            f"{quoted(text)} is not a duration: write a number with ms, s, m, h or d, "
            "such as 570s, 9.5m, 2h or 9m32s (a bare number is in seconds)"
        )
    exact = (Decimal(number) * _UNIT_SECONDS[unit] for number, unit in pieces)
    seconds = sum(exact, Decimal(0))
    if seconds > _MAX_SECONDS:
        raise ValueError(f"{quoted(text)} is too long for a duration: the limit is 10,000 years")
    return seconds


def format_duration(seconds: float | Decimal) -> str:
    """Write a duration for people: `9m28s`, `1d2h`, `0.57s`.

    Under ten seconds it is rounded to hundredths, else to whole seconds.

    Args:
        seconds: Any finite number; a negative one keeps its sign.

    Returns:
        The units from days to seconds that are not zero, the largest first.
    """
    # By way of `str`, a float gives the digits one would read, not those of its binary value.
    exact = Decimal(str(seconds))
    sign = "-" if exact < 0 else ""
    short = abs(exact) < 10  # noqa: PLR2004 - the bound of the docstring
    rounded = abs(exact).quantize(Decimal("0.01" if short else "1"), ROUND_HALF_UP)
    if not rounded:
        return "0s"

    parts = []
    for unit in ("d", "h", "m"):
        count, rounded = divmod(rounded, _UNIT_SECONDS[unit])
        if count:
            parts.append(f"{count:f}{unit}")
    if rounded:
        digits = f"{rounded:f}"
        parts.append((digits.rstrip("0").rstrip(".") if "." in digits else digits) + "s")
    return sign + "".join(parts)
