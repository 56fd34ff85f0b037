"""What is mutated, and which tests are to notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """Some files and the tests of them that run in this process, without several ranks.

    Attributes:
        name: For the command line.
        files: Patterns of the files that are mutated, from the package.
        tests: Files and directories of tests, from ``tests``.
    """

    name: str
    files: tuple[str, ...]
    tests: tuple[str, ...]

    def sources(self, root: Path) -> list[str]:
        """Return the files, as paths from the root of the repository."""
        package = root / "nemo_prolong"
        found = {file for pattern in self.files for file in package.glob(pattern)}
        return sorted(str(file.relative_to(root)) for file in found)


TARGETS = (
    Target("order", ("data/order.py", "data/dataset.py"), ("data/test_order.py", "data/test_dataset.py")),
    Target("packing", ("data/packing/*.py",), ("data/packing",)),
    Target("ops", ("ops/**/*.py",), ("ops",)),
    Target("callbacks", ("callbacks/*.py",), ("callbacks", "engine/test_spikes.py")),
    Target(
        "rules",
        ("config/rules/*.py",),
        # Not test_scripts.py, whose scripts are programs of their own.
        (
            *(
                f"config/test_{name}.py"
                for name in (
                    "attention_kernels",
                    "boundaries",
                    "constraints",
                    "defaults",
                    "incomplete",
                    "overlap_rules",
                    "precision_rules",
                    "prepare_rules",
                    "recipe",
                    "rules",
                )
            ),
            "launch/test_targets.py",
            "ops/test_row_shapes.py",
        ),
    ),
    Target(
        "ranks",
        (
            "distributed/rank_environment.py",
            "distributed/slurm_step.py",
            "distributed/launched.py",
            "distributed/devices.py",
        ),
        ("distributed/test_launched.py", "distributed/test_devices.py"),
    ),
    Target(
        "records",
        ("records/**/*.py",),
        (
            "records",
            "report",
            "stages/test_manifest.py",
            "engine/test_checkpoint_damage.py",
            "data/test_data_manifest.py",
            "export/test_export_manifest.py",
        ),
    ),
    Target(
        "weights",
        ("weights/*.py", "export/hf_config.py"),
        (
            "weights",
            "export/test_names.py",
            "export/test_hf_directory.py",
            "export/test_hf_directory_config.py",
            "export/test_writer.py",
            "export/test_direct_reader.py",
            "export/test_hf_config.py",
            "export/test_non_finite.py",
        ),
    ),
)
