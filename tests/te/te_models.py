"""Full-size models of the recipe, rank by rank without storage: what is built, and what a checkpoint calls it."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.config.load import load
from nemo_prolong.config.schema import KernelBackend, RunConfig
from nemo_prolong.plan.memory import ASSUMED_DEVICE_BYTES, EVERY_LAYER, choose_recompute
from tests.support.te_layouts import build, enter, sharded, te

EXPERIMENTS = [
    "stage1",
    "stage2",
    "sft",
    *(f"ablation/{file.stem}" for file in Path(CONFIG_DIR, "exp/ablation").glob("*.yaml")),
]
LAYOUTS = sorted(file.stem for file in Path(CONFIG_DIR, "parallelism").glob("h100_*.yaml"))
PRECISIONS = ["bf16", "fp8", "fp8_attention"]
NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
PARAMETERS = 8_030_261_248
"""Of Llama-3-8B with its vocabulary of 128,256, as the Hugging Face model counts them."""


@functools.cache
def experiment(name: str, *overrides: str) -> RunConfig:
    """Return an experiment as `scripts/train.py +exp=NAME parent=... OVERRIDES` composes it."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return load(compose("train", [f"+exp={name}", "parent=runs/parent", *overrides]), RunConfig)


def te_model(cfg: RunConfig, rank: int) -> torch.nn.Module:
    """Return the model of one rank of the world that the experiment is planned for."""
    enter(cfg.parallelism, rank, cfg.parallelism.planned_world_size)
    recompute = choose_recompute(cfg, cfg.parallelism.planned_world_size, ASSUMED_DEVICE_BYTES).recompute
    precision = cfg.precision.model_copy(update={"backend": KernelBackend.TE, "recompute": recompute})
    return build(cfg.model, cfg.seq_length, cfg.parallelism, precision)


def torch_model(cfg: RunConfig, rank: int) -> torch.nn.Module:
    """Return the same rank's model of the torch backend."""
    enter(cfg.parallelism, rank, cfg.parallelism.planned_world_size)
    changes = {"backend": KernelBackend.TORCH, "compute": "bf16", "recompute": EVERY_LAYER}
    precision = cfg.precision.model_copy(update=changes)
    return build(cfg.model, cfg.seq_length, cfg.parallelism, precision)


def local_parameters(cfg: RunConfig) -> int:
    """Return the parameters of a rank: matrices are split over TP, norms are not."""
    model, tp = cfg.model, cfg.parallelism.tensor_model_parallel_size
    norms = (2 * model.num_layers + 1) * model.hidden_size
    padding = (model.padded_vocab_size(tp) - model.vocab_size) * model.hidden_size * 2
    return (PARAMETERS - norms + padding) // tp + norms


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_model_of_every_experiment_has_the_layers_of_torch(name, precision):
    cfg = experiment(name, f"precision={precision}")
    last = cfg.parallelism.planned_world_size - 1
    model = te_model(cfg, last)
    parameters = dict(model.named_parameters())
    assert {parameter.device.type for parameter in parameters.values()} == {"meta"}
    assert sum(parameter.numel() for parameter in parameters.values()) == local_parameters(cfg)
    config, recipe = model.config, {"fp8": "tensorwise", "fp8_attention": "delayed"}.get(precision)
    assert (config.fp8, config.fp8_dot_product_attention) == (recipe and "hybrid", precision == "fp8_attention")
    assert recipe is None or config.fp8_recipe == recipe
    reference = torch_model(cfg, last)
    renamed = {rename(key): tuple(value.shape) for key, value in reference.named_parameters()}
    assert {key: tuple(value.shape) for key, value in parameters.items()} == renamed
    assert sharded(model) == sharded(reference)


def rename(key: str) -> str:
    """Return Transformer Engine's name of a parameter of the torch backend."""
    for ours, theirs in NORMS.items():
        key = key.replace(ours, theirs)
    return key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_model_of_every_layout_is_spread_over_all_ranks(layout):
    cfg = experiment("stage2", f"parallelism={layout}")
    tp = cfg.parallelism.tensor_model_parallel_size
    offsets = set()
    for rank in range(tp):
        parts = sharded(te_model(cfg, rank))["decoder.layers.self_attention.linear_qkv.weight"]
        offsets |= {offset[1] for _, offset, _ in parts}
    assert offsets == {rank * 6144 // tp for rank in range(tp)}


def test_every_norm_knows_that_its_tokens_are_split():
    model = te_model(experiment("stage2"), 0)
    # Transformer Engine marks its weights when it initialises them, which is never on the meta device.
    inside = [module.sequence_parallel for module in model.modules() if hasattr(module, "layer_norm_weight")]
    assert inside == [True] * 64 and model.decoder.final_layernorm.weight.sequence_parallel is True


def test_hierarchical_groups_reach_the_attention():
    from nemo_prolong.config.schema import ParallelismConfig
    from tests.support.te_layouts import TINY

    layout = ParallelismConfig(
        context_parallel_size=4, cp_comm_type="a2a+p2p", hierarchical_context_parallel_sizes=[2, 2]
    )
    enter(layout, rank=1, world_size=4)
    attention = build(TINY, 1024, layout, te()).decoder.layers[0].self_attention.core_attention
    assert [torch.distributed.get_process_group_ranks(group) for group in attention.cp_group] == [[0, 1], [1, 3]]
    assert (attention.cp_comm_type, attention.cp_global_ranks) == ("a2a+p2p", [0, 1, 2, 3])
