"""Which node a failure names, and when a job is requeued and does without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_prolong.launch.failures import Failure, Verdict, judge, nodes_to_blame
from nemo_prolong.records.run_directory import RunDirectory

NODES = ["n1", "n2", "n3"]
MAIN = """\
Thread 0x00007f01 (most recent call first):
  File "/lib/python3.12/threading.py", line 355 in wait

Current thread 0x00007f02 (most recent call first):
  File "/lib/torch/distributed/{file}.py", line {line} in {function}
  File "/projects/scripts/train.py", line 30 in run
  File "/projects/scripts/train.py", line 44 in <module>
"""


def waits(line: int = 7) -> str:
    return MAIN.format(file="distributed_c10d", function="all_reduce", line=line)


def blamed(errors: str = "", stacks: dict[int, str] | None = None) -> dict[str, str]:
    return nodes_to_blame(errors, stacks or {}, NODES, ranks_per_node=2)


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ("srun: error: n2: task 3: Killed", {"n2": "rank 3 ended first: Killed"}),
        (
            "Traceback ...\nsrun: error: n3: task 4: Out Of Memory\nsrun: error: n1: tasks 0-1: Aborted",
            {"n3": "rank 4 ended first: Out Of Memory"},
        ),
        (
            "srun: error: n1: tasks 0-1: Exited with exit code 1",
            {"n1": "rank 0-1 ended first: Exited with exit code 1"},
        ),
        ("srun: error: n[1-3]: tasks 0-5: Exited with exit code 1", {}),
        ("srun: error: n2: task 3: Exited with exit code 4\nsrun: error: n1: task 0: Killed", {}),
        ("srun: error: elsewhere: task 3: Killed", {}),
        ("nothing of srun", {}),
    ],
    ids=["a signal", "the first", "a bug of one", "all alike", "it said why", "no node of the job", "no end"],
)
def test_the_rank_that_ended_first_names_its_node(errors, expected):
    assert blamed(errors) == expected


def test_a_broken_gpu_is_named_before_the_rank_that_ended_first():
    errors = "srun: error: n1: task 0: Aborted\nn3: 2026-11-24T10:00:00,1 kernel: NVRM: Xid (PCI:0000:1b:00): 79, pid=7"
    assert blamed(errors) == {"n3": "Xid 79 in its kernel's log"}


@pytest.mark.parametrize("xid", [13, 31, 43, 45])
def test_an_error_of_a_program_is_none_of_its_gpu(xid):
    assert blamed(f"n3: NVRM: Xid (PCI:0000:1b:00): {xid}, pid=7") == {}


def test_an_error_on_all_nodes_names_none():
    assert blamed("\n".join(f"{node}: NVRM: Xid (PCI:0): 48" for node in NODES)) == {}


def test_a_rank_that_wrote_no_stacks_in_a_hang_names_its_node():
    stacks = {rank: waits() for rank in (0, 1, 2, 4, 5)}
    # What srun says of the ranks that were ended says nothing then.
    assert blamed("srun: error: n1: task 0: Killed", stacks) == {"n2": "rank 3 wrote no stacks in a hang"}


def test_a_rank_that_stands_elsewhere_in_a_hang_names_its_node():
    elsewhere = MAIN.format(file="storage", function="_share_filename_cpu", line=3)
    stacks = {rank: elsewhere if rank == 5 else waits(line=rank) for rank in range(6)}
    assert blamed(stacks=stacks) == {
        "n3": "rank 5 hung in _share_filename_cpu (storage.py), the others in all_reduce (distributed_c10d.py)"
    }


def test_ranks_that_all_wait_name_none():
    # Those that were killed after it were not the reason.
    assert blamed("srun: error: n1: task 0: Killed", {rank: waits(line=rank) for rank in range(6)}) == {}
    halves = {rank: waits() if rank < 3 else MAIN.format(file="a", function="b", line=1) for rank in range(6)}
    assert blamed(stacks=halves) == {}
    assert nodes_to_blame("", {0: waits(), 1: halves[4]}, ["n1", "n2"], ranks_per_node=1) == {}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "run" / "checkpoints" / "step_00000125").mkdir(parents=True)
    return RunDirectory(tmp_path / "run")


def failure(*nodes: str, saved: bool = True, hung: bool = False, job: str = "7") -> Failure:
    why = dict.fromkeys(nodes, "why")
    return Failure(time=1.0, job=job, restart=0, code=1, hung=hung, saved=saved, nodes=why)


def events(run: RunDirectory) -> list[tuple[int, str, str]]:
    return [(event.step, event.event, event.detail) for event in run.events().records]


def test_a_node_is_excluded_once_when_it_was_named_often_enough(run):
    assert judge(run, failure("n1"), 2) == Verdict(True)
    assert judge(run, failure("n2"), 2) == Verdict(True)
    assert judge(run, failure("n1"), 2) == Verdict(True, ("n1",))
    assert judge(run, failure("n1"), 2) == Verdict(True)
    assert events(run)[2:4] == [
        (125, "node_failed", "n1: why"),
        (125, "node_excluded", "n1 was named in 2 failures of job 7"),
    ]
    records = [json.loads(line) for line in (run.path / "launch/failures.jsonl").read_text().splitlines()]
    assert [record["nodes"] for record in records] == [{"n1": "why"}, {"n2": "why"}, {"n1": "why"}, {"n1": "why"}]


def test_failures_of_another_job_do_not_count(run):
    judge(run, failure("n1", job="6"), 2)
    assert judge(run, failure("n1"), 2) == Verdict(True)


def test_a_job_that_never_saves_is_requeued_until_a_node_is_excluded(run):
    assert [judge(run, failure("n1", saved=False), 2) for _ in range(3)] == [
        Verdict(True),
        Verdict(True, ("n1",)),
        Verdict(False),
    ]


def test_a_save_begins_the_count_of_vain_failures_anew(run):
    for _ in range(2):
        judge(run, failure("n1", saved=False), 2)
    judge(run, failure("n2"), 2)
    assert judge(run, failure("n3", saved=False), 2).requeue


@pytest.mark.parametrize(
    ("saved", "hung", "requeued"), [(True, True, True), (False, True, False), (True, False, False)]
)
@pytest.mark.parametrize("exclude_after", [2, None])
def test_a_failure_of_no_node_is_requeued_after_a_hang_and_a_save(run, saved, hung, requeued, exclude_after):
    assert judge(run, failure(saved=saved, hung=hung), exclude_after) == Verdict(requeued)


def test_without_a_limit_a_node_is_named_and_never_excluded(run):
    verdicts = [judge(run, failure("n1"), None) for _ in range(3)]
    assert verdicts == [Verdict(False)] * 3 and {event for _, event, _ in events(run)} == {"node_failed"}
