"""The decoder-only Transformer of the study: embedding, blocks under scan, final norm, output head.

B batch, S sequence, D width, V vocabulary, E experts, L layers.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmoe.config import ModelConfig
from jaxmoe.layers.attention import KeyValueCache
from jaxmoe.layers.embedding import Embedding
from jaxmoe.layers.norm import RMSNorm
from jaxmoe.layers.parameters import normal_parameter
from jaxmoe.layers.rope import rope_angles
from jaxmoe.layers.statistics import RouterStatistics
from jaxmoe.models.block import TokenContext, build_stacks, repetitions
from jaxmoe.sharding import constrain

Cache = list[list[KeyValueCache]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderOutput:
    """What a forward pass gives.

    Attributes:
      logits: float32.
      router: statistics of the MoE layers, leading axis one entry each; None if every layer is dense.
    """

    logits: Float[Array, "B S V"]
    router: RouterStatistics | None


def document_positions(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Position of every token within its document: 0 where the segment number changes."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    changed = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(changed, index, 0), axis=1)


class Decoder(nnx.Module):
    """Pre-norm decoder; see `jaxmoe.config.ModelConfig` for every choice.

    All parameters are float32 `nnx.Param`; those of the blocks carry a leading axis over the layers of a scan.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(
            config.vocab_size, config.width, init_std=config.init_std, compute_dtype=config.compute_dtype, rngs=rngs
        )
        self.stacks = nnx.List(build_stacks(config, rngs=rngs))
        self.final_norm = RMSNorm(config.width, epsilon=config.norm_eps)
        if not config.tie_embeddings:
            self.output = normal_parameter(
                rngs, (config.width, config.vocab_size), config.init_std, axes=("width", "vocabulary")
            )

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        *,
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> DecoderOutput:
        """Next-token logits of every position.

        Args:
          tokens: each in [0, V).
          positions: for the rotary embedding; None counts from 0 in every row, or in every document with
            config.document_mask.
          segment_ids: number of the document each token belongs to, 0 for padding. Padding is neither attended
            nor routed; documents see each other unless config.document_mask.
        """
        hidden, router = self.hidden(tokens, positions=positions, segment_ids=segment_ids)
        return DecoderOutput(logits=self.head(hidden), router=router)

    def hidden(
        self,
        tokens: Int[Array, "B S"],
        *,
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S D"], RouterStatistics | None]:
        """The normalized final hidden states, and the routers' statistics. Arguments as in `__call__`."""
        groups = mask = None
        if segment_ids is not None:
            mask = segment_ids != 0
            groups = segment_ids if self.config.document_mask else mask.astype(jnp.int32)
        if positions is None:
            restart = self.config.document_mask and segment_ids is not None
            positions = document_positions(segment_ids) if restart else jnp.arange(tokens.shape[1])[None]
        cosine, sine = rope_angles(positions, self.config.head_size, self.config.rope_theta)
        context = TokenContext(cosine=cosine, sine=sine, groups=groups, mask=mask)
        x, router, _ = self._run(tokens, context, None)
        return self.final_norm(x), router

    def head(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits of final hidden states, float32."""
        weight = self.head_weight.astype(self.config.compute_dtype)
        return jnp.matmul(hidden, weight, preferred_element_type=jnp.float32)

    @property
    def head_weight(self) -> Float[Array, "D V"]:
        """The output matrix, float32; the transposed embedding if tied."""
        return self.embedding.table[...].T if self.config.tie_embeddings else self.output[...]

    def prefill(
        self, tokens: Int[Array, "B P"], lengths: Int[Array, " B"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Reads right-padded prompts into the cache and returns the logits after each prompt's last token.

        Args:
          tokens: prompts, right-padded.
          lengths: tokens of each prompt, at least 1.
          cache: of `init_cache`, at least P long.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden, cache = self._cached(tokens, positions, positions < lengths[:, None], cache)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.head(last), cache

    def decode_step(
        self, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Puts one token of each row at its position and returns the logits after it."""
        hidden, cache = self._cached(tokens[:, None], positions[:, None].astype(jnp.int32), None, cache)
        return self.head(hidden[:, 0]), cache

    def _cached(self, tokens, positions, mask, cache):
        cosine, sine = rope_angles(positions, self.config.head_size, self.config.rope_theta)
        context = TokenContext(cosine=cosine, sine=sine, mask=mask, positions=positions)
        x, _, cache = self._run(tokens, context, cache)
        return self.final_norm(x), cache

    def _run(
        self, tokens: Int[Array, "B S"], context: TokenContext, cache: Cache | None
    ) -> tuple[Float[Array, "B S D"], RouterStatistics | None, Cache | None]:
        """Embedding and blocks, with or without a cache."""
        x = constrain(self.embedding(tokens), "batch", "sequence", None)
        routed, written = [], []
        for index, stack in enumerate(self.stacks):
            x, statistics, caches = stack(x, context, None if cache is None else cache[index])
            routed += statistics
            written.append(caches)
        router = jax.tree.map(lambda *parts: jnp.concatenate(parts), *routed) if routed else None
        return x, router, None if cache is None else written


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache for `batch` rows of at most `length` tokens, in compute_dtype.

    One `KeyValueCache` for each kind of layer in each of the decoder's stacks.
    """

    def empty(repeats: int) -> KeyValueCache:
        shape = (repeats, batch, config.kv_heads, length, config.head_size)
        return KeyValueCache(jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype))

    return [[empty(repetition.repeats) for _ in repetition.kinds] for repetition in repetitions(config)]
