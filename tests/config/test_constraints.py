"""The table of what runs where: every row is tried, every rule is broken once, the document says the same."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.config.findings import raise_all
from nemo_prolong.config.rules import check_platform
from nemo_prolong.config.rules.attention import ASSUMED_PLATFORM, Platform, dotted
from nemo_prolong.config.rules.constraint_table import (
    EXCHANGES,
    FP8_RECIPES,
    platforms,
    refresh,
    te_attentions,
    torch_attentions,
)
from nemo_prolong.config.rules.constraints import (
    CONSTRAINTS,
    attentions,
    broken_rules,
    constraint_findings,
    resolve_backend,
)
from nemo_prolong.config.schema import KernelBackend, PrecisionConfig, RunConfig
from nemo_prolong.errors import ConfigError

REPOSITORY = CONFIG_DIR.parent
H100 = Platform((2, 9), (9, 0), cudnn=(9, 19), cuda=(13, 0), flash_attn=(2, 8, 1))
B200 = replace(H100, compute_capability=(10, 0))
CPU = Platform()

# Read in the sources of each release, not in our rules.
MASKED_ROWS_ARE_EXCHANGED_BY = {
    (2, 9): {None, "p2p"},
    (2, 10): {None, "p2p", "a2a"},
    (2, 18): {None, "p2p", "a2a", "all_gather"},
    (2, 19): {None, "p2p", "a2a", "all_gather", "a2a+p2p"},
}
FP8_BATCHES_ARE_EXCHANGED_BY = {
    (2, 9): {None, "p2p", "a2a", "a2a+p2p"},
    (2, 10): {None, "p2p", "a2a", "a2a+p2p"},
    (2, 18): {None, "p2p", "a2a", "a2a+p2p", "all_gather"},
    (2, 19): {None, "p2p", "a2a", "a2a+p2p", "all_gather"},
}
FP8_ATTENTION_IS_SCALED_BY = {9: {"delayed"}, 10: {"delayed", "tensorwise"}}


def configured(base: RunConfig, backend: str, compute: str, recipe: str, exchange: str | None, **changes) -> RunConfig:
    values = base.model_dump(mode="json")
    values["precision"] |= {"backend": backend, "compute": compute, "fp8_recipe": recipe}
    values["parallelism"] |= {"cp_comm_type": exchange or "p2p", "context_parallel_size": 8 if exchange else 1}
    values["train"]["deterministic"] = False
    for section, change in changes.items():
        values[section] |= change
    return RunConfig.model_validate(values)


def outcome(cfg: RunConfig, platform: Platform) -> str | None:
    try:
        check_platform(cfg, platform)
    except ConfigError as error:
        return str(error)
    return None


def messages(attentions) -> str | None:
    found = {rule.name: str(rule.finding(a)) for a in attentions for rule in broken_rules(a)}
    return "\n".join(found[rule.name] for rule in CONSTRAINTS if rule.name in found) or None


def name_of(platform: Platform) -> str:
    return f"te{platform.transformer_engine[1]}-sm{platform.compute_capability[0]}0"


@pytest.mark.parametrize("platform", platforms(), ids=name_of)
def test_every_row_of_transformer_engine_is_as_the_table_says(platform, load_run):
    stage2 = load_run("+exp=stage2")
    choices = itertools.product(("fp32", "bf16", "fp8", "fp8_attention"), FP8_RECIPES, EXCHANGES)
    for compute, recipe, exchange in choices:
        rows = [
            replace(row, cp_comm_type=exchange, fp8_recipe=recipe)
            for row in te_attentions(platform)
            if row.compute == compute
            and (row.fp8_recipe == recipe or not compute.startswith("fp8"))
            and (row.dtype, row.layout) != ("fp8", "thd")
        ]
        assert len(rows) == (2 if compute == "fp8_attention" else 1)
        refusal = outcome(configured(stage2, "te", compute, recipe, exchange), platform)
        assert refusal == messages(rows)
        version, architecture = platform.transformer_engine, platform.compute_capability[0]
        legal = compute != "fp32" and exchange in MASKED_ROWS_ARE_EXCHANGED_BY[version]
        if compute == "fp8_attention":
            legal &= exchange in FP8_BATCHES_ARE_EXCHANGED_BY[version]
            legal &= recipe in FP8_ATTENTION_IS_SCALED_BY[architecture]
        assert (refusal is None) == legal, (compute, recipe, exchange)


@pytest.mark.parametrize("platform", [CPU, H100])
def test_every_row_of_the_torch_backend_is_as_the_table_says(platform, load_run):
    stage2 = load_run("+exp=stage2")
    for row, exchange in itertools.product(torch_attentions(), EXCHANGES):
        refusal = outcome(configured(stage2, "torch", row.compute, row.fp8_recipe, exchange), platform)
        assert refusal == messages([replace(row, cp_comm_type=exchange)])
        assert (refusal is None) == (row.compute != "fp8" and exchange != "a2a+p2p")


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("platform", platforms(), ids=name_of)
def test_fp8_attention_over_documents_is_refused_everywhere(platform, exchange):
    row = replace(te_attentions(platform)[-1], cp_comm_type=exchange)
    assert (row.dtype, row.layout) == ("fp8", "thd")
    with pytest.raises(ConfigError) as refusal:
        raise_all([rule.finding(row) for rule in broken_rules(row)])
    assert (
        "precision.compute=fp8_attention: no release of cuDNN and Transformer Engine trains FP8 attention with "
        "document masks (thd). Set precision=fp8_attention, which runs such rows in BF16."
        in str(refusal.value).splitlines()
    )


def test_the_document_says_what_the_rules_say():
    document = (REPOSITORY / "docs" / "precision.md").read_text()
    assert refresh(document) == document, "renew it with: python scripts/constraints.py docs/precision.md"


P2P = "Set parallelism.cp_comm_type=p2p."
CUDNN = "Install cuDNN 9.18 or newer."
FP8 = {"backend": "te", "compute": "fp8", "recipe": "tensorwise"}
FP8_ATTENTION = {"backend": "te", "compute": "fp8_attention", "recipe": "delayed"}
BF16 = {"backend": "te", "compute": "bf16", "recipe": "tensorwise"}
FLASH = {"precision": {"attention": "flash"}}
SHORT = {"parallelism": {"context_parallel_size": 256}}

# One platform and stage for every rule that breaks it and nothing else.
BREAKS = {
    "fp8_in_torch": (
        H100,
        FP8 | {"backend": "torch"},
        "precision.compute=fp8 precision.backend=torch: the torch backend has no FP8 kernels; FP8 needs Transformer "
        "Engine. Set precision.backend=te, or precision=bf16.",
    ),
    "fp32_in_te": (
        H100,
        BF16 | {"compute": "fp32"},
        "precision.compute=fp32 precision.backend=te: Transformer Engine has no FP32 kernel for attention over "
        "documents. Set precision.backend=torch, or precision=bf16.",
    ),
    "no_gpu": (
        Platform(transformer_engine=(2, 9)),
        BF16,
        "precision.compute=bf16 precision.backend=te: Transformer Engine computes on a GPU, and there is none here. "
        "Set precision=bf16 precision.backend=torch.",
    ),
    "no_te": (
        replace(H100, transformer_engine=None),
        BF16 | {"backend": "auto"},
        "precision.compute=bf16 precision.backend=te: Transformer Engine is not installed here. "
        "Run it in the GPU container, or set precision=bf16 precision.backend=torch.",
    ),
    "old_te": (
        replace(H100, transformer_engine=(2, 8, 0)),
        BF16,
        "Transformer Engine 2.8.0: Megatron-core 0.15.3 needs Transformer Engine 2.9. "
        "Install transformer-engine 2.9, or set precision=bf16 precision.backend=torch.",
    ),
    "device": (
        replace(H100, compute_capability=(8, 0)),
        BF16,
        "precision.compute=bf16 precision.backend=te: the kernels of this recipe for Transformer Engine are those of "
        "Hopper (sm90) and Blackwell (sm100). Set precision=bf16 precision.backend=torch.",
    ),
    "cudnn_bugs": (
        replace(B200, cudnn=(9, 10, 1)),
        BF16,
        "cuDNN 9.10.1: cuDNN 9.10.0 and 9.10.1 have known bugs in attention, and Transformer Engine refuses them. "
        f"{CUDNN}",
    ),
    "cudnn_documents": (
        replace(B200, cudnn=(9, 6, 1)),
        BF16,
        "cuDNN 9.6.1: attention over documents needs cuDNN 9.6 with grouped queries, 9.1 without, and 9.7 on "
        f"Blackwell. {CUDNN}",
    ),
    "cudnn_gradients": (
        replace(H100, cudnn=(9, 17, 1)),
        BF16,
        "cuDNN 9.17.1: before 9.18 the backward pass over documents reads a workspace that nothing has set, on Hopper, "
        "and gradients become NaN. Install cuDNN 9.18 or newer, or set precision.attention=flash.",
    ),
    "kernels_in_torch": (
        H100,
        BF16 | FLASH | {"backend": "torch"},
        "precision.attention=flash: chooses among the kernels of Transformer Engine, and the torch backend has its "
        "own. Set precision.attention=auto, or precision.backend=te.",
    ),
    "no_flash_attn": (
        replace(H100, flash_attn=(2, 8, 2)),
        BF16 | FLASH,
        "precision.attention=flash (flash-attn 2.8.2): Transformer Engine 2.9 takes flash-attn 2.1.1 to 2.8.1 (from "
        "2.7.3 on Blackwell), and on Hopper flash-attn 3. Install one of these, or set precision.attention=cudnn.",
    ),
    "flash_fp8": (
        H100,
        FP8_ATTENTION | FLASH,
        "precision.attention=flash: flash-attn does not train FP8 attention in Transformer Engine. Set "
        "precision.attention=cudnn, or precision=fp8 (FP8 matrix products, BF16 attention).",
    ),
    "hopper_deterministic": (
        H100,
        BF16 | {"exchange": "p2p", "train": {"deterministic": True}},
        "train.deterministic=true (1.0 TiB of workspace on each GPU): on Hopper cuDNN's deterministic backward pass "
        "over documents keeps 2 bytes for every query and key of a rank's row, in each head and in each of at least 32 "
        "document slots. Set train.deterministic=false, or precision.attention=flash, whose backward pass repeats in "
        "linear memory.",
    ),
    "flash_deterministic": (
        replace(H100, flash_attn=(2, 4, 0)),
        BF16 | FLASH | {"train": {"deterministic": True}},
        "flash-attn 2.4.0: flash-attn before 2.4.1 has no deterministic backward pass. Install flash-attn 2.4.1 or "
        "newer, or set train.deterministic=false.",
    ),
    "cuda_blockwise": (
        replace(H100, cuda=(12, 8)),
        FP8 | {"recipe": "blockwise"},
        "precision.fp8_recipe=blockwise: blockwise scaling needs CUDA 12.9. Set precision.fp8_recipe=tensorwise.",
    ),
    "a2a_documents": (
        H100,
        BF16 | {"exchange": "a2a"},
        f"parallelism.cp_comm_type=a2a: Transformer Engine before 2.10 refuses a2a for rows with document masks. {P2P}",
    ),
    "all_gather_documents": (
        replace(H100, transformer_engine=(2, 17, 1)),
        BF16 | {"exchange": "all_gather"},
        "parallelism.cp_comm_type=all_gather: Transformer Engine before 2.18 refuses all_gather for rows with document "
        f"masks. {P2P}",
    ),
    "hierarchical_documents": (
        replace(H100, transformer_engine=(2, 18, 0)),
        BF16 | {"exchange": "a2a+p2p"},
        "parallelism.cp_comm_type=a2a+p2p: Transformer Engine before 2.19 refuses a2a+p2p for rows with document "
        f"masks. {P2P}",
    ),
    "hierarchical_in_torch": (
        CPU,
        BF16 | {"backend": "torch", "exchange": "a2a+p2p"},
        "parallelism.cp_comm_type=a2a+p2p: the exchanges of the torch backend are p2p, all_gather and a2a. " + P2P,
    ),
    "fp8_attention_blockwise": (
        H100,
        FP8_ATTENTION | {"recipe": "blockwise"},
        "precision.fp8_recipe=blockwise: blockwise scaling has no FP8 attention. Set precision.fp8_recipe=delayed, or "
        "precision=fp8 (FP8 matrix products, BF16 attention).",
    ),
    "fp8_attention_tensorwise": (
        H100,
        FP8_ATTENTION | {"recipe": "tensorwise"},
        "precision.fp8_recipe=tensorwise: Hopper's FP8 attention kernel exists for delayed scaling only (tensorwise "
        "needs Blackwell). Set precision.fp8_recipe=delayed, or precision=fp8 (FP8 matrix products, BF16 attention).",
    ),
    "fp8_attention_tensorwise_cudnn": (
        replace(B200, cudnn=(9, 13, 1)),
        FP8_ATTENTION | {"recipe": "tensorwise"},
        "precision.fp8_recipe=tensorwise: FP8 attention with tensorwise scaling needs cuDNN 9.14 on Blackwell. "
        "Set precision.fp8_recipe=delayed, or install cuDNN 9.14.",
    ),
    "fp8_head_hopper": (
        H100,
        FP8_ATTENTION | {"model": {"kv_channels": 64}},
        "model.kv_channels=64: the FP8 attention kernel of Hopper trains heads of 128 dimensions only. "
        "Set precision=fp8 (FP8 matrix products, BF16 attention).",
    ),
    "fp8_head_blackwell": (
        B200,
        FP8_ATTENTION | {"model": {"kv_channels": 136}},
        "model.kv_channels=136: the FP8 attention kernel of Blackwell trains heads of 16, 32, ... 128 dimensions. "
        "Set precision=fp8 (FP8 matrix products, BF16 attention).",
    ),
    "fp8_deterministic": (
        H100,
        FP8_ATTENTION | SHORT | {"train": {"deterministic": True}},
        "train.deterministic=true: FP8 attention has no deterministic backward pass before Transformer Engine 2.13 and "
        "cuDNN 9.19. Set train.deterministic=false.",
    ),
    "blackwell_deterministic": (
        B200,
        BF16 | {"train": {"deterministic": True}},
        "train.deterministic=true: attention has no deterministic backward pass on Blackwell before Transformer Engine "
        "2.12 and cuDNN 9.18.1. Set train.deterministic=false.",
    ),
}
# With another exchange than p2p the same stage has masked rows, which 2.14 would refuse first. A cuDNN before 9.5 is
# too old for more than its offsets.
NEVER_ALONE = {"fp8_documents", "all_gather_fp8", "cudnn_offsets"}

ALLOWED = {
    "deterministic FP8 attention, new enough": (
        replace(H100, transformer_engine=(2, 13)),
        FP8_ATTENTION | SHORT | {"train": {"deterministic": True}},
    ),
    "deterministic Blackwell, new enough": (
        replace(B200, transformer_engine=(2, 12)),
        BF16 | {"train": {"deterministic": True}},
    ),
    "deterministic flash-attn on Hopper": (H100, BF16 | FLASH | {"train": {"deterministic": True}}),
    "deterministic Hopper with 2K tokens a rank": (
        H100,
        BF16 | SHORT | {"train": {"deterministic": True}},
    ),
    "flash-attn 3 on Hopper": (replace(H100, flash_attn=None, flash_attn_3=(3, 0, 0)), BF16 | FLASH),
    "flash-attn with an old cuDNN": (replace(H100, cudnn=(9, 5, 0)), BF16 | FLASH),
    "cuDNN by name": (H100, BF16 | {"precision": {"attention": "cudnn"}}),
    "tensorwise FP8 attention on Blackwell": (B200, FP8_ATTENTION | {"recipe": "tensorwise"}),
    "heads of 64 in FP8 on Blackwell": (B200, FP8_ATTENTION | {"model": {"kv_channels": 64}}),
    "cuDNN 9.10.2 on Blackwell": (replace(B200, cudnn=(9, 10, 2)), BF16),
    "cuDNN 9.18 on Hopper": (replace(H100, cudnn=(9, 18, 0)), BF16),
    "blockwise on CUDA 12.9": (replace(H100, cuda=(12, 9)), FP8 | {"recipe": "blockwise"}),
    "a2a at CP 1": (H100, BF16 | {"parallelism": {"cp_comm_type": "a2a", "context_parallel_size": 1}}),
    "B300": (replace(B200, compute_capability=(10, 3)), BF16),
    "nothing known of cuDNN and CUDA": (ASSUMED_PLATFORM, FP8 | {"recipe": "blockwise"}),
    "BF16 on a CPU": (CPU, BF16 | {"backend": "auto"}),
    "FP32 on a GPU": (H100, BF16 | {"backend": "auto", "compute": "fp32"}),
}


def test_every_rule_is_broken_by_a_stage_of_its_own():
    assert set(BREAKS) | NEVER_ALONE == {rule.name for rule in CONSTRAINTS}


@pytest.mark.parametrize("name", BREAKS)
def test_a_rule_refuses_with_its_reason_and_nothing_else_does(name, load_run):
    platform, stage, message = BREAKS[name]
    assert outcome(configured(load_run("+exp=stage2"), **{"exchange": None} | stage), platform) == message


def test_all_gather_that_would_leave_fp8_is_refused(load_run):
    cfg = configured(load_run("+exp=stage2"), exchange="all_gather", **FP8_ATTENTION)
    silent = (
        "parallelism.cp_comm_type=all_gather: Transformer Engine before 2.15 computes in 16 bits with all_gather, "
        "without a word. Set parallelism.cp_comm_type=p2p."
    )
    before, since = (replace(H100, transformer_engine=(2, minor)) for minor in (14, 15))
    assert silent in outcome(cfg, before).splitlines()
    assert silent not in outcome(cfg, since).splitlines()


@pytest.mark.parametrize("case", ALLOWED)
def test_what_is_on_the_right_side_of_a_boundary_passes(case, load_run):
    platform, stage = ALLOWED[case]
    assert outcome(configured(load_run("+exp=stage2"), **{"exchange": None} | stage), platform) is None


BF16_ROW = te_attentions(H100)[1]
FP8_BATCH = replace(BF16_ROW, compute="fp8_attention", fp8_recipe="delayed", dtype="fp8", layout="bshd")
UNGROUPED = replace(BF16_ROW, num_query_groups=4)
# The rule, an attention, which software it is about, the last release that breaks it and the first that does not.
BOUNDARIES = [
    ("old_te", BF16_ROW, "transformer_engine", (2, 8, 9), (2, 9)),
    ("cudnn_bugs", BF16_ROW, "cudnn", (9, 10, 1), (9, 10, 2)),
    ("cudnn_documents", BF16_ROW, "cudnn", (9, 5, 9), (9, 6)),
    ("cudnn_documents", UNGROUPED, "cudnn", (9, 0, 9), (9, 1)),
    ("cudnn_offsets", replace(UNGROUPED, num_attention_heads=32), "cudnn", (9, 4, 9), (9, 5)),
    ("cudnn_gradients", BF16_ROW, "cudnn", (9, 17, 9), (9, 18)),
    ("cuda_blockwise", replace(BF16_ROW, compute="fp8", fp8_recipe="blockwise"), "cuda", (12, 8), (12, 9)),
    ("a2a_documents", replace(BF16_ROW, cp_comm_type="a2a"), "transformer_engine", (2, 9, 9), (2, 10)),
    ("all_gather_documents", replace(BF16_ROW, cp_comm_type="all_gather"), "transformer_engine", (2, 17, 9), (2, 18)),
    ("hierarchical_documents", replace(BF16_ROW, cp_comm_type="a2a+p2p"), "transformer_engine", (2, 18, 9), (2, 19)),
    ("all_gather_fp8", replace(FP8_BATCH, cp_comm_type="all_gather"), "transformer_engine", (2, 14, 9), (2, 15)),
    ("fp8_deterministic", replace(FP8_BATCH, deterministic=True), "transformer_engine", (2, 12, 9), (2, 13)),
    ("fp8_deterministic", replace(FP8_BATCH, deterministic=True), "cudnn", (9, 18, 9), (9, 19)),
]
BOUNDARIES_OF_BLACKWELL = [
    ("cudnn_documents", BF16_ROW, "cudnn", (9, 6, 9), (9, 7)),
    ("cudnn_documents", UNGROUPED, "cudnn", (9, 6, 9), (9, 7)),
    ("fp8_attention_tensorwise_cudnn", replace(FP8_BATCH, fp8_recipe="tensorwise"), "cudnn", (9, 13, 9), (9, 14)),
    ("blackwell_deterministic", replace(BF16_ROW, deterministic=True), "transformer_engine", (2, 11, 9), (2, 12)),
    ("blackwell_deterministic", replace(BF16_ROW, deterministic=True), "cudnn", (9, 18, 0), (9, 18, 1)),
]


@pytest.mark.parametrize(
    ("platform", "name", "attention", "software", "breaks", "passes"),
    [(replace(H100, transformer_engine=(2, 13)), *case) for case in BOUNDARIES]
    + [(replace(B200, transformer_engine=(2, 13)), *case) for case in BOUNDARIES_OF_BLACKWELL],
)
def test_a_rule_ends_with_the_release_that_it_names(platform, name, attention, software, breaks, passes):
    def rules_at(release):
        return {
            rule.name for rule in broken_rules(replace(attention, platform=replace(platform, **{software: release})))
        }

    assert name in rules_at(breaks) and name not in rules_at(passes)
    # What is not known is taken to be new enough. Transformer Engine is known, or it is not there.
    assert name not in rules_at(None)


@pytest.mark.parametrize("name", ["old_te", "cudnn_documents", "cuda_blockwise", "a2a_documents"])
def test_rules_of_transformer_engine_leave_torch_alone(name):
    old = Platform((2, 1), (9, 0), cudnn=(8, 9), cuda=(11, 8))
    attention = replace(BF16_ROW, compute="fp8", fp8_recipe="blockwise", cp_comm_type="a2a", platform=old)
    assert name in {rule.name for rule in broken_rules(attention)}
    torchs = replace(attention, backend=KernelBackend.TORCH)
    assert {rule.name for rule in broken_rules(torchs)} == {"fp8_in_torch"}


def test_the_attention_of_a_stage_is_that_of_one_of_its_ranks(load_run):
    stage2 = load_run("+exp=stage2")
    (row,) = attentions(stage2, H100)
    assert row == replace(
        BF16_ROW,
        cp_comm_type="p2p",
        deterministic=stage2.train.deterministic,
        max_seqlen=stage2.seq_length,
        rank_tokens=65_536,
    )
    few = configured(stage2, "te", "bf16", "tensorwise", None, model={"num_attention_heads": 8, "num_query_groups": 4})
    (row,) = attentions(few, H100)
    assert (row.num_attention_heads, row.num_query_groups, row.cp_comm_type) == (1, 1, None)
    pair = configured(stage2, "te", "bf16", "tensorwise", "a2a", parallelism={"context_parallel_size": 2})
    assert attentions(pair, H100)[0].cp_comm_type == "a2a"


def test_without_a_device_a_stage_is_checked_for_the_container(load_run):
    cfg = configured(load_run("+exp=stage2"), "te", "bf16", "tensorwise", "a2a")
    assert [str(finding) for finding in constraint_findings(cfg)] == [BREAKS["a2a_documents"][2]]


def test_a_release_that_is_not_known_is_a_question_mark():
    assert (dotted((2, 9, 1)), dotted(None)) == ("2.9.1", "?")


def test_offload_is_refused_where_auto_turns_out_to_be_torch(load_run):
    keep = {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None}
    offload = {"recompute": keep, "offload": {"cpu_offloading": True, "cpu_offloading_num_layers": 8}}
    cfg = configured(load_run("+exp=stage2"), "auto", "bf16", "tensorwise", None, precision=offload)
    assert outcome(cfg, H100) is None
    assert outcome(cfg, CPU) == (
        "precision.offload.cpu_offloading=true: Megatron does not offload with the torch backend. Set "
        "precision.offload.cpu_offloading=false precision.offload.cpu_offloading_num_layers=0, or precision.backend=te."
    )


@pytest.mark.parametrize(
    ("compute", "asked", "platform", "backend"),
    [
        ("bf16", "auto", H100, "te"),
        ("bf16", "auto", CPU, "torch"),
        ("bf16", "auto", replace(H100, transformer_engine=None), "te"),
        ("bf16", "auto", Platform(compute_capability=(8, 0)), "te"),
        ("fp32", "auto", replace(H100, transformer_engine=None), "torch"),
        ("bf16", "auto", Platform(transformer_engine=(2, 9)), "torch"),
        ("fp32", "auto", H100, "torch"),
        ("fp8", "auto", CPU, "te"),
        ("bf16", "torch", H100, "torch"),
        ("fp32", "te", CPU, "te"),
    ],
)
def test_auto_is_transformer_engine_on_every_gpu(compute, asked, platform, backend):
    precision = PrecisionConfig(compute=compute, backend=KernelBackend(asked))
    assert resolve_backend(precision, platform) == backend


PROGRAM = """
import json, runpy, sys
for overrides in json.loads(sys.argv[1]):
    sys.argv = ["scripts/train.py", "+exp=stage2", *overrides, "--cfg", "job"]
    runpy.run_path("scripts/train.py", run_name="__main__")
    print("#", len(overrides), file=sys.stderr)
print([name for name in ("torch", "transformer_engine", "megatron", "nemo") if name in sys.modules], file=sys.stderr)
"""


def test_stage_2_is_composed_and_checked_without_torch():
    precisions = [[], ["precision=fp8"], ["precision=fp8_attention"]]
    layouts = [[*overrides, "parallelism=h100_64_tp4_cp16"] for overrides in precisions]
    command = [sys.executable, "-c", PROGRAM, json.dumps(precisions + layouts)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stderr.splitlines() == ["# 0", "# 1", "# 1", "# 1", "# 2", "# 2", "[]"]
    assert done.stdout.count("backend: te") == 6 and done.stdout.count("context_parallel_size: 16") == 3
