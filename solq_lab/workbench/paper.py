"""The numbers that the paper prints, tables 1 to 5, from `experiments/paper_results.yaml`. Loads without torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from solq_lab.config import ConfigError, read_yaml
from solq_lab.errors import did_you_mean
from solq_lab.sections import Section

PAPER_RESULTS = Path("experiments/paper_results.yaml")


class PaperTable(Section):
    """A table as printed: AP in percent, None for an empty cell."""

    title: str
    columns: list[str] = Field(min_length=1)
    rows: dict[str, list[float | None]] = Field(min_length=1)

    @model_validator(mode="after")
    def _rows_are_as_long_as_the_header(self) -> PaperTable:
        for name, values in self.rows.items():
            if len(values) != len(self.columns):
                raise ValueError(f"row {name!r} has {len(values)} values, the table {len(self.columns)} columns")
        return self

    def row(self, name: str) -> dict[str, float | None]:
        """One row: column -> number.

        Raises:
            ConfigError: the table has no such row.
        """
        if name not in self.rows:
            hint = did_you_mean(repr(name), map(repr, self.rows), "there are")
            raise ConfigError(f"no row {name!r} in the paper's table ({self.title}); {hint}")
        return dict(zip(self.columns, self.rows[name], strict=True))


def paper_table(name: str, path: str | Path = PAPER_RESULTS) -> PaperTable:
    """A table of the paper by its name: table1, table2, table3a to table3e, table4, table5.

    Raises:
        ConfigError: no such table, or the file is not valid.
    """
    tables = read_yaml(Path(path))
    if name not in tables:
        raise ConfigError(f"{path}: no table {name!r}; {did_you_mean(name, tables, 'there are')}")
    try:
        return PaperTable.model_validate(tables[name])
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, (name, *fault["loc"])))
        raise ConfigError(f"{path}: {place}: {fault['msg'].removeprefix('Value error, ')}") from None
