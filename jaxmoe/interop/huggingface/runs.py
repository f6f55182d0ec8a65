"""A folder of transformers as the start of a run, and a run as a folder of transformers."""

from __future__ import annotations

import json
import os
from typing import Any

from etils import epath

from jaxmoe.config import ConfigError, ModelConfig, RunConfig, from_dict
from jaxmoe.data import load_tokenizer
from jaxmoe.interop.huggingface.pretrained import (
    copy_tokenizer_files,
    read_model_config,
    read_state,
    save_pretrained,
)
from jaxmoe.sharding import partitioning_of_run
from jaxmoe.storage import as_path, read_json, write_json
from jaxmoe.training import CONFIG_FILE, abstract_state, read_parameters, state_with_parameters, write_start


def import_run(
    checkpoint: epath.PathLike,
    run: RunConfig,
    directory: epath.PathLike,
    *,
    cache_dir: str | os.PathLike | None = None,
) -> None:
    """Makes a run directory that starts from a folder of transformers; training and evaluation go on from it.

    Parameters are read into their places on the run's mesh, in float32.

    Args:
      checkpoint: the folder.
      run: the configuration of the run; its model must be the checkpoint's.
      directory: of the run, without checkpoints.
      cache_dir: where tokenized text is kept if the configuration does not say.

    Raises:
      ConfigError: the models differ (each setting is listed), the checkpoint cannot be read, or the directory is in
        use.
    """
    folder = as_path(checkpoint)
    require_same_model(run.model, read_model_config(folder), folder)
    partitioning = partitioning_of_run(run)
    _, wanted = abstract_state(run, partitioning)
    params = read_state(folder, run.model, wanted.params, partitioning=partitioning)
    state = state_with_parameters(run, params, partitioning)
    write_start(run, directory, state, started_from=str(folder), cache_dir=cache_dir)


def export_run(
    directory: epath.PathLike,
    output: epath.PathLike,
    *,
    architecture: str | None = None,
    dtype: str | None = None,
) -> int:
    """Writes the newest checkpoint of a run as a folder that transformers loads, with the run's tokenizer.

    Args:
      directory: of the run.
      output: the folder to write.
      architecture, dtype: as in `save_pretrained`.

    Returns:
      The step of the checkpoint.

    Raises:
      ConfigError: it is no run directory, has no checkpoint, or transformers has no class for its model.
    """
    directory = as_path(directory)
    if not (directory / CONFIG_FILE).exists():
        raise ConfigError(f"{directory} has no {CONFIG_FILE}; give the folder of a run, such as WORKDIR/MEMBER.")
    run = from_dict(RunConfig, read_json(directory / CONFIG_FILE))
    step, model = read_parameters(run, directory)
    output = as_path(output)
    settings = write_tokenizer(run.data.tokenizer, output)
    save_pretrained(model, output, architecture=architecture, dtype=dtype, settings=settings)
    return step


def require_same_model(model: ModelConfig, checkpoint: ModelConfig, folder: epath.PathLike) -> None:
    """Checks that a model computes what a checkpoint's does; how it is initialized and trained may differ.

    Raises:
      ConfigError: it does not; every setting that differs is listed.
    """
    own, theirs = _function(model), _function(checkpoint)
    names = [*own, *(name for name in theirs if name not in own)]
    lines = [
        f"  model.{name}: {own.get(name)!r} in the configuration, {theirs.get(name)!r} in the checkpoint"
        for name in names
        if own.get(name) != theirs.get(name)
    ]
    if lines:
        raise ConfigError("\n".join([f"{folder} is another model:", *lines]))


def _function(model: ModelConfig) -> dict[str, Any]:
    """What decides which function of its parameters a model is, defaults resolved."""
    kinds = model.layer_kinds
    settings: dict[str, Any] = {
        "vocab_size": model.vocab_size, "width": model.width, "num_heads": model.num_heads,
        "num_kv_heads": model.kv_heads, "head_dim": model.head_size, "tie_embeddings": model.tie_embeddings,
        "rope_theta": model.rope_theta, "norm_eps": model.norm_eps, "qk_norm": model.qk_norm, "layers": kinds,
    }  # fmt: skip
    if "dense" in kinds:
        settings["dense_hidden"] = model.dense_hidden_size
    if "moe" in kinds:
        moe = model.moe
        settings |= {
            f"moe.{name}": getattr(moe, name)
            for name in ("num_experts", "experts_per_token", "expert_hidden", "shared_expert_hidden", "routed_scaling")
        }
        settings["moe.renormalize"] = moe.renormalize or moe.score_order == "topk_then_softmax"
    return settings


def write_tokenizer(spec: str, folder: epath.Path) -> dict[str, Any]:
    """Copies a tokenizer file under the name that transformers looks for, and says what its special tokens are.

    `bytes` and `symbols` have no file, and transformers nothing like them: of them there are the ids only.

    Args:
      spec: `DataConfig.tokenizer`.
      folder: to write to; made if it is not there.

    Returns:
      The ids of the special tokens, for config.json.
    """
    tokenizer = load_tokenizer(spec)
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if spec.endswith(".model"):
        (folder / "tokenizer.model").write_bytes(as_path(spec).read_bytes())
    if spec.endswith(".json"):
        copy_tokenizer_files(as_path(spec).parent, folder)
        content = as_path(spec).read_bytes()
        (folder / "tokenizer.json").write_bytes(content)
        if not (folder / "tokenizer_config.json").exists():
            write_json(folder / "tokenizer_config.json", _tokenizer_config(json.loads(content), ids))
    return ids


def _tokenizer_config(content: dict[str, Any], ids: dict[str, int | None]) -> dict[str, Any]:
    """What transformers needs beside a tokenizers file: its class, and the names of the special tokens."""
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        names = {number: token for token, number in vocabulary.items()}
    else:  # unigram: pieces and their scores, in the order of their ids
        names = {number: piece for number, (piece, _) in enumerate(vocabulary)}
    names |= {token["id"]: token["content"] for token in content.get("added_tokens", ())}
    special = {name.removesuffix("_id"): names[number] for name, number in ids.items() if number is not None}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **special}
