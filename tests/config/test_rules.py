"""Rules between fields: each is broken once, and its remedy is followed."""

from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.config.rules import check, check_world, findings, ranks_to_start
from nemo_prolong.config.rules.layout import nearest_divisor, nearest_multiple
from nemo_prolong.config.schema import EvaluateConfig, RunConfig
from nemo_prolong.errors import ConfigError

TP, PP, CP = (f"parallelism.{word}_parallel_size" for word in ("tensor_model", "pipeline_model", "context"))

MESSAGES = [
    # Lengths and layout.
    (
        "mini/base",
        ["seq_length=1001", f"{CP}=2"],
        "seq_length=1001: must be a multiple of 4 (2*CP, because every CP rank takes two pieces of a row). "
        "Set seq_length=1000, or parallelism.context_parallel_size=1.",
    ),
    (
        "mini/base",
        ["seq_length=511", f"{TP}=2", "parallelism.sequence_parallel=true"],
        "seq_length=511: must be a multiple of 2 (TP, because sequence parallel splits a row over the TP ranks). "
        "Set seq_length=510.",
    ),
    (
        "stage1",
        ["parent=hf:llama", "seq_length=65540"],
        "seq_length=65540: must be a multiple of 8 (both 2*CP and CP*TP). "
        "Set seq_length=64K, or parallelism.context_parallel_size=1.",
    ),
    (
        "stage1",
        ["parent=hf:llama", "precision=fp8", "seq_length=65600"],
        "seq_length=65600: must be a multiple of 256 (16*2*CP*TP, the tile of FP8 matrix products on every rank). "
        "Set seq_length=64K.",
    ),
    (
        "stage1",
        ["parent=hf:llama", "precision=fp8", "precision.fp8_recipe=blockwise", "seq_length=66560"],
        "seq_length=65K: must be a multiple of 2048 (128*2*CP*TP, the tile of FP8 matrix products on every rank). "
        "Set seq_length=64K, or parallelism.context_parallel_size=1.",
    ),
    (
        "mini/base",
        ["seq_length=1"],
        "seq_length=1: a row of one token has nothing to predict. Set seq_length=2 or more.",
    ),
    (
        "mini/base",
        [f"{TP}=4"],
        f"{TP}=4: must divide num_attention_heads = 6 and num_query_groups = 2 of the model. Set {TP}=2.",
    ),
    (
        "mini/base",
        ["model.num_layers=4", f"{PP}=3"],
        f"{PP}=3: must divide model.num_layers = 4. Set {PP}=2.",
    ),
    (
        "mini/base",
        ["parallelism.sequence_parallel=true"],
        "parallelism.sequence_parallel=true: splits activations over the TP ranks, and TP is 1. "
        f"Set parallelism.sequence_parallel=false, or {TP}=2.",
    ),
    (
        "mini/base",
        ["model.num_query_groups=4"],
        "model.num_query_groups=4: must divide num_attention_heads = 6, so that every group serves as many heads. "
        "Set model.num_query_groups=3.",
    ),
    (
        "mini/base",
        ["model.kv_channels=33"],
        "model.kv_channels=33: must be even: RoPE turns pairs of dimensions. Set model.kv_channels=34.",
    ),
    (
        "stage2",
        ["parallelism.num_nodes=7"],
        "parallelism.num_nodes=7 parallelism.ranks_per_node=8: 56 ranks are no multiple of TP*PP*CP = 64. "
        "Set parallelism.num_nodes=8.",
    ),
    (
        "stage1",
        ["parent=hf:llama", "parallelism=h100_64_tp4_cp2", "train.global_batch_size=60"],
        "train.global_batch_size=60: must be a multiple of micro_batch_size * DP = 8 (64 ranks). "
        "Set train.global_batch_size=56.",
    ),
    (
        "stage2",
        ["model.make_vocab_size_divisible_by=128"],
        "model.make_vocab_size_divisible_by=128: pads the vocabulary of 128256 to 129024 at TP 8; optimizer state "
        "carried over from a parent with another TP would not fit. Set model.make_vocab_size_divisible_by=32.",
    ),
    (
        "mini/base",
        [f"{CP}=4", "parallelism.cp_comm_type=a2a", "precision.backend=torch"],
        "parallelism.cp_comm_type=a2a: a2a shares the num_attention_heads / TP = 6 heads and num_query_groups / TP = 2 "
        "groups of a rank over 4 ranks. "
        f"Set parallelism.cp_comm_type=p2p, or {CP}=2 to keep a2a.",
    ),
    (
        "stage2",
        ["parallelism.cp_comm_type=all_gather"],
        "parallelism.cp_comm_type=all_gather: Transformer Engine before 2.18 refuses all_gather for rows with document "
        "masks. Set parallelism.cp_comm_type=p2p.",
    ),
    # Stages.
    (
        "mini/base",
        ["parent=runs/x"],
        "parent=runs/x: transition=scratch takes nothing from a parent. Set parent=null, or transition=weights.",
    ),
    (
        "mini/stage1",
        ["parent=null"],
        "parent=null: transition=weights takes it from a parent. "
        "Set parent=runs/NAME or parent=hf:DIR, or transition=scratch.",
    ),
    (
        "mini/stage1",
        ["name=demo/base"],
        "parent=runs/demo/base: a run cannot be its own parent. "
        "Set name=demo/base-2, or the parent this stage starts from.",
    ),
    (
        "stage2",
        ["parent=hf:llama"],
        "parent=hf:llama: a Hugging Face directory holds no optimizer state. "
        "Set transition=weights, or parent=runs/NAME.",
    ),
    (
        "mini/base",
        ["name=../elsewhere"],
        "name=../elsewhere: must be a directory below runs_dir=runs. Set name=elsewhere.",
    ),
    (
        "mini/base",
        ["cluster.signal_seconds=7200", "cluster.time_limit=1:00:00"],
        "cluster.signal_seconds=7200: a job of cluster.time_limit=1:00:00 would be asked to stop before it begins. "
        "Set cluster.signal_seconds=120, or a longer cluster.time_limit, such as 04:00:00.",
    ),
    ("mini/base", ["name=''"], "name=: must not be empty. Set name=TEXT (directory of the run below runs_dir)."),
    (
        "sft",
        ["advertised_context_length=8K"],
        "advertised_context_length=8K: is less than the rows it trains on (seq_length=64K). "
        "Set advertised_context_length=64K, or null.",
    ),
    (
        "sft",
        ["data.apply_instruct_masks=false"],
        "data.apply_instruct_masks=false: stage=sft trains on the answers only, or the model learns to ask. "
        "Set data.apply_instruct_masks=true.",
    ),
    (
        "stage2",
        ["data.apply_instruct_masks=true"],
        "data.apply_instruct_masks=true: stage=stage2 trains on every token; only sft masks. "
        "Set data.apply_instruct_masks=false, or stage=sft.",
    ),
    # Data, batch, schedule.
    (
        "mini/base",
        ["data.mixture=[{path:a,proportion:0.5},{path:b,proportion:0.3}]"],
        "data.mixture: proportions must sum to 1, and these sum to 0.8. Scaled to 1 they are: a 0.625, b 0.375.",
    ),
    (
        "mini/base",
        ["data.mixture=[{path:a,proportion:0.5},{path:a,proportion:0.5}]"],
        "data.mixture path=a: is listed more than once. Keep one entry, with proportion 1.",
    ),
    (
        "mini/base",
        ["train.global_batch_size=8", "train.micro_batch_size=2"],
        "train.micro_batch_size=2: a packed row is a micro-batch of its own: its documents already are the batch. "
        "Set train.micro_batch_size=1; train.global_batch_size=8 stays the batch.",
    ),
    (
        "mini/base",
        ["train.val_check_interval=50", "data.validation=[]"],
        "train.val_check_interval=50: there is nothing to validate on: data.validation is empty. "
        "Set train.val_check_interval=0, or data.validation=[DIRECTORY].",
    ),
    (
        "mini/base",
        ["train.val_check_interval=300", "train.train_iters=200"],
        "train.val_check_interval=300: never happens in train.train_iters=200 steps. "
        "Set train.val_check_interval=200, or 0 to never validate.",
    ),
    (
        "stage2",
        ["optim.min_lr=1e-3"],
        "optim.min_lr=0.001: is above the peak optim.lr=5e-06. Set optim.min_lr=5e-07.",
    ),
    (
        "stage2",
        ["train.train_iters=200"],
        "optim.lr_warmup_iters=250: warmup must end before the last of train.train_iters=200 steps. "
        "Set optim.lr_warmup_iters=20 (10%).",
    ),
]


@pytest.mark.parametrize(
    ("experiment", "overrides", "message"),
    MESSAGES,
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_conflict_is_refused_with_the_nearest_valid_setting(experiment, overrides, message, load_run):
    with pytest.raises(ConfigError) as refusal:
        check(load_run(f"+exp={experiment}", *overrides))
    assert str(refusal.value) == message


@pytest.mark.parametrize("compute", ["bf16", "fp8", "fp8_attention"])
def test_every_precision_of_the_recipe_passes_with_every_stage(compute, load_run):
    for stage in ("+exp=stage1", "+exp=stage2", "+exp=sft"):
        check(load_run(stage, "parent=runs/parent", f"precision={compute}"))


def test_proportions_off_by_rounding_only_are_accepted(load_run):
    thirds = ",".join(f"{{path:d{n},proportion:0.3333333}}" for n in range(3))
    check(load_run("+exp=mini/base", f"data.mixture=[{thirds}]"))


# Number of ranks.


def test_too_few_ranks_are_refused_with_the_command(load_run):
    typed = ["+exp=mini/stage1", f"{TP}=2"]
    with pytest.raises(ConfigError) as refusal:
        check_world(load_run(*typed), 1, typed)
    assert str(refusal.value) == (
        "parallelism=TP 2 x PP 1 x CP 1: needs a multiple of 2 ranks, and 1 rank was started. "
        f"Start it with: torchrun --nproc-per-node 2 scripts/train.py +exp=mini/stage1 {TP}=2"
    )


def test_too_few_ranks_for_a_layout_get_the_planned_command(load_run):
    with pytest.raises(ConfigError) as refusal:
        check_world(load_run("+exp=stage2"), 8, ["+exp=stage2"])
    assert str(refusal.value) == (
        "parallelism=TP 8 x PP 1 x CP 8: needs a multiple of 64 ranks, and 8 ranks were started. "
        "Start it with: torchrun --nnodes 8 --nproc-per-node 8 scripts/train.py +exp=stage2"
    )


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest(load_run):
    with pytest.raises(ConfigError) as refusal:
        check_world(load_run("+exp=mini/stage1", "train.global_batch_size=4"), 3)
    assert str(refusal.value) == (
        "train.global_batch_size=4: must be a multiple of micro_batch_size * DP = 3 (3 ranks). "
        "Set train.global_batch_size=3."
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_that_divide_the_batch_need_no_layout(world_size, load_run):
    check_world(load_run("+exp=mini/stage1", "train.global_batch_size=4"), world_size)


# Ranks that a process starts itself.

EIGHT = ("parallelism.ranks_per_node=8", f"{TP}=2", "train.global_batch_size=8")
"""A plan of 8 ranks, of which 2 hold the model."""


@pytest.mark.parametrize(
    ("overrides", "gpus", "ranks"),
    [
        ((), 0, 1),
        ((), 1, 1),
        # It is planned for one rank, whatever else the machine has.
        ((), 8, 1),
        (("parallelism.ranks_per_node=4", "train.global_batch_size=4"), 0, 4),
        (EIGHT, 0, 8),
        (EIGHT, 8, 8),
        # Fewer are planned than there are.
        (EIGHT, 16, 8),
        # A layout without a plan takes every GPU.
        ((f"{TP}=2", "train.global_batch_size=2"), 4, 4),
    ],
)
def test_a_process_alone_starts_a_rank_for_each_gpu_of_the_plan(overrides, gpus, ranks, load_run):
    assert ranks_to_start(load_run("+exp=mini/stage1", *overrides), gpus) == ranks


@pytest.mark.parametrize(
    ("overrides", "gpus", "message"),
    [
        (
            (f"{TP}=2",),
            0,
            "parallelism=TP 2 x PP 1 x CP 1: needs a multiple of 2 ranks, and 1 rank was started. "
            f"Start it with: torchrun --nproc-per-node 2 scripts/train.py +exp=mini/stage1 {TP}=2",
        ),
        (
            (f"{TP}=2",),
            1,
            "parallelism=TP 2 x PP 1 x CP 1: needs a multiple of 2 ranks, and this machine has 1 GPU. "
            f"Start it with: torchrun --nproc-per-node 2 scripts/train.py +exp=mini/stage1 {TP}=2",
        ),
        (
            (*EIGHT[:2], "train.global_batch_size=24"),
            6,
            "parallelism.ranks_per_node=8: is planned, and this machine has 6 GPUs. "
            "Set parallelism.ranks_per_node=6, or repair the machine.",
        ),
        (
            (*EIGHT[:2], "parallelism.num_nodes=2", "train.global_batch_size=8"),
            8,
            "parallelism.num_nodes=2: several machines are planned, and this command was started on one without a "
            "launcher. Start it on each with: torchrun --nnodes 2 --nproc-per-node 8 scripts/train.py +exp=mini/stage1 "
            f"{EIGHT[0]} {TP}=2 parallelism.num_nodes=2 train.global_batch_size=8, or set parallelism.num_nodes=1.",
        ),
    ],
)
def test_a_process_alone_refuses_what_does_not_fit_its_machine(overrides, gpus, message, load_run):
    typed = ["+exp=mini/stage1", *overrides]
    with pytest.raises(ConfigError) as refusal:
        ranks_to_start(load_run(*typed), gpus, typed)
    assert str(refusal.value) == message


# Other scripts.


def test_position_buckets_must_ascend(load_config):
    with pytest.raises(ConfigError) as refusal:
        check(load_config("evaluate", EvaluateConfig, "position_buckets=[2K,512]"))
    assert str(refusal.value) == (
        "position_buckets=[2048,512]: upper ends of the buckets must ascend. Set position_buckets=[512,2048]."
    )


# Remedies.


@given(value=st.integers(1, 10**6), of=st.integers(1, 10**4))
def test_the_nearest_multiple_is_positive_and_none_is_nearer(value, of):
    nearest = nearest_multiple(value, of)
    assert nearest % of == 0 and nearest > 0
    assert abs(nearest - value) <= of // 2 or nearest == of


@given(value=st.integers(1, 200), of=st.integers(1, 200))
def test_the_nearest_divisor_divides_and_none_is_nearer(value, of):
    nearest = nearest_divisor(value, of)
    assert of % nearest == 0
    assert abs(nearest - value) == min(abs(number - value) for number in range(1, of + 1) if of % number == 0)


def follow(remedy: str, cfg: RunConfig) -> RunConfig:
    """Do what a remedy says first: ``Set path=value``, or several of them."""
    values = cfg.model_dump(mode="json")
    first = re.match(r"Set ((?:[\w.]+=[\w-]+ ?)+)", remedy).group(1)
    for path, value in (assignment.split("=") for assignment in first.split()):
        if path == "precision":
            values["precision"] = yaml.safe_load((CONFIG_DIR / "precision" / f"{value}.yaml").read_text())
            continue
        *sections, key = path.split(".")
        section = values
        for name in sections:
            section = section[name]
        section[key] = yaml.safe_load(value)
    return RunConfig.model_validate(values)


def broken(cfg: RunConfig, **sections: dict) -> RunConfig:
    values = cfg.model_dump(mode="json")
    for name, changes in sections.items():
        values[name] = {**values[name], **changes} if isinstance(values[name], dict) else changes
    return RunConfig.model_validate(values)


degrees = st.sampled_from([1, 2, 3, 4, 5, 8, 16])


@settings(max_examples=150, deadline=None)
@given(
    seq_length=st.integers(1, 20_000),
    tp=degrees,
    pp=degrees,
    cp=degrees,
    sequence_parallel=st.booleans(),
    comm=st.sampled_from(["p2p", "a2a", "all_gather", "a2a+p2p"]),
    nodes=st.integers(1, 9),
    heads=st.integers(1, 12),
    groups=st.integers(1, 12),
    hidden=st.integers(1, 300),
    ffn=st.integers(1, 600),
    compute=st.sampled_from(["fp32", "bf16", "fp8", "fp8_attention"]),
    backend=st.sampled_from(["auto", "torch", "te"]),
)
def test_following_first_remedies_ends_without_findings(
    load_run, seq_length, tp, pp, cp, sequence_parallel, comm, nodes, heads, groups, hidden, ffn, compute, backend
):
    cfg = broken(
        load_run("+exp=mini/stage2"),
        seq_length=seq_length,
        parallelism={
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "context_parallel_size": cp,
            "sequence_parallel": sequence_parallel,
            "cp_comm_type": comm,
            "num_nodes": nodes,
            "ranks_per_node": 8,
        },
        model={
            "num_attention_heads": heads,
            "num_query_groups": groups,
            "hidden_size": hidden,
            "ffn_hidden_size": ffn,
        },
        precision={"compute": compute, "backend": backend},
    )
    for _ in range(25):
        found = findings(cfg)
        if not found:
            return
        cfg = follow(found[0].remedy, cfg)
    raise AssertionError(f"remedies never end: {[str(finding) for finding in found]}")
