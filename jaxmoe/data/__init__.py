"""Data: tasks, corpora, tokenizers, and the mixture whose batches are addressed by step."""

from jaxmoe.data.answers import extract_answer
from jaxmoe.data.build import build_source
from jaxmoe.data.errors import DataError
from jaxmoe.data.layouts import Batch
from jaxmoe.data.mixture import Mixture, SourceAccount, content_changes, describe_accounting
from jaxmoe.data.source import Example, Source
from jaxmoe.data.tokenizers import Tokenizer, encode_examples, load_tokenizer, require_vocabulary, tokenizer_of

__all__ = [
    "Batch",
    "DataError",
    "Example",
    "Mixture",
    "Source",
    "SourceAccount",
    "Tokenizer",
    "build_source",
    "content_changes",
    "describe_accounting",
    "encode_examples",
    "extract_answer",
    "load_tokenizer",
    "require_vocabulary",
    "tokenizer_of",
]
