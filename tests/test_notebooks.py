"""The notebooks run from top to bottom, with fewer steps."""

import json
import pathlib

import matplotlib
import matplotlib.pyplot as plt
import pytest

from experiments.configs import quickstart

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "docs" / "notebooks"


@pytest.fixture(autouse=True)
def figures_in_memory(monkeypatch):
    before = matplotlib.get_backend()
    matplotlib.use("Agg")
    yield
    plt.close("all")
    matplotlib.use(before)


def cells_of(name: str) -> list[str]:
    notebook = json.loads((NOTEBOOKS / name).read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code), "outputs are not committed"
    return ["".join(cell["source"]) for cell in code]


def small():
    """The notebook's study with less to train and evaluate."""
    config = quickstart.get_config("E8")
    config.evaluation = {"points": 1, "examples": 32, "validation_rows": 32}
    config.data.sources.knowledge.entities = 100
    return config


def test_quickstart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = small()
    monkeypatch.setattr(quickstart, "get_config", lambda: config)
    scope = {}
    for cell in cells_of("quickstart.ipynb"):
        exec(compile(cell.replace("STEPS = 1000", "STEPS = 4"), "quickstart.ipynb", "exec"), scope)
    assert scope["result"].status == "done"
    assert list(scope["last"].index) == ["E8"]
    assert (scope["last"]["step"] == 4).all()
    assert scope["statistics"].expert_count.sum() == 4 * 256 * 2
    assert len(plt.get_fignums()) == 3
    assert "active_parameters (within 10 %): 120,128" in capsys.readouterr().out
