"""Rules of a stage at their boundaries: the last setting that passes beside the first that does not."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_prolong.config.rules import check_world, findings
from nemo_prolong.config.rules.layout import nearest_divisor, nearest_multiple, seq_length_multiple
from nemo_prolong.config.schema import EvaluateConfig, RunConfig
from nemo_prolong.errors import ConfigError

TP, PP, CP = (f"parallelism.{word}_parallel_size" for word in ("tensor_model", "pipeline_model", "context"))
SIZES = "parallelism.hierarchical_context_parallel_sizes"
RECOMPUTE, OFFLOAD = "precision.recompute", "precision.offload.cpu_offloading"
UNIFORM = {f"{RECOMPUTE}.recompute_granularity": "full", f"{RECOMPUTE}.recompute_method": "uniform"}
HIERARCHICAL = {"parallelism.cp_comm_type": "a2a+p2p", "precision.backend": "torch", "seq_length": 768}
NOT_IN_TORCH = (
    "parallelism.cp_comm_type=a2a+p2p: the exchanges of the torch backend are p2p, all_gather and a2a. Set "
    "parallelism.cp_comm_type=p2p."
)
SELECTIVE = {f"{RECOMPUTE}.recompute_granularity": "selective"}
MIXTURE = [{"path": "a", "proportion": 0.5}, {"path": "b", "proportion": 0.5}]


def changed(cfg: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """Return a configuration with other values at dotted paths."""
    values = cfg.model_dump(mode="json")
    for path, value in changes.items():
        *sections, key = path.split(".")
        section = values
        for name in sections:
            section = section[name]
        section[key] = value
    return RunConfig.model_validate(values)


def mixture_of(*proportions: float) -> dict[str, Any]:
    return {"data.mixture": [{"path": f"d{number}", "proportion": share} for number, share in enumerate(proportions)]}


# mini/base: 2 layers of 6 heads in 2 groups of 32 channels, 512 tokens, TP 1, PP 1, CP 1, 1500 steps.
CASES: list[tuple[dict[str, Any], list[str]]] = [
    # Time of a job. Two hours, three minutes and four seconds are 7,384 seconds.
    ({"cluster.time_limit": "02:03:04", "cluster.signal_seconds": 7383}, []),
    (
        {"cluster.time_limit": "0-02:03:04", "cluster.signal_seconds": 7384},
        [
            "cluster.signal_seconds=7384: a job of cluster.time_limit=0-02:03:04 would be asked to stop before it "
            "begins. Set cluster.signal_seconds=null, or a longer cluster.time_limit, such as 04:00:00."
        ],
    ),
    ({"cluster.time_limit": "1-00:00:00", "cluster.signal_seconds": 65535}, []),
    ({"cluster.time_limit": "00:02:01"}, []),
    # Names and parents.
    ({"name": "/a/b"}, ["name=/a/b: must be a directory below runs_dir=runs. Set name=b."]),
    ({"name": "a/../b"}, ["name=a/../b: must be a directory below runs_dir=runs. Set name=b."]),
    ({"name": "a/.."}, ["name=a/..: must be a directory below runs_dir=runs. Set name=base."]),
    ({"name": "."}, ["name=.: must be a directory below runs_dir=runs. Set name=base."]),
    ({"name": "a/b.c"}, []),
    ({"transition": "weights", "parent": "runs/x"}, []),
    ({"transition": "weights", "parent": "hf:llama"}, []),
    ({"transition": "weights_and_optimizer", "parent": "runs/x"}, []),
    (
        {"transition": "weights_and_optimizer"},
        [
            "parent=null: transition=weights_and_optimizer takes it from a parent. Set parent=runs/NAME or "
            "parent=hf:DIR, or transition=scratch."
        ],
    ),
    # Lengths.
    ({"advertised_context_length": 512}, []),
    (
        {"advertised_context_length": 511},
        [
            "advertised_context_length=511: is less than the rows it trains on (seq_length=512). Set "
            "advertised_context_length=512, or null."
        ],
    ),
    ({"seq_length": 2}, []),
    ({"seq_length": 513}, []),
    ({"seq_length": 508, CP: 2, "parallelism.cp_comm_type": "a2a"}, []),
    (
        {"seq_length": 510, CP: 2},
        [
            "seq_length=510: must be a multiple of 4 (2*CP, because every CP rank takes two pieces of a row). Set "
            "seq_length=508, or parallelism.context_parallel_size=1."
        ],
    ),
    (
        {"seq_length": 516, CP: 4, "precision.backend": "torch"},
        [
            "seq_length=516: must be a multiple of 8 (2*CP, because every CP rank takes two pieces of a row). Set "
            "seq_length=512, or parallelism.context_parallel_size=2."
        ],
    ),
    # Resume.
    ({"resume.allow": ["optim.lr", "train.train_iters"]}, []),
    (
        {"resume.allow": ["optim.lrr"]},
        ["resume.allow=[optim.lrr]: no such key in the configuration. Did you mean optim.lr?"],
    ),
    (
        {"resume.allow": ["optim.lr", "qqqqqqqqqqqqq"]},
        [
            "resume.allow=[qqqqqqqqqqqqq]: no such key in the configuration. Name keys as they are typed, such as "
            "optim.lr."
        ],
    ),
    # Mixtures.
    (mixture_of(0.5, 0.5000009), []),
    (mixture_of(0.5, 0.4999991), []),
    (
        mixture_of(0.5, 0.500002),
        [
            "data.mixture: proportions must sum to 1, and these sum to 1.000002. Scaled to 1 they are: d0 0.499999, "
            "d1 0.500001."
        ],
    ),
    (
        {"data.mixture": [*MIXTURE[:1], *MIXTURE]},
        [
            "data.mixture path=a: is listed more than once. Keep one entry, with proportion 1.",
            "data.mixture: proportions must sum to 1, and these sum to 1.5. Scaled to 1 they are: a 0.333333, "
            "a 0.333333, b 0.333333.",
        ],
    ),
    (
        mixture_of(0.7, 0.2),
        [
            "data.mixture: proportions must sum to 1, and these sum to 0.9. Scaled to 1 they are: d0 0.777778, "
            "d1 0.222222."
        ],
    ),
    # Validation and schedule.
    (
        {"optim.lr": 1 / 3000, "optim.min_lr": 2 / 3000},
        ["optim.min_lr=0.000666667: is above the peak optim.lr=0.000333333. Set optim.min_lr=3.33333e-05."],
    ),
    ({"train.val_check_interval": 1500}, []),
    (
        {"train.val_check_interval": 1501},
        [
            "train.val_check_interval=1501: never happens in train.train_iters=1500 steps. Set "
            "train.val_check_interval=1500, or 0 to never validate."
        ],
    ),
    ({"train.val_check_interval": 0, "data.validation": []}, []),
    ({"optim.min_lr": 0.003}, []),
    ({"optim.lr_warmup_iters": 1499}, []),
    (
        {"optim.lr_warmup_iters": 1500},
        [
            "optim.lr_warmup_iters=1500: warmup must end before the last of train.train_iters=1500 steps. Set "
            "optim.lr_warmup_iters=150 (10%)."
        ],
    ),
    (
        {"optim.min_lr": 0.004, "optim.lr_warmup_iters": 2000},
        [
            "optim.min_lr=0.004: is above the peak optim.lr=0.003. Set optim.min_lr=0.0003.",
            "optim.lr_warmup_iters=2000: warmup must end before the last of train.train_iters=1500 steps. Set "
            "optim.lr_warmup_iters=150 (10%).",
        ],
    ),
    # Shapes and layouts.
    (
        {"model.num_query_groups": 4, "model.kv_channels": 33},
        [
            "model.num_query_groups=4: must divide num_attention_heads = 6, so that every group serves as many heads. "
            "Set model.num_query_groups=3.",
            "model.kv_channels=33: must be even: RoPE turns pairs of dimensions. Set model.kv_channels=34.",
        ],
    ),
    ({TP: 2, "parallelism.sequence_parallel": True}, []),
    (
        {TP: 3},
        [
            "parallelism.tensor_model_parallel_size=3: must divide num_query_groups = 2 and ffn_hidden_size = 512 of "
            "the model. Set parallelism.tensor_model_parallel_size=2."
        ],
    ),
    (
        {"model.num_attention_heads": 8, "model.ffn_hidden_size": 513, TP: 2},
        [
            "parallelism.tensor_model_parallel_size=2: must divide ffn_hidden_size = 513 of the model. Set "
            "parallelism.tensor_model_parallel_size=1."
        ],
    ),
    ({PP: 2}, []),
    (
        {"model.num_layers": 6, PP: 4},
        [f"{PP}=4: must divide model.num_layers = 6. Set {PP}=3."],
    ),
    # Exchanges.
    ({CP: 2, "parallelism.cp_comm_type": "a2a", "precision.backend": "torch"}, []),
    (
        {CP: 2, "parallelism.cp_comm_type": "a2a", SIZES: [1, 2], "precision.backend": "torch"},
        [f"{SIZES}=[1,2]: belongs to cp_comm_type=a2a+p2p, and it is a2a. Set {SIZES}=null."],
    ),
    (
        {CP: 2, "parallelism.cp_comm_type": "a2a", "model.num_query_groups": 3, "precision.backend": "torch"},
        [
            "parallelism.cp_comm_type=a2a: a2a shares the num_attention_heads / TP = 6 heads and num_query_groups / TP "
            f"= 3 groups of a rank over 2 ranks. Set parallelism.cp_comm_type=p2p, or {CP}=1 to keep a2a."
        ],
    ),
    (
        {CP: 2, "parallelism.cp_comm_type": "a2a", TP: 2, "precision.backend": "torch"},
        [
            "parallelism.cp_comm_type=a2a: a2a shares the num_attention_heads / TP = 3 heads and num_query_groups / TP "
            f"= 1 groups of a rank over 2 ranks. Set parallelism.cp_comm_type=p2p, or {CP}=1 to keep a2a."
        ],
    ),
    (
        {
            CP: 2,
            "parallelism.cp_comm_type": "a2a",
            TP: 2,
            "model.num_attention_heads": 2,
            "precision.backend": "torch",
        },
        [
            "parallelism.cp_comm_type=a2a: a2a shares the num_attention_heads / TP = 1 heads and num_query_groups / TP "
            f"= 1 groups of a rank over 2 ranks. Set parallelism.cp_comm_type=p2p, or {CP}=1 to keep a2a."
        ],
    ),
    # In two levels, which the torch backend has not.
    (HIERARCHICAL | {CP: 6, SIZES: [2, 3]}, [NOT_IN_TORCH]),
    (
        HIERARCHICAL | {CP: 6, "model.num_query_groups": 6, SIZES: [6]},
        [
            f"{SIZES}=[6]: a2a+p2p needs two sizes, [a2a, p2p], whose product is CP = 6. Set "
            f"parallelism.cp_comm_type=p2p, or {SIZES}=[2,3].",
            NOT_IN_TORCH,
        ],
    ),
    (
        HIERARCHICAL | {CP: 4, "model.num_query_groups": 3},
        [
            f"{SIZES}=null: a2a+p2p needs two sizes, [a2a, p2p], whose product is CP = 4. Set "
            "parallelism.cp_comm_type=p2p.",
            NOT_IN_TORCH,
        ],
    ),
    # Planned ranks.
    ({"parallelism.num_nodes": 1, "parallelism.ranks_per_node": 2}, []),
    (
        {TP: 2, "parallelism.ranks_per_node": 3, "train.global_batch_size": 2},
        [
            "parallelism.num_nodes=1 parallelism.ranks_per_node=3: 3 ranks are no multiple of TP*PP*CP = 2. Set "
            "parallelism.num_nodes=1 parallelism.ranks_per_node=2."
        ],
    ),
    (
        {"parallelism.ranks_per_node": 3, "train.global_batch_size": 4},
        [
            "train.global_batch_size=4: must be a multiple of micro_batch_size * DP = 3 (3 ranks). Set "
            "train.global_batch_size=3."
        ],
    ),
    # Recomputation.
    (
        UNIFORM | {PP: 2, f"{RECOMPUTE}.recompute_num_layers": 2},
        [
            f"{RECOMPUTE}.recompute_num_layers=2: full needs 1 to 1 layers (those of a pipeline stage). Set "
            f"{RECOMPUTE}.recompute_num_layers=1."
        ],
    ),
    (UNIFORM | {f"{RECOMPUTE}.recompute_num_layers": 1}, []),
    (UNIFORM | {f"{RECOMPUTE}.recompute_num_layers": 2}, []),
    (
        UNIFORM | {f"{RECOMPUTE}.recompute_num_layers": 3},
        [
            f"{RECOMPUTE}.recompute_num_layers=3: full needs 1 to 2 layers (those of a pipeline stage). Set "
            f"{RECOMPUTE}.recompute_num_layers=2."
        ],
    ),
    (
        UNIFORM | {f"{RECOMPUTE}.recompute_num_layers": None},
        [
            f"{RECOMPUTE}.recompute_num_layers=null: full needs 1 to 2 layers (those of a pipeline stage). Set "
            f"{RECOMPUTE}.recompute_num_layers=1."
        ],
    ),
    (
        UNIFORM
        | {"model.num_layers": 4, f"{RECOMPUTE}.recompute_method": "block", f"{RECOMPUTE}.recompute_num_layers": 3},
        [],
    ),
    (
        SELECTIVE | {f"{RECOMPUTE}.recompute_modules": []},
        [
            f"{RECOMPUTE}.recompute_modules=[]: selective needs the modules to compute again; Megatron's default, "
            f"core_attn, saves nothing here. Set {RECOMPUTE}.recompute_modules=[mlp]."
        ],
    ),
    (
        {
            f"{RECOMPUTE}.recompute_granularity": "selective",
            f"{RECOMPUTE}.recompute_modules": ["core_attn", "layernorm"],
        },
        [
            f"{RECOMPUTE}.recompute_modules=[core_attn,layernorm]: attention over documents keeps no scores, so "
            f"core_attn would cost time and save nothing. Set {RECOMPUTE}.recompute_modules=[mlp].",
            f"{RECOMPUTE}.recompute_modules=[core_attn,layernorm]: layernorm has no use: Transformer Engine's layers "
            "hold norm and matrix in one, and without Transformer Engine Megatron cannot recompute a norm. Set "
            f"{RECOMPUTE}.recompute_modules=[mlp].",
        ],
    ),
    (
        UNIFORM | {f"{RECOMPUTE}.recompute_num_layers": 1, f"{RECOMPUTE}.recompute_modules": ["mlp", "core_attn"]},
        [
            f"{RECOMPUTE}.recompute_modules=[mlp,core_attn]: belongs to selective, and recompute_granularity is full. "
            f"Set {RECOMPUTE}.recompute_modules=null."
        ],
    ),
    (
        UNIFORM | {TP: 2, f"{RECOMPUTE}.recompute_num_layers": 1, f"{RECOMPUTE}.distribute_saved_activations": True},
        [],
    ),
    # Offload.
    (
        {"precision.compute": "bf16", f"{OFFLOAD}": True, f"{OFFLOAD}_num_layers": 1},
        [],
    ),
    (
        {"precision.compute": "bf16", f"{OFFLOAD}": True, f"{OFFLOAD}_num_layers": 0},
        [
            f"{OFFLOAD}_num_layers=0: must be 1 to 1: Megatron keeps the last of 2 layers where it is. Set "
            f"{OFFLOAD}_num_layers=1."
        ],
    ),
    (
        {"model.num_layers": 4, "precision.compute": "bf16", f"{OFFLOAD}": True, f"{OFFLOAD}_num_layers": 0},
        [
            f"{OFFLOAD}_num_layers=0: must be 1 to 3: Megatron keeps the last of 4 layers where it is. Set "
            f"{OFFLOAD}_num_layers=1."
        ],
    ),
    (
        {"model.num_layers": 4, "precision.compute": "bf16", f"{OFFLOAD}": True, f"{OFFLOAD}_num_layers": 4},
        [
            f"{OFFLOAD}_num_layers=4: must be 1 to 3: Megatron keeps the last of 4 layers where it is. Set "
            f"{OFFLOAD}_num_layers=3."
        ],
    ),
]


@pytest.mark.parametrize(("changes", "messages"), CASES, ids=lambda value: str(value)[:60] if value else "passes")
def test_a_setting_passes_or_is_refused_with_these_words(
    changes: dict[str, Any], messages: list[str], load_run: Any
) -> None:
    base = changed(load_run("+exp=mini/base"), {"train.deterministic": False})
    assert findings(base) == []
    assert [str(finding) for finding in findings(changed(base, changes))] == messages


FP8 = {"precision.compute": "fp8", "precision.backend": "te", "train.deterministic": False}


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({}, []),
        (
            {"model.hidden_size": 200, "model.ffn_hidden_size": 520},
            [
                "model.hidden_size=200: FP8 matrix products need every rank's share in multiples of 16, and 200 / 1 is "
                "not. Set model.hidden_size=192, or precision=bf16.",
                "model.ffn_hidden_size=520: FP8 matrix products need every rank's share in multiples of 16, and 520 / "
                "1 is not. Set model.ffn_hidden_size=512, or precision=bf16.",
            ],
        ),
        (
            {"model.ffn_hidden_size": 528, TP: 2},
            [
                "model.ffn_hidden_size=528: FP8 matrix products need every rank's share in multiples of 16, and 528 / "
                "2 is not. Set model.ffn_hidden_size=512, or precision=bf16."
            ],
        ),
        (
            {"model.kv_channels": 12},
            [
                "model.kv_channels=12: FP8 matrix products need every rank's share in multiples of 16, and 24 / 1 is "
                "not. Set precision=bf16."
            ],
        ),
        ({"model.kv_channels": 24}, []),
        (
            {"model.kv_channels": 8, TP: 2},
            [
                "model.kv_channels=8: FP8 matrix products need every rank's share in multiples of 16, and 8 / 1 is "
                "not. Set precision=bf16."
            ],
        ),
        (
            {
                "precision.compute": "fp8_attention",
                "precision.fp8_recipe": "delayed",
                "model.kv_channels": 128,
                "seq_length": 640,
                CP: 2,
            },
            ["seq_length=640: FP8 attention needs a multiple of 128 tokens on each CP rank. Set seq_length=512."],
        ),
        ({"seq_length": 544}, []),
        (
            {"seq_length": 528},
            [
                "seq_length=528: must be a multiple of 32 (16*2*CP*TP, the tile of FP8 matrix products on every rank). "
                "Set seq_length=512."
            ],
        ),
        (
            {"seq_length": 640, "precision.fp8_recipe": "blockwise"},
            [
                "seq_length=640: must be a multiple of 256 (128*2*CP*TP, the tile of FP8 matrix products on every "
                "rank). Set seq_length=512."
            ],
        ),
        (
            {"seq_length": 544, CP: 2},
            [
                "seq_length=544: must be a multiple of 64 (16*2*CP*TP, the tile of FP8 matrix products on every rank). "
                f"Set seq_length=512, or {CP}=1."
            ],
        ),
    ],
    ids=lambda value: str(value)[:60] if value else "passes",
)
def test_fp8_takes_the_shapes_that_fill_its_tiles(changes: dict[str, Any], messages: list[str], load_run: Any) -> None:
    cfg = changed(load_run("+exp=mini/base"), FP8 | changes)
    assert [str(finding) for finding in findings(cfg)] == messages


@pytest.mark.parametrize(
    ("tp", "cp", "sequence_parallel", "multiple", "words"),
    [
        (1, 1, False, 1, "1"),
        (2, 1, False, 1, "1"),
        (2, 1, True, 2, "TP, because sequence parallel splits a row over the TP ranks"),
        (1, 2, False, 4, "2*CP, because every CP rank takes two pieces of a row"),
        (2, 4, False, 8, "2*CP, because every CP rank takes two pieces of a row"),
        (2, 4, True, 8, "both 2*CP and CP*TP"),
        (4, 2, True, 8, "both 2*CP and CP*TP"),
        (3, 2, True, 12, "both 2*CP and CP*TP"),
    ],
)
def test_rows_divide_over_context_and_sequence_parallel_ranks(
    tp: int, cp: int, sequence_parallel: bool, multiple: int, words: str, load_run: Any
) -> None:
    cfg = changed(load_run("+exp=mini/base"), {TP: tp, "parallelism.sequence_parallel": sequence_parallel})
    assert seq_length_multiple(cfg, cp) == (multiple, words)


def test_of_two_neighbours_the_smaller_is_the_nearest() -> None:
    assert [nearest_multiple(value, 4) for value in (1, 3, 4, 5, 6, 7, 8)] == [4, 4, 4, 4, 4, 8, 8]
    assert [nearest_divisor(value, 12) for value in (1, 5, 8, 9, 20)] == [1, 4, 6, 6, 12]


@pytest.mark.parametrize(
    ("changes", "world_size", "launch"),
    [
        ({TP: 2, "parallelism.ranks_per_node": 4}, 1, "torchrun --nproc-per-node 4"),
        ({TP: 2, PP: 2, CP: 4}, 9, "torchrun --nnodes 2 --nproc-per-node 8"),
        ({TP: 2, PP: 2, CP: 2}, 4, "torchrun --nproc-per-node 8"),
        ({TP: 3, CP: 3, "model.num_attention_heads": 6}, 4, "torchrun --nnodes 2 --nproc-per-node 5"),
    ],
)
def test_a_layout_without_ranks_is_refused_with_the_command(
    changes: dict[str, Any], world_size: int, launch: str, load_run: Any
) -> None:
    cfg = changed(load_run("+exp=mini/base"), changes)
    with pytest.raises(ConfigError) as caught:
        check_world(cfg, world_size, ["+exp=mini/base"])
    layout = cfg.parallelism
    degrees = (
        f"TP {layout.tensor_model_parallel_size} x PP {layout.pipeline_model_parallel_size} "
        f"x CP {layout.context_parallel_size}"
    )
    started = "1 rank was" if world_size == 1 else f"{world_size} ranks were"
    assert str(caught.value) == (
        f"parallelism={degrees}: needs a multiple of {layout.model_parallel_size} ranks, and {started} started. "
        f"Start it with: {launch} scripts/train.py +exp=mini/base"
    )


def test_position_buckets_are_each_named_once(load_config: Any) -> None:
    cfg = load_config("evaluate", EvaluateConfig, "position_buckets=[512,512,1K]")
    assert [str(finding) for finding in findings(cfg)] == [
        "position_buckets=[512,512,1024]: upper ends of the buckets must ascend. Set position_buckets=[512,1024]."
    ]
    assert findings(load_config("evaluate", EvaluateConfig, "position_buckets=[512,1K]")) == []
