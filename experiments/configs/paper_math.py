"""The 65 mathematics models of arXiv 2508.18672, every member of its d x E x k grid.

    python -m experiments.run --config=experiments/configs/paper_math.py:d512-E8-k2 --dry_run
    python -m experiments.run --config=experiments/configs/paper_math.py:d512-E8-k2 --workdir=gs://bucket/paper_math \\
        --config.data.root=gs://bucket/corpus --config.mesh.fsdp=-1

The argument names members, families at fixed width and top-k, or conditions; several are joined with `+`:

    d512-E8-k2     one member, whose folder gets its published name, d512-E8-k2-320M-A170M
    d512-k2        one family: equal active parameters, E = 8 to 256
    k=2            all with two experts a token; `d=512,k=2` narrows it

Under `data.root` there must be the tokenizer's file and, for each source below, shards that `python -m
experiments.data tokenize` makes (docs/paper.md has the commands). Where a number comes from is written beside it:

    [scripts]  the authors' launch scripts in their repository (one for each member)
    [code]     the code that these scripts run
    [paper]    the paper's text
    [ours]     our choice, where theirs is not known or another one is better

What differs from the authors' runs, and why, is in docs/paper.md. Nothing here was trained to the end by this
project: one member takes days of a pod. `experiments.fit_check` says on which devices each fits.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from experiments.selection import select_members
from jaxmoe.accounting import member_name
from jaxmoe.config import ModelConfig, from_dict

HEADS = {512: 4, 1024: 8, 2048: 16}  # heads of 128, as many for keys and values [scripts]
EXPERTS = {512: (8, 16, 32, 64, 128, 256), 1024: (8, 16, 32, 64, 128, 256), 2048: (8, 16, 32, 64, 128)}  # [scripts]
EXPERTS_PER_TOKEN = (2, 4, 8, 16)  # k <= E [scripts]
AXES = {"d": "model.width", "E": "model.moe.num_experts", "k": "model.moe.experts_per_token"}

TOKENIZER = "llm-jp-tokenizer-100k.ver3.0b1.model"  # 99,574 pieces [scripts]
VOCAB_SIZE = 99_584  # the pieces, padded to a multiple of 128 [code]

MIXTURE = {
    # Tokens of each source in the blend, 252,525,252,526 in all, of which 99 % are trained on [scripts].
    "dclm_dedup": 67_615_858_442,  # web text, in 50 shards
    "dolma_pes2o": 62_853_772_802,
    "olmo_arxiv": 22_219_529_548,
    "tulu_flan": 18_485_484_042,
    "olmo_openwebmath": 13_395_295_861,
    "olmo_algebraicstack": 13_280_211_413,
    "finemath_4plus": 10_335_599_308,
    "mathpile": 9_176_535_715,
    "tinygsm_mind": 6_944_299_886,
    "dolma_books": 5_494_262_694,
    "openmathinstruct_2": 5_168_587_858,
    "wikipedia_en": 4_744_259_830,
    "mathcoder2_synthetic": 4_098_243_004,
    "dolma_wiki": 3_896_965_449,
    "dolmino_stackexchange": 1_464_772_187,
    "stackmathqa_1q1a": 1_069_981_785,
    "natural_reasoning": 1_022_226_926,
    "numinamath_cot": 446_376_544,
    "openmathinstruct_1_correct": 340_246_694,
    "tulu_math": 250_390_697,
    "metamath_owm_filtered": 85_423_408,
    "orca_math_200k": 67_704_517,
    "dolmino_math_synthetic": 31_677_007,
    "webinstruct_full": 29_749_546,
    "gsm8k_dolmino": 2_841_494,  # GSM8K's training problems, a first time
    "gsm8k": 2_781_710,  # and again
    "codesearchnet_owm_filtered": 2_174_159,
}

EVALUATIONS = {
    # Prompts with their examples in them, and answers, in the form of the authors' task-loss files [code].
    "gsm8k_test": ("evaluation/gsm8k_4shot.json", "final_number"),  # 4 examples [code]
    "gsm_plus_test": ("evaluation/gsm_plus_5shot_cot.json", "final_number"),  # 5 examples [code]
    "triviaqa_validation": ("evaluation/triviaqa_4shot.json", "exact"),  # 4 examples [code]
    "hellaswag_validation": ("evaluation/hellaswag_4shot.json", "exact"),  # 4 examples [code]
}


def get_config(selection: str = "") -> ml_collections.ConfigDict:
    """The study; `selection` names members, families or conditions, joined with `+`."""
    config = ml_collections.ConfigDict()
    config.study = {
        "name": "paper_math",
        "title": "Mathematics: total parameters, active parameters and top-k at 125 billion tokens",
        "held_fixed": {"active_parameters": 0.03, "tokens": 0.0},  # the router grows with E: 1.2 % at d=512
        "varies": ("total_parameters",),
        "notes": (
            "Every member has the same tokens and the same learning rate, as in the paper; nothing was tuned for one.",
            "GSM8K's training problems, twice, and large sets made in their likeness are in the mixture, as in the "
            "paper; paper_decontaminated.py leaves them out.",
        ),
    }
    config.seeds = (1234,)  # Megatron's default; the scripts set none [code]

    config.model = model_section()
    config.data = data_section(MIXTURE)
    config.train = train_section()
    config.evaluation = {
        "points": 60,  # every 497 steps; theirs every 500 [code]
        "examples": 2_000,  # [ours]: all 1,319 of GSM8K's test questions
        "batch_size": 128,  # [ours]
        "validation_rows": 512,  # per source [ours]; theirs are 10 batches of the blend [code]
        "max_new_tokens": 1_024,  # [code], of the test-time study
    }
    config.members = {}
    for width, experts in EXPERTS.items():
        for num_experts in experts:
            for experts_per_token in EXPERTS_PER_TOKEN:
                if experts_per_token <= num_experts:
                    add_member(config, width, num_experts, experts_per_token)
    return select_members(config, selection, AXES)


def model_section() -> dict[str, Any]:
    """What all members have in common: Mixtral's architecture, every layer routed."""
    return {
        "vocab_size": VOCAB_SIZE,
        "num_layers": 16,  # [scripts]
        "max_sequence_length": 4_096,  # [scripts]
        "rope_theta": 10_000.0,  # [scripts]
        "norm_eps": 1e-5,  # [scripts]
        "tie_embeddings": False,  # [scripts]
        "qk_norm": "none",  # [code]
        "document_mask": False,  # documents in a row see each other [code]
        "init_std": 0.02,  # [scripts]
        "residual_init": "scaled",  # 0.02 / sqrt(2 * 16) for what writes to the residual stream [code]
        "compute_dtype": "bfloat16",  # [scripts]
        "moe": {
            "num_experts": 8,
            "experts_per_token": 2,
            "expert_hidden": 1_024,
            "score_order": "topk_then_softmax",  # [scripts]
            "router_dtype": "bfloat16",  # [code]; float32 is our library's default
            "load_balance_coefficient": 1e-2,  # [scripts]
            "load_balance_definition": "switch",  # 1 when balanced [code]
            "router_z_coefficient": 1e-3,  # [scripts]
            "auxiliary_reduction": "sum",  # over layers [code]
            "capacity_factor": None,  # dropless [scripts]
            "expert_buffer_factor": 2.0,  # where experts are spread: room for twice the mean [ours], and
            "strict_buffer": True,  # a step that would need more is not applied, and stops the run [ours]
        },
    }


def data_section(
    mixture: Mapping[str, int],
    evaluations: Mapping[str, tuple[str, str]] = EVALUATIONS,
    *,
    allow_repeat: bool = False,
) -> dict[str, Any]:
    """Sources in proportion to their tokens, and what is evaluated and not trained on."""
    trained = {
        name: {
            "kind": "tokens",
            "weight": float(tokens),
            "paths": (f"{name}/*.array_record",),
            "test_fraction": 0.01,  # split 990:10:0 [scripts]
            "allow_repeat": allow_repeat,
        }
        for name, tokens in mixture.items()
    }
    evaluated = {
        name: {
            "kind": "question_answer",
            "weight": 0.0,
            "test_paths": (path,),
            "schema": "prompt_answer",
            "answer_separator": "",  # their files have no space before the answer [code]
            "answer_format": answer_format,
        }
        for name, (path, answer_format) in evaluations.items()
    }
    root = ml_collections.config_dict.placeholder(str)
    return {"tokenizer": TOKENIZER, "sources": {**trained, **evaluated}, "root": root}


def train_section() -> dict[str, Any]:
    """125 billion tokens with AdamW, the same for every size."""
    return {
        "steps": 29_803,  # 125e9 / (1024 * 4096), rounded up [scripts]
        "batch_size": 1_024,  # sequences [scripts]
        "sequence_length": 4_096,  # [scripts]
        "learning_rate": 4e-4,  # the peak [scripts]
        "schedule": "warmup_cosine",  # [scripts]
        "warmup_steps": 2_000,  # linear from 0 [scripts]
        "final_learning_rate_fraction": 0.1,  # 4e-5 at the last step [scripts]
        "beta1": 0.9,  # [scripts]
        "beta2": 0.95,  # [scripts]
        "epsilon": 1e-8,  # [scripts]
        "weight_decay": 0.1,  # matrices only [scripts, code]
        "clip_norm": 1.0,  # [scripts]
        "checkpoint_every": 500,  # [code]
        "log_every": 10,  # [ours]
    }


def add_member(
    config: ml_collections.ConfigDict,
    width: int,
    num_experts: int,
    experts_per_token: int,
    *,
    slices: tuple[str, ...] | None = None,
    suffix: str = "",
    model: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
) -> None:
    """Adds a member under `dD-EE-kK`, with its published name.

    Args:
      config: with the section `model`, which the member's values are put over.
      width: d; an expert's hidden width is 2 d [scripts].
      num_experts: E.
      experts_per_token: k.
      slices: None for the family at this width and top-k.
      suffix: put after key and name.
      model: further values of its model.
      train: values of its training.
    """
    moe = {"num_experts": num_experts, "experts_per_token": experts_per_token, "expert_hidden": 2 * width}
    own = {"width": width, "num_heads": HEADS[width], **(model or {})}
    own["moe"] = {**moe, **own.get("moe", {})}
    section = config.model.to_dict()
    complete = from_dict(ModelConfig, {**section, **own, "moe": {**section["moe"], **own["moe"]}})
    config.members[f"d{width}-E{num_experts}-k{experts_per_token}{suffix}"] = {
        "name": member_name(complete) + suffix,
        "slices": (f"d{width}-k{experts_per_token}",) if slices is None else slices,
        "model": own,
        **({} if train is None else {"train": dict(train)}),
    }
