"""Post-training: GRPO over the library's own decoder, rewards, and the evaluation of programs that a model wrote."""

from jaxmoe.post_training.advantages import equal_groups, group_advantages
from jaxmoe.post_training.grpo import GRPO, check_grpo_data
from jaxmoe.post_training.loss import kl_estimate, token_loss
from jaxmoe.post_training.prompts import Prompts
from jaxmoe.post_training.rewards import Rewards, check_reward
from jaxmoe.post_training.validation import validation_rewards

__all__ = [
    "GRPO",
    "Prompts",
    "Rewards",
    "check_grpo_data",
    "check_reward",
    "equal_groups",
    "group_advantages",
    "kl_estimate",
    "token_loss",
    "validation_rewards",
]
