from __future__ import annotations

import logging

import pytest

from nemo_prolong.data.epochs import log_epochs


def test_epochs_are_only_said_while_no_row_set_repeats_too_often(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="nemo_prolong"):
        log_epochs({"books": 0.5, "textbooks": 2.7})
    assert [record.getMessage() for record in caplog.records] == ["epochs: books 0.50, textbooks 2.70"]


def test_a_row_set_that_repeats_too_much_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="nemo_prolong"):
        log_epochs({"books": 0.5, "textbooks": 2.71, "arxiv": 4.0})
    [record] = caplog.records
    assert record.getMessage() == (
        "textbooks is walked through 2.7 times, arxiv is walked through 4.0 times: more than the 2.7 epochs that the "
        "recipe's own data repeats at most; give more documents, or a smaller proportion."
    )
