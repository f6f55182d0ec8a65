"""Everything about a study that can go wrong and can be known before its first step."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from etils import epath

from jaxmoe import accounting
from jaxmoe.accounting import readable_bytes
from jaxmoe.config import ConfigError, config_hash, to_dict
from jaxmoe.data import Mixture, Tokenizer, load_tokenizer, require_vocabulary
from jaxmoe.scaling.study import HEADLINE_SLICE, Member, Study
from jaxmoe.sharding import partitioning_of_run
from jaxmoe.storage import is_remote, read_json
from jaxmoe.training import (
    CHECKPOINT_DIRECTORY,
    DONE_FILE,
    CheckpointError,
    check_directory,
    check_format,
    check_unused,
)

logger = logging.getLogger(__name__)

STUDY_FILE = "study.json"
Resume = Literal["auto", "force"]


def preflight(
    study: Study,
    members: Sequence[Member],
    workdir: epath.PathLike,
    *,
    resume: Resume = "auto",
    cache_dir: str | os.PathLike | None = None,
) -> None:
    """Checks the study, its mesh, its folder, its data and the disk, without training or building a model.

    Args:
      study: checked whole.
      members: those about to be trained.
      workdir: of the study; made if it is not there.
      resume: `force` accepts folders of another configuration, unless it was trained to its end as something else.
      cache_dir: where tokenized text is kept if the configuration does not say.

    Raises:
      ConfigError: with the member, the value and what would be accepted; DataError, which is one, for a data file
        that is missing, empty or broken.
    """
    study.check()
    workdir = epath.Path(workdir)
    _check_writable(workdir)
    if resume != "force":
        _check_same_study(workdir, study)
    for member in members:
        check_directory(workdir / member.name, member.config, resume)
    for member in members:
        with _naming(member):
            partitioning_of_run(member.config)
    waiting = [member for member in members if not is_done(workdir / member.name, member)]
    for member in waiting:
        check_unused(workdir / member.name)
        try:
            check_format(workdir / member.name / CHECKPOINT_DIRECTORY)
        except CheckpointError as error:
            raise ConfigError(f"member {member.name!r}: {error}") from error
    check_data(waiting, cache_dir)
    _check_space(workdir, waiting)


def is_done(directory: epath.Path, member: Member) -> bool:
    """Whether a member was trained to its end with this very configuration."""
    done = read_done(directory)
    return done is not None and done["config_hash"] == config_hash(member.config)


def read_done(directory: epath.Path) -> dict[str, Any] | None:
    """A member's DONE; None, with a warning if it is there but broken, where there is none."""
    path = directory / DONE_FILE
    if not path.exists():
        return None
    try:
        done = read_json(path)
        missing = [key for key in ("config_hash", "step", "loss") if key not in done]
        if not missing:
            return done
        reason = f"it has no {', '.join(missing)}"
    except (ValueError, TypeError) as error:
        reason = str(error)
    logger.warning("%s cannot be used (%s); the member counts as not done, and gets a new one", path, reason)
    return None


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


def check_data(members: Sequence[Member], cache_dir: str | os.PathLike | None = None) -> None:
    """Loads every tokenizer and builds every data configuration once.

    Raises:
      ConfigError: with the member that first needs what is missing.
    """
    tokenizers: dict[str, Tokenizer] = {}
    built: set[str] = set()
    for member in members:
        config = member.config
        with _naming(member):
            spec = config.data.tokenizer
            if spec not in tokenizers:
                tokenizers[spec] = load_tokenizer(spec)
            require_vocabulary(tokenizers[spec], config.model.vocab_size)
            key = config_hash({"data": to_dict(config.data), "length": config.train.sequence_length})
            if key not in built:
                built.add(key)
                Mixture.of_run(config, tokenizer=tokenizers[spec], cache_dir=cache_dir)


@contextlib.contextmanager
def _naming(member: Member) -> Iterator[None]:
    """Errors of configuration, those of data among them, start with the member's name."""
    try:
        yield
    except ConfigError as error:
        raise type(error)(f"member {member.name!r}: {error}") from error


def _check_writable(workdir: epath.Path) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"workdir {workdir} is a file; give a folder.")
    probe = workdir / f".writable.{os.getpid()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"workdir {workdir} cannot be written to: {error}.") from error


def _check_same_study(workdir: epath.Path, study: Study) -> None:
    path = workdir / STUDY_FILE
    if path.exists():
        name = read_study_file(path).get("name")
        if name != study.name:
            raise ConfigError(
                f"{workdir} belongs to another study: study.name is {name!r} in the folder, {study.name!r} now. "
                "Take another folder, or give --resume=force to add this one's members to it."
            )


def checkpoint_bytes(member: Member) -> int:
    """Size of one checkpoint: parameters and two moments, float32."""
    memory = accounting.memory_bytes(member.config.model, member.config.train)
    return memory.weights + memory.optimizer


def _check_space(workdir: epath.Path, members: Sequence[Member]) -> None:
    """Checkpoints that stay and are not there yet, and one more while it is being written."""
    if is_remote(workdir) or not members:
        return
    kept = sum(
        checkpoint_bytes(member) * max(0, member.config.train.keep_checkpoints - _checkpoints_in(workdir / member.name))
        for member in members
    )
    needed = kept + max(map(checkpoint_bytes, members))
    free = shutil.disk_usage(workdir).free
    if needed > free:
        raise ConfigError(
            f"no space left for the checkpoints of {len(members)} members: about {readable_bytes(needed)} are needed "
            f"in {workdir}, {readable_bytes(free)} are free. Free space, take another folder, or lower "
            "train.keep_checkpoints."
        )


def _checkpoints_in(directory: epath.Path) -> int:
    """How many complete checkpoints a member's folder holds."""
    folder = directory / CHECKPOINT_DIRECTORY
    return sum(path.name.isdigit() for path in folder.iterdir()) if folder.exists() else 0


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
