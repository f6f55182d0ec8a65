"""Questions and answers: schemas, what is compared, packing, and leaks between the splits."""

import json
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.config import QuestionAnswerSource
from jaxmoe.data import DataError, Example, build_source, extract_answer, load_tokenizer


def write(path, records):
    text = json.dumps(records) if path.suffix == ".json" else "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(text)
    return str(path)


def source_of(config, sequence_length=32, tokenizer="bytes"):
    return build_source("qa", config, load_tokenizer(tokenizer), sequence_length=sequence_length, run_seed=0)


QUESTIONS = [{"question": f"{i}+{i}?", "answer": f"Add.\n#### {2 * i}"} for i in range(6)]


def test_gsm8k_becomes_prompt_answer_and_final_number(tmp_path):
    source = source_of(QuestionAnswerSource(train_paths=(write(tmp_path / "a.jsonl", QUESTIONS),)))
    assert source.examples("train")[3] == Example("Question: 3+3?\nAnswer:", " Add.\n#### 6", "6")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_prompt_answer_is_taken_as_it_is(name, tmp_path):
    path = write(tmp_path / name, [{"prompt": "\ndef f{question}():", "answer": "\n  return  1"}])
    config = QuestionAnswerSource(
        weight=0, test_paths=(path,), schema="prompt_answer", answer_separator="", answer_format="exact"
    )
    assert source_of(config).examples("test") == [Example("\ndef f{question}():", "\n  return  1", "return 1")]


def test_the_template_decides_the_prompt(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "a {b} c", "answer": "1"}])
    config = QuestionAnswerSource(train_paths=(path,), prompt_template="Q {x} {question} A", answer_separator="\n")
    assert source_of(config).examples("train") == [Example("Q {x} a {b} c A", "\n1", "1")]


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("so 3.\n#### 18", "18"), ("#### 1,234", "1234"), ("#### $5.50", "5.5"), ("#### -7", "-7"), ("####42 7", "42"),
        ("#### 1\n\nQuestion: x\n#### 2", "1"), ("it is 12.", "12"), ("3-5", "5"), ("from -3 to -4.0", "-4"),
        ("$1,050.00 in all", "1050"), ("0.50", "0.5"), (".5", "0.5"), ("007", "7"), ("-0.0", "0"), ("none", None),
        ("", None), ("#### none, but 4", "4"), ("$-3", "-3"),
    ],
)
def test_the_final_number(text, final):
    assert extract_answer(text, "final_number") == final


def test_exact_answers_ignore_white_space_alone():
    assert extract_answer(" a  B\n c ", "exact") == "a B c"
    assert extract_answer(" \n", "exact") is None


@given(st.integers(-10**9, 10**9), st.integers(0, 999))
def test_a_number_is_read_whichever_way_it_is_written(whole, thousandths):
    value = f"{whole}.{thousandths:03d}"
    plain = extract_answer(value, "final_number")
    assert float(plain) == float(value)
    assert extract_answer(f"so\n#### ${whole:,}.{thousandths:03d}00", "final_number") == plain
    assert extract_answer(f"it is {whole:,}.{thousandths:03d}.", "final_number") == plain


def test_padded_rows_hold_one_example_with_its_weights(tmp_path):
    path = write(tmp_path / "a.jsonl", QUESTIONS[:3])
    config = QuestionAnswerSource(
        train_paths=(path,), test_paths=(write(tmp_path / "b.jsonl", QUESTIONS[4:5]),), packed=False, prompt_weight=0.25
    )
    source = source_of(config, sequence_length=40)
    row = source.rows([0], "test")
    prompt, answer = "Question: 4+4?\nAnswer:", " Add.\n#### 8"
    decode = load_tokenizer("bytes").decode
    assert decode(row["inputs"][0]) == prompt + answer
    assert decode(row["targets"][0][row["loss_weights"][0] == 0.25]) == prompt[1:]
    assert decode(row["targets"][0][row["loss_weights"][0] == 1.0]) == answer
    assert source.rows_per_epoch == 3
    assert source.tokens_per_epoch == 3 * len(prompt + answer)


def test_packed_rows_hold_every_example(tmp_path):
    path = write(tmp_path / "a.jsonl", QUESTIONS)
    source = source_of(QuestionAnswerSource(train_paths=(path,), prompt_weight=0.0))
    lengths = [len(e.prompt + e.answer) + 1 for e in source.examples("train")]
    assert source.tokens_per_epoch == sum(lengths) - 1
    rows = source.rows(np.arange(source.rows_per_epoch))
    assert rows["loss_weights"].sum() == sum(len(e.answer) + 1 for e in source.examples("train"))


def test_padded_examples_that_are_too_long_are_counted(tmp_path, caplog):
    long = {"question": "x" * 100, "answer": "1"}
    path = write(tmp_path / "a.jsonl", [*QUESTIONS, long])
    with caplog.at_level(logging.WARNING):
        source = source_of(QuestionAnswerSource(train_paths=(path,), packed=False), sequence_length=40)
    assert source.rows_per_epoch == 6
    assert source.skipped == {"train example longer than a row": 1}
    assert source.example_count("train") == 7
    assert "1 of 7 train examples are longer than a row of sequence_length=40" in caplog.text
    with pytest.raises(DataError, match="no training example fits a row of sequence_length=8"):
        source_of(QuestionAnswerSource(train_paths=(path,), packed=False), sequence_length=8)


def test_test_examples_that_are_all_too_long_for_a_row_can_still_be_scored(tmp_path):
    path = write(tmp_path / "a.jsonl", QUESTIONS)
    source = source_of(QuestionAnswerSource(weight=0, test_paths=(path,), packed=False), sequence_length=8)
    assert (source.splits, source.row_count("test")) == ((), 0)
    assert len(source.examples("test", 4)) == 4
    assert source.skipped == {"test example longer than a row": 6}


def test_an_example_of_exactly_a_row_fits(tmp_path):
    path = write(tmp_path / "a.jsonl", QUESTIONS[:1])
    config = QuestionAnswerSource(train_paths=(path,), packed=False)
    (example,) = source_of(config, sequence_length=64).examples("train")
    length = len(example.prompt + example.answer)
    row = source_of(config, sequence_length=length).rows([0])
    assert (row["segment_ids"] == 1).all()
    assert row["targets"][0, -1] == load_tokenizer("bytes").eos_id
    with pytest.raises(DataError, match=f"the shortest has {length + 1} tokens"):
        source_of(config, sequence_length=length - 1)


def test_test_prompts_that_were_trained_on_are_reported(tmp_path, caplog):
    train = write(tmp_path / "a.jsonl", QUESTIONS)
    again = [{"question": " 1+1? ", "answer": "other"}, {"question": "new", "answer": "1"}]
    with caplog.at_level(logging.WARNING):
        source_of(QuestionAnswerSource(train_paths=(train,), test_paths=(write(tmp_path / "b.jsonl", again),)))
    assert "1 of 2 test prompts are also in the training files" in caplog.text


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q"}, "a.jsonl:2: no key 'answer'; it has 'question'"),
        ({"prompt": "q", "answer": "a"}, "a.jsonl:2: no key 'question'; it has 'prompt', 'answer'"),
        ({"question": "q", "answer": ""}, "a.jsonl:2: empty answer"),
        ({"question": "q", "answer": 18}, "a.jsonl:2: 'answer' is not a string but a int"),
    ],
)
def test_a_broken_record_is_named_or_skipped_and_counted(record, message, tmp_path):
    path = write(tmp_path / "a.jsonl", [QUESTIONS[0], record])
    with pytest.raises(DataError, match=message):
        source_of(QuestionAnswerSource(train_paths=(path,)))
    source = source_of(QuestionAnswerSource(train_paths=(path,), on_error="skip"))
    assert (source.example_count("train"), source.skipped_records) == (1, 1)


def test_a_file_of_broken_records_alone_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"x": "y"}])
    with pytest.raises(DataError, match=f"{path}: no record is an example of schema='gsm8k'"):
        source_of(QuestionAnswerSource(train_paths=(path,), on_error="skip"))


def test_gsm8k_itself(shared_data):
    config = QuestionAnswerSource(
        train_paths=(str(shared_data("gsm8k/train.jsonl")),), test_paths=(str(shared_data("gsm8k/test.jsonl")),)
    )
    source = source_of(config, sequence_length=256)
    assert (source.example_count("train"), source.example_count("test")) == (7473, 1319)
    first = source.examples("test")[0]
    assert first.prompt.startswith("Question: Janet’s ducks lay 16 eggs")
    assert first.final == "18"
    finals = [example.final for example in source.examples("train")]
    lines = shared_data("gsm8k/train.jsonl").read_text().splitlines()
    golds = [json.loads(line)["answer"].split("#### ")[1] for line in lines]
    assert all(float(final) == float(gold.replace(",", "")) for final, gold in zip(finals, golds, strict=True))
    assert source.skipped_records == 0


def test_the_papers_prompts_with_the_papers_tokenizer(shared_data):
    """The prompt is masked up to the answer; the prompt of each example ends in "Answer:" and no space follows."""
    config = QuestionAnswerSource(
        weight=0, test_paths=(str(shared_data("optimal_sparsity_taskloss/gsm8k_4shot.json")),), schema="prompt_answer",
        answer_separator="", packed=False, prompt_weight=0.0,
    )
    tokenizer = str(shared_data("tokenizers/llm-jp-tokenizer-100k.ver3.0b1.model"))
    source = source_of(config, sequence_length=2048, tokenizer=tokenizer)
    assert source.splits == ("test",)
    example = source.examples("test")[0]
    assert example.prompt.endswith("Answer:")
    assert example.final == "18"
    row = source.rows([0], "test")
    answer = load_tokenizer(tokenizer).decode(row["targets"][0][row["loss_weights"][0] == 1])
    assert answer == example.answer
