import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_prolong.units import exact_tokens, format_bytes, format_seconds, format_tokens, parse_size


@given(st.integers(0, 2**52))
def test_tokens_are_never_printed_with_an_exponent(count):
    assert "e" not in format_tokens(count)


@given(st.integers(0, 2**52))
def test_printed_tokens_are_within_half_a_percent(count):
    text = format_tokens(count)
    unit = parse_size(f"1{text[-1]}") if text[-1] in "KMBT" else 1
    assert float(text.rstrip("KMBT")) * unit == pytest.approx(count, rel=0.006)


@given(st.integers(1, 1023), st.sampled_from(["", "K", "M", "B"]))
def test_a_round_size_is_printed_as_it_is_typed(number, suffix):
    assert format_tokens(parse_size(f"{number}{suffix}")) == f"{number}{suffix}"


@given(st.integers(0, 2**52))
def test_an_exact_size_is_read_back_as_it_was(count):
    assert parse_size(exact_tokens(count)) == count


@pytest.mark.parametrize(
    ("count", "text"),
    [(512, "512"), (1000, "1000"), (10_239, "10239"), (10_241, "10K"), (811_100, "792K"), (1_048_575, "1024K"),
     (1_572_864, "1.5M"), (1_950_000, "1.86M"), (20 * 2**30, "20B")],
)  # fmt: skip
def test_an_amount_has_three_digits_in_its_largest_unit(count, text):
    assert format_tokens(count) == text


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
