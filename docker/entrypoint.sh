#!/bin/bash
# Starts the command of the container in its own place, after the doctor has looked at the machine.
#
#   docker run nemo_prolong python scripts/train.py +exp=stage2      the doctor, then the stage
#   docker run nemo_prolong bash                                     no doctor
#
# A command that runs scripts/train.py is given to the doctor first, with the settings typed there. Where it says no, the
# container ends with its exit code. NEMO_PROLONG_SKIP_DOCTOR=1 leaves it out. Of several ranks on a node, which are
# several containers or one each, the first one runs it.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Whether a command trains. What is typed after scripts/train.py is then in settings.
settings=()
trains() {
  while (($#)) && [[ $1 != scripts/train.py && $1 != */scripts/train.py ]]; do shift; done
  (($#)) || return 1
  shift
  settings=("$@")
  local argument
  for argument; do
    case $argument in --cfg | --cfg=* | -c | --help | --hydra-help | -h | --info | --info=*) return 1 ;; esac
  done
}

# In the background, because bash does not act on a signal before a child in the foreground has ended.
run_doctor() {
  python "$root/scripts/doctor.py" "${settings[@]}" >&2 &
  local doctor=$! code=0
  trap 'kill -TERM "$doctor" 2> /dev/null || true; exit 143' TERM
  trap 'kill -TERM "$doctor" 2> /dev/null || true; exit 130' INT
  wait "$doctor" || code=$?
  trap - TERM INT
  ((code == 0)) && return
  echo "The command was not started, because the doctor ended with $code. NEMO_PROLONG_SKIP_DOCTOR=1 leaves it out." >&2
  exit "$code"
}

if (($# == 0)); then set -- bash; fi
if [[ ${NEMO_PROLONG_SKIP_DOCTOR:-0} != 1 && ${LOCAL_RANK:-${SLURM_LOCALID:-0}} == 0 ]] && trains "$@"; then
  run_doctor
fi
exec "$@"
