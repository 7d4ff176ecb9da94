"""Figures of tables and of several runs: they show the numbers they are given, and say what has not been run."""

import numpy as np
import pytest
from conftest import REPOSITORY
from matplotlib.figure import Figure
from tiny import tiny_experiment

from solq_lab.files import write_json
from solq_lab.runs import create_run
from solq_lab.viz.overview import change_intervals, learning_curves
from solq_lab.viz.style import BLUE, GREY
from solq_lab.viz.tables import against_length, among_methods, beside_paper
from solq_lab.workbench.paper import PaperTable
from solq_lab.workbench.tables import ResultTable, TableRow, read_table, runs_frame

PAPER = PaperTable(
    title="made up", columns=["segm.AP", "box.AP"], rows={"1": [30.0, 40.0], "2": [32.0, None], "SOLQ": [35.0, 45.0]}
)


def row(name: str, shares: list[float], paper_name: str | None, minutes: float | None = None) -> TableRow:
    runs = tuple({"seed": seed, "metrics": {"segm.AP": share}, "minutes": minutes} for seed, share in enumerate(shares))
    return TableRow(
        name, runs, () if shares else (f"{name}-0",), paper_name, PAPER.row(paper_name) if paper_name else {}
    )


def table(*rows: TableRow, name: str = "shapes_table3b") -> ResultTable:
    return ResultTable(name, ("segm.AP", "box.AP"), rows, PAPER, "solq-lab sweep x")


def written(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text")))


def points(axes) -> list[tuple[float, float]]:
    return [tuple(point) for line in axes.lines if line.get_marker() in "oD" for point in line.get_xydata().tolist()]


def test_ours_stand_below_the_papers_numbers_with_every_seed():
    figure = beside_paper([table(row("1", [0.50, 0.54], "1"), row("2", [0.60], "2"))])
    above, below = figure.axes
    assert set(points(above)) == {(0, 30.0), (1, 32.0)}
    assert {(0, 52.0), (1, 60.0)} <= {(x, round(y, 6)) for x, y in points(below)}
    assert sorted(round(y) for x, y in points(below) if x not in (0, 1)) == [50, 54]
    assert "not run yet" not in written(figure)


def test_a_table_that_was_not_run_shows_the_command():
    assert "not run yet:\nsolq-lab sweep\nshapes_table3b" in written(beside_paper([table(row("1", [], "1"))]))


@pytest.mark.parametrize(
    ("names", "second", "joined"),
    [(("1", "2"), [0.6, 0.7], True), (("1", "2"), [0.6], False), (("flatten", "DCT"), [0.6, 0.7], False)],
)
def test_only_steps_of_one_quantity_with_several_seeds_each_are_joined_by_a_line(names, second, joined):
    first, last = names
    below = beside_paper([table(row(first, [0.5, 0.6], "1"), row(last, second, "2"))]).axes[1]
    assert (":" in {line.get_linestyle() for line in below.lines}) == joined


def test_recipes_stand_over_steps_and_over_minutes():
    rows = [row("plain-40", [0.5], None, 1.0), row("plain-80", [0.6], None, 2.0), row("look-plus-40", [0.7], None, 1.5)]
    by_step, by_minute = against_length(table(*rows, row("plus-80", [], None)), ["segm.AP"]).axes
    assert points(by_step) == [(40, 50), (80, 60), (40, 70)]
    assert points(by_minute) == [(1, 50), (2, 60), (1.5, 70)]
    assert [text.get_text() for text in by_step.get_legend().get_texts()] == ["plain", "look-plus"]


def test_a_gain_compares_the_seeds_that_both_rows_have():
    before, after = row("1", [0.5, 0.6, 0.9], None), row("2", [0.7, 0.7], None)
    assert after.gain(before, "segm.AP") == pytest.approx(15)
    assert after.gain(before, "box.AP") is None
    assert after.gain(row("3", [], None), "segm.AP") is None


def test_a_single_seed_has_the_largest_spread_of_the_others_as_its_bar_and_what_was_not_run_is_left_out():
    run, empty = table(row("1", [0.5, 0.54], "1"), row("2", [0.6], "2")), table(row("1", [], "1"))
    (_, below) = beside_paper([empty, run]).axes
    bars = [path for bar in below.collections for path in bar.get_segments()]
    spread = 100 * np.std([0.5, 0.54], ddof=1)
    assert sorted(bar[1, 1] - bar[0, 1] for bar in bars)[-1] == pytest.approx(2 * spread)
    assert any(bar[0, 0] == 1 for bar in bars)


def test_our_run_lies_in_the_line_of_the_method_it_repeats():
    figure = among_methods(PAPER, table(row("R50", [0.36, 0.38], "SOLQ"), row("own", [0.2], None)), title="t")
    segm, box = figure.axes
    assert [label.get_text() for label in segm.get_yticklabels()] == ["1", "2", "SOLQ", "own"]
    assert {(30.0, 0), (32.0, 1), (35.0, 2), (37.0, 2), (20.0, 3)} <= {(round(x, 6), y) for x, y in points(segm)}
    assert (40.0, 0) in points(box)
    assert all(y != 1 for _, y in points(box))  # the paper's place is empty there
    colours = {tuple(line.get_xydata()[0]): line.get_color() for line in segm.lines if len(line.get_xydata()) == 1}
    assert (colours[30.0, 0], colours[35.0, 2]) == (GREY, BLUE)


def test_a_change_is_filled_only_where_its_interval_excludes_zero():
    changes = {"segm.AP": (0.02, 0.01, 0.03), "box.AP": (-0.01, -0.02, 0.005)}
    (axes,) = change_intervals(changes, ("one", "two"), confidence=0.95).axes
    marks = [line for line in axes.lines if line.get_marker() == "o"]
    assert [mark.get_markerfacecolor() for mark in marks] == [BLUE, "white"]
    assert "two - one, percentage points, with 95 % interval" in axes.get_xlabel()


@pytest.fixture
def trained(tmp_path):
    run = create_run(tiny_experiment(tmp_path, name="a"), tmp_path / "runs")
    for step in (1, 2):
        run.append_metrics({"kind": "train", "step": step, "total": 3.0 - step})
        run.append_metrics({"kind": "evaluation", "step": step, "metrics": {"box.AP": step / 10, "segm.AP": None}})
    return run


def test_learning_curves_have_what_a_run_has_written(trained):
    loss, box, segm = learning_curves([trained]).axes
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [[1, 2.0], [2, 1.0]])
    np.testing.assert_allclose(box.lines[0].get_xydata(), [[1, 10.0], [2, 20.0]])
    assert len(segm.lines[0].get_xydata()) == 0


def test_without_runs_the_overview_shows_none():
    assert "no runs yet" in written(learning_curves([]))
    assert runs_frame([]).empty


def test_runs_of_one_name_are_told_apart_and_only_curves_have_a_legend(trained, tmp_path):
    namesake = create_run(trained.experiment, tmp_path / "others")
    assert list(runs_frame([trained, namesake]).index) == [f"{trained.folder.parent.name}/a", "others/a"]
    (legend,) = learning_curves([trained, namesake]).legends
    assert [text.get_text() for text in legend.get_texts()] == [f"{trained.folder.parent.name}/a"]


def test_runs_are_summed_up_in_a_line_each(trained):
    state, step, *aps = runs_frame([trained]).loc["a"]
    assert (state, step) == ("created", 0)
    assert np.isnan(aps).all()
    write_json(trained.results, {"metrics": {"box.AP": 0.5, "segm.AP": None}})
    box, *others = runs_frame([trained]).loc["a"][2:]
    assert box == 50.0
    assert np.isnan(others).all()


def test_the_best_row_comes_first_and_rows_without_the_number_not_at_all():
    ranked = table(row("1", [0.2], "1"), row("2", [0.4, 0.6], "2"), row("SOLQ", [], "SOLQ")).ranked("segm.AP")
    assert [one.name for one in ranked] == ["2", "1"]


def test_every_sweep_of_the_project_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    names = [f"shapes_table3{part}" for part in "abcde"]
    figure = beside_paper([read_table(name, runs_dir=tmp_path) for name in names])
    assert len(figure.axes) == 10
