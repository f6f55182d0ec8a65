"""Which tensor of a checkpoint holds which part of which parameter of a `Decoder`.

D width, E experts, F hidden width, V vocabulary, H query heads, M key and value heads, R = H / M, h head width.
transformers keeps matrices as (output, input), ours are (input, output); gate and up are one parameter here, queries,
keys and values are another, and layers that are scanned share theirs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from jaxmoe.config import ModelConfig
from jaxmoe.interop.huggingface.architectures import Architecture
from jaxmoe.models.block import repetitions

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor, and the part of a parameter that it holds.

    Attributes:
      tensor: its name in the checkpoint.
      shape: its shape there.
      view: `shape` with axes split; the first axis is the one along which it is read in blocks.
      order: axes of `view` as the parameter has them.
      parameter: path of the parameter in the decoder's state.
      place: for each axis of the parameter where the tensor goes: an index, or first and size along it.
    """

    tensor: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    order: tuple[int, ...]
    parameter: Path
    place: tuple[int | tuple[int, int], ...]

    @property
    def box(self) -> tuple[tuple[int, int], ...]:
        """First and size along every axis of the parameter."""
        return tuple((entry, 1) if isinstance(entry, int) else entry for entry in self.place)

    @property
    def axes(self) -> tuple[int, ...]:
        """For each axis of `view` the axis of the parameter that it is."""
        filled = [axis for axis, entry in enumerate(self.place) if not isinstance(entry, int)]
        return tuple(filled[self.order.index(axis)] for axis in range(len(self.view)))

    def block(self, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        """`box` of the tensor's part from `start` to before `stop` along the first axis of `view`."""
        box = list(self.box)
        first, _ = box[self.axes[0]]
        box[self.axes[0]] = (first + start, stop - start)
        return tuple(box)


def parts_of(config: ModelConfig, architecture: Architecture, *, fused_experts: bool = False) -> list[Part]:
    """Every tensor of a checkpoint, in the order in which they are written.

    Together they hold each number of each parameter exactly once.

    Args:
      config: of the model.
      architecture: whose names they have.
      fused_experts: all experts of a layer in two tensors, as transformers 5 holds them in memory; False: three
        matrices for each expert, as published checkpoints have them.
    """
    parts = [_whole("model.embed_tokens.weight", (config.vocab_size, config.width), ("embedding", "table"))]
    for layer, (kind, block, repeat) in enumerate(_blocks(config)):
        prefix = f"model.layers.{layer}."
        parts += _attention(config, prefix, block, repeat)
        if kind == "dense":
            parts += _gated(prefix + "mlp", (*block, "mlp"), (repeat,), config.width, config.dense_hidden_size)
        else:
            parts += _routed(config, architecture, prefix, (*block, "mlp"), repeat, fused_experts)
        parts.append(_vector(prefix + "input_layernorm.weight", config.width, (*block, "attention_norm"), repeat))
        parts.append(_vector(prefix + "post_attention_layernorm.weight", config.width, (*block, "mlp_norm"), repeat))
    parts.append(_whole("model.norm.weight", (config.width,), ("final_norm", "scale")))
    if not config.tie_embeddings:
        shape = (config.vocab_size, config.width)
        parts.append(Part("lm_head.weight", shape, shape, (1, 0), ("output",), _all(shape[::-1])))
    return parts


def _blocks(config: ModelConfig) -> Iterator[tuple[str, Path, int]]:
    """Kind and path of every layer's block, and its place along the leading axis of its parameters."""
    for stack, repetition in enumerate(repetitions(config)):
        for repeat in range(repetition.repeats):
            for number, kind in enumerate(repetition.kinds):
                yield kind, ("stacks", stack, "blocks", number), repeat


def _all(shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((0, size) for size in shape)


def _whole(tensor: str, shape: tuple[int, ...], parameter: Path) -> Part:
    return Part(tensor, shape, shape, tuple(range(len(shape))), parameter, _all(shape))


def _vector(tensor: str, size: int, norm: Path, repeat: int, name: str = "scale") -> Part:
    return Part(tensor, (size,), (size,), (0,), (*norm, name), (repeat, (0, size)))


def _attention(config: ModelConfig, prefix: str, block: Path, repeat: int) -> Iterator[Part]:
    width, size, heads, keys = config.width, config.head_size, config.num_heads, config.kv_heads
    per_key, prefix, path = heads // keys, prefix + "self_attn.", (*block, "attention")
    fused = (*path, "query_key_value")
    every_key, every_width, whole_head = (0, keys), (0, width), (0, size)
    yield Part(
        prefix + "q_proj.weight", (heads * size, width), (keys, per_key, size, width), (3, 0, 1, 2),
        fused, (repeat, every_width, every_key, (0, per_key), whole_head),
    )  # fmt: skip
    for name, slot in (("k_proj", per_key), ("v_proj", per_key + 1)):
        yield Part(
            f"{prefix}{name}.weight", (keys * size, width), (keys, size, width), (2, 0, 1),
            fused, (repeat, every_width, every_key, slot, whole_head),
        )  # fmt: skip
    yield Part(
        prefix + "o_proj.weight", (width, heads * size), (width, heads, size), (1, 2, 0),
        (*path, "output"), (repeat, (0, heads), whole_head, every_width),
    )  # fmt: skip
    if config.qk_norm != "none":
        query, key = (size, size) if config.qk_norm == "head" else (heads * size, keys * size)
        yield _vector(prefix + "q_norm.weight", query, path, repeat, "query_scale")
        yield _vector(prefix + "k_norm.weight", key, path, repeat, "key_scale")


def _gated(
    folder: str, mlp: Path, index: tuple[int, ...], width: int, hidden: int, names=("gate_proj", "up_proj", "down_proj")
) -> Iterator[Part]:
    """The three matrices of a SwiGLU MLP at an index of its parameters' leading axes."""
    gate, up, down = names
    for name, first in ((gate, 0), (up, hidden)):
        shape = (hidden, width)
        place = (*index, (0, width), (first, hidden))
        yield Part(f"{folder}.{name}.weight", shape, shape, (1, 0), (*mlp, "gate_up"), place)
    shape = (width, hidden)
    yield Part(f"{folder}.{down}.weight", shape, shape, (1, 0), (*mlp, "down"), (*index, (0, hidden), (0, width)))


def _routed(
    config: ModelConfig, architecture: Architecture, prefix: str, mlp: Path, repeat: int, fused: bool
) -> Iterator[Part]:
    names, moe, width = architecture.names, config.moe, config.width
    experts, hidden = moe.num_experts, moe.expert_hidden
    shape = (experts, width)
    router = names.fused_router if fused else names.router
    yield Part(prefix + router, shape, shape, (1, 0), (*mlp, "router", "weight"), (repeat, *_all(shape[::-1])))
    if fused:
        for name, out, into, parameter in (
            (names.fused_gate_up, 2 * hidden, width, "gate_up"), (names.fused_down, width, hidden, "down"),
        ):  # fmt: skip
            shape = (experts, out, into)
            place = (repeat, *_all((experts, into, out)))
            yield Part(prefix + name, shape, shape, (0, 2, 1), (*mlp, parameter), place)
    else:
        for expert in range(experts):
            folder = prefix + names.expert.format(expert=expert)
            yield from _gated(folder, mlp, (repeat, expert), width, hidden, (names.gate, names.up, names.down))
    if moe.shared_expert_hidden:
        shared = (*mlp, "shared_expert")
        yield from _gated(prefix + names.shared, shared, (repeat,), width, moe.shared_expert_hidden)


def block_rows(part: Part, itemsize: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Starts and ends along the first axis of a part's view, so that no block is much larger than block_bytes."""
    rows = part.view[0]
    per_row = math.prod(part.view[1:]) * itemsize
    step = max(1, block_bytes // max(per_row, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
