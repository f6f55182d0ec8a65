"""Files and records: formats, order, and errors that name file and line."""

import gzip
import json
import logging

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jaxmoe.config import ConfigError
from jaxmoe.data import DataError
from jaxmoe.data.files import expand, identity
from jaxmoe.data.records import QUESTION_SUFFIXES, TEXT_SUFFIXES, RecordErrors, read_records, string_field


def records(path, on_error="raise"):
    errors = RecordErrors("s", on_error)
    return list(read_records(str(path), errors)), errors


def write_array_record(path, contents):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for content in contents:
        writer.write(content)
    writer.close()


def test_a_text_file_is_one_record(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\n\ntwo é".encode())
    assert records(tmp_path / "a.txt")[0] == [(str(tmp_path / "a.txt"), "one\n\ntwo é")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_json_lines_are_records_with_their_line(name, tmp_path):
    content = b'\xef\xbb\xbf{"text": "one"}\r\n\n{"text": "tw\\u00f6"}'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    path = str(tmp_path / name)
    assert records(path)[0] == [(f"{path}:1", {"text": "one"}), (f"{path}:3", {"text": "twö"})]


def test_a_json_list_is_its_items(tmp_path):
    (tmp_path / "a.json").write_text('[{"prompt": "p"}, 3]')
    path = str(tmp_path / "a.json")
    assert records(path)[0] == [(f"{path}: item 0", {"prompt": "p"}), (f"{path}: item 1", 3)]


def test_array_records_are_text_or_json_objects(tmp_path):
    contents = [b"plain text", '{"text": "é"}'.encode(), b"{not json", *(b"%d" % i for i in range(600))]
    write_array_record(tmp_path / "a.array_record", contents)
    found, _ = records(tmp_path / "a.array_record")
    assert [value for _, value in found[:3]] == ["plain text", {"text": "é"}, "{not json"]
    assert [value for _, value in found[3:]] == [str(i) for i in range(600)]
    assert found[300][0].endswith("a.array_record: record 300")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', r"not JSON \(Expecting ',' delimiter at column 13\)"),
        (b'{"text": "\xff"}', r"not UTF-8 \(byte 0xff at 10\)"),
        (b"[" * 100_000, r"not JSON \(nested too deeply\)"),
    ],
)
def test_a_broken_line_is_named_or_skipped_and_counted(line, reason, tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(DataError, match=f"{path}:2: {reason}.*on_error='skip'"):
        records(path)
    found, errors = records(path, "skip")
    assert [value["text"] for _, value in found] == ["a", "b"]
    assert errors.total == 1
    with caplog.at_level(logging.WARNING):
        errors.summarize(kept=2)
    assert "source 's': skipped 1 of 3 records" in caplog.text
    assert f"{path}:2" in caplog.text


def test_a_cut_off_gzip_file_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    lines = b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(20_000))
    path.write_bytes(gzip.compress(lines)[:-2000])
    with pytest.raises(DataError, match=rf"{path}:\d+: broken compressed data"):
        records(path)
    found, errors = records(path, "skip")
    assert found[1000][1] == {"text": str(1000 * 7919)}
    assert errors.skipped == {"broken compressed data": 1}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"body": "x", "id": 1}, "no key 'text'; it has 'body', 'id'"),
        ({}, "no key 'text'; it has none"),
        ({"text": 3}, "'text' is not a string but a int"),
        ({"text": "\ud800"}, "half of a surrogate pair"),
        (["x"], "not a JSON object but a list"),
    ],
)
def test_a_field_that_is_no_text_says_what_is_there(value, reason):
    with pytest.raises(DataError, match=f"f:7: .*{reason}"):
        string_field("f:7", value, "text", RecordErrors("s", "raise"))
    errors = RecordErrors("s", "skip")
    assert string_field("f:7", value, "text", errors) is None
    assert errors.total == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.jsonl", b"\n \n", "the file has no records"),
        ("a.json", b"[]", "the file has no records"),
        ("a.json", b'{"a": 1}', "holds a dict; a JSON list of objects is needed"),
        ("a.json", b"[1,", "not JSON"),
        ("a.json", b"\xff", "not JSON"),
        ("a.jsonl.gz", b"no gzip", "broken compressed data"),
        ("a.array_record", b"garbage" * 100, "not an ArrayRecord file"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{tmp_path / name}.*{message}") as error:
        records(tmp_path / name)
    assert isinstance(error.value, ConfigError)


def test_files_come_in_the_order_named_and_sorted_within_a_pattern(tmp_path):
    for name in ("b.txt", "a.txt", "c.jsonl", "ignored.md", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = expand([f"{tmp_path}/c.jsonl", f"{tmp_path}/*", f"{tmp_path}/**/*.txt", f"{tmp_path}/a.txt"], TEXT_SUFFIXES)
    assert [path.removeprefix(f"{tmp_path}/") for path in found] == ["c.jsonl", "a.txt", "b.txt", "sub/d.txt"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert expand([f"{tmp_path}/a[1].txt"], TEXT_SUFFIXES) == [f"{tmp_path}/a[1].txt"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("train.json1", "no such file. Did you mean {0}/train.jsonl?"),
        ("sub/deep/train.jsonl", "no such file. There is no folder {0}/sub."),
        ("*.txt", "matches no file that ends in .jsonl, .jsonl.gz, .json"),
        ("notes.md", "its name ends in none of .jsonl, .jsonl.gz, .json"),
        ("", "is a folder; name its files"),
    ],
)
def test_paths_that_name_nothing(pattern, message, tmp_path):
    for name in ("train.jsonl", "notes.md"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=message.format(tmp_path)):
        expand([f"{tmp_path}/{pattern}"], QUESTION_SUFFIXES)


def test_identity_changes_with_the_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = identity(str(path))
    path.write_text("three")
    assert before == (str(path), 3, before[2])
    assert identity(str(path))[1:] != before[1:]


def test_real_questions(shared_data):
    found, _ = records(shared_data("gsm8k/test.jsonl"))
    assert len(found) == 1319
    assert found[0][1]["answer"].endswith("#### 18")
    prompts, _ = records(shared_data("optimal_sparsity_taskloss/gsm8k_4shot.json"))
    assert len(prompts) == 1319
    assert json.dumps(prompts[0][1]).startswith('{"prompt": ')
