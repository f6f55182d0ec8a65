"""The mathematics models without GSM8K's training problems and what was made in their likeness.

    python -m experiments.run --config=experiments/configs/paper_decontaminated.py:d512-k2 --dry_run

Arguments as for paper_math.py. The paper's third version has such a run (its appendix C.3) and finds the trends as they
were; which sources it leaves out is not known to us. `LEFT_OUT` is our choice: GSM8K's training split itself, and the
sets that contain it, start from it or imitate it by their makers' descriptions, where in doubt. The tokens that this
takes away, 17.5 of 252.5 billion, are made up by all other sources in proportion.
"""

import ml_collections

from experiments.configs import paper_math
from experiments.selection import select_members

LEFT_OUT = (
    "gsm8k",  # the training split
    "gsm8k_dolmino",  # the same, in Dolmino's mixture
    "tinygsm_mind",  # problems written in GSM8K's likeness
    "openmathinstruct_1_correct",  # solutions of GSM8K's and MATH's training problems
    "openmathinstruct_2",  # the same, and problems derived from them
    "metamath_owm_filtered",  # rewritten problems of GSM8K and MATH
    "dolmino_math_synthetic",  # synthetic problems, of which a part starts from GSM8K
    "mathcoder2_synthetic",  # of MathCoder, which starts from GSM8K and MATH
    "tulu_math",  # personas' problems in the style of GSM8K and MATH
    "orca_math_200k",  # its seed problems include GSM8K's
    "numinamath_cot",  # includes GSM8K and MATH, and their rewritings
    "webinstruct_full",  # not checked against GSM8K
)


def get_config(selection: str = "") -> ml_collections.ConfigDict:
    """The study; `selection` as in paper_math.py."""
    config = paper_math.get_config()
    config.study.name = "paper_decontaminated"
    config.study.title = "Mathematics without GSM8K's training problems and their relatives"
    config.study.notes = (
        "Every member has the same tokens and the same learning rate; nothing was tuned for one.",
        f"Left out, by our choice: {', '.join(LEFT_OUT)}.",
    )
    kept = {name: tokens for name, tokens in paper_math.MIXTURE.items() if name not in LEFT_OUT}
    config.data = paper_math.data_section(kept)
    return select_members(config, selection, paper_math.AXES)
