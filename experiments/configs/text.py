"""Your own text and question files: a small family trained on them, with task loss and accuracy on your questions.

    python -m experiments.run --config=experiments/configs/text.py --workdir=runs/text \\
        --config.data.sources.documents.paths="('corpus/*.txt',)" \\
        --config.data.sources.questions.train_paths="('gsm8k/train.jsonl',)" \\
        --config.data.sources.questions.test_paths="('gsm8k/test.jsonl',)"

Documents may be .txt, .jsonl (field `text`), .jsonl.gz or .array_record, local or gs://; questions are in GSM8K's
form (`question`, `answer` ending in "#### result") or, with --config.data.sources.questions.schema=prompt_answer,
`prompt` and `answer`. The tokenizer is bytes; give a tokenizers .json or a sentencepiece .model with
--config.data.tokenizer and raise --config.model.vocab_size to match. To train on questions alone use the argument
`text.py:questions`, on documents alone `text.py:documents`.

Measured on GSM8K's train and test files, with wikitext-2's validation text and tiny Shakespeare as documents, E = 4 and
16: training loss 2.10 and 2.05 nats per byte, task loss on the test answers 2.90 and 2.85 bits per byte, accuracy of
generated answers 0, as expected of 1 to 3 million parameters. 6.3 CPU minutes, 10 minutes on 2 cores that had other
work to do. Rows are 768 bytes, longer than about 9 of 10 questions with their answers; records count the longer ones.
"""

import ml_collections

from jaxmoe.config import ConfigError


def get_config(sources: str = "documents+questions") -> ml_collections.ConfigDict:
    """The study; `sources` is `documents`, `questions` or both joined with `+`."""
    config = ml_collections.ConfigDict()
    config.study = {
        "name": "text",
        "title": "Your text and questions: two members at equal active parameters",
        "held_fixed": {"active_parameters": 0.10, "tokens": 0.0},
        "varies": ("total_parameters",),
        "notes": ("Byte-level models of this size learn the form of an answer, not arithmetic: read the task loss.",),
    }
    config.seeds = (0,)

    config.model = {
        "vocab_size": 320,
        "width": 128,
        "num_layers": 4,
        "num_heads": 4,
        "max_sequence_length": 1536,
        "document_mask": True,
        "moe": {"num_experts": 4, "experts_per_token": 2, "expert_hidden": 128},
    }
    available = {
        "documents": {"kind": "text", "weight": 0.5, "paths": ("corpus/*.txt",)},
        "questions": {
            "kind": "question_answer",
            "weight": 0.5,
            "train_paths": ("gsm8k/train.jsonl",),
            "test_paths": ("gsm8k/test.jsonl",),
        },
    }
    unknown = set(sources.split("+")) - set(available)
    if unknown:
        raise ConfigError(f"text.py:{sources}: choose documents, questions, or documents+questions.")
    config.data = {"tokenizer": "bytes", "sources": {name: available[name] for name in sources.split("+")}}
    config.train = {
        "steps": 200,
        "batch_size": 8,
        "sequence_length": 768,
        "learning_rate": 2e-3,
        "warmup_steps": 20,
    }
    config.evaluation = {"points": 2, "examples": 48, "batch_size": 16, "validation_rows": 64, "max_new_tokens": 200}

    config.members = {f"E{num_experts}": {"model": {"moe": {"num_experts": num_experts}}} for num_experts in (4, 16)}
    return config
