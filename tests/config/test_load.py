"""The loader takes what the schema says and nothing else, and says what is wrong with the rest."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from nemo_prolong.config.findings import ConfigErrors
from nemo_prolong.config.load import load
from nemo_prolong.config.schema import EvaluateConfig, RunConfig
from nemo_prolong.config.schema.prepare import PrepareConfig
from nemo_prolong.errors import ConfigError

MESSAGES = {
    "+model.new=1": "model.new=1: no such key in model. Keys of model: name, nemo_config, num_layers, hidden_size, "
    "ffn_hidden_size, num_attention_heads, num_query_groups, kv_channels, vocab_size, make_vocab_size_divisible_by, "
    "rotary_base, rope_scaling, layernorm_epsilon, init_method_std, share_embeddings_and_output_weights, license.",
    "+optim.min_lrr=1": "optim.min_lrr=1: no such key in optim. Did you mean optim.min_lr=1?",
    "+modle.num_layers=2": "modle: no such key in the configuration. Did you mean model?",
    "+lr=1": "lr=1: no such key in the configuration. Did you mean optim.lr=1?",
    "+parallelism.tp=2": "parallelism.tp=2: no such key in parallelism. "
    "Did you mean parallelism.tensor_model_parallel_size=2?",
    "+model.rope_theta=8e6": "model.rope_theta=8000000.0: no such key in model. "
    "Did you mean model.rotary_base=8000000.0?",
    "+data.mixture=[{path:x,proportion:1,share:1}]": "data.mixture[0].share=1: no such key in data.mixture[0]. "
    "Keys of data.mixture[0]: path, proportion.",
    "train.train_iters=abc": "train.train_iters=abc: must be a whole number. "
    "Set train.train_iters=N (optimizer steps).",
    "train.train_iters=10.0": "train.train_iters=10.0: must be a whole number. "
    "Set train.train_iters=N (optimizer steps).",
    "train.train_iters='10'": "train.train_iters=10: must be a whole number. "
    "Set train.train_iters=N (optimizer steps).",
    "train.train_iters=true": "train.train_iters=true: must be a whole number. "
    "Set train.train_iters=N (optimizer steps).",
    "train.global_batch_size=0": "train.global_batch_size=0: must be greater than 0. "
    "Set train.global_batch_size=1 (packed rows per optimizer step, over all data-parallel ranks).",
    "optim.lr=fast": "optim.lr=fast: must be a number. Set optim.lr=X (peak learning rate).",
    "optim.lr=.inf": "optim.lr=.inf: must be a number. Set optim.lr=X (peak learning rate).",
    "optim.lr=inf": "optim.lr=Infinity: must be a finite number. Set optim.lr=X (peak learning rate).",
    "optim.min_lr=-1": "optim.min_lr=-1: must be at least 0.0. Set optim.min_lr=0.0 (learning rate at the last step).",
    "data.apply_instruct_masks=1": "data.apply_instruct_masks=1: must be true or false. "
    "Set data.apply_instruct_masks=true|false (train only on tokens whose mask column is 1).",
    "stage=stage3": "stage=stage3: must be one of base, stage1, stage2, sft. Set stage=stage2 (which stage this is).",
    "precision.compute=fp16": "precision.compute=fp16: must be one of fp32, bf16, fp8, fp8_attention. "
    "Set precision.compute=bf16 (number format; fp8 is FP8 matrix products and BF16 attention).",
    "seq_length=64k tokens": "seq_length=64k tokens: is not a size (write a whole number, or one with K, M, B or T "
    "such as 64K). Set seq_length=64K (tokens in one packed row).",
    "seq_length=65536.0": "seq_length=65536.0: is not a size (write a whole number, or one with K, M, B or T such "
    "as 64K). Set seq_length=65536 (tokens in one packed row).",
    "seq_length=0K": "seq_length=0K: must be greater than 0. Set seq_length=1 (tokens in one packed row).",
    "precision.recompute=full": "precision.recompute=full: must be a section with the keys recompute_granularity, "
    "recompute_method, recompute_num_layers, recompute_modules, distribute_saved_activations. "
    "Set precision.recompute={...}.",
    "data.mixture=[]": "data.mixture=[]: must not be empty. "
    "Set data.mixture=[...] (training directories; proportions sum to 1).",
    "cluster.time_limit=4h": "cluster.time_limit=4h: does not have the right form. Set cluster.time_limit=04:00:00 "
    "(wall time of one job, HH:MM:SS or D-HH:MM:SS; the stage goes on in the next job).",
    "name=???": "name=???: must be set and has no default. Set name=VALUE (directory of the run below runs_dir).",
    "advertised_context_length=${seq_lenght}": "advertised_context_length=${seq_lenght}: refers to seq_lenght, "
    "which does not exist. Did you mean ${seq_length}?",
}


@pytest.mark.parametrize("override", MESSAGES)
def test_a_wrong_value_or_key_is_refused_with_its_remedy(override, load_run):
    with pytest.raises(ConfigError) as refusal:
        load_run("+exp=mini/base", override)
    assert str(refusal.value) == MESSAGES[override]


def test_all_mistakes_are_reported_in_one_message_one_per_line(load_run):
    with pytest.raises(ConfigErrors) as refusal:
        load_run("+exp=stage1", "+foo=1", "optim.lr=fast", "seq_length=4 thousand")
    lines = str(refusal.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "parent=???",
        "seq_length=4 thousand",
        "optim.lr=fast",
        "foo=1",
    ]
    assert (refusal.value.what, refusal.value.exit_code) == ("parent=???", 2)


def test_a_missing_parent_says_what_a_parent_is(load_run):
    with pytest.raises(ConfigError) as refusal:
        load_run("+exp=stage1")
    assert str(refusal.value) == (
        "parent=???: must be set and has no default. "
        "Set parent=VALUE (run directory the stage starts from, or hf:DIR for a Hugging Face directory)."
    )


@pytest.mark.parametrize(
    ("typed", "tokens"), [("64K", 65_536), ("512k", 524_288), ("65_536", 65_536), ("1.5M", 1_572_864), ("4096", 4096)]
)
def test_a_length_may_be_typed_with_a_binary_suffix(typed, tokens, load_run):
    assert load_run("+exp=mini/base", f"seq_length={typed}").seq_length == tokens


def test_sizes_are_read_wherever_the_schema_says_size(load_config):
    cfg = load_config(
        "prepare_data", PrepareConfig, "+exp=data/mini", "tokenizer.train_bytes=20B", "row_sets.3.document_length=1K"
    )
    assert cfg.tokenizer.train_bytes == 20 * 2**30
    assert cfg.row_sets[3].document_length == 1024
    lengths = load_config("evaluate", EvaluateConfig, "recall_lengths=[64K,512K]").recall_lengths
    assert lengths == [65_536, 524_288]


def test_numbers_keep_every_digit_from_command_to_schema(load_run):
    cfg = load_run("+exp=mini/base", "optim.lr=1.2345678901234567e-05", "model.rotary_base=128000000")
    assert cfg.optim.lr == 1.2345678901234567e-05
    assert cfg.model.rotary_base == 128_000_000.0


def test_an_interpolation_takes_the_value_it_points_to(load_run):
    assert load_run("+exp=mini/base", "advertised_context_length=${seq_length}").advertised_context_length == 512


def test_an_unresolved_interpolation_keeps_the_reason(load_run):
    with pytest.raises(ConfigError, match=r"cannot be resolved: .*Environment variable 'NO_SUCH_VARIABLE' not found"):
        load_run("+exp=mini/base", "name=${oc.env:NO_SUCH_VARIABLE}")


def test_a_resolved_configuration_loads_to_itself(load_run):
    cfg = load_run("+exp=mini/stage2")
    assert load(OmegaConf.create(cfg.model_dump(mode="json")), RunConfig) == cfg


def test_a_loaded_configuration_cannot_be_changed(load_run):
    with pytest.raises(ValueError, match="frozen"):
        load_run("+exp=mini/base").seq_length = 1
