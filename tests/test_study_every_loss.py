"""Every loss on a network: what is expected follows from the table of fixed points, and a claim can fail."""

from typing import Any

import numpy as np
import pytest
import torch

from shiq_lab.envs import make
from shiq_lab.fixed_points import predict, worlds
from shiq_lab.learning import rows_of, world_of
from shiq_lab.objectives import fields, lookup, subjects
from shiq_lab.policies import uniform_policy
from shiq_lab.studies.every_loss import EVERY_LOSS, PLAIN, SAME, cases, expected
from shiq_lab.studies.frame import Record, run

SINGLES = [s for s in subjects() if not s.twos and s.name not in SAME]


def test_every_loss_of_single_rows_is_there() -> None:
    off = [c["loss"] for c in cases({}) if not c["own"]]
    assert off == [s.name for s in SINGLES] and len(off) + len(SAME) == sum(not s.twos for s in subjects())


@pytest.mark.parametrize("name", [s.name for s in SINGLES])
def test_expectations_are_the_fixed_point_tables(name: str) -> None:
    """pi* is expected where theory has its gradient vanish on foreign, or on its own, data of a deterministic world."""
    loss = lookup(name)
    for own, behavior in ((False, "uniform"), (True, "on-policy")):
        keeps = predict(loss.theory, worlds()[0], behavior)
        if name not in ("SFT", "semi-gradient, through the value"):
            assert (expected(loss, own) != "neither") is keeps
    assert (expected(loss, False) == "q*") <= (loss.level == "all")


@pytest.mark.parametrize("name", SAME)
def test_what_is_left_out_is_another_loss_by_name_alone(name: str) -> None:
    """On one prompt: the same expected gradient at a table of no meaning."""
    mdp = make("Tree", depth=2, n_tokens=3)
    world = world_of(mdp, 1.0)
    assert len(rows_of(world, uniform_policy(mdp))) == 9
    table, values = world.elsewhere[None], torch.zeros(1, mdp.n_states, dtype=torch.float64)
    first, second = (fields(lookup(x), world, table, values, world.policies["uniform"][None])[0] for x in (name, SAME[name]))
    assert float((first - second).abs().max()) <= 4 * world.bound(table)


def planted(**changes: dict[str, float]) -> list[Record]:
    """Numbers as theory has them, but for some losses."""
    sizes = {"q*": (1e-9, 1e-4), "pi*": (1e-6, 0.5), "neither": (0.5, 0.5)}
    records = []
    for case in cases({}):
        kl, q = sizes[expected(lookup(case["loss"]), case["own"])]
        numbers: dict[str, Any] = {"kl": kl, "q_error": q, "v_error": q, "kl_before": 1.0}
        records += [Record(case, seed, {**numbers, **changes.get(case["loss"], {})}) for seed in range(4)]
    return records


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, []),
        ({"CoPG": {"kl": 0.1}}, [0]),
        ({"TOPR": {"kl": 1e-3}}, [1]),
        ({PLAIN: {"kl": 1e-3}}, [1]),
        ({"ShiQ": {"q_error": 0.2}}, [2]),
        ({"AGRO": {"q_error": 0.01}}, [3]),
    ],
)
def test_each_claim_can_fail(changes: dict[str, dict[str, float]], failed: list[int]) -> None:
    found = EVERY_LOSS.claims({}, EVERY_LOSS.summarise({}, planted(**changes)))
    assert [i for i, claim in enumerate(found) if not claim.holds] == failed


@pytest.mark.slow
def test_the_claims_hold_on_a_small_tree() -> None:
    result = run(EVERY_LOSS, fast=True, cache=None)
    assert result.passed, [c for c in result.claims if not c.holds]
    assert np.isfinite([r.numbers["kl"] for r in result.records]).all()
