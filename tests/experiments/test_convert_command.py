"""The commands that exchange models: import, train on, export, and answer questions."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx

from experiments import multiple_choice
from jaxmoe.config import ConfigError, ModelConfig, MoEConfig, RunConfig, from_dict, to_dict
from jaxmoe.data.tokenizer_files import train_tokenizer
from jaxmoe.evaluation import checkpoint_context
from jaxmoe.interop.huggingface import export_run, import_run, load_pretrained, save_pretrained
from jaxmoe.models import Decoder
from jaxmoe.scaling.study import Study
from jaxmoe.training import train

CONFIG = ModelConfig(
    vocab_size=320, width=16, num_layers=2, num_heads=2, max_sequence_length=64, init_std=0.1,
    moe=MoEConfig(num_experts=4, experts_per_token=2, expert_hidden=8),
)  # fmt: skip


TRAIN = {"steps": 2, "batch_size": 2, "sequence_length": 32, "warmup_steps": 0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder as transformers would have it, with a tokenizer; and a corpus beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_pretrained(nnx.jit(lambda: Decoder(CONFIG, rngs=nnx.Rngs(3)))(), folder)
    text = "the quick brown fox jumps over the lazy dog. " * 40
    (folder / "tokenizer.json").write_bytes(train_tokenizer([text], 320))
    (folder / "corpus.txt").write_text(text * 4)
    return folder


@pytest.fixture(scope="module")
def run(checkpoint) -> RunConfig:
    """The experiment file for going on with a checkpoint, made small."""
    from experiments.configs import pretrained

    config = pretrained.get_config(str(checkpoint))
    config.data.sources.documents.paths = (str(checkpoint / "corpus.txt"),)
    config.data.sources.documents.test_fraction = 0.0
    config.train.update(TRAIN)
    config.evaluation.update({"points": 1, "generate": False})
    (member,) = Study.from_config_dict(config).members
    return member.config


def parameters(model) -> dict:
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def command(module: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *map(str, arguments)],
        cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_run_starts_from_a_checkpoint_trains_on_and_is_exported(checkpoint, run, tmp_path):
    directory, cache = tmp_path / "continued", tmp_path / "cache"
    config = f"--config=experiments/configs/pretrained.py:{checkpoint}"
    overrides = [
        f"--config.data.sources.documents.paths=('{checkpoint}/corpus.txt',)",
        "--config.data.sources.documents.test_fraction=0.0",
        *(f"--config.train.{key}={value}" for key, value in TRAIN.items()),
        "--config.evaluation.points=1",
        "--config.evaluation.generate=false",
    ]
    ran = command("convert", "import", f"--checkpoint={checkpoint}", config, f"--workdir={tmp_path}", *overrides)
    assert ran.returncode == 0, ran.stderr
    assert f"{directory}: starts from {checkpoint}" in ran.stdout
    assert "read 41 tensors" in ran.stderr
    assert json.loads((directory / "config.json").read_text()) == json.loads(json.dumps(to_dict(run)))
    original = parameters(load_pretrained(checkpoint).decoder)
    context = checkpoint_context(run, directory, cache_dir=cache)
    assert context.step == 0
    for path, array in parameters(context.model()).items():
        np.testing.assert_array_equal(array, original[path], err_msg=str(path))
    ran = command("convert", "export", f"--run={directory}", f"--output={tmp_path}/unchanged")
    assert ran.returncode == 0, ran.stderr
    assert f"{tmp_path}/unchanged: MixtralForCausalLM, step 0 of {directory}, float32" in ran.stdout
    assert (tmp_path / "unchanged/model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()

    result = train(run, directory, cache_dir=cache)
    assert (result.status, result.step) == ("done", 2)
    assert export_run(directory, tmp_path / "trained") == 2
    trained = parameters(load_pretrained(tmp_path / "trained").decoder)
    assert any((trained[path] != array).any() for path, array in original.items())
    for path, array in parameters(checkpoint_context(run, directory, cache_dir=cache).model()).items():
        np.testing.assert_array_equal(array, trained[path], err_msg=str(path))

    written = json.loads((tmp_path / "trained/tokenizer_config.json").read_text())
    assert written == {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"
    }  # fmt: skip
    values = json.loads((tmp_path / "trained/config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (1, 2, 0)
    with pytest.raises(ConfigError, match="has a checkpoint of step 2 already"):
        import_run(checkpoint, run, directory, cache_dir=cache)


def test_transformers_reads_an_exported_tokenizer(checkpoint, run, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers (pip install jaxmoe[hf])")
    from jaxmoe.interop.huggingface.runs import write_tokenizer

    write_tokenizer(run.data.tokenizer, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token == "</s>"
    from jaxmoe.data import load_tokenizer

    assert tokenizer("the lazy dog")["input_ids"] == load_tokenizer(run.data.tokenizer).encode("the lazy dog")


def test_a_model_that_is_not_the_checkpoint_s_is_refused_setting_by_setting(checkpoint, run, tmp_path):
    values = to_dict(run)
    values["model"] |= {"rope_theta": 5e5, "init_std": 0.5}
    values["model"]["moe"] |= {"experts_per_token": 1, "load_balance_coefficient": 0.5}
    with pytest.raises(ConfigError) as caught:
        import_run(checkpoint, from_dict(RunConfig, values), tmp_path / "run")
    assert str(caught.value).splitlines()[1:] == [
        "  model.rope_theta: 500000.0 in the configuration, 10000.0 in the checkpoint",
        "  model.moe.experts_per_token: 1 in the configuration, 2 in the checkpoint",
    ]
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no config.json; give the folder of a run"):
        export_run(tmp_path, tmp_path / "out")


def test_mistakes_in_commands_are_one_line(checkpoint, tmp_path):
    for arguments, message in (
        (("exprt",), "Did you mean 'export'"),
        (("export", f"--run={tmp_path}"), "export needs --run=WORKDIR/MEMBER and --output=FOLDER"),
    ):
        ran = command("convert", *arguments)
        assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1), ran.stderr
        assert message in ran.stderr


def test_questions_of_either_form_are_read_and_answered(checkpoint, tmp_path):
    questions = tmp_path / "questions.jsonl"
    row = {"context": "the quick", "choices": ["brown fox", "lazy"], "answer": 0}
    hellaswag = {"activity_label": "A", "ctx_a": "the", "ctx_b": "quick", "endings": ["brown", "lazy"], "label": 1}
    questions.write_text("\n".join(map(json.dumps, [row, hellaswag, row])))
    ran = command("multiple_choice", f"--checkpoint={checkpoint}", f"--questions={questions}", "--limit=2", "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["questions"] == 2
    questions.write_text(json.dumps(row) + '\n{"context": "x"}')
    with pytest.raises(ConfigError, match="questions.jsonl, line 2: not a question"):
        multiple_choice.read_questions(str(questions), None)
