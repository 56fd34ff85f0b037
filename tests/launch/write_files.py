"""Write what scripts/launch.py writes for every target: ``python -m tests.launch.write_files DIR``.

For ``make test-launch``, which checks these files in another environment (``tools_files.py``).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from nemo_prolong.config.compose import CONFIG_DIR

_CONTAINER = (
    'cluster.container_image="registry#team/prolong:1"',
    "cluster.container_mounts=[/lustre/my-project:/project]",
    "cluster.container_workdir=/project",
)
_RESOURCES = ("cluster.cpus_per_task=12", "cluster.memory_per_node=900G", "launch.kubernetes.network_resource=rdma/ib")
_ONE_NODE = ("parallelism=h100_8_tp4_cp2", "parent=hf:/project/llama")

FILES: dict[str, tuple[str, ...]] = {
    "host.sbatch": ("+exp=stage2", "cluster.partition=h100"),
    "name.sbatch": ("+exp=stage2", 'name="a (long) name"', "cluster.exclude_after_failures=null"),
    "pyxis.sbatch": ("+exp=stage2", *_CONTAINER, *_RESOURCES),
    "docker.sh": ("+exp=stage1", *_ONE_NODE, *_CONTAINER, "launch.target=docker"),
    "local.sh": ("+exp=mini/base", "launch.target=local"),
    "trainjob.yaml": ("+exp=stage2", *_CONTAINER, *_RESOURCES, "launch.target=kubernetes"),
    "jobset.yaml": ("+exp=stage2", *_CONTAINER, "launch.target=kubernetes", "launch.kubernetes.kind=jobset"),
    "one.yaml": ("+exp=stage1", *_ONE_NODE, *_CONTAINER, "launch.target=kubernetes", "launch.kubernetes.kind=jobset"),
    "chain.yaml": ("recipe=prolong", "parent=hf:/project/llama", *_CONTAINER, "launch.target=kubernetes"),
}
"""Each file and what is typed after scripts/launch.py."""


def main() -> None:
    """Write them, and the script that submits a chain of jobs."""
    directory, script = Path(sys.argv[1]), str(CONFIG_DIR.parent / "scripts" / "launch.py")
    for name, typed in FILES.items():
        with (directory / name).open("w") as file:
            subprocess.run([sys.executable, script, *typed], cwd=directory, stdout=file, check=True)
    chain = ("recipe=prolong", "parent=hf:llama", "launch.dry_run=false")
    subprocess.run([sys.executable, script, *chain], cwd=directory, stdout=subprocess.DEVNULL, check=True)
    (directory / "runs/sft/launch/chain.sh").rename(directory / "chain.sh")


if __name__ == "__main__":
    main()
