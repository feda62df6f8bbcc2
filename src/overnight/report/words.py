"""Numbers as a person reads them: 262M tokens, 3 h 12 min, 0.98 bits per byte."""

from __future__ import annotations

import math


def short(number: float) -> str:
    """Three digits and a unit: 1,234 stays; 12,345 is 12.3k; 262,144,000 is 262M."""
    if not math.isfinite(number):
        return "not finite"
    if abs(number) < 9_999.5:
        return f"{number:,.0f}"
    for power, unit in ((3, "k"), (6, "M"), (9, "B"), (12, "T")):
        value = number / 10**power
        if abs(value) < 999.5 or unit == "T":
            digits = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))))
            return f"{value:,.{digits}f}".rstrip("0").rstrip(".") + unit if digits else f"{value:,.0f}{unit}"
    raise AssertionError(number)


def significant(number: float, digits: int = 4) -> str:
    """`digits` significant digits without an exponent while that stays readable: 26.61, 0.9812, 31,415."""
    if not math.isfinite(number):
        return "not finite"
    if number and not 1e-4 <= abs(number) < 1e9:
        return f"{number:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(number)))) if number else 0
    return f"{number:,.{decimals}f}"


def scientific(number: float) -> str:
    """The shortest exact-looking form of a learning rate: 6e-4, 2.5e-4, 0."""
    if number == 0 or not math.isfinite(number):
        return "0" if number == 0 else "not finite"
    mantissa, exponent = f"{number:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def duration(seconds: float) -> str:
    """The two largest units: 0.4 s, 42 s, 12 min 5 s, 3 h 12 min, 2 d 4 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    rest = round(seconds)
    parts: list[tuple[int, str]] = []
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        amount, rest = divmod(rest, size)
        if amount or parts:
            parts.append((amount, unit))
    return " ".join(f"{amount} {unit}" for amount, unit in parts[:2] if amount)


def ago(seconds: float) -> str:
    """How long since something happened, in its largest unit: "just now", "12 min ago", "3 d ago"."""
    if seconds < 60:
        return "just now"
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    raise AssertionError(seconds)
