"""Numbers and durations as people read them."""

from __future__ import annotations

import math

import pytest

from overnight.terminal import ago, duration, scientific, short, significant

SHORT = {
    0: "0",
    7: "7",
    1234: "1,234",
    9999: "9,999",
    10_000: "10k",
    12_345: "12.3k",
    999_499: "999k",
    999_600: "1M",
    262_144_000: "262M",
    1_048_576_000: "1.05B",
    10**10: "10B",
    2.5e12: "2.5T",
    3e15: "3,000T",
    math.nan: "not finite",
}
SIGNIFICANT = {
    (3.28123, 4): "3.281",
    (26.613, 4): "26.61",
    (0.98119, 4): "0.9812",
    (31415.9, 4): "31,416",
    (0, 4): "0",
    (0.3149, 2): "0.31",
    (2.5e-7, 4): "2.500e-07",
    (math.inf, 4): "not finite",
}
SCIENTIFIC = {6e-4: "6e-4", 2.5e-4: "2.5e-4", 0: "0", 0.003: "3e-3"}
DURATION = {
    0.42: "0.4 s",
    9.96: "10 s",
    59.7: "1 min",
    125: "2 min 5 s",
    3_600 * 3 + 720: "3 h 12 min",
    3_599.9: "1 h",
    86_400 * 2 + 3_600 * 4 + 59: "2 d 4 h",
}
AGO = {-3: "just now", 61: "1 min ago", 7_300: "2 h ago", 90_000: "1 d ago"}


@pytest.mark.parametrize(
    "function, table", [(short, SHORT), (scientific, SCIENTIFIC), (duration, DURATION), (ago, AGO)]
)
def test_number_format(function, table):
    assert {number: function(number) for number in table} == table


def test_significant_digits():
    assert {given: significant(*given) for given in SIGNIFICANT} == SIGNIFICANT
