"""The mathematics families with 32 layers in place of 16.

    python -m experiments.run --config=experiments/configs/paper_depth.py:d512-k2 --dry_run

The paper has 32-layer variants; which members, and what came of it, is not known to us. Here are the families with two
experts a token at d = 512 and 1024. Compare each with the family of the same name in paper_math.py: at one width, twice
the layers are about twice the parameters outside the embeddings, so depth is not varied at equal cost.
Arguments as for paper_math.py.
"""

import ml_collections

from experiments.configs import paper_math
from experiments.selection import select_members


def get_config(selection: str = "") -> ml_collections.ConfigDict:
    """The study; `selection` as in paper_math.py."""
    config = paper_math.get_config()
    config.study.name = "paper_depth"
    config.study.title = "Mathematics with 32 layers"
    config.model.num_layers = 32
    config.members = {}
    for width in (512, 1_024):
        for num_experts in paper_math.EXPERTS[width]:
            paper_math.add_member(config, width, num_experts, 2, suffix="-L32")
    return select_members(config, selection, paper_math.AXES)
