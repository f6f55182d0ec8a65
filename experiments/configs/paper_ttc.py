"""Test-time compute of the mathematics models: 128 samples of each problem of GSM8K, and a majority vote.

    python -m experiments.test_time_compute --config=experiments/configs/paper_ttc.py:d512-k2 --dry_run
    python -m experiments.test_time_compute --config=experiments/configs/paper_ttc.py:d512-E8-k2 \\
        --workdir=gs://bucket/paper_math --config.data.root=gs://bucket/corpus

The workdir is the folder of the study that trained the members, `paper_math.py`; arguments as there. Under `data.root`
there must be the tokenizer's file and GSM8K's own files, `evaluation/gsm8k_train.jsonl` and `gsm8k_test.jsonl`; the
mixture's shards are not read. Where a number comes from is written beside it:

    [paper]    the paper's text, as read by others
    [code]     the defaults of the authors' code, a fork of "Large Language Monkeys"; the one committed job has no
               worked examples, temperature 0 and one sample, for the models after GRPO
    [ours]     our choice
"""

import ml_collections

from experiments.configs import paper_math
from experiments.selection import select_members

GSM8K = "gsm8k_zero_shot"  # not to be taken for the source of this name that is trained on


def get_config(selection: str = "") -> ml_collections.ConfigDict:
    """The study; `selection` as in paper_math.py."""
    config = paper_math.get_config()
    config.study.name = "paper_ttc"
    config.study.title = "Mathematics: majority vote and coverage against the number of samples"
    config.data.sources[GSM8K] = {
        "kind": "question_answer",
        "weight": 0.0,  # evaluated, not trained on
        "train_paths": ("evaluation/gsm8k_train.jsonl",),  # worked examples are drawn from it [code]
        "test_paths": ("evaluation/gsm8k_test.jsonl",),  # all 1,319 questions
        "schema": "gsm8k",
        "prompt_template": "Question: {question}\nAnswer:",  # [code]
        "answer_format": "final_number",  # [ours]: "####", else the last number
    }
    config.evaluation.test_time = {
        "sources": (GSM8K,),
        "samples": 128,  # 2^7 [paper, code]
        "shots": 0,  # [paper]; 2 [code]
        "temperature": 0.6,  # [code]
        "top_p": 0.95,  # [code]
        "max_new_tokens": 1_024,  # [code]
        "stops": ("Q:", "Question:"),  # [code]
        "batch_size": 64,  # [code]
        "seed": 0,  # [code], of the worked examples
    }
    return select_members(config, selection, paper_math.AXES)
