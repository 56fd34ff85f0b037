"""The scripts refuse a mistake with one message and its exit code, before torch is imported, and leave no traces."""

from __future__ import annotations

import logging
import os
import re
import resource
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_prolong.config.cli import hydra_script
from nemo_prolong.config.compose import CONFIG_DIR
from nemo_prolong.config.defaults import ENTRY_POINTS
from nemo_prolong.config.experiments import declared_script, experiments
from nemo_prolong.config.schema import EvaluateConfig, RunConfig
from nemo_prolong.config.schema.prepare import PrepareConfig
from nemo_prolong.config.schema.recipe import RecipeConfig
from nemo_prolong.errors import CheckpointError
from nemo_prolong.launch.parts import recipe_arguments
from tests.support.launcher_variables import slurm_task, without_launcher

REPOSITORY = CONFIG_DIR.parent
TRAIN = REPOSITORY / "scripts" / "train.py"
ALL_EXPERIMENTS = ", ".join(experiments([CONFIG_DIR], "train"))
TP = "parallelism.tensor_model_parallel_size"

REFUSALS = {
    "+exp=stag2": f"+exp=stag2: no such experiment. Did you mean +exp=stage2? Available: {ALL_EXPERIMENTS}.",
    "+exp=mini/stge1": f"+exp=mini/stge1: no such experiment. Did you mean +exp=mini/stage1? "
    f"Available: {ALL_EXPERIMENTS}.",
    "exp=stage2": "exp=stage2: an experiment is added to the configuration, which takes a plus sign. Type +exp=stage2.",
    "exp=mini/stage1": "exp=mini/stage1: an experiment is added to the configuration, which takes a plus sign. "
    "Type +exp=mini/stage1.",
    "exp=stag2": f"+exp=stag2: no such experiment. Did you mean +exp=stage2? Available: {ALL_EXPERIMENTS}.",
    "+exp=stage2 exp/mini=base": "exp/mini=base: an experiment is added to the configuration, which takes a plus sign. "
    "Type +exp=mini/base.",
    "+expp=stage2": "+expp=stage2: no such group as expp. Did you mean +exp=stage2?",
    "": f"+exp=???: an experiment must be chosen. Type +exp=NAME, one of: {ALL_EXPERIMENTS}.",
    "+exp=data/mini": f"+exp=data/mini: is an experiment of scripts/prepare_data.py. "
    f"Type +exp=NAME, one of: {ALL_EXPERIMENTS}.",
    "+exp=mini/base +exp=mini/sft": "+exp=mini/base +exp=mini/sft: only one exp can be chosen. "
    "Keep one, e.g. +exp=mini/base.",
    "+exp=mini/base modell=mini": "modell=mini: no such key in the configuration. Did you mean model=mini?",
    "+exp=mini/base model=minni": "model=minni: no such file in the group model. Did you mean model=mini? "
    "Available: llama3_1_8b_instruct, llama3_8b, llama3_8b_instruct, mini.",
    "+exp=mini/base parallelism=3": "parallelism=3: a group is chosen by the name of a file. "
    "Run the script with --help to see all groups and keys.",
    "+exp=mini/base seq_lenght=4K": "seq_lenght=4K: no such key in the configuration. Did you mean seq_length=4K?",
    "+exp=mini/base tracker.wandb.project=p": "tracker.wandb.project=p: tracker.wandb is null here. "
    "Set it whole: tracker.wandb={project:p}.",
    "+exp=mini/base modle.num_layers=2": "modle.num_layers=2: no such key in modle. Did you mean model.num_layers=2?",
    "+exp=mini/base +optim.lrr=1": "optim.lrr=1: no such key in optim. Did you mean optim.lr=1?",
    "+exp=mini/base +seed=1": "+seed=1: is set already; the plus adds what is not there. Type seed=1.",
    "+exp=mini/base ~nothing": "~nothing: Could not delete from config. 'nothing' does not exist. "
    "Run the script with --help to see all groups and keys.",
    "+exp=mini/base seed": "seed: is not an override Hydra can read (Error parsing override 'seed'). "
    "To set it, write seed=VALUE.",
    "+exp=mini/base data.validation=a,b": "data.validation=a,b: a list is written in brackets. "
    "Type 'data.validation=[a,b]'.",
    "+exp=mini/base hydra.job.chdir=abc": "hydra.job.chdir=abc: Value 'abc' is not a valid bool (type str). "
    "Run the script with --help to see all groups and keys.",
    "+exp=mini/base seq_length=64k_tokens": "seq_length=64k_tokens: is not a size (write a whole number, or one with "
    "K, M, B or T such as 64K). Set seq_length=64K (tokens in one packed row).",
    "+exp=mini/base seq_length=1001 parallelism.context_parallel_size=2": "seq_length=1001: must be a multiple of 4 "
    "(2*CP, because every CP rank takes two pieces of a row). Set seq_length=1000, or "
    "parallelism.context_parallel_size=1.",
    f"+exp=mini/stage1 {TP}=2": "parallelism=TP 2 x PP 1 x CP 1: needs a multiple of 2 ranks, and 1 rank was "
    f"started. Start it with: torchrun --nproc-per-node 2 scripts/train.py +exp=mini/stage1 {TP}=2",
    "+exp=stage1": "parent=???: must be set and has no default. "
    "Set parent=VALUE (run directory the stage starts from, or hf:DIR for a Hugging Face directory).",
    "+exp=mini/base --multirun": "--multirun: one process trains one stage: its parallel state cannot be built twice. "
    "Start one command per run.",
    "+exp=mini/base hydra.mode=MULTIRUN": "hydra.mode=MULTIRUN: one process trains one stage: its parallel state "
    "cannot be built twice. Start one command per run.",
    "--experimental-rerun=job.pickle": "--experimental-rerun: unpickles a file, which could run any code. "
    "Repeat the command instead; <run>/overrides.txt holds what was typed.",
    "+exp=mini/base --config-dir=/no/such/place": "--config-dir: Additional config directory '/no/such/place' not "
    "found. Give a directory that exists.",
    "--config-name=trian": "--config-name trian: Cannot find primary config 'trian'. Check that it's in your config "
    "search path. Run the script with --help to see all groups and keys.",
    "--cfg=job": f"+exp=???: an experiment must be chosen. Type +exp=NAME, one of: {ALL_EXPERIMENTS}.",
    "+exp=stage1 seq_lenght=4K --cfg=job": "seq_lenght=4K: no such key in the configuration. "
    "Did you mean seq_length=4K?",
    "+exp=stage1 seq_length=65540 optim.lr=fast --cfg=job": "optim.lr=fast: must be a number. "
    "Set optim.lr=X (peak learning rate).",
    "+exp=stage1 seq_length=65540 --cfg=job": "seq_length=65540: must be a multiple of 8 (both 2*CP and CP*TP). "
    "Set seq_length=64K, or parallelism.context_parallel_size=1.",
    "+exp=mini/base --resolve": "--resolve: changes what --cfg and --help print. Add --cfg job.",
    "+exp=mini/base --run --cfg=job": "--run --cfg: a script does one of them. Keep one, e.g. --run.",
    "--config-path=/no/such/place": "--config-path: Primary config directory not found. "
    "Run the script with --help to see all groups and keys.",
}


@pytest.fixture
def run_train(monkeypatch, tmp_path, capsys):
    """Run scripts/train.py in this process, from another directory; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ.keys() - without_launcher().keys():
        monkeypatch.delenv(name)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(TRAIN), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TRAIN), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    yield run
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("typed", REFUSALS)
def test_a_mistake_is_one_message_and_exit_code_2(typed, run_train):
    assert run_train(*typed.split()) == (2, "", f"{REFUSALS[typed]}\n")


def test_a_size_with_a_word_behind_it_is_refused(run_train):
    _, _, message = run_train("+exp=mini/base", "seq_length=64k tokens")
    assert message.startswith("seq_length=64k tokens: is not a size (")
    assert message.endswith(" Set seq_length=64K (tokens in one packed row).\n")


def test_several_mistakes_are_several_lines_of_one_message(run_train):
    code, _, message = run_train("+exp=mini/base", "optim.lr=a", "seed=b", "train.train_iters=c")
    assert code == 2
    assert [line.split(":")[0] for line in message.splitlines()] == ["seed=b", "train.train_iters=c", "optim.lr=a"]


def test_other_ranks_exit_silently_with_the_same_code(run_train, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run_train("+exp=stag2") == (2, "", "")
    monkeypatch.setenv("RANK", "0")
    assert run_train("+exp=stag2")[2].startswith("+exp=stag2: ")


def test_a_rank_that_its_launcher_contradicts_says_so_whatever_its_number():
    message = "LOCAL_RANK and WORLD_SIZE and LOCAL_WORLD_SIZE and MASTER_ADDR and MASTER_PORT are missing."
    for rank, text in (("1", f"RANK=1: {message} "), ("x", "RANK=x: is not a whole number. ")):
        done = start_train(without_launcher() | {"RANK": rank})
        assert done.returncode == 2
        assert done.stderr.startswith(text) and len(done.stderr.splitlines()) == 1


def test_refusals_are_quick_and_without_traceback_or_torch():
    probe = (
        "import runpy, sys, nemo_prolong.launch.slurm, nemo_prolong.plan.flops\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    assert 'torch' not in sys.modules and 'nemo_prolong.stages.run' not in sys.modules\n"
    )
    for typed, code in (("+exp=mini/stage1 seq_lenght=4K", 2), ("+exp=stag2", 2), (f"+exp=mini/stage1 {TP}=2", 2)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        # `python -c` replaces sys.argv[0], so the probe sets it.
        command = [sys.executable, "-c", f"import sys; sys.argv[0] = {str(TRAIN)!r}\n{probe}", *typed.split()]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=plain_environment(), check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr == f"{REFUSALS[typed]}\n" if typed in REFUSALS else "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) == 1
        # Processor time, so that a busy machine does not fail the test.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


def start_train(environment: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/train.py on rows that do not exist, which is refused by every rank before it imports torch."""
    typed = ["+exp=mini/base", "data.root=/no/such/place", "train.global_batch_size=4", *more]
    return subprocess.run(
        [sys.executable, str(TRAIN), *typed], capture_output=True, text=True, cwd="/", env=environment, check=False
    )


def test_ranks_that_the_script_started_refuse_as_one_process_does():
    done = start_train(without_launcher(), "parallelism.ranks_per_node=2")
    assert done.returncode == 3
    assert done.stderr.startswith("data.root=/no/such/place: ") and len(done.stderr.splitlines()) == 1


def test_a_task_of_srun_is_a_rank_and_starts_no_others():
    tasks = [slurm_task(rank, nodes=2, tasks_per_node=1, job=7) for rank in range(2)]
    # More are planned than there are. The launcher decides.
    ends = [start_train(without_launcher() | task, "parallelism.ranks_per_node=4") for task in tasks]
    assert [end.returncode for end in ends] == [3, 3]
    assert [len(end.stderr.splitlines()) for end in ends] == [1, 0]
    three = without_launcher() | slurm_task(0, nodes=3, tasks_per_node=1, job=7)
    assert start_train(three).stderr.startswith(
        "train.global_batch_size=4: must be a multiple of micro_batch_size * DP"
    )


def plain_environment() -> dict[str, str]:
    return {name: value for name, value in without_launcher().items() if name != "HYDRA_FULL_ERROR"}


@pytest.mark.parametrize("script", ["train", "prepare_data", "evaluate", "export", "report", "launch"])
def test_every_script_explains_itself(script):
    command = [sys.executable, str(REPOSITORY / "scripts" / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=plain_environment(), check=True)
    description, _, rest = done.stdout.partition("\n\nExamples:\n")
    examples, _, rest = rest.partition("\n\n== Groups")
    assert len(description) > 60 and f"python scripts/{script}.py" in examples
    assert "== Keys: set any of them with key=value" in rest and "powered by" not in rest
    assert done.stderr == ""


@pytest.mark.parametrize("script", ["train", "prepare_data", "evaluate", "export", "report", "recipe", "launch"])
def test_every_example_of_the_help_passes_the_rules(script, monkeypatch):
    module = runpy.run_path(str(REPOSITORY / "scripts" / f"{script}.py"))
    schema = next(value for value in module.values() if isinstance(value, type) and value.__name__.endswith("Config"))
    name = "train" if schema is RunConfig else script
    for example in module["EXAMPLES"]:
        arguments = shlex.split(re.split(r" > |  +#", example)[0].partition(".py")[2])
        recipe = recipe_arguments(arguments) if script == "launch" else None
        if recipe is not None:
            hydra_script(RecipeConfig, "recipe", lambda cfg, overrides: None, "", [], arguments=recipe)
        elif "--cfg" not in arguments:
            monkeypatch.setattr(sys, "argv", ["script", *arguments])
            hydra_script(schema, name, lambda cfg, overrides: None, "", [])


def test_a_closed_pipe_of_the_help_is_no_traceback():
    script = Path(__file__).parents[2] / "scripts" / "train.py"
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(script))} --help | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=plain_environment(), check=True)
    assert done.stdout == "Train one " and done.stderr == ""


def test_cfg_job_prints_all_of_stage_2_and_runs_nothing(monkeypatch, capsys, tmp_path):
    cfg = printed_config(monkeypatch, capsys, tmp_path, "train", "+exp=stage2")
    assert (cfg["seq_length"], cfg["train"]["global_batch_size"], cfg["stage"]) == ("512K", 16, "stage2")
    assert next(iter(cfg)) == "stage"


def printed_config(monkeypatch, capsys, directory: Path, script: str, *arguments: str) -> dict:
    """Run a script with ``--cfg job`` from an empty directory; return what it prints, which is all it may do."""
    monkeypatch.chdir(directory)
    path = REPOSITORY / "scripts" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *arguments, "--cfg", "job"])
    runpy.run_path(str(path), run_name="__main__")
    printed, message = capsys.readouterr()
    assert (message, list(directory.iterdir())) == ("", [])
    return yaml.safe_load(printed)


INCOMPLETE = {
    "train +exp=stage1": {"parent"},
    "launch +exp=stage1": {"parent"},
    "train +exp=mini/base tracker=mlflow name=???": {"name", "tracker.mlflow.tracking_uri"},
    "prepare_data": {"output", "sources", "row_sets"},
    "prepare_data +exp=data/prolong_64k output=???": {"output"},
    "recipe": {"stages"},
    "evaluate rows=???": {"rows"},
    "export run=???": {"run"},
    "report output=???": {"output"},
}


@pytest.mark.parametrize("typed", INCOMPLETE)
def test_cfg_job_prints_what_is_missing_as_question_marks(typed, monkeypatch, capsys, tmp_path):
    cfg = printed_config(monkeypatch, capsys, tmp_path, *typed.split())
    assert OmegaConf.missing_keys(OmegaConf.create(cfg)) == INCOMPLETE[typed]


def test_a_configuration_without_a_tokenizer_is_printed_not_run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "+exp=data/prolong_64k"])
    with pytest.raises(SystemExit) as end:
        hydra_script(PrepareConfig, "prepare_data", lambda cfg, overrides: None, "", [])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("tokenizer.path=null: there is no tokenizer, and nothing says what ")


def test_a_value_of_hydra_s_own_can_be_referred_to(monkeypatch):
    name = "name=${hydra:runtime.choices.precision}"
    cfg, overrides = compose(monkeypatch, "+exp=mini/base", name, "hydra.verbose=true")
    assert (cfg.name, overrides) == ("fp32", ["+exp=mini/base", name])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--info searchpath +exp=mini/base", f"| main     | file://{CONFIG_DIR} |"),
        ("--hydra-help", "Hydra (1.3.8)"),
        ("--cfg hydra +exp=mini/base", "    name: train"),
        ("--cfg all +exp=mini/base -p optim", "# @package optim"),
        ("--shell-completion query=bash", "model=mini"),
    ],
)
def test_what_hydra_prints_of_itself_is_still_there(arguments, line):
    typed = "python scripts/train.py model="
    environment = {**plain_environment(), "COMP_LINE": typed, "COMP_POINT": str(len(typed))}
    command = [sys.executable, str(TRAIN), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert line in done.stdout and done.stderr == ""


def own_experiment(directory: Path, header: str) -> Path:
    """Write an experiment of a user's own below ``directory``."""
    path = directory / "exp" / "data" / "own.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"# @package _global_\n{header}defaults:\n  - /exp/mini/base\n")
    return path


@pytest.mark.parametrize("header", ["", "# @script train\n"])
def test_an_experiment_is_for_the_script_of_its_header(header, monkeypatch, tmp_path):
    own_experiment(tmp_path, header)
    cfg, _ = compose(monkeypatch, "+exp=data/own", "--config-dir", str(tmp_path))
    assert cfg.name == "demo/base"


def test_an_experiment_is_refused_for_what_its_header_says(monkeypatch, tmp_path, capsys):
    own_experiment(tmp_path, "# @script export\n")
    with pytest.raises(SystemExit):
        compose(monkeypatch, "+exp=data/own", "--config-dir", str(tmp_path))
    assert capsys.readouterr().err.startswith("+exp=data/own: is an experiment of scripts/export.py. Type +exp=NAME, ")


def test_every_experiment_of_this_repository_says_which_script_it_is_for():
    files = [path for path in (CONFIG_DIR / "exp").rglob("*.yaml") if declared_script(path) not in ENTRY_POINTS]
    assert files == []


def compose(monkeypatch, *arguments: str) -> tuple[RunConfig, list[str]]:
    """Run ``hydra_script`` and return what the task was called with."""
    received = []
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    hydra_script(RunConfig, "train", lambda cfg, overrides: received.append((cfg, overrides)), "", [])
    return received[0]


def test_the_task_gets_configuration_and_overrides_as_typed(monkeypatch):
    cfg, overrides = compose(monkeypatch, "+exp=mini/stage1", "seq_length=4K", "name=try")
    assert (type(cfg), cfg.seq_length, cfg.name) == (RunConfig, 4096, "try")
    assert overrides == ["+exp=mini/stage1", "seq_length=4K", "name=try"]


def test_hydra_leaves_directories_and_logging_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    before = (list(logging.getLogger().handlers), logging.getLogger().level)
    compose(monkeypatch, "+exp=mini/stage1")
    assert (list(logging.getLogger().handlers), logging.getLogger().level) == before
    assert (Path.cwd(), list(tmp_path.iterdir())) == (tmp_path, [])
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_experiments_of_one_s_own_are_found_with_config_dir(monkeypatch, tmp_path):
    (tmp_path / "exp").mkdir()
    own = "# @package _global_\ndefaults:\n  - /exp/mini/base\n  - _self_\nname: own\n"
    (tmp_path / "exp" / "own.yaml").write_text(own)
    cfg, _ = compose(monkeypatch, "+exp=own", "--config-dir", str(tmp_path))
    assert (cfg.name, cfg.seq_length) == ("own", 512)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle:\n  num_layers: 2\n", "modle: no such key in the configuration. Did you mean model?"),
        ("name: [unclosed\n", r".*own.yaml:\d+: is not valid YAML: .*"),
        (
            "defaults:\n  - /exp/mini/base\n  - override /modle: mini\n",
            r"modle \(in conf/exp/own.yaml\): no such key in the configuration. Did you mean model\?",
        ),
        (
            "defaults:\n  - /exp/mini/base\n  - override /model: minni\n",
            r"model=minni.*: no such file in the group model. Did you mean model=mini\? Available: .*",
        ),
        ("defaults:\n  - /exp/mini/base\nparent: ${parrent}\n", r"parent=\$\{parrent\}: refers to parrent, which .*"),
    ],
)
def test_a_mistake_in_an_experiment_file_is_refused_too(text, message, monkeypatch, tmp_path, capsys):
    (tmp_path / "exp").mkdir()
    head = "# @package _global_\n" + ("" if "defaults" in text else "defaults:\n  - /exp/mini/base\n  - _self_\n")
    (tmp_path / "exp" / "own.yaml").write_text(head + text)
    with pytest.raises(SystemExit) as end:
        compose(monkeypatch, "+exp=own", f"--config-dir={tmp_path}")
    assert end.value.code == 2
    assert re.fullmatch(message.replace("model?", r"model\?"), capsys.readouterr().err.strip())


def test_an_error_of_another_room_ends_with_its_own_exit_code(monkeypatch, capsys):
    def task(cfg: EvaluateConfig, overrides: list[str]) -> None:
        raise CheckpointError("models=runs/x", "no such run.", "Train it first.")

    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    with pytest.raises(SystemExit) as end:
        hydra_script(EvaluateConfig, "evaluate", task, "", [])
    assert end.value.code == 4
    assert capsys.readouterr().err == "models=runs/x: no such run. Train it first.\n"


def test_a_bug_keeps_its_traceback_under_hydra(monkeypatch):
    def task(cfg: EvaluateConfig, overrides: list[str]) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    with pytest.raises(ValueError, match="a bug"):
        hydra_script(EvaluateConfig, "evaluate", task, "", [])
