"""Goes on with the training of a published checkpoint, on your own text and questions.

    python -m experiments.convert import --checkpoint=FOLDER --config=experiments/configs/pretrained.py:FOLDER \\
        --workdir=runs/continued --config.data.sources.documents.paths="('corpus/*.jsonl',)"
    python -m experiments.run --config=experiments/configs/pretrained.py:FOLDER --workdir=runs/continued \\
        --config.data.sources.documents.paths="('corpus/*.jsonl',)"

FOLDER is of Hugging Face transformers: its config.json gives the model, its tokenizer.json or tokenizer.model the
tokenizer. Both commands take the same overrides. Without a folder the model is OLMoE-1B-7B's preset, which `--dry_run`
can count. The learning rate is a tenth of the study's peak, warmed up and held, as is usual for going on with a model
that has seen its whole schedule.
"""

import ml_collections

from jaxmoe.config import ConfigError, ModelConfig, to_dict


def get_config(folder: str = "") -> ml_collections.ConfigDict:
    """The study of one member whose model is that of the checkpoint in `folder`."""
    model, tokenizer = _model_and_tokenizer(folder)
    config = ml_collections.ConfigDict()
    title = f"Going on from {folder or 'OLMoE-1B-7B'}"
    config.study = {"name": "continued", "title": title, "held_fixed": {}, "varies": ()}
    config.seeds = (0,)
    config.model = to_dict(model)
    config.data = {
        "tokenizer": tokenizer,
        "sources": {"documents": {"kind": "text", "paths": ("corpus/*.txt",)}},
    }
    config.train = {
        "steps": 1000,
        "batch_size": 8,
        "sequence_length": 1024,
        "learning_rate": 4e-5,
        "schedule": "constant",
        "warmup_steps": 100,
    }
    config.evaluation = {"points": 2, "validation_rows": 64}
    config.members = {"continued": {}}
    return config


def _model_and_tokenizer(folder: str) -> tuple[ModelConfig, str]:
    if not folder:
        from jaxmoe.models import preset

        return preset("olmoe-1b-7b"), "OLMoE-1B-7B/tokenizer.json"
    from jaxmoe.interop.huggingface import read_model_config
    from jaxmoe.storage import as_path

    for name in ("tokenizer.json", "tokenizer.model"):
        if (as_path(folder) / name).exists():
            return read_model_config(folder), f"{folder}/{name}"
    raise ConfigError(f"{folder} has neither tokenizer.json nor tokenizer.model.")
