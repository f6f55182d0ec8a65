"""`load_pretrained` and `save_pretrained`: a folder of transformers as a model, and a model as such a folder.

B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.config import MESH_AXES, ConfigError, MeshConfig, ModelConfig
from jaxmoe.interop.huggingface.config_json import (
    architecture_named,
    config_values,
    fitting_architecture,
    model_config_from,
)
from jaxmoe.interop.huggingface.layout import Path, parts_of
from jaxmoe.interop.huggingface.transfer import read_parameters, tensor_blocks
from jaxmoe.interop.safetensors_files import DTYPES, SHARD_BYTES, TensorFiles, TensorToWrite, write_tensors
from jaxmoe.layers.parameters import dtype_name
from jaxmoe.models import Decoder
from jaxmoe.sharding import Partitioning, make_partitioning, use_partitioning
from jaxmoe.storage import as_path, read_json, write_json

CONFIG_FILE = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files beside a model that are copied as they are."""
_DTYPE_CODES = {"float32": "F32", "bfloat16": "BF16"}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a model was read from.

    Attributes:
      folder: of transformers.
      config: its config.json, as text.
    """

    folder: str
    config: str


class PretrainedModel(nnx.Module):
    """A decoder that is called like a function from tokens to logits.

    Attributes:
      decoder: for `jaxmoe.models.generate`, training and evaluation.
      config: the decoder's `ModelConfig`.
      origin: where it was read from.
      partitioning: the mesh that its parameters are spread over; None for one device.
    """

    def __init__(self, decoder: Decoder, origin: Origin, partitioning: Partitioning | None = None):
        self.decoder = decoder
        self.partitioning = partitioning
        self.config: ModelConfig = decoder.config
        self.origin = origin

    def __call__(
        self, tokens: Int[Array, "B S"], attention_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S V"]:
        """Next-token logits of every position, float32; compiled once for each shape.

        Args:
          tokens: each in [0, V).
          attention_mask: zero on padding, left or right, whose logits mean nothing; None for no padding.
        """
        graph, state = nnx.split(self.decoder)
        segments = None if attention_mask is None else jnp.asarray(attention_mask).astype(bool).astype(jnp.int32)
        return _logits(graph, self.partitioning, state, jnp.asarray(tokens), segments)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(
    graph: Any, partitioning: Partitioning | None, state: Any, tokens: Array, segment_ids: Array | None
) -> Array:
    with use_partitioning(partitioning):
        return nnx.merge(graph, state)(tokens, segment_ids=segment_ids).logits


def read_model_config(path: epath.PathLike, *, dtype: str = "float32") -> ModelConfig:
    """The `ModelConfig` of a folder of transformers.

    Args:
      path: of the folder.
      dtype: that the model computes in.

    Raises:
      ConfigError: there is no config.json, or it is of a model that is not implemented.
    """
    return model_config_from(_read_config(as_path(path)), compute_dtype=dtype)


def load_pretrained(
    path: epath.PathLike, *, mesh: Mesh | MeshConfig | None = None, dtype: str = "float32"
) -> PretrainedModel:
    """Reads a model that transformers wrote, one block of a tensor at a time.

    Args:
      path: of the folder: config.json and safetensors files, in the layout of published checkpoints (three matrices
        for each expert) or with the experts fused.
      mesh: to spread the model over: a `MeshConfig`, or a mesh whose axes are some of `jaxmoe.config.MESH_AXES`; each
        device gets its part of every parameter, none the whole. None for one device.
      dtype: in which parameters are held and matrices multiplied, `float32` or `bfloat16`; the router computes in
        float32 either way.

    Returns:
      The model. Logits equal those of transformers up to rounding.

    Raises:
      ConfigError: another architecture, a setting that is not implemented, a tensor that is missing or left over, or
        a file that is damaged; the message names it.
    """
    folder = as_path(path)
    dtype = dtype_name(dtype)
    if dtype not in _DTYPE_CODES:
        raise ConfigError(f"dtype={dtype!r}; choose one of {', '.join(map(repr, _DTYPE_CODES))}.")
    values = _read_config(folder)
    config = model_config_from(values, compute_dtype=dtype)
    partitioning = _partitioning(mesh)
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    read = read_state(folder, config, state, dtype=dtype, partitioning=partitioning)
    return PretrainedModel(nnx.merge(graph, read), Origin(str(folder), json.dumps(values)), partitioning)


def read_state(
    path: epath.PathLike,
    config: ModelConfig,
    state: nnx.State,
    *,
    dtype: str = "float32",
    partitioning: Partitioning | None = None,
) -> nnx.State:
    """The parameters of a decoder, read from a folder of transformers.

    Args:
      path: of the folder.
      config: of the decoder; of the shapes that config.json says.
      state: of the decoder, arrays or shapes; its structure is kept.
      dtype: of the parameters.
      partitioning: where they go; None for one device.

    Raises:
      ConfigError: a tensor that is missing, left over or of another shape, or a file that is damaged.
    """
    folder = as_path(path)
    architecture = architecture_named(_read_config(folder).get("model_type"))
    flat = nnx.to_flat_state(state)
    wanted: dict[Path, jax.ShapeDtypeStruct] = {}
    for name, leaf in flat:
        if partitioning is None:
            sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        else:
            sharding = partitioning.sharding(leaf.get_metadata().get("logical_axes", ()), leaf.shape)
        wanted[name] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)
    with TensorFiles(folder) as files:
        fused = any(name.endswith(architecture.names.fused_gate_up) for name in files.tensors)
        parts = parts_of(config, architecture, fused_experts=fused)
        arrays = read_parameters(files, parts, wanted)
    return nnx.from_flat_state([(name, leaf.replace(arrays[name])) for name, leaf in flat])


def _partitioning(mesh: Mesh | MeshConfig | None) -> Partitioning | None:
    if mesh is None:
        return None
    if isinstance(mesh, MeshConfig):
        return make_partitioning(mesh)
    unknown = [axis for axis in mesh.axis_names if axis not in MESH_AXES]
    if unknown:
        raise ConfigError(f"mesh has the axes {', '.join(mesh.axis_names)}; choose of {', '.join(MESH_AXES)}.")
    order = sorted(range(mesh.devices.ndim), key=lambda axis: MESH_AXES.index(mesh.axis_names[axis]))
    shape = [mesh.shape.get(axis, 1) for axis in MESH_AXES]
    return Partitioning(Mesh(mesh.devices.transpose(order).reshape(shape), MESH_AXES))


def save_pretrained(
    model: PretrainedModel | Decoder,
    path: epath.PathLike,
    *,
    architecture: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model as a folder that transformers, 4 or 5, loads; one block of a tensor at a time.

    Tokenizer files come from the folder that the model was read from, if it was. What transformers has no word for is
    left out: capacity limits, document masks, the precision of the router.

    Args:
      model: from `load_pretrained`, or any `Decoder`.
      path: of the folder; made if it is not there. A model that it holds is replaced.
      architecture: its model_type; None: the one it was read as, or else the first that fits.
      dtype: of the tensors, `float32` or `bfloat16`; None: as the parameters are held, so that nothing is rounded.
      shard_bytes: of one file, at most; more files get an index.
      settings: more keys for config.json, such as the ids of special tokens.

    Raises:
      ConfigError: transformers has no class for such a model, or not the one asked for; or other processes hold
        parts of the model.
    """
    origin = model.origin if isinstance(model, PretrainedModel) else None
    decoder = model.decoder if isinstance(model, PretrainedModel) else model
    original = None if origin is None else json.loads(origin.config)
    if architecture is None and original is not None:
        architecture = original["model_type"]
    fitting = fitting_architecture(decoder.config, architecture)
    flat = dict(nnx.to_flat_state(nnx.state(decoder)))
    arrays = {path: leaf[...] for path, leaf in flat.items()}
    if not all(array.is_fully_addressable for array in arrays.values()):
        raise ConfigError("save_pretrained writes from one process, and parts of this model are held by others.")
    dtype = dtype_name(arrays[("embedding", "table")].dtype if dtype is None else dtype)
    if dtype not in _DTYPE_CODES:
        raise ConfigError(f"dtype={dtype!r}; choose one of {', '.join(map(repr, _DTYPE_CODES))}.")
    folder = as_path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)  # written last: with it the folder is complete
    code = _DTYPE_CODES[dtype]
    tensors = [
        TensorToWrite(
            part.tensor, part.shape, functools.partial(tensor_blocks, part, arrays[part.parameter], DTYPES[code])
        )
        for part in parts_of(decoder.config, fitting)
    ]
    write_tensors(folder, tensors, code, shard_bytes=shard_bytes)
    if origin is not None:
        copy_tokenizer_files(as_path(origin.folder), folder)
    values = config_values(decoder.config, fitting, dtype, original)
    write_json(folder / CONFIG_FILE, values | dict(settings or {}))


def copy_tokenizer_files(source: epath.Path, target: epath.Path) -> list[str]:
    """Copies what there is of `TOKENIZER_FILES`, and of the modelling code that config.json may name."""
    names = [name for name in TOKENIZER_FILES if (source / name).exists()]
    names += [path.name for path in source.glob("*.py")] if source.exists() else []
    if source != target:
        for name in names:
            (target / name).write_bytes((source / name).read_bytes())
    return names


def _read_config(folder: epath.Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.exists():
        raise ConfigError(f"{folder} has no {CONFIG_FILE}; give the folder of a checkpoint of transformers.")
    try:
        values = read_json(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a section of keys but {values!r:.100}.")
    return values
