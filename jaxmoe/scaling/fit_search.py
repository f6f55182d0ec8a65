"""Searching the plans of a run on some devices for the fastest that fits."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp

from jaxmoe.accounting import flops_per_token, memory_bytes, parameter_count
from jaxmoe.config import ConfigError, MeshConfig, ModelConfig, RunConfig
from jaxmoe.config.mesh import check_mesh
from jaxmoe.scaling.fit import Fit, check_fit, memory_limit, receive_room
from jaxmoe.scaling.topologies import Topology

REMAT = ("none", "dots", "full")


USUAL = 1.25
"""Compiled over expected bytes, as seen for full members of the paper on v6e and v5p: 1.2 to 1.6."""


def search(
    run: RunConfig, topology: Topology, *, tries: int, told: Callable[[Fit], None] = lambda fit: None
) -> list[Fit]:
    """Compiles the most promising plans and returns them, the best first.

    A plan is a mesh over `fsdp`, `expert` and, for several slices, `data`, a number of micro-batches and a remat
    policy. The next to be compiled is the fastest by `expected_seconds` of those that should fit, or, if none should,
    the one that lacks the least. What should fit is told by `expected_bytes`, corrected by what the compiled plans
    turned out to need. The search ends after `tries`, or when nothing that is left can be better: less memory for the
    same mesh and policy than did not fit, or a shorter expected time than of the best that did.

    Raises:
      ConfigError: no plan divides the model and the batch.
    """
    left = list(plans_of(run, topology))
    if not left:
        raise ConfigError(
            f"no mesh of {len(topology.devices)} devices divides the {run.rows_per_update} rows of an update and the "
            "model."
        )
    limit = memory_limit(topology)
    fits: list[Fit] = []
    compiled: list[tuple[RunConfig, float]] = []

    def promise(plan: RunConfig) -> tuple[float, ...]:
        missing = max(0.0, expected_bytes(plan) * _correction(plan, compiled) - limit)
        compute, exchange = expected_seconds(plan, topology)
        return missing, max(compute, exchange), exchange, plan.train.gradient_accumulation

    def worse(other: RunConfig, plan: RunConfig, fit: Fit) -> bool:
        alike = other.model.remat == plan.model.remat
        if not fit.fits:
            fewer_parts = other.train.gradient_accumulation <= plan.train.gradient_accumulation
            return alike and other.mesh == plan.mesh and fewer_parts
        seconds = max(expected_seconds(other, topology))
        # The expectation leaves out how tiles are padded, so between policies it has to beat what was compiled.
        return seconds >= (max(expected_seconds(plan, topology)) if alike else fit.estimate.seconds)

    while left and len(fits) < tries:
        plan = min(left, key=promise)
        fit = check_fit(plan, topology)
        fits.append(fit)
        compiled.append((plan, fit.peak / expected_bytes(plan)))
        told(fit)
        left = [other for other in left if other is not plan and not worse(other, plan, fit)]
        if any(fit.fits for fit in fits):
            left = [other for other in left if promise(other)[0] == 0]
    return sorted(fits, key=lambda fit: (not fit.fits, fit.estimate.seconds if fit.estimate else fit.peak))


def _correction(plan: RunConfig, compiled: Sequence[tuple[RunConfig, float]]) -> float:
    """Compiled over expected bytes: the last of this policy and mesh, of this policy, of any, else the usual."""
    for alike in (
        lambda other: (other.model.remat, other.mesh) == (plan.model.remat, plan.mesh),
        lambda other: other.model.remat == plan.model.remat,
        lambda other: True,
    ):
        ratios = [ratio for other, ratio in compiled if alike(other)]
        if ratios:
            return ratios[-1]
    return USUAL


def plans_of(run: RunConfig, topology: Topology) -> Iterator[RunConfig]:
    """Every plan that divides the model and the batch."""
    devices = len(topology.devices) // topology.slices
    experts = run.model.moe.num_experts if run.model.num_moe_layers else 1
    for expert in (size for size in _divisors(devices) if experts % size == 0):
        mesh = MeshConfig(data=topology.slices, slices=topology.slices, fsdp=devices // expert, expert=expert)
        for parts, remat in itertools.product(_divisors(run.rows_per_update), REMAT):
            try:
                train = dataclasses.replace(run.train, gradient_accumulation=parts)
                model = dataclasses.replace(run.model, remat=remat)
                plan = dataclasses.replace(run, model=model, train=train, mesh=mesh)
                check_mesh(mesh, model, train, run.grpo)
            except ConfigError:
                continue
            yield plan


def expected_bytes(plan: RunConfig) -> int:
    """Bytes of a device by count: state over the mesh, activations of its rows, and what the mesh adds to them.

    `jaxmoe.accounting` counts the first two. The mesh adds the parameters in the compute dtype, gathered from the other
    `fsdp` devices, and the room of the experts' receive buffers (docs/distributed.md): of all layers where nothing is
    recomputed, of one layer otherwise. GRPO holds its reference besides.
    """
    mesh, model, train = plan.mesh, plan.model, plan.train
    devices = math.prod(mesh.shape.values())
    rows = max(1, plan.rows_per_update // train.gradient_accumulation // devices)
    memory = memory_bytes(model, dataclasses.replace(train, batch_size=rows, gradient_accumulation=1))
    weights = memory.weights * (1 if plan.grpo is None else 2)
    state = (weights + memory.gradients + memory.optimizer) // (mesh.fsdp * mesh.expert)
    layers = 1 if model.remat == "none" else 1 / model.num_layers
    added = _gathered(plan) if mesh.fsdp > 1 else 0.0
    if model.num_moe_layers and mesh.expert > 1:
        moe = model.moe
        room = receive_room(moe, mesh.expert)
        values = moe.experts_per_token * ((room - 1) * 2 * moe.expert_hidden + room * model.width)
        added += rows * train.sequence_length * model.num_moe_layers * values
    return round(state + memory.activations + layers * added * _size(model))


def expected_seconds(plan: RunConfig, topology: Topology) -> tuple[float, float]:
    """An update's compute and exchange at the makers' rates without compiling it: to put plans in order.

    Computed are the model's products, those that the remat policy repeats and, of several micro-batches, one forward
    pass more (`jaxmoe.training.step.accumulated_sums`). Received are the parameters, from the other `fsdp` devices for
    every micro-batch, once more for each time that they are gathered again to recompute; their gradients, once each
    micro-batch; and the routed rows, there and back in every pass (docs/distributed.md).
    """
    mesh, model, train = plan.mesh, plan.model, plan.train
    flops = flops_per_token(model, train.sequence_length)
    tokens = plan.rows_per_update * train.sequence_length / len(topology.devices)
    repeated = {"none": 0, "dots": flops.components["experts"] + flops.components["attention"], "full": flops.forward}
    again = plan.grpo is None and train.gradient_accumulation > 1
    compute = tokens * (flops.training + repeated[model.remat] + again * flops.forward) / topology.chip.flops
    passes = 1 + (model.remat != "none") + again
    received = train.gradient_accumulation * (1 - 1 / mesh.fsdp) * _gathered(plan) * (passes * _size(model) + 4)
    if model.num_moe_layers:
        routed = tokens * model.num_moe_layers * model.moe.experts_per_token * model.width * _size(model)
        received += (3 + passes) * (1 - 1 / mesh.expert) * routed
    return compute, received / topology.chip.interconnect


def _gathered(plan: RunConfig) -> float:
    """Parameters that a device computes with: all but the experts of other devices."""
    count = parameter_count(plan.model)
    return count.total - count.components["experts"] * (1 - 1 / plan.mesh.expert)


def _size(model: ModelConfig) -> int:
    return jnp.dtype(model.compute_dtype).itemsize


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
