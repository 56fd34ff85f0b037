"""scripts/doctor.py: a verdict and its exit code, within seconds, on one machine and on the nodes of a job."""

import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from nemo_prolong.config.compose import CONFIG_DIR, Request
from nemo_prolong.config.schema import RunConfig
from nemo_prolong.doctor import examination as examinations
from nemo_prolong.doctor.examination import Doctor
from nemo_prolong.doctor.finding import Level, good, no_go, warning
from nemo_prolong.doctor.report import Examination, as_json, show, verdict
from nemo_prolong.errors import EXIT_NO_GO
from tests.support.recorded_node import cpu_node, h100_node, recorded_host

SCRIPT = CONFIG_DIR.parent / "scripts" / "doctor.py"
FULL_SIZE = "+exp=stage2"
FINDINGS = (
    good("cpus", "224 processors for this process."),
    warning("open_files", "ulimit -n is 1024.", "Files are needed.", "Raise it."),
    no_go("gpus", "7 GPUs here.", "One is missing.", "Leave the node out."),
)


def request(*overrides):
    arguments: Namespace = get_args_parser().parse_args(overrides)
    return Request.of(RunConfig, "train", arguments)


def names(examination, level):
    return [finding.name for finding in examination.findings if finding.level is level]


def free_ports():
    """Return a port that is free, and has a free one after it."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def test_a_recorded_node_is_a_go_as_far_as_the_machine_goes(tmp_path):
    found = Doctor(recorded_host(tmp_path), {}).examine(None)
    unhappy = [finding for finding in found.findings if finding.level is not Level.OK]
    # What these programs run on is not the container: its versions and limits are those of the tests.
    assert {finding.name for finding in unhappy} <= {"versions", "fallbacks", "cpus", "open_files", "processes",
                                                     "locked_memory", "shared_memory"}  # fmt: skip
    assert (found.subject, len(found.machine.gpus)) == ("", 8)


def test_a_full_size_stage_is_a_no_go_on_a_machine_without_gpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(examinations, "read_machine", lambda probes, deadline: (cpu_node(), []))
    found = Doctor(environment={}).examine(request(FULL_SIZE, "tracker=wandb"))
    assert not found.go
    assert {"gpus", "data", "parent"} <= set(names(found, Level.NO_GO))
    assert "credentials" in names(found, Level.WARNING)
    assert found.subject == "+exp=stage2 tracker=wandb"


def test_every_mistake_of_a_configuration_is_a_finding(tmp_path):
    found = Doctor(recorded_host(tmp_path), {}).examine(request("+exp=mini/base", "seq_length=0", "seed=-1"))
    texts = {finding.what for finding in found.findings if finding.name == "configuration"}
    assert texts == {"seq_length=0: must be greater than 0.", "seed=-1: must be at least 0."}
    assert "gpus" in names(found, Level.OK)
    assert not found.go


def test_variables_of_a_launcher_that_contradict_each_other_are_a_finding(tmp_path):
    found = Doctor(recorded_host(tmp_path), {"RANK": "1", "WORLD_SIZE": "2"}).examine(None)
    assert "launcher" in names(found, Level.NO_GO)


def test_one_process_of_each_node_looks(tmp_path):
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert Doctor(recorded_host(tmp_path), environment).examine(None) is None


def test_the_verdict_counts_what_is_to_mend():
    found = Examination(FULL_SIZE, h100_node(), FINDINGS, 2.34)
    assert verdict(found) == "no go: +exp=stage2 on h100-01, 1 finding to mend first, 1 warning (2.3 s)"
    assert verdict(replace(found, subject="", findings=FINDINGS[:2])) == "go: h100-01, 1 warning (2.3 s)"


def test_a_node_goes_when_the_whole_job_goes():
    assert not Examination("", h100_node(), FINDINGS[:1], 1.0, elsewhere_go=False).go


def test_the_worst_is_shown_first_with_reason_and_remedy(capsys):
    show(Examination(FULL_SIZE, h100_node(), FINDINGS, 2.34))
    assert [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()] == [
        "NO GO gpus 7 GPUs here.".split(),
        "why: One is missing.".split(),
        "mend: Leave the node out.".split(),
        "warning open_files ulimit -n is 1024.".split(),
        "why: Files are needed.".split(),
        "mend: Raise it.".split(),
        "ok cpus 224 processors for this process.".split(),
        "no go: +exp=stage2 on h100-01, 1 finding to mend first, 1 warning (2.3 s)".split(),
    ]


def test_nodes_are_named_and_many_are_counted(capsys):
    nodes = tuple(f"n{number}" for number in range(6))
    show(Examination("", h100_node(), (replace(FINDINGS[2], nodes=nodes),), 1.0))
    assert "7 GPUs here. [n0, n1, n2, n3 and 2 more]" in capsys.readouterr().out


def test_the_json_holds_findings_and_machine_and_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_person_who_trusts_us")
    secret = replace(FINDINGS[0], what="token hf_of_a_person_who_trusts_us")
    node = h100_node()
    node = replace(node, nvidia=replace(node.nvidia, slow_pairs={(0, 1): "SYS"}))
    content = json.loads(as_json(Examination(FULL_SIZE, node, (secret, *FINDINGS[1:]), 2.3456)))
    assert content["findings"][1] == {
        "name": "open_files",
        "level": "warning",
        "what": "ulimit -n is 1024.",
        "why": "Files are needed.",
        "remedy": "Raise it.",
        "nodes": [],
    }
    assert content["findings"][0]["what"] == "token <hidden>"
    assert (content["format"], content["go"], content["subject"], content["seconds"]) == (1, False, FULL_SIZE, 2.346)
    assert content["machine"]["nvidia"]["slow_pairs"] == [[0, 1, "SYS"]]
    assert len(content["machine"]["nvidia"]["gpus"]) == 8


def start(tmp_path, *arguments, **environment):
    command, pipe = [sys.executable, str(SCRIPT), *arguments], subprocess.PIPE
    environment = {**os.environ, **environment}
    return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True)


def test_a_driver_and_a_disk_that_hang_hold_nobody_up(tmp_path, data_root):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 600\n")
    (programs / "nvidia-smi").chmod(0o755)
    # What reads it waits for a writer that never comes, as on a file system whose server is gone.
    (data_root / "rows" / "index.json").unlink()
    os.mkfifo(data_root / "rows" / "index.json")
    rows = ["data.mixture=[{path: rows, proportion: 1.0}]", "data.validation=[]", "train.val_check_interval=0"]
    arguments = [str(SCRIPT), "--json", "+exp=mini/base", f"data.root={data_root}", *rows]
    # Python waits for the threads of a pool when it ends, such as those that hash files.
    program = (
        "import functools, runpy, sys, time\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from nemo_prolong.doctor.machine import Host\n"
        "from nemo_prolong.doctor.probing import run_command\n"
        "def run(command):\n"
        "    if 'topo' in command:\n"
        "        ThreadPoolExecutor(1).submit(time.sleep, 600).result()\n"
        "    return run_command(command)\n"
        f"script = runpy.run_path({str(SCRIPT)!r})\n"
        "names = script['main'].__globals__\n"
        "names['Doctor'] = functools.partial(names['Doctor'], host=Host(run=run), budget_seconds=0.5)\n"
        f"sys.argv = {arguments!r}\n"
        "script['main']()\n"
    )
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    found = {finding["name"]: finding for finding in json.loads(process.stdout)["findings"]}
    assert process.returncode == EXIT_NO_GO
    # The driver did not answer, so nobody says that there is none.
    assert found["gpus"]["level"] == "no_go"
    assert found["gpus"]["what"].startswith("nvidia-smi gave no answer within ")
    # A slow store is no broken one.
    assert found["data"]["level"] == "warning"
    assert found["data"]["what"].startswith(f"the data in {data_root} gave no answer within ")


@pytest.mark.distributed
def test_the_nodes_of_a_job_end_with_one_verdict(tmp_path):
    port = free_ports()
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "job"}
    processes = [
        start(tmp_path, "--json", **common, RANK="0"),
        start(tmp_path, "--json", "+exp=no_such_stage", **common, RANK="1"),
    ]
    leader, other = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert [process.returncode for process in processes] == [EXIT_NO_GO, EXIT_NO_GO]
    found = {finding["name"]: finding for finding in leader["findings"]}
    assert found["configuration"]["what"] == other["findings"][0]["what"]
    assert found["configuration"]["nodes"] == [Path("/proc/sys/kernel/hostname").read_text().strip()]
    assert found["clocks"]["level"] == "ok"
