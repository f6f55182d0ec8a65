"""Learning rate and initialization scale, at both ends of one family.

    python -m experiments.run --config=experiments/configs/paper_lr_init.py:learning_rate --dry_run

The paper varies both and reports that they move the generalization gap in the direction that sparsity does, reasoning
more than memorization. Which values it tried is not known to us: the grids below are ours, by factors of two around the
published 4e-4 and 0.02. The argument names slices (joined with `+`) or members:

    learning_rate  1e-4 to 1.6e-3, at d = 512, k = 2, E = 8 and 256
    init           0.005 to 0.04, the same members
"""

import ml_collections

from experiments.configs import paper_math
from experiments.selection import select_members

LEARNING_RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)  # [ours]; the middle one is the published
INIT_STDS = (0.005, 0.01, 0.02, 0.04)  # [ours]; 0.02 is the published
ENDS = (8, 256)


def get_config(selection: str = "") -> ml_collections.ConfigDict:
    """The study; `selection` names slices or members, joined with `+`."""
    config = paper_math.get_config()
    config.study.name = "paper_lr_init"
    config.study.title = "Learning rate and initialization scale at both ends of a family"
    config.study.varies = ("train.learning_rate",)
    config.study.slices = {
        "learning_rate": {"title": "Learning rate", "x": "learning_rate"},
        "init": {"title": "Initialization scale", "x": "init_std"},
    }
    config.members = {}
    for num_experts in ENDS:
        paper_math.add_member(config, 512, num_experts, 2, slices=("learning_rate", "init"))
        for learning_rate in LEARNING_RATES:
            if learning_rate != config.train.learning_rate:
                paper_math.add_member(
                    config, 512, num_experts, 2,
                    slices=("learning_rate",),
                    suffix=f"-lr{round(learning_rate * 1e4)}e-4",
                    train={"learning_rate": learning_rate},
                )  # fmt: skip
        for init_std in INIT_STDS:
            if init_std != config.model.init_std:
                paper_math.add_member(
                    config, 512, num_experts, 2,
                    slices=("init",),
                    suffix=f"-init{round(init_std * 1e3)}e-3",
                    model={"init_std": init_std},
                )  # fmt: skip
    config = select_members(config, selection, paper_math.AXES)
    if all("train" not in member for member in config.members.values()):  # the slice of scales alone
        config.study.varies = ("model.init_std",)
        del config.study.slices["learning_rate"]
        for member in config.members.values():
            member.slices = ("init",)
    return config
