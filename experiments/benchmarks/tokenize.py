"""Tokenizing a corpus with two processes, against the tokenizer library alone with as many.

The text is Python's own standard library, of which every installation has some ten megabytes; the tokenizer is a
byte-level BPE trained on a part of it. Both contenders start their processes anew in every round.
"""

from __future__ import annotations

import json
import multiprocessing
import pathlib
import sysconfig
import tempfile
from typing import Any

from experiments.benchmarks.timing import interleaved, machine

PROCESSES = 2
VOCAB_SIZE = 8192
TEXTS = 1000
TRAINED_ON = 200
"""Files that the tokenizer is trained on."""


def run(*, rounds: int) -> dict[str, Any]:
    """Megabytes a second of both, and their ratio."""
    from jaxmoe.data.tokenize import tokenize_corpus
    from jaxmoe.data.tokenizer_files import train_tokenizer

    files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))
    read = (file.read_text(errors="replace") for file in files if "site-packages" not in file.parts)
    texts = [text for text in read if text][:TEXTS]
    size = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        (root / "tokenizer.json").write_bytes(train_tokenizer(texts[:TRAINED_ON], VOCAB_SIZE))
        (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        number = iter(range(10**9))

        def ours() -> int:
            output, tokenizer = root / f"shards-{next(number)}", str(root / "tokenizer.json")
            return tokenize_corpus([str(root / "text.jsonl")], output, tokenizer, processes=PROCESSES).tokens

        def library() -> int:
            halves = [(str(root / "tokenizer.json"), texts[part::PROCESSES]) for part in range(PROCESSES)]
            with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
                return sum(pool.map(_library_tokens, halves)) + len(texts)

        assert ours() == library(), "both must count the same tokens"
        times = interleaved({"jaxmoe": ours, "library": library}, rounds=rounds, warmup=0)
    return {
        "machine": machine(),
        "megabytes": size / 1e6,
        "processes": PROCESSES,
        "rows": [
            {"contender": name, "seconds": time.wall, "megabytes_per_second": size / 1e6 / time.wall}
            for name, time in times.items()
        ],
        "speed_against_library": times["library"].wall / times["jaxmoe"].wall,
    }


def _library_tokens(work: tuple[str, list[str]]) -> int:
    import os

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers

    path, texts = work
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.encode_special_tokens = True  # a text that has "<s>" in it means these letters
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return sum(len(encoding.ids) for encoding in encodings)


def describe(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['megabytes']:.1f} MB of text, {result['processes']} processes"]
    lines += [f"  {row['contender']:<8} {row['megabytes_per_second']:6.2f} MB/s" for row in result["rows"]]
    return "\n".join([*lines, f"tokenize runs at {result['speed_against_library']:.2f} of the library's speed"])
