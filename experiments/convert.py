"""Exchanges models with Hugging Face transformers.

    python -m experiments.convert import --checkpoint=FOLDER --config=experiments/configs/pretrained.py:FOLDER \\
        --workdir=runs/continued
    python -m experiments.convert export --run=runs/quickstart/E8 --output=exported [--dtype=bfloat16]

`import` makes the folder of a member of the experiment, with the checkpoint as its step 0: `python -m experiments.run`
of the same experiment and workdir then trains from there. The member's model must be the checkpoint's, which
`experiments/configs/pretrained.py:FOLDER` sees to. Where a run has several processes (TPU slices, Slurm, GKE), so has
its import: each reads what its devices hold. `export` writes the newest checkpoint of a run as a folder with
config.json, safetensors files and the tokenizer. Neither needs torch or transformers. Exit status: 0 done, 2 a mistake
of yours, said in one line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import ml_collections
from absl import flags

from experiments.flags import HELP, fail, run_command, run_with_config, show_help
from experiments.terminal import log_to_terminal
from jaxmoe.config import ConfigError, nearest

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "import: folder of transformers, local or gs://.")
_WORKDIR = flags.DEFINE_string("workdir", None, "import: folder of the study. Default: runs/<study name>.")
_MEMBER = flags.DEFINE_string("member", None, "import: which member. Default: the first.")
_RUN = flags.DEFINE_string("run", None, "export: folder of a run, WORKDIR/MEMBER, local or gs://.")
_OUTPUT = flags.DEFINE_string("output", None, "export: folder to write.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "export: of the tensors.")
_ARCHITECTURE = flags.DEFINE_string(
    "architecture", None, "export: model_type to write (mixtral, olmoe, ...). Default: the first that fits the model."
)


def import_checkpoint(config: ml_collections.ConfigDict, overridden: tuple[str, ...]) -> None:
    """Makes the run directory of a member from a checkpoint of transformers."""
    from jaxmoe.interop.huggingface import import_run
    from jaxmoe.processes import connect
    from jaxmoe.scaling.study import Study
    from jaxmoe.storage import as_path

    if not _CHECKPOINT.value:
        raise ConfigError("import needs --checkpoint=FOLDER, with config.json and safetensors files in it.")
    study = Study.from_config_dict(config)
    members = {member.name: member for member in study.members}
    name = next(iter(members)) if _MEMBER.value is None else _MEMBER.value
    if name not in members:
        raise ConfigError(f"--member={name}: no such member.{nearest(name, members)}")
    workdir = _WORKDIR.value or f"runs/{study.name}"
    log_to_terminal()
    connect()
    started = time.perf_counter()
    directory = as_path(workdir) / name
    import_run(_CHECKPOINT.value, members[name].config, directory, cache_dir=as_path(workdir) / "cache")
    print(
        f"{directory}: starts from {_CHECKPOINT.value} ({time.perf_counter() - started:.0f} s). Train it with the same "
        "--config and --workdir: python -m experiments.run"
    )


def export(argv: Sequence[str]) -> None:
    """Writes a run as a folder of transformers."""
    if len(argv) > 1:
        raise ConfigError(f"unexpected argument {argv[1]!r}; flags are written --name=value.")
    if not _RUN.value or not _OUTPUT.value:
        raise ConfigError("export needs --run=WORKDIR/MEMBER and --output=FOLDER.")

    from jaxmoe.interop.huggingface import export_run
    from jaxmoe.storage import as_path, read_json

    log_to_terminal()
    output = as_path(_OUTPUT.value)
    step = export_run(_RUN.value, output, architecture=_ARCHITECTURE.value, dtype=_DTYPE.value)
    (name,) = read_json(output / "config.json")["architectures"]
    files = sorted(path.name for path in output.iterdir())
    print(f"{output}: {name}, step {step} of {_RUN.value}, {_DTYPE.value}: {', '.join(files)}")


def main() -> None:
    """Dispatches to the command that is the first argument."""
    commands = ("import", "export")
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in HELP:
        show_help(sys.argv)
    if name not in commands:
        fail(ConfigError(f"{name or 'nothing'!r} is no command.{nearest(name, commands)}"))
    del sys.argv[1]
    if name == "import":
        run_with_config(import_checkpoint)
        return

    def run(argv: Sequence[str]) -> None:
        try:
            export(argv)
        except ConfigError as error:
            fail(error)

    run_command(run)


if __name__ == "__main__":
    main()
