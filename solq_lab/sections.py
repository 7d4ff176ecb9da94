"""What the sections of an experiment's schema are made of. Loads without torch."""

import os
from collections.abc import Iterable
from enum import Enum
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator

from solq_lab.errors import UserError

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of runs, sweeps and their rows: folders and files are called so


class Role(Enum):
    """What a key means to code that compares, shares or adapts experiments; stands in the annotation of its field."""

    MAY_CHANGE = "in a run that is not finished: it concerns cost or robustness, not what the model learns"
    MACHINE = "of the machine; experiments that differ in it alone have the same results"
    START = "a file that a training starts from"
    ADAPTED = "key of the network that fine-tuning adapts; all others have to be those of the trained weights"


PathText = Annotated[str, AfterValidator(os.path.expanduser)]  # ~ is the home folder


class ConfigError(UserError):
    """An experiment that cannot be used: the message names file and key, what was found and what is allowed."""


class Section(BaseModel):
    """Base class: unknown keys are rejected, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's yes, on and true would be read as 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("yes, no, true and false are no values of this key")
        return value


def one_of(name: str, known: Iterable[str]) -> str:
    """`name`, where it is known. Raises ValueError with the names that are."""
    if name not in known:
        raise ValueError(f"allowed are {', '.join(map(repr, known))}")
    return name
