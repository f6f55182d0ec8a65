"""Checkpoints of a model of 200 MB: what a save costs the step that starts it, and the memory of save and restore.

A save copies the state off the devices and is written beside the training. Two kinds of steps that start one take
turns. In the first the write is held back until the step has ended, so that what it takes longer is the copy: all of
it, where the write has cores of its own, beside an accelerator. In the second the write begins at once; where the
device is a CPU it has the same cores. Each is compared with the mean of the steps before and after, which neither start
a save nor have one written beside them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from experiments.benchmarks.timing import machine
from jaxmoe.config import DataConfig, KnowledgeSource, ModelConfig, MoEConfig, RunConfig, TrainConfig

SAVES = 20
_QUIET_SAVES, _FIRST_STEPS = 5, 3
_WIDTH, _LAYERS, _EXPERTS, _HIDDEN, _VOCABULARY = 512, 4, 16, 480, 2048

RUN = RunConfig(
    name="checkpoint",
    model=ModelConfig(
        vocab_size=_VOCABULARY, width=_WIDTH, num_layers=_LAYERS, num_heads=8, max_sequence_length=128,
        moe=MoEConfig(num_experts=_EXPERTS, experts_per_token=2, expert_hidden=_HIDDEN),
    ),
    data=DataConfig(tokenizer="symbols", sources={"knowledge": KnowledgeSource(entities=200, test_entities=8)}),
    train=TrainConfig(steps=1000, batch_size=16, sequence_length=128, learning_rate=1e-4),
)  # fmt: skip


def run(rounds: int) -> dict[str, Any]:
    """Measures saves, their memory and a restore, each in a fresh process: memory once held may not be given back.

    Args:
      rounds: not used; there are always `SAVES` saves.
    """
    del rounds
    with tempfile.TemporaryDirectory() as folder:
        parts = [_in_process(part, folder) for part in ("save", "memory", "memory_in_training", "restore")]
    return {"machine": machine(), **{name: value for part in parts for name, value in part.items()}}


def describe(result: dict[str, Any]) -> str:
    """The result as a table."""
    return "\n".join(
        [
            f"state {result['state_bytes'] / 1e6:.0f} MB ({result['parameter_bytes'] / 1e6:.0f} MB of parameters), "
            f"{SAVES} saves, {result['machine']['processor']}, {result['machine']['cores']} cores",
            f"step without a save        {result['step_seconds']:.3f} s (median; fastest "
            f"{result['fastest_step_seconds']:.3f}, slowest {result['slowest_step_seconds']:.3f}; "
            f"{result['step_tokens']:,} tokens)",
            f"step that starts a save    {result['saving_step_seconds']:.3f} s (median), "
            f"{100 * (result['saving_step_ratio'] - 1):+.1f} % for the copy off the device (limit +5 %)",
            f"  of it in the call `save` {result['save_call_seconds']:.3f} s",
            f"  with the write beside it {result['saving_step_beside_write_seconds']:.3f} s, "
            f"{100 * (result['saving_step_beside_write_ratio'] - 1):+.1f} %: on CPU they have the same cores",
            f"all steps beside a write   {result['lost_seconds']:.2f} s longer in all",
            f"one save, written          {result['write_seconds']:.2f} s with no step beside it, "
            f"{result['write_cpu_seconds']:.2f} CPU seconds, "
            f"{result['state_bytes'] / 1e6 / result['write_seconds']:.0f} MB/s",
            f"host memory of a save      {result['save_memory_ratio']:.2f} x the state, in a fresh process (limit 1.5)",
            f"  {SAVES} of them in training  {result['training_save_memory_ratio']:.2f} x it, over what steps held",
            f"host memory of a restore   {result['restore_memory_ratio']:.2f} x the state, itself included (limit 1.2)",
            f"restore                    {result['restore_seconds']:.2f} s",
        ]
    )


def _in_process(part: str, folder: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.checkpoint", part, folder], stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


class _PeakMemory:
    """The most memory of this process while the `with` block runs, looked at every 5 ms, over what it was before."""

    def __enter__(self) -> _PeakMemory:
        gc.collect()
        self._before = self._peak = _resident_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self._peak = max(self._peak, _resident_bytes())

    def __exit__(self, *exception) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def extra(self) -> int:
        """Bytes of the peak over what was held before."""
        return self._peak - self._before


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def _bytes_of(tree: Any) -> int:
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _measure_saves(folder: str) -> dict[str, Any]:
    import jax

    from jaxmoe.data import Mixture
    from jaxmoe.training import Checkpoints, Retention, init_state, make_train_step

    _, state = init_state(RUN)
    step = make_train_step(RUN.model, RUN.train, 1)
    mixture = Mixture.of_run(RUN)
    number, plain, calls, lost = 0, [], [], []
    starting: dict[str, list[float]] = {"held": [], "beside": []}
    ratios: dict[str, list[float]] = {"held": [], "beside": []}

    def one(save: Checkpoints | None = None, may_write: threading.Event | None = None) -> float:
        nonlocal state, number
        batch = mixture.batch(number)
        started = time.perf_counter()
        if save is not None:
            save.save(number, state, {}, first=may_write.wait if may_write is not None else None)
            calls.append(time.perf_counter() - started)
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        number += 1
        return time.perf_counter() - started

    def saved(kind: str, checkpoints: Checkpoints) -> list[float]:
        """The step that starts a save, and those that begin while it is being written, unless that is held back."""
        at, may_write = number, threading.Event()
        if kind == "beside":
            may_write.set()
        took = [one(checkpoints, may_write)]
        while kind == "beside" and checkpoints.last_step != at:
            took.append(one())
        may_write.set()
        checkpoints.wait()
        return took

    state_bytes, parameter_bytes = _bytes_of(state.opt_state) + _bytes_of(state.params), _bytes_of(state.params)
    with Checkpoints(folder, Retention(1)) as checkpoints:
        for kind in starting:  # compile, and warm the path of a save
            one()
            saved(kind, checkpoints)
        calls.clear()
        before = one()
        for _ in range(SAVES):
            for kind in starting:
                took, after = saved(kind, checkpoints), one()
                alone = (before + after) / 2
                starting[kind].append(took[0])
                ratios[kind].append(took[0] / alone)
                if kind == "beside":
                    lost.append(sum(took) - len(took) * alone)
                plain.append(after)
                before = after
        writes = []
        for _ in range(_QUIET_SAVES):
            number += 1
            began, cpu = time.perf_counter(), time.process_time()
            checkpoints.save(number, state, {})
            checkpoints.wait()
            writes.append((time.perf_counter() - began, time.process_time() - cpu))
    return {
        "state_bytes": state_bytes,
        "parameter_bytes": parameter_bytes,
        "step_tokens": RUN.train.batch_size * RUN.train.sequence_length,
        "step_seconds": statistics.median(plain),
        "fastest_step_seconds": min(plain),
        "slowest_step_seconds": max(plain),
        "save_call_seconds": statistics.median(calls),
        "saving_step_seconds": statistics.median(starting["held"]),
        "saving_step_ratio": statistics.median(ratios["held"]),
        "saving_step_beside_write_seconds": statistics.median(starting["beside"]),
        "saving_step_beside_write_ratio": statistics.median(ratios["beside"]),
        "lost_seconds": statistics.median(lost),
        "write_seconds": statistics.median(wall for wall, _ in writes),
        "write_cpu_seconds": statistics.median(cpu for _, cpu in writes),
    }


def _measure_memory(folder: str) -> dict[str, Any]:
    """Of a process's first save, with no step beside it: later ones take memory that was held before."""
    from jaxmoe.training import Checkpoints, Retention, init_state

    _, state = init_state(RUN)
    state_bytes = _bytes_of(state.opt_state) + _bytes_of(state.params)
    with Checkpoints(f"{folder}_of_one", Retention(1)) as checkpoints, _PeakMemory() as peak:
        checkpoints.save(0, state, {})
        checkpoints.wait()
    return {"save_memory_ratio": peak.extra / state_bytes}


def _measure_memory_in_training(folder: str) -> dict[str, Any]:
    """Of `SAVES` saves, each with a step beside it, over what the process held after its first steps."""
    import jax

    from jaxmoe.data import Mixture
    from jaxmoe.training import Checkpoints, Retention, init_state, make_train_step

    _, state = init_state(RUN)
    state_bytes = _bytes_of(state.opt_state) + _bytes_of(state.params)
    step, mixture = make_train_step(RUN.model, RUN.train, 1), Mixture.of_run(RUN)

    def one(number: int) -> None:
        nonlocal state
        state = jax.block_until_ready(step(state, mixture.batch(number)))[0]

    for number in range(_FIRST_STEPS):
        one(number)
    with Checkpoints(f"{folder}_in_training", Retention(1)) as checkpoints, _PeakMemory() as peak:
        for number in range(_FIRST_STEPS, _FIRST_STEPS + SAVES):
            checkpoints.save(number, state, {})
            one(number)
            checkpoints.wait()
    return {"training_save_memory_ratio": peak.extra / state_bytes}


def _measure_restore(folder: str) -> dict[str, Any]:
    import jax

    from jaxmoe.training import Checkpoints, abstract_state

    _, like = abstract_state(RUN)
    with Checkpoints(folder) as checkpoints, _PeakMemory() as peak:
        started = time.perf_counter()
        restored = checkpoints.restore(like)
        jax.block_until_ready(restored.state.params)
        seconds = time.perf_counter() - started
    state_bytes = _bytes_of(restored.state.opt_state) + _bytes_of(restored.state.params)
    return {"restore_seconds": seconds, "restore_memory_ratio": peak.extra / state_bytes}


def _main(part: str, folder: str) -> None:
    from jaxmoe.training import reuse_freed_memory

    measure = {
        "save": _measure_saves,
        "memory": _measure_memory,
        "memory_in_training": _measure_memory_in_training,
        "restore": _measure_restore,
    }[part]
    # Training on CPU keeps what is freed, so that memory held is no measure of memory needed there.
    keeps = part != "memory" and os.environ.get("JAX_PLATFORMS") == "cpu"
    with reuse_freed_memory() if keeps else contextlib.nullcontext():
        measured = measure(f"{folder}/checkpoints")
    print(json.dumps(measured))


if __name__ == "__main__":
    _main(*sys.argv[1:])
