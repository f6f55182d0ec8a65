"""The `--config` flag of every command: an experiment file, an optional argument, and overrides.

    --config=experiments/configs/micro_study.py             the file
    --config=experiments/configs/micro_study.py:headline    its argument: selects a slice or a member
    --config.train.steps=200                                overrides one value for every member

A bare name, or `experiments/configs/NAME.py` where there is no such folder, is one of the experiment files that come
with the package, so that `--config=quickstart.py` works from any folder.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import importlib.util
import inspect
import os
import pathlib
import sys
import threading
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from jaxmoe.config import SOURCE_KINDS, ConfigError, DataConfig, GRPOConfig, RunConfig, nearest
from jaxmoe.exit_status import FAILED


class _FloatOrNone(flags.FloatParser):
    """Reads numbers, and `None`, by which many a key is switched off."""

    def parse(self, argument: str) -> float | None:
        return None if argument == "None" else super().parse(argument)


class _IntegerOrNone(flags.IntegerParser):
    """The same of whole numbers."""

    def parse(self, argument: str) -> int | None:
        return None if argument == "None" else super().parse(argument)


config_flags.register_flag_parser_for_type(float, _FloatOrNone())
config_flags.register_flag_parser_for_type(int, _IntegerOrNone())

HELP = {"--help", "-h", "--helpfull", "--helpshort", "-help"}
_PACKAGED = pathlib.Path(__file__).parent / "configs"


def find_config_file(path: str) -> pathlib.Path:
    """The experiment file that `path` names, here or in the package.

    Raises:
      ConfigError: there is none; the message names the nearest that exist.
    """
    given = pathlib.Path(path)
    candidates = [given]
    if str(given.parent) in (".", "experiments/configs"):
        candidates += [_PACKAGED / given.name, _PACKAGED / f"{given.name}.py"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    packaged = [file.name for file in _PACKAGED.glob("*.py") if file.name != "__init__.py"]
    raise ConfigError(f"--config={path}: no such experiment file.{nearest(given.name, packaged)}")


def load_config(specification: str) -> ml_collections.ConfigDict:
    """The configuration that an experiment file returns, complete with every default.

    Args:
      specification: `path.py` or `path.py:argument`; the argument is passed to the file's `get_config`.

    Raises:
      ConfigError: no such file, no `get_config` in it, or an argument that it does not take.
    """
    path, _, argument = specification.partition(":")
    file = find_config_file(path)
    spec = importlib.util.spec_from_file_location(f"experiment_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{file} has no function get_config; an experiment file must define one.")
    arguments = (argument,) if argument else ()
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError as error:
        raise ConfigError(
            f"--config={specification}: get_config of {file} is given what follows the colon, and does not take it "
            f"({error})."
        ) from error
    config = module.get_config(*arguments)
    return with_defaults(ml_collections.ConfigDict(config))


def with_defaults(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """`config` with every optional key of the known sections present, so that each can be overridden."""
    completed = config.copy_and_resolve_references()
    hints = typing.get_type_hints(RunConfig)
    for section in ("model", "train", "evaluation", "data", "mesh"):
        if section not in completed:
            completed[section] = ml_collections.ConfigDict()
        _fill(completed[section], hints[section])
    if "grpo" in completed:
        _fill(completed.grpo, GRPOConfig)
    if completed.get("start_from") is None:
        completed.start_from = ml_collections.config_dict.placeholder(str)
    completed.lock()
    return completed


def _fill(section: Any, kind: type) -> None:
    """Adds the defaults of dataclass `kind` that `section` lacks; None becomes a typed placeholder.

    What is no section is left as it is: the mistake is told when the configuration is resolved.
    """
    if not isinstance(section, ml_collections.ConfigDict):
        return
    hints = typing.get_type_hints(kind)
    with section.unlocked():
        for field in dataclasses.fields(kind):
            inner = [option for option in typing.get_args(hints[field.name]) if option is not type(None)]
            optional = type(None) in typing.get_args(hints[field.name])
            section_kind = inner[0] if optional else hints[field.name]
            if field.name in section:
                value = section[field.name]
                if kind is DataConfig and field.name == "sources":
                    for source in value.values() if isinstance(value, ml_collections.ConfigDict) else ():
                        if isinstance(source, ml_collections.ConfigDict) and source.get("kind") in SOURCE_KINDS:
                            _fill(source, SOURCE_KINDS[source.kind])
                elif dataclasses.is_dataclass(section_kind):
                    _fill(value, section_kind)
                elif value is None and optional and inner[0] in (int, float, str):
                    section[field.name] = ml_collections.config_dict.placeholder(inner[0])
                continue
            if field.default is dataclasses.MISSING:
                continue
            if field.default is None and optional:
                if inner[0] in (int, float, str):
                    section[field.name] = ml_collections.config_dict.placeholder(inner[0])
            elif dataclasses.is_dataclass(field.default):
                section[field.name] = ml_collections.ConfigDict()
                _fill(section[field.name], section_kind)
            else:
                section[field.name] = field.default


def run_with_config(
    main: Callable[[ml_collections.ConfigDict, tuple[str, ...]], int | None], actions: Sequence[str] = ()
) -> typing.NoReturn:
    """Runs `main(config, overridden)` as a command that takes `--config` and its overrides.

    A ConfigError is printed as one line and the exit status is 2; nothing else is caught. `overridden` holds the
    dotted keys that the command line set. With `actions`, the command line must have one of them, and it is
    `main(config, overridden, action)`.
    """
    argv = list(sys.argv)
    specification = _take_flag(argv, "config")
    try:
        if specification is None:
            if HELP & set(argv):
                show_help(argv)
            packaged = ", ".join(sorted(f"experiments/configs/{p.name}" for p in _PACKAGED.glob("[!_]*.py")))
            raise ConfigError(f"--config is missing; give an experiment file, for example one of {packaged}.")
        config = load_config(specification)
        _let_members_override(config, argv)
        _refuse_unknown_overrides(config, argv)
        holder = config_flags.DEFINE_config_dict("config", config, sys_argv=argv, lock_config=True)
    except ConfigError as error:
        fail(error)

    def run(remaining: Sequence[str]) -> int | None:
        try:
            action = _action(remaining[1:], actions)
            return main(holder.value, tuple(config_flags.get_override_values(flags.FLAGS["config"])), *action)
        except ConfigError as error:
            fail(error)
        except BrokenPipeError:  # the reader of a table, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0

    run_command(run, argv)


def run_command(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> typing.NoReturn:
    """Parses absl's flags, runs `main` with what is left of the command line, and ends with the status it returns.

    Args:
      main: given the program's name and the arguments that are no flags.
      argv: command line; None for that of the process.
    """
    try:
        app.run(main, argv=argv, flags_parser=_parse_flags)
    except SystemExit as end:
        leave(end.code or 0)
    except Exception:
        traceback.print_exc()
        leave(FAILED)


def leave(status: int) -> typing.NoReturn:
    """Ends the process as `sys.exit` does, but leaves the interpreter standing.

    Before Python 3.14 a thread of XLA or of TensorStore that asks for Python's lock while the interpreter is taken
    down aborts the process (CPython issue 87135): a command that did all it had to would end with SIGABRT.

    Args:
      status: of the exit; `FAILED` in place of 0 where what was printed cannot be written.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        pass
    except OSError as error:
        print(f"error: what was printed cannot be written: {error}", file=sys.stderr)
        status = status or FAILED
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(status)


def show_help(argv: Sequence[str]) -> typing.NoReturn:
    """Prints what a command that takes `--config` says of itself, and ends."""
    flags.DEFINE_string(
        "config", None, "Experiment file, FILE.py or FILE.py:ARGUMENT; --config.SECTION.KEY=VALUE overrides a value.",
        module_name=sys.argv[0],
    )  # fmt: skip
    run_command(lambda _: None, ["--help" if part == "-h" else part for part in argv])


def config_arguments() -> list[str]:
    """The `--config` of this command line and its overrides, to pass on to another command."""
    values = config_flags.get_override_values(flags.FLAGS["config"])
    return [
        f"--config={_take_flag(list(sys.argv), 'config')}",
        *(f"--config.{key}={value}" for key, value in values.items()),
    ]


def _action(given: Sequence[str], actions: Sequence[str]) -> Sequence[str]:
    """The action of a command line, if the command has any."""
    if not actions and given:
        raise ConfigError(f"unexpected argument {given[0]!r}; flags are written --name=value.")
    if actions and (len(given) != 1 or given[0] not in actions):
        known = f"{', '.join(actions[:-1])} or {actions[-1]}"
        hint = nearest(given[0], actions) if given and given[0] not in actions else ""
        raise ConfigError(f"{' '.join(given) or 'nothing'} is asked for; one of {known} is needed.{hint}")
    return given


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser for `app.run`: a mistake in the flags is one line and exit status 2, and help is no failure."""
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        fail(error)
    except SystemExit:  # absl has shown help, and would end with 1
        sys.exit(0)


def fail(error: Exception) -> typing.NoReturn:
    """Prints a user's error as one message, without a traceback, and exits with status 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _take_flag(argv: list[str], name: str) -> str | None:
    """Removes `--name=value` or `--name value` from argv and returns the value, None if absent."""
    for position, argument in enumerate(argv):
        if position and argument.lstrip("-").startswith(f"{name}=") and argument.startswith("-"):
            return argv.pop(position).split("=", 1)[1]
        if position and argument in (f"-{name}", f"--{name}") and position + 1 < len(argv):
            value = argv.pop(position + 1)
            argv.pop(position)
            return value
    return None


def _overridden_keys(argv: Sequence[str]) -> list[str]:
    """The dotted keys after `--config.` on the command line."""
    given = [argument.lstrip("-") for argument in argv[1:] if argument.startswith(("--config.", "-config."))]
    return [argument.split("=", 1)[0].removeprefix("config.") for argument in given]


def _let_members_override(config: ml_collections.ConfigDict, argv: Sequence[str]) -> None:
    """Gives a member the value of the sections for each key that the command line is about to set for it."""
    for key in _overridden_keys(argv):
        parts = key.split(".")
        if parts[0] != "members" or len(parts) < 3 or parts[1] not in config.get("members", {}):
            continue
        section, member = config, config.members[parts[1]]
        for part in parts[2:]:
            if not isinstance(section, ml_collections.ConfigDict) or part not in section:
                break
            section = section[part]
            with member.unlocked():
                if part not in member:
                    leaf = not isinstance(section, ml_collections.ConfigDict)
                    member[part] = section if leaf else ml_collections.ConfigDict()
            member = member[part]


def _refuse_unknown_overrides(config: ml_collections.ConfigDict, argv: Sequence[str]) -> None:
    """Raises a ConfigError for an override whose dotted key the configuration does not have."""
    for key in _overridden_keys(argv):
        section, walked = config, ""
        for part in key.split("."):
            if not isinstance(section, ml_collections.ConfigDict) or part not in section:
                known = section.keys() if isinstance(section, Mapping | ml_collections.ConfigDict) else ()
                raise ConfigError(f"unknown key --config.{walked}{part}.{nearest(part, map(str, known))}")
            section, walked = section[part], f"{walked}{part}."
