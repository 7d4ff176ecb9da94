"""Notebooks executed by papermill into run folders, after checks that need no work. Loads without torch."""

import json
import logging
import os
import re
import shlex
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from solq_lab.config import load_experiment
from solq_lab.data_folder import check_data_folder
from solq_lab.environment import describe_software
from solq_lab.errors import ExplainedError, Interrupted, UserError
from solq_lab.files import read_json, write_text
from solq_lab.progress import Progress, describe_duration, status_line
from solq_lab.runs import Run
from solq_lab.workbench.download.weights import fetch_starting_weights
from solq_lab.workbench.parameters import check_parameters, read_parameters
from solq_lab.workbench.processes import is_alive
from solq_lab.workbench.trainings import stop_training
from solq_lab.workbench.workspace import WORKSPACE, experiment_run

OWN_DATA = ("data", "folder", "root")  # parameters that make a notebook one about a data set, not about a run
FOLDED = """{% extends "lab/index.html.j2" %}
{% block input_group %}<details><summary style="opacity: 0.6; cursor: pointer">code</summary>{{ super() }}</details>
{% endblock %}"""  # nbconvert's own page with every code cell behind a line
QUIET_KERNEL = ["--IPKernelApp.log_level=CRITICAL"]  # it logs unencrypted local sockets, and its own shutdown


class NotebookFailed(ExplainedError):
    """A cell of an executed notebook raised; exit status 2 where it raised a `UserError`, otherwise 1."""

    def __init__(self, message: str, exit_status: int = ExplainedError.exit_status) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def run_notebook(
    notebook: str | Path,
    experiment_path: str | Path | None = None,
    overrides: Sequence[str] = (),
    runs_dir: str | Path = "runs",
    *,
    parameters: Mapping[str, Any] | None = None,
) -> Path:
    """Execute a notebook; it is written beside its figures cell by cell, and as HTML at the end.

    That is `data_report_folder`, the folder of `experiment_run`, or `runs_dir`/_reports without an experiment.
    The parameters, the experiment and the data folder are checked first.

    Args:
        notebook: a notebook with one cell tagged `parameters` that declares runs_dir, experiment and overrides.
        experiment_path: the experiment's YAML file. None: for a notebook about several runs, which declares none.
        overrides: `section.key=value` changes to it.
        runs_dir: folder of run folders.
        parameters: further parameters of the notebook; text is converted to the declared type.

    Returns:
        The executed notebook; the HTML lies beside it.

    Raises:
        NotebookError: the notebook or a parameter is not valid.
        ConfigError: the experiment is not valid, or its data folder is missing.
        RunError: the run folder belongs to another experiment.
        NotebookFailed: a cell raised; the full traceback is in the executed notebook.
        Interrupted: Ctrl-C; a training of this run has saved and stopped.
    """
    notebook = Path(notebook)
    shared: dict[str, Any] = {}
    if experiment_path is not None:
        shared = {"experiment": str(Path(experiment_path).absolute()), "overrides": list(overrides)}
    shared["runs_dir"] = str(Path(runs_dir).absolute())
    values = check_parameters(notebook, dict(parameters or {}) | shared)
    experiment = None if experiment_path is None else load_experiment(experiment_path, list(overrides))
    folder = data_report_folder(notebook, values, runs_dir)
    if folder is not None or experiment_path is None or experiment is None:
        return _execute(notebook, (folder or Path(runs_dir) / "_reports") / notebook.name, values)
    check_data_folder(experiment)

    # Only a notebook that trains needs the backbone's weights.
    if "start_training" in notebook.read_text(encoding="utf-8"):
        fetch_starting_weights(experiment, Path(runs_dir) / experiment.name)
    run = experiment_run(experiment_path, overrides, runs_dir)
    return _execute(notebook, run.folder / notebook.name, values, run)


def data_report_folder(notebook: Path, parameters: Mapping[str, Any], runs_dir: str | Path) -> Path | None:
    """`runs_dir`/NOTEBOOK/DATA, where a notebook about a data set leaves report and figures; None for any other."""
    declared = read_parameters(notebook)
    data = next((parameters.get(name, declared[name].default) for name in OWN_DATA if name in declared), None)
    return None if data is None else Path(runs_dir) / notebook.stem / Path(data).name


def export_html(notebook: Path, *, summary: str = "") -> Path:
    """Write an executed notebook as one HTML file beside it, to be read offline, and return that file's path.

    Code is folded, widgets give way to their image or to the figure below them, and paths below the working folder are
    relative. `summary` is Markdown that is put before it.
    """
    import nbformat
    from nbconvert import HTMLExporter

    document: Any = nbformat.read(notebook, as_version=4)
    for cell in document.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if data.pop("application/vnd.jupyter.widget-view+json", None) and "image/png" not in data:
                is_progress_bar = "%|" in data.get("text/plain", "")
                note = "" if is_progress_bar else "(a view to work with in JupyterLab)"
                output["data"] = {"text/plain": note}
    if summary:
        document.cells.insert(0, nbformat.v4.new_markdown_cell(summary))

    logging.getLogger("traitlets").setLevel(logging.ERROR)  # it warns about figures without a description
    html, _ = HTMLExporter(raw_template=FOLDED).from_notebook_node(document)
    target = notebook.with_suffix(".html")
    write_text(target, html.replace(f"{Path.cwd()}/", ""))
    return target


def summarise(notebook: Path, executed: Path, parameters: Mapping[str, Any], run: Run | None) -> str:
    """What a report opens with, as a Markdown table: AP, time, device, and the command that makes it again."""
    document = read_json(executed)
    seconds = document["metadata"].get("papermill", {}).get("duration") or 0.0
    versions = describe_software()["versions"]
    rows = {
        "time": describe_duration(seconds),
        "made with": f"solq_lab {versions['solq-lab']}, torch {versions['torch']}",
    }
    if run is not None and run.results.is_file():
        results = read_json(run.results)
        metrics, images = results["metrics"], results["images"]
        aps = {kind: metrics.get(f"{kind}.AP") for kind in ("box", "segm", "boundary")}
        known = ", ".join(f"{kind} {100 * ap:.1f}" for kind, ap in aps.items() if ap is not None)
        rows["AP, percent"] = f"{known} ({images} images)"
        rows["trained on"] = str(read_json(run.environment).get("device", "unknown"))

    words = [notebook, *([parameters["experiment"]] if "experiment" in parameters else [])]
    words += parameters.get("overrides", [])
    for name, value in parameters.items():
        if name not in ("experiment", "overrides", "runs_dir"):
            words += ["-p", f"{name}={value}"]
    rows["command"] = f"`solq-lab run {shlex.join(map(str, words))}`"
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _execute(notebook: Path, executed: Path, parameters: dict[str, Any], run: Run | None = None) -> Path:
    """Execute a notebook into the file `executed`, with the progress of `run` in the terminal, and write its HTML."""
    os.environ[WORKSPACE] = str(Path.cwd())  # the kernel inherits it
    executed.parent.mkdir(parents=True, exist_ok=True)
    errors: list[Exception] = []

    def execute() -> None:
        import papermill

        logging.getLogger("papermill").setLevel(logging.ERROR)
        files = str(notebook), str(executed)
        try:
            papermill.execute_notebook(*files, parameters, progress_bar=False, extra_arguments=QUIET_KERNEL)
        except Exception as error:  # raised below, in the main thread
            errors.append(error)

    # In a thread, so that Ctrl-C reaches this one and not papermill's event loop.
    thread = threading.Thread(target=execute, daemon=True)
    progress = None if run is None else Progress(run)
    try:
        thread.start()
        with status_line() as show:
            while thread.is_alive():
                thread.join(timeout=1.0)
                if progress and run and run.is_training():
                    show(progress.read())
                    continue
                try:  # how many cells papermill has executed, by its notes
                    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
                    done = sum(cell["metadata"].get("papermill", {}).get("status") == "completed" for cell in cells)
                    show(f"{executed.name}: {done} of {len(cells)} cells done")
                except (OSError, ValueError):  # not there yet, or being written
                    show(f"{executed.name}: starting")
    except KeyboardInterrupt:
        if run is None:
            raise Interrupted(f"{notebook}: interrupted; re-running starts it again") from None
        was_training = is_alive(run)
        message = stop_training(run.folder)
        if was_training:  # the cell that followed it ends, and papermill saves the notebook
            thread.join(timeout=30.0)
        raise Interrupted(message) from None

    if executed.exists():
        export_html(executed, summary=summarise(notebook, executed, parameters, run))
    if errors:
        raise _explain_failure(notebook, executed, errors[0])
    return executed


def _explain_failure(notebook: Path, executed: Path, error: Exception) -> Exception:
    """The exception for an error of papermill: a failed cell or dead kernel in a few lines, any other unchanged."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    if isinstance(error, DeadKernelError):
        cure = "a training it followed continues; re-running follows it again"
        return NotebookFailed(f"{notebook}: its kernel was killed (often: out of memory); {cure}")
    if not isinstance(error, PapermillExecutionError):
        return error

    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    arrow = re.search(r"^-+> *\d+ (.*)$", plain, re.MULTILINE)  # IPython points at the line of the cell that failed
    where = f" at: {arrow.group(1).strip()}" if arrow else ""
    message = (
        f"{notebook}: cell {error.exec_count} failed{where}\n"
        f"{error.ename}: {error.evalue}\n"
        f"The full traceback is in {executed}"
    )
    # All that papermill knows of the error is the name of its class.
    if error.ename not in _class_names(UserError):
        import solq_lab.build  # noqa: F401  # defines those of data, codecs, models and operators; loads torch
    kind = UserError if error.ename in _class_names(UserError) else ExplainedError
    return NotebookFailed(message, kind.exit_status)


def _class_names(kind: type[Exception]) -> set[str]:
    return {kind.__name__}.union(*map(_class_names, kind.__subclasses__()))
