"""The configuration files hold the recipe, number by number, and the miniature differs from it only in sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.config.experiments import experiments
from nemo_prolong.config.rules import check
from nemo_prolong.config.schema import (
    EvaluateConfig,
    ExportConfig,
    ReportConfig,
    RunConfig,
    Stage,
    Transition,
)
from nemo_prolong.config.schema.prepare import PrepareConfig

EXPERIMENTS = experiments([CONFIG_DIR], "train")
DATA_EXPERIMENTS = experiments([CONFIG_DIR], "prepare_data")
ENTRY_POINTS = {
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "report": ReportConfig,
}
SHORT_DOMAINS = {
    "fineweb-edu": 0.10,
    "fineweb-2023-50": 0.10,
    "stackexchange": 0.04,
    "dolmawiki": 0.04,
    "tuluv2": 0.03,
    "arxiv": 0.03,
    "openwebmath": 0.03,
    "textbooks": 0.03,
}
RECIPE = {
    # seq_length, rotary_base, steps, rows, peak, last, warmup, save every, transition, instruct masks
    "stage1": (65_536, 8e6, 5000, 64, 1e-5, 1e-6, 500, 125, Transition.WEIGHTS, False),
    "stage2": (524_288, 1.28e8, 2500, 16, 5e-6, 5e-7, 250, 125, Transition.WEIGHTS_AND_OPTIMIZER, False),
    "sft": (65_536, 1.28e8, 250, 64, 2e-5, 2e-6, 13, 250, Transition.WEIGHTS, True),
}
MIXTURES = {
    "stage1": {"thestackv1_concat_by_repo-65536": 0.30, "book-65536": 0.30, **SHORT_DOMAINS},
    "stage2": {
        "thestackv1_concat_by_repo-524288": 0.15,
        "thestackv1_concat_by_repo-65536": 0.15,
        "book-524288": 0.05,
        "book-65536": 0.25,
        **SHORT_DOMAINS,
    },
    "sft": {"prolong-ultrachat-64K": 1.0},
}


def overrides_for(experiment: str) -> list[str]:
    """Overrides of an experiment, with the parent that only a user can name."""
    named = load_yaml(experiment).get("parent", "") != "???" and "stage1" not in experiment.split("/")[-1]
    return [f"+exp={experiment}", *([] if named or experiment.startswith("mini/") else ["parent=hf:llama"])]


def load_yaml(experiment: str) -> dict:
    return yaml.safe_load((CONFIG_DIR / "exp" / f"{experiment}.yaml").read_text())


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_loads_and_passes_the_checks(experiment, load_run):
    check(load_run(*overrides_for(experiment)))


@pytest.mark.parametrize("experiment", DATA_EXPERIMENTS)
def test_every_data_experiment_composes_and_passes_the_rules(experiment, load_config):
    check(load_prepare(load_config, experiment))


def load_prepare(load_config, experiment: str) -> PrepareConfig:
    tokenizer = [] if experiment == "data/mini" else ["tokenizer.path=llama"]
    return load_config("prepare_data", PrepareConfig, f"+exp={experiment}", *tokenizer)


@pytest.mark.parametrize(("experiment", "stage"), [("data/prolong_64k", "stage1"), ("data/prolong_512k", "stage2")])
def test_a_data_experiment_writes_what_its_stage_takes(experiment, stage, load_config, load_run):
    prepared, cfg = load_prepare(load_config, experiment), load_run(*overrides_for(stage))
    planned = prepared.stages[stage]
    assert planned.data.mixture == cfg.data.mixture and prepared.output == cfg.data.root
    assert planned.tokens == cfg.train.train_iters * cfg.global_batch_tokens
    rows = {row_set.path: row_set for row_set in prepared.row_sets}
    assert set(rows) == {entry.path for entry in cfg.data.mixture}
    for entry in cfg.data.mixture:
        row_set, taken = rows[entry.path], entry.proportion * planned.tokens / cfg.seq_length
        assert row_set.seq_length == cfg.seq_length and taken < row_set.max_rows < 1.03 * taken + 1
        suffix = entry.path.rpartition("-")[2]
        assert row_set.document_length == (int(suffix) if suffix in ("65536", "524288") else None)


@pytest.mark.parametrize("stage", ["base", "stage1", "stage2", "sft"])
def test_the_data_of_the_miniature_knows_what_each_stage_takes(stage, load_config, load_run):
    planned, cfg = load_prepare(load_config, "data/mini").stages[stage], load_run(f"+exp=mini/{stage}")
    assert planned.data == cfg.data
    assert planned.tokens == cfg.train.train_iters * cfg.global_batch_tokens


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_every_entry_point_composes_and_passes_the_rules(name, load_config):
    check(load_config(name, ENTRY_POINTS[name]))


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_key_is_named_like_a_group_only_where_it_is_one(name):
    groups = {path.name for path in CONFIG_DIR.iterdir() if path.is_dir()}
    assert groups & ENTRY_POINTS[name].model_fields.keys() == ({"export"} if name == "export" else set())
    assert groups.isdisjoint(PrepareConfig.model_fields)


@pytest.mark.parametrize("target", [path.stem for path in (CONFIG_DIR / "export").iterdir()])
def test_every_target_of_an_export_composes_with_every_key(target, load_config, compose_config):
    cfg = load_config("export", ExportConfig, f"export={target}")
    check(cfg)
    composed = OmegaConf.to_container(compose_config("export", f"export={target}"))
    assert cfg.export.format == target and composed["export"].keys() == cfg.export.model_dump().keys()
    assert cfg.dtype == ("fp32" if target == "hf" else "bf16")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_key_of_the_schema_is_written_out(experiment, compose_config, load_run):
    composed = OmegaConf.to_container(compose_config("train", *overrides_for(experiment)))
    assert key_set(composed) == key_set(load_run(*overrides_for(experiment)).model_dump(mode="json"))


def key_set(value: object, prefix: str = "") -> set[str]:
    if not isinstance(value, dict):
        return {prefix}
    return set().union(*(key_set(item, f"{prefix}.{key}") for key, item in value.items()))


@pytest.mark.parametrize(
    "path", sorted(CONFIG_DIR.rglob("*.yaml")), ids=lambda path: path.relative_to(CONFIG_DIR).as_posix()
)
def test_every_file_starts_with_a_comment_that_says_what_it_is(path):
    first = next(line for line in path.read_text().splitlines() if not line.startswith("# @"))
    assert first.startswith("# ") and len(first) > 10


ENTRY_FILES = [CONFIG_DIR / f"{name}.yaml" for name in ("train", "prepare_data", *ENTRY_POINTS)]
EXPERIMENT_FILES = [CONFIG_DIR / "exp" / f"{name}.yaml" for name in EXPERIMENTS + DATA_EXPERIMENTS]


@pytest.mark.parametrize("path", ENTRY_FILES + EXPERIMENT_FILES, ids=lambda path: path.stem)
def test_headers_of_runnable_files_name_what_they_need(path: Path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for word in ("Purpose: ", "Command: ", "GPUs", "arent"):
        assert word in header
    if path in EXPERIMENT_FILES:
        assert "GPU-hours: " in header
        assert f"+exp={path.relative_to(CONFIG_DIR / 'exp').with_suffix('').as_posix()}" in header


@pytest.mark.parametrize("stage", RECIPE)
def test_a_full_size_stage_has_the_numbers_of_the_recipe(stage, load_run):
    cfg = load_run(*overrides_for(stage))
    length, base, steps, rows, peak, last, warmup, save, transition, masks = RECIPE[stage]
    assert (cfg.seq_length, cfg.model.rotary_base) == (length, base)
    assert (cfg.train.train_iters, cfg.train.global_batch_size, cfg.train.micro_batch_size) == (steps, rows, 1)
    assert (cfg.optim.lr, cfg.optim.min_lr, cfg.optim.lr_warmup_iters) == (peak, last, warmup)
    assert cfg.optim.min_lr == pytest.approx(cfg.optim.lr / 10)
    assert (cfg.optim.adam_beta1, cfg.optim.adam_beta2, cfg.optim.adam_eps) == (0.9, 0.95, 1e-8)
    assert (cfg.optim.weight_decay, cfg.optim.clip_grad) == (0.1, 1.0)
    assert (cfg.stage, cfg.transition, cfg.data.apply_instruct_masks) == (Stage(stage), transition, masks)
    assert cfg.precision.compute == "bf16" and cfg.precision.recompute.recompute_granularity == "auto"
    assert (cfg.checkpoint.save_interval_steps, cfg.data.num_workers) == (save, 1)


@pytest.mark.parametrize(
    ("stage", "tokens"), [("stage1", 20_971_520_000), ("stage2", 20_971_520_000), ("sft", 1_048_576_000)]
)
def test_a_full_size_stage_trains_on_the_tokens_of_the_recipe(stage, tokens, load_run):
    cfg = load_run(*overrides_for(stage))
    assert cfg.global_batch_tokens * cfg.train.train_iters == tokens


@pytest.mark.parametrize("stage", MIXTURES)
def test_a_full_size_stage_draws_the_published_proportions(stage, load_run):
    cfg = load_run(*overrides_for(stage))
    assert {entry.path: entry.proportion for entry in cfg.data.mixture} == MIXTURES[stage]


def test_the_full_size_stages_chain_up_to_sft(load_run):
    stage2, sft = load_run("+exp=stage2"), load_run("+exp=sft")
    assert stage2.parent == load_run(*overrides_for("stage1")).run_dir
    assert sft.parent == stage2.run_dir
    assert sft.advertised_context_length == stage2.seq_length
    assert sft.model.rotary_base == stage2.model.rotary_base


def test_the_model_is_llama_3_8b_instruct(load_run):
    model = load_run("+exp=stage2").model
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size, model.vocab_size) == (32, 4096, 14336, 128_256)
    assert (model.num_attention_heads, model.num_query_groups, model.kv_channels) == (32, 8, 128)
    assert yaml.safe_load((CONFIG_DIR / "model/llama3_8b_instruct.yaml").read_text())["rotary_base"] == 5e5


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_vocabulary_of_llama_3_is_padded_at_no_legal_tp(tp, load_run):
    assert load_run("+exp=stage2").model.padded_vocab_size(tp) == 128_256


def test_the_learning_rate_of_the_paper_is_an_ablation(load_run):
    script, paper = load_run("+exp=stage2"), load_run("+exp=ablation/stage2_paper_lr")
    assert (paper.optim.lr, paper.optim.min_lr) == (1e-5, 1e-6)
    same = {"name": script.name, "optim": script.optim}
    assert paper.model_copy(update=same) == script


@pytest.mark.parametrize(
    ("ablation", "stage", "changes"),
    [
        ("stage1_per_device_loss", "stage1", {"train": {"loss_average": "per_device"}}),
        ("stage2_fp8", "stage2", {"precision": {"compute": "fp8", "backend": "te"}}),
        (
            "stage2_fp8_attention",
            "stage2",
            {
                "precision": {"compute": "fp8_attention", "fp8_recipe": "delayed", "backend": "te"},
                "train": {"deterministic": False},
            },
        ),
    ],
)
def test_an_ablation_of_loss_or_precision_changes_nothing_else(ablation, stage, changes, load_run):
    expected = load_run(*overrides_for(stage)).model_dump()
    for section, values in changes.items():
        expected[section] |= values
    assert load_run(*overrides_for(f"ablation/{ablation}")).model_dump() == expected | {"name": f"ablation/{ablation}"}


@pytest.mark.parametrize(
    ("ablation", "base", "tokens"),
    [
        ("stage1_rope_0.5e6", 5e5, 5e9),
        ("stage1_rope_4e6", 4e6, 5e9),
        ("stage1_rope_8e6", 8e6, 5e9),
        ("stage2_rope_64e6", 6.4e7, 5e9),
        ("stage2_rope_128e6", 1.28e8, 5e9),
        ("stage2_rope_256e6", 2.56e8, 5e9),
    ],
)
def test_a_rope_ablation_has_the_base_of_its_name(ablation, base, tokens, load_run):
    cfg = load_run(*overrides_for(f"ablation/{ablation}"))
    assert cfg.model.rotary_base == base
    assert cfg.global_batch_tokens * cfg.train.train_iters == pytest.approx(tokens, rel=0.06)
    assert cfg.optim.lr_warmup_iters == -(-cfg.train.train_iters // 10)


@pytest.mark.parametrize("stage", ["stage1", "stage2", "sft"])
def test_a_miniature_file_has_the_keys_of_its_big_brother(stage):
    big, mini = load_yaml(stage), load_yaml(f"mini/{stage}")
    big_keys, mini_keys = (key_set({k: v for k, v in file.items() if k != "defaults"}) for file in (big, mini))
    # At full size nothing is validated and every step is logged, which are the defaults.
    rhythm = {f".train.{key}" for key in ("val_check_interval", "limit_val_batches", "log_every_n_steps")}
    # A miniature runs anywhere and repeats its bits. At full size that would cost speed, or more memory than there is.
    kernels = {".precision.backend", ".train.deterministic"}
    assert (mini_keys - big_keys, big_keys - mini_keys) == (rhythm, kernels)
    assert [set(entry) for entry in big["defaults"]] == [set(entry) for entry in mini["defaults"]]
    assert (mini["stage"], mini["transition"]) == (big["stage"], big["transition"])


def test_full_size_names_its_kernels_and_a_miniature_repeats_its_bits(load_run):
    stages = [file for file in CONFIG_DIR.glob("exp/**/*.yaml") if "# @script recipe" not in file.read_text()]
    files = [file.relative_to(CONFIG_DIR / "exp").with_suffix("") for file in stages]
    full = [str(name) for name in files if name.parent.name in ("", "ablation")]
    assert len(full) == 14
    for cfg in (load_run(*overrides_for(name)) for name in full):
        assert (cfg.precision.backend, cfg.precision.attention, cfg.train.deterministic) == ("te", "auto", False)
    for stage in ("base", "stage1", "stage2", "sft"):
        mini = load_run(f"+exp=mini/{stage}")
        assert (mini.precision.backend, mini.train.deterministic) == ("auto", True)


@pytest.mark.parametrize("stage", ["stage1", "stage2", "sft"])
def test_a_miniature_mixture_has_the_shares_of_full_size(stage, load_run):
    def shares(cfg: RunConfig) -> dict[str, float]:
        kinds = {"thestack": "code", "code_by_repo": "code", "book": "books", "reference": "books"}
        totals: dict[str, float] = {}
        for entry in cfg.data.mixture:
            kind = next((kind for start, kind in kinds.items() if entry.path.startswith(start)), "short")
            totals[kind] = totals.get(kind, 0.0) + entry.proportion
        return totals

    assert shares(load_run(f"+exp=mini/{stage}")) == pytest.approx(shares(load_run(*overrides_for(stage))))


def test_prepare_data_writes_what_miniature_stages_read(load_run, load_config):
    prepared = load_prepare(load_config, "data/mini")
    evaluated = load_config("evaluate", EvaluateConfig)
    stages = [load_run(f"+exp=mini/{stage}") for stage in ("base", "stage1", "stage2", "sft")]
    lengths = {row_set.path: row_set.seq_length for row_set in prepared.row_sets}
    used = set()
    for cfg in stages:
        assert cfg.data.root == prepared.output and cfg.model.vocab_size == prepared.tokenizer.vocab_size
        for path in [*(entry.path for entry in cfg.data.mixture), *cfg.data.validation]:
            assert lengths[path] == cfg.seq_length
            used.add(path)
    assert used == set(lengths)
    assert evaluated.rows == f"{prepared.output}/validation-8192"


def test_the_miniature_stages_chain_where_scripts_look(load_run):
    stages = [load_run(f"+exp=mini/{s}") for s in ("base", "stage1", "stage2", "sft")]
    runs = [cfg.run_dir for cfg in stages]
    assert runs == ["runs/demo/base", "runs/demo/stage1", "runs/demo/stage2", "runs/demo/sft"]
    assert [cfg.parent for cfg in stages] == [None, *runs[:-1]]
    assert stages[3].advertised_context_length == stages[2].seq_length
    assert stages[3].model.rotary_base == stages[2].model.rotary_base


def test_what_is_typed_wins_over_experiments_and_these_over_groups(load_run):
    cfg = load_run("+exp=stage2", "parallelism=h100_64_tp4_cp16", "optim.lr=1e-6", "seq_length=256K")
    assert cfg.parallelism.context_parallel_size == 16
    assert (cfg.optim.lr, cfg.optim.lr_warmup_iters, cfg.seq_length) == (1e-6, 250, 262_144)
    assert cfg.model.rotary_base == 1.28e8
