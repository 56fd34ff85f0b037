"""Render a Slurm job for a stage, with one task per GPU. It is asked to save before its time is up, and then requeued.

srun starts the ranks itself, so no second launcher runs on the nodes. Slurm signals the batch shell, which hands the
signal on to the ranks. They save, exit with 75, and the job goes back into the queue and resumes. So does a job whose
ranks hung, if it saved a checkpoint before. One that hangs without getting on is left to be looked at. Any other exit
code ends it. The file holds no secrets. What the job needs beyond it comes from the environment of ``sbatch``.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.errors import EXIT_PREEMPTED

_TEMPLATE = """\
#!/bin/bash
{directives}

set -euo pipefail
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

run_dir={run_dir}
started=@$(date +%s)
ranks=
signalled=0
trap 'signalled=1; [ -z "$ranks" ] || kill -USR1 "$ranks" 2>/dev/null || true' USR1

# --wait ends ranks that hang after one has died; it leaves time for all of them to exit after a save.
srun --kill-on-bad-exit=0 --wait=60{srun_options} bash -c \\
  'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec python "$@"' - \\
  {command} &
ranks=$!

while :; do
  code=0
  wait "$ranks" || code=$?
  # The signal ends wait early with a code above 128: wait again for the ranks themselves.
  if [ "$signalled" = 1 ] && [ "$code" -gt 128 ]; then signalled=0; continue; fi
  break
done

# Ranks that hang write their stacks; the one they wait for may have ended by SIGKILL, whose code is then that of srun.
since_start() {{ [ -n "$(find "$1" -maxdepth 1 -name "$2" -newermt "$started" -print -quit 2>/dev/null)" ]; }}
if [ "$code" = {exit_preempted} ]; then
  scontrol requeue "$SLURM_JOB_ID"
elif [ "$code" != 0 ] && since_start "$run_dir" 'stacks.rank*.txt' && since_start "$run_dir/checkpoints" 'step_*'; then
  echo "ranks hung, see $run_dir/stacks.rank*.txt; the job has saved a checkpoint since it began and is requeued" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def render_sbatch(cfg: RunConfig, overrides: Sequence[str]) -> str:
    """Return the text of a job file for ``sbatch``.

    Args:
        cfg: A checked configuration. Its ``parallelism`` says how many nodes and GPUs, its ``cluster`` where.
        overrides: What is typed after ``scripts/train.py``.
    """
    image = cfg.cluster.container_image
    return _TEMPLATE.format(
        directives="\n".join(f"#SBATCH {directive}" for directive in _directives(cfg)),
        srun_options=f" --container-image={shlex.quote(image)}" if image else "",
        command=shlex.join(["scripts/train.py", *overrides]),
        exit_preempted=EXIT_PREEMPTED,
        run_dir=shlex.quote(cfg.run_dir),
    )


def _directives(cfg: RunConfig) -> list[str]:
    parallelism, cluster = cfg.parallelism, cfg.cluster
    chosen = {"--partition": cluster.partition, "--account": cluster.account}
    return [
        f"--job-name={cfg.name.replace('/', '-')}",
        f"--nodes={parallelism.num_nodes}",
        f"--ntasks-per-node={parallelism.ranks_per_node}",
        f"--gpus-per-node={parallelism.ranks_per_node}",
        "--exclusive",
        *(f"{flag}={value}" for flag, value in chosen.items() if value),
        f"--time={cluster.time_limit}",
        f"--signal=B:USR1@{cluster.signal_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={cfg.name.replace('/', '-')}-%j.log",
    ]
