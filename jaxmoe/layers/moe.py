"""The Mixture-of-Experts layer: router, plan, routed MLP, combine, in that order.

T tokens, D width, E experts, K experts per token, F hidden width of one expert, C rows of one expert's capacity.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

import pallas_kernels
from jaxmoe.config import MESH_AXES, ConfigError, ModelConfig, MoEConfig, from_dict
from jaxmoe.layers import expert_parallel
from jaxmoe.layers.mlp import DenseMLP
from jaxmoe.layers.parameters import dtype_name, normal_parameter, residual_output_std
from jaxmoe.layers.router import Router, Routing
from jaxmoe.layers.statistics import RouterStatistics
from jaxmoe.sharding import Partitioning, constrain, explicit_axes, partitioning_in_use

_WEIGHTS = {"gate_up": ("experts", "expert_width", None), "down": ("experts", None, "expert_width")}
"""Logical axes of the experts' weights."""


class MoE(nnx.Module):
    """K of E SwiGLU experts for every token, and a shared one for all of them if there is one.

    The experts' gradients are written by hand, so forward-mode differentiation (`jax.jvp`) is not supported.

    Args:
      width: D.
      num_experts: E.
      experts_per_token: K, at most E.
      expert_hidden: F.
      score_order, renormalize, routed_scaling, shared_expert_hidden, router_dtype: as in `jaxmoe.config.MoEConfig`.
      capacity_factor, expert_buffer_factor, expert_overlap, backend: the same.
      init_std: of the router, gate and up weights.
      output_init_std: of the down weights; None for init_std.
      compute_dtype: of the experts' matrix products.
      rngs: the `params` stream initializes.

    Raises:
      ConfigError (a ValueError): a value that cannot be; the message says what can.
    """

    def __init__(
        self,
        width: int,
        *,
        num_experts: int,
        experts_per_token: int,
        expert_hidden: int,
        score_order: str = "topk_then_softmax",
        renormalize: bool = True,
        routed_scaling: float = 1.0,
        shared_expert_hidden: int = 0,
        router_dtype: DTypeLike = "float32",
        capacity_factor: float | None = None,
        expert_buffer_factor: float | None = None,
        expert_overlap: bool = False,
        backend: str = "auto",
        init_std: float = 0.02,
        output_init_std: float | None = None,
        compute_dtype: DTypeLike = "float32",
        rngs: nnx.Rngs,
    ):
        routing = {
            "num_experts": num_experts,
            "experts_per_token": experts_per_token,
            "score_order": score_order,
            "renormalize": renormalize,
            "routed_scaling": routed_scaling,
            "router_dtype": dtype_name(router_dtype),
        }
        others = {
            "expert_hidden": expert_hidden,
            "shared_expert_hidden": shared_expert_hidden,
            "capacity_factor": capacity_factor,
            "expert_buffer_factor": expert_buffer_factor,
            "expert_overlap": expert_overlap,
            "backend": backend,
        }
        checked = from_dict(MoEConfig, routing | others, "MoE")
        if checked.num_experts == 0:
            raise ConfigError("MoE: num_experts=0; a layer without experts is jaxmoe.layers.DenseMLP.")
        if width <= 0:
            raise ConfigError(f"MoE: width={width}; it must be positive.")
        compute_dtype = dtype_name(compute_dtype)
        if compute_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"MoE: compute_dtype={compute_dtype!r}; choose one of 'float32', 'bfloat16'.")
        if backend != "auto":
            pallas_kernels.resolved_backend(backend)
        self.backend = backend
        self.width = width
        self.num_experts = checked.num_experts
        self.experts_per_token = checked.experts_per_token
        self.capacity_factor = checked.capacity_factor
        self.expert_buffer_factor = checked.expert_buffer_factor
        self.expert_overlap = checked.expert_overlap
        self.compute_dtype = compute_dtype
        self.router = Router(width, **{name: getattr(checked, name) for name in routing}, init_std=init_std, rngs=rngs)
        self.gate_up = normal_parameter(
            rngs, (num_experts, width, 2 * expert_hidden), init_std, axes=_WEIGHTS["gate_up"]
        )
        self.down = normal_parameter(
            rngs,
            (num_experts, expert_hidden, width),
            init_std if output_init_std is None else output_init_std,
            axes=_WEIGHTS["down"],
        )
        self.has_shared_expert = checked.shared_expert_hidden > 0
        if self.has_shared_expert:
            self.shared_expert = DenseMLP(
                width,
                checked.shared_expert_hidden,
                init_std=init_std,
                output_init_std=output_init_std,
                compute_dtype=compute_dtype,
                rngs=rngs,
            )

    @classmethod
    def from_config(cls, config: ModelConfig, *, rngs: nnx.Rngs) -> MoE:
        """The MoE layer that `config` describes."""
        moe = config.moe
        if moe is None:
            raise ConfigError("moe=None; a layer without experts is jaxmoe.layers.DenseMLP.")
        return cls(
            config.width,
            num_experts=moe.num_experts,
            experts_per_token=moe.experts_per_token,
            expert_hidden=moe.expert_hidden,
            score_order=moe.score_order,
            renormalize=moe.renormalize,
            routed_scaling=moe.routed_scaling,
            shared_expert_hidden=moe.shared_expert_hidden,
            router_dtype=moe.router_dtype,
            capacity_factor=moe.capacity_factor,
            expert_buffer_factor=moe.expert_buffer_factor,
            expert_overlap=moe.expert_overlap,
            backend=moe.backend,
            init_std=config.init_std,
            output_init_std=residual_output_std(config),
            compute_dtype=config.compute_dtype,
            rngs=rngs,
        )

    def set_view(self, dropless: bool | None = None, **kwargs: Any) -> dict[str, Any]:
        """For `nnx.view(model, dropless=True)`: the same parameters without a limit to what an expert takes.

        Args:
          dropless: True removes the capacity limit, and gives receive buffers room for all that could come.
        """
        if dropless:
            self.capacity_factor = self.expert_buffer_factor = None
        return kwargs

    def capacity(self, tokens: int) -> int | None:
        """C = ceil(capacity_factor · T · K / E) rows for each expert; None when dropless."""
        if self.capacity_factor is None:
            return None
        return math.ceil(self.capacity_factor * tokens * self.experts_per_token / self.num_experts)

    def __call__(
        self, x: Float[Array, "*tokens D"], mask: Bool[Array, "*tokens"] | None = None
    ) -> tuple[Float[Array, "*tokens D"], RouterStatistics]:
        """Routes every token and returns the gated sum of its experts' outputs, the shared expert's added.

        Args:
          x: tokens, any leading axes.
          mask: False marks padding: not routed, not counted, output zero but for the shared expert's.

        Returns:
          The outputs, in compute_dtype, and the sums that auxiliary losses and load metrics are made of.

        Raises:
          ConfigError (a ValueError): tokens of another width.
        """
        if x.shape[-1] != self.width:
            raise ConfigError(f"MoE: x has width {x.shape[-1]} but the layer has width={self.width}.")
        partitioning, explicit = partitioning_in_use(), explicit_axes()
        if partitioning is not None:
            y, statistics = self._on_mesh(partitioning, x, mask)
        elif explicit:
            y, statistics = self._left_to_the_partitioner(explicit, x, mask)
        else:
            y, statistics = self._on_one_device(x, mask)
        if self.has_shared_expert:
            with jax.named_scope("shared_expert"):
                y = y + self.shared_expert(x)
        return y, statistics

    def _on_one_device(
        self, x: Float[Array, "*tokens D"], mask: Bool[Array, "*tokens"] | None
    ) -> tuple[Float[Array, "*tokens D"], RouterStatistics]:
        """The routed part of `__call__`."""
        tokens = x.reshape(-1, x.shape[-1])
        keep = None if mask is None else mask.reshape(-1)
        with jax.named_scope("router"):
            routing = self.router(tokens)
        with jax.named_scope("plan"):
            plan = pallas_kernels.make_plan(
                routing.expert_index, self.num_experts, capacity=self.capacity(tokens.shape[0]), mask=keep
            )
            statistics = self._statistics(routing, plan, keep)
        with jax.named_scope("routed_mlp"):
            y = pallas_kernels.moe_mlp(
                tokens.astype(self.compute_dtype),
                routing.expert_index,
                routing.gate,
                self.gate_up[...].astype(self.compute_dtype),
                self.down[...].astype(self.compute_dtype),
                plan=plan,
                backend=self.backend,
            )
        return y.reshape(x.shape), statistics

    def _left_to_the_partitioner(
        self, explicit: tuple[str, ...], x: Float[Array, "*tokens D"], mask: Bool[Array, "*tokens"] | None
    ) -> tuple[Float[Array, "*tokens D"], RouterStatistics]:
        """`_on_one_device` on somebody else's mesh whose axes are explicit, and have no rule for sorted rows.

        XLA divides the computation as it does where axes are `Auto`; the outputs lie as x does.
        """
        definition, state = nnx.split(self)

        def routed(state, x, mask):
            return nnx.merge(definition, state)._on_one_device(x, mask)

        out_sharding = (jax.typeof(x).sharding.spec, jax.P())
        return jax.sharding.auto_axes(routed, axes=explicit, out_sharding=out_sharding)(state, x, mask)

    def _on_mesh(
        self, partitioning: Partitioning, x: Float[Array, "*tokens D"], mask: Bool[Array, "*tokens"] | None
    ) -> tuple[Float[Array, "*tokens D"], RouterStatistics]:
        """The same with tokens and experts divided among devices. What is returned does not depend on how."""
        split = expert_parallel.TokenSplit.of(partitioning, x.shape[:-1])
        if mask is None and split.padding:
            mask = jnp.ones(x.shape[:-1], bool)
        axes = expert_parallel.expert_axes(partitioning, self.num_experts)
        capacity = self.capacity(math.prod(x.shape[:-1]))
        # Narrow before they are gathered, each device its part.
        weights = {
            name: constrain(getattr(self, name)[...].astype(self.compute_dtype), *logical)
            for name, logical in _WEIGHTS.items()
        }
        weight_specs = {name: partitioning.spec(_WEIGHTS[name], weight.shape) for name, weight in weights.items()}
        router_definition, router_state = nnx.split(self.router)

        def on_device(x, keep, router_state, weights):
            tokens = x.reshape(-1, self.width)
            keep = None if keep is None else keep.reshape(-1)
            with jax.named_scope("router"):
                routing = nnx.merge(router_definition, router_state)(tokens)
            with jax.named_scope("plan"):
                plan = pallas_kernels.make_plan(routing.expert_index, self.num_experts, mask=keep)
                statistics, dropped = self._statistics(routing, plan, keep), jnp.zeros((), jnp.float32)
                if capacity is not None:
                    kept, dropped = expert_parallel.within_capacity(plan, capacity, split, x.shape[0])
                    plan = pallas_kernels.make_plan(kept, self.num_experts)
            with jax.named_scope("routed_mlp"):
                in_parts = expert_parallel.halves if axes and self.expert_overlap else expert_parallel.routed_mlp
                y, overflowed = in_parts(
                    tokens.astype(self.compute_dtype),
                    routing.gate,
                    plan,
                    *(expert_parallel.whole_experts(weights[name], weight_specs[name]) for name in _WEIGHTS),
                    axes=axes,
                    buffer_factor=self.expert_buffer_factor,
                    backend=self.backend,
                )
            statistics = dataclasses.replace(statistics, dropped=dropped, overflowed=overflowed)
            return y.reshape(x.shape), jax.lax.psum(statistics, MESH_AXES)

        y, statistics = jax.shard_map(
            on_device,
            mesh=partitioning.mesh,
            in_specs=(split.spec, split.spec, jax.P(), weight_specs),
            out_specs=(split.spec, jax.P()),
            check_vma=True,
        )(split.cut(x), None if mask is None else split.cut(mask), router_state, weights)
        return split.joined(y), statistics

    def _statistics(
        self, routing: Routing, plan: pallas_kernels.Plan, keep: Bool[Array, " T"] | None
    ) -> RouterStatistics:
        weight = jnp.ones(routing.gate.shape[0], jnp.float32) if keep is None else keep.astype(jnp.float32)
        if self.capacity_factor is None:
            count = plan.group_sizes.astype(jnp.float32)
        else:
            expert = jnp.arange(self.num_experts, dtype=jnp.int32)
            chosen = (routing.expert_index[:, :, None] == expert).sum(axis=1, dtype=jnp.float32)
            count = (weight[:, None] * chosen).sum(axis=0)
        return RouterStatistics(
            expert_count=count,
            probability_sum=(weight[:, None] * routing.probabilities).sum(axis=0),
            z_sum=jnp.sum(weight * jnp.square(routing.log_normalizer)),
            token_count=weight.sum(),
            dropped=plan.dropped.astype(jnp.float32),
            overflowed=jnp.zeros((), jnp.float32),
        )
