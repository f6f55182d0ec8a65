"""Raw text to shards and back: what is in them, going on after an interruption, and what is refused."""

import gzip
import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxmoe.config import ConfigError, DataConfig, TextSource, TokensSource
from jaxmoe.data import Mixture
from jaxmoe.data.errors import DataError
from jaxmoe.data.shards import open_corpus, read_index
from jaxmoe.data.tokenize import tokenize_corpus
from jaxmoe.data.tokenizers import ByteTokenizer, load_tokenizer, tokenizer_of

TEXTS = [f"document {number} " + "abc" * (number % 7) for number in range(60)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "raw.jsonl", TEXTS)


def tokenized(inputs, output, **options):
    return tokenize_corpus([inputs], output, "bytes", **{"shard_tokens": 300, **options})


def texts_of(output):
    documents = open_corpus(sorted(map(str, output.glob("*.array_record"))), ByteTokenizer.fingerprint, None).documents
    everything = documents.tokens[np.arange(len(documents.tokens))]
    parts = [everything[start : start + length] for start, length in zip(documents.starts, documents.lengths)]
    assert all(part[-1] == ByteTokenizer.eos_id for part in parts)
    return [ByteTokenizer().decode(part) for part in parts]


def test_shards_hold_every_document_in_order(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmoe.data.tokenize._BLOCK_DOCUMENTS", 7)
    made = tokenized(corpus, tmp_path / "out")
    assert texts_of(tmp_path / "out") == TEXTS
    assert made.shards == len(list((tmp_path / "out").glob("*.array_record"))) > 2
    assert (made.documents, made.tokens) == (60, sum(len(text) + 1 for text in TEXTS))


def contents(output):
    return {path.name: path.read_bytes() for path in output.iterdir() if path.suffix != ".array_record"}


def test_it_goes_on_after_the_last_whole_shard(corpus, tmp_path, monkeypatch):
    """Interrupted anywhere, the folder ends as if it had not been; what was done is not done again."""
    monkeypatch.setattr("jaxmoe.data.tokenize._BLOCK_DOCUMENTS", 7)
    whole = tokenized(corpus, tmp_path / "whole")

    encoded = []
    original = ByteTokenizer.encode_arrays

    def interrupted(self, texts):
        if len(encoded) > 34 and not resumed:
            raise KeyboardInterrupt
        encoded.extend(texts)
        return original(self, texts)

    resumed = False
    monkeypatch.setattr(ByteTokenizer, "encode_arrays", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenized(corpus, tmp_path / "out")
    finished = sum(len(read_index(path).lengths) for path in (tmp_path / "out").glob("*.array_record"))
    assert finished >= 21
    resumed, _ = True, encoded.clear()
    assert tokenized(corpus, tmp_path / "out") == whole
    assert encoded == TEXTS[finished:]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    encoded.clear()
    assert tokenized(corpus, tmp_path / "out") == whole
    assert not encoded


def test_processes_do_not_change_the_shards(corpus, tmp_path):
    assert tokenized(corpus, tmp_path / "one") == tokenized(corpus, tmp_path / "two", processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


_KILLED = """
import multiprocessing, os, signal, sys
from jaxmoe.data.tokenize import tokenize_corpus
def report(*progress):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    tokenize_corpus([sys.argv[1]], sys.argv[2], "bytes", processes=2, progress=report)
"""


def test_a_killed_command_leaves_no_worker(corpus, tmp_path):
    """Which would hold on to its output, so that this would not be at an end."""
    (tmp_path / "killed.py").write_text(_KILLED)
    killed = subprocess.run(
        [sys.executable, tmp_path / "killed.py", corpus, tmp_path / "out"], stdout=subprocess.PIPE, check=False,
        timeout=60,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    assert killed.stdout.strip().isdigit()


def test_another_corpus_is_not_mixed_in(corpus, tmp_path):
    tokenized(corpus, tmp_path / "out")
    with pytest.raises(ConfigError, match="holds shards of other files"):
        tokenized(corpus, tmp_path / "out", shard_tokens=400)


def test_broken_records_are_an_error_or_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmoe.data.tokenize._BLOCK_DOCUMENTS", 2)
    lines = [json.dumps({"text": text}).encode() for text in TEXTS[:6]]
    lines[1:1] = [b'{"text": "\xff"}', b"{", b'{"text": ""}']
    (tmp_path / "raw.jsonl").write_bytes(b"\n".join([*lines, b"[]"]))
    source = str(tmp_path / "raw.jsonl")
    with pytest.raises(DataError, match=r"raw\.jsonl:2: not UTF-8"):
        tokenized(source, tmp_path / "strict")
    expected = {"not UTF-8": 1, "not JSON": 1, "empty text": 1, "not a JSON object": 1}
    made = tokenized(source, tmp_path / "out", on_error="skip", shard_tokens=40)
    assert (made.documents, made.skipped) == (6, expected)
    (tmp_path / "out" / "corpus.json").unlink()
    assert tokenized(source, tmp_path / "out", on_error="skip", shard_tokens=40) == made
    (tmp_path / "only.jsonl").write_bytes(b"{\n")
    with pytest.raises(DataError, match=r"only\.jsonl: no record has any text \(skipped: 1 not JSON\)\."):
        tokenized(str(tmp_path / "only.jsonl"), tmp_path / "only", on_error="skip")


def test_every_format_gives_the_same_documents(tmp_path):
    zstandard, arrow = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow")
    import pyarrow.parquet

    content = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    half = len(content) // 2
    frames = [zstandard.compress(part) for part in (content[:half], content[half:])]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))
    pyarrow.parquet.write_table(arrow.table({"text": TEXTS}), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        tokenized(str(tmp_path / name), tmp_path / f"out-{name}")
        assert texts_of(tmp_path / f"out-{name}") == TEXTS
    (tmp_path / "e.jsonl.zst").write_bytes(frames[0] + frames[1][:-3])
    with pytest.raises(DataError, match="broken compressed data .the file ends within a frame"):
        tokenized(str(tmp_path / "e.jsonl.zst"), tmp_path / "out-e")
    (tmp_path / "f.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        tokenized(str(tmp_path / "f.parquet"), tmp_path / "out-f")


def mixture(source, steps=4, **options):
    data = DataConfig(tokenizer="bytes", sources={"web": source}, **options)
    return Mixture(data, batch_size=2, sequence_length=32, steps=steps, seed=3)


def test_a_run_reads_the_same_rows_as_from_text(corpus, tmp_path):
    """Same documents, same held-out ones, same order: the shards change nothing but where tokens come from."""
    tokenized(corpus, tmp_path / "out")
    shards = mixture(TokensSource(paths=(str(tmp_path / "out/*.array_record"),), test_fraction=0.1))
    text = mixture(TextSource(paths=(corpus,), test_fraction=0.1))
    for step in range(4):
        for key, values in text.batch(step).items():
            np.testing.assert_array_equal(shards.batch(step)[key], values, err_msg=key)
    np.testing.assert_array_equal(
        shards.sources[0].rows([0], "test")["inputs"], text.sources[0].rows([0], "test")["inputs"]
    )


def test_tokens_run_short_only_where_that_is_allowed(corpus, tmp_path):
    tokenized(corpus, tmp_path / "out")
    paths = (str(tmp_path / "out/*.array_record"),)
    with pytest.raises(ConfigError, match=r"takes 6,400 tokens .* epochs\. Set allow_repeat=True"):
        mixture(TokensSource(paths=paths), steps=100)
    assert mixture(TokensSource(paths=paths, allow_repeat=True), steps=100).accounting()["web"].epochs > 1


def test_the_root_comes_before_relative_paths(corpus, tmp_path):
    tokenized(corpus, tmp_path / "out")
    (tmp_path / "a.jsonl").write_text("{}")
    relative, absolute = TokensSource(paths=("out/*.array_record",)), TextSource(paths=("/x/a.jsonl", "gs://b/c.txt"))
    data = DataConfig(tokenizer="tok.model", sources={"web": relative, "more": absolute}, root=f"{tmp_path}/")
    assert data.sources["web"].paths == (f"{tmp_path}/out/*.array_record",)
    assert data.sources["more"].paths == absolute.paths
    assert (data.tokenizer, data.root) == (f"{tmp_path}/tok.model", None)
    assert mixture(relative, root=str(tmp_path)).batch(0)["inputs"].shape == (2, 32)
    with pytest.raises(DataError, match=r"source 'web': out/\*\.array_record: matches no file .* as data\.root\."):
        mixture(relative)
    with pytest.raises(DataError, match=r"data\.tokenizer: tok\.model: no such file\..* as data\.root\."):
        tokenizer_of(DataConfig(tokenizer="tok.model", sources={"web": relative}))


def test_shards_that_cannot_be_used_are_named(corpus, tmp_path):
    tokenized(corpus, tmp_path / "out")
    first = tmp_path / "out" / "shard-00000.array_record"
    with pytest.raises(DataError, match="was tokenized with another tokenizer"):
        open_corpus([str(first)], "json-1234", None)
    first.write_bytes(first.read_bytes()[:20])
    with pytest.raises(DataError, match="not an ArrayRecord file|records, and its index says"):
        open_corpus([str(first)], ByteTokenizer.fingerprint, None)
    (tmp_path / "out" / "shard-00000.npz").unlink()
    with pytest.raises(DataError, match="no index"):
        open_corpus([str(first)], ByteTokenizer.fingerprint, None)


def test_the_papers_tokenizer(shared_data, tmp_path, corpus):
    path = str(shared_data("tokenizers/llm-jp-tokenizer-100k.ver3.0b1.model"))
    assert load_tokenizer(path).vocab_size == 99_574
    made = tokenize_corpus([corpus], tmp_path / "out", path)
    shards = open_corpus([str(tmp_path / "out" / "shard-00000.array_record")], load_tokenizer(path).fingerprint, None)
    assert made.tokens == len(shards.documents.tokens)
    first = shards.documents.tokens[np.arange(shards.documents.lengths[0])]
    assert load_tokenizer(path).decode(first) == TEXTS[0]


def test_shards_in_a_bucket(corpus, tmp_path, bucket):
    output = f"{bucket}/corpus/web"
    assert tokenize_corpus([corpus], output, "bytes", shard_tokens=300).documents == 60
    source = TokensSource(paths=(f"{output}/*.array_record",), test_fraction=0.0)
    local = mixture(source, cache_dir=str(tmp_path / "cache"))
    assert local.batch(0)["inputs"].shape == (2, 32)
    assert len(list((tmp_path / "cache" / "shards").iterdir())) >= 1
