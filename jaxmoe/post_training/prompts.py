"""The prompts of a run: those of its sources that leave room for a response, in an order known for any step."""

from __future__ import annotations

import dataclasses
import functools
import logging

import numpy as np
from jaxtyping import Int

from jaxmoe.config import ConfigError, RunConfig
from jaxmoe.data import Example, Mixture, Source, Tokenizer
from jaxmoe.data.seeding import generator

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt with its tokens, and what a response to it is compared with.

    Attributes:
      source: number of its source in the mixture.
      example: prompt and true answer.
      tokens: of the prompt, without special tokens, as in training rows.
    """

    source: int
    example: Example
    tokens: Int[np.ndarray, " p"]


class Prompts:
    """The prompts of the training splits, by step.

    A source has its share of every batch by its weight, as in pre-training. Its prompts come in an order of their own
    in each epoch, drawn from the seed, its name and the epoch. Reasoning problems have their correct solutions,
    whatever was corrupted in pre-training.

    Args:
      run: with the section `grpo`.
      mixture: of the run.

    Attributes:
      longest: tokens of the longest prompt.
      kept, left_out: by source, how many prompts fit `max_prompt_tokens` and how many do not.

    Raises:
      ConfigError: a source has no prompt that fits.
    """

    def __init__(self, run: RunConfig, mixture: Mixture):
        self._seed, self._mixture = run.seed, mixture
        self._prompts: dict[int, list[Prompt]] = {}
        self.kept: dict[str, int] = {}
        self.left_out: dict[str, int] = {}
        for source in mixture.sources:
            if source.config.weight > 0:
                self._read(source, run.grpo.max_prompt_tokens, mixture.tokenizer)
        self.longest = max(len(prompt.tokens) for prompts in self._prompts.values() for prompt in prompts)
        self._order = functools.lru_cache(maxsize=4 * len(self._prompts))(self._order_of)

    def _read(self, source: Source, longest: int, tokenizer: Tokenizer) -> None:
        split = "train_clean" if source.example_count("train_clean") else "train"
        prompts = prompts_of(source, split, tokenizer)
        fitting = [prompt for prompt in prompts if 1 <= len(prompt.tokens) <= longest]
        if not fitting:
            shortest = min((len(prompt.tokens) for prompt in prompts), default=0)
            raise ConfigError(
                f"source {source.name!r}: none of its {len(prompts)} prompts has 1..{longest} tokens "
                f"(grpo.max_prompt_tokens); the shortest has {shortest}."
            )
        self._prompts[source.index] = fitting
        self.kept[source.name], self.left_out[source.name] = len(fitting), len(prompts) - len(fitting)
        if self.left_out[source.name]:
            logger.warning(
                "source %r: %d of %d prompts have more than grpo.max_prompt_tokens=%d tokens, or none: left out",
                source.name, self.left_out[source.name], len(prompts), longest,
            )  # fmt: skip

    def of_step(self, step: int) -> list[Prompt]:
        """The prompts of 0-based rollout step `step`."""
        chosen = []
        for index, number in zip(*map(np.ndarray.tolist, self._mixture.places(step)), strict=True):
            epoch, place = divmod(number, len(self._prompts[index]))
            chosen.append(self._prompts[index][self._order(index, epoch)[place]])
        return chosen

    def _order_of(self, index: int, epoch: int) -> Int[np.ndarray, " prompts"]:
        name = self._mixture.sources[index].name
        return generator(self._seed, name, "prompts", epoch).permutation(len(self._prompts[index]))


def prompts_of(source: Source, split: str, tokenizer: Tokenizer, limit: int | None = None) -> list[Prompt]:
    """Prompts of a split, at most `limit`, of any length; always the same ones."""
    examples = source.examples(split, limit)
    tokens = tokenizer.encode_arrays([example.prompt for example in examples])
    return [Prompt(source.index, example, ids) for example, ids in zip(examples, tokens, strict=True)]
