"""Studies that several files of this folder look at, and none changes."""

import pathlib
import shutil

import pytest

from jaxmoe.scaling import run_study
from jaxmoe.scaling.report import build_report, style

from .synthetic_study import FAMILY, write_study
from .tiny_study import study_of


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Folder and result of the tiny study, trained to its end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run_study(study_of(), folder)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished study that a test may change."""
    return shutil.copytree(finished[0], tmp_path / "study")


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """Report of three members with one seed, in full."""
    directory = write_study(tmp_path_factory.mktemp("quick"), FAMILY, notes=("Mind the <b>corruption</b>.",))
    return pathlib.Path(build_report(directory, svg=True)).parent


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without the time that images take: every figure is still laid out."""
    monkeypatch.setattr(style, "image_bytes", lambda figure, kind="png": b"")
