"""Numbers as a reader wants them; a missing one is an en dash."""

from __future__ import annotations

import math

from nemo_prolong.units import format_tokens

MISSING = "\u2013"


def loss(value: float | None) -> str:
    """Return nats per token with three decimals."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.3f}"


def significant(value: float | None) -> str:
    """Return three significant digits: ``4.20``, ``61.5``, ``1,234``, ``3.4e+06``."""
    if value is None or not math.isfinite(value):
        return MISSING
    if abs(value) >= 1e6 or 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def count(value: float | None) -> str:
    """Return a whole number with thousands separators."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.0f}"


def tokens(value: int | None) -> str:
    """Return an amount of tokens: ``792K``, ``1.86M``, ``20B``."""
    return MISSING if value is None else format_tokens(value)


def base(value: float | None) -> str:
    """Return a RoPE base: ``10,000``, ``640,000``, ``1.28e8``."""
    if value is None:
        return MISSING
    if value < 1e6:
        return f"{value:,.0f}"
    mantissa, exponent = f"{value:e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def tick(value: float) -> str:
    """Return a round number as an axis shows it: ``50``, ``2,000``, ``0.5``, ``1e+06``."""
    return f"{value:,.0f}" if value == int(value) and value < 1e6 else f"{value:g}"


def percent(value: float | None, decimals: int = 1) -> str:
    """Return a fraction as a whole percentage, or with up to so many decimals where they matter."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{100 * value:.{decimals}f}".rstrip("0").rstrip(".") + "%"


def span(start: int, end: int) -> str:
    """Return a range of token positions, e.g. ``512-1K`` with an en dash."""
    return f"{format_tokens(start) if start else '0'}\u2013{format_tokens(end)}"
