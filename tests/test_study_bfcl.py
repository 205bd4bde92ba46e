"""The tool-calling study: its AUC by hand, what it says of either outcome, and a small run of all of it."""

from typing import Any

import numpy as np
import pytest

from shiq_lab.studies import bfcl as study
from shiq_lab.studies.frame import Record, Result, Settings, plain

SETTINGS: Settings = {**study.BFCL.settings, "train": 3, "held_out": 8}


def row(entry: int, kind: str, right: bool, implied: float, reference: float, dv: float = 0.25) -> dict[str, Any]:
    return {"entry": f"e{entry}", "kind": kind, "right": right, "rewards": [float(right)], "reference": reference,
            "policy": reference, "implied": implied, "length": 7 + right, "dv": dv}  # fmt: skip


def numbers(sign: float, **changes: Any) -> dict[str, Any]:
    """Eight entries in which the implied return ranks perfectly (sign 1), never (-1), or is all ties (0)."""
    rows = []
    for entry in range(8):
        at_random = 0.5 if entry % 2 else -0.5
        rows += [
            row(entry, "truth", True, sign, at_random), row(entry, "repeated call", True, sign, at_random),
            row(entry, "empty turn", False, -sign, 0.0), row(entry, "wrong argument", False, -sign, 0.0),
        ]  # fmt: skip
    return {"rows": rows, "train_loss": [3.0, 2.0, 1.5], "held_loss": [3.0, 2.0], "largest_before": 1e-6, "train_entries": 3,
            "train_rows": 12, "train_tokens": 900, "longest": 300, **changes}  # fmt: skip


def told(sign: float, **changes: Any) -> Result:
    records = [Record({"loss": "ShiQ"}, 0, plain(numbers(sign, **changes)))]
    summary = plain(study.summarise(SETTINGS, records))
    claims = study.claims(SETTINGS, summary)
    return Result("bfcl", study.BFCL.title, study.BFCL.question, SETTINGS, {}, records, summary, claims)


def test_auc_by_hand() -> None:
    """Right 1 and 3 against wrong 1 and 2: a tie (1/2), a loss, two wins: 2.5 of 4."""
    rows = [{"right": r, "kind": k, "x": x} for r, k, x in ((1, "a", 1), (1, "a", 3), (0, "b", 1), (0, "c", 2))]
    assert study.auc(rows, "x") == 2.5 / 4
    assert study.auc(rows, "x", "b") == 1.5 / 2 and study.auc(rows, "x", "c") == 1 / 2
    assert study.auc(rows[:2], "x") is None and study.auc(rows, "x", "none") is None


OUTCOMES = [(1, 1.0, "ranks better than the reference"), (-1, 0.0, "ranks worse than"), (0, 0.5, "Null result")]


@pytest.mark.parametrize(("sign", "value", "says"), OUTCOMES)
def test_either_outcome_is_told(sign: float, value: float, says: str) -> None:
    result = told(sign)
    known = result.summary["auc"]
    assert known["implied"]["value"] == value and known["reference"]["value"] == 0.5 and known["length"]["value"] == 1.0
    assert says in result.claims[0].text and result.passed
    assert "Null result" in result.claims[1].text
    assert ("is above" in result.claims[3].text) == (sign > 0)


@pytest.mark.parametrize("changes", [
    {"largest_before": 0.1}, {"train_entries": 2}, {"held_loss": [3.0, float("inf")]}])  # fmt: skip
def test_a_broken_run_does_not_pass(changes: dict[str, Any]) -> None:
    records = [Record({"loss": "ShiQ"}, 0, numbers(1, **changes))]
    assert not all(claim.holds for claim in study.claims(SETTINGS, study.summarise(SETTINGS, records)))


def test_rows_of_one_entry_share_their_first_value() -> None:
    rows = numbers(1)["rows"]
    rows[1]["dv"] += 0.1
    result = told(1, rows=rows)
    assert [claim.holds for claim in result.claims].count(False) == 1


def test_the_full_run_is_as_large_as_asked() -> None:
    settings = study.BFCL.settings
    assert settings["train"] >= 60 and settings["held_out"] >= 40 and settings["turns"] >= 2


def test_it_is_drawn() -> None:
    page = study.draw(told(1))
    assert len(page.axes) == 3 and len(page.axes[1].containers) == len(study.SCORES)


# ------------------------------------------------------------------------------------------------------- a run, in small
@pytest.mark.slow
def test_a_small_run() -> None:
    """A tiny model of random weights: the whole of it, twice the same; training and held-out entries are apart."""
    pytest.importorskip("transformers")
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from shiq_lab.hf import smollm

    tokenizer = AutoTokenizer.from_pretrained(smollm.unpacked())
    settings = {**study.BFCL.settings, **study.BFCL.fast, "train": 6, "held_out": 4, "rate": 0.1}
    (_, train), (held, about) = study.data(tokenizer, settings, 0)
    assert not {x["entry"] for x in train} & {x["entry"] for x in about} and len({x["entry"] for x in about}) == 4
    for one, known in zip(held, about, strict=True):
        assert one.group >= 0 and sorted(filter(None, one.rewards)) == sorted(filter(None, known["rewards"]))
        assert known["right"] == all(known["rewards"]) and len(one) <= settings["tokens"]

    def once() -> dict[str, Any]:
        torch.manual_seed(0)
        small = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                            num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
        return study.run(LlamaForCausalLM(small), tokenizer, settings, 0)

    first, state = once(), torch.get_rng_state()
    assert plain(first) == plain(once()) and torch.equal(torch.get_rng_state(), state)
    summary = study.summarise(settings, [Record({"loss": "ShiQ"}, 0, first)])
    assert all(claim.holds for claim in study.claims(settings, summary))
    assert len(first["train_loss"]) == -(-first["train_rows"] // settings["batch"])
    assert any(abs(r["implied"]) > 10 * study.ROUNDING for r in first["rows"]), "nothing was learned"
    # The other road to the loss before training: Dv and log-ratios are 0, so rho at t is minus the reward to go.
    squares = [sum(sum(one.rewards[t:]) ** 2 for t, acts in enumerate(one.completion_mask) if acts) for one in held]
    assert first["held_loss"][0] == pytest.approx(np.mean(squares), rel=1e-5)  # float32 sums of some hundred numbers
