"""sbatch, srun and scontrol for tests: jobs on nodes that are addresses of this machine, with Slurm's own variables.

``install`` writes the three commands into a directory. What they share is below ``FAKE_SLURM``. A job that is requeued
waits, may then be given nodes to do without, and runs again under its number, as in Slurm (``job_mgr.c``).

    FAKE_SLURM/jobs/1/state      PENDING, RUNNING, COMPLETED, FAILED n, CANCELLED
    FAKE_SLURM/jobs/1/nodes      of its latest start
    FAKE_SLURM/jobs/1/pids/0     process of each task of the step that runs
    FAKE_SLURM/calls             every call of scontrol and sbatch
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

NODES = [f"127.0.0.{number}" for number in (1, 2, 3)]
"""Nodes of the cluster. Each is a name of this machine, so that rank 0 is found at the first one of a job."""

REQUEUE_SECONDS = 0.5


def install(directory: Path, state: Path) -> dict[str, str]:
    """Write the commands into a directory and return the variables that make them work."""
    directory.mkdir()
    state.mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        path = directory / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        path.chmod(0o755)
    python = Path(sys.executable).parent
    return {"PATH": f"{directory}:{python}:{os.environ['PATH']}", "FAKE_SLURM": str(state)}


class Job:
    """A job on disk."""

    def __init__(self, number: str | int) -> None:
        self.number = str(number)
        self.directory = Path(os.environ["FAKE_SLURM"]) / "jobs" / self.number

    def read(self, name: str) -> str:
        """Return one of its files, empty where there is none."""
        path = self.directory / name
        return path.read_text() if path.exists() else ""

    def write(self, name: str, text: str) -> None:
        """Write one of its files whole."""
        temporary = self.directory / f".{name}.{os.getpid()}"
        temporary.write_text(text)
        temporary.rename(self.directory / name)

    def directive(self, name: str, default: str = "") -> str:
        """Return the value of an option in its file."""
        match = re.search(rf"^#SBATCH --{name}=(.*)$", self.read("script"), re.MULTILINE)
        return match[1] if match else default


def record(*words: str) -> None:
    """Note a call."""
    with (Path(os.environ["FAKE_SLURM"]) / "calls").open("a") as file:
        print(*words, file=file)


def sbatch(arguments: list[str]) -> int:
    """Accept a job, print its number and run it in the background."""
    record("sbatch", *arguments)
    options = dict(word.partition("=")[::2] for word in arguments[:-1])
    number = sum(1 for _ in Path(os.environ["FAKE_SLURM"]).glob("jobs/*")) + 1
    job = Job(number)
    job.directory.mkdir(parents=True)
    job.write("script", Path(arguments[-1]).read_text())
    job.write("state", "PENDING")
    job.write("dependency", options.get("--dependency", "").removeprefix("afterok:"))
    subprocess.Popen(
        [sys.executable, __file__, "control", str(number)],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    print(f"{number};cluster" if "--parsable" in options else f"Submitted batch job {number}")
    return 0


def control(number: str) -> int:
    """Start a job when it may, and again as often as it is requeued."""
    job, restart = Job(number), 0
    before = job.read("dependency")
    while before and Job(before).read("state") in ("PENDING", "RUNNING"):
        time.sleep(0.05)
    if before and Job(before).read("state") != "COMPLETED":
        job.write("state", "CANCELLED")
        return 0
    while True:
        code = _run_batch(job, restart)
        if not job.read("requeue"):
            job.write("state", "COMPLETED" if code == 0 else f"FAILED {code}")
            return 0
        time.sleep(REQUEUE_SECONDS)
        (job.directory / "requeue").unlink()
        restart += 1


def _run_batch(job: Job, restart: int) -> int:
    excluded = job.read("excluded").split(",")
    nodes = [node for node in NODES if node not in excluded][: int(job.directive("nodes"))]
    job.write("nodes", ",".join(nodes))
    job.write("state", "RUNNING")
    log = job.directive("output").replace("%j", job.number)
    environment = {
        **os.environ,
        "SLURM_JOB_ID": job.number,
        "SLURM_JOB_NODELIST": _compact(nodes),
        "SLURM_JOB_NUM_NODES": str(len(nodes)),
        "SLURM_NTASKS": str(len(nodes) * int(job.directive("ntasks-per-node"))),
        "SLURM_NTASKS_PER_NODE": job.directive("ntasks-per-node"),
        "SLURM_CPUS_ON_NODE": "16",
        "SLURMD_NODENAME": nodes[0],
        "SLURM_RESTART_COUNT": str(restart),
    }
    with open(log, "a") as output:
        batch = subprocess.Popen(
            ["bash", str(job.directory / "script")], env=environment, stdout=output, stderr=output, cwd=Path.cwd()
        )
        job.write("batch", str(batch.pid))
        return batch.wait()


def _compact(nodes: list[str]) -> str:
    return f"127.0.0.[{','.join(node.rpartition('.')[2] for node in nodes)}]" if len(nodes) > 1 else nodes[0]


def _expanded(nodes: str) -> list[str]:
    match = re.fullmatch(r"(.*)\[(.*)\]", nodes)
    return [f"{match[1]}{number}" for number in match[2].split(",")] if match else [nodes]


def scontrol(arguments: list[str]) -> int:
    """Show hosts and jobs, requeue a job, give one that waits nodes to do without."""
    if arguments[:2] == ["show", "hostnames"]:
        print(*_expanded(arguments[2]), sep="\n")
        return 0
    record("scontrol", *arguments)
    if arguments[:2] == ["show", "job"]:
        print(f"   ReqNodeList=(null) ExcNodeList={Job(arguments[2]).read('excluded') or '(null)'}")
    elif arguments[0] == "requeue":
        job = Job(arguments[1])
        job.write("requeue", "1")
        job.write("state", "PENDING")
    else:
        settings = dict(word.split("=", 1) for word in arguments[1:])
        job = Job(settings["JobId"])
        if job.read("state") != "PENDING":
            print("Job is no longer pending execution", file=sys.stderr)
            return 1
        job.write("excluded", settings["ExcNodeList"])
    return 0


def srun(arguments: list[str]) -> int:
    """Run tasks on the nodes of the job. Signals are passed on, and ends are told as srun tells them."""
    command = next(number for number, word in enumerate(arguments) if not word.startswith("-"))
    options = dict(word.partition("=")[::2] for word in arguments[:command])
    job = Job(os.environ["SLURM_JOB_ID"])
    nodes = _expanded(os.environ["SLURM_JOB_NODELIST"])[: int(options.get("--nodes", 1000))]
    per_node = int(options.get("--ntasks-per-node", os.environ["SLURM_NTASKS_PER_NODE"]))
    tasks = [
        subprocess.Popen(arguments[command:], env=_task(rank, nodes, per_node)) for rank in range(len(nodes) * per_node)
    ]
    if "--overlap" not in options:
        (job.directory / "pids").mkdir(exist_ok=True)
        for rank, task in enumerate(tasks):
            (job.directory / "pids" / str(rank)).write_text(str(task.pid))
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda received, frame: [task.send_signal(received) for task in tasks])
    return _wait(tasks, nodes, per_node, float(options.get("--wait", 0)) or float("inf"))


def _wait(tasks: list[subprocess.Popen[bytes]], nodes: list[str], per_node: int, wait_seconds: float) -> int:
    """Return what srun ends with: the highest signal and 128, else the highest exit code."""
    told: set[int] = set()
    deadline = float("inf")
    while len(told) < len(tasks):
        for rank, task in enumerate(tasks):
            code = task.poll()
            if code is None or rank in told:
                continue
            told.add(rank)
            deadline = min(deadline, time.monotonic() + wait_seconds)
            if code:
                how = f"Exited with exit code {code}" if code > 0 else signal.strsignal(-code)
                print(f"srun: error: {nodes[rank // per_node]}: task {rank}: {how}", file=sys.stderr, flush=True)
        if time.monotonic() > deadline:
            for task in tasks:
                task.kill()
        time.sleep(0.02)
    codes = [task.returncode for task in tasks]
    return 128 - min(codes) if min(codes) < 0 else max(codes)


def _task(rank: int, nodes: list[str], per_node: int) -> dict[str, str]:
    """Return the environment of a task, with the variables of the step."""
    return {
        **os.environ,
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": _compact(nodes),
        "SLURM_STEP_NUM_NODES": str(len(nodes)),
        "SLURM_STEP_NUM_TASKS": str(len(nodes) * per_node),
        "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{len(nodes)})" if len(nodes) > 1 else str(per_node),
        "SLURM_LAUNCH_NODE_IPADDR": "192.0.2.1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % per_node),
        "SLURM_NODEID": str(rank // per_node),
        "SLURMD_NODENAME": nodes[rank // per_node],
    }


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "control": lambda w: control(*w)}[name](words))
