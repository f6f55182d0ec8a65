"""GRPO on a laptop: two small members learn arithmetic halfway, and reinforcement takes them further.

    python -m experiments.run --config=experiments/configs/grpo_micro.py:pretrain --workdir=runs/grpo_micro_start
    python -m experiments.run --config=experiments/configs/grpo_micro.py --workdir=runs/grpo_micro
    python -m experiments.report --workdir=runs/grpo_micro

The first command stops pre-training halfway, on solutions of which a fifth of the steps is wrong; the second samples
five solutions to each problem and rewards those that are right in every step. Elsewhere than in `runs`, tell the second
where the first went: --config.start_from='FOLDER/{member}'.

Measured, one seed: new problems solved by greedy decoding before and after 100 rollout steps, 0.37 and 0.86 with 4
experts, 0.53 and 0.82 with 16; mean reward of the sampled solutions in the first and the last step, 0.16 and 0.84, 0.20
and 0.77. How far a member gets depends on where it starts: from 300 steps of pre-training, where it solved 0.22, the
one with 16 experts solved 0.23 after GRPO. The two commands took 2 min 18 s of processor time, 2 to 5 minutes on 2
cores that others used, too.
"""

import ml_collections

from experiments.configs import quickstart
from jaxmoe.config import ConfigError

STAGES = ("grpo", "pretrain")
HALFWAY = {4: 300, 16: 380}  # steps of pre-training after which a member of so many experts is halfway


def get_config(stage: str = "grpo") -> ml_collections.ConfigDict:
    """The study of one stage, `pretrain` or `grpo`."""
    if stage not in STAGES:
        raise ConfigError(f"{stage!r} is no stage of this study; choose {' or '.join(STAGES)}.")
    config = ml_collections.ConfigDict()
    config.study = {
        "name": "grpo_micro" if stage == "grpo" else "grpo_micro_start",
        "title": "GRPO on chained arithmetic" if stage == "grpo" else "What GRPO on chained arithmetic starts from",
        "held_fixed": {"active_parameters": 0.10},
        "varies": ("total_parameters",),
    }
    config.seeds = (0,)

    config.model = quickstart.get_config().model
    config.data = {
        "tokenizer": "symbols",
        "sources": {
            # A fifth of the written steps is wrong in pre-training; GRPO's reward compares with the correct ones.
            "reasoning": {"kind": "reasoning", "weight": 1.0, "problems": 6000, "corruption": 0.2},
        },
    }
    config.evaluation = {"points": 5, "examples": 1024}
    if stage == "pretrain":
        config.train = quickstart.get_config().train
        config.train.warmup_steps = 50
    else:
        config.start_from = "runs/grpo_micro_start/{member}"
        config.train = {
            "steps": 100,  # rollouts
            "batch_size": 128,  # prompts of a rollout
            "sequence_length": 16,
            "learning_rate": 3e-4,
            "schedule": "constant",
            "beta2": 0.999,
            "weight_decay": 0.01,
            "log_every": 1,
        }
        config.grpo = {
            "group_size": 5,
            "updates_per_step": 4,
            "max_prompt_tokens": 9,
            "max_response_tokens": 6,
            "kl_coefficient": 0.001,
            "reward": "exact",  # the whole solution, every step of it
            "rollout_batch_size": 640,
        }
    config.members = {}
    for num_experts, steps in HALFWAY.items():
        config.members[f"E{num_experts}"] = {"model": {"moe": {"num_experts": num_experts}}}
        if stage == "pretrain":
            config.members[f"E{num_experts}"]["train"] = {"steps": steps}
    return config
