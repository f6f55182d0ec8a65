"""Top-k at fixed active and total parameters: does it matter how many experts share the work?

    python -m experiments.run --config=experiments/configs/paper_topk.py:expert_size --dry_run

The paper reports that top-k by itself hardly changes the losses; how it held the active parameters fixed is not known
to us, so both constructions are here, as slices that the argument selects (joined with `+`):

    expert_size   d = 1024; k = 2, 4, 8, 16 experts of width 2048, 1024, 512, 256 out of 64, 128, 256, 512
    width_470M    d = 512 with k = 14 of 256 experts against d = 1024 with k = 2 of 64, experts of width 2 d: a narrower
                  model with more of its experts active
    width_1500M   the same one size up: d = 1024 with k = 12 of 256, d = 2048 with k = 2 of 64

The second compares members of the published grid's kind across widths, which is the reading closest to it; the grid's
own values of k do not match across widths (10 to 27 % apart), so the narrower member's k is chosen to.
"""

import ml_collections

from experiments.configs import paper_math
from experiments.selection import select_members


def get_config(selection: str = "") -> ml_collections.ConfigDict:
    """The study; `selection` names slices or members, joined with `+`."""
    config = paper_math.get_config()
    config.study.name = "paper_topk"
    config.study.title = "Top-k at fixed active and total parameters"
    config.study.held_fixed = {"active_parameters": 0.03, "total_parameters": 0.03, "tokens": 0.0}
    config.study.varies = ("experts_per_token",)
    config.study.slices = {
        "expert_size": {"title": "Finer experts at equal width", "x": "experts_per_token"},
        "width_470M": {"title": "Width against top-k, 470M active", "x": "experts_per_token"},
        "width_1500M": {"title": "Width against top-k, 1.5B active", "x": "experts_per_token"},
    }
    config.members = {}
    for finer in (1, 2, 4, 8):
        expert_hidden = 2 * 1_024 // finer
        paper_math.add_member(
            config, 1_024, 64 * finer, 2 * finer,
            slices=("expert_size", "width_470M") if finer == 1 else ("expert_size",),
            suffix=f"-F{expert_hidden}",
            model={"moe": {"expert_hidden": expert_hidden}},
        )  # fmt: skip
    paper_math.add_member(config, 512, 256, 14, slices=("width_470M",))
    paper_math.add_member(config, 1_024, 256, 12, slices=("width_1500M",))
    paper_math.add_member(config, 2_048, 64, 2, slices=("width_1500M",))
    return select_members(config, selection, paper_math.AXES)
