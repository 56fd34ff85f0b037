"""Every target gets files that its own tools accept, and nothing of a secret is in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_prolong.config.compose import CONFIG_DIR, compose
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.errors import ConfigError
from nemo_prolong.launch.files import plan_launch
from nemo_prolong.launch.kubernetes import object_name
from nemo_prolong.launch.parts import LaunchPart
from tests.support.manifests import pods

CONTAINER = (
    'cluster.container_image="registry#team/prolong:1"',
    "cluster.container_mounts=[/lustre/project:/project,models:/models:ro]",
    "cluster.container_workdir=/project",
    "cluster.time_limit=1-00:00:00",
    "cluster.signal_seconds=3600",
)
ONE_NODE = ("+exp=stage1", "parallelism=h100_8_tp4_cp2", "parent=hf:/models/llama")
STAGE2 = ("+exp=stage2", "parent=runs/stage 1")


def plan(*overrides: str, directory: Path = Path("/projects/long context")) -> Any:
    cfg = compose(RunConfig, "train", overrides)
    return plan_launch([LaunchPart.of_stage(cfg, [word for word in overrides if "launch." not in word])], directory)


def manifest(*overrides: str) -> dict[str, Any]:
    planned = plan(*overrides, *CONTAINER, "launch.target=kubernetes")
    loaded: dict[str, Any] = yaml.safe_load(planned.text())
    return loaded


def test_several_pods_run_torchrun_and_one_starts_its_ranks_itself():
    (job,) = pods(manifest(*STAGE2, "launch.kubernetes.kind=jobset"))
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 8
    assert container["command"][:5] == [
        "bash",
        "-c",
        'cd "$0" && exec "$@"',
        "/project",
        "torchrun",
    ]
    assert container["command"][5:11] == [
        *("--nnodes=8", "--nproc-per-node=8", "--node-rank=$(JOB_COMPLETION_INDEX)"),
        *("--master-addr=stage2-node-0-0.stage2", "--master-port=29500"),
        "/workspace/nemo_prolong/scripts/train.py",
    ]
    assert {"name": "PET_SHUTDOWN_TIMEOUT", "value": "3600"} in container["env"]
    (alone,) = pods(manifest(*ONE_NODE, "launch.kubernetes.kind=jobset"))
    command = alone["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[4:6] == ["python", "/workspace/nemo_prolong/scripts/train.py"]


def test_the_runtime_of_a_train_job_says_where_the_nodes_are():
    spec = manifest(*STAGE2)["spec"]
    assert spec["trainer"]["command"][4:6] == ["torchrun", "/workspace/nemo_prolong/scripts/train.py"]
    assert (spec["trainer"]["numNodes"], spec["trainer"]["numProcPerNode"]) == (8, 8)
    assert spec["trainer"]["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "8"}


def test_kubernetes_replaces_nothing_in_what_was_typed():
    name = "a $(HOME) $x"
    made = manifest(*STAGE2, f'model.license="{name}"')
    assert 'model.license="a $$(HOME) $$x"' in made["spec"]["trainer"]["command"]


def test_a_pod_sees_the_mounts_and_asks_for_cpus_and_memory():
    made = manifest(
        *ONE_NODE, "cluster.cpus_per_task=12", "cluster.memory_per_node=900G", "launch.kubernetes.kind=jobset"
    )
    pod = pods(made)[0]["spec"]["template"]["spec"]
    assert [list(volume.values())[1] for volume in pod["volumes"]] == [
        {"medium": "Memory"},
        {"path": "/lustre/project", "type": "Directory"},
        {"claimName": "models", "readOnly": True},
    ]
    assert [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]] == ["/dev/shm", "/project", "/models"]
    assert pod["containers"][0]["resources"]["requests"] == {"nvidia.com/gpu": "8", "cpu": "96", "memory": "900Gi"}
    assert pod["terminationGracePeriodSeconds"] == 3600


@pytest.mark.parametrize(
    ("name", "expected"), [("a/B_c", "a-b-c"), ("1", "run-1"), ("///", "run"), ("x" * 60, f"{'x' * 33}-")]
)
def test_an_object_has_a_name_that_kubernetes_takes(name, expected):
    assert object_name(name).startswith(expected) and len(object_name(name)) <= 40


def test_long_names_that_differ_stay_different():
    assert object_name("x" * 60 + "a") != object_name("x" * 60 + "b")


def test_a_docker_command_runs_as_its_words():
    planned = plan(*ONE_NODE, *CONTAINER, "launch.target=docker", 'model.license="it is $HOME"')
    shown = planned.text().replace("exec \\\n  docker", "printf '%s\\n'")
    words = subprocess.run(
        ["bash", "-c", shown.replace("cd ", "# ")], capture_output=True, text=True
    ).stdout.splitlines()
    assert words[:3] == ["run", "--rm", "--init"] and "--stop-timeout=3600" in words
    assert "--volume=/lustre/project:/project" in words and "--workdir=/project" in words
    assert {"--env=HF_TOKEN", "--env=CUDA_DEVICE_MAX_CONNECTIONS=1"} <= set(words)
    start = words.index("registry#team/prolong:1")
    assert words[start + 1 : start + 4] == ["python", "/workspace/nemo_prolong/scripts/train.py", "+exp=stage1"]
    assert 'model.license="it is $HOME"' in words


@pytest.mark.parametrize("target", ["slurm", "kubernetes", "docker", "local"])
def test_values_of_secrets_are_in_no_file(target, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value_1234")
    container = () if target == "local" else (CONTAINER[0], "cluster.container_mounts=[/p:/project]", CONTAINER[2])
    parent = "parent=hf:/project/llama"
    text = plan("+exp=stage1", "parallelism=h100_8_tp4_cp2", parent, *container, f"launch.target={target}").text()
    assert "hf_secret" not in text
    assert ("HF_TOKEN" in text) == (target in ("kubernetes", "docker"))


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        compose(RunConfig, "train", overrides)
    return str(error.value)


def test_files_inside_the_image_are_refused():
    assert refusal("+exp=stage2", "cluster.container_image=a") == "\n".join(
        f"{what}: {path} would lie inside cluster.container_image=a, which is a copy of its own on every node and is "
        "gone when the job ends. Mount a shared directory and name paths in it, such as "
        "cluster.container_mounts=[/shared/project:/project] cluster.container_workdir=/project."
        for what, path in [
            ("runs_dir=runs", "runs/stage2"),
            ("parent=runs/stage1", "runs/stage1"),
            ("data.root=datasets/long-context-524288", "datasets/long-context-524288"),
        ]
    )


def test_files_beside_a_mount_or_in_one_that_is_only_read_are_refused():
    container = ("cluster.container_image=a", "cluster.container_mounts=[/lustre:/project:ro]")
    found = refusal(
        "+exp=stage1", *container, "runs_dir=/project/runs", "parent=hf:/projects/llama", "data.root=s3://bucket/rows",
        "data.tokenizer=/project/../tokenizer",
    ).splitlines()  # fmt: skip
    assert found[0] == (
        "runs_dir=/project/runs: /project/runs/stage1 lies in /project, which cluster.container_mounts makes "
        "read-only. Mount it without :ro, or write to another mount."
    )
    assert [line.partition(" would")[0] for line in found[1:]] == [
        "parent=hf:/projects/llama: /projects/llama",
        "data.tokenizer=/project/../tokenizer: /project/../tokenizer",
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["launch.target=docker", "parallelism=h100_8_tp4_cp2"],
            "launch.target=docker: runs an image, and none is named. Set cluster.container_image=IMAGE.",
        ),
        (
            ["launch.target=local"],
            "launch.target=local: is one machine, and parallelism.num_nodes=8. Set launch.target=slurm or kubernetes, "
            "or a parallelism of one node, such as h100_8_tp4_cp2.",
        ),
        (
            ["launch.submit=true", "launch.dry_run=true"],
            "launch.dry_run=true launch.submit=true: a dry run submits nothing. Leave launch.dry_run out.",
        ),
        (
            ["+cluster.environment.HF_TOKEN=abc"],
            "cluster.environment.HF_TOKEN: a secret in the configuration is written into job files and records. Add "
            "HF_TOKEN to cluster.secrets, and set it in the environment (in the Secret, with Kubernetes).",
        ),
        (
            ["cluster.container_mounts=[volume:/project]"],
            "cluster.container_mounts=volume:...: pyxis mounts directories of the host, which are named by absolute "
            "paths. Write /PATH:TARGET. Names of volumes are for launch.target=docker and kubernetes.",
        ),
    ],
    ids=["no image", "too few machines", "both", "a secret", "a volume under pyxis"],
)
def test_a_launch_that_cannot_be_right_is_refused(overrides, message):
    assert refusal("+exp=stage2", *overrides) == message


def launch_script(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = CONFIG_DIR.parent / "scripts" / "launch.py"
    return subprocess.run([sys.executable, str(script), *arguments], cwd=directory, capture_output=True, text=True)


def test_a_dry_run_writes_nothing_and_what_is_kept_can_be_submitted(tmp_path):
    printed = launch_script(tmp_path, "+exp=mini/base", "launch.target=local")
    assert printed.returncode == 0 and list(tmp_path.iterdir()) == []
    kept = launch_script(tmp_path, "+exp=mini/base", "launch.target=local", "launch.dry_run=false")
    script = tmp_path / "runs/demo/base/launch/local.sh"
    assert script.read_text() == printed.stdout
    assert kept.stdout.splitlines() == [str(script), f"submit it with: bash {script}"]
    assert "launch." not in printed.stdout.partition("train.py")[2]


def test_a_local_launch_ends_with_the_code_of_the_stage(tmp_path):
    submitted = launch_script(tmp_path, "+exp=mini/base", "launch.target=local", "launch.submit=true")
    assert submitted.returncode == 3
    assert "the data directory does not exist" in submitted.stderr


def part_with(directory: str, mounts: str) -> LaunchPart:
    mounted = f"cluster.container_mounts=[/lustre/project:/project,/lustre/models:/models{mounts}]"
    cfg = compose(RunConfig, "train", [*ONE_NODE, *CONTAINER, mounted])
    return LaunchPart.of_stage(cfg, ["--config-dir", directory, "+exp=mine"])


@pytest.mark.parametrize(
    ("directory", "mounts", "seen"),
    [
        ("/lustre/project/conf", "", "/project/conf"),
        ("/lustre/project", "", "/project"),
        ("/lustre/project/me/conf", ",/lustre/project/me:/me:ro", "/me/conf"),
        ("/home/me/conf", ",/home/me/conf:/conf:ro", "/conf"),
    ],
)
def test_a_directory_of_configurations_is_named_as_the_container_sees_it(directory: str, mounts: str, seen: str):
    assert part_with(directory, mounts).words[2:] == ["--config-dir", seen, "+exp=mine"]


def test_a_directory_of_configurations_that_no_mount_holds_is_refused():
    with pytest.raises(ConfigError) as refusal:
        _ = part_with("/lustre/project2", "").words
    assert str(refusal.value) == (
        "--config-dir /lustre/project2: no mount of cluster.container_image=registry#team/prolong:1 holds it. Mount "
        "it, such as cluster.container_mounts=[/lustre/project2:/lustre/project2:ro], or put it below a mount."
    )
