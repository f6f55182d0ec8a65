"""Families of models: what they hold fixed and vary, how they are run, and what their records say.

    study = Study.from_config_dict(config)
    study.check()
    run_study(study, "runs/mine")
    table = results_table("runs/mine")

Names are imported when first used, so that planning a study needs no device and reading one no trainer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxmoe.scaling.results import read_records as read_records
    from jaxmoe.scaling.results import read_study as read_study
    from jaxmoe.scaling.results import records_table as records_table
    from jaxmoe.scaling.results import results_table as results_table
    from jaxmoe.scaling.runner import StudyResult as StudyResult
    from jaxmoe.scaling.runner import run_member as run_member
    from jaxmoe.scaling.runner import run_study as run_study
    from jaxmoe.scaling.study import Member as Member
    from jaxmoe.scaling.study import Study as Study

_HOME = {
    "Member": "study",
    "Study": "study",
    "StudyResult": "runner",
    "read_records": "results",
    "read_study": "results",
    "records_table": "results",
    "results_table": "results",
    "run_member": "runner",
    "run_study": "runner",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
