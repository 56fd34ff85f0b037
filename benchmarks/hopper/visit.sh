#!/usr/bin/env bash
# The quick check on a GPU machine without a network:
#   bash benchmarks/hopper/visit.sh ARCHIVE.tar.xz OUTPUT [settings of the check]
# The archive is what pack_site.py wrote. Card and log are in the folder OUTPUT after every row. Unpacking counts towards
# the nine minutes. PYTHON names another python3.
set -euo pipefail

archive=$(realpath "$1") output=$(realpath -m "$2")
shift 2
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$output" "$work/site" "$work/cuda/lib64"

"$python" - "$archive" "$work/site" <<'PROGRAM'
import sys
import tarfile

with tarfile.open(sys.argv[1]) as archive:
    archive.extractall(sys.argv[2], filter="data")
PROGRAM

# Transformer Engine looks for all libraries of CUDA in one place. An image may keep some of them among Python's packages.
cuda=${CUDA_HOME:-/usr/local/cuda}
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for part in bin include nvvm targets; do
  ln -sfn "$cuda/$part" "$work/cuda/$part"
done
for library in "$cuda"/lib64/* "$packages"/nvidia/cu13/lib/*.so*; do
  if [[ -e $library && ! -e $work/cuda/lib64/${library##*/} ]]; then
    ln -s "$library" "$work/cuda/lib64/"
  fi
done

export CUDA_HOME=$work/cuda PYTHONPATH=$work/site TORCH_CUDA_ARCH_LIST=9.0 PYTHONUNBUFFERED=1
"$python" -m benchmarks.hopper --quick --seconds $((540 - SECONDS)) --json "$output/hopper_quick.json" "$@" 2>&1 |
  tee "$output/log"
