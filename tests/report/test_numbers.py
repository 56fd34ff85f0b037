import pytest

from nemo_prolong.report import numbers


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (numbers.tokens, 811_008, "792K"),
        (numbers.tokens, None, "\u2013"),
        (numbers.base, 1e4, "10,000"),
        (numbers.base, 640_000.0, "640,000"),
        (numbers.base, 8e6, "8e6"),
        (numbers.base, 1.28e8, "1.28e8"),
        (numbers.significant, 4.2679, "4.27"),
        (numbers.significant, 2.8, "2.80"),
        (numbers.significant, 61.54, "61.5"),
        (numbers.significant, 1234.4, "1,234"),
        (numbers.significant, 3.4e6, "3.4e+06"),
        (numbers.significant, float("inf"), "\u2013"),
        (numbers.percent, 1.0, "100%"),
        (numbers.percent, 0.375, "37.5%"),
        (numbers.tick, 50.0, "50"),
        (numbers.tick, 20000.0, "20,000"),
        (numbers.tick, 0.5, "0.5"),
        (numbers.tick, 2.5, "2.5"),
        (numbers.loss, None, "\u2013"),
    ],
)
def test_numbers_read_as_a_person_would_write_them(show, value, text):
    assert show(value) == text


def test_a_span_of_positions_starts_at_zero_or_a_round_length():
    assert [numbers.span(0, 512), numbers.span(2048, 8192)] == ["0\u2013512", "2K\u20138K"]
