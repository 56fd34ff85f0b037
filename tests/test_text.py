"""Text for people: what it says of itself, and that nothing hidden is left in it."""

from __future__ import annotations

import doctest

from hypothesis import given
from hypothesis import strategies as st

from nemo_prolong import text, units

HIDDEN = {
    *map(chr, range(32)),
    *map(chr, range(127, 160)),
    *map(chr, range(0x202A, 0x202F)),
    *map(chr, range(0x2066, 0x206A)),
}
HIDDEN -= {"\t", "\n"}


def test_the_examples_hold() -> None:
    for module in (text, units):
        results = doctest.testmod(module)
        assert results.attempted and not results.failed


@given(st.text())
def test_pictured_text_hides_nothing_and_keeps_its_positions(value: str) -> None:
    shown = text.pictured(value)
    assert len(shown) == len(value) and not HIDDEN & set(shown)
    assert all(after == before for before, after in zip(value, shown, strict=True) if before not in HIDDEN)


@given(st.text())
def test_escaped_text_hides_nothing(value: str) -> None:
    assert not HIDDEN & set(text.escaped(value))
