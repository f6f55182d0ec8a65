"""`study.json`: what a study's folder is about. Read and written without JAX, by several processes at a time."""

from __future__ import annotations

import json
import os
import secrets
from typing import Any

from etils import epath

from jaxmoe.config import ConfigError
from jaxmoe.exclusive import one_at_a_time
from jaxmoe.scaling.study import HEADLINE_SLICE, Study
from jaxmoe.storage import is_remote, read_json, write_json

STUDY_FILE = "study.json"
_LOCK_FILE = ".study.lock"


def read_study_file(path: epath.Path) -> dict[str, Any]:
    """The contents of `study.json`.

    Raises:
      ConfigError: it is broken.
    """
    advice = "restore it, or delete it and run the study again: it is written anew, and nothing else is lost."
    try:
        contents = read_json(path)
    except ValueError as error:
        raise ConfigError(f"{error}; {advice}") from error
    members = contents.get("members", []) if isinstance(contents, dict) else None
    if not isinstance(members, list) or not all(isinstance(entry, dict) and "name" in entry for entry in members):
        raise ConfigError(f"{path} does not describe a study; {advice}")
    return contents


def check_writable(workdir: epath.Path) -> None:
    """Makes a study's folder if it is not there.

    Raises:
      ConfigError: nothing can be written in it.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"workdir {workdir} is a file; give a folder.")
    probe = workdir / f".writable.{os.getpid()}-{secrets.token_hex(4)}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        why = "there is no such bucket" if is_remote(workdir) and isinstance(error, FileNotFoundError) else error
        raise ConfigError(f"workdir {workdir} cannot be written to: {why}.") from error


def check_same_study(workdir: epath.Path, study: Study) -> None:
    """Checks that a folder is not another study's.

    Raises:
      ConfigError: it is; both names are given.
    """
    path = workdir / STUDY_FILE
    if path.exists():
        name = read_study_file(path).get("name")
        if name != study.name:
            raise ConfigError(
                f"{workdir} belongs to another study: study.name is {name!r} in the folder, {study.name!r} now. "
                "Take another folder, or give --resume=force to add this one's members to it."
            )


def write_study_file(study: Study, workdir: epath.Path, command: str | None = None, *, for_one_member: bool = False):
    """Brings `study.json` up to date; several processes may do so at a time.

    Args:
      study: to be in it.
      workdir: of the study.
      command: how a person would start it.
      for_one_member: leave a file alone that has the study as it is, so that the jobs of a sweep do not replace the
        command that started them all, and do not write at the same time where there are no locks.
    """
    with one_at_a_time(workdir / _LOCK_FILE):
        path = workdir / STUDY_FILE
        contents = study_file_contents(study, workdir, command)
        if for_one_member and path.exists():
            earlier = read_study_file(path)
            if _as_stored({**contents, "command": None}) == {**earlier, "command": None}:
                return
        write_json(path, contents)


def _as_stored(contents: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(contents))


def study_file_contents(study: Study, workdir: epath.Path, command: str | None = None) -> dict[str, Any]:
    """What `study.json` shall hold: the study, and members of earlier calls whose folders are there.

    So that running one slice after another in a folder adds to it, and nothing that was trained is forgotten.
    """
    contents = study.summary()
    path = workdir / STUDY_FILE
    earlier = read_study_file(path) if path.exists() else {}
    own = {member["name"]: member for member in contents["members"]}
    merged: dict[str, Any] = {}
    for member in earlier.get("members", ()):
        if member["name"] in own or (workdir / member["name"]).exists():
            merged[member["name"]] = member
    merged.update(own)
    contents["members"] = list(merged.values())
    slices = dict.fromkeys(name for member in contents["members"] for name in member["slices"])
    known = {**earlier.get("slices", {}), **contents["slices"]}
    contents["slices"] = {name: known.get(name, {}) for name in slices}
    contents["headline"] = HEADLINE_SLICE if HEADLINE_SLICE in slices else contents["headline"]
    contents["command"] = command if command is not None else earlier.get("command")
    return contents
