"""safetensors files, against the library of that name, damaged, and by blocks."""

import json

import ml_dtypes
import numpy as np
import pytest

from jaxmoe.interop.safetensors_files import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorFileError,
    TensorFiles,
    TensorToWrite,
    write_tensors,
)

NUMBERS = {name: np.random.default_rng(i).normal(size=(4, 6)).astype(np.float32) for i, name in enumerate("abc")}


def written(folder, numbers=NUMBERS, code="F32", **options):
    """A folder with `numbers` in it, written in two blocks each."""
    tensors = [
        TensorToWrite(name, array.shape, lambda array=array: iter([array[:1], array[1:]]))
        for name, array in numbers.items()
    ]
    write_tensors(folder, tensors, code, **options)
    return folder


@pytest.mark.parametrize(("code", "dtype"), [("F32", np.float32), ("BF16", ml_dtypes.bfloat16), ("F16", np.float16)])
def test_the_library_reads_what_is_written_and_the_other_way_round(tmp_path, code, dtype):
    library = pytest.importorskip("safetensors.numpy", reason="needs safetensors (pip install jaxmoe[hf])")
    numbers = {name: array.astype(dtype) for name, array in NUMBERS.items()}
    content = (written(tmp_path, numbers, code) / SINGLE_FILE).read_bytes()
    if code != "BF16":  # which the library has no numpy array for
        assert {name: array.tobytes() for name, array in library.load(content).items()} == {
            name: array.tobytes() for name, array in numbers.items()
        }
        (tmp_path / SINGLE_FILE).write_bytes(library.save(numbers))
    with TensorFiles(tmp_path) as files:
        for name, array in numbers.items():
            np.testing.assert_array_equal(files.read(name, 4, 1, 3), array[1:3])
            np.testing.assert_array_equal(files.read(name, 2, 0, 2).ravel(), array.ravel())
    assert not list(tmp_path.glob(".*"))


def test_several_files_have_an_index(tmp_path):
    written(tmp_path, shard_bytes=200)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        f"model-0000{i}-of-00002.safetensors" for i in (1, 2)
    ]
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"] == {"total_size": 3 * 4 * 6 * 4}
    assert [index["weight_map"][name][6:11] for name in "abc"] == ["00001", "00001", "00002"]
    with TensorFiles(tmp_path) as files:
        np.testing.assert_array_equal(files.read("c", 4, 0, 4), NUMBERS["c"])


def test_a_file_that_was_cut_off_names_itself_and_the_tensor(tmp_path):
    path = written(tmp_path) / SINGLE_FILE
    content = path.read_bytes()
    path.write_bytes(content[:-50])
    with pytest.raises(TensorFileError, match=f"{path} is cut off: c ends at byte 288"):
        TensorFiles(tmp_path)
    path.write_bytes(content[:50])
    with pytest.raises(TensorFileError, match=f"{path} is no safetensors file, or is cut off within its header"):
        TensorFiles(tmp_path)
    path.write_bytes(content + b"0")
    with pytest.raises(TensorFileError, match="1 bytes follow the last tensor"):
        TensorFiles(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_names_the_tensor(tmp_path):
    path = written(tmp_path) / SINGLE_FILE
    with TensorFiles(tmp_path) as files:
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(TensorFileError, match=f"{path} ends within c"):
            files.read("c", 4, 0, 4)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"shape":[4,6]', b'"shape":[4,7]', r"a is F32\[4, 7\] at bytes 0 to 96"),
        (b'"data_offsets":[96,192]', b'"data_offsets":[97,192]', "b is F32"),
        (b'"dtype":"F32"', b'"dtipe":"F32"', "header is damaged"),
        (b'{"__meta', b'["__meta', "header is damaged"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, old, new, message):
    path = written(tmp_path) / SINGLE_FILE
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(TensorFileError, match=message):
        TensorFiles(tmp_path)


def test_an_index_must_be_true(tmp_path):
    written(tmp_path, shard_bytes=200)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    lost = json.loads(json.dumps(index))
    lost["weight_map"]["d"] = lost["weight_map"]["a"]
    (tmp_path / INDEX_FILE).write_text(json.dumps(lost))
    with pytest.raises(TensorFileError, match="says that model-00001-of-00002.safetensors has d"):
        TensorFiles(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(TensorFileError, match="model-00002-of-00002.safetensors is missing"):
        TensorFiles(tmp_path)


def test_a_folder_of_another_format_says_what_to_do(tmp_path):
    with pytest.raises(TensorFileError, match="has neither model.safetensors nor"):
        TensorFiles(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(TensorFileError, match="It has pytorch_model.bin: load that with transformers"):
        TensorFiles(tmp_path)


def test_quantized_tensors_are_named(tmp_path):
    path = written(tmp_path) / SINGLE_FILE
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
    with TensorFiles(tmp_path) as files, pytest.raises(TensorFileError, match="a is I32; tensors of F64, F32"):
        files.read("a", 4, 0, 4)
