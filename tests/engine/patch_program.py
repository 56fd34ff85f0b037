"""Train and resume without each patch in turn; ``python patch_program.py DATA OUTPUT`` writes {patch: exit status}.

NeMo is imported once, then every case runs in a fork of this process. The case "none" leaves nothing out.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from nemo_prolong.config.schema import RunConfig
from nemo_prolong.engine import train_stage
from nemo_prolong.engine.patches import PATCHES, prepare
from nemo_prolong.records.run_directory import RunDirectory
from tests.support.tiny import tiny_config

HANG_SECONDS = 5000.0
"""More than a timeout that any library chooses."""


def check(data: Path, runs: Path, without: str | None) -> None:
    """Do all that the patches are for."""
    prepare(without=without)
    step_on_a_nan(gated=without != "optimizer_step")
    build_a_head_with_fused_gradients()
    tie_an_embedding_between_stages()
    groups = watch_groups()
    train_and_resume(data, runs)
    had_hierarchical_groups, timeouts = groups[-1]
    assert had_hierarchical_groups, "no hierarchical groups were formed"
    # The world group's is NeMo's doing, and it is one of them.
    assert timeouts == {HANG_SECONDS + 120.0}, f"groups time out after {timeouts} s"
    assert not multiprocessing.active_children(), "a save left a process behind"


def step_on_a_nan(gated: bool) -> None:
    """Take a step of a Megatron optimizer with a gradient that is no number, and look at the weight."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import FP32Optimizer

    from nemo_prolong.engine.inference import start_single_process
    from nemo_prolong.engine.patches.optimizer_step import gate_step

    start_single_process()
    weight = torch.nn.Parameter(torch.ones(4))
    weight.main_grad = torch.full((4,), torch.nan)
    config = OptimizerConfig(optimizer="sgd", lr=0.1, clip_grad=1.0)
    optimizer = FP32Optimizer(torch.optim.SGD([weight], lr=0.1), config, lambda optimizer: None)
    optimizer.grad_stats_parallel_group = torch.distributed.group.WORLD
    norms = []
    if gated:
        gate_step(optimizer, lambda norm: norms.append(norm) or norm == norm)
    stepped, _, _ = optimizer.step()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    assert not stepped and len(norms) == 1 and bool((weight == 1).all()), (stepped, norms, weight)


def build_a_head_with_fused_gradients() -> None:
    """Build an LM head as beside layers of Transformer Engine, which add gradients to their buffers themselves."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_prolong.engine.inference import start_single_process

    start_single_process()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=True,
    )
    ColumnParallelLinear(8, 16, config=config, init_method=torch.nn.init.zeros_, bias=False)
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def tie_an_embedding_between_stages() -> None:
    """Build the first of two pipeline stages, whose embedding is the head of the last; its group is this process."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_prolong.engine.inference import start_single_process

    start_single_process()
    config = TransformerConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=1,
        use_cpu_initialization=True,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
    )
    stage = GPTModel(
        config, get_gpt_layer_local_spec(), 16, 8, post_process=False, share_embeddings_and_output_weights=True
    )
    assert stage.shared_embedding_or_output_weight().device.type == "cpu"
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def watch_groups() -> list[tuple[bool, set[float]]]:
    """Return what will hold, whenever Megatron's groups are dissolved, whether hierarchical ones were among them, and
    the timeouts in seconds of all groups, that of the world too.
    """
    import torch
    from megatron.core import parallel_state

    dissolve, seen = parallel_state.destroy_model_parallel, []

    def watched() -> None:
        # NeMo dissolves them before it forms them too.
        if parallel_state.is_initialized():
            hierarchical = parallel_state.get_hierarchical_context_parallel_groups(check_initialized=False) is not None
            # Megatron hands no timeout to some groups of experts, and there are no experts.
            backends = [
                group._get_backend(torch.device("cpu"))
                for group in torch.distributed.distributed_c10d._world.pg_map
                if not group.group_desc.startswith("EXPERT")
            ]
            assert len(backends) > 5
            seen.append((hierarchical, {backend.options._timeout.total_seconds() for backend in backends}))
        dissolve()

    parallel_state.destroy_model_parallel = watched
    return seen


def train_and_resume(data: Path, runs: Path) -> None:
    """Train two steps with recomputation, save, and resume for two more."""
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    cfg = tiny_config(
        data,
        runs,
        train={"train_iters": 4},
        checkpoint={"save_interval_steps": 2},
        precision={"compute": "fp32", "recompute": recompute},
        faults={"hang_seconds": HANG_SECONDS},
    )
    cfg = with_a_hierarchy_of_one_rank(cfg)
    resumed = cfg.model_copy(update={"name": "resumed"})
    for run in (cfg, resumed):
        Path(run.run_dir).mkdir(parents=True)
    train_stage(cfg, RunDirectory(cfg.run_dir), None, None)
    train_stage(resumed, RunDirectory(resumed.run_dir), Path(cfg.run_dir) / "checkpoints" / "step_00000002", None)


def with_a_hierarchy_of_one_rank(cfg: RunConfig) -> RunConfig:
    """Return a configuration that the rules would refuse, because there is nothing to split."""
    sizes = {"hierarchical_context_parallel_sizes": [1, 1]}
    return cfg.model_copy(update={"parallelism": cfg.parallelism.model_copy(update=sizes)})


def status_of_fork(*case: Any) -> int:
    """Return the exit status of one case."""
    child = os.fork()
    if child == 0:
        log = os.open(case[1].with_suffix(".log"), os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        try:
            check(*case)
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    _, wait_status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(wait_status)


def main() -> None:
    """Run every case."""
    # Before the forks, without any patch.
    from nemo.collections import llm  # noqa: F401

    data, output = Path(sys.argv[1]), Path(sys.argv[2])
    names = [None, *(patch.name for patch in PATCHES)]
    statuses = {str(name).lower(): status_of_fork(data, output.with_name(f"runs_{name}"), name) for name in names}
    output.write_text(json.dumps(statuses))


if __name__ == "__main__":
    main()
