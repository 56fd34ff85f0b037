"""Memory and time of saving and loading the state of a model on four ranks, by Megatron's ways and by ours.

The model has 106M parameters in bf16 and 1.5 GB of state, of which 1.3 GB are the optimizer's. Its four ranks are
processes of this machine on gloo, at DP 4. A save goes through the engine's own save path, with the sharding of the
optimizer as the only difference. The rounds are interleaved, and the figures are medians over the rounds of the rank
that is worst.

A load fills the optimizer of each rank from the last checkpoint of its kind: at the layout that wrote it, and at TP 2
with DP 2. Megatron's reader reads what was gathered. Ours reads what was not. Afterwards the states of both are the
same to the last bit, or the benchmark fails.

Memory is the peak of a rank's resident memory above what it was before. Processes that write share what they write
with the rank that started them. ``training waits`` is the time until the shards are handed to the process that writes,
which is when training goes on with ``checkpoint.async_save``. ``writing`` is the time from there to the end of the
slowest rank's shard.

    python benchmarks/saving.py [--json FILE] [--rounds N]

Needs 12 GB of memory and 8 GB of disk in the temporary directory, and takes about ten minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_prolong.config.schema import ModelConfig, ParallelismConfig, PrecisionConfig

RANKS = 4
MODEL = ModelConfig(
    name="eight layers",
    nemo_config="LlamaConfig",
    num_layers=8,
    hidden_size=768,
    ffn_hidden_size=2048,
    num_attention_heads=12,
    num_query_groups=4,
    kv_channels=64,
    vocab_size=32_000,
    rotary_base=10_000.0,
)
OURS = "ours"
ON_ALL = "gathered on every rank"
KINDS: dict[str, dict[str, Any]] = {
    ON_ALL: {"distrib_optim_sharding_type": "fully_reshardable"},
    "gathered on one rank": {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
    },
    "dp_reshardable": {"distrib_optim_sharding_type": "dp_reshardable"},
    OURS: {"distrib_optim_sharding_type": "fully_sharded_model_space"},
}
"""Ways to save, with Megatron's words for them. The first is what this software did before."""

FIGURES = ("training_waits_seconds", "writing_seconds", "peak_bytes")


class Rank:
    """One rank with a model and an optimizer whose state is made up.

    Args:
        directory: Where checkpoints are.
        tensor_parallel_size: TP; the rest of the ranks is DP.
    """

    def __init__(self, directory: Path, tensor_parallel_size: int) -> None:
        import torch
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        from nemo_prolong.engine.checkpoint.optimizer_state import initialize_moments
        from nemo_prolong.engine.model.nemo_model import build_nemo_config

        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel_size)
        get_cuda_rng_tracker().set_states({"model-parallel-rng": torch.get_rng_state()})
        parallelism = ParallelismConfig(tensor_model_parallel_size=tensor_parallel_size)
        model = build_nemo_config(MODEL, 64, parallelism, PrecisionConfig(compute="bf16"))
        module = model.configure_model(tokenizer=None).bfloat16()
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, check_for_nan_in_grad=False
        )
        self.model = DistributedDataParallel(module.config, ddp, module)
        settings = OptimizerConfig(
            optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
        )
        self.optimizer = get_megatron_optimizer(settings, [self.model])
        initialize_moments(self.optimizer)
        self.directory = directory
        self.rank = torch.distributed.get_rank()

    def state(self, metadata: dict[str, Any], *, is_loading: bool = False) -> Any:
        """Return Megatron's description of the optimizer."""
        return self.optimizer.sharded_state_dict(
            self.model.sharded_state_dict(), is_loading=is_loading, metadata=metadata
        )

    def tensors(self) -> list[Any]:
        """Return what the optimizer keeps on this rank: fp32 weights and moments."""
        found = []
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            for group in part.optimizer.param_groups:
                for weight in group["params"]:
                    found += [weight, *(part.optimizer.state[weight][name] for name in ("exp_avg", "exp_avg_sq"))]
        return found

    def make_up_state(self) -> None:
        """Give every element of the optimizer a value of its own."""
        import torch

        generator = torch.Generator().manual_seed(self.rank)
        with torch.no_grad():
            for tensor in self.tensors():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))

    def forget(self) -> None:
        """Overwrite what the optimizer keeps."""
        import torch

        with torch.no_grad():
            for tensor in self.tensors():
                tensor.fill_(float("nan"))

    def checkpoint(self, kind: str) -> Path:
        """Return where checkpoints of a kind are."""
        return self.directory / kind.replace(" ", "_")

    def save(self, kind: str) -> dict[str, float]:
        """Save as training does, and return the figures of this rank."""
        import torch

        from nemo_prolong.engine.checkpoint.megatron_io import StageCheckpointIO

        path = self.checkpoint(kind)
        if self.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
            (path / "weights").mkdir(parents=True)
        torch.distributed.barrier()
        before, started = start_of_peak(), time.perf_counter()
        content = {"sharded_state_dict": self.model.sharded_state_dict(), "optimizer": [self.state(KINDS[kind])]}
        # A rank that did not gather has nothing to say.
        content["optimizer"] = [state for state in content["optimizer"] if state is not None]
        io = StageCheckpointIO(parallel_load=False)
        io._consistent = True
        io.save_checkpoint(content, path, {"content_metadata": KINDS[kind]})
        planned = io.take_planned()
        wait = planned.write_shards_in_background()
        waited = time.perf_counter() - started
        wait()
        written = time.perf_counter() - started
        peak = peak_since(before)
        results: list[Any] = [None] * RANKS
        torch.distributed.all_gather_object(results, planned.shard_results())
        if self.rank == 0:
            planned.write_metadata(results)
            planned.write_common()
            planned.write_format()
        torch.distributed.barrier()
        return {"training_waits_seconds": waited, "writing_seconds": written - waited, "peak_bytes": peak}

    def load(self, kind: str) -> dict[str, float]:
        """Load the state of the optimizer, and return the figures of this rank."""
        import torch

        self.forget()
        torch.distributed.barrier()
        before, started = start_of_peak(), time.perf_counter()
        if kind == OURS:
            from nemo_prolong.engine.checkpoint.optimizer_state import fill_shards

            fill_shards(self.state(KINDS[OURS]), self.checkpoint(kind))
        else:
            from megatron.core import dist_checkpointing

            wanted = {"optimizer": [self.state(KINDS[kind], is_loading=True)]}
            loaded = dist_checkpointing.load(wanted, str(self.checkpoint(kind) / "weights"))
            self.optimizer.load_state_dict(loaded["optimizer"][0])
        return {"seconds": time.perf_counter() - started, "peak_bytes": peak_since(before)}

    def hash(self) -> int:
        """Return a number of the bits of what the optimizer keeps on this rank."""
        import torch

        return sum(
            (number + 1) * int(tensor.detach().view(torch.int32).sum(dtype=torch.int64))
            for number, tensor in enumerate(self.tensors())
        )


def start_of_peak() -> int:
    """Begin to measure the peak, and return what is resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def peak_since(before: int) -> int:
    """Return how much the peak is above what was resident before."""
    peak = status_bytes("VmHWM") - before
    gc.collect()
    return peak


def status_bytes(field: str) -> int:
    """Return a figure of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def worst(figures: dict[str, float]) -> dict[str, float]:
    """Return the largest of all ranks, of each figure."""
    import torch

    everyone: list[Any] = [None] * RANKS
    torch.distributed.all_gather_object(everyone, figures)
    return {name: max(rank[name] for rank in everyone) for name in figures}


def saves(directory: Path, rounds: int) -> dict[str, Any]:
    """Save and load at DP 4, and return the figures of every round by kind."""
    import torch

    rank = Rank(directory, tensor_parallel_size=1)
    rank.make_up_state()
    expected = rank.hash()
    found: dict[str, Any] = {"saves": {kind: [] for kind in KINDS}, "loads": {ON_ALL: [], OURS: []}}
    for number in range(rounds + 1):
        for kind in KINDS:
            figures = worst(rank.save(kind))
            # The first round warms up.
            found["saves"][kind] += [figures] if number else []
            note(rank, f"round {number}: saved, {kind}: {figures}")
    loads(rank, rounds, found["loads"], [expected] * 2)
    found["state_bytes"] = sum(file.stat().st_size for file in (rank.checkpoint(OURS) / "weights").iterdir())
    torch.distributed.barrier()
    return found


def loads(rank: Rank, rounds: int, found: dict[str, list[Any]], hashes: list[int]) -> None:
    """Load in rounds, and compare the bits of what was loaded; ``hashes`` are those that are known."""
    for number in range(rounds + 1):
        for kind in found:
            figures = worst(rank.load(kind))
            hashes.append(rank.hash())
            found[kind] += [figures] if number else []
            note(rank, f"round {number}: loaded, {kind}: {figures}")
    assert len(set(hashes)) == 1, "what was loaded differs"


def other_layout(directory: Path, rounds: int) -> dict[str, Any]:
    """Load at TP 2 and DP 2, and return the figures of every round by kind."""
    found: dict[str, Any] = {ON_ALL: [], OURS: []}
    loads(Rank(directory, tensor_parallel_size=2), rounds, found, [])
    return found


def note(rank: Rank, text: str) -> None:
    """Print on the first rank."""
    if rank.rank == 0:
        print(text, file=sys.stderr, flush=True)


def run_ranks(work: Callable[[Path, int], dict[str, Any]], directory: Path, rounds: int) -> dict[str, Any]:
    """Run a function as four forks of this process and return what the first returned."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    result = directory / "result.json"
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            found = work(directory, rounds)
            if rank == 0:
                result.write_text(json.dumps(found))
            # An orderly exit would delete the directory of all ranks.
            os._exit(0)
        children.append(child)
    if any(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children):
        raise SystemExit("a rank failed")
    found = json.loads(result.read_text())
    assert isinstance(found, dict)
    return found


def median(figures: list[dict[str, float]], name: str) -> float:
    """Return the median of a figure over the rounds."""
    return statistics.median(round_[name] for round_ in figures)


def rows(saved: dict[str, Any], elsewhere: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records."""
    found = []
    for kind in KINDS:
        if kind != OURS:
            ours, peer = saved["saves"][OURS], saved["saves"][kind]
            for name in FIGURES:
                found.append(row(f"save, {name.rsplit('_', 1)[0].replace('_', ' ')}, {kind}", name, ours, peer))
    ours = saved["saves"][OURS]
    waits, writing = median(ours, "training_waits_seconds"), median(ours, "writing_seconds")
    found.append(
        {
            "bar": "save, training waits, against writing the own shard",
            "ours": round(waits, 3),
            "peer": round(writing, 3),
            "unit": "s",
            "ratio": round(writing / waits, 3),
            "bound": 1.0,
            "met": waits <= writing,
        }
    )
    for layout, loaded in (("the same layout", saved["loads"]), ("TP 2, DP 2", elsewhere)):
        for name in ("seconds", "peak_bytes"):
            bar = f"load at {layout}, {name.split('_')[0]}, {ON_ALL}"
            found.append(row(bar, name, loaded[OURS], loaded[ON_ALL]))
    return found


def row(bar: str, name: str, ours: list[dict[str, float]], peer: list[dict[str, float]]) -> dict[str, Any]:
    """Return the record of a figure, whose ratio is above 1 where ours is better."""
    scale, unit = (1e6, "MB") if name.endswith("bytes") else (1.0, "s")
    mine, theirs = (median(figures, name) / scale for figures in (ours, peer))
    ratio = theirs / max(mine, 1e-3)
    return {
        "bar": bar,
        "ours": round(mine, 3),
        "peer": round(theirs, 3),
        "unit": unit,
        "ratio": round(ratio, 3),
        "bound": 0.9,
        "met": ratio >= 0.9,
    }


def commit() -> str:
    """Return the commit that is measured."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the records")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count; one more warms up")
    arguments = parser.parse_args()
    # So that the C library returns every large tensor at once.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
        os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606 - this program again
    from nemo_prolong.engine.patches import prepare

    prepare()
    import nemo_prolong.engine.training.stage_training  # noqa: F401 - imports NeMo, before the forks

    with tempfile.TemporaryDirectory() as directory:
        saved = run_ranks(saves, Path(directory), arguments.rounds)
        elsewhere = run_ranks(other_layout, Path(directory), arguments.rounds)
    records = rows(saved, elsewhere)
    print(f"state: {saved['state_bytes'] / 1e9:.2f} GB on {RANKS} ranks")
    for record in records:
        print("{bar}: ours {ours} {unit}, {peer} {unit}, ratio {ratio} (bound met: {met})".format(**record))
    if arguments.json:
        machine = {"cpus": os.cpu_count(), "platform": platform.platform()}
        versions = {"python": platform.python_version(), "commit": commit(), "state_bytes": saved["state_bytes"]}
        arguments.json.write_text(
            json.dumps({"machine": machine, "versions": versions, "rows": records}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
