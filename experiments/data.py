"""Looks at the data of an experiment, makes tokens of text, and trains tokenizers.

    python -m experiments.data count --config=experiments/configs/quickstart.py [--member=NAME] [--json]
    python -m experiments.data inspect --config=experiments/configs/quickstart.py [--member=NAME] [--rows=2]
    python -m experiments.data tokenize --inputs='raw/dclm/*.jsonl.zst' --tokenizer=tok.model --output=corpus/dclm_dedup
    python -m experiments.data train_tokenizer --inputs='corpus/*.txt,more.jsonl' --vocab_size=8192 --output=tok.json

`count` prints rows, tokens and epochs of every source over the run. `inspect` prints the first training and test rows
of every source, decoded, each part with its loss weight. `tokenize` writes ArrayRecord shards that a source of kind
`tokens` reads, with `--processes` at a time; called again, it goes on after the last whole shard. `train_tokenizer`
writes a byte-level BPE that `--config.data.tokenizer=tok.json` uses. Exit status: 0 done, 2 a mistake of yours, said in
one line, 75 `tokenize` was stopped by SIGTERM or SIGINT and goes on when called again.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ml_collections
import numpy as np
from absl import flags

from experiments.flags import HELP, fail, run_command, run_with_config, show_help
from experiments.terminal import log_to_terminal
from jaxmoe.config import ConfigError, RunConfig, nearest
from jaxmoe.exit_status import RESUMABLE

if TYPE_CHECKING:
    from jaxmoe.data.tokenize import TokenizedCorpus

_INPUTS = flags.DEFINE_list(
    "inputs", [],
    "tokenize, train_tokenizer: files or patterns, local or gs://: .txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, "
    ".array_record.",
)  # fmt: skip
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "tokenize: a .json or .model file, or `bytes`.")
_PROCESSES = flags.DEFINE_integer("processes", None, "tokenize: default, one for each core.", lower_bound=1)
_SHARD_TOKENS = flags.DEFINE_integer("shard_tokens", 1 << 28, "tokenize: tokens of a shard, about.", lower_bound=1)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 8192, "train_tokenizer: ids in all, 3 special tokens included.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "tokenize: the folder of the shards, local or gs://. train_tokenizer: the .json file to write."
)
_TEXT_KEY = flags.DEFINE_list(
    "text_key", ["text"],
    "tokenize: the field of a JSON line that holds the text; train_tokenizer: fields, for example question,answer.",
)  # fmt: skip
_ON_ERROR = flags.DEFINE_enum(
    "on_error", "raise", ["raise", "skip"], "tokenize, train_tokenizer: what a broken record does."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "train_tokenizer: replace the output if it exists.")
_MEMBER = flags.DEFINE_string("member", None, "count, inspect: whose data. Default: the first member's.")
_ROWS = flags.DEFINE_integer("rows", 2, "inspect: rows of each split.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "count, tokenize: print JSON.")
flags.DEFINE_alias("input", "inputs")


def count(config: ml_collections.ConfigDict, overridden: tuple[str, ...]) -> None:
    """Prints what each source contributes to the run."""
    from jaxmoe.data import describe_accounting

    mixture = _mixture(_run(config))
    accounts = mixture.accounting()
    if _JSON.value:
        print(json.dumps([dataclasses.asdict(account) for account in accounts.values()], indent=2))
        return
    tokens = sum(account.tokens for account in accounts.values())
    positions = mixture.steps * mixture.batch_size * mixture.sequence_length
    print(describe_accounting(accounts))
    print(
        f"\n{mixture.steps:,} steps of {mixture.batch_size:,} x {mixture.sequence_length:,}: {positions:,} positions, "
        f"{tokens:,} of them tokens ({tokens / positions:.1%}), the rest padding."
    )
    for source in mixture.sources:
        rows = ", ".join(f"{source.row_count(split):,} {split} rows" for split in source.splits)
        reasons = "".join(f"; skipped {number:,}: {reason}" for reason, number in source.skipped.items())
        print(f"{source.name}: {rows}{reasons}")


def inspect(config: ml_collections.ConfigDict, overridden: tuple[str, ...]) -> None:
    """Prints the first rows of each source, with loss weights."""
    mixture = _mixture(_run(config))
    for source in mixture.sources:
        for split in source.splits:
            total = source.row_count(split)
            rows = source.rows(np.arange(min(_ROWS.value, total)), split)
            for row in range(len(rows["source"])):
                print(f"{source.name}, {split} row {row} of {total:,}")
                print("\n".join(_described({key: values[row] for key, values in rows.items()}, mixture.tokenizer)))


def tokenize() -> int:
    """Makes shards of tokens and prints how many they are; returns the exit status."""
    if not _INPUTS.value or not _OUTPUT.value or not _TOKENIZER.value:
        raise ConfigError("tokenize needs --inputs=FILES, --tokenizer=FILE and --output=FOLDER.")
    if len(_TEXT_KEY.value) != 1:
        raise ConfigError(f"--text_key={','.join(_TEXT_KEY.value)}; one field holds the text.")

    from jaxmoe.data.tokenize import tokenize_corpus

    log_to_terminal()
    processes = _PROCESSES.value or os.cpu_count() or 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with TokenizeProgress() as progress:
            corpus = tokenize_corpus(
                _INPUTS.value, _OUTPUT.value, _TOKENIZER.value,
                text_key=_TEXT_KEY.value[0],
                on_error=_ON_ERROR.value,
                shard_tokens=_SHARD_TOKENS.value,
                processes=processes,
                progress=progress.update,
            )  # fmt: skip
    except KeyboardInterrupt:
        print(f"stopped; whole shards are kept. The same command goes on there ({_OUTPUT.value}).", file=sys.stderr)
        return RESUMABLE
    if _JSON.value:
        print(json.dumps({"source": _OUTPUT.value, **dataclasses.asdict(corpus)}, indent=2))
        return 0
    print(
        f"{_OUTPUT.value}: {corpus.tokens:,} tokens of {corpus.documents:,} documents in {corpus.shards:,} shards"
        + "".join(f"; skipped {count:,}: {reason}" for reason, count in corpus.skipped.items())
    )
    return 0


class TokenizeProgress:
    """One line on the terminal, or a line of log now and then where there is none."""

    _SECONDS = 30.0

    def __init__(self):
        self._started = self._said = time.monotonic()
        self._before: int | None = None

    def __enter__(self) -> TokenizeProgress:
        return self

    def __exit__(self, *exception) -> None:
        if sys.stderr.isatty():
            print(file=sys.stderr)

    def update(self, corpus: TokenizedCorpus, files: int, total: int) -> None:
        """Says where the work stands."""
        now = time.monotonic()
        if self._before is None:
            self._before, self._started = corpus.tokens, now
        if now - self._said < (0.5 if sys.stderr.isatty() else self._SECONDS):
            return
        self._said = now
        rate = (corpus.tokens - self._before) / max(now - self._started, 1e-9)
        line = (
            f"{corpus.documents:,} documents, {corpus.tokens:,} tokens, {rate:,.0f} tokens/s, file {files + 1:,} of "
            f"{total:,}"
        )
        print(f"\r{line}\033[K" if sys.stderr.isatty() else line, end="", file=sys.stderr, flush=True)
        if not sys.stderr.isatty():
            print(file=sys.stderr)


def train_tokenizer() -> None:
    """Trains a tokenizer and writes it."""
    if not _INPUTS.value or not _OUTPUT.value:
        raise ConfigError("train_tokenizer needs --inputs=FILES and --output=FILE.json.")
    if not _OUTPUT.value.endswith(".json"):
        raise ConfigError(f"--output={_OUTPUT.value}; its name must end in .json.")

    from jaxmoe.data.files import expand
    from jaxmoe.data.records import TEXT_SUFFIXES, RecordErrors
    from jaxmoe.data.text import read_texts
    from jaxmoe.data.tokenizer_files import train_tokenizer as train
    from jaxmoe.storage import as_path, write_bytes

    output = as_path(_OUTPUT.value)
    if output.exists() and not _OVERWRITE.value:
        raise ConfigError(f"--output={output} exists; choose another name, or --overwrite.")
    if not output.parent.is_dir():
        raise ConfigError(f"--output={output}: there is no folder {output.parent}.")
    errors = RecordErrors("inputs", _ON_ERROR.value)
    paths = expand(_INPUTS.value, TEXT_SUFFIXES)
    texts = itertools.chain.from_iterable(read_texts(paths, key, errors) for key in _TEXT_KEY.value)
    content = train(texts, _VOCAB_SIZE.value, show_progress=sys.stderr.isatty())
    write_bytes(output, content)
    vocabulary = len(json.loads(content)["model"]["vocab"])
    skipped = f" {errors.total} records were skipped." if errors.total else ""
    fewer = ""
    if vocabulary < _VOCAB_SIZE.value:
        fewer = f" ({_VOCAB_SIZE.value} asked for; there are no more pairs to merge)"
    print(
        f"{output}: {vocabulary} ids{fewer}. Use it with --config.data.tokenizer={output} "
        f"--config.model.vocab_size={vocabulary}.{skipped}"
    )


def _run(config: ml_collections.ConfigDict) -> RunConfig:
    """The configuration of the member that `--member` names."""
    from jaxmoe.scaling.study import Study

    members = {member.name: member for member in Study.from_config_dict(config).members}
    name = next(iter(members)) if _MEMBER.value is None else _MEMBER.value
    if name not in members:
        raise ConfigError(f"--member={name}: no such member.{nearest(name, members)}")
    return members[name].config


def _mixture(run: RunConfig):
    from jaxmoe.data import Mixture

    log_to_terminal()
    return Mixture.of_run(run)


def _described(row: dict[str, np.ndarray], tokenizer) -> list[str]:
    """Lines for one row: each stretch of targets of equal loss weight, decoded."""
    lines = [f"  starts with {tokenizer.decode(row['inputs'][:1])!r}"]
    kinds = zip(row["segment_ids"] > 0, row["loss_weights"].tolist(), strict=True)
    targets = iter(row["targets"].tolist())
    for (is_token, weight), group in itertools.groupby(kinds):
        ids = list(itertools.islice(targets, len(list(group))))
        lines.append(f"  weight {weight:<4g} {_written(ids, tokenizer)!r}" if is_token else f"  padding     {len(ids)}")
    return lines


def _written(ids: Sequence[int], tokenizer) -> str:
    stretches = itertools.groupby(ids, key=lambda i: i == tokenizer.eos_id)
    return "".join("<end>" if end else tokenizer.decode(part) for end, part in stretches)


def main() -> None:
    """Dispatches to the command that is the first argument."""
    commands = {"count": count, "inspect": inspect, "tokenize": tokenize, "train_tokenizer": train_tokenizer}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in HELP:
        show_help(sys.argv)
    if name not in commands:
        fail(ConfigError(f"{name or 'nothing'!r} is no command.{nearest(name, commands)}"))
    del sys.argv[1]
    if name in ("count", "inspect"):
        run_with_config(commands[name])
        return

    def run(argv: Sequence[str]) -> int | None:
        try:
            if len(argv) > 1:
                raise ConfigError(f"unexpected argument {argv[1]!r}; flags are written --name=value.")
            return commands[name]()
        except ConfigError as error:
            fail(error)

    run_command(run)


if __name__ == "__main__":
    main()
