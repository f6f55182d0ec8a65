"""Whole files: what is written, what a failure leaves, what cannot be read."""

import pathlib
import sys

import pytest
from etils import epath

from jaxmoe.config import ConfigError
from jaxmoe.data.files import expand
from jaxmoe.storage import as_path, is_remote, read_json, write_bytes, write_json, write_text


def test_what_is_written_is_read_and_nothing_else_is_there(tmp_path):
    path = tmp_path / "new" / "folder" / "value.json"
    write_json(path, {"b": 1, "a": [None, "é"]})
    assert list(read_json(path).items()) == [("b", 1), ("a", [None, "é"])]
    write_text(path, "ü")
    assert path.read_bytes() == "ü".encode()
    assert [file.name for file in path.parent.iterdir()] == ["value.json"]


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    write_json(path, {"old": 1})

    def failing(self, target):
        raise OSError("no")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", failing)
    with pytest.raises(OSError, match="no"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["value.json"]


def test_a_number_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "value.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"{", b"", b"\xff"])
def test_a_file_that_is_not_json_is_named(tmp_path, content):
    write_bytes(tmp_path / "x.json", content)
    with pytest.raises(ValueError, match=r"x\.json is not JSON"):
        read_json(tmp_path / "x.json")


def test_a_home_folder_is_found_and_a_bucket_is_no_folder():
    assert as_path("~/runs") == epath.Path(pathlib.Path.home() / "runs")
    assert not is_remote(as_path("runs/mine"))
    assert is_remote("gs://bucket/study")


def test_a_bucket_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for use in (as_path, lambda path: expand([path], [".txt"])):
        with pytest.raises(ConfigError, match=r"gs://bucket/a.txt: gs:// needs `pip install 'jaxmoe\[gcs\]'`"):
            use("gs://bucket/a.txt")
