import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_prolong.records.run_log import StepRecord
from nemo_prolong.report.training.figures import (
    loss_figure,
    perplexity_figure,
    position_figure,
    recall_figures,
    smooth,
    throughput_figure,
)
from nemo_prolong.report.training.read import read_lineage
from nemo_prolong.report.training.summary import median_tokens_per_second

SVG = "{http://www.w3.org/2000/svg}"


def parse(markup):
    return ElementTree.fromstring(str(markup))


def titles(markup):
    return [element.text for element in parse(markup).iter("title")]


def all_figures(lineage):
    models = [stage.evaluated for stage in lineage.stages]
    return [
        loss_figure(lineage.stages),
        throughput_figure(lineage.stages),
        position_figure(lineage.stages),
        perplexity_figure(models),
        *recall_figures(models),
    ]


@pytest.fixture
def lineage(tree):
    return read_lineage(tree.runs, tree.export)


def test_every_chart_is_well_formed_and_inside_its_picture(lineage):
    for figure in all_figures(lineage):
        for markup in (figure.wide, figure.narrow):
            root = parse(markup)
            _, _, width, height = map(float, root.get("viewBox").split())
            for line in root.iter("polyline"):
                for x, y in (map(float, point.split(",")) for point in line.get("points").split()):
                    assert 0 <= x <= width and 0 <= y <= height
            for text in root.iter("text"):
                assert 0 <= float(text.get("x")) <= width and 0 < float(text.get("y")) <= height


def test_steps_and_validations_can_be_read_off_the_curve(lineage):
    hover = titles(loss_figure(lineage.stages).wide)
    for stage in lineage.stages:
        last = stage.steps[-1]
        assert any(title.startswith(f"{stage.label} step {last.step}: loss {last.loss:.3f}") for title in hover)
        assert sum(title.startswith(f"{stage.label} step") and "average" in title for title in hover) == len(
            stage.steps
        )
        for validation in stage.validations:
            assert f"{stage.label} step {validation.step}: validation loss {validation.val_loss:.3f}" in hover


def test_stages_follow_each_other_on_one_axis_of_tokens(lineage):
    root = parse(loss_figure(lineage.stages).wide)
    bands = [element for element in root.iter("rect") if element.get("class").startswith("band")]
    starts = [float(band.get("x")) for band in bands]
    widths = [float(band.get("width")) for band in bands]
    tokens = [stage.tokens_trained for stage in lineage.stages]
    for number in range(1, len(bands)):
        assert starts[number] == pytest.approx(starts[number - 1] + widths[number - 1], abs=0.05)
        assert widths[number] / widths[0] == pytest.approx(tokens[number] / tokens[0], rel=0.01)


def step(number, loss, consumed):
    return StepRecord(step=number, loss=loss, real_tokens=10, consumed_train_tokens=consumed, step_seconds=1.0)


def test_a_long_stage_is_thinned_without_losing_a_spike(lineage):
    stage = lineage.stages[0]
    steps = [step(i, 3.0, 10 * i) for i in range(1, 20001)]
    steps[12345] = step(12346, 9.0, 123460)
    stage.steps[:] = steps
    stage.validations.clear()
    root = parse(loss_figure([stage]).wide)
    faint = next(line for line in root.iter("polyline") if line.get("class").startswith("faint"))
    points = [tuple(map(float, point.split(","))) for point in faint.get("points").split()]
    assert len(points) <= 402
    top = min(y for _, y in points)
    assert sum(y == top for _, y in points) == 1
    assert len(str(loss_figure([stage]).wide)) < 100_000


def test_markers_beyond_the_trained_length_are_hollow(lineage):
    figure = perplexity_figure([lineage.stages[1].evaluated])
    marks = [e.get("class").split()[1] for e in parse(figure.wide) if (e.get("class") or "").startswith("mark")]
    assert marks == ["solid", "solid", "solid", "hollow", "hollow"]


def test_models_scored_on_different_data_do_not_compare(tree):
    path = Path(tree.runs[0]) / "eval" / "perplexity.json"
    path.write_text(path.read_text().replace('"documents": 12, "buckets"', '"documents": 3, "buckets"'))
    models = [stage.evaluated for stage in read_lineage(tree.runs, None).stages]
    data = "runs/demo/data/validation-8192"
    assert f"12 documents of {data}." in perplexity_figure(models[1:]).caption
    caption = perplexity_figure(models).caption
    assert f"Not comparable, the models were scored on different data: 3 documents of {data}; 12 documents" in caption


def test_the_guessing_line_is_drawn_on_the_answer_loss_only(lineage):
    exact, loss = recall_figures([stage.evaluated for stage in lineage.stages])
    assert "dashed" not in exact.wide and 'class="dashed' in loss.wide
    assert [entry.label for entry in loss.legend] == ["base", "stage1", "stage2", "sft", "guessing"]


def test_throughput_bars_are_as_long_as_their_medians(lineage):
    root = parse(throughput_figure(lineage.stages).wide)
    widths = [float(e.get("width")) for e in root.iter("rect") if e.get("class").startswith("bar")]
    medians = [median_tokens_per_second(stage) for stage in lineage.stages]
    assert [width / widths[0] for width in widths] == pytest.approx([m / medians[0] for m in medians], rel=1e-3)


def test_a_stage_of_one_step_still_has_a_chart(lineage):
    stage = lineage.stages[0]
    del stage.steps[1:]
    stage.validations.clear()
    assert "base step 1: loss" in loss_figure([stage]).wide
    assert throughput_figure([stage]) is not None


def test_steps_without_a_finite_loss_leave_a_gap_not_a_crash(lineage):
    stage = lineage.stages[3]
    stage.steps[4] = step(5, float("nan"), stage.steps[4].consumed_train_tokens)
    assert "nan" not in loss_figure(lineage.stages).wide


def test_figures_without_data_are_absent(lineage):
    for stage in lineage.stages:
        stage.steps.clear()
    assert loss_figure(lineage.stages) is None and throughput_figure(lineage.stages) is None
    assert perplexity_figure([]) is None and recall_figures([]) == []


@given(count=st.integers(1, 300), start=st.floats(-10, 10), slope=st.floats(-1, 1))
def test_smoothing_leaves_a_straight_line_alone_up_to_its_ends(count, start, slope):
    values = [start + slope * index for index in range(count)]
    assert smooth(values) == pytest.approx(values, abs=1e-6)


def test_smoothing_averages_over_a_twentieth_of_the_steps():
    values = [float(index % 7) for index in range(200)]
    assert smooth(values)[100] == pytest.approx(sum(values[95:106]) / 11)
    spread = max(smooth(values)[5:-5]) - min(smooth(values)[5:-5])
    assert spread < 0.25 * (max(values) - min(values))


def test_chart_colours_come_from_the_page(lineage):
    css = (Path(__file__).parents[3] / "nemo_prolong/report/page/report.css").read_text()
    for figure in all_figures(lineage):
        assert not re.search(r'(fill|stroke|style)="', str(figure.wide))
        for classes in re.findall(r'class="([^"]+)"', str(figure.wide)):
            assert all(re.search(rf"\.{re.escape(name)}\b", css) for name in classes.split())
