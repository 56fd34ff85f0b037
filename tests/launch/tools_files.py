"""Files of scripts/launch.py under the tools of others: the schemas of Kubernetes, Kubeflow and JobSet, and shellcheck.

``make test-launch`` runs this in an environment of these tools (``requirements/launch.in``), on files that
``tests.launch.write_files`` wrote. tests/fixtures/kubernetes holds extracts of the public definitions of TrainJob and
JobSet (Apache-2.0, each says of what). A field that a schema does not have is refused, as
``kubectl create --validate=strict`` does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.support.manifests import pods

DIRECTORY = Path(os.environ["LAUNCH_FILES"])
MANIFESTS = sorted(DIRECTORY.glob("*.yaml"))
SCRIPTS = sorted([*DIRECTORY.glob("*.sh"), *DIRECTORY.glob("*.sbatch")])
DEFINITIONS = Path(__file__).parents[1] / "fixtures" / "kubernetes"


def complaints(manifest: dict[str, Any]) -> list[str]:
    """Return what is wrong with a TrainJob or a JobSet, one line each."""
    definition = json.loads((DEFINITIONS / f"{manifest['kind'].lower()}.json").read_text())
    expected = f"{definition['group']}/{definition['version']}"
    if manifest["apiVersion"] != expected:
        return [f"apiVersion: {manifest['apiVersion']} is not {expected}"]
    validator = jsonschema.Draft202012Validator(_strict(definition["schema"]))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def _strict(schema: Any) -> Any:
    """Return a schema that knows every field of an object that names some."""
    if isinstance(schema, list):
        return [_strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _strict(value) for key, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and "type" in closed:
        closed.setdefault("additionalProperties", False)
    return closed


def test_there_is_a_file_of_every_kind():
    kinds = {yaml.safe_load(path.read_text())["kind"] for path in MANIFESTS}
    assert kinds == {"TrainJob", "JobSet"} and {path.suffix for path in SCRIPTS} == {".sh", ".sbatch"}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_fits_the_definition_of_its_kind(path):
    assert complaints(yaml.safe_load(path.read_text())) == []


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_jobs_and_pods_of_a_manifest_fit_the_schema_of_kubernetes(path):
    for pod in pods(yaml.safe_load(path.read_text())):
        kubernetes_validate.validate(pod, "1.37", strict=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing_in_a_script(path):
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, "--shell=bash", path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_checks_see_what_is_wrong(tmp_path):
    (train_job,) = (made for made in map(yaml.safe_load, map(Path.read_text, MANIFESTS)) if made["kind"] == "TrainJob")
    train_job["spec"]["trainer"] |= {"numNodes": "eight", "nodes": 8}
    del train_job["spec"]["runtimeRef"]["name"]
    assert sorted(complaints(train_job)) == [
        "$.spec.runtimeRef: 'name' is a required property",
        "$.spec.trainer.numNodes: 'eight' is not of type 'integer'",
        "$.spec.trainer: Additional properties are not allowed ('nodes' was unexpected)",
    ]
    (pod,) = pods(train_job)
    pod["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        kubernetes_validate.validate(pod, "1.37", strict=True)
