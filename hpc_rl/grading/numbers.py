"""Plain numbers in answers: their value, whatever way they are written, and their unit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 300
"""Characters of an answer that is read as mathematics; longer ones are compared as text alone."""
PLACES = 6
"""To which decimals are compared."""
PLURALS = 4
"""Letters of a unit that may have a plural s: dollars, but not s, ms, Pas."""

_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*[$€£¥]?\s*(?P<sign2>[+-]?)"
    r"(?P<whole>\d{1,3}(?:[, ]\d{3})+|\d+)?(?P<part>\.\d+)?(?P<power>[eE][+-]?\d{1,2})?"
    r"(?:\s*/\s*(?P<under>[1-9]\d*))?\s*(?P<percent>%)?"
)
_FRACTION = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<whole>\d+)?\s*\\[dt]?frac\s*(?:\{(?P<over>\d+)\}\s*\{(?P<under>[1-9]\d*)\}|(?P<two>\d[1-9]))"
)
_UNIT = re.compile(
    r"(?P<core>.*[\d%)}])(?:\s*\\(?:text|mathrm|mbox)\s*\{(?P<tex>[^{}]*)\}|\s*(?P<long>[A-Za-z]{3,}[A-Za-z. ]*|"
    r"cm|mm|km|dm|nm|kg|mg|ml|ms|ns|us|ft|mi|yd|lb|oz|hr|am|pm|Hz|kW|kJ|kB|MB|GB)|\s+(?P<short>[mgshl]))(?P<power>\^?\{?[23]\}?)?"
)


@dataclass(frozen=True)
class Number:
    """A value, exactly; whether it was written with decimals, and with a per cent sign."""

    value: Fraction
    decimal: bool
    percent: bool

    def same(self, other: Number) -> bool:
        """Equal; to six places where either has decimals; a per cent sign is read both ways."""
        return any(
            one == two or ((self.decimal or other.decimal) and round(one, PLACES) == round(two, PLACES))
            for one in self._readings()
            for two in other._readings()
        )

    def _readings(self) -> tuple[Fraction, ...]:
        return (self.value, self.value / 100) if self.percent else (self.value,)


def number_of(text: str) -> Number | None:
    """The number that a text is; None where it is none: -1,234.5, 1 234, $18, 1.5e3, 3/4, \\frac{3}{4}, 50%."""
    if len(text) > LONGEST:
        return None
    match = _FRACTION.fullmatch(text)
    if match is not None:
        over, under = (match["over"], match["under"]) if match["two"] is None else (match["two"][0], match["two"][1])
        value = int(match["whole"] or 0) + Fraction(int(over), int(under))
        return Number(-value if match["sign"] == "-" else value, False, False)
    match = _NUMBER.fullmatch(text)
    if match is None or not (match["whole"] or match["part"]) or (match["sign"] and match["sign2"]):
        return None
    digits = re.sub("[, ]", "", match["whole"] or "0") + (match["part"] or "") + (match["power"] or "")
    value = Fraction(digits) / int(match["under"] or 1)
    sign = -1 if "-" in (match["sign"], match["sign2"]) else 1
    return Number(sign * value, bool(match["part"] or match["power"]), bool(match["percent"]))


def split_unit(plain: str) -> tuple[str, str]:
    """A value and its unit in small letters, without the s of a plural; "" for none. 5x has none, 5 m has one."""
    match = _UNIT.fullmatch(plain) if len(plain) <= LONGEST else None
    if match is None:
        return plain, ""
    name = match["tex"] or match["long"] or match["short"] or ""
    unit = " ".join(name.replace(".", " ").casefold().split())
    if len(unit) >= PLURALS:
        unit = unit.removesuffix("s")
    return match["core"].strip(), unit + re.sub(r"[\^{}]", "", match["power"] or "")
