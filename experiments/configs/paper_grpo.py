"""GRPO of the mathematics models: every member of paper_math.py, from its checkpoint on, 105 steps.

    python -m experiments.run --config=paper_grpo.py:d512-E8-k2 --dry_run
    python -m experiments.run --config=paper_grpo.py:d512-E8-k2 --workdir=gs://bucket/paper_grpo \\
        --config.start_from='gs://bucket/paper_math/{member}' --config.data.root=gs://bucket/corpus

`{member}` stands for the member's name, which is that of the run in paper_math.py's folder. Arguments as there:
`d512-k2`, `k=2`, `E=8+d2048-k2`. Under `data.root` there must be the tokenizer's file and, as JSON lines,

    gsm8k/train.jsonl gsm8k/test.jsonl     question, answer ("... #### 72")
    math/train.jsonl math/test.jsonl       prompt, answer (the worked solution with its \\boxed{result})

and the reward needs `pip install jaxmoe[post]`. Where a number comes from is written beside it:

    [script]   the authors' launch script for GRPO, and the defaults of the verl that it runs
    [paper]    the paper's text, in others' words
    [ours]     our choice, where theirs is not known or another one is better

How sure: the settings are those of the script. That GSM8K's problems are trained on is from the paper; the script
prepares them, too, and trains on MATH alone. Here both are, in proportion to their numbers [ours]: with
--config.data.sources.gsm8k.weight=0 the script is followed, with --config.data.sources.math.weight=0 the paper. Nothing
here was trained by this project. docs/grpo.md has the formulae and what differs from verl.
"""

import ml_collections

from experiments.configs import paper_math
from experiments.selection import select_members

PROMPT = "Question: {question}\nAnswer:"
"""[ours], as in the test-time study [script]. The script has the bare question in a chat template that is not known."""


def get_config(selection: str = "") -> ml_collections.ConfigDict:
    """The study; `selection` as in paper_math.py."""
    config = paper_math.get_config()
    config.study.name = "paper_grpo"
    config.study.title = "Mathematics after GRPO: total parameters, active parameters and top-k"
    config.study.notes = (
        "Every member starts from its own pre-training and has the same rollouts and the same learning rate.",
        "The number of tokens is that of the updates, each row padded to a prompt and a response of full length.",
    )
    config.start_from = "runs/paper_math/{member}"
    config.data = {
        "tokenizer": paper_math.TOKENIZER,
        "sources": {
            "gsm8k": {
                "kind": "question_answer",
                "weight": 7_473.0,  # its problems; trained on [paper]
                "train_paths": ("gsm8k/train.jsonl",),
                "test_paths": ("gsm8k/test.jsonl",),  # validated on [script]
                "schema": "gsm8k",
                "prompt_template": PROMPT,
            },
            "math": {
                "kind": "question_answer",
                "weight": 7_500.0,  # its problems; trained on [script]
                "train_paths": ("math/train.jsonl",),
                "test_paths": ("math/test.jsonl",),  # validated on [script]
                "schema": "prompt_answer",
                "answer_format": "exact",
            },
        },
        "root": ml_collections.config_dict.placeholder(str),
    }
    config.grpo = {
        "group_size": 5,  # [script]
        "updates_per_step": 4,  # mini-batches of 256 prompts, each once [script]
        "max_prompt_tokens": 512,  # longer ones are left out [script]
        "max_response_tokens": 1_024,  # [script]
        "temperature": 1.0,  # [script]
        "top_p": 1.0,  # [script]
        "clip_ratio": 0.2,  # [script]
        "kl_coefficient": 0.001,  # of the k3 estimate, clipped to 10, in the loss [script]
        "reward": "program",  # what a program computes, else what math-verify reads; 1 or 0 [script]
        "rollout_batch_size": 256,  # [ours]: theirs is vLLM's affair
    }
    config.train = {
        "steps": 105,  # 15 epochs of 7 whole batches [script]
        "batch_size": 1_024,  # prompts [script]
        "sequence_length": 1_536,  # a prompt and a response
        "gradient_accumulation": 4,  # [ours]: 320 responses at once; no number but rounding depends on it
        "learning_rate": 5e-6,  # [script]
        "schedule": "constant",  # no warm-up [script]
        "beta1": 0.9,  # [script]
        "beta2": 0.999,  # [script]
        "epsilon": 1e-8,  # [script]
        "weight_decay": 0.01,  # [script]; matrices only [ours], theirs on all
        "clip_norm": 1.0,  # [script]
        "log_every": 1,  # [script]
        "checkpoint_every": 5,  # [ours]: a step takes minutes
    }
    config.evaluation = {
        "points": 21,  # every 5 steps, and before the first [script]
        "examples": 5_000,  # all of GSM8K's 1,319 and MATH's 5,000 test problems [script]
        "batch_size": 128,  # [ours]
        "validation_rows": 512,  # [ours]
        "generate": False,  # the reward of greedy responses is measured anyway, and reads MATH's answers, too
        "max_new_tokens": 1_024,  # [script]
    }
    return select_members(config, selection, paper_math.AXES)
