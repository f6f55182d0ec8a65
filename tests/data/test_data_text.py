"""Text: held-out documents, the cache, and what a killed process leaves."""

import json
import logging
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxmoe.config import ConfigError, TextSource
from jaxmoe.data import DataError, build_source, load_tokenizer
from jaxmoe.data.cache import cached_corpus, text_hash

REPOSITORY = pathlib.Path(__file__).parents[2]


def write_lines(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return str(path)


def source_of(*paths, cache_dir=None, sequence_length=16, tokenizer="bytes", seed=0, **options):
    config = TextSource(paths=paths, **options)
    return build_source(
        "text", config, load_tokenizer(tokenizer),
        sequence_length=sequence_length, run_seed=seed, cache_dir=cache_dir,
    )


def documents_of(source, split):
    """The documents of a split, read back from its rows by sorting out the overlaps; unshuffled splits only."""
    tokenizer = load_tokenizer("bytes")
    rows = source.rows(np.arange(source.row_count(split)), split)
    tokens = [rows["inputs"][0, 0], *rows["targets"][rows["segment_ids"] > 0]]
    text, documents = [], []
    for token in tokens:
        if token == tokenizer.eos_id:
            documents.append(tokenizer.decode(text))
            text = []
        else:
            text.append(token)
    assert not text
    return documents


def test_all_formats_make_the_same_rows(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    texts = [f"document {i} says {i * i}" for i in range(30)]
    write_lines(tmp_path / "all.jsonl", texts)
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02d}.txt").write_text(text)
    writer = ArrayRecordWriter(str(tmp_path / "all.array_record"), "group_size:1")
    for text in texts:
        writer.write(text.encode())
    writer.close()
    sources = [source_of(f"{tmp_path}/{pattern}") for pattern in ("all.jsonl", "*.txt", "all.array_record")]
    batches = [source.rows(np.arange(10)) for source in sources]
    for batch in batches[1:]:
        for key, values in batches[0].items():
            np.testing.assert_array_equal(batch[key], values)


def test_held_out_documents_are_not_trained_on_and_equal_ones_stay_together(tmp_path):
    texts = [f"text {i % 150}" for i in range(300)]
    path = write_lines(tmp_path / "a.jsonl", texts)
    source = source_of(path, test_fraction=0.2)
    test = documents_of(source, "test")
    held_out = {text for text in texts if text_hash(text) < 0.2 * 2**64}
    assert test == [text for text in texts if text in held_out]
    assert 15 < len(held_out) < 45
    trained = [text for text in texts if text not in held_out]
    assert source.tokens_per_epoch == sum(len(text) + 1 for text in trained) - 1
    assert source.tokens_per_epoch + source.token_count("test") + 2 == sum(len(text) + 1 for text in texts)


def test_test_paths_take_the_place_of_the_fraction(tmp_path, caplog):
    train = write_lines(tmp_path / "train.jsonl", ["a", "b", "c"])
    test = write_lines(tmp_path / "test.jsonl", ["c", "d"])
    with caplog.at_level(logging.WARNING):
        source = source_of(train, test_paths=(test,), test_fraction=0.5)
    assert documents_of(source, "test") == ["c", "d"]
    assert source.tokens_per_epoch == 5
    assert "1 of 2 test documents are also in the training files" in caplog.text


def test_a_corpus_of_one_document_has_no_test_split_and_says_so(tmp_path, caplog):
    (tmp_path / "book.txt").write_text("once upon a time " * 20)
    with caplog.at_level(logging.WARNING):
        source = source_of(str(tmp_path / "book.txt"), test_fraction=0.01)
    assert source.splits == ("train",)
    assert source.row_count("test") == 0
    assert "holds out none of 1 documents" in caplog.text


def test_every_epoch_has_the_same_tokens_in_another_order(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [f"text {i}" for i in range(40)])
    source = source_of(path, test_fraction=0, sequence_length=8)
    rows = source.rows_per_epoch
    first, second = source.rows(np.arange(rows)), source.rows(np.arange(rows, 2 * rows))
    assert not np.array_equal(first["inputs"], second["inputs"])
    for epoch in (first, second):
        assert (epoch["segment_ids"] > 0).sum() == source.tokens_per_epoch
    across = source.rows(np.array([rows + 1, 0, rows - 1]))
    for key in ("inputs", "targets", "positions", "segment_ids"):
        np.testing.assert_array_equal(across[key], np.stack([second[key][1], first[key][0], first[key][-1]]))


def test_broken_lines_are_counted_and_the_count_is_kept_with_the_cache(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": \n{"body": "x"}\n{"text": ""}\n{"text": "also good"}\n')
    with pytest.raises(DataError, match=f"{path}:2: not JSON"):
        source_of(str(path), test_fraction=0)
    for _ in range(2):
        source = source_of(str(path), test_fraction=0, on_error="skip", cache_dir=tmp_path / "cache")
        assert source.skipped == {"not JSON": 1, "no key 'text'": 1, "empty text": 1}
        assert source.skipped_records == 3
        assert source.tokens_per_epoch == len("good") + 1 + len("also good") + 1 - 1


def test_another_field_can_hold_the_text(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["hello"], key="body")
    assert source_of(path, test_fraction=0, text_key="body").tokens_per_epoch == 5
    with pytest.raises(DataError, match="a.jsonl:1: no key 'text'; it has 'body'"):
        source_of(path)


def test_nothing_left_to_train_on_is_an_error(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["hello"])
    with pytest.raises(DataError, match=r"none of its 1 documents is left.*test_fraction=0.999999"):
        source_of(path, test_fraction=0.999999)
    empty = write_lines(tmp_path / "b.jsonl", ["", ""])
    with pytest.raises(DataError, match="b.jsonl: no record has any text"):
        source_of(empty)


def test_symbols_cannot_write_text(tmp_path):
    with pytest.raises(ConfigError, match="tokenizer='symbols' cannot write the text of source 'text'"):
        source_of(write_lines(tmp_path / "a.jsonl", ["hello"]), tokenizer="symbols")


def test_text_is_tokenized_once_until_something_changes(tmp_path):
    cache = tmp_path / "cache"
    path = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    first = source_of(path, test_fraction=0, cache_dir=cache)
    (folder,) = cache.iterdir()
    stamp = (folder / "tokens.bin").stat().st_mtime_ns
    again = source_of(path, test_fraction=0.0001, cache_dir=cache)
    assert [entry.name for entry in cache.iterdir()] == [folder.name]
    assert (folder / "tokens.bin").stat().st_mtime_ns == stamp
    assert again.tokens_per_epoch == first.tokens_per_epoch == 7
    write_lines(tmp_path / "a.jsonl", ["one", "two", "three"])
    assert source_of(path, test_fraction=0, cache_dir=cache).tokens_per_epoch == 13
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_cache_is_made_anew(tmp_path):
    cache = tmp_path / "cache"
    path = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    before = source_of(path, test_fraction=0, cache_dir=cache).rows([0])
    (folder,) = cache.iterdir()
    (folder / "tokens.bin").write_bytes(b"xx")
    after = source_of(path, test_fraction=0, cache_dir=cache).rows([0])
    np.testing.assert_array_equal(before["inputs"], after["inputs"])


class _Interrupting:
    """A byte tokenizer that stops the process, in one way or another, at the second block."""

    def __init__(self, stop):
        self._bytes, self._stop, self._calls = load_tokenizer("bytes"), stop, 0

    def __getattr__(self, name):
        return getattr(self._bytes, name)

    def encode_arrays(self, texts):
        self._calls += 1
        if self._calls == 2:
            self._stop()
        return self._bytes.encode_arrays(texts)


def _texts():
    return (f"document {i}" for i in range(6000))


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_corpus(tmp_path, "key", _texts, _Interrupting(interrupt), {})
    assert list(tmp_path.iterdir()) == []


def test_a_killed_write_is_not_taken_for_a_corpus_and_is_cleared_away(tmp_path):
    script = (
        f"import os, signal, sys; sys.path.insert(0, {os.fspath(pathlib.Path(__file__).parent)!r})\n"
        "from test_data_text import _Interrupting, _texts, cached_corpus\n"
        f"cached_corpus({os.fspath(tmp_path)!r}, 'key', _texts, "
        "_Interrupting(lambda: os.kill(os.getpid(), signal.SIGKILL)), {})\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [entry.name.split("-")[0] for entry in tmp_path.iterdir()] == ["draft"]
    corpus = cached_corpus(tmp_path, "key", _texts, load_tokenizer("bytes"), {})
    assert len(corpus.documents) == 6000
    assert len(corpus.documents.tokens) == sum(len(text) + 1 for text in _texts())
    assert [entry.name.split("-")[0] for entry in tmp_path.iterdir()] == ["text"]


def test_two_writers_of_one_corpus_agree(tmp_path):
    """The second to finish finds the first one's corpus in place and uses it."""
    def other_process_finishes():
        cached_corpus(tmp_path, "key", _texts, load_tokenizer("bytes"), {})

    corpus = cached_corpus(tmp_path, "key", _texts, _Interrupting(other_process_finishes), {})
    assert len(corpus.documents) == 6000
    assert len(list(tmp_path.iterdir())) == 1


def test_no_space_left_is_said_in_the_users_terms(tmp_path):
    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=f"{tmp_path}: no space left.*data.cache_dir"):
        cached_corpus(tmp_path, "key", _texts, _Interrupting(full), {})
    assert list(tmp_path.iterdir()) == []


def test_large_vocabularies_are_kept_in_32_bits(tmp_path):
    class Large(_Interrupting):
        vocab_size = 100_000

        def encode_arrays(self, texts):
            return [np.full(3, 99_999, np.int32) for _ in texts]

    corpus = cached_corpus(tmp_path, "key", lambda: ["x"], Large(None), {})
    assert corpus.documents.tokens.tolist() == [99_999] * 3 + [2]


def test_real_text_is_predicted_once_an_epoch(shared_data, tmp_path):
    path = shared_data("wikitext2/valid.txt")
    source = source_of(str(path), test_fraction=0, sequence_length=512, cache_dir=tmp_path)
    assert source.tokens_per_epoch == path.stat().st_size
    rows = source.rows(np.arange(source.rows_per_epoch))
    assert (rows["segment_ids"] > 0).sum() == path.stat().st_size
    counts = np.bincount(rows["targets"][rows["segment_ids"] > 0], minlength=259)[3:]
    expected = np.bincount(np.frombuffer(path.read_bytes(), np.uint8), minlength=256)
    expected[path.read_bytes()[0]] -= 1
    np.testing.assert_array_equal(counts, expected)
