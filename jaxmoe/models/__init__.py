"""The decoder, its loss, generation, and published configurations by name."""

from jaxmoe.models.decoder import Decoder, DecoderOutput, init_cache
from jaxmoe.models.generate import Decoding, continue_decoding, dropless, generate, start_decoding
from jaxmoe.models.loss import language_model_loss, token_nll
from jaxmoe.models.presets import preset, presets

__all__ = [
    "Decoder",
    "DecoderOutput",
    "Decoding",
    "continue_decoding",
    "dropless",
    "generate",
    "init_cache",
    "language_model_loss",
    "preset",
    "presets",
    "start_decoding",
    "token_nll",
]
