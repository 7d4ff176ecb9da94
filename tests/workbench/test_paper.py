"""The paper's numbers: all of them are there, as printed, and what is not is rejected by its name."""

import re

import pytest
from conftest import REPOSITORY

from solq_lab.config import ConfigError
from solq_lab.workbench.paper import paper_table

FILE = REPOSITORY / "experiments" / "paper_results.yaml"
ROWS = {
    "table1": 23,
    "table2": 11,
    "table3a": 5,
    "table3b": 6,
    "table3c": 6,
    "table3d": 4,
    "table3e": 4,
    "table4": 4,
    "table5": 2,
}


def printed_rows() -> list[list[float]]:
    """The numbers of every row of tables 1 to 4, in the order of the paper's transcription."""
    source = REPOSITORY.parent / "shared" / "paper" / "tables.md"
    if not source.is_file():
        pytest.skip(f"no transcription of the paper's tables at {source}")
    tables = source.read_text().split("## Table 5")[0]
    body = re.findall(r"(?<=---\|\n)(?:\|.*\n?)+", tables)  # the lines under each header
    cells = [line.strip("| \n").split("|")[1:] for part in body for line in part.splitlines()]
    return [[float(cell) for cell in map(str.strip, row) if re.fullmatch(r"\d+(\.\d+)?", cell)] for row in cells]


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_every_table_is_there(name):
    assert len(paper_table(name, FILE).rows) == ROWS[name]


def test_the_numbers_are_those_that_the_paper_prints():
    ours = [row for name in ROWS if name != "table5" for row in paper_table(name, FILE).rows.values()]
    assert [[value for value in row if value is not None] for row in ours] == printed_rows()


def test_table_5_adds_up_to_the_sums_it_prints():
    """Its transcription prints sums, detector + mask branch + decoding; here each part has a column."""
    sqr, uqr = (paper_table("table5", FILE).row(name) for name in ("SQR", "UQR"))
    assert sqr["detector_multiply_adds"] + sqr["mask_multiply_adds"] == pytest.approx(125.01)
    assert uqr["detector_parameters"] + uqr["mask_parameters"] == pytest.approx(42.58)
    assert sqr["images_per_second"] < uqr["images_per_second"]


def test_a_row_gives_its_numbers_by_column():
    row = paper_table("table2", FILE).row("D-DETR* + SQR, R50")
    assert (row["segm.AP"], row["box.AP"], row["box.APl"]) == (32.2, 45.6, 61.5)
    assert paper_table("table2", FILE).row("D-DETR*, R50")["segm.AP"] is None


def test_what_is_not_there_or_not_whole_is_rejected_with_the_nearest(tmp_path):
    broken = tmp_path / "results.yaml"
    broken.write_text("table1: {title: t, columns: [a, b], rows: {x: [1]}}")
    for read, said in (
        (lambda: paper_table("table3", FILE), r"no table 'table3'; did you mean table"),
        (lambda: paper_table("figure", FILE), "no table 'figure'; there are table1, table2"),
        (lambda: paper_table("table1", FILE).row("SOLQ, R102"), r"no row 'SOLQ, R102' .*did you mean 'SOLQ, R101'\?"),
        (lambda: paper_table("table1", broken), "table1: row 'x' has 1 values, the table 2 columns"),
        (lambda: paper_table("table1", tmp_path / "none.yaml"), "no such"),
    ):
        with pytest.raises(ConfigError, match=said):
            read()
