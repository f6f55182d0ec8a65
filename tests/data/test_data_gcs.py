"""Data from gs:// against a storage server on loopback, where its packages are installed."""

import gzip
import json

import numpy as np
import pytest
from etils import epath

from jaxmoe.config import TextSource
from jaxmoe.data import DataError, build_source, load_tokenizer
from jaxmoe.data.tokenizer_files import train_tokenizer

BUCKET = "gs://bucket"


@pytest.fixture(scope="module")
def folder(bucket):
    assert bucket == BUCKET
    return epath.Path(bucket)


def build(*paths, **options):
    config = TextSource(paths=paths, test_fraction=0, **options)
    return build_source("text", config, load_tokenizer("bytes"), sequence_length=8, run_seed=0)


def test_every_format_is_read_from_a_bucket(folder, tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "c.array_record"), "group_size:1")
    writer.write(b"three")
    writer.close()
    contents = {
        "a.jsonl": json.dumps({"text": "one"}).encode(),
        "b.jsonl.gz": gzip.compress(json.dumps({"text": "two"}).encode()),
        "c.array_record": (tmp_path / "c.array_record").read_bytes(),
        "d.txt": b"four",
    }
    for name, content in contents.items():
        (folder / "formats" / name).write_bytes(content)
        (tmp_path / name).write_bytes(content)
    remote = build(f"{BUCKET}/formats/*")
    local = build(f"{tmp_path}/*")
    assert remote.tokens_per_epoch == local.tokens_per_epoch == len("onetwothreefour") + 4 - 1
    every = np.arange(local.rows_per_epoch)
    np.testing.assert_array_equal(remote.rows(every)["targets"], local.rows(every)["targets"])


def test_a_tokenizer_is_read_from_a_bucket(folder):
    (folder / "tok.json").write_bytes(train_tokenizer(["a b c"] * 3, 260))
    assert load_tokenizer(f"{BUCKET}/tok.json").vocab_size >= 259


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"{BUCKET}/near/a.json1", f"no such file. Did you mean {BUCKET}/near/a.jsonl?"),
        (f"{BUCKET}/far/*.jsonl", "matches no file that ends in"),
        (f"{BUCKET}/near", "is a folder"),
        (f"{BUCKET}/near/a.jsonl", "a.jsonl:1: not JSON"),
    ],
)
def test_errors_name_the_remote_file(folder, path, message):
    (folder / "near" / "a.jsonl").write_bytes(b"{")
    with pytest.raises(DataError, match=message) as error:
        build(path)
    assert path in str(error.value)
