"""The ablation's studies: claims at fast settings, formulas by other roads, planted mistakes."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from shiq_lab.envs.needle import needle_string
from shiq_lab.learning import Trace, rows_of, world_of
from shiq_lab.objectives import lookup, stack
from shiq_lab.studies import ablation
from shiq_lab.studies.ablation import ABLATION, ABLATION_TINY, STEPS
from shiq_lab.studies.frame import Result, run

FAST = {**ABLATION.settings, **ABLATION.fast}
TREE = {"world": "Tree", "depth": 2}
NEEDLE = {"world": "Needle", "length": 4, "letters": 2}


@pytest.fixture(scope="module")
def tables() -> Result:
    return run(ABLATION, fast=True, cache=None)


def test_every_claim_holds_on_tables(tables: Result) -> None:
    assert len(tables.claims) == 8
    assert tables.passed, [(c.text, c.measured) for c in tables.claims if not c.holds]


def test_the_figure_draws(tables: Result) -> None:
    assert [a.get_title(loc="left") != "" for a in ABLATION.draw(tables).axes] == [True] * 3


@pytest.mark.slow
def test_every_claim_that_few_steps_can_show_holds_on_networks() -> None:
    """Fast settings train too little for what the network ends at; start, silence and read-out hold at once."""
    result = run(ABLATION_TINY, fast=True, cache=None)
    held = [c.holds for c in result.claims]
    assert held[:3] == [True] * 3 and held[-1], [(c.text, c.measured) for c in result.claims]
    assert len(ABLATION_TINY.draw(result).axes) == 3


def test_the_behavior_stays_on_the_string() -> None:
    """Every letter of the rewarded string with chance 1 - 1/T, whatever the reference likes."""
    for seed in range(10):
        world = world_of(*ablation.environment({**NEEDLE, "length": 8}, seed))
        behavior = np.exp(ablation.behavior_of(world, {**NEEDLE, "length": 8}))
        state = int(world.starts[0])
        for token in needle_string(8, 2, seed):
            assert behavior[state, token] == pytest.approx(7 / 8)
            state = world.mdp.next_state[state, token]
        assert state == -1


def test_the_same_seed_gives_the_same_numbers() -> None:
    case = {**NEEDLE, "loss": "ShiQ"}
    assert ablation.measure(FAST, case, 1) == ablation.measure(FAST, case, 1)
    assert ablation.measure(FAST, case, 1) != ablation.measure(FAST, case, 0)


@pytest.mark.parametrize("case", [TREE, NEEDLE], ids=lambda c: c["world"])
@pytest.mark.parametrize("loss", STEPS)
def test_the_hessian_is_that_of_the_loss(case: dict[str, Any], loss: str) -> None:
    """By autograd, twice through the loss on the rows at its own optimum; for steps 0, 1 and 2 it is one matrix.

    Rounding: some hundred terms below 10 a sum, hence 1e-12.
    """
    world = world_of(*ablation.environment(case, 3))
    behavior = ablation.behavior_of(world, case)
    rows = rows_of(world, behavior)
    subject, edges = lookup(loss), world.edges
    best = subject.optimum(world)
    point = stack(world, best[None], torch.zeros(1, world.mdp.n_states).double(), torch.tensor(np.array(behavior))[None])

    def value(x: torch.Tensor) -> torch.Tensor:
        table = best.index_put((edges[:, 0], edges[:, 1]), x)
        return subject.loss(point.at(table, point.values))

    seen = torch.autograd.functional.hessian(value, best[edges[:, 0], edges[:, 1]])
    np.testing.assert_allclose(ablation.hessian(world, rows, multi_step=loss == "ShiQ"), seen, atol=1e-12)
    assert np.abs(ablation.hessian(world, rows, multi_step=loss != "ShiQ") - seen.numpy()).max() > 1e-3


def test_the_start_by_hand() -> None:
    """Plain loops over the tree of two letters' worth of tokens: q_hat and v_hat at l_ref, token by token."""
    world = world_of(*ablation.environment(TREE, 0))
    mdp, found = world.mdp, ablation.readouts(world)
    for s in np.flatnonzero(mdp.is_policy):
        logits = {a: mdp.ref_logits[s, a] for a in np.flatnonzero(mdp.allowed[s])}
        total = sum(math.exp(x) for x in logits.values())
        joint = sum(math.exp(x) / total * math.exp(x) for x in logits.values())
        assert found["naive"][1][s] == pytest.approx(world.beta * math.log(joint), abs=1e-13)
        assert found["easy"][1][s] == pytest.approx(world.beta * math.log(total), abs=1e-13)
        for a, x in logits.items():
            assert found["naive"][0][s, a] == pytest.approx(world.beta * x, abs=1e-13)
            log_policy = math.log(math.exp(x) / total)
            assert found["easy"][0][s, a] == pytest.approx(world.beta * (x - log_policy), abs=1e-13)
            assert found["ShiQ"][0][s, a] == 0


def test_nothing_is_paid_in_the_silent_world() -> None:
    world = world_of(*ablation.environment({"world": "silent", "depth": 2}, 0))
    assert world.mdp.reward.any() == False and world.solution.objective == pytest.approx(0, abs=1e-15)  # noqa: E712
    assert world_of(*ablation.environment(TREE, 0)).mdp.reward.any()


# ------------------------------------------------------------------------------------------------------ planted mistakes
def failed(result: Result) -> str:
    return " ".join(c.text for c in result.claims if not c.holds)


@pytest.mark.slow
def test_multi_step_that_is_one_step_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss called ShiQ bootstraps after one token: what it is to win is not won."""
    right = ablation.descend

    def wrong(loss: str, *args: Any, **more: Any) -> Trace:
        return right(STEPS[2] if loss == "ShiQ" else loss, *args, **more)

    monkeypatch.setattr(ablation, "descend", wrong)
    text = failed(run(ABLATION, fast=True, seeds=1, cache=None))
    for part in ("ShiQ needs the fewest", "leaves the first letter's logits"):
        assert part in text


@pytest.mark.slow
def test_a_silent_world_that_pays_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "silent", lambda mdp: mdp)
    assert "nothing is paid" in failed(run(ABLATION, fast=True, seeds=1, cache=None))
