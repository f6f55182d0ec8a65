"""GRPO as a method of the training loop: a step samples responses, rewards them, and updates on them.

Everything random in a step follows from the run's seed and the step's number, the old policy is the parameters at its
beginning, and the reference those that the run started from, so that a run that was stopped goes on bit for bit.

G prompts, n responses to each, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxmoe.accounting import flops_per_token
from jaxmoe.config import ConfigError, RunConfig
from jaxmoe.data import Mixture
from jaxmoe.liveness import beat
from jaxmoe.post_training.advantages import equal_groups, group_advantages
from jaxmoe.post_training.loss import Rows
from jaxmoe.post_training.prompts import Prompt, Prompts
from jaxmoe.post_training.rewards import Rewards, check_reward
from jaxmoe.post_training.rollout import Response, Sampling, respond
from jaxmoe.post_training.update import make_scorer, make_updates
from jaxmoe.processes import numbers_of_first
from jaxmoe.sharding import Partitioning, placed
from jaxmoe.training import StepStoppedError, StopRequest, TrainState, read_start
from jaxmoe.training.errors import BufferOverflowError
from jaxmoe.training.state import model_graph

_Arrays = dict[str, np.ndarray]


def check_grpo_data(run: RunConfig, mixture: Mixture) -> None:
    """Checks that a run's prompts fit, and that its reward can be computed here.

    Raises:
      ConfigError: they do not, or it cannot.
    """
    check_reward(run.grpo.reward)
    Prompts(run, mixture)


class GRPO:
    """The steps of a run with the section `grpo`, for `jaxmoe.training.train`.

    A rollout may take minutes: between its batches the run may be asked to stop, and does the step again later.

    The metrics of a step are those of `jaxmoe.post_training.update.make_updates`, and `reward`, the mean, also by
    source; `equal_groups`, the share of prompts whose responses all have the same reward; `response_tokens_mean`,
    `response_tokens_max` and `truncated_fraction`, the share that met the limit; `entropy`, minus the mean
    log-probability of the sampled tokens, which estimates it without bias for `top_p` = 1; `tokens`, positions of
    prompts and responses; and `prompts_left_out`, how many of the sources' prompts are too long for any step.
    """

    evaluates_start = True
    steps_in_flight = 0

    def __init__(self, run: RunConfig, mixture: Mixture, partitioning: Partitioning | None, stop: StopRequest):
        self._run, self._mixture, self._partitioning, self._stop = run, mixture, partitioning, stop
        self._graph = model_graph(run.model)
        self._rewards: Rewards | None = None
        self._prompts = Prompts(run, mixture)
        self.flops_per_token = flops_per_token(run.model, run.train.sequence_length).training
        self.tokens_per_step = run.tokens_per_step

    def begin(self, step: int, start_step: int | None) -> None:
        """Reads the reference, and checks that it is what the run started from."""
        del step
        run = self._run
        now, *self._reference = read_start(run, self._partitioning)
        if now != start_step:
            raise ConfigError(
                f"start_from={run.start_from} is at step {now} now, and this run started from its step {start_step}: "
                "the reference would be another. Put that checkpoint back, or take another folder for a new start."
            )
        self._score = make_scorer(run.model, run.grpo, self._partitioning)
        self._updates = make_updates(run.model, run.train, run.grpo, len(self._mixture.sources), self._partitioning)
        self._rewards = Rewards(run.grpo.reward)

    def end(self) -> None:
        """Ends the processes that compare answers, and lets the reference go."""
        if self._rewards is not None:
            self._rewards.close()
        self._reference = None

    def position(self) -> Any:
        """Nothing: the step says which prompts are next."""
        return None

    def step(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """One rollout, and the updates on it."""
        run, grpo = self._run, self._run.grpo
        number = int(jax.device_get(state.step))
        prompts = self._prompts.of_step(number)
        of_response = [prompt for prompt in prompts for _ in range(grpo.group_size)]
        sampling = Sampling(
            max_tokens=grpo.max_response_tokens, temperature=grpo.temperature, top_p=grpo.top_p,
            batch_size=grpo.rollout_batch_size, width=self._prompts.longest,
        )  # fmt: skip
        responses = respond(
            self._graph, (state.params, state.others), [prompt.tokens for prompt in of_response],
            self._mixture.tokenizer, sampling, jax.random.fold_in(state.key, number),
            partitioning=self._partitioning, between=self._check_stop,
        )  # fmt: skip
        rewards = self._rewarded(of_response, responses).reshape(-1, grpo.group_size)
        advantages = group_advantages(rewards).reshape(-1)
        arrays = response_rows(of_response, responses, run.train.sequence_length, self._mixture.tokenizer.pad_id)
        old = self._scored(arrays, (state.params, state.others))
        reference = self._scored(arrays, self._reference)
        self._check_stop()
        state, metrics = self._updates(state, self._placed({
            **arrays, "advantages": advantages, "old": old, "reference": reference,
        }))  # fmt: skip
        beat()
        lengths = np.array([len(response.tokens) for response in responses])
        weights = arrays["weights"]
        return state, {
            **metrics,
            "reward": rewards.mean(),
            "source_reward": self._by_source(prompts, rewards.mean(axis=1)),
            "equal_groups": equal_groups(rewards).mean(),
            "response_tokens_mean": lengths.mean(),
            "response_tokens_max": lengths.max(),
            "truncated_fraction": np.mean([not response.finished for response in responses]),
            "entropy": -(old * weights).sum(dtype=np.float64) / weights.sum(dtype=np.float64),
            "tokens": int((arrays["segment_ids"] != 0).sum()),
            "prompts_left_out": sum(self._prompts.left_out.values()),
        }

    def _check_stop(self) -> None:
        self._stop.agree()
        if self._stop.requested is not None:
            raise StepStoppedError

    def _rewarded(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Float[np.ndarray, " n"]:
        """Of the first process, since what a comparison makes of a time limit may differ."""
        tokenizer = self._mixture.tokenizer
        examples = [prompt.example for prompt in prompts]
        return numbers_of_first(
            lambda: self._rewards(examples, [response.text(tokenizer) for response in responses]), (len(prompts),)
        )

    def _scored(self, arrays: _Arrays, variables: Sequence[Any]) -> Float[np.ndarray, "n S"]:
        """Log-probabilities of all targets, by the rows of a micro-batch at a time."""
        run = self._run
        rows = run.grpo.responses_per_update(run.train) // run.train.gradient_accumulation
        parts = []
        for start in range(0, len(arrays["inputs"]), rows):
            self._check_stop()
            beat()
            own = [
                placed(arrays[name][start : start + rows], self._partitioning, "batch", "sequence")
                for name in ("inputs", "targets", "segment_ids")
            ]
            log_probability, overflowed = self._score(*variables, *own)
            if float(overflowed) > 0:
                raise BufferOverflowError(
                    f"{float(overflowed):.0f} expert assignments of sampled responses found no room in buffers of "
                    f"model.moe.expert_buffer_factor={run.model.moe.expert_buffer_factor} times the mean; give a "
                    "larger factor, or None for room for all rows that could come."
                )
            parts.append(np.asarray(log_probability))
        return np.concatenate(parts)

    def _placed(self, arrays: _Arrays) -> Rows:
        """(U, M, B, S) rows over the mesh: each update has its prompts, each micro-batch its part of them."""
        run = self._run
        leading = (run.grpo.updates_per_step, run.train.gradient_accumulation)
        return Rows(**{
            name: placed(
                array.reshape(*leading, -1, *array.shape[1:]), self._partitioning,
                None, None, *("batch", "sequence")[: array.ndim],
            )
            for name, array in arrays.items()
        })  # fmt: skip

    def _by_source(self, prompts: Sequence[Prompt], rewards: Float[np.ndarray, " G"]) -> Float[np.ndarray, " sources"]:
        """Mean reward of each source's prompts; NaN for a source without one."""
        sources, count = np.array([prompt.source for prompt in prompts]), len(self._mixture.sources)
        totals = np.bincount(sources, rewards, count)
        numbers = np.bincount(sources, minlength=count)
        return np.where(numbers > 0, totals / np.maximum(numbers, 1), np.nan)


def response_rows(
    prompts: Sequence[Prompt], responses: Sequence[Response], length: int, pad_id: int
) -> _Arrays:
    """Each prompt with its response as a row: `inputs`, `targets`, `segment_ids` and `weights`, as in `Rows`.

    Args:
      prompts: of each response.
      responses: to them.
      length: S.
      pad_id: on the right of what is shorter.
    """
    inputs = np.full((len(prompts), length), pad_id, np.int32)
    targets, segment_ids = inputs.copy(), np.zeros_like(inputs)
    weights = np.zeros(inputs.shape, np.float32)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens = np.concatenate([prompt.tokens, response.tokens])
        end = len(tokens) - 1
        inputs[row, :end], targets[row, :end] = tokens[:-1], tokens[1:]
        segment_ids[row, :end] = 1
        weights[row, len(prompt.tokens) - 1 : end] = 1.0
    return {"inputs": inputs, "targets": targets, "segment_ids": segment_ids, "weights": weights}
