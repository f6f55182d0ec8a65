"""Goes on with the training of a published checkpoint, on your own text and questions.

    python -m experiments.convert import --checkpoint=FOLDER --config=experiments/configs/pretrained.py:FOLDER \\
        --workdir=runs/continued --config.data.sources.documents.paths="('corpus/*.jsonl',)"
    python -m experiments.run --config=experiments/configs/pretrained.py:FOLDER --workdir=runs/continued \\
        --config.data.sources.documents.paths="('corpus/*.jsonl',)"

FOLDER is of Hugging Face transformers: its config.json gives the model, its tokenizer.json the tokenizer. Both commands
take the same overrides. The learning rate is a tenth of the study's peak, warmed up and held, as is usual for going on
with a model that has seen its whole schedule.
"""

import ml_collections

from jaxmoe.config import ConfigError, to_dict


def get_config(folder: str = "") -> ml_collections.ConfigDict:
    """The study of one member whose model is that of the checkpoint in `folder`."""
    from jaxmoe.interop.huggingface import read_model_config

    if not folder:
        raise ConfigError("pretrained.py needs the folder of a checkpoint: --config=.../pretrained.py:FOLDER.")
    config = ml_collections.ConfigDict()
    config.study = {"name": "continued", "title": f"Going on from {folder}", "held_fixed": {}, "varies": ()}
    config.seeds = (0,)
    config.model = to_dict(read_model_config(folder))
    config.data = {
        "tokenizer": f"{folder}/tokenizer.json",
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
