"""No secret survives: in texts, in configurations, in log lines, in what a script prints."""

from __future__ import annotations

import doctest
import json
import logging
import subprocess
import sys

import pytest

from nemo_prolong import logs, redaction
from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.redaction import redact, redact_values

CANARY = "cAnArY0123456789"

SECRETS = [
    f"https://user:{CANARY}@host/path",
    f"postgresql://{CANARY}@host",
    f"http://host/run?token={CANARY}",
    f"s3://bucket/key?a=1&X-Amz-Signature={CANARY}&b=2",
    f"HF_TOKEN={CANARY}",
    f"export WANDB_API_KEY='{CANARY}'",
    f'"aws_secret_access_key": "{CANARY}"',
    f'{{"password": "two {CANARY} words", "steps": 3}}',
    f"tracker.mlflow.password={CANARY}",
    f"AWS_SESSION_TOKEN: {CANARY}",
    f"Authorization: Bearer {CANARY}",
    f"hf_{CANARY}{CANARY}",
]

INNOCENT = [
    "step  10/150  loss 4.1  8,000 tokens/s  target_tokens=4096 eos_token=<|end_of_text|> pad_token: 3",
    "tokenizer=tokenizer tokenizer_sha256=ab12ab12ab12ab12ab12ab12ab12ab12ab12ab12ab12ab12ab12ab12ab12ab12",
    "git_commit: 2804ef92804ef92804ef92804ef92804ef928040",
    "s3://bucket/prolong-64k and git@host:name/repository",
    "secret: null, api_key=None, no credentials: set them in the environment",
    "data.apply_instruct_masks=true seq_length=64K 'data.validation=[a,b]'",
]


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_replaced_and_the_rest_of_the_line_stays(text):
    hidden = redact(text)
    assert CANARY not in hidden and hidden.count("<hidden>") == 1
    assert hidden[:3] == text[:3] or text.startswith("hf_")
    assert redact(hidden) == hidden


@pytest.mark.parametrize("text", INNOCENT)
def test_what_is_no_secret_stays_as_it_is(text):
    assert redact(text) == text


def test_values_of_secret_variables_are_replaced_everywhere(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", CANARY)
    monkeypatch.setenv("OTHER_API_KEY", CANARY + "longer")
    assert redact(f"failed with {CANARY} and {CANARY}longer.") == "failed with <hidden> and <hidden>."
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/someone/token")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert redact("true: read /home/someone/token") == "true: read /home/someone/token"


def test_a_configuration_loses_its_secrets_and_nothing_else():
    config = {
        "tracker": {"mlflow": {"tracking_uri": f"http://me:{CANARY}@host"}, "api_key": CANARY, "token": CANARY},
        "data": {"tokenizer": "tokenizer", "mixture": [{"path": "a", "proportion": 0.5}], "cache": None},
        "train": {"train_iters": 5, "secret": None},
    }
    hidden = redact_values(config)
    assert CANARY not in json.dumps(hidden)
    assert hidden["data"] == config["data"] and hidden["train"] == config["train"]
    assert hidden["tracker"] == {
        "mlflow": {"tracking_uri": "http://<hidden>@host"},
        "api_key": "<hidden>",
        "token": "<hidden>",
    }


def test_log_lines_and_their_tracebacks_are_redacted(tmp_path, capfd):
    with logs.run_logging(tmp_path / "train.log", console=True):
        logging.getLogger("nemo_prolong").info("opened %s", f"s3://me:{CANARY}@host")
        try:
            raise ValueError(f"HF_TOKEN={CANARY}")
        except ValueError:
            logging.getLogger("some.library").exception("failed")
    written = (tmp_path / "train.log").read_text()
    assert CANARY not in written + capfd.readouterr().out
    assert "opened s3://<hidden>@host" in written and "ValueError: HF_TOKEN=<hidden>" in written


def test_no_printed_configuration_or_error_shows_a_secret():
    train = CONFIG_DIR.parent / "scripts" / "train.py"
    overrides = ["+exp=mini/base", f"data.root=s3://me:{CANARY}@bucket"]
    printed = subprocess.run(
        [sys.executable, str(train), *overrides, "--cfg", "job"], capture_output=True, text=True, check=True
    )
    assert "root: s3://<hidden>@bucket" in printed.stdout and CANARY not in printed.stdout
    refused = subprocess.run(
        [sys.executable, str(train), "+exp=mini/base", f"seq_length=http://me:{CANARY}@host"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2 and "seq_length=http://<hidden>@host" in refused.stderr
    assert CANARY not in refused.stderr


def test_the_examples_in_the_documentation_hold():
    assert doctest.testmod(redaction).failed == 0
