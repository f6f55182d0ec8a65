"""The code family of arXiv 2508.18672: the shapes of paper_math.py, trained on Python and web text.

    python -m experiments.run --config=experiments/configs/paper_code.py:d512-E8-k2 --dry_run

Arguments as for paper_math.py. Less is known of these runs than of the mathematics ones:

    sure       the shapes and names of three members, which were published ("optimal-sparsity-code-...")
    probable   95 billion tokens of Stack-Edu's Python and 30 billion of DCLM, from one reading of the paper's text
    assumed    everything else is as for mathematics; no launch script of a code run was published
"""

import ml_collections

from experiments.configs import paper_math
from experiments.selection import select_members

MIXTURE = {
    # Tokens of the blend (probable). A run takes as many; 1 % of each source is held out, so that the rest is gone
    # through 1.01 times, or as often as the shards make it: how many tokens the sources have is not known to us.
    "stack_edu_python": 95_000_000_000,
    "dclm_dedup": 30_000_000_000,
}

EVALUATIONS = {
    # The authors' task-loss files; the harness' accuracies are zero-shot and 3-shot (sure: its scripts were published).
    "humaneval_plus_test": ("evaluation/humanevalplus_test.json", "exact"),
    "mbpp_plus_test": ("evaluation/mbppplus_test.json", "exact"),
}


def get_config(selection: str = "") -> ml_collections.ConfigDict:
    """The study; `selection` as in paper_math.py."""
    config = paper_math.get_config()
    config.study.name = "paper_code"
    config.study.title = "Code: total parameters, active parameters and top-k at 125 billion tokens"
    config.study.notes = (
        "Every member has the same tokens and the same learning rate; nothing was tuned for one.",
        "Accuracy needs the generated programs to be run, which is not part of this study file: read the task loss.",
    )
    config.data = paper_math.data_section(MIXTURE, EVALUATIONS, allow_repeat=True)
    config.evaluation.generate = False
    return select_members(config, selection, paper_math.AXES)
