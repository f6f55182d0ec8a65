"""What a response is worth beside the others to the same prompt. G groups of n responses each."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

EPSILON = 1e-6


def group_advantages(rewards: Float[np.ndarray, "G n"]) -> Float[np.ndarray, "G n"]:
    r"""Rewards relative to their group: $(r - \bar r) / (s + 10^{-6})$, with s the standard deviation with n - 1.

    Shao et al. 2024, arXiv 2402.03300, section 4.1.2; n - 1 and the constant as in verl. All tokens of a response have
    its advantage. A group of equal rewards has advantages of 0; in a group of one the mean is taken as 0 and the
    deviation as 1.

    Args:
      rewards: of each response, by prompt.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.shape[1] == 1:
        mean, deviation = np.zeros_like(rewards), np.ones_like(rewards)
    else:
        mean = rewards.mean(axis=1, keepdims=True)
        deviation = rewards.std(axis=1, ddof=1, keepdims=True)
    advantages = (rewards - mean) / (deviation + EPSILON)
    return np.where(equal_groups(rewards)[:, None] & (rewards.shape[1] > 1), 0.0, advantages).astype(np.float32)


def equal_groups(rewards: Float[np.ndarray, "G n"]) -> np.ndarray:
    """(G,) whether all responses of a group have the same reward, so that nothing is learned from them."""
    rewards = np.asarray(rewards)
    return rewards.max(axis=1) == rewards.min(axis=1)
