"""Experiments and sweeps from YAML files and from `section.key=value` changes. Loads without torch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from solq_lab.data.folders import found_names
from solq_lab.errors import did_you_mean
from solq_lab.plain_yaml import load_yaml
from solq_lab.schema import Experiment
from solq_lab.sections import NAME, ConfigError, Section

Schema = TypeVar("Schema", bound=Section)


class SweepRow(Section):
    """One row of a sweep: its changes, and the row of the paper to compare with."""

    name: str = Field(pattern=NAME)
    overrides: list[str] = Field([], description="section.key=value changes to the experiment")
    experiment: str | None = Field(None, description="instead of the sweep's")
    paper: str | None = Field(None, description="row of the paper's table to compare with")
    run: str | None = Field(None, pattern=NAME, description="name of its runs, to share them with rows of other sweeps")


class Sweep(Section):
    """A table of results: rows times seeds, each one a run of the same notebook."""

    name: str = Field(pattern=NAME)
    experiment: str = Field(description="YAML file that all rows start from; in the file, relative to it")
    overrides: list[str] = Field([], description="section.key=value changes that all rows share")
    rows: list[SweepRow] = Field(min_length=1)
    seeds: list[int] = Field([42], min_length=1)
    notebook: str = Field("notebooks/train.ipynb", description="executed for each run")
    paper: str | None = Field(None, description="table of paper_results.yaml to compare with")
    metrics: list[str] = Field(["segm.AP", "box.AP"], min_length=1, description="columns of the table")

    @model_validator(mode="after")
    def _nothing_comes_twice(self) -> Sweep:
        for what, values in (("rows", [row.name for row in self.rows]), ("seeds", [*map(str, self.seeds)])):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"{what}: {', '.join(twice)} comes more than once; give each its own name")
        return self


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment in a YAML file, its parents (`extends`) filled in and the overrides applied.

    Names of images and annotations that are left empty are filled in as they are found in `data.root`.

    Args:
        path: YAML file; its optional key `extends` names a parent file relative to it.
        overrides: `section.key=value` strings, or one text as a shell splits it; later ones win. The value is YAML, or
            the text as typed for a key that holds a text.

    Raises:
        ConfigError: the file, a key or a value is not valid.
    """
    path = Path(path)
    values = {"name": path.stem} | _read_with_parents(path, seen=[])
    return with_found_data(_with_overrides(values, overrides, source=str(path)))


def default_experiment(overrides: Sequence[str] = ()) -> Experiment:
    """The schema's defaults with `section.key=value` changes, under the name "default".

    Raises:
        ConfigError: a key or a value is not valid.
    """
    return _with_overrides({"name": "default"}, overrides, source="the default experiment")


def _with_overrides(values: dict[str, Any], overrides: Sequence[str], *, source: str) -> Experiment:
    # papermill's -p gives a text where the notebook has a list.
    for override in shlex.split(overrides) if isinstance(overrides, str) else overrides:
        _apply_override(values, override)
    return validate_experiment(values, source=source)


def with_found_data(experiment: Experiment) -> Experiment:
    """The experiment with the names of images and annotations that it leaves empty, as far as they are found."""
    found = found_names(experiment.data.model_dump())
    return experiment.model_copy(update={"data": experiment.data.model_copy(update=found)}) if found else experiment


def load_sweep(path: str | Path) -> Sweep:
    """The sweep in a YAML file, named like the file, its experiments relative to the working directory.

    Raises:
        ConfigError: the file, a key or a value is not valid. The experiments are not opened yet.
    """
    path = Path(path)
    values = {"name": path.stem} | read_yaml(path)
    sweep = _validate(Sweep, values, source=str(path))

    def beside(part: Any) -> dict[str, Any]:
        return {"experiment": os.path.normpath(path.parent / part.experiment)}

    rows = [row.model_copy(update=beside(row)) if row.experiment else row for row in sweep.rows]
    return sweep.model_copy(update=beside(sweep) | {"rows": rows})


def parse_experiment(text: str, *, source: str) -> Experiment:
    """The experiment in a YAML text, as `to_yaml` writes it; `source` names it in error messages.

    Raises:
        ConfigError: not plain YAML, an unknown key or a value that does not fit.
    """
    return validate_experiment(_parse_mapping(text, source=source), source=source)


def validate_experiment(values: dict[str, Any], *, source: str) -> Experiment:
    """The experiment of a plain dictionary; `source` names it in error messages.

    Raises:
        ConfigError: an unknown key or a value that does not fit; all faults are listed at once.
    """
    return _validate(Experiment, values, source=source)


def change_experiment(experiment: Experiment, changes: Mapping[str, Any], *, source: str) -> Experiment:
    """The same experiment with other values of the keys "section.key"; `source` names it in error messages.

    Raises:
        ConfigError: an unknown key or a value that does not fit.
    """
    values = experiment.model_dump(mode="json")
    for dotted, value in changes.items():
        section, key = dotted.split(".")
        values[section][key] = value
    return validate_experiment(values, source=source)


def _validate(schema: type[Schema], values: dict[str, Any], *, source: str) -> Schema:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        faults = [_describe_fault(dict(fault), schema) for fault in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(faults)) from None


def _read_with_parents(path: Path, seen: list[Path]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself by way of {' -> '.join(str(p) for p in seen)}; remove one `extends`")
    values = read_yaml(path)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends: found {parent!r}, allowed is the path of one YAML file")
    if not (path.parent / parent).is_file():
        raise ConfigError(
            f"{path}: extends: found {parent}, allowed is the path of a YAML file as seen from {path.parent}"
        )
    return _merge(_read_with_parents(path.parent / parent, [*seen, path.resolve()]), values)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not YAML (object tags included), or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        neighbours = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = did_you_mean(path.name, neighbours, "found there:", folder=path.parent)
        raise ConfigError(f"{path}: no such experiment file; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return _parse_mapping(text, source=str(path))


def _parse_mapping(text: str, *, source: str) -> dict[str, Any]:
    try:
        values = load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not plain YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: found a {type(values).__name__}, allowed is a mapping of sections")
    return values


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"override {override!r}: allowed is section.key=value, for example train.batch_size=16")

    *sections, key = dotted.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise ConfigError(f"override {override!r}: {section} is not a section")

    # YAML would turn 007 into a number and cut "run #2" at its #: a key that holds a text takes it as typed.
    try:
        place[key] = text if _holds_text([*sections, key]) else load_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value; quote it") from None


def _holds_text(keys: Sequence[str]) -> bool:
    """Whether the schema allows nothing but text at a place."""
    annotation: Any = Experiment
    for key in keys:
        if not (isinstance(annotation, type) and issubclass(annotation, Section) and key in annotation.model_fields):
            return False
        annotation = annotation.model_fields[key].annotation
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    return annotation is str or (bool(choices) and all(isinstance(choice, str) for choice in choices))


def _describe_fault(fault: dict[str, Any], schema: type[Section]) -> str:
    location = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        *place, key = fault["loc"]
        sections = {name: field.annotation for name, field in schema.model_fields.items()}
        elsewhere = " or ".join(
            f"{name}.{key}"
            for name, section in sections.items()
            if isinstance(section, type) and issubclass(section, Section) and key in section.model_fields
        )
        hint = did_you_mean(str(key), _allowed_keys(schema, place))
        return f"unknown key {location}; {f'did you mean {elsewhere}?' if elsewhere else hint}"
    if fault["type"] == "model_type":
        keys = ", ".join(_allowed_keys(schema, fault["loc"]))
        return f"{location}: found {fault['input']!r}, allowed is a section with some of the keys {keys}"

    message = fault["msg"].removeprefix("Value error, ")
    shown = fault["type"] != "missing" and not isinstance(fault["input"], dict | BaseModel)
    found = f" (found {fault['input']!r})" if shown else ""
    return f"{location or schema.__name__.lower()}: {message}{found}"


def _allowed_keys(schema: type[BaseModel], location: Sequence[Any]) -> list[str]:
    for part in location:
        if isinstance(part, str):  # a number is an index into a list, whose type is known already
            annotation: Any = schema.model_fields[part].annotation
            schema = next(iter(get_args(annotation)), annotation)
    return list(schema.model_fields)
