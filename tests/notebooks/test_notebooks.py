"""The notebooks are thin, stripped and typed, and run from the first cell to the last."""

import ast
import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image
from tiny import tiny_experiment, write_tiny_dataset

from solq_lab.workbench.notebooks import run_notebook
from solq_lab.workbench.workspace import WORKSPACE
from solq_lab.workbench.parameters import read_parameters
from solq_lab.runs import load_run

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
IDS = [path.stem for path in NOTEBOOKS]
MAX_LINES = 12


def cells(path: Path, kind: str | None = None) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if kind in (None, cell["cell_type"])]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def test_the_first_notebooks_are_there():
    assert {"tour", "train", "evaluate"} <= set(IDS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_it_is_stripped(path):
    for cell in cells(path, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    strip = Path(sys.executable).with_name("nbstripout")
    assert subprocess.run([strip, "--verify", path], capture_output=True).returncode == 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_it_opens_with_a_question_and_then_its_typed_parameters(path):
    first, second, *_ = cells(path)
    assert first["cell_type"] == "markdown"
    assert source(first).startswith("# ")
    assert second["metadata"]["tags"] == ["parameters"]
    declared = set(read_parameters(path))
    assert "runs_dir" in declared
    assert ("experiment" in declared) == ("overrides" in declared)  # what is about several runs has neither


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_its_cells_are_short_and_define_nothing(path):
    for cell in cells(path, "code"):
        assert len(source(cell).splitlines()) <= MAX_LINES, source(cell)
        nodes = ast.walk(ast.parse(source(cell)))
        assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda) for node in nodes), source(cell)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_it_ends_with_a_sentence_of_reading(path):
    last = cells(path)[-1]
    assert last["cell_type"] == "markdown"
    assert source(last).rstrip().endswith(".")


def figures(executed: Path) -> list[np.ndarray]:
    """The images in an executed notebook, (H, W, 3) in 0..255."""
    outputs = [output for cell in cells(executed, "code") for output in cell["outputs"]]
    encoded = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in encoded]


def printed(executed: Path) -> str:
    """What the cells print and the tables that they show."""
    outputs = [output for cell in cells(executed, "code") for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    data = [output.get("data", {}) for output in outputs]
    texts = [output.get("text") or of.get("text/html", of.get("text/plain", "")) for output, of in zip(outputs, data)]
    return "\n".join("".join(text) for text in texts)


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(WORKSPACE, str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.mark.parametrize(
    ("experiment", "weights"),
    [
        ("shipped/uqr/experiment.yaml", "experiments/shipped/uqr"),
        pytest.param("shapes.yaml", "none yet", marks=pytest.mark.slow),
    ],
)
def test_the_tour_needs_nothing_but_itself_and_a_trained_model_only_to_be_right(workspace, experiment, weights):
    executed = run_notebook(REPOSITORY / "notebooks" / "tour.ipynb", REPOSITORY / "experiments" / experiment)
    text = printed(executed)
    assert re.search(f"weights: .*{weights}", text)
    assert "decoder layer 3: logits (1, 40, 8), boxes (1, 40, 4), vectors (1, 40, 100)" in text
    shown = figures(executed)
    assert len(shown) == 5
    assert all(image.std() > 10 for image in shown)


REPORTS = {
    "table1_state_of_the_art": {"table1.png"},
    "table2_uqr_vs_sqr": {"table2_segm.png", "table2_box.png"},
    "table3_ablations": {"table3_segm.AP.png"},
    "solq_plus": {"solq_plus.png"},
    "table4_boundary_ap": {"table4.png", "table4_shapes.png"},
    "runs_overview": {"learning_curves.png"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REPORTS)
def test_a_notebook_about_several_runs_works_before_any_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv(WORKSPACE, str(REPOSITORY))
    executed = run_notebook(REPOSITORY / "notebooks" / f"{name}.ipynb", runs_dir=tmp_path)
    assert executed.parent == tmp_path / "_reports"
    printed(executed)
    shown = figures(executed)
    assert len(shown) >= len(REPORTS[name])
    assert all(image.std() > 5 for image in shown)
    assert {path.name for path in executed.parent.glob("*.png")} >= REPORTS[name]
    assert executed.with_suffix(".html").exists()


@pytest.mark.slow
def test_train_and_evaluate_leave_a_whole_report_in_the_run_folder(workspace):
    root = write_tiny_dataset(workspace / "images")
    experiment = workspace / "tiny.yaml"
    experiment.write_text(tiny_experiment(root).to_yaml())
    executed = run_notebook(
        REPOSITORY / "notebooks" / "train.ipynb", experiment, parameters={"images": "2", "score": "0.9"}
    )
    run = load_run(executed.parent)
    assert run.status()["state"] == "finished"
    assert "ceiling" in printed(executed)
    assert len(figures(executed)) == 3
    assert {path.name for path in run.figures.iterdir()} == {"training.png", "ap.png", "predictions.png"}
    executed = run_notebook(
        REPOSITORY / "notebooks" / "evaluate.ipynb", experiment, parameters={"images": "2", "score": "0.9"}
    )
    assert "segm, class" in printed(executed)
    assert len(figures(executed)) == 3
