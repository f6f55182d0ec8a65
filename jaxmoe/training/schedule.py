"""The learning rate of every step."""

from __future__ import annotations

from collections.abc import Callable

import optax
from jaxtyping import Array, Float, Int

from jaxmoe.config import TrainConfig

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]


def learning_rate_schedule(config: TrainConfig) -> Schedule:
    r"""Learning rate by the number of the update, counted from 1.

    With peak $\eta$, warm-up $W$, steps $N$ and final fraction $r$, the rate is $\eta s / W$ up to update $W$, and then

    * `warmup_cosine`: $\eta (r + (1 - r) (1 + \cos \pi p) / 2)$ with $p = (s - W) / (N - W)$;
    * `warmup_stable_decay`: $\eta$ up to update $M$, then $\eta (1 - (1 - r) p)$ with $p = (s - M) / (N - M)$ and
      $M = N - \mathrm{round}(N \cdot \mathrm{decay\_fraction})$, or $W$ if that is later;
    * `constant`: $\eta$.

    So the last update has exactly the final rate, and the value at 0, before any update, is 0 if there is a warm-up.

    Returns:
      A function that can be traced.
    """
    peak, warmup, steps = config.learning_rate, config.warmup_steps, config.steps
    fraction = config.final_learning_rate_fraction
    if config.schedule == "constant":
        rest = optax.constant_schedule(peak)
    elif config.schedule == "warmup_cosine":
        rest = optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=fraction)
    else:
        decay_start = max(warmup, steps - round(steps * config.decay_fraction))
        decay = optax.linear_schedule(peak, peak * fraction, max(1, steps - decay_start))
        rest = optax.join_schedules([optax.constant_schedule(peak), decay], [decay_start - warmup])
    if warmup == 0:
        return rest
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), rest], [warmup])
