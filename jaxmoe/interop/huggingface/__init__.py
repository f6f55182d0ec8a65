"""Checkpoints of transformers: read into a decoder, and written from one."""

from jaxmoe.interop.huggingface.architectures import ARCHITECTURES
from jaxmoe.interop.huggingface.config_json import model_config_from
from jaxmoe.interop.huggingface.pretrained import (
    PretrainedModel,
    load_pretrained,
    read_model_config,
    save_pretrained,
)
from jaxmoe.interop.huggingface.runs import export_run, import_run

__all__ = [
    "ARCHITECTURES",
    "PretrainedModel",
    "export_run",
    "import_run",
    "load_pretrained",
    "model_config_from",
    "read_model_config",
    "save_pretrained",
]
