"""A run directory belongs to one configuration, and to the data that it was trained on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from etils import epath

from jaxmoe.config import ConfigError, RunConfig, TrainConfig, config_hash, to_dict
from jaxmoe.data import DataError, content_changes
from jaxmoe.run_files import CHECKPOINT_DIRECTORY, CONFIG_FILE, DONE_FILE, RECORDS_DIRECTORY, UNREADABLE_DIRECTORY
from jaxmoe.storage import is_remote, read_json, write_json

logger = logging.getLogger(__name__)

Resume = Literal["auto", "force"]

_BOOKKEEPING = tuple(f"train.{name}" for name in TrainConfig.BOOKKEEPING)

_SHOWN_DIFFERENCES = 20


def check_directory(
    directory: epath.PathLike, run: RunConfig, resume: Resume = "auto", *, step: int | None = None
) -> None:
    """Checks that a run may go on in a directory; writes nothing.

    A local directory in which no run has reached a checkpoint or a record yet may be another configuration's: there is
    nothing of it to go on from. (In a bucket, which has no locks, another process may be training there.) A finished
    run stays what it was trained as, whatever `resume` says: only its evaluation and its bookkeeping may change, and
    `train.steps` may rise.

    Args:
      directory: of the run; it need not be there.
      run: the configuration about to be trained in it.
      resume: `force` accepts another configuration than the directory's.
      step: of the newest checkpoint, where it is known; a run is finished if it is at its end, or marked DONE.

    Raises:
      ConfigError: the directory is another configuration's; every difference is listed.
    """
    directory = epath.Path(directory)
    found, wanted = _stored(directory / CONFIG_FILE), _as_stored(run)
    if found is None or not _differing(found, wanted) or not _has_results(directory):
        return
    if resume != "force":
        raise ConfigError(
            f"{directory} belongs to another configuration:\n{describe_differences(found, wanted)}\n"
            "Give --resume=force to go on in it with the new one, or take another folder."
        )
    old_steps = _flat(found).get("train.steps")
    at_end = step is not None and isinstance(old_steps, int) and step >= old_steps
    if not at_end and not (directory / DONE_FILE).exists():
        return
    trained_as = [key for key in _differing(found, wanted) if not _may_change_after_training(key)]
    if "train.steps" in trained_as and isinstance(old_steps, int) and run.train.steps > old_steps:
        trained_as.remove("train.steps")
    if trained_as:
        raise ConfigError(
            f"{directory} holds a finished run, and what it was trained as cannot be changed, with --resume=force "
            f"neither:\n{describe_differences(found, wanted, trained_as)}\n"
            "Take another folder, or another member name, for the new configuration. (Of a finished run, evaluation.* "
            f"and {', '.join(_BOOKKEEPING)} may change, and train.steps may rise.)"
        )


def claim_directory(directory: epath.PathLike, run: RunConfig) -> None:
    """Writes `run` to the directory's config.json if it is not the one there; a DONE of another one goes first.

    Another mesh makes no other run.

    Args:
      directory: of the run, for which `check_directory` has passed; made if it is not there.
      run: the configuration that is trained in it from now on.
    """
    directory = epath.Path(directory)
    found, wanted = _stored(directory / CONFIG_FILE), _as_stored(run)
    if found == wanted:
        return
    if found is None or _differing(found, wanted):
        (directory / DONE_FILE).unlink(missing_ok=True)
    if found is not None and _differing(found, wanted) and not _has_results(directory):
        logger.warning(
            "%s: no run has reached a checkpoint here; it is started anew with another configuration:\n%s",
            directory, describe_differences(found, wanted),
        )  # fmt: skip
    write_json(directory / CONFIG_FILE, to_dict(run))


def check_contents(
    directory: epath.PathLike,
    run: RunConfig,
    found: Mapping[str, Any] | None,
    wanted: Mapping[str, Any],
    step: int,
    resume: Resume = "auto",
) -> None:
    """Checks that a run goes on with the data that it was trained on; writes nothing.

    Args:
      directory: of the run.
      run: the configuration, for which `check_directory` has passed.
      found: `Mixture.contents` at the newest checkpoint; None if it does not say.
      wanted: those of now.
      step: of the checkpoint.
      resume: `force` accepts other data, unless the run is finished.

    Raises:
      DataError: the data are others; every source that differs is listed.
    """
    changes = [] if found is None else content_changes(found, wanted)
    finished = step >= run.train.steps
    if not changes or (resume == "force" and not finished):
        return
    advice = (
        "The run is finished, and would be evaluated on what it was not trained on. Put the old data back, or take "
        "another folder for the new."
        if finished else
        "Put the old data back, give --resume=force to go on with the new (every record then says so), or take "
        "another folder."
    )  # fmt: skip
    listed = [f"  {change}" for change in changes]
    happened = f"{directory}: until step {step} it was trained on other data than there are now:"
    raise DataError("\n".join([happened, *listed, advice]))


def training_hash(run: RunConfig) -> str:
    """Hash of what the numbers of a training depend on: no evaluation, no bookkeeping, no name."""
    relevant = {key: value for key, value in _flat(_as_stored(run)).items() if not _may_change_after_training(key)}
    return config_hash({key: value for key, value in relevant.items() if key != "name"})


def describe_differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], keys: Sequence[str] | None = None
) -> str:
    """The keys in which two configurations differ, one to a line, with both values; of them `keys` alone if given."""
    old, new = _flat(found), _flat(wanted)
    lines = [
        f"  {key}: {_shown(old, key)} in the folder, {_shown(new, key)} now"
        for key in (_differing(found, wanted) if keys is None else keys)
    ]
    left_out = len(lines) - _SHOWN_DIFFERENCES
    return "\n".join(lines[:_SHOWN_DIFFERENCES] + ([f"  and {left_out} more"] if left_out > 0 else []))


def _has_results(directory: epath.Path) -> bool:
    """Whether anything is or may be there that a run of another configuration would mix with its own."""
    if is_remote(directory) or (directory / DONE_FILE).exists() or (directory / UNREADABLE_DIRECTORY).exists():
        return True
    checkpoints, records = directory / CHECKPOINT_DIRECTORY, directory / RECORDS_DIRECTORY
    return (checkpoints.exists() and any(path.name.isdecimal() for path in checkpoints.iterdir())) or (
        records.exists() and any(records.glob("*.json"))
    )


def _stored(path: epath.Path) -> dict[str, Any] | None:
    """The configuration in a file; None if there is no file."""
    if not path.exists():
        return None
    try:
        found = read_json(path)
    except ValueError as error:
        raise ConfigError(f"{error}; restore it, or take another folder.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a configuration but {found!r:.100}; restore it, or take another folder.")
    return found


def _as_stored(run: RunConfig) -> dict[str, Any]:
    """A configuration as it comes back from its file."""
    return json.loads(json.dumps(to_dict(run)))


def _may_change_after_training(key: str) -> bool:
    return key.split(".")[0] in ("evaluation", "mesh") or key in _BOOKKEEPING


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    old, new = _flat(found), _flat(wanted)
    return [
        key
        for key in [*old, *(key for key in new if key not in old)]
        if not _beside_the_run(key) and (key not in old or key not in new or old[key] != new[key])
    ]


def _beside_the_run(key: str) -> bool:
    """Whether a key is no part of what a run is (`jaxmoe.config.values.NOT_IDENTITY`)."""
    return key.split(".")[0] == "mesh" or key.startswith("evaluation.test_time.")


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "nothing"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: list(value) if isinstance(value, tuple) else value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flat(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat
