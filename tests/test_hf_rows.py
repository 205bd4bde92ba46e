"""Rows: what is refused, by row and column; a cut ends at a policy state."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from strategies import holds_for

from shiq_lab.batch import cut
from shiq_lab.hf.collator import collate, token_batch
from shiq_lab.hf.rows import SHOWN, Row, check_rows, cut_row

GOOD = Row([5, 1, 2, 3], [0, 1, 0, 1], [0.0, 0.5, 0.0, -1.0])
BAD = {
    "lengths of the mask": (replace(GOOD, completion_mask=[0, 1]), "completion_mask: expected 4 entries, as input_ids, got 2"),
    "lengths of the rewards": (replace(GOOD, rewards=[0.0] * 5), "rewards: expected 4 entries, as input_ids, got 5"),
    "no tokens": (Row([], [], []), "input_ids: expected at least two tokens"),
    "empty completion": (Row([1, 2], [0, 0], [0, 0]), "completion_mask: expected at least one action, a 1, got an empty"),
    "empty prompt": (
        Row([1, 2], [1, 1], [0, 0]),
        "completion_mask: expected 0 at the first token .* Put a beginning-of-sequence",
    ),
    "NaN": (replace(GOOD, rewards=[0, 0, 0, np.nan]), "rewards: expected finite numbers, got nan at token 3"),
    "infinite": (replace(GOOD, rewards=[0, -np.inf, 0, 0]), "rewards: expected finite numbers, got -inf at token 1"),
    "NaN off the actions": (replace(GOOD, rewards=[0, 0, np.nan, 0]), "rewards: expected finite numbers, got nan at token 2"),
    "paid off the actions": (replace(GOOD, rewards=[0, 0, 1, 0]), "rewards: expected 0 where completion_mask is 0.*token 2"),
    "token too large": (replace(GOOD, input_ids=[5, 1, 10, 3]), "input_ids: expected tokens from 0 to 9, got 10 at token 2"),
    "token below 0": (replace(GOOD, input_ids=[5, 1, -1, 3]), "input_ids: expected tokens from 0 to 9, got -1 at token 2"),
    "token beyond int64": (replace(GOOD, input_ids=[5, 1, 2**70, 3]), "input_ids: expected a list of whole numbers"),
    "mask of 2": (replace(GOOD, completion_mask=[0, 2, 0, 1]), "completion_mask: expected only 0 and 1, got 2 at token 1"),
    "mask of floats": (replace(GOOD, completion_mask=[0, 1.0, 0, 1]), "completion_mask: expected a list of 0 and 1, got .*1.0"),
    "float token": (replace(GOOD, input_ids=[5, 1.5, 2, 3]), "input_ids: expected a list of whole numbers, got .*1.5"),
    "token as text": (replace(GOOD, input_ids=[5, "1", 2, 3]), "input_ids: expected a list of whole numbers, got .*'1'"),
    "nested": (replace(GOOD, input_ids=[[5, 1, 2, 3]]), r"input_ids: expected a list of whole numbers, got list of shape"),
    "ragged": (replace(GOOD, rewards=[0, [1, 2], 0, 0]), "rewards: expected a list of numbers, got a ragged"),
    "reward as text": (replace(GOOD, rewards=["0", "0", "0", "1"]), "rewards: expected a list of numbers, got .*'0'"),
    "no list": (replace(GOOD, rewards=1.0), "rewards: expected a list of numbers, got float"),
    "terminated": (replace(GOOD, terminated=1), "terminated: expected True or False, got 1"),
    "weight below 0": (replace(GOOD, weight=-1.0), "weight: expected a finite number >= 0, got -1.0"),
    "weight NaN": (replace(GOOD, weight=np.nan), "weight: expected a finite number >= 0, got nan"),
    "weight as text": (replace(GOOD, weight="1"), "weight: expected a finite number >= 0, got '1'"),
    "group": (replace(GOOD, group=1.5), "group: expected a whole number, got 1.5"),
    "no row": ({"input_ids": [1, 2]}, ".all.: expected a Row, got dict"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_row_is_named_with_its_column(fault: str) -> None:
    row, message = BAD[fault]
    with pytest.raises(ValueError, match=f"^data row 2, column (?s:{message})"):
        check_rows([GOOD, GOOD, row, GOOD], vocabulary=10, name="data")
    check_rows([GOOD, GOOD, GOOD], vocabulary=10)


def test_arrays_and_numpy_numbers_are_as_good_as_lists() -> None:
    row = Row(np.array([5, 1], np.uint16), torch.tensor([0, 1]), np.array([0, 2], np.float32), np.bool_(True), np.float32(1))
    check_rows([row], vocabulary=np.int64(6))
    assert collate([row])["rewards"].tolist() == [[0.0, 2.0]]


def test_the_first_offenders_are_shown_and_the_rest_counted_whatever_block_they_are_in() -> None:
    rows = [GOOD] * 9000
    for i in (3, 4096, 4097, 5000, 8191, 8192, 8999):
        rows[i] = replace(GOOD, input_ids=[5, 1, 99, 3], rewards=[0, 0, 0, np.nan])  # two faults, one row
    with pytest.raises(ValueError) as error:
        check_rows(rows, vocabulary=10)
    *shown, last = str(error.value).split("\n")
    assert [int(line.split()[2].rstrip(",")) for line in shown] == [3, 4096, 4097, 5000, 8191] and len(shown) == SHOWN
    assert last == "... and 2 more rows."


def test_nothing_to_check_is_an_error() -> None:
    with pytest.raises(ValueError, match="train_dataset: expected at least one row, got none"):
        check_rows([], vocabulary=10)
    with pytest.raises(ValueError, match="vocabulary: expected a whole number >= 1"):
        check_rows([GOOD], vocabulary=0)


MASK = st.lists(st.integers(0, 1), min_size=1, max_size=9).filter(any)


@holds_for(60, MASK, st.integers(1, 11), st.booleans(), often={"cut": 0.3, "lost": 0.1, "whole": 0.2})
def test_cut_row_follows_the_rule_of_batches(tail: list[int], length: int, terminated: bool) -> list[str]:
    """The same row through `shiq_lab.batch.cut`, which is held against the automaton's states elsewhere."""
    mask = [0, *tail]
    row = Row(list(range(len(mask))), mask, [float(m * i) for i, m in enumerate(mask)], terminated, 2.0, 7)
    short = cut_row(row, length)
    truth = cut(token_batch(collate([row])), length)
    if short is None:
        assert not truth.completion_mask.any()
        return ["lost"]
    n = len(short)
    assert truth.attention_mask.sum() == n <= max(length, 1) and truth.terminated.item() == short.terminated
    assert truth.input_ids[0, :n].tolist() == short.input_ids and truth.completion_mask[0, :n].tolist() == short.completion_mask
    assert truth.rewards[0, :n].tolist() == short.rewards and (short.weight, short.group) == (2.0, 7)
    if n == len(row):
        assert short is row
        return ["whole"]
    assert not short.terminated and row.completion_mask[n] == 1  # the state after the cut is the policy's
    check_rows([short], vocabulary=20)
    return ["cut"]
