"""A token is looked for where the stage needs one, by its name. Its value is never in a finding."""

import pytest

from nemo_prolong.doctor.checks.credentials import credential_findings, known_sources
from nemo_prolong.doctor.finding import Level
from tests.support.recorded_node import said, stage

SECRET = "0123456789abcdef0123456789abcdef"


def of(cfg, environment=None, home=None):
    return credential_findings(cfg, known_sources(environment or {}, home))


def test_a_stage_that_needs_no_token_is_asked_for_none(tmp_path):
    assert of(stage("mini/base"), home=tmp_path) == []


def test_wandb_without_a_key(tmp_path):
    (finding,) = of(stage("mini/base", "tracker=wandb"), home=tmp_path)
    assert finding.level is Level.WARNING
    assert said(finding) == (
        "Weights & Biases: no token (WANDB_API_KEY, ~/.netrc).\n"
        "Training goes on without it, and its metrics are in metrics.jsonl alone.\n"
        "Set WANDB_API_KEY in the environment of the job, run wandb login, or set tracker.wandb.mode=offline."
    )


def test_wandb_offline_needs_no_key(tmp_path):
    assert of(stage("mini/base", "tracker=wandb", "tracker.wandb.mode=offline"), home=tmp_path) == []


def test_wandb_with_a_key_in_the_environment_names_the_variable_alone(tmp_path):
    (finding,) = of(stage("mini/base", "tracker=wandb"), {"WANDB_API_KEY": SECRET}, tmp_path)
    assert (finding.level, finding.what) == (Level.OK, "Weights & Biases: WANDB_API_KEY is there.")


def test_a_login_of_wandb_is_found(tmp_path):
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {SECRET}\n")
    (finding,) = of(stage("mini/base", "tracker=wandb"), home=tmp_path)
    assert (finding.level, finding.what) == (Level.OK, "Weights & Biases: ~/.netrc is there.")


@pytest.mark.parametrize("text", ["machine other.org login a password b\n", "no netrc at all"])
def test_a_netrc_of_others_is_no_login(tmp_path, text):
    (tmp_path / ".netrc").write_text(text)
    assert of(stage("mini/base", "tracker=wandb"), home=tmp_path)[0].level is Level.WARNING


def test_rows_in_s3_need_credentials(tmp_path):
    cfg = stage("stage2", "data.root=s3://bucket/rows", "data.tokenizer=tokenizer")
    (finding,) = of(cfg, home=tmp_path)
    assert finding.level is Level.WARNING
    assert finding.what.startswith("S3: no token (AWS_ACCESS_KEY_ID, AWS_PROFILE,")
    assert "(an instance role)" in finding.why
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(f"[default]\naws_secret_access_key = {SECRET}\n")
    assert of(cfg, home=tmp_path)[0].what == "S3: ~/.aws/credentials is there."


def test_mlflow_on_a_server_and_rows_of_the_hub(tmp_path):
    cfg = stage(
        "mini/base", "tracker=mlflow", "tracker.mlflow.tracking_uri=https://mlflow", "data.root=hf://datasets/a/b"
    )
    assert [finding.what for finding in of(cfg, {"HF_TOKEN": SECRET}, tmp_path)] == [
        "MLflow: no token (MLFLOW_TRACKING_TOKEN, MLFLOW_TRACKING_USERNAME, ~/.mlflow/credentials).",
        "Hugging Face: HF_TOKEN is there.",
    ]
