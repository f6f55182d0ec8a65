"""Loss spikes: a step whose loss stands out from those before it, decided inside the compiled step.

W losses that a step is compared with.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.config import TrainConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpikeHistory:
    """The last losses of a run. Spikes are among them, so that a lasting rise is soon taken for what is usual.

    Attributes:
      losses: the last W finite ones, number n at place n mod W.
      seen: finite losses so far.
      spikes: how many of them were spikes.
    """

    losses: Float[Array, " W"]
    seen: Int[Array, ""]
    spikes: Int[Array, ""]

    @classmethod
    def empty(cls, train: TrainConfig) -> SpikeHistory | None:
        """Before the first step; None for a run that does not look for spikes."""
        if train.spike_action == "off":
            return None
        return cls(
            losses=jnp.zeros(train.spike_window), seen=jnp.zeros((), jnp.int32), spikes=jnp.zeros((), jnp.int32)
        )

    def limit(self, factor: float) -> Float[Array, ""]:
        r"""What a loss is a spike above: $m + f \cdot \mathrm{median}_i |l_i - m|$ with $m$ the median of the losses.

        Infinite until there are W of them.
        """
        median = jnp.median(self.losses)
        deviation = jnp.median(jnp.abs(self.losses - median))
        return jnp.where(self.seen >= self.losses.size, median + factor * deviation, jnp.inf)

    def after(self, loss: Float[Array, ""], spike: Bool[Array, ""]) -> SpikeHistory:
        """The history with one more step's loss; one that is not finite leaves no trace."""
        finite = jnp.isfinite(loss)
        place = self.seen % self.losses.size
        return SpikeHistory(
            losses=self.losses.at[place].set(jnp.where(finite, loss, self.losses[place])),
            seen=self.seen + finite,
            spikes=self.spikes + spike,
        )


def find_spike(
    history: SpikeHistory | None, loss: Float[Array, ""], train: TrainConfig
) -> tuple[SpikeHistory | None, Bool[Array, ""] | None, dict[str, Array]]:
    """Compares a step's loss with those before it.

    Args:
      history: before the step; None does not compare.
      loss: of the language model, without auxiliary losses.
      train: of the run.

    Returns:
      The history after the step; whether the step must be left out, None where none ever is; and metrics: `spike`,
      `spike_limit`, above which the loss would be one, and `spikes` so far.
    """
    if history is None:
        return None, None, {}
    limit = history.limit(train.spike_factor)
    spike = jnp.isfinite(loss) & (loss > limit)
    following = history.after(loss, spike)
    metrics = {"spike": spike, "spike_limit": limit, "spikes": following.spikes}
    return following, None if train.spike_action == "warn" else spike, metrics
