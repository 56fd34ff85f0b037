"""Rules between formats, kernels, recomputation and offload: each is broken once."""

from __future__ import annotations

import pytest

from nemo_prolong.config.rules import check
from nemo_prolong.errors import ConfigError

PP = "parallelism.pipeline_model_parallel_size"
UNIFORM = [f"precision.recompute.recompute_{key}" for key in ("granularity=full", "method=uniform")]
ONE_LAYER = ["precision.recompute.recompute_num_layers=1"]

MESSAGES = [
    (
        "stage2",
        ["precision=fp8_attention", "precision.fp8_recipe=tensorwise"],
        "precision.fp8_recipe=tensorwise: Hopper's FP8 attention kernel exists for delayed scaling only (tensorwise "
        "needs Blackwell). Set precision.fp8_recipe=delayed, or precision=fp8 (FP8 matrix "
        "products, BF16 attention).",
    ),
    (
        "mini/base",
        ["precision=fp8_attention"],
        "model.kv_channels=32: the FP8 attention kernel of Hopper trains heads of 128 dimensions only. "
        "Set precision=fp8 (FP8 matrix products, BF16 attention).",
    ),
    (
        "stage2",
        ["precision=fp8_attention", "train.deterministic=true"],
        "train.deterministic=true: FP8 attention has no deterministic backward pass before Transformer Engine 2.13 and "
        "cuDNN 9.19. Set train.deterministic=false.\n"
        "train.deterministic=true (1.0 TiB of workspace on each GPU): on Hopper cuDNN's deterministic backward pass "
        "over documents keeps 2 bytes for every query and key of a rank's row, in each head and in each of at least 32 "
        "document slots. Set train.deterministic=false, or precision.attention=flash, whose backward pass repeats in "
        "linear memory.",
    ),
    (
        "mini/stage2",
        ["precision=fp8_attention", "model.kv_channels=128", "seq_length=8000"],
        "seq_length=8000: FP8 attention needs a multiple of 128 tokens on each CP rank. Set seq_length=7936.",
    ),
    (
        "stage2",
        ["parallelism=h100_64_tp4_cp16", "parallelism.cp_comm_type=a2a+p2p", "precision.backend=torch"],
        "parallelism.hierarchical_context_parallel_sizes=null: a2a+p2p needs two sizes, [a2a, p2p], whose product is "
        "CP = 16. Set parallelism.cp_comm_type=p2p, or parallelism.hierarchical_context_parallel_sizes=[2,8].\n"
        "parallelism.cp_comm_type=a2a+p2p: the exchanges of the torch backend are p2p, all_gather and a2a. "
        "Set parallelism.cp_comm_type=p2p.",
    ),
    (
        "stage2",
        [
            "parallelism=h100_64_tp4_cp16",
            "parallelism.cp_comm_type=a2a+p2p",
            "parallelism.hierarchical_context_parallel_sizes=[4,4]",
        ],
        "parallelism.cp_comm_type=a2a+p2p: a2a shares the num_attention_heads / TP = 8 heads and num_query_groups / "
        "TP = 2 groups of a rank over 4 ranks. Set parallelism.cp_comm_type=p2p, or "
        "parallelism.hierarchical_context_parallel_sizes=[2,8].\n"
        "parallelism.cp_comm_type=a2a+p2p: Transformer Engine before 2.19 refuses a2a+p2p for rows with document "
        "masks. Set parallelism.cp_comm_type=p2p.",
    ),
    (
        "stage2",
        [
            "parallelism=h100_64_tp4_cp16",
            "parallelism.cp_comm_type=a2a+p2p",
            "parallelism.hierarchical_context_parallel_sizes=[2,4]",
            "precision.backend=torch",
        ],
        "parallelism.hierarchical_context_parallel_sizes=[2,4]: a2a+p2p needs two sizes, [a2a, p2p], whose product is "
        "CP = 16. Set parallelism.cp_comm_type=p2p, or parallelism.hierarchical_context_parallel_sizes=[2,8].\n"
        "parallelism.cp_comm_type=a2a+p2p: the exchanges of the torch backend are p2p, all_gather and a2a. "
        "Set parallelism.cp_comm_type=p2p.",
    ),
    (
        "stage2",
        ["parallelism.hierarchical_context_parallel_sizes=[2,4]"],
        "parallelism.hierarchical_context_parallel_sizes=[2,4]: belongs to cp_comm_type=a2a+p2p, and it is p2p. "
        "Set parallelism.hierarchical_context_parallel_sizes=null.",
    ),
    (
        "mini/base",
        ["precision=fp8", "precision.backend=torch"],
        "precision.compute=fp8 precision.backend=torch: the torch backend has no FP8 kernels; FP8 needs Transformer "
        "Engine. Set precision.backend=te, or precision=bf16.",
    ),
    (
        "mini/base",
        ["precision=fp8", "model.hidden_size=200"],
        "model.hidden_size=200: FP8 matrix products need every rank's share in multiples of 16, and 200 / 1 is not. "
        "Set model.hidden_size=192, or precision=bf16.",
    ),
    (
        "mini/base",
        ["precision.recompute.recompute_granularity=full", "precision.recompute.recompute_num_layers=1"],
        "precision.recompute.recompute_method=null: full needs one. Set precision.recompute.recompute_method=uniform.",
    ),
    (
        "mini/base",
        ["model.num_layers=4", f"{PP}=2", *UNIFORM, "precision.recompute.recompute_num_layers=4"],
        "precision.recompute.recompute_num_layers=4: full needs 1 to 2 layers (those of a pipeline stage). "
        "Set precision.recompute.recompute_num_layers=2.",
    ),
    (
        "mini/base",
        [
            "precision.recompute.recompute_granularity=selective",
            "precision.recompute.recompute_num_layers=1",
            "precision.recompute.recompute_modules=[mlp]",
        ],
        "precision.recompute.recompute_num_layers=1: belongs to full, and recompute_granularity is selective. "
        "Set precision.recompute.recompute_num_layers=null.",
    ),
    (
        "mini/base",
        ["precision.recompute.recompute_method=block"],
        "precision.recompute.recompute_method=block: belongs to full, and recompute_granularity is null. "
        "Set precision.recompute.recompute_method=null.",
    ),
    (
        "mini/base",
        ["model.num_layers=4", *UNIFORM, "precision.recompute.recompute_num_layers=3"],
        "precision.recompute.recompute_num_layers=3: uniform needs a divisor of the 4 layers of a stage: Megatron "
        "counts past the last one. Set precision.recompute.recompute_num_layers=2.",
    ),
    (
        "mini/base",
        ["precision.recompute.recompute_granularity=selective"],
        "precision.recompute.recompute_modules=null: selective needs the modules to compute again; Megatron's default, "
        "core_attn, saves nothing here. Set precision.recompute.recompute_modules=[mlp].",
    ),
    (
        "mini/base",
        [
            "precision.recompute.recompute_granularity=selective",
            "precision.recompute.recompute_modules=[core_attn,mlp]",
        ],
        "precision.recompute.recompute_modules=[core_attn,mlp]: attention over documents keeps no scores, so core_attn "
        "would cost time and save nothing. Set precision.recompute.recompute_modules=[mlp].",
    ),
    (
        "mini/base",
        [
            "precision.compute=bf16",
            "precision.recompute.recompute_granularity=selective",
            "precision.recompute.recompute_modules=[layernorm]",
        ],
        "precision.recompute.recompute_modules=[layernorm]: layernorm has no use: Transformer Engine's layers hold "
        "norm and matrix in one, and without Transformer Engine Megatron cannot recompute a norm. "
        "Set precision.recompute.recompute_modules=[mlp].",
    ),
    (
        "mini/base",
        ["precision.recompute.recompute_modules=[mlp]"],
        "precision.recompute.recompute_modules=[mlp]: belongs to selective, and recompute_granularity is null. "
        "Set precision.recompute.recompute_modules=null.",
    ),
    (
        "mini/base",
        ["precision.recompute.distribute_saved_activations=true"],
        "precision.recompute.distribute_saved_activations=true: belongs to full, and recompute_granularity is null. "
        "Set precision.recompute.distribute_saved_activations=false.",
    ),
    (
        "mini/base",
        [*UNIFORM, *ONE_LAYER, "precision.recompute.distribute_saved_activations=true"],
        "precision.recompute.distribute_saved_activations=true: splits them over the TP ranks, and TP is 1. "
        "Set precision.recompute.distribute_saved_activations=false.",
    ),
    (
        "stage2",
        [*UNIFORM, *ONE_LAYER, "precision.recompute.distribute_saved_activations=true"],
        "precision.recompute.distribute_saved_activations=true: sequence parallel splits them already, and Megatron "
        "refuses both. Set precision.recompute.distribute_saved_activations=false.",
    ),
    (
        "stage2",
        ["precision.recompute.recompute_num_layers=1"],
        "precision.recompute.recompute_num_layers=1: belongs to full, and recompute_granularity is auto. "
        "Set precision.recompute.recompute_num_layers=null.",
    ),
    (
        "stage2",
        ["precision.offload.cpu_offloading=true", "precision.offload.cpu_offloading_num_layers=8"],
        "precision.offload.cpu_offloading=true: Megatron does not offload with recompute_granularity=auto. "
        "Set precision.offload.cpu_offloading=false precision.offload.cpu_offloading_num_layers=0, or "
        "precision.recompute.recompute_granularity=null.",
    ),
    (
        "mini/base",
        [
            "precision.compute=bf16",
            "precision.offload.cpu_offloading=true",
            "precision.offload.cpu_offloading_num_layers=2",
            f"{PP}=2",
        ],
        "precision.offload.cpu_offloading=true: Megatron does not offload with PP 2. Set "
        "precision.offload.cpu_offloading=false precision.offload.cpu_offloading_num_layers=0, or "
        f"{PP}=1.\n"
        "precision.offload.cpu_offloading_num_layers=2: must be 1 to 1: Megatron keeps the last of 2 layers where it "
        "is. Set precision.offload.cpu_offloading_num_layers=1.",
    ),
    (
        "mini/base",
        ["precision.offload.cpu_offloading=true", "precision.offload.cpu_offloading_num_layers=1"],
        "precision.offload.cpu_offloading=true: Megatron does not offload with the torch backend. Set "
        "precision.offload.cpu_offloading=false precision.offload.cpu_offloading_num_layers=0, or "
        "precision.backend=te.",
    ),
    (
        "mini/base",
        ["precision.offload.cpu_offloading_num_layers=1"],
        "precision.offload.cpu_offloading_num_layers=1: has no effect without cpu_offloading. "
        "Set precision.offload.cpu_offloading_num_layers=0, or precision.offload.cpu_offloading=true.",
    ),
]


@pytest.mark.parametrize(
    ("experiment", "overrides", "message"),
    MESSAGES,
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_run_together_is_refused_with_the_reason(experiment, overrides, message, load_run):
    with pytest.raises(ConfigError) as refusal:
        check(load_run(f"+exp={experiment}", *overrides))
    assert str(refusal.value) == message


def test_the_mlp_can_be_recomputed_alone(load_run):
    selective = ["precision.recompute.recompute_granularity=selective", "precision.recompute.recompute_modules=[mlp]"]
    check(load_run("+exp=mini/base", *selective))


def test_activations_are_offloaded_where_nothing_is_recomputed(load_run):
    offload = ["precision.offload.cpu_offloading=true", "precision.offload.cpu_offloading_num_layers=31"]
    keep = [f"precision.recompute.recompute_{key}=null" for key in ("granularity", "method", "num_layers")]
    check(load_run("+exp=stage2", *offload, *keep))
