"""The study in miniature: six members at equal active parameters and tokens, 14x apart in total parameters.

    python -m experiments.run --config=experiments/configs/micro_study.py:headline --workdir=runs/micro_study
    python -m experiments.report --workdir=runs/micro_study

The argument names a slice (several are joined with `+`; none runs all of them):

    headline       E = 2, 4, 8, 16, 32, 64 at K = 2
    control        the same without corrupted training solutions
    topk           K = 1, 2, 4 at equal active and total parameters (finer experts as K grows)
    learning_rate  a third of the headline's and twice it, at both ends of the family
    init           half and twice the headline's initialization scale, at both ends

Measured (two seeds, E = 2 to 64; docs/micro_study.md): recall rises 0.23, 0.31, 0.44, 0.71, 0.93, 0.99 and the training
loss falls 3.05 to 0.68, at every step in both seeds; new problems solved 0.90, 0.92, 0.88, 0.94, 0.85, 0.88, with
seeds up to 0.16 apart, which does not settle what reasoning does; in the control 1.00 except E = 64 (0.99); with
K = 1, 2, 4 recall 0.61, 0.71, 0.74 and new problems 0.91, 0.94, 0.96. Two members are above 20 tokens per parameter. On
2 cores, the machine partly busy: headline 14 minutes, control the same, topk 5; learning_rate and init have 8 more runs
each and were tried at 60 steps only.
"""

import ml_collections

from experiments.selection import select_members

LEARNING_RATE = 6e-3
INIT_STD = 0.1
ENDS = (2, 64)


def get_config(selection: str = "") -> ml_collections.ConfigDict:
    """The study; `selection` names slices or members, joined with `+`."""
    config = ml_collections.ConfigDict()
    config.study = {
        "name": "micro_study",
        "title": "Micro study: memorization and reasoning against total parameters",
        "held_fixed": {"active_parameters": 0.10, "tokens": 0.0},
        "varies": ("total_parameters",),
        "slices": {
            "headline": {"title": "Total parameters at equal active parameters and tokens", "x": "total_parameters"},
            "control": {
                "title": "Control: no corrupted solutions in training",
                "x": "total_parameters",
                "note": "Everything else equal to the headline slice.",
            },
            "topk": {
                "title": "Experts per token at equal active and total parameters",
                "x": "experts_per_token",
                "note": "At K = 1 the softmax over the kept logits would be constant, so that member's gate is the "
                "full softmax, not renormalized: K = 1 is not a clean comparison.",
            },
            "learning_rate": {"title": "Learning rate", "x": "learning_rate"},
            "init": {"title": "Initialization scale", "x": "init_std"},
        },
        "notes": (
            "In the prototype of this recipe the fall of reasoning accuracy on new problems with more experts needed "
            "the corrupted training solutions: without them (the control slice) both ends were at 0.997 to 1.000. "
            "It goes with memorizing wrong solutions, a mechanism designed in; it is no evidence for the mechanism "
            "behind the paper's result.",
            "The control ends at the ceiling, so it cannot rule out a fall without corruption on a harder task.",
            "Training solutions are corrupted and test solutions clean, so training minus test loss is not a plain "
            "generalization gap; accuracy on the training split counts the corrupted solutions as right.",
            "A model that follows the rule and ignores the corruption agrees with a corrupted solution with "
            "probability 0.82^3 = 0.551; accuracy on the training split above that is memorized corruption.",
            "Scores are those of the last step, not of the best checkpoint. The learning rate was not tuned for any "
            "member; the learning-rate slice shows how much it matters.",
        ),
    }
    config.seeds = (0, 1)

    config.model = {
        "vocab_size": 288,
        "width": 64,
        "num_layers": 2,
        "num_heads": 4,
        "max_sequence_length": 32,
        "init_std": INIT_STD,
        "moe": {
            "num_experts": 16,
            "experts_per_token": 2,
            "expert_hidden": 64,
            "load_balance_coefficient": 0.01,
            "router_z_coefficient": 0.0,
        },
    }
    config.data = {
        "tokenizer": "symbols",
        "sources": {
            "knowledge": {"kind": "knowledge", "weight": 1.0, "entities": 4000, "attributes": 13, "symbols": 256},
            "reasoning": {
                "kind": "reasoning",
                "weight": 1.0,
                "problems": 3000,
                "operations": 3,
                "modulus": 10,
                "corruption": 0.2,
                "prompt_weight": 0.1,
            },
        },
    }
    config.train = {
        "steps": 1800,
        "batch_size": 128,
        "sequence_length": 16,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": 100,
        "final_learning_rate_fraction": 0.05,
        "beta2": 0.98,
        "weight_decay": 0.05,
    }
    config.evaluation = {"points": 6, "examples": 1024}

    members = {}
    for num_experts in (2, 4, 8, 16, 32, 64):
        slices = ("headline",)
        if num_experts == 16:
            slices += ("topk",)
        if num_experts in ENDS:
            slices += ("learning_rate", "init")
        members[f"E{num_experts}"] = {"slices": slices, "model": {"moe": {"num_experts": num_experts}}}
        members[f"E{num_experts}-clean"] = {
            "slices": ("control",),
            "model": {"moe": {"num_experts": num_experts}},
            "data": {"sources": {"reasoning": {"corruption": 0.0}}},
        }
    members["E8-k1"] = {
        "slices": ("topk",),
        "model": {
            "moe": {
                "num_experts": 8,
                "experts_per_token": 1,
                "expert_hidden": 128,
                "score_order": "softmax_then_topk",
                "renormalize": False,
            }
        },
    }
    members["E32-k4"] = {
        "slices": ("topk",),
        "model": {"moe": {"num_experts": 32, "experts_per_token": 4, "expert_hidden": 32}},
    }
    for num_experts in ENDS:
        for name, learning_rate in (("low", LEARNING_RATE / 3), ("high", LEARNING_RATE * 2)):
            members[f"E{num_experts}-lr-{name}"] = {
                "slices": ("learning_rate",),
                "model": {"moe": {"num_experts": num_experts}},
                "train": {"learning_rate": learning_rate},
            }
        for name, init_std in (("half", INIT_STD / 2), ("double", INIT_STD * 2)):
            members[f"E{num_experts}-init-{name}"] = {
                "slices": ("init",),
                "model": {"moe": {"num_experts": num_experts}, "init_std": init_std},
            }
    config.members = members
    return select_members(config, selection)
