"""Training step: the laptop recipe at E = 2, 8, 64; the same Mixtral in transformers; start-up time and memory.

The peer is `transformers`' Mixtral on torch CPU with its `grouped_mm` experts: same shapes, float32, balance loss,
AdamW. Its threads are told not to spin while ours run, the two take turns, and CPU seconds stand beside wall seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from experiments.benchmarks.timing import Timing, import_seconds, interleaved, machine
from experiments.flags import load_config

LAPTOP_EXPERTS = (2, 8, 64)
PEER_EXPERTS = (8,)
PEER_SHAPE = {"width": 256, "num_layers": 4, "num_heads": 8, "vocab_size": 8192, "expert_hidden": 512}
PEER_BATCH, PEER_SEQUENCE = 8, 512
STEPS_PER_CALL = 5
SETTLING_STEPS = 300


def run(*, rounds: int) -> dict[str, Any]:
    """Everything, as plain JSON values."""
    from jaxmoe.training import reuse_freed_memory

    with reuse_freed_memory():  # as `train` does; it holds for every contender of the process
        measured = {
            "laptop_recipe": laptop_recipe(rounds=rounds),
            "against_transformers": against_transformers(rounds=rounds),
        }
    return {"machine": machine(), **measured, "start_up": start_up()}


def laptop_recipe(*, rounds: int) -> list[dict[str, Any]]:
    """Tokens per second of the quickstart's recipe, all else equal, by number of experts.

    Measured after `SETTLING_STEPS` steps of training, as in most of a run: the routers of a fresh model send some
    experts many times the mean load.
    """
    template = _laptop_template()
    contenders, tokens = {}, template.train.batch_size * template.train.sequence_length * STEPS_PER_CALL
    for num_experts in LAPTOP_EXPERTS:
        moe = dataclasses.replace(template.model.moe, num_experts=num_experts)
        config = dataclasses.replace(template, model=dataclasses.replace(template.model, moe=moe))
        contenders[f"E{num_experts}"] = call = _training_call(config, STEPS_PER_CALL)
        for _ in range(SETTLING_STEPS // STEPS_PER_CALL):
            call()
    timings = interleaved(contenders, rounds=3 * rounds)
    slowest = timings[f"E{LAPTOP_EXPERTS[0]}"].wall
    return [
        {
            "E": num_experts,
            "tokens_per_second": round(tokens / timings[f"E{num_experts}"].wall),
            "ratio_to_E2": round(slowest / timings[f"E{num_experts}"].wall, 3),
            "cpu_seconds_per_step": round(timings[f"E{num_experts}"].cpu / STEPS_PER_CALL, 5),
        }
        for num_experts in LAPTOP_EXPERTS
    ]


def against_transformers(*, rounds: int) -> list[dict[str, Any]] | str:
    """Tokens per second of ours and of the peer; a sentence where the peer is not installed."""
    if not peer_is_installed():
        return "not measured: torch and transformers are not installed (pip install 'jaxmoe[hf]')"
    rows = []
    tokens = PEER_BATCH * PEER_SEQUENCE
    for num_experts in PEER_EXPERTS:
        timings = mixtral_steps(num_experts, rounds=rounds)
        rows += [
            {
                "E": num_experts,
                "contender": name,
                "tokens_per_second": round(tokens / timing.wall),
                "wall_seconds": round(timing.wall, 4),
                "cpu_seconds": round(timing.cpu, 4),
                "speed_ratio_to_transformers": round(timings["transformers"].wall / timing.wall, 3),
                "cpu_ratio_to_transformers": round(timings["transformers"].cpu / timing.cpu, 3),
            }
            for name, timing in timings.items()
        ]
    return rows


def peer_is_installed() -> bool:
    """Whether transformers, and torch, are there to be measured."""
    return bool(importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"))


def mixtral_steps(num_experts: int, *, rounds: int, backend: str = "auto", warmup: int = 1) -> dict[str, Timing]:
    """Timings of a training step of `jaxmoe`, by a backend, and of `transformers` where it is installed.

    The two take turns, and no third: what one contender frees does not serve another of other sizes.
    """
    calls = {"jaxmoe": _our_mixtral(num_experts, backend)}
    if peer_is_installed():
        calls["transformers"] = _their_mixtral(num_experts)
    return interleaved(calls, rounds=rounds, warmup=warmup)


def start_up() -> dict[str, float]:
    """Import times, the first step of a 4-layer member and the quickstart's peak memory, each in a fresh process."""
    base = import_seconds("import jax, flax.nnx")
    layers = import_seconds("import jaxmoe, jaxmoe.layers")
    first_step = "from experiments.benchmarks.train_step import first_step_seconds; print(first_step_seconds())"
    with tempfile.TemporaryDirectory() as folder:
        whole_study = (
            "import runpy, sys\n"
            "from experiments.benchmarks.timing import peak_bytes\n"
            f"sys.argv = ['experiments.run', '--config=quickstart.py', '--workdir={folder}']\n"
            "try: runpy.run_module('experiments.run', run_name='__main__', alter_sys=True)\n"
            "finally: print(peak_bytes())"
        )
        peak = int(_last_line(whole_study))
    return {
        "import_jax_flax_seconds": round(base, 3),
        "import_jaxmoe_seconds": round(import_seconds("import jaxmoe"), 3),
        "import_jaxmoe_layers_seconds": round(layers, 3),
        "import_ratio": round(layers / base, 3),
        "four_layer_first_step_seconds": float(_last_line(first_step)),
        "quickstart_peak_gigabytes": round(peak / 1e9, 3),
    }


def first_step_seconds() -> float:
    """Seconds from a configuration to the end of the first step of a 4-layer member, compilation included."""
    template = _laptop_template()
    config = dataclasses.replace(template, model=dataclasses.replace(template.model, num_layers=4))
    started = time.perf_counter()
    _training_call(config, 1)()
    return round(time.perf_counter() - started, 2)


def _last_line(program: str) -> str:
    """Runs a program in a fresh Python and returns the last line that it prints."""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1]


def _laptop_template() -> Any:
    from jaxmoe.scaling.study import Study

    return Study.from_config_dict(load_config("quickstart.py:E8")).members[0].config


def _training_call(config: Any, steps: int) -> Callable[[], None]:
    """A call that takes `steps` optimizer steps of a run and waits for the last, batches included."""
    import jax

    from jaxmoe.data import Mixture
    from jaxmoe.training import init_state, make_train_step

    mixture = Mixture.of_run(config)
    step = make_train_step(config.model, config.train, len(mixture.sources))
    _, state = init_state(config)
    position = 0

    def call() -> None:
        nonlocal state, position
        for _ in range(steps):
            state, metrics = step(state, mixture.batch(position % config.train.steps))
            position += 1
        jax.block_until_ready((state, metrics))

    return call


def _our_mixtral(num_experts: int, backend: str = "auto") -> Callable[[], None]:
    """One training step of ours at the peer's shapes on random tokens."""
    import jax
    import numpy as np

    from jaxmoe.config import DataConfig, KnowledgeSource, ModelConfig, MoEConfig, RunConfig, TrainConfig
    from jaxmoe.training import init_state, make_train_step

    shape = dict(PEER_SHAPE)
    moe = MoEConfig(
        num_experts=num_experts, experts_per_token=2, expert_hidden=shape.pop("expert_hidden"),
        router_z_coefficient=0.0, backend=backend,
    )  # fmt: skip
    config = RunConfig(
        name="ours",
        model=ModelConfig(moe=moe, max_sequence_length=PEER_SEQUENCE, **shape),
        data=DataConfig(sources={"random": KnowledgeSource()}),
        train=TrainConfig(steps=1000, batch_size=PEER_BATCH, sequence_length=PEER_SEQUENCE),
    )
    tokens = np.random.default_rng(0).integers(0, shape["vocab_size"], (PEER_BATCH, PEER_SEQUENCE + 1), np.int32)
    rows = np.broadcast_to(np.arange(PEER_SEQUENCE, dtype=np.int32), (PEER_BATCH, PEER_SEQUENCE))
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": np.ones(rows.shape, np.float32),
        "positions": rows,
        "segment_ids": np.ones(rows.shape, np.int32),
        "source": np.zeros(PEER_BATCH, np.int32),
    }
    step = make_train_step(config.model, config.train, 1)
    _, state = init_state(config)

    def call() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return call


def _their_mixtral(num_experts: int) -> Callable[[], None]:
    """One training step of transformers' Mixtral on torch CPU, its threads passive between calls."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    import numpy as np
    import torch
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = transformers.MixtralConfig(
        vocab_size=PEER_SHAPE["vocab_size"],
        hidden_size=PEER_SHAPE["width"],
        intermediate_size=PEER_SHAPE["expert_hidden"],
        num_hidden_layers=PEER_SHAPE["num_layers"],
        num_attention_heads=PEER_SHAPE["num_heads"],
        num_key_value_heads=PEER_SHAPE["num_heads"],
        num_local_experts=num_experts,
        num_experts_per_tok=2,
        max_position_embeddings=PEER_SEQUENCE,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        use_cache=False,
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    draw = functools.partial(np.random.default_rng(0).integers, 0, PEER_SHAPE["vocab_size"])
    tokens = torch.from_numpy(draw((PEER_BATCH, PEER_SEQUENCE)))

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return call


def describe(result: dict[str, Any]) -> str:
    """The result as text for people."""
    lines = ["  ".join(f"{key}: {value}" for key, value in result["machine"].items()), "", "laptop recipe"]
    for row in result["laptop_recipe"]:
        lines.append(
            f"  E={row['E']:<4} {row['tokens_per_second']:>9,} tokens/s   {row['ratio_to_E2']:.2f} of E=2   "
            f"{1000 * row['cpu_seconds_per_step']:.1f} CPU ms a step"
        )
    lines += ["", "against transformers (D=256, 4 layers, F=512, V=8192, K=2, 8 x 512 tokens, float32, AdamW)"]
    if isinstance(result["against_transformers"], str):
        lines.append(f"  {result['against_transformers']}")
    else:
        for row in result["against_transformers"]:
            lines.append(
                f"  E={row['E']:<4} {row['contender']:<13} {row['tokens_per_second']:>7,} tokens/s   "
                f"wall {row['wall_seconds']:.3f} s ({row['speed_ratio_to_transformers']:.2f} x)   "
                f"CPU {row['cpu_seconds']:.3f} s ({row['cpu_ratio_to_transformers']:.2f} x)"
            )
    lines += ["", "start-up and memory", *(f"  {key}: {value}" for key, value in result["start_up"].items())]
    return "\n".join(lines)
