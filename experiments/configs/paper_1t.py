"""The mathematics models trained for a trillion tokens, eight times as long.

    python -m experiments.run --config=experiments/configs/paper_1t.py:d1024-E64-k2 --dry_run

The paper's third version has such a run (its appendix C.8): TriviaQA rises from 0.279 to 0.535 and GSM8K from 0.318 to
0.363 between 125 billion and a trillion tokens. Of which member is not known to us, so every member of paper_math.py
can be named, as there. The pool of 250 billion tokens is gone through four times, and the learning rate decays over
the whole run; both are our reading.
"""

import ml_collections

from experiments.configs import paper_math
from experiments.selection import select_members


def get_config(selection: str = "") -> ml_collections.ConfigDict:
    """The study; `selection` as in paper_math.py."""
    config = paper_math.get_config()
    config.study.name = "paper_1t"
    config.study.title = "Mathematics: total parameters, active parameters and top-k at a trillion tokens"
    config.data = paper_math.data_section(paper_math.MIXTURE, allow_repeat=True)
    config.train.steps = 238_419  # 1e12 / (1024 * 4096), rounded up
    return select_members(config, selection, paper_math.AXES)
