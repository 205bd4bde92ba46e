"""The fixed-point table: everything as theory says, its machinery against other roads, and planted mistakes that it catches."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from strategies import EPS
from test_relatives import exact_slopes
from torch import Tensor

from shiq_lab import cli, enumerate_trajectories, objectives, solve
from shiq_lab import fixed_points as fp
from shiq_lab.enumeration import count_trajectories
from shiq_lab.facts import Case, bias_formulas, expected_gradient
from shiq_lab.fixed_points import Row, Subject, World, fields, jacobian_of, measure, subjects, worlds
from shiq_lab.losses import consistency, policy_gradient, preference, shiq

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
DETERMINISTIC = next(w for w in worlds() if (w.name, w.rewards, w.gamma) == ("deterministic", "dense", 0.8))
RANDOM = next(w for w in worlds() if (w.name, w.rewards, w.gamma) == ("random replies", "dense", 0.8))
SINGLE = next(w for w in worlds() if w.name == "one token")


def subject(name: str) -> Subject:
    return next(s for s in subjects() if s.name == name)


def complaints(rows: list[Row]) -> list[Row]:
    return [r for r in rows if not r.holds]


# ------------------------------------------------------------------------------------------------------- the table itself
@pytest.mark.parametrize("world", [DETERMINISTIC, RANDOM, SINGLE], ids=lambda w: w.name)
def test_every_loss_is_as_theory_says(world: World) -> None:
    rows = [row for s in subjects() for row in measure(s, world)]
    assert len(rows) == 4 * len(subjects()) and not complaints(rows)


@pytest.mark.slow
def test_the_whole_table_is_as_theory_says() -> None:
    """Every loss, world and behaviour; a yes is far below its bound and a no far above, and foreign behaviours agree."""
    rows = fp.table()
    assert len(rows) == 36 * len(subjects()) and not complaints(rows)
    assert max(r.gradient / r.bound for r in rows if r.predicted) < 0.1
    assert min(r.gradient / r.bound for r in rows if not r.predicted) > 10 * fp.APART
    assert not [line for line in fp.summary(rows) if {"mixed", "unclear"} & set(line.cells)]
    assert all(r.least is None or r.least > 0 for r in rows)


@pytest.mark.slow
def test_the_document_is_up_to_date() -> None:
    text = (ROOT / "docs" / "fixed_points.md").read_text(encoding="utf-8")
    assert text == fp.to_markdown(fp.table()), "write fixed_points.to_markdown(fixed_points.table()) to docs/fixed_points.md"


def test_the_document_says_what_theory_says() -> None:
    """A line a loss, each cell's first word as predicted: without measuring anything."""
    lines = (ROOT / "docs" / "fixed_points.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]
    assert [row[0] for row in table] == [s.name for s in subjects()]
    first = {w.name: w for w in reversed(worlds())}
    for row, s in zip(table, subjects(), strict=True):
        for cell, (name, own) in zip(row[1:7], fp.COLUMNS, strict=True):
            behavior = "on-policy" if own else "random"
            assert (cell[:3] == "yes") is fp.predict(s.theory, first[name], behavior), (s.name, name, own, cell)
        pinned = [
            x for x in (fp.predicted_fixes(s, first[name]) for name in ("deterministic", "random replies", "one token")) if x
        ]
        assert row[7] == (pinned[0] if pinned else "-")


def test_all_that_the_issue_names_is_there() -> None:
    names = " ".join(s.name for s in subjects())
    for word in ("DPO", "IPO", "CoPG", "AGRO", "DRO-V", "REINFORCE", "RLOO", "GRPO", "PCL", "TBRM", "A*-PO", "TOPR", "SFT",
                 "k1", "k2", "k3", "naive", "easy", "shifted", "ShiQ", "sequence", "semi-gradient", "turn-cut"):  # fmt: skip
        assert word in names
    assert len({s.name for s in subjects()}) == len(subjects())


# --------------------------------------------------------------------------------------------------------------- worlds
@pytest.mark.parametrize("world", worlds(), ids=lambda w: f"{w.name}-{w.rewards}-{w.gamma}")
def test_worlds_are_generic(world: World) -> None:
    """All states reached, levels unlike, prompts unlike in value, unequal lengths, the rows all there with their chances."""
    mdp = world.mdp
    assert mdp.reachable.all() and len(world.rows) == count_trajectories(mdp)
    level = mdp.ref_logsumexp[mdp.is_policy]
    assert np.abs(np.subtract.outer(level, level) + np.eye(len(level))).min() > 1e-3
    values = world.solution.v()[world.starts.numpy()]
    assert len(values) == 2 and abs(values[0] - values[1]) > 0.1
    assert mdp.deterministic is (world.name != "random replies")
    rewards = mdp.reward[mdp.allowed & mdp.is_policy[:, None] & (mdp.next_state >= 0)]
    assert (rewards == 0).all() if world.rewards == "terminal" else len(set(rewards.tolist())) == len(rewards)
    lengths = world.rows.completion_mask.sum(1)
    assert (int(lengths.min()), int(lengths.max())) == ((1, 1) if world.name == "one token" else (1, 5))
    for name, policy in world.policies.items():
        listed = enumerate_trajectories(mdp, behavior=policy.numpy())
        point = objectives.stack(world, objectives._l_star(world)[None], torch.zeros(1, mdp.n_states), policy[None])
        assert torch.equal(listed.input_ids, point.batch.input_ids)
        assert float((listed.weights - point.batch.weights).abs().max()) <= 64 * EPS, name
        assert float(point.batch.weights.min()) > 0


def test_behaviours_are_unlike() -> None:
    tables = torch.stack([torch.exp(p) for p in RANDOM.policies.values()])
    assert len(tables) == len(fp.BEHAVIORS)
    apart = (tables[:, None] - tables[None]).abs().amax((2, 3)) + torch.eye(len(tables))
    assert float(apart.min()) > 0.2
    best = torch.exp(torch.tensor(RANDOM.solution.log_policy()))
    assert float((tables[0] - best).abs().max()) <= 64 * EPS


# ---------------------------------------------------------------------------------------------------- the second roads
@pytest.mark.parametrize("world", [DETERMINISTIC, RANDOM], ids=lambda w: w.name)
def test_stacked_gradients_equal_single_ones(world: World) -> None:
    """Every copy's gradient is that of a listing of its own behaviour, one loss at a time, at tables of no meaning."""
    rng = np.random.default_rng(0)
    tables = world.elsewhere + torch.tensor(rng.normal(size=(3, *world.elsewhere.shape)))
    behaviors = torch.stack([world.policies[n] for n in ("random", "uniform", "reference")])
    values = torch.tensor(rng.normal(size=(3, world.mdp.n_states)))
    v = torch.tensor(world.solution.v())
    plain: dict[str, Callable[..., Tensor]] = {
        "ShiQ": lambda s, r, b, k, **o: shiq.shiq_loss(s, r, b, **o),
        "naive": lambda s, r, b, k, **o: shiq.naive_loss(s, r, b, **o),
        "A*-PO": lambda s, r, b, k, **o: consistency.a_star_loss(s, r, b, v_star=v[b.known_states()[:, 0]], **o),
        "PCL": lambda s, r, b, k, **o: consistency.pcl_loss(s, r, b, values=values[k][b.known_states().clamp(min=0)], **o),
        "RLOO": lambda s, r, b, k, **o: policy_gradient.rloo_loss(s, r, b, population=True, **o),
        "RLOO, groups of 2": lambda s, r, b, k, **o: policy_gradient.rloo_loss(s, r, b, population=True, **o),
        "DPO, Bradley-Terry labels": lambda s, r, b, k, **o: preference.dpo_pairs_loss(s, r, b, **o),
    }
    for name, loss in plain.items():
        found, _ = fields(subject(name), world, tables, values, behaviors)
        for k in range(3):
            case = Case(world.mdp, world.beta, world.gamma, policy=behaviors[k].numpy())
            ref = case.stats(case.ref, case.batch)
            options = {"beta": world.beta, "gamma": world.gamma, "reduction": "sum"}
            single = case.gradient(
                torch.where(torch.tensor(np.array(world.mdp.allowed)), tables[k], -torch.inf),
                lambda t, k=k: loss(case.stats(t, case.batch), ref, case.batch, k, **options),  # noqa: B023
            )
            assert float((found[k] - single).abs().max()) <= world.bound(tables) * (1 + float(single.abs().max())), (name, k)
            assert float(single.abs().max()) > 1e-3


@pytest.mark.parametrize("behavior", fp.BEHAVIORS)
def test_the_bias_of_random_replies_is_the_formulas(behavior: str) -> None:
    """F9's closed form, and the recursion that never lists, give the table's "no" of the derivation."""
    names = {"naive": "naive", "easy": "easy", "shifted": "shifted, one step", "shiq": "ShiQ", "sequence": "sequence only"}
    case = Case(RANDOM.mdp, RANDOM.beta, RANDOM.gamma, policy=RANDOM.policies[behavior].numpy())
    formulas = bias_formulas(case)
    for key, name in names.items():
        s = subject(name)
        best = s.optimum(RANDOM)
        v = torch.zeros(1, RANDOM.mdp.n_states)
        found, _ = fields(s, RANDOM, best[None], v, RANDOM.policies[behavior][None])
        for other in (formulas[key], expected_gradient(case, key)):
            assert np.abs(found[0].numpy() - other).max() <= RANDOM.bound(best[None])


def test_the_jacobian_is_the_hessian_of_a_true_loss() -> None:
    """Fixed data and no stopped gradient: differentiating twice by autograd, for a loss with values too."""
    for name in ("ShiQ", "sequence only", "DPO, Bradley-Terry labels", "DRO-V", "PCL"):
        s, world = subject(name), DETERMINISTIC
        found, noise = jacobian_of(s, world, follow=False)
        edges = world.edges
        states = {None: edges[:0, 0], "start": world.starts, "states": torch.cat([world.starts, world.inner])}[s.values]
        best = torch.where(torch.tensor(np.array(world.mdp.allowed)), s.optimum(world), -torch.inf)
        v = torch.tensor(world.solution.v())

        def loss(x: Tensor, s: Any = s, world: Any = world, best: Any = best, v: Any = v, states: Any = states) -> Tensor:
            table = best.index_put((world.edges[:, 0], world.edges[:, 1]), x[: len(world.edges)])
            values = v.index_put((states,), x[len(world.edges) :])
            return s.loss(objectives.stack(world, table[None], values[None], world.policies["random"][None]))

        point = torch.cat([best[edges[:, 0], edges[:, 1]], v[states]])
        wanted = torch.autograd.functional.hessian(loss, point).numpy()
        assert np.abs(found - wanted).max() <= noise
        assert np.abs(wanted).max() > 1e3 * noise


def test_the_jacobian_follows_the_policy() -> None:
    """REINFORCE's field on its own data is -d J everywhere: its Jacobian against differences of the policy gradient theorem,
    which knows no listing; without following the data it is another matrix."""
    world = DETERMINISTIC
    case = Case(world.mdp, world.beta, world.gamma)
    best, edges = objectives._l_star(world).numpy(), world.edges.numpy()
    step = 1e-4
    wanted = np.zeros((len(edges), len(edges)))
    for j, (state, token) in enumerate(edges):
        ends = []
        for sign in (1, -1):
            table = best.copy()
            table[state, token] += sign * step
            log_policy = torch.tensor(table).log_softmax(1).numpy()
            log_policy = np.where(world.mdp.is_policy[:, None], log_policy, world.mdp.ref_log_policy)
            ends.append(-exact_slopes(case, log_policy, 1.0, world.beta)[edges[:, 0], edges[:, 1]])
        wanted[:, j] = (ends[0] - ends[1]) / (2 * step)
    found, noise = jacobian_of(subject("REINFORCE, KL in the reward"), world, follow=True)
    assert np.abs(found - wanted).max() <= noise + 10 * step**2  # second order, third derivatives of a few units
    fixed, _ = jacobian_of(subject("REINFORCE, KL in the reward"), world, follow=False)
    assert np.abs(fixed - wanted).max() > 1e-2


def test_null_directions_leave_the_loss_alone() -> None:
    """What is called free is free far away too: a loss of the policy alone has zero gradient along the whole line."""
    for name, states in (("DPO, Bradley-Terry labels", "all"), ("sequence only", "inner"), ("TBRM", "inner")):
        s, world = subject(name), DETERMINISTIC
        far = s.optimum(world).clone()
        shift = torch.tensor(np.random.default_rng(1).normal(0, 2, world.mdp.n_states))
        if states == "inner":
            shift[world.starts] = 0
        far += shift[:, None]
        found, _ = fields(s, world, far[None], torch.zeros(1, world.mdp.n_states), world.policies["random"][None])
        assert float(found.abs().max()) <= world.bound(far[None])
    moved = objectives._l_star(DETERMINISTIC) + shift[:, None]
    found, _ = fields(
        subject("ShiQ"), DETERMINISTIC, moved[None], torch.zeros(1, DETERMINISTIC.mdp.n_states),
        DETERMINISTIC.policies["random"][None],
    )  # fmt: skip
    assert float(found.abs().max()) > 1e-2


# -------------------------------------------------------------------------------------------------- claims beyond a cell
SEQUENCE_LEVEL = [s.name for s in subjects() if s.theory in ("path", "deterministic") and s.level == "none" and not s.twos
                  and s.name != "PCL, one step"]  # fmt: skip


@pytest.mark.parametrize("name", SEQUENCE_LEVEL)
def test_discounting_rewards_alone_moves_the_optimum(name: str) -> None:
    """gamma < 1 with log-ratios that are not discounted: every "yes" of a sequence-level loss off its own data is lost."""
    s, world = subject(name), DETERMINISTIC
    best, v = s.optimum(world)[None], torch.tensor(world.solution.v())[None]
    behavior = world.policies["random"][None]

    class Undiscounted(World):
        """The same rows, paid gamma^k r_k already, for a loss that is told gamma = 1."""

    place = (world.rows.completion_mask.cumsum(1) - 1).clamp(min=0)
    rows = replace(world.rows, rewards=world.rows.rewards * world.gamma**place)
    wrong = Undiscounted(world.name, world.rewards, 1.0, world.mdp, world.beta)
    wrong.__dict__.update(rows=rows, solution=world.solution)
    right, _ = fields(s, world, best, v, behavior)
    moved, _ = fields(s, wrong, best, v, behavior)
    assert float(right.abs().max()) <= world.bound(best)
    assert float(moved.abs().max()) >= fp.APART * world.bound(best)


def test_the_mean_with_oneself_doubles_beta() -> None:
    """Groups of G with oneself in the mean and the KL's true gradient: pi* of beta G / (G - 1) is stationary on own data."""
    s = subject("GRPO, groups of 2, mean with oneself, true KL gradient")
    for world in (DETERMINISTIC, RANDOM, SINGLE):
        twice = solve(world.mdp, beta=2 * world.beta, gamma=world.gamma)
        table, own = torch.tensor(twice.optimal_logits())[None], torch.tensor(twice.log_policy())[None]
        found, _ = fields(s, world, table, torch.zeros(1, world.mdp.n_states), own)
        assert float(found.abs().max()) <= world.bound(table)


def test_k1_in_the_loss_forgets_beta() -> None:
    """The expected gradient on own data is the same at any beta: the KL has no effect."""
    world, s = DETERMINISTIC, subject("REINFORCE, k1 in the loss")
    v = torch.zeros(1, world.mdp.n_states)
    table = objectives._l_star(world)[None]
    own = world.policies["on-policy"][None]
    louder = World(world.name, world.rewards, world.gamma, world.mdp, beta=50.0)
    one, other = (fields(s, w, table, v, own)[0] for w in (world, louder))
    assert float((one - other).abs().max()) <= louder.bound(table)
    k2 = subject("REINFORCE, k2 in the loss")
    one, other = (fields(k2, w, table, v, own)[0] for w in (world, louder))
    assert float((one - other).abs().max()) > 1.0


def test_a_wrong_value_is_no_harm_on_its_own_data_alone() -> None:
    """The harm of A*-PO's wrong V* grows in proportion to how wrong it is, and is none on data of pi*."""
    world, rows = DETERMINISTIC, []
    for wrong in (0.5, 1.0):
        loss = objectives._of(consistency.a_star_loss, v_star=lambda p, w=wrong: p.v_star + w)
        rows.append(measure(Subject("A*-PO", loss, "on-policy"), world))
        assert not complaints(rows[-1])
    for half, whole in zip(*rows, strict=True):
        assert abs(2 * half.gradient - whole.gradient) <= 4 * whole.bound


# ------------------------------------------------------------------------------------------------------- planted mistakes
def planted() -> dict[str, tuple[Subject, World, str]]:
    flip = lambda p: policy_gradient.reinforce_loss(  # noqa: E731
        p.stats(), p.ref, replace(p.batch, rewards=-p.batch.rewards), baseline=p.v_star, **p.options
    )
    levelled = lambda p: preference.dpo_pairs_loss(p.stats(), p.ref, p.batch, **p.options) + (  # noqa: E731
        p.stats().logsumexp.sum(1) * p.batch.weights
    ).sum() * 0.1  # fmt: skip
    halved = lambda p: shiq.shiq_loss(p.stats(), p.ref, p.batch, **{**p.options, "beta": p.world.beta / 2})  # noqa: E731
    stopped = lambda p: shiq.shiq_loss(p.stats().detach(), p.ref, p.batch, **p.options) + 0 * p.tables.sum()  # noqa: E731
    return {
        "a sign": (Subject("x", flip, "path"), DETERMINISTIC, "stationary"),
        "beta": (Subject("x", halved, "path", "all"), DETERMINISTIC, "stationary"),
        "a wrong theory": (replace(subject("ShiQ"), theory="always"), RANDOM, "stationary"),
        "a yes called no": (replace(subject("turn-cut"), theory="path"), RANDOM, "stationary"),
        "a level": (Subject("x", levelled, "deterministic"), DETERMINISTIC, "sees"),
        "inner levels": (replace(subject("sequence only"), level="all"), DETERMINISTIC, "sees"),
        "nothing learned": (Subject("x", stopped, "always", "none"), DETERMINISTIC, "fixes"),
        "one number a state": (replace(subject("semi-gradient, through the value"), fixes=""), DETERMINISTIC, "fixes"),
        "values": (replace(subject("PCL, one step"), value_theory="always"), RANDOM, "value"),
        "optimum": (replace(subject("TBRM"), optimum=objectives._l_star), DETERMINISTIC, "stationary"),
    }


@pytest.mark.parametrize("mistake", planted())
def test_a_planted_mistake_is_caught(mistake: str) -> None:
    """By what it should be caught: the gradient, the levels seen, or what is pinned down."""
    wrong, world, how = planted()[mistake]
    found = complaints(measure(wrong, world))
    assert found
    caught = {
        "stationary": any(r.stationary is not r.predicted for r in found),
        "sees": any(r.sees != r.sees_predicted for r in found),
        "fixes": any(r.fixes != r.fixes_predicted for r in found),
        "value": any(r.value_stationary is not r.value_predicted for r in found),
    }
    assert caught[how]
    if how == "fixes":
        assert {r.fixes for r in found} == {fp.NOTHING if mistake == "nothing learned" else fp.ONE_A_STATE}
    line = fp.summary(found)[0]
    assert not line.holds


ROW = Row("x", "deterministic", "dense", 1.0, "random", 1e-15, None, 1e-12, True, None, "none", "none", "pi*", "pi*")


@pytest.mark.parametrize(
    ("change", "stationary", "holds", "cell"),
    [
        ({}, True, True, "yes"),
        ({"gradient": 1e-3}, False, False, "no (1e-03)"),
        ({"gradient": 1e-3, "predicted": False}, False, True, "no (1e-03)"),
        ({"gradient": 1e-9}, None, False, "unclear"),
        ({"gradient": 1e-9, "predicted": False}, None, False, "unclear"),
        ({"gradient": float("nan")}, None, False, "unclear"),
        ({"sees": "all"}, True, False, "yes"),
        ({"fixes": None}, True, False, "yes"),
        ({"value_gradient": 1e-3, "value_predicted": False}, True, True, "yes, its V not"),
        ({"value_gradient": 1e-3, "value_predicted": True}, True, False, "yes, its V not"),
    ],
)
def test_a_row_in_between_is_neither(change: dict[str, Any], stationary: bool | None, holds: bool, cell: str) -> None:
    row = replace(ROW, **change)
    assert row.stationary is stationary and row.holds is holds
    assert fp.summary([row])[0].cells[1] == cell
    other = replace(ROW, behavior="uniform", gradient=1e-3)
    if stationary:
        assert fp.summary([row, other])[0].cells[1] == "mixed"


# --------------------------------------------------------------------------------------------------------- command line
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["shiq-lab", "selftest", "--table", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    text = capsys.readouterr()
    return code, text.out, text.err


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 0 and a line a loss where all is as predicted, exit 1 and the row where not; strict JSON with every number."""
    few = (subject("ShiQ"), subject("SFT"))
    monkeypatch.setattr(fp, "subjects", lambda: few)
    monkeypatch.setattr(fp, "_table", lambda: tuple(r for s in few for w in (RANDOM, SINGLE) for r in measure(s, w)))
    code, text, _ = call(monkeypatch, capsys)
    assert code == 0 and "16/16 expected gradients as theory predicts" in text and "ShiQ" in text and "nothing" in text
    code, text, _ = call(monkeypatch, capsys, "--json")
    found = json.loads(text)
    assert code == 0 and found["passed"] and len(found["rows"]) == 16
    assert {"loss", "gradient", "bound", "stationary", "predicted", "fixes", "holds"} <= set(found["rows"][0])
    wrong = tuple(replace(r, predicted=not r.predicted) for r in fp._table())
    monkeypatch.setattr(fp, "_table", lambda: wrong)
    code, text, _ = call(monkeypatch, capsys)
    assert code == 1 and "not as predicted" in text and "FELL SHORT" in text and "0/16" in text
    assert call(monkeypatch, capsys, "--json")[0] == 1


def test_the_table_takes_no_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, text = call(monkeypatch, capsys, "--env", "Tree")
    assert code == 2 and "--env: expected nothing beside --table" in text
    code, _, text = call(monkeypatch, capsys, "--figure", "x.png")
    assert code == 2 and "--figure: expected nothing beside --table" in text


def test_an_empty_table_has_not_passed() -> None:
    assert fp.to_json([])["passed"] is False
