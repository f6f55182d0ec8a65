"""Input pipeline: tokens per second against what the laptop step consumes, threads, memory, with 2 and 40 sources.

Each mixture is drained in a process of its own, as fast as it goes, by the iterator that training reads from. Where a
source is an ArrayRecord file, that library starts its 64 threads when it is first read, however many there are.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Any

from experiments.benchmarks.timing import interleaved, machine
from experiments.flags import load_config

if TYPE_CHECKING:
    from jaxmoe.config import RunConfig

WANTED_RATIO = 10
SOURCES = (2, 40)
SECONDS_PER_ROUND = 2.0
SETTLING_BATCHES = 500
STEPS_PER_CALL, SETTLING_STEPS = 5, 100
DOCUMENTS, WORDS = 100, 150


def run(*, rounds: int) -> dict[str, Any]:
    """Everything, as plain JSON values."""
    step = step_tokens_per_second(rounds=rounds)
    pipelines = []
    for sources in SOURCES:
        program = (
            "import json; from experiments.benchmarks.input import drained; "
            f"print(json.dumps(drained({sources}, rounds={rounds})))"
        )
        done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
        measured = json.loads(done.stdout.strip().splitlines()[-1])
        pipelines.append({**measured, "ratio_to_step": round(measured["tokens_per_second"] / step, 1)})
    return {"machine": machine(), "step_tokens_per_second": round(step), "pipelines": pipelines}


def step_tokens_per_second(*, rounds: int) -> float:
    """What the quickstart's fastest member (E = 2) consumes, padding counted, its batches made beforehand."""
    import jax

    from jaxmoe.data import Mixture
    from jaxmoe.training import init_state, make_train_step, reuse_freed_memory

    config = _laptop_config()
    mixture = Mixture.of_run(config)
    batches = itertools.cycle([mixture.batch(step) for step in range(SETTLING_STEPS)])
    step = make_train_step(config.model, config.train, len(mixture.sources))
    _, state = init_state(config)

    def call() -> None:
        nonlocal state
        for _ in range(STEPS_PER_CALL):
            state, metrics = step(state, next(batches))
        jax.block_until_ready((state, metrics))

    with reuse_freed_memory():
        timing = interleaved({"step": call}, rounds=3 * rounds, warmup=SETTLING_STEPS // STEPS_PER_CALL)["step"]
    return STEPS_PER_CALL * config.train.batch_size * config.train.sequence_length / timing.wall


def drained(sources: int, *, rounds: int) -> dict[str, Any]:
    """Reads batches of the quickstart's shape for `rounds` times `SECONDS_PER_ROUND`.

    Args:
      sources: in the mixture. 2: the quickstart's. More: text in JSON lines and in ArrayRecord files, little enough
        that epochs end and begin anew.
    """
    import grain  # noqa: F401  so that its own memory is not taken for the pipeline's

    from jaxmoe.data import Mixture

    threads, memory = _threads(), _resident_bytes()
    with tempfile.TemporaryDirectory() as folder:
        config = _laptop_config()
        if sources != len(config.data.sources):
            data = {"tokenizer": "bytes", "sources": _text_sources(sources, pathlib.Path(folder))}
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
        long = dataclasses.replace(config.train, steps=10**9)
        mixture = Mixture.of_run(dataclasses.replace(config, train=long), cache_dir=folder)
        built, threads_built = _resident_bytes(), _threads()
        batches = mixture.iterator()
        for _ in range(SETTLING_BATCHES):
            next(batches)
        speeds, resident, most_threads, read = [], [], 0, SETTLING_BATCHES
        for _ in range(rounds):
            count, started = 0, time.perf_counter()
            while time.perf_counter() - started < SECONDS_PER_ROUND:
                next(batches)
                count += 1
            speeds.append(count * mixture.batch_size * mixture.sequence_length / (time.perf_counter() - started))
            resident.append(_resident_bytes())
            most_threads = max(most_threads, _threads())
            read += count
        batches.close()
        epochs = [account.epochs for account in mixture.accounting(read).values()]
    return {
        "sources": sources,
        "tokens_per_second": round(statistics.median(speeds)),
        "batches": read,
        "epochs": [round(min(epochs), 2), round(max(epochs), 2)],
        "threads_before": threads,
        "threads_with_sources": threads_built,
        "threads": most_threads,
        "megabytes_of_sources": round((built - memory) / 1e6, 1),
        "megabytes_of_reading": round((max(resident) - built) / 1e6, 1),
        "megabytes_grown_in_second_half": round((resident[-1] - resident[len(resident) // 2]) / 1e6, 1),
    }


def _laptop_config() -> RunConfig:
    from jaxmoe.scaling.study import Study

    return Study.from_config_dict(load_config("quickstart.py:E2")).members[0].config


def _text_sources(count: int, folder: pathlib.Path) -> dict[str, Any]:
    """Files of text, JSON lines and ArrayRecord taking turns, a source each."""
    from array_record.python.array_record_module import ArrayRecordWriter

    from jaxmoe.config import TextSource

    draw = random.Random(0)
    sources: dict[str, Any] = {}
    for number in range(count):
        texts = [" ".join(str(draw.random())[2:8] for _ in range(WORDS)) for _ in range(DOCUMENTS)]
        path = folder / (f"{number}.jsonl" if number % 2 else f"{number}.array_record")
        if number % 2:
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        else:
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for text in texts:
                writer.write(text.encode())
            writer.close()
        sources[f"text{number}"] = TextSource(paths=(str(path),), test_fraction=0.0)
    return sources


def _threads() -> int:
    """Threads of this process, those of libraries included where the system tells."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()


def _resident_bytes() -> int:
    """Memory that this process holds now; the most that it ever held where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        from experiments.benchmarks.timing import peak_bytes

        return peak_bytes()


def describe(result: dict[str, Any]) -> str:
    """The result as text for people."""
    lines = ["  ".join(f"{key}: {value}" for key, value in result["machine"].items()), ""]
    lines.append(f"the laptop step (E = 2) consumes {result['step_tokens_per_second']:,} tokens/s, padding counted")
    for row in result["pipelines"]:
        lines += [
            "",
            f"{row['sources']} sources: {row['tokens_per_second']:,} tokens/s, {row['ratio_to_step']} x the step "
            f"({WANTED_RATIO} x is wanted)",
            f"  threads: {row['threads_before']} before, {row['threads_with_sources']} with the sources built, "
            f"{row['threads']} while reading",
            f"  memory: {row['megabytes_of_sources']} MB for the sources, {row['megabytes_of_reading']} MB more while "
            f"reading; {row['megabytes_grown_in_second_half']:+} MB in the second half of the rounds",
            f"  {row['batches']:,} batches, {row['epochs'][0]} to {row['epochs'][1]} epochs of a source",
        ]
    return "\n".join(lines)
