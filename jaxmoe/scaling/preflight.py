"""Everything about a study that can go wrong and can be known before its first step."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Literal

from etils import epath

from jaxmoe import accounting
from jaxmoe.accounting import readable_bytes
from jaxmoe.config import ConfigError, RunConfig, config_hash, to_dict
from jaxmoe.data import Mixture, Tokenizer, require_vocabulary, tokenizer_of
from jaxmoe.layers import AttentionCase, resolved_attention
from jaxmoe.post_training import check_grpo_data
from jaxmoe.scaling.status import is_done
from jaxmoe.scaling.study import Member, Study
from jaxmoe.scaling.study_file import check_same_study, check_writable
from jaxmoe.sharding import Partitioning, partitioning_of_run
from jaxmoe.storage import is_remote
from jaxmoe.training import (
    CHECKPOINT_DIRECTORY,
    CheckpointError,
    check_directory,
    check_format,
    check_start,
    check_unused,
)
from pallas_kernels.execution import target_of

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
    check_writable(workdir)
    if resume != "force":
        check_same_study(workdir, study)
    for member in members:
        check_directory(workdir / member.name, member.config, resume)
    waiting = [member for member in members if not is_done(workdir / member.name, member)]
    for member in waiting:
        with _naming(member):
            _check_implementations(member.config, partitioning_of_run(member.config))
            if member.config.start_from is not None:
                _check_start(member, workdir / member.name)
        check_unused(workdir / member.name, wait=True)
        try:
            check_format(workdir / member.name / CHECKPOINT_DIRECTORY)
        except CheckpointError as error:
            raise ConfigError(f"member {member.name!r}: {error}") from error
    check_data(waiting, cache_dir)
    _check_space(workdir, waiting)


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
                tokenizers[spec] = tokenizer_of(config.data)
            require_vocabulary(tokenizers[spec], config.model.vocab_size)
            prompts = None if config.grpo is None else to_dict(config.grpo)
            key = config_hash({
                "data": to_dict(config.data), "length": config.train.sequence_length, "prompts": prompts,
            })  # fmt: skip
            if key not in built:
                built.add(key)
                mixture = Mixture.of_run(config, tokenizer=tokenizers[spec], cache_dir=cache_dir)
                if config.grpo is not None:
                    check_grpo_data(config, mixture)


def _check_implementations(run: RunConfig, partitioning: Partitioning | None) -> None:
    """What was asked for by name must be able to run here, in the shapes and the dtype of the run."""
    model = run.model
    if model.num_moe_layers and model.moe.backend != "auto":
        if model.moe.backend == "cpu_native" and model.compute_dtype != "float32":
            raise ConfigError(
                f"model.moe.backend='cpu_native' is float32 alone, but model.compute_dtype={model.compute_dtype!r}; "
                "choose 'cpu' or 'auto'."
            )
        try:
            target_of(model.moe.backend)
        except ValueError as error:
            raise ConfigError(f"model.moe.{error}") from error
    if model.attention != "auto":
        context = 1 if partitioning is None else partitioning.size("context")
        case = AttentionCase(run.train.sequence_length, model.head_size, model.compute_dtype, context=context)
        try:
            resolved_attention(model.attention, case)
        except ConfigError as error:
            raise ConfigError(f"model.{error}") from error


def _check_start(member: Member, directory: epath.Path) -> None:
    """Parameters to start from are needed until there is a checkpoint, and under GRPO, as the reference, for ever."""
    if member.config.grpo is not None or not _checkpoints_in(directory):
        check_start(member.config)


@contextlib.contextmanager
def _naming(member: Member) -> Iterator[None]:
    """Errors of configuration, those of data among them, start with the member's name."""
    try:
        yield
    except ConfigError as error:
        raise type(error)(f"member {member.name!r}: {error}") from error


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


