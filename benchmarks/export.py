"""Export to Hugging Face against ``cp`` of the same bytes, NeMo's ``llm.export_ckpt``, load-all + ``save_pretrained``.

A checkpoint of random bf16 weights is written by four gloo ranks as TP 2 x PP 2, with the context that NeMo reads.
Every side then exports it in a process of its own, which reports its seconds after the imports and how far its memory
rose above what it held then. Sides are interleaved; figures are medians. All exported tensors are compared first.

What NeMo's exporter needs to run here: the CPU answering for CUDA (``engine/patches``), a context written beside the
weights, the norms of its torch layers under the names that its mapping knows from Transformer Engine, and in bf16.

    python benchmarks/export.py [--directory DIR] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_prolong.config.schema import ModelConfig, ParallelismConfig, PrecisionConfig

MODEL = ModelConfig(
    name="synthetic",
    nemo_config="LlamaConfig",
    num_layers=12,
    hidden_size=2048,
    ffn_hidden_size=7168,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=64,
    vocab_size=32000,
    rotary_base=8e6,
)
SHARD_BYTES = 256 * 2**20
LARGEST_TENSOR_BYTES = MODEL.vocab_size * MODEL.hidden_size * 2
CONTEXT_LENGTH = 65_536
LAYOUT = ParallelismConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)


def write_checkpoint(directory: Path) -> None:
    """Write this rank's part of the checkpoint; rank 0 adds NeMo's context."""
    from nemo_prolong.engine.patches import prepare

    prepare()
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    from nemo_prolong.engine.model.nemo_model import build_nemo_config

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(LAYOUT.tensor_model_parallel_size, LAYOUT.pipeline_model_parallel_size)
    config = build_nemo_config(MODEL, CONTEXT_LENGTH, LAYOUT, PrecisionConfig(compute="bf16"))
    config.tensor_model_parallel_size = LAYOUT.tensor_model_parallel_size
    config.pipeline_model_parallel_size = LAYOUT.pipeline_model_parallel_size
    config.perform_initialization = False
    ends = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    model = config.configure_model(None, *ends).bfloat16()
    generator = torch.Generator().manual_seed(torch.distributed.get_rank() % LAYOUT.tensor_model_parallel_size)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    if torch.distributed.get_rank() == 0:
        (directory / "weights").mkdir(parents=True)
        write_context(directory)
    torch.distributed.barrier()
    dist_checkpointing.save(model.sharded_state_dict(prefix="module."), str(directory / "weights"))


def write_context(directory: Path) -> None:
    """Write what NeMo's exporter reads beside the weights: model, configuration, tokenizer."""
    import torch
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.collections.llm.gpt.model.base import local_layer_spec
    from nemo.lightning.io.pl import TrainerContext
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    # It cuts the embedding to the tokens of its tokenizer.
    words = Tokenizer(WordLevel({str(number): number for number in range(MODEL.vocab_size)}, "0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **{"bos_token": "0", "eos_token": "1"})
    tokenizer.save_pretrained(directory / "tokenizer")
    fields = {key: getattr(MODEL, key) for key in ("num_layers", "hidden_size", "ffn_hidden_size", "vocab_size")}
    fields |= {key: getattr(MODEL, key) for key in ("num_attention_heads", "num_query_groups", "kv_channels")}
    config = llm.LlamaConfig(
        **fields, rotary_base=MODEL.rotary_base, seq_length=CONTEXT_LENGTH, make_vocab_size_divisible_by=128,
        share_embeddings_and_output_weights=False, transformer_layer_spec=local_layer_spec, bf16=True,
        params_dtype=torch.bfloat16,
        apply_rope_fusion=False, gradient_accumulation_fusion=False, bias_activation_fusion=False,
        bias_dropout_fusion=False, masked_softmax_fusion=False, persist_layer_norm=False,
    )  # fmt: skip
    model = llm.LlamaModel(config, tokenizer=AutoTokenizer(str(directory / "tokenizer")))
    trainer = nl.Trainer(devices=1, accelerator="cpu", strategy=nl.MegatronStrategy())
    context = TrainerContext(model=model, trainer=trainer, extra={})
    context.io_dump(directory / "context", yaml_attrs=["model"])


def our_side(checkpoint: Path, output: Path) -> Callable[[], object]:
    """Return our writer; what a run's manifest adds to an export is not part of the comparison."""
    import torch

    from nemo_prolong.export.source import ExportSource
    from nemo_prolong.export.writer import write_weights
    from nemo_prolong.weights.checkpoint_reader import CheckpointReader

    torch.set_num_threads(1)
    source = ExportSource(
        checkpoint, checkpoint, 0, None, MODEL, checkpoint / "tokenizer", CheckpointReader(checkpoint)
    )
    output.mkdir()
    return lambda: write_weights(source, output, torch.bfloat16, SHARD_BYTES)


def load_all_side(checkpoint: Path, output: Path) -> Callable[[], object]:
    """Return what is written by hand as a rule: all tensors into one dictionary, and ``save_pretrained``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nemo_prolong.weights.checkpoint_reader import CheckpointReader
    from nemo_prolong.weights.names import pieces

    def run() -> None:
        reader = CheckpointReader(checkpoint)
        stacks = {name: reader.read(name) for name in reader.names()}
        state = {}
        for piece in pieces(MODEL):
            fused = stacks[piece.rule.megatron] if piece.layer is None else stacks[piece.rule.megatron][piece.layer]
            ranges = list(piece.rule.row_ranges(MODEL))
            for part, name in enumerate(piece.names):
                state[name] = torch.cat([fused[r.start : r.end] for r in ranges if r.part == part])
        with torch.device("meta"):
            model = LlamaForCausalLM(hugging_face_config(LlamaConfig))
        model.load_state_dict(state, assign=True)
        model.save_pretrained(output, max_shard_size=SHARD_BYTES)

    return run


def hugging_face_config(kind: type) -> Any:
    """Return the model in the words of transformers."""
    return kind(
        vocab_size=MODEL.vocab_size, hidden_size=MODEL.hidden_size, intermediate_size=MODEL.ffn_hidden_size,
        num_hidden_layers=MODEL.num_layers, num_attention_heads=MODEL.num_attention_heads,
        num_key_value_heads=MODEL.num_query_groups, head_dim=MODEL.kv_channels, rope_theta=MODEL.rotary_base,
        max_position_embeddings=CONTEXT_LENGTH,
    )  # fmt: skip


def nemo_side(checkpoint: Path, output: Path) -> Callable[[], object]:
    """Return NeMo's own export, with the names of its torch layers' norms put where its mapping looks for them."""
    from nemo_prolong.engine.patches import prepare

    prepare()
    from nemo.collections import llm
    from nemo.lightning.io import state

    names = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    apply_transforms = state.apply_transforms

    def with_torch_names(source: Any, target: Any, mapping: dict[str, str], *args: Any, **kwargs: Any) -> Any:
        for theirs, ours in names.items():
            mapping[f"decoder.layers.*.{ours}"] = mapping.pop(f"decoder.layers.*.{theirs}")
        # The torch norms are made in fp32 whatever the configuration says.
        return apply_transforms(source.bfloat16(), target, mapping, *args, **kwargs)

    from nemo.lightning import io

    io.apply_transforms = with_torch_names
    return lambda: llm.export_ckpt(checkpoint, "hf", output)


def copy_side(checkpoint: Path, output: Path) -> Callable[[], object]:
    """Return ``cp`` of the checkpoint's weights and a wait for the disk, as ours waits for it."""

    def run() -> None:
        subprocess.run(["/bin/cp", "-r", str(checkpoint / "weights"), str(output)], check=True)
        subprocess.run(["/bin/sync", *map(str, output.iterdir())], check=True)

    return run


def unsynced_copy_side(checkpoint: Path, output: Path) -> Callable[[], object]:
    """Return ``cp`` alone, which ends when the bytes are in the page cache."""
    return lambda: subprocess.run(["/bin/cp", "-r", str(checkpoint / "weights"), str(output)], check=True)


SIDES = {
    "ours": our_side,
    "cp and sync": copy_side,
    "cp": unsynced_copy_side,
    "load-all": load_all_side,
    "nemo": nemo_side,
}


def memory(field: str) -> int:
    """Return a memory figure of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def run_side(name: str, checkpoint: Path, output: Path) -> None:
    """Export once in this process and print seconds and peak memory."""
    side = SIDES[name](checkpoint, output)
    Path("/proc/self/clear_refs").write_text("5")
    before, started = memory("VmRSS:"), time.perf_counter()
    side()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_bytes": memory("VmHWM:") - before}))


def measure(checkpoint: Path, directory: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Run every side in turn; the first round warms up and is where the results are compared."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for number in range(rounds + 1):
        for name in SIDES:
            output = directory / name.replace(" ", "-")
            shutil.rmtree(output, ignore_errors=True)
            os.sync()
            command = [
                sys.executable,
                __file__,
                "--side",
                name,
                "--directory",
                str(checkpoint),
                "--output",
                str(output),
            ]
            found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
            if found.returncode:
                sys.exit(f"{name} failed:\n{found.stderr[-4000:]}")
            if number:
                results[name].append(json.loads(found.stdout.splitlines()[-1]))
        if not number:
            compare(directory / "ours", [directory / name for name in ("load-all", "nemo")])
    return results


def compare(ours: Path, others: list[Path]) -> None:
    """Check that all exports hold the same bits."""
    import torch
    from safetensors.torch import load_file

    def tensors(path: Path) -> dict[str, torch.Tensor]:
        return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}

    expected = tensors(ours)
    for path in others:
        found = tensors(path)
        assert found.keys() == expected.keys(), path
        assert all(torch.equal(found[name], expected[name]) for name in expected), path


def rows_of(results: dict[str, list[dict[str, float]]], num_bytes: int) -> list[dict[str, Any]]:
    """Return the rows of the result; speeds count the bytes of the checkpoint's tensors."""
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()
    }
    rate = {name: num_bytes / values["seconds"] / 1e9 for name, values in medians.items()}
    peak = {name: values["peak_bytes"] / 2**20 for name, values in medians.items()}
    allowed = (LARGEST_TENSOR_BYTES + SHARD_BYTES) / 2**20
    rows = [record(f"speed against {name}", rate["ours"], rate[name], "GB/s", 0.8) for name in ("cp and sync", "cp")]
    for name in ("nemo", "load-all"):
        rows.append(record(f"speed against {name}", rate["ours"], rate[name], "GB/s", 1.0))
        rows.append(record(f"peak memory against {name}", peak["ours"], peak[name], "MiB", 1.0, at_most=True))
    return [*rows, record("peak memory, largest tensor and a shard", peak["ours"], allowed, "MiB", 1.0, at_most=True)]


def record(bar: str, ours: float, peer: float, unit: str, bound: float, *, at_most: bool = False) -> dict[str, Any]:
    """Return one row of the result; the bound is on the ratio of ours to the peer's."""
    ratio = ours / peer
    met = ratio <= bound if at_most else ratio >= bound
    figures = {"ours": ours, "peer": peer, "ratio": ratio}
    return {"bar": bar, "unit": unit, "bound": bound, "met": met} | {k: float(f"{v:.4g}") for k, v in figures.items()}


def versions() -> dict[str, str]:
    """Return what the figures depend on."""
    from nemo_prolong.records.stage_manifest import installed_versions

    return {**installed_versions(), "python": platform.python_version()}


def main() -> None:
    """Write the checkpoint, measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where to work (8 GB); by default a temporary directory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, arguments.directory, arguments.output)
    elif "RANK" in os.environ:
        write_checkpoint(arguments.directory)
    else:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            report(measure_in(Path(directory), arguments.rounds), arguments.json)


def measure_in(directory: Path, rounds: int) -> list[dict[str, Any]]:
    """Write the checkpoint into a directory and measure every side there."""
    checkpoint = directory / "checkpoint"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, __file__, "--directory", str(checkpoint)], check=True, env=environment)
    num_bytes = sum(path.stat().st_size for path in (checkpoint / "weights").glob("*.distcp"))
    return rows_of(measure(checkpoint, directory, rounds), num_bytes)


def report(rows: list[dict[str, Any]], path: Path | None) -> None:
    """Print a table and write the result file."""
    for row in rows:
        print(
            f"{row['bar']:50} {row['ours']:>10.4g} {row['peer']:>10.4g} {row['unit']:6} {row['ratio']:.3f} {row['met']}"
        )
    if path:
        machine = {"processor": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()}
        path.write_text(json.dumps({"machine": machine, "versions": versions(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
