"""Tokenizers: what goes in comes out, and special ids are never text."""

import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.config import ConfigError
from jaxmoe.data import DataError, Example, encode_examples, load_tokenizer, require_vocabulary
from jaxmoe.data.tokenizer_files import train_tokenizer
from jaxmoe.data.tokenizers import SYMBOLS, TASK_CHARACTERS, Tokenizer

LLM_JP = "tokenizers/llm-jp-tokenizer-100k.ver3.0b1.model"
CORPUS = ["the cat sat on the mat", "the dog sat on the log", "Käse, naïve, 日本語"] * 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tok.json"
    path.write_bytes(train_tokenizer(CORPUS, 290))
    return str(path)


@given(st.text())
def test_bytes_come_back(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text.encode("utf-8", "ignore").decode())
    assert all(3 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == text.encode("utf-8", "ignore").decode()


@given(st.text(alphabet=TASK_CHARACTERS))
def test_symbols_take_one_id_for_each_character(text):
    tokenizer = load_tokenizer("symbols")
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_symbols_are_few_printable_letters():
    tokenizer = load_tokenizer("symbols")
    assert tokenizer.vocab_size == 276 == 3 + len(set(TASK_CHARACTERS))
    assert len(set(SYMBOLS)) == 256
    assert all(symbol.isalpha() and symbol.isprintable() for symbol in SYMBOLS)
    assert [ord(symbol) for symbol in SYMBOLS] == list(range(0x100, 0x200))


@pytest.mark.parametrize("text", ["Rx", "K日", "a", "\udc80"])
def test_symbols_refuse_what_the_tasks_cannot_write(text):
    with pytest.raises(ConfigError, match="use tokenizer='bytes'|Use tokenizer='bytes'"):
        load_tokenizer("symbols").encode(text)


@pytest.mark.parametrize("kind", ["bytes", "symbols", "json"])
def test_batches_are_the_texts_one_by_one(kind, trained):
    tokenizer = load_tokenizer(trained if kind == "json" else kind)
    texts = ["K" + SYMBOLS[:5], "R3+4=7", ""]
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert [ids.tolist() for ids in tokenizer.encode_arrays(texts)] == tokenizer.encode_batch(texts)


def test_trained_tokenizer_reads_any_text_and_merges_its_corpus(trained):
    tokenizer = load_tokenizer(trained)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 2, 290)
    for text in ("the cat", " two  spaces\n", "ein Käse 日本 🙂"):
        assert tokenizer.decode([*tokenizer.encode(text), 2, 0]) == text
    assert len(tokenizer.encode("the cat sat on the mat")) < len("the cat sat on the mat") / 2


def test_training_needs_room_for_bytes_and_specials():
    with pytest.raises(DataError, match="vocab_size >= 259"):
        train_tokenizer(CORPUS, 258)


def test_truncation_that_a_file_asks_for_is_switched_off(trained, tmp_path):
    values = json.loads(pathlib.Path(trained).read_text())
    values["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "short.json").write_text(json.dumps(values))
    assert len(load_tokenizer(str(tmp_path / "short.json")).encode("zzzzzzzzzz")) > 3


def test_the_name_of_a_special_token_in_a_text_is_text(trained):
    tokenizer = load_tokenizer(trained)
    ids = tokenizer.encode("a</s>b<pad>")
    assert not {tokenizer.eos_id, tokenizer.pad_id} & set(ids)
    assert tokenizer.decode(ids) == "a</s>b<pad>"


def test_special_tokens_of_the_config_beside_the_file_win(trained, tmp_path):
    values = json.loads(pathlib.Path(trained).read_text())
    token = {**values["added_tokens"][0], "content": "<stop>", "id": 290}
    values["added_tokens"].append(token)
    (tmp_path / "tok.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}, "pad_token": None}))
    tokenizer = load_tokenizer(str(tmp_path / "tok.json"))
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (290, 291)


def test_a_vocabulary_without_an_end_token_is_refused(trained, tmp_path):
    text = pathlib.Path(trained).read_text().replace("</s>", "<nothing>")
    (tmp_path / "tok.json").write_text(text)
    with pytest.raises(DataError, match="no end-of-text token; one of </s>, <eos>"):
        load_tokenizer(str(tmp_path / "tok.json"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tok.json", b"{}", "not a Hugging Face tokenizers file"),
        ("tok.model", b"garbage", "not a sentencepiece model"),
        ("tok.json", b"", "the file is empty"),
    ],
)
def test_broken_tokenizer_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_tokenizer(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


def test_a_missing_tokenizer_file_names_the_nearest(tmp_path):
    (tmp_path / "tok.json").write_text("{}")
    with pytest.raises(DataError, match=f"Did you mean {tmp_path}/tok.json?"):
        load_tokenizer(str(tmp_path / "tuk.json"))


def test_an_unknown_kind_of_tokenizer_says_what_there_is():
    with pytest.raises(ConfigError, match="'bytes', 'symbols'"):
        load_tokenizer("byte")


def test_the_answer_begins_after_the_prompt():
    tokens, starts = encode_examples(load_tokenizer("symbols"), [Example("R3+4=", "7"), Example("K", "00")])
    assert [len(ids) for ids in tokens] == [6, 3]
    assert starts.tolist() == [5, 1]


def test_a_model_needs_a_row_for_every_id():
    require_vocabulary(load_tokenizer("symbols"), 276)
    with pytest.raises(ConfigError, match="model.vocab_size=275 is smaller than the tokenizer's 276"):
        require_vocabulary(load_tokenizer("symbols"), 275)


def test_the_papers_tokenizer(shared_data):
    tokenizer = load_tokenizer(str(shared_data(LLM_JP)))
    assert tokenizer.vocab_size == 99_574
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 4)
    text = "Natalia sold 48/2 = 24 clips in May."
    ids = tokenizer.encode(text)
    assert 8 < len(ids) < 25
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
    assert tokenizer.encode_batch([text, "a"]) == [ids, tokenizer.encode("a")]
