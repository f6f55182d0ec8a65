"""Three members, same active parameters, 14x apart in total parameters: the paper's family on a laptop.

    python -m experiments.run --config=experiments/configs/quickstart.py --workdir=runs/quickstart
    python -m experiments.report --workdir=runs/quickstart

Every member sees the same tokens: biographies that only memory can predict, and chained arithmetic with worked
solutions, a fifth of whose steps are corrupted in training (the test problems are clean and new).

Measured, E = 2, 8, 64, one seed: recall of biographies 0.24, 0.53, 0.99; training loss 3.00, 2.13, 0.74; new problems
solved 0.97, 0.98, 0.96, which one seed of this length does not settle: code that rounds otherwise gave 0.86, 0.99, 0.89
(micro_study.py has more steps and seeds). On 2 cores `make study` takes 2 to 3 minutes, the environment included.
"""

import ml_collections

from experiments.selection import select_members


def get_config(selection: str = "") -> ml_collections.ConfigDict:
    """The study; `selection` names members, joined with `+`."""
    config = ml_collections.ConfigDict()
    config.study = {
        "name": "quickstart",
        "title": "Quickstart: three members at equal active parameters",
        "held_fixed": {"active_parameters": 0.10, "tokens": 0.0},
        "varies": ("total_parameters",),
        "notes": (
            "One seed, and a short run: the rise of recall is far larger than the spread between seeds, differences "
            "in reasoning accuracy are not.",
        ),
    }
    config.seeds = (0,)

    config.model = {
        "vocab_size": 288,
        "width": 64,
        "num_layers": 2,
        "num_heads": 4,
        "max_sequence_length": 32,
        "init_std": 0.1,
        "moe": {
            "num_experts": 8,
            "experts_per_token": 2,
            "expert_hidden": 64,
            "load_balance_coefficient": 0.01,
            "router_z_coefficient": 0.0,
        },
    }
    config.data = {
        "tokenizer": "symbols",
        "sources": {
            "knowledge": {"kind": "knowledge", "weight": 1.0, "entities": 3000},
            "reasoning": {"kind": "reasoning", "weight": 1.0, "problems": 3000, "corruption": 0.2},
        },
    }
    config.train = {
        "steps": 1000,
        "batch_size": 128,
        "sequence_length": 16,
        "learning_rate": 6e-3,
        "warmup_steps": 100,
        "final_learning_rate_fraction": 0.05,
        "beta2": 0.98,
        "weight_decay": 0.05,
    }
    config.evaluation = {"points": 5, "examples": 512}

    config.members = {f"E{num_experts}": {"model": {"moe": {"num_experts": num_experts}}} for num_experts in (2, 8, 64)}
    return select_members(config, selection)
