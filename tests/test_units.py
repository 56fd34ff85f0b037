import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_prolong.units import format_bytes, format_seconds, format_tokens, parse_size


@given(st.integers(0, 2**52))
def test_tokens_are_never_printed_with_an_exponent(count):
    assert "e" not in format_tokens(count)


@given(st.integers(1, 4096), st.sampled_from(["", "K", "M", "B"]))
def test_a_round_size_survives_printing_and_parsing(number, suffix):
    count = parse_size(f"{number}{suffix}")
    assert parse_size(format_tokens(count)) == pytest.approx(count, rel=0.006)
    if suffix and number < 1024:
        assert format_tokens(count) == f"{number}{suffix}"


@pytest.mark.parametrize(
    ("text", "count"), [("64K", 65536), ("1.5M", 1572864), ("65_536", 65536), (12, 12), ("20b", 20 * 2**30)]
)
def test_sizes_are_binary(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "K", "64 K", "-1", "1e3", "0.3", True, None, 1.0])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a"):
        parse_size(text)


def test_bytes_and_durations_have_their_unit():
    assert [format_bytes(512), format_bytes(3 * 2**29), format_bytes(2**41)] == ["512 B", "1.5 GiB", "2.0 TiB"]
    assert [format_seconds(s) for s in (45.4, 200, 7500, 356_400)] == ["45s", "3m20s", "2h05m", "4d03h"]
