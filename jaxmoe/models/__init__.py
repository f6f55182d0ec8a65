"""The decoder, its loss, and generation."""

from jaxmoe.models.decoder import Decoder as Decoder
from jaxmoe.models.decoder import DecoderOutput as DecoderOutput
from jaxmoe.models.decoder import init_cache as init_cache
from jaxmoe.models.generate import dropless as dropless
from jaxmoe.models.generate import generate as generate
from jaxmoe.models.loss import language_model_loss as language_model_loss
from jaxmoe.models.loss import token_nll as token_nll
