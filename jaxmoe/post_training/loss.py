"""The loss of GRPO for each token, and for final hidden states.

B responses, S sequence, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.config import GRPOConfig
from jaxmoe.models import language_model_loss

KL_LIMIT = 10.0
"""The estimate of the divergence at a token is clipped to this, as in verl (`low_var_kl`)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Prompts with a response each, as the update reads them; position t predicts token t + 1.

    Attributes:
      inputs, targets: tokens, and those after them; padding on the right.
      segment_ids: 1, and 0 on padding.
      weights: 1 where the target is of the response, its end token included; else 0.
      advantages: of each response.
      old: log-probability of each target before the updates of the step.
      reference: the same by the parameters that the run started from.
    """

    inputs: Int[Array, "*n B S"]
    targets: Int[Array, "*n B S"]
    segment_ids: Int[Array, "*n B S"]
    weights: Float[Array, "*n B S"]
    advantages: Float[Array, "*n B"]
    old: Float[Array, "*n B S"]
    reference: Float[Array, "*n B S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenSums:
    """Sums over the response tokens of some rows.

    Attributes:
      kl: estimates of the divergence from the reference.
      clipped: tokens whose ratio is clipped, so that they push no further.
    """

    kl: Float[Array, ""]
    clipped: Float[Array, ""]


def kl_estimate(log_probability: Float[Array, ...], reference: Float[Array, ...]) -> Float[Array, ...]:
    r"""Estimate of $KL(\pi \| \pi_{ref})$ from one token of $\pi$: $e^d - d - 1$ with $d = \log\pi_{ref} - \log\pi$.

    Schulman's k3 (http://joschu.net/blog/kl-approx.html): never negative, without bias; clipped to `KL_LIMIT`.
    """
    difference = reference - log_probability
    return jnp.clip(jnp.exp(difference) - difference - 1.0, -KL_LIMIT, KL_LIMIT)


def token_loss(
    log_probability: Float[Array, "B S"],
    old: Float[Array, "B S"],
    reference: Float[Array, "B S"],
    advantages: Float[Array, " B"],
    *,
    clip_ratio: float,
    kl_coefficient: float,
) -> tuple[Float[Array, "B S"], Float[Array, "B S"], Float[Array, "B S"]]:
    r"""The loss of every token.

    With $\rho = \pi / \pi_{old}$ of the token and A the advantage of its response,
    $\max(-A\rho, -A\,\mathrm{clip}(\rho, 1 - c, 1 + c)) + \beta\,\mathrm{KL}$ (Shao et al. 2024, arXiv 2402.03300,
    equation 3, as a loss).

    Args:
      log_probability: of each target; what is differentiated.
      old: the same before the updates of the step.
      reference: the same by the reference.
      advantages: of each response.
      clip_ratio: c.
      kl_coefficient: beta.

    Returns:
      The loss; the estimate of the divergence; and 1 where clipping decides, so that there is no gradient but the
      divergence's.
    """
    ratio = jnp.exp(log_probability - old)
    free = -advantages[:, None] * ratio
    clipped = -advantages[:, None] * jnp.clip(ratio, 1.0 - clip_ratio, 1.0 + clip_ratio)
    kl = kl_estimate(log_probability, reference)
    return jnp.maximum(free, clipped) + kl_coefficient * kl, kl, (clipped > free).astype(jnp.float32)


def response_loss(
    hidden: Float[Array, "B S D"],
    head_weight: Float[Array, "D V"],
    rows: Rows,
    tokens: Float[Array, ""],
    grpo: GRPOConfig,
) -> tuple[Float[Array, ""], TokenSums]:
    """Sum of `token_loss` over response tokens / `tokens`, without ever holding all logits.

    The loss depends on the parameters through the targets' log-probabilities alone. So these are computed first, then
    the derivative of the loss by each of them, and with those as weights the language-model loss has this loss's
    gradient; only the head's product is done twice.

    Args:
      hidden: of `Decoder.hidden`.
      head_weight: of `Decoder.head_weight`.
      rows: of these hidden states.
      tokens: response tokens of the whole update.
      grpo: of the run.
    """
    log_probability = log_probabilities(*jax.lax.stop_gradient((hidden, head_weight)), rows.targets, grpo)

    def loss_of(log_probability):
        loss, kl, clipped = token_loss(
            log_probability, rows.old, rows.reference, rows.advantages,
            clip_ratio=grpo.clip_ratio, kl_coefficient=grpo.kl_coefficient,
        )  # fmt: skip
        sums = TokenSums(kl=jnp.sum(rows.weights * kl), clipped=jnp.sum(rows.weights * clipped))
        return jnp.sum(rows.weights * loss) / tokens, sums

    (loss, sums), slope = jax.value_and_grad(loss_of, has_aux=True)(log_probability)
    carrier, _ = language_model_loss(_tempered(hidden, grpo), head_weight, rows.targets, -slope)
    return carrier + jax.lax.stop_gradient(loss - carrier), sums


def log_probabilities(
    hidden: Float[Array, "B S D"], head_weight: Float[Array, "D V"], targets: Int[Array, "B S"], grpo: GRPOConfig
) -> Float[Array, "B S"]:
    """Log-probability of each target under softmax(logits / temperature), float32; without a gradient."""
    _, nll = language_model_loss(_tempered(hidden, grpo), head_weight, targets, jnp.zeros(targets.shape))
    return -nll


def _tempered(hidden: Float[Array, "B S D"], grpo: GRPOConfig) -> Float[Array, "B S D"]:
    """Hidden states whose logits are divided by the temperature."""
    return hidden if grpo.temperature == 1.0 else hidden / grpo.temperature
