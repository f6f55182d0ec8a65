"""Searching the plans of a run on some devices for the fastest that fits."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

from jaxmoe.accounting import memory_bytes
from jaxmoe.config import ConfigError, MeshConfig, RunConfig
from jaxmoe.config.mesh import check_mesh
from jaxmoe.scaling.fit import Fit, check_fit, memory_limit
from jaxmoe.scaling.topologies import Topology

REMAT = ("none", "dots", "full")


def search(
    run: RunConfig, topology: Topology, *, tries: int, told: Callable[[Fit], None] = lambda fit: None
) -> list[Fit]:
    """Compiles the most promising plans and returns them, the best first.

    A plan is a mesh over `fsdp`, `expert` and, for several slices, `data`, a number of micro-batches and a remat
    policy. Those whose state and activations, by the count of `jaxmoe.accounting`, should fit come first, by what they
    recompute, then by how few micro-batches and how narrow an expert group they have; plans that should not fit come
    last, by how much is missing. The search ends after `tries`.

    Raises:
      ConfigError: no plan divides the model and the batch.
    """
    plans = sorted(plans_of(run, topology), key=lambda plan: _promise(plan, topology))
    if not plans:
        raise ConfigError(
            f"no mesh of {len(topology.devices)} devices divides train.batch_size={run.train.batch_size} and the model."
        )
    fits = []
    for plan in plans[:tries]:
        fits.append(check_fit(plan, topology))
        told(fits[-1])
    return sorted(fits, key=lambda fit: (not fit.fits, fit.estimate.seconds if fit.estimate else fit.peak))


def plans_of(run: RunConfig, topology: Topology) -> Iterator[RunConfig]:
    """Every plan that divides the model and the batch."""
    devices = len(topology.devices) // topology.slices
    experts = run.model.moe.num_experts if run.model.num_moe_layers else 1
    for expert in (size for size in _divisors(devices) if experts % size == 0):
        mesh = MeshConfig(data=topology.slices, slices=topology.slices, fsdp=devices // expert, expert=expert)
        for parts, remat in itertools.product(_divisors(run.train.batch_size), REMAT):
            try:
                train = dataclasses.replace(run.train, gradient_accumulation=parts)
                model = dataclasses.replace(run.model, remat=remat)
                plan = dataclasses.replace(run, model=model, train=train, mesh=mesh)
                check_mesh(mesh, model, train)
            except ConfigError:
                continue
            yield plan


def expected_bytes(plan: RunConfig) -> int:
    """Bytes of a device by the count of `jaxmoe.accounting`: state over the mesh, activations of its rows."""
    mesh, train = plan.mesh, plan.train
    rows = max(1, train.batch_size // train.gradient_accumulation // math.prod(mesh.shape.values()))
    one_device = dataclasses.replace(train, batch_size=rows, gradient_accumulation=1)
    memory = memory_bytes(plan.model, one_device)
    return (memory.weights + memory.gradients + memory.optimizer) // (mesh.fsdp * mesh.expert) + memory.activations


def _promise(plan: RunConfig, topology: Topology) -> tuple:
    missing = max(0, expected_bytes(plan) - round(0.8 * memory_limit(topology)))
    return missing, REMAT.index(plan.model.remat), plan.train.gradient_accumulation, plan.mesh.expert


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
