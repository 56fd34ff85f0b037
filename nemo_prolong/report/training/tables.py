"""The tables of a report as plain strings: rows, columns, and what was typed to get them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nemo_prolong.config.commands import hydra_override, shell_command, typed
from nemo_prolong.config.schema import ReportConfig, Transition
from nemo_prolong.records.evaluation import RecallEntry
from nemo_prolong.report import numbers
from nemo_prolong.report.tables import Cell, Table, text_cells
from nemo_prolong.report.training.read import EvaluatedModel, ExportedModel, Lineage, StageRun
from nemo_prolong.report.training.summary import finite, summarize_stage
from nemo_prolong.units import format_bytes, format_seconds, format_tokens


def results_table(stages: Sequence[StageRun]) -> Table:
    """Return what every stage achieved."""
    head = ["Stage", "First loss", "Last loss", "Validation loss", "Tokens", "Steps", "Tokens/s", "Wall time"]
    rows = []
    for stage in stages:
        facts = summarize_stage(stage)
        seconds = facts["wall_seconds"]
        rows.append(
            text_cells(
                stage.label,
                numbers.loss(facts["first_loss"]),
                numbers.loss(facts["last_loss"]),
                numbers.loss(facts["last_validation_loss"]),
                numbers.tokens(facts["tokens_trained"]),
                f"{facts['steps']:,} of {facts['train_iters']:,}",
                numbers.count(facts["tokens_per_second"]),
                numbers.MISSING if seconds is None else format_seconds(seconds),
            )
        )
    return Table(head, rows)


def perplexity_table(models: Sequence[EvaluatedModel]) -> Table | None:
    """Return perplexity per model and bucket; None if no model has results."""
    measured = [(model, model.perplexity) for model in models if model.perplexity]
    if not measured:
        return None
    spans = sorted({bucket.span for _, result in measured for bucket in result.buckets})
    rows = []
    for model, result in measured:
        values = {bucket.span: bucket.perplexity for bucket in result.buckets}
        row = [Cell(numbers.significant(values.get(span)), model.is_beyond_training(span[1])) for span in spans]
        rows.append([*text_cells(model.label, result.backend), *row])
    return Table(["Model", "Backend", *(numbers.span(*span) for span in spans)], rows, frozenset({0, 1}))


_RECALL_MEASURES: list[tuple[str, Callable[[RecallEntry], str]]] = [
    ("exact match", lambda entry: numbers.percent(entry.exact_match)),
    ("token accuracy", lambda entry: numbers.percent(entry.token_accuracy)),
    ("answer loss", lambda entry: numbers.loss(entry.answer_loss)),
]


def recall_table(models: Sequence[EvaluatedModel]) -> Table | None:
    """Return exact match, token accuracy and answer loss per model and length; None if no model has results."""
    measured = [(model, model.recall) for model in models if model.recall]
    if not measured:
        return None
    lengths = sorted({entry.length for _, result in measured for entry in result.lengths})
    rows = []
    for model, result in measured:
        entries = {entry.length: entry for entry in result.lengths}
        for number, (title, show) in enumerate(_RECALL_MEASURES):
            texts = {length: show(entry) for length, entry in entries.items()}
            row = [Cell(texts.get(n, numbers.MISSING), model.is_beyond_training(n)) for n in lengths]
            rows.append([Cell(model.label, repeats=number > 0), Cell(title), *row])
    return Table(["Model", "Measure", *(format_tokens(n) for n in lengths)], rows, frozenset({0, 1}))


def settings_table(stages: Sequence[StageRun]) -> Table:
    """Return the settings that tell the stages apart or that a reader would ask for, one stage per column."""
    rows = [text_cells(title, *(show(stage) for stage in stages)) for title, show in _SETTINGS]
    shown = [row for row in rows if any(cell.text != numbers.MISSING for cell in row[1:])]
    return Table(["Setting", *(stage.label for stage in stages)], shown)


def _setting(*path: str, show: Callable[[Any], str] = str) -> Callable[[StageRun], str]:
    """Return how to show the value at ``path`` of a run's ``config.json``."""

    def read(stage: StageRun) -> str:
        value: Any = stage.config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return numbers.MISSING if value is None else show(value)

    return read


def _batch_tokens(stage: StageRun) -> str:
    rows = stage.config.get("train", {}).get("global_batch_size")
    return numbers.MISSING if rows is None else format_tokens(rows * stage.manifest.seq_length)


def _layout(stage: StageRun) -> str:
    layout = stage.config.get("parallelism")
    if not layout:
        return numbers.MISSING
    short = {"TP": "tensor_model", "PP": "pipeline_model", "CP": "context"}
    return " ".join(f"{name}{layout.get(f'{key}_parallel_size', 1)}" for name, key in short.items())


def _peak_memory(stage: StageRun) -> str:
    peak = summarize_stage(stage)["peak_memory_bytes"]
    return numbers.MISSING if peak is None else format_bytes(peak)


def transition_words(transition: str) -> str:
    """Return what a stage took from its parent, in words."""
    words = {str(Transition.SCRATCH): "nothing", str(Transition.WEIGHTS_AND_OPTIMIZER): "weights + optimizer"}
    return words.get(transition, transition)


_SETTINGS: list[tuple[str, Callable[[StageRun], str]]] = [
    ("seq_length, tokens", lambda stage: format_tokens(stage.manifest.seq_length)),
    ("trained context, tokens", lambda stage: format_tokens(stage.manifest.trained_context_length)),
    ("advertised context, tokens", lambda stage: format_tokens(stage.manifest.advertised_context_length)),
    ("rotary_base", lambda stage: numbers.base(stage.manifest.rotary_base)),
    ("taken from the parent", lambda stage: transition_words(stage.transition)),
    ("train_iters, steps", lambda stage: numbers.count(stage.manifest.train_iters)),
    ("global_batch_size, rows", _setting("train", "global_batch_size")),
    ("global batch, tokens", _batch_tokens),
    ("peak learning rate", _setting("optim", "lr", show=lambda v: f"{v:g}")),
    ("final learning rate", _setting("optim", "min_lr", show=lambda v: f"{v:g}")),
    ("warmup, steps", _setting("optim", "lr_warmup_iters")),
    ("weight decay", _setting("optim", "weight_decay")),
    ("loss on answers only", _setting("data", "apply_instruct_masks", show=lambda v: "yes" if v else "no")),
    ("precision", _setting("precision", "compute")),
    ("kernels", _setting("precision", "backend")),
    ("world size, ranks", lambda stage: str(stage.manifest.world_size)),
    ("layout", _layout),
    ("peak memory per rank", _peak_memory),
    ("seed", _setting("seed")),
]


def model_facts(stages: Sequence[StageRun]) -> list[tuple[str, str]]:
    """Return the architecture, which all stages share."""
    model = stages[-1].manifest.model.model_dump(mode="json")
    names = {
        "nemo_config": "NeMo class", "num_layers": "layers", "hidden_size": "hidden size",
        "ffn_hidden_size": "FFN hidden size", "num_attention_heads": "query heads",
        "num_query_groups": "key-value heads", "kv_channels": "head dimensions", "vocab_size": "vocabulary",
    }  # fmt: skip
    return [
        (title, f"{model[key]:,}" if isinstance(model[key], int) else str(model[key])) for key, title in names.items()
    ]


def mixture_table(stages: Sequence[StageRun]) -> Table | None:
    """Return every training directory with its share, and its size where the data manifest is at hand."""
    rows = []
    for stage in stages:
        row_sets = stage.data_manifest.get("row_sets") or {}
        for number, entry in enumerate(stage.manifest.data.mixture):
            facts = row_sets.get(entry["path"], {})
            cells = text_cells(
                entry["path"],
                facts.get("domain", numbers.MISSING),
                numbers.percent(entry["proportion"]),
                numbers.count(facts.get("rows")),
                numbers.tokens(facts.get("tokens")),
                numbers.count(facts.get("documents")),
            )
            rows.append([Cell(stage.label, repeats=number > 0), *cells])
    head = ["Stage", "Directory", "Domain", "Share of rows", "Rows there", "Tokens there", "Documents there"]
    return Table(head, rows, frozenset({0, 1, 2})) if rows else None


def versions_table(stages: Sequence[StageRun]) -> Table | None:
    """Return the software of every stage: one column where all agree, else one per stage."""
    every = [stage.manifest.versions for stage in stages]
    names = list(dict.fromkeys(name for versions in every for name in versions))
    if not names:
        return None
    if all(versions == every[0] for versions in every):
        return Table(["Software", "Version"], [text_cells(name, every[0][name]) for name in names])
    rows = [text_cells(name, *(versions.get(name, numbers.MISSING) for versions in every)) for name in names]
    return Table(["Software", *(stage.label for stage in stages)], rows)


def machine_table(machine: dict[str, Any]) -> Table:
    """Return the machine the report was written on."""
    memory = format_bytes(machine["memory_bytes"])
    rows = [("System", machine["system"]), ("Processor", machine["processor"]), ("CPU cores", machine["cpu_count"])]
    return Table(
        ["Machine", ""], [text_cells(*row) for row in [*rows, ("Memory", memory), ("Python", machine["python"])]]
    )


def commands(lineage: Lineage, cfg: ReportConfig) -> list[str]:
    """Return what to type to get this report again, in order, as far as the runs recorded it."""
    prepared = [
        f"{stage.data_manifest['command']} {typed('output', stage.manifest.data.root)}"
        for stage in lineage.stages
        if stage.data_manifest.get("command")
    ]
    trained = [stage.manifest.command for stage in lineage.stages]
    lines = prepared + [f"python {line}" if line.startswith("scripts/") else line for line in trained]
    if lineage.export:
        lines.append(_script("export", _export_settings(lineage.export)))
    results = [result for model in lineage.evaluated for result in (model.perplexity, model.recall) if result]
    lines += [_script("evaluate", result.settings) for result in results if result.settings]
    lines.append(_script("report", cfg.model_dump(mode="json")))
    return list(dict.fromkeys(lines))


def _export_settings(export: ExportedModel) -> dict[str, Any]:
    dtypes = {"float32": "fp32", "bfloat16": "bf16"}
    manifest = export.manifest
    return {"run": manifest.source.run, "output": export.directory, "dtype": dtypes.get(manifest.dtype)}


def _script(name: str, settings: dict[str, Any]) -> str:
    words = [hydra_override(key, value) for key, value in settings.items() if value is not None]
    return shell_command(["python", f"scripts/{name}.py", *words])


def logit_difference_words(value: float | None) -> str:
    """Return the export's verification as a short number."""
    return "not verified" if value is None or finite(value) is None else f"{value:.1e}"


def missing_results(models: Iterable[EvaluatedModel], task: str) -> list[str]:
    """Return a note for every model without results of ``task``, with the command that measures them."""
    return [
        f"{model.label}: no {task} results. Measure them with: {_script('evaluate', {'models': [model.model]})}"
        for model in models
        if getattr(model, task) is None
    ]
