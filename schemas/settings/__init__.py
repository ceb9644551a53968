"""Every key of `pipeline.toml`: type, unit, default, limits. Validated at construction, unknown keys refused.

The docstring under a key is its documentation: `pipeline.toml` and `--help` repeat it. A section is called as its table
is; where its name says too little, it is read as `st.Train` (`from bytecache.schemas import settings as st`).
A configuration that names no student has the one of `TRANSFER_STUDENT`; one whose student is an existing model under
another tokenizer has the training of `TRANSFER` where it names no other. `Student()` and `Train()` alone are a new
student and its training.
"""

from typing import Any

from pydantic import model_validator

from bytecache.schemas.settings.cache import PRESETS, ROUNDING, Convert, Dataset, Teacher
from bytecache.schemas.settings.run import Corpus, Fleet, Run
from bytecache.schemas.settings.section import Section
from bytecache.schemas.settings.student import (
    BASELINES,
    NEUTRAL,
    TRANSFER,
    TRANSFER_STUDENT,
    Student,
    Train,
    is_transfer,
)

__all__ = [
    "BASELINES", "NEUTRAL", "PRESETS", "ROUNDING", "TRANSFER", "TRANSFER_STUDENT", "Convert", "Corpus", "Dataset",
    "Fleet", "Run", "Section", "Settings", "Student", "Teacher", "Train", "is_transfer",
]  # fmt: skip


class Settings(Section):
    """The configuration of everything: one field for each table of `pipeline.toml`."""

    run: Run = Run()
    corpus: Corpus = Corpus()
    teacher: Teacher = Teacher()
    convert: Convert = Convert()
    dataset: Dataset = Dataset()
    student: Student = Student()
    train: Train = Train()
    fleet: Fleet = Fleet()

    @model_validator(mode="before")
    @classmethod
    def _with_student(cls, data: Any) -> Any:
        """Fill in the student that nobody named, and the training that goes with it."""
        if not isinstance(data, dict):
            return data
        student, train = data.get("student", {}), data.get("train", {})
        if isinstance(student, dict) and "model" not in student:
            student = TRANSFER_STUDENT | student
        if isinstance(train, Train):
            train = {key: getattr(train, key) for key in train.model_fields_set}
        if isinstance(train, dict) and is_transfer(student):
            train = TRANSFER | train
        return data | {"student": student, "train": train}

    @classmethod
    def defaults_beside(cls, student: Student) -> "Settings":
        """The configuration that names this student and nothing else."""
        return cls(student=student)
