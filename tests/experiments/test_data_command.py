"""`python -m experiments.data`: what it prints, and mistakes in one line."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jaxmoe.data import load_tokenizer

REPOSITORY = pathlib.Path(__file__).parents[2]
QUICKSTART = "--config=experiments/configs/quickstart.py"


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.data", *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    lines = [{"question": "how many cats?", "answer": f"there are {i} cats"} for i in range(50)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_trained_tokenizer_can_be_loaded(corpus, tmp_path):
    output = tmp_path / "tok.json"
    ran = command(
        "train_tokenizer", f"--inputs={corpus}", "--text_key=question,answer", "--vocab_size=280", f"--output={output}"
    )
    assert ran.returncode == 0, ran.stderr
    assert f"{output}: 280 ids" in ran.stdout
    tokenizer = load_tokenizer(str(output))
    assert tokenizer.vocab_size == 280
    assert len(tokenizer.encode("how many cats?")) < 8
    assert [entry.name for entry in tmp_path.iterdir()] == ["tok.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train_tokeniser"], "Did you mean 'train_tokenizer'?"),
        ([], "'nothing' is no command"),
        (["train_tokenizer", "--inputs={corpus}"], "needs --inputs=FILES and --output=FILE.json"),
        (["train_tokenizer", "--inputs={corpus}", "--output={corpus}"], "must end in .json"),
        (["train_tokenizer", "--inputs={corpus}", "--output=/nowhere/tok.json"], "there is no folder /nowhere"),
        (
            ["train_tokenizer", "--inputs={corpus}", "--output={folder}/tok.json"],
            "a.jsonl:1: no key 'text'; it has 'question', 'answer'",
        ),
        (
            ["train_tokenizer", "--inputs={folder}/b.jsonl", "--output={folder}/tok.json"],
            "b.jsonl: no such file. Did you mean {folder}/a.jsonl?",
        ),
        (["count", QUICKSTART, "--member=E1"], "--member=E1: no such member"),
        (["count", QUICKSTART, "--config.train.sequence_length=8"], "sequence_length=16 or more is needed"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, message, corpus):
    filled = {"corpus": str(corpus), "folder": str(corpus.parent)}
    ran = command(*(argument.format(**filled) for argument in arguments))
    assert ran.returncode == 2, ran.stderr
    assert message.format(**filled) in ran.stderr
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1
    assert list(corpus.parent.iterdir()) == [corpus]


def test_an_existing_tokenizer_is_not_overwritten_unasked(corpus, tmp_path):
    output = tmp_path / "tok.json"
    output.write_text("precious")
    arguments = ["train_tokenizer", f"--inputs={corpus}", "--text_key=answer", "--vocab_size=260", f"--output={output}"]
    ran = command(*arguments)
    assert (ran.returncode, output.read_text()) == (2, "precious")
    assert "choose another name, or --overwrite" in ran.stderr
    assert command(*arguments, "--overwrite").returncode == 0
    assert load_tokenizer(str(output)).vocab_size == 260


def test_count_prints_the_accounts_of_the_run():
    ran = command("count", QUICKSTART, "--json", "--config.train.steps=10", "--config.train.warmup_steps=0")
    assert ran.returncode == 0, ran.stderr
    accounts = {account["name"]: account for account in json.loads(ran.stdout)}
    assert sum(account["rows"] for account in accounts.values()) == 10 * 128
    assert accounts["knowledge"]["tokens"] == accounts["knowledge"]["rows"] * 16


def test_inspect_shows_rows_with_their_weights():
    ran = command("inspect", QUICKSTART, "--rows=1")
    assert ran.returncode == 0, ran.stderr
    assert "knowledge, train row 0 of" in ran.stdout
    assert "  starts with 'R'\n  weight 0.1  '" in ran.stdout
    assert "<end>'\n  padding     4\n" in ran.stdout


def test_a_tokenization_that_is_stopped_says_that_it_goes_on(tmp_path):
    (tmp_path / "raw.jsonl").write_text('{"text": "a short document"}\n' * 400_000)
    process = subprocess.Popen(
        [
            sys.executable, "-m", "experiments.data", "tokenize", f"--inputs={tmp_path}/raw.jsonl", "--tokenizer=bytes",
            f"--output={tmp_path}/out", "--shard_tokens=1", "--processes=2",
        ],
        cwd=REPOSITORY, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list(tmp_path.glob("out/*.npz")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert said == f"stopped; whole shards are kept. The same command goes on there ({tmp_path}/out).\n"
    assert not (tmp_path / "out" / "corpus.json").exists()
