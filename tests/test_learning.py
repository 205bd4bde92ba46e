"""Training by any loss: a step is the exact expected gradient, runs end where theory says, equal seeds are equal."""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from shiq_lab import enumerate_trajectories, evaluate, make, solve, tiny
from shiq_lab.fixed_points import worlds
from shiq_lab.learning import Table, Trace, descend, rows_of, world_of
from shiq_lab.models.prefixes import Prefixes
from shiq_lab.models.transformer import TinyTransformer
from shiq_lab.objectives import World, fields, lookup, subjects
from shiq_lab.policies import uniform_policy
from shiq_lab.sampling import sample
from shiq_lab.tiny import pretrain, train_tiny
from shiq_lab.training import train_sampled

DETERMINISTIC = worlds()[0]
RANDOM = next(w for w in worlds() if w.name == "random replies")
SINGLES = [s.name for s in subjects() if not s.twos]


def uniform(world: World) -> np.ndarray:
    return uniform_policy(world.mdp)


def one_step(name: str, world: World, own: bool) -> np.ndarray:
    """Minus the gradient, as plain SGD of step 1 sees it: where the table stands after one update, less where it stood."""
    rows = None if own else rows_of(world, uniform(world))
    trace = descend(name, world, rows, uniform(world), steps=1, learning_rate=1.0, optimizer="sgd")
    edges = world.edges.numpy()
    at = edges[:, 0], edges[:, 1]
    return trace.logits[at] - world.mdp.ref_logits[at]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("world", [DETERMINISTIC, RANDOM], ids=["deterministic", "random replies"])
@pytest.mark.parametrize("name", SINGLES)
def test_an_update_is_the_expected_gradient(name: str, world: World, own: bool) -> None:
    """Against fixed_points' stacked copies at the reference, its values at 0, its data uniform or the policy's own."""
    ref = torch.tensor(np.array(world.mdp.ref_logits))[None]
    behavior = world.policies["reference" if own else "uniform"][None]
    by_logits, _ = fields(lookup(name), world, ref, torch.zeros(1, world.mdp.n_states, dtype=torch.float64), behavior)
    edges = world.edges
    expected = -by_logits[0, edges[:, 0], edges[:, 1]].numpy()
    assert float(np.abs(one_step(name, world, own) - expected).max()) <= 4 * world.bound(ref)


def test_own_rows_follow_the_policy() -> None:
    """REINFORCE on its own rows climbs J: its first step off the reference is d J / d l by occupancies."""
    world = RANDOM
    start = np.where(world.mdp.allowed, world.elsewhere.numpy(), -np.inf)
    table = Table(world.mdp, start)
    trace = descend(
        "REINFORCE, KL in the reward", world, None, model=table, parameters=table.parameters(), steps=1,
        learning_rate=1.0, optimizer="sgd",
    )  # fmt: skip
    policy = torch.tensor(start).log_softmax(1).numpy()
    policy = np.where(world.mdp.is_policy[:, None], policy, world.mdp.ref_log_policy)
    found = evaluate(world.mdp, policy, beta=world.beta, gamma=world.gamma)
    log_ratio = np.where(world.mdp.allowed, policy, 0.0) - np.where(world.mdp.allowed, world.mdp.ref_log_policy, 0.0)
    soft = found.q - world.beta * log_ratio
    advantage = np.where(world.mdp.allowed, soft - found.v[:, None], 0.0)
    expected = np.where(world.mdp.is_policy[:, None], found.occupancy * advantage, 0.0)
    at = tuple(world.edges.numpy().T)
    moved = trace.logits[at] - start[at]
    assert float(np.abs(moved - expected[at]).max()) <= 4 * world.bound(torch.tensor(start)[None])


def test_the_runs_end_where_theory_says() -> None:
    """On uniform rows of a deterministic world: ShiQ at q*, CoPG and DRO at pi* alone, one-step PG elsewhere."""
    world, mu = DETERMINISTIC, uniform(DETERMINISTIC)
    rows = rows_of(world, mu)
    end = {
        name: descend(name, world, rows, mu, steps=1500, learning_rate=0.1, schedule="cosine").metrics[-1]
        for name in (
            "ShiQ",
            "DPO, Bradley-Terry labels",
            "CoPG",
            "DRO-V",
            "REINFORCE, KL in the reward",
            "IPO, Bradley-Terry labels",
        )
    }
    assert end["ShiQ"].q_error < 1e-3 and end["ShiQ"].kl < 1e-8
    for name in ("CoPG", "DRO-V"):
        assert end[name].kl < 1e-6 and end[name].q_error > 0.1, name
    for name in ("REINFORCE, KL in the reward", "IPO, Bradley-Terry labels"):
        assert end[name].kl > 1e-3, name


def test_equal_seeds_are_equal() -> None:
    world, mu = DETERMINISTIC, uniform(DETERMINISTIC)
    first, second = (descend("ShiQ", world, rows_of(world, mu, 50, seed=3), mu, steps=30, learning_rate=0.05) for _ in range(2))
    assert first.metrics == second.metrics and np.array_equal(first.logits, second.logits)
    other = descend("ShiQ", world, rows_of(world, mu, 50, seed=4), mu, steps=30, learning_rate=0.05)
    assert not np.array_equal(first.logits, other.logits)


def test_sgd_is_the_same_as_the_sampled_loop() -> None:
    """`train_sampled` on the whole data set at every step is another loop around the same loss."""
    world, mu = DETERMINISTIC, uniform(DETERMINISTIC)
    rows = rows_of(world, mu)
    mine = descend("ShiQ", world, rows, mu, steps=40, learning_rate=0.05, optimizer="sgd")
    theirs = train_sampled(
        world.mdp, "shiq", iter([rows] * 40), beta=world.beta, gamma=world.gamma, learning_rate=0.05, steps=40
    )
    live = world.edges.numpy()
    at = live[:, 0], live[:, 1]
    assert float(np.abs(mine.logits[at] - theirs.logits[at]).max()) <= 1e-12


# ---------------------------------------------------------------------------------------------------------------- rows
def test_rows_have_their_chances() -> None:
    world, mu = RANDOM, uniform(RANDOM)
    rows = rows_of(world, mu)
    assert float(rows.weights.sum()) == pytest.approx(1.0, abs=1e-14)
    visits = evaluate(world.mdp, mu, beta=1.0).occupancy
    acted = rows.completion_mask[:, 1:] == 1
    seen = torch.zeros(visits.shape, dtype=torch.float64).index_put_(
        (rows.known_states()[:, :-1][acted], rows.input_ids[:, 1:][acted]),
        rows.weights[:, None].expand(acted.shape)[acted],
        accumulate=True,
    )
    edges = world.edges.numpy()
    assert float(np.abs(seen.numpy() - visits)[edges[:, 0], edges[:, 1]].max()) <= 1e-14


def test_sampled_rows_tend_to_the_listing() -> None:
    """n weights are frequencies: within 5 standard deviations of the chances, and equal rows are one row."""
    world, mu = RANDOM, uniform(RANDOM)
    key = lambda rows: [tuple(r[m == 1].tolist()) for r, m in zip(rows.input_ids, rows.attention_mask, strict=True)]  # noqa: E731
    exact = dict(zip(key(all_rows := rows_of(world, mu)), all_rows.weights.tolist(), strict=True))
    n = 4000
    some = rows_of(world, mu, n, seed=1)
    seen = dict(zip(key(some), some.weights.tolist(), strict=True))
    assert len(seen) == len(some) and set(seen) <= set(exact)
    assert max(abs(seen.get(k, 0.0) - p) / (p * (1 - p) / n) ** 0.5 for k, p in exact.items()) < 5


# --------------------------------------------------------------------------------------------------------------- traces
def test_marks_and_goals() -> None:
    world, mu = DETERMINISTIC, uniform(DETERMINISTIC)
    rows = rows_of(world, mu)
    trace = descend("ShiQ", world, rows, mu, steps=100, learning_rate=0.1, record_at=[10, 30])
    assert trace.at == [0, 10, 30, 100] and len(trace.loss) == len(trace.metrics) == 4
    goal = trace.metrics[1].q_error
    early = descend("ShiQ", world, rows, mu, steps=100, learning_rate=0.1, record_at=[10, 30], goal=goal)
    assert early.at == [0, 10] and early.metrics == trace.metrics[:2]


def test_updates_to_a_goal_must_last() -> None:
    metric = train_sampled(
        DETERMINISTIC.mdp, "shiq", iter([rows_of(DETERMINISTIC, uniform(DETERMINISTIC))]), beta=0.7, learning_rate=0.1, steps=1
    ).metrics
    trace = Trace([0, 5, 9, 12], [0.0] * 4, [replace(metric, q_error=x) for x in (3.0, 0.5, 2.0, 0.7)], np.zeros(1))
    assert trace.updates_to(1.0) == 12 and trace.updates_to(4.0) == 0 and trace.updates_to(0.6) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda w, r: descend("ShiK", w, r, steps=1, learning_rate=0.1),
            "loss: expected a loss of the fixed-point table, got 'ShiK'. Did you mean 'ShiQ'?",
        ),
        (
            lambda w, r: descend("RLOO, groups of 2", w, r, steps=1, learning_rate=0.1),
            "loss: expected one of single rows or of all pairs, got 'RLOO, groups of 2'. "
            "Groups of two are for the fixed-point table.",
        ),
        (
            lambda w, r: descend("ShiQ", w, r, steps=1, learning_rate=0.0),
            "learning_rate: expected a finite number > 0, got 0.0.",
        ),
        (
            lambda w, r: descend("ShiQ", w, r, steps=1, learning_rate=0.1, optimizer="adamw"),
            "optimizer: expected one of adam, sgd, got 'adamw'.",
        ),
        (
            lambda w, r: descend("ShiQ", w, r, steps=1, learning_rate=0.1, schedule="linear"),
            "schedule: expected one of constant, cosine, got 'linear'.",
        ),
        (
            lambda w, r: descend("ShiQ", w, r, model=lambda: torch.zeros(1), steps=1, learning_rate=0.1),
            "parameters: expected the model's parameters, got None.",
        ),
        (lambda w, r: rows_of(w, uniform(w), 0), "n: expected a whole number >= 1, got 0."),
        (
            lambda w, r: rows_of(w.mdp, uniform(w)),
            "world: expected a World, got <TokenMDP '': 12 states, 9 of the policy, 3 tokens>. "
            "learning.world_of(mdp, beta, gamma) makes one.",
        ),
        (
            lambda w, r: descend("ShiQ", w, 5, steps=1, learning_rate=0.1),
            "rows: expected a TokenBatch, or None for the policy's own, got int. learning.rows_of makes one.",
        ),
        (
            lambda w, r: descend("ShiQ", w, enumerate_trajectories(make("Bandit")), steps=1, learning_rate=0.1),
            "rows: expected rows of this world, got rows of another automaton. Draw them with rows_of(world, behavior).",
        ),
        (
            lambda w, r: descend("ShiQ", w, r, steps=9, learning_rate=0.1, record_at=[3, 10]),
            "record_at: expected whole numbers from 0 to 9, got [3, 10].",
        ),
        (lambda w, r: world_of(make("Bandit"), 0.0), "beta: expected a finite number > 0, got 0.0."),
        (lambda w, r: world_of(make("Bandit"), 1.0, 2.0), "gamma: expected a number in (0, 1], got 2.0."),
        (lambda w, r: pretrain(make("Bandit"), beta=-1.0), "beta: expected a finite number > 0, got -1.0."),
        (
            lambda w, r: train_tiny(make("Bandit"), "ShiQ", r, steps=1),
            "start: expected a Pretrained, got <TokenMDP 'Bandit': 2 states, 1 of the policy, 9 tokens>. "
            "tiny.pretrain(mdp, beta=...) makes one.",
        ),
    ],
)
def test_bad_input(call: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(DETERMINISTIC, rows_of(DETERMINISTIC, uniform(DETERMINISTIC)))


# ------------------------------------------------------------------------------------------------------------- the network
def test_a_pretrained_network_is_a_reference() -> None:
    """It has learned the environment (cross-entropy near its entropy), its levels differ, and all comes from the seed."""
    mdp = make("Needle", length=3, n_tokens=3)
    start = pretrain(mdp, beta=0.1, seed=2, width=16, heads=2, steps=150, rows=512)
    tree = start.world.mdp
    speaks = tree.is_policy
    own = pretrain(mdp, beta=0.1, seed=2, width=16, heads=2, steps=150, rows=512)
    assert np.array_equal(own.world.mdp.ref_logits, tree.ref_logits)
    assert tree.ref_logsumexp[speaks].std() > 0.02
    visits = evaluate(make("Needle", length=3, n_tokens=3), mdp.ref_log_policy, beta=1.0).occupancy
    entropy = -(visits * np.where(mdp.allowed, mdp.ref_log_policy, 0.0)).sum() / 3  # nats an action
    assert entropy - 0.1 < start.cross_entropy < entropy + 0.15
    assert not any(p.requires_grad for p in start.reference.parameters())


def test_a_network_learns_q_on_data_it_never_chose() -> None:
    """A few prefixes, a minute's worth of `selftest --tiny` in a second; the reference stays as it was."""
    mdp = make("Needle", length=2, n_tokens=3)
    start = pretrain(mdp, beta=0.2, seed=0, width=32, heads=2, steps=60, rows=512)
    frozen = [p.clone() for p in start.reference.parameters()]
    mu = uniform_policy(start.world.mdp)
    trace, model = train_tiny(start, "ShiQ", rows_of(start.world, mu, 500, seed=0), mu, steps=250)
    assert all(torch.equal(a, b) for a, b in zip(frozen, start.reference.parameters(), strict=True))
    assert trace.metrics[0].q_error > 0.3 and trace.metrics[-1].q_error < 0.05 and trace.metrics[-1].kl < 1e-3
    logits = start.prefixes.table(model).detach().double().numpy()
    edges = start.world.mdp.allowed & start.world.mdp.is_policy[:, None]
    q = solve(start.world.mdp, beta=0.2).q()
    q_hat = 0.2 * (logits[edges] - start.world.mdp.ref_logits[edges])
    assert float(np.abs(q_hat - q[edges]).max()) == pytest.approx(trace.metrics[-1].q_error, abs=1e-12)


def test_the_truth_is_about_the_frozen_network() -> None:
    """The world's reference is the reference's own table at every prefix, at the beta and gamma that were asked for."""
    start = pretrain(make("Tree", depth=2, n_tokens=2), beta=0.3, gamma=0.9, width=16, heads=2, steps=5, rows=64)
    assert (start.world.beta, start.world.gamma) == (0.3, 0.9)
    table = start.prefixes.table(start.reference).double().numpy()
    speaks = start.world.mdp.is_policy
    assert np.array_equal(start.world.mdp.ref_logits[speaks], table[speaks])


def test_seeds_draw_the_weights_and_padding_teaches_nothing() -> None:
    """After one step of Adam (each weight moves by at most 3e-3) seeds are still apart; the loss is that of the real tokens."""
    mdp = make("Brackets", max_length=4)
    options: dict[str, int] = {"width": 16, "heads": 2, "steps": 1, "rows": 128}
    first, second = (pretrain(mdp, beta=1.0, seed=seed, **options) for seed in (0, 1))
    apart = max(
        float((a - b).abs().max()) for a, b in zip(first.reference.parameters(), second.reference.parameters(), strict=True)
    )
    assert apart > 0.1
    tree = Prefixes.of(mdp).tree  # with the environment's own reference, which the network learns from
    data = sample(tree, tree.ref_log_policy, 128, rng=0)
    pick = torch.from_numpy(np.random.default_rng(0).integers(128, size=128))
    logits = TinyTransformer(mdp.n_tokens, width=16, heads=2, seed=0)(data.input_ids[pick], data.attention_mask[pick]).logits
    log_policy, total, count = logits.detach().double().log_softmax(-1), 0.0, 0
    for row, ids, mask in zip(log_policy, data.input_ids[pick], data.attention_mask[pick], strict=True):
        for i in range(int(mask.sum()) - 1):
            total, count = total - float(row[i, ids[i + 1]]), count + 1
    assert first.cross_entropy == pytest.approx(total / count, abs=1e-5)  # float32


def test_values_have_a_rate_of_their_own() -> None:
    """DRO-V: the first update moves values and logits apart from each other, the second sees the values moved."""
    world, mu = DETERMINISTIC, uniform(DETERMINISTIC)
    rows = rows_of(world, mu)
    after = {
        (steps, rate): descend(
            "DRO-V", world, rows, mu, steps=steps, learning_rate=0.01, optimizer="sgd", value_rate=rate
        ).logits
        for steps in (1, 2)
        for rate in (0.0, 5.0)
    }
    assert np.array_equal(after[1, 0.0], after[1, 5.0]) and not np.array_equal(after[2, 0.0], after[2, 5.0])


def test_a_network_learns_values_ten_times_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, float] = {}
    start = pretrain(make("Bandit", n_arms=2), beta=1.0, width=16, heads=2, steps=1, rows=8)

    def spy(*args: object, **options: float) -> Trace:
        seen.update(options)
        return descend(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(tiny, "descend", spy)
    train_tiny(start, "DRO-V", rows_of(start.world, uniform(start.world)), steps=1, learning_rate=0.002)
    assert seen["value_rate"] == pytest.approx(0.02)


def test_the_cosine_schedule_warms_up_and_ends_at_nothing() -> None:
    """Step sizes of plain SGD under a loss of constant slope 1, against factors by hand."""
    world, steps = DETERMINISTIC, 50
    weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    base = torch.tensor(np.array(world.mdp.ref_logits))
    linear = replace(lookup("ShiQ"), loss=lambda p: weight + 0.0 * p.stats().token_logit.sum())
    seen: list[float] = []

    def model() -> torch.Tensor:
        seen.append(float(weight.detach()))
        return base + 0.0 * weight

    descend(
        linear, world, rows_of(world, uniform(world)), model=model, parameters=[weight], steps=steps, learning_rate=0.1,
        optimizer="sgd", schedule="cosine",
    )  # fmt: skip
    moved = -np.diff(seen)
    expected = [0.1 * min(1.0, (k + 1) / 2) * 0.5 * (1 + np.cos(np.pi * k / steps)) for k in range(steps)]
    assert np.allclose(moved, expected, atol=1e-12) and moved[-1] < 1e-3 < moved[steps // 2] < moved[1]


def test_losses_are_recorded_where_the_metrics_are() -> None:
    world, mu = DETERMINISTIC, uniform(DETERMINISTIC)
    rows = rows_of(world, mu)
    whole = descend("ShiQ", world, rows, mu, steps=12, learning_rate=0.05, record_at=[0, 5, 12])
    for i, at in enumerate(whole.at[1:], 1):
        short = descend("ShiQ", world, rows, mu, steps=at, learning_rate=0.05, record_at=[at])
        assert whole.loss[i] == short.loss[-1] and whole.metrics[i] == short.metrics[-1]
    assert len(set(whole.loss)) == 3


@pytest.mark.parametrize("name", ["naive", "easy", "TBRM", "ShiQ", "TBRM at l*"])
def test_a_table_is_read_as_its_loss_means_it(name: str) -> None:
    """At the loss's own optimum the read-out is q*; TBRM's has v* at the start alone, and its policy is pi*."""
    world, mu = DETERMINISTIC, uniform(DETERMINISTIC)
    subject = lookup(name)
    best = torch.where(torch.tensor(np.array(world.mdp.allowed)), subject.optimum(world), 0.0)
    table = Table(world.mdp, best.numpy())
    trace = descend(
        subject, world, rows_of(world, mu), mu, model=table, parameters=table.parameters(), steps=1, learning_rate=1e-12
    )
    assert trace.metrics[0].q_error < 1e-9 and trace.metrics[0].kl < 1e-12
