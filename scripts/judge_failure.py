"""Say what a Slurm job does after its ranks have failed. The job file of scripts/launch.py calls this."""

import argparse
import sys
import time
from pathlib import Path

from nemo_prolong.launch.failures import (
    Failure,
    explain,
    judge,
    nodes_to_blame,
    saved_since,
    stacks_since,
)
from nemo_prolong.records.run_directory import RunDirectory


def main() -> None:
    """Read stderr of the ranks, print "requeue" or "end" and the nodes to exclude, and explain it on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--code", type=int, required=True, help="exit code of srun")
    parser.add_argument("--started", type=float, required=True, help="when the job began, in Unix seconds")
    parser.add_argument("--job", required=True, help="number of the job")
    parser.add_argument("--restart", type=int, default=0, help="how often it was requeued")
    parser.add_argument("--nodes", required=True, help="nodes in the order of the ranks, with commas")
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--exclude-after", type=int, help="failures that exclude a node")
    typed = parser.parse_args()
    run, nodes = RunDirectory(typed.run_dir), typed.nodes.split(",")
    stacks = stacks_since(run, len(nodes) * typed.ranks_per_node, typed.started)
    failure = Failure(
        time=round(time.time(), 3),
        job=typed.job,
        restart=typed.restart,
        code=typed.code,
        hung=bool(stacks),
        saved=saved_since(run, typed.started),
        nodes=nodes_to_blame(sys.stdin.read(), stacks, nodes, typed.ranks_per_node),
    )
    verdict = judge(run, failure, typed.exclude_after)
    for line in explain(run, failure, verdict):
        print(line, file=sys.stderr)
    print(verdict)


if __name__ == "__main__":
    main()
