"""The decoder, its loss, and generation."""

from jaxmoe.models.decoder import Decoder, DecoderOutput, init_cache
from jaxmoe.models.generate import dropless, generate
from jaxmoe.models.loss import language_model_loss, token_nll

__all__ = [
    "Decoder",
    "DecoderOutput",
    "dropless",
    "generate",
    "init_cache",
    "language_model_loss",
    "token_nll",
]
