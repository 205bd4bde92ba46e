"""TokenBatch and what makes one out of another; sampling, listing and behaviours: every row against plain loops."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import Word, best_cut, longest_episode, words
from strategies import JUNK_IDS, Case, cases, random_world

from shiq_lab import TokenBatch, TokenMDP, enumerate_trajectories, make, solve
from shiq_lab.batch import concatenate, cut, pack, pad, unique
from shiq_lab.enumeration import count_trajectories
from shiq_lab.envs import ENVIRONMENTS
from shiq_lab.losses.residuals import actions_of, residuals
from shiq_lab.models.tabular import TabularLM, with_states
from shiq_lab.policies import covering, mixture, on_path, reference_policy, softmax_policy, uniform_policy
from shiq_lab.population import Population
from shiq_lab.sampling import sample
from shiq_lab.stats import TokenStats

torch.set_num_threads(1)
EPS = float(np.finfo(np.float64).eps)
PROBABILITY = 64 * EPS  # a product of at most a dozen chances, each exp of a rounded logarithm below 10 in size
few = settings(max_examples=40, deadline=None)
every_environment = pytest.mark.parametrize("name", ENVIRONMENTS)


def rows_of(batch: TokenBatch) -> list[Any]:
    """Rows as plain tuples without padding: what no layout may change."""
    out = []
    for b in range(len(batch)):
        i = [i for i in range(batch.input_ids.shape[1]) if batch.attention_mask[b, i] == 1]
        acts = batch.completion_mask[b, i].tolist()
        rewards = [r if a else 0.0 for r, a in zip(batch.rewards[b, i].tolist(), acts, strict=True)]
        states = None if batch.states is None else tuple(batch.states[b, i].tolist())
        out.append((tuple(batch.input_ids[b, i].tolist()), tuple(acts), tuple(rewards), states, bool(batch.terminated[b])))
    return out


def rows_of_words(listed: list[Word]) -> list[Any]:
    return [(w.tokens, w.actions, w.rewards, w.states, True) for w in listed]


def small_dialogue(name: str) -> TokenMDP:
    """Two turns with replies of unequal length between, few strings."""
    return make(name, n_functions=2, n_arguments=2, n_values=2)


# -------------------------------------------------------------------------------------------------------------- layout
@given(case=cases(), extra=st.integers(0, 3), pad_id=st.sampled_from(JUNK_IDS))
@few
def test_pad_round_trips(case: Case, extra: int, pad_id: int) -> None:
    """Left and right padding of any width hold the same rows; ids of padding never matter."""
    batch, longest = case.batch, int(case.batch.attention_mask.sum(1).max())
    for side in ("left", "right"):
        other = pad(batch, side, pad_id=pad_id, width=longest + extra)
        assert other.input_ids.shape == (len(batch), longest + extra) and rows_of(other) == rows_of(batch)
        empty = other.attention_mask == 0
        assert (other.input_ids[empty] == pad_id).all() and (other.rewards[empty] == 0).all()
        edge = other.attention_mask if side == "left" else other.attention_mask.flip(1)
        assert (edge.diff(dim=1) >= 0).all(), "padding stands on one side only"
        assert rows_of(pad(other, "right" if side == "left" else "left")) == rows_of(batch)


@given(case=cases(), extra=st.integers(0, 9))
@few
def test_pack_loses_nothing(case: Case, extra: int) -> None:
    """Segments count from 1, positions restart, every row is found once with its own weight, group and ending."""
    batch, longest = case.batch, int(case.batch.attention_mask.sum(1).max())
    packed = pack(batch, longest + extra)
    assert packed.segment_ids is not None and packed.position_ids is not None
    found: dict[int, Any] = {}
    for p in range(len(packed)):
        segment = packed.segment_ids[p].tolist()
        assert segment == sorted(segment, key=lambda n: n if n else 10**9), "segments in order, padding last"
        for n in range(packed.terminated.shape[1]):
            inside = [i for i, s in enumerate(segment) if s == n + 1]
            if not inside:
                assert packed.group_ids[p, n] == -1 and packed.weights[p, n] == 0 and packed.terminated[p, n]
                continue
            assert packed.position_ids[p, inside].tolist() == list(range(len(inside)))
            assert (packed.attention_mask[p, inside] == 1).all()
            row = int(packed.group_ids[p, n])
            one = {
                k: getattr(packed, k)[p : p + 1, inside] for k in ("input_ids", "attention_mask", "completion_mask", "rewards")
            }
            assert row not in found and packed.weights[p, n] == batch.weights[row]
            found[row] = rows_of(TokenBatch(**one, terminated=packed.terminated[p : p + 1, n]))[0]
        assert ((packed.attention_mask[p] == 1) == (packed.segment_ids[p] > 0)).all()
    assert [found[b] for b in range(len(batch))] == rows_of(batch)


def test_concatenate_select_and_to() -> None:
    batch = enumerate_trajectories(small_dialogue("ToolCall"))
    halves = batch.select(slice(0, 3)), batch.select(torch.arange(3, len(batch)))
    assert rows_of(concatenate(halves)) == rows_of(batch) and len(concatenate(halves)) == len(batch)
    assert rows_of(batch.to("cpu").select([1, 0])) == rows_of(batch)[1::-1]
    unknown = replace(halves[0], states=None)
    assert concatenate([unknown, halves[1]]).states is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, r"input_ids: .*\[B, L\]"),
        ({"rewards": torch.zeros(1, 4)}, "rewards: "),
        ({"terminated": torch.ones(2, dtype=torch.bool)}, "terminated: "),
        ({"weights": torch.ones(2)}, "weights: "),
        ({"attention_mask": torch.tensor([[2, 1, 1]])}, "attention_mask: "),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "completion_mask: expected 0 in padding, got 1 at row 0, position 2"),
        ({"completion_mask": torch.tensor([[1, 1, 1]])}, "completion_mask: .*first real token.*with_prompt"),
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, "completion_mask: .*first real token.*position 1"),
        ({"segment_ids": torch.tensor([[1, 2, 2]])}, r"terminated: expected shape \(1, N\)"),
    ],
)
def test_wrong_batches_are_named(change: dict[str, Any], message: str) -> None:
    good = {
        "input_ids": torch.zeros(1, 3, dtype=torch.int64),
        "attention_mask": torch.ones(1, 3, dtype=torch.int64),
        "completion_mask": torch.tensor([[0, 1, 1]]),
        "rewards": torch.zeros(1, 3),
        "terminated": torch.tensor([True]),
    }
    assert TokenBatch(**good).weights.tolist() == [1.0]
    with pytest.raises(ValueError, match=message):
        TokenBatch(**{**good, **change})


def test_wrong_layouts_are_named() -> None:
    batch = enumerate_trajectories(small_dialogue("ToolCall"))
    packed = pack(batch, 16)
    for call, name in (
        (lambda: pad(batch, "middle"), "side"),  # type: ignore[arg-type]
        (lambda: pad(batch, width=2), "width"),
        (lambda: pack(batch, 2), "width"),
        (lambda: pad(packed), "batch"),
        (lambda: cut(batch, 0), "length"),
        (lambda: concatenate([]), "batches"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: "):
            call()


# ----------------------------------------------------------------------------------------------------------------- cut
@pytest.mark.parametrize("name", ["ToolCall", "RandomTool", "Forbidden", "RandomWalk"])
def test_cut_at_every_length(name: str) -> None:
    """The contract's rule at every possible length, against trying one place after another; rows that are kept whole."""
    mdp = small_dialogue(name) if "Tool" in name else make(name, **({"horizon": 3} if name == "RandomWalk" else {"depth": 4}))
    listed = list(words(mdp, mdp.ref_log_policy))
    listed = sorted(listed, key=lambda w: (len(w.tokens), w.tokens))
    batch, changed = enumerate_trajectories(mdp), 0
    assert rows_of(batch) == rows_of_words(listed)
    for length in range(1, batch.input_ids.shape[1] + 2):
        shorter = cut(pad(batch, "left", pad_id=-5), length)
        for row, word in zip(rows_of(shorter), listed, strict=True):
            keep = best_cut(word, length, mdp.is_policy)
            whole = keep == len(word.tokens)
            assert row == (word.tokens[:keep], word.actions[:keep], word.rewards[:keep], word.states[:keep], whole)
            assert whole or mdp.is_policy[word.states[keep - 1]], "a cut row ends where the policy speaks"
            changed += not whole
    assert changed > 0


def test_cut_takes_a_length_a_row() -> None:
    batch = enumerate_trajectories(small_dialogue("RandomTool"))
    lengths = torch.arange(len(batch)) % 8 + 1
    each = [rows_of(cut(batch.select([b]), int(n)))[0] for b, n in enumerate(lengths)]
    assert rows_of(cut(batch, lengths)) == each
    assert rows_of(cut(cut(batch, 5), 3)) == rows_of(cut(batch, 3)), "cutting twice is cutting once"


@pytest.mark.parametrize("name", ["ToolCall", "Tree", "Forbidden"])
def test_cut_rows_at_the_optimum_have_no_residual(name: str) -> None:
    """Dv after the cut stands for what was lost: rho = 0 at l* whatever the cut, in a deterministic world (F1, F10)."""
    mdp, (beta, gamma) = make(name), (0.4, 0.9)
    table, ref = torch.tensor(solve(mdp, beta=beta, gamma=gamma).optimal_logits()), torch.tensor(mdp.ref_logits)
    behavior = uniform_policy(mdp)
    batch = sample(mdp, behavior, 64, rng=0)
    size = float((beta * table[table > -torch.inf]).abs().max()) + float(np.abs(mdp.reward).max())
    for length in range(1, batch.input_ids.shape[1] + 1):
        rows = cut(batch, length)
        stats, ref_stats = TokenStats.from_table(table, rows), TokenStats.from_table(ref, rows)
        c, u = (beta * (stats.token_logit - ref_stats.token_logit), beta * (stats.logsumexp - ref_stats.logsumexp))
        u_end = beta * (stats.end_logsumexp - ref_stats.end_logsumexp)
        rho = residuals(c, u, u_end, rows, actions_of(rows), gamma=gamma, n_steps=None)
        # a dozen tokens, each a few roundings of numbers below `size`
        assert rho.numel() == 0 or float(rho.abs().max()) <= 128 * EPS * size


# ------------------------------------------------------------------------------------------------------------- listing
@given(seed=st.integers(0, 2**31), random_replies=st.booleans(), horizon=st.sampled_from([None, 1, 2]))
@few
def test_listing_equals_recursion(seed: int, random_replies: bool, horizon: int | None) -> None:
    """Every string with its probability, by a plain recursion: random automata, behaviours, replies and horizons."""
    mdp, behavior = random_world(seed, loops=horizon is not None, random_replies=random_replies)
    mdp = replace(mdp, horizon=horizon)
    assume(count_trajectories(mdp) is not None)  # a loop of replies: no horizon ends it
    listed = sorted(words(mdp, behavior), key=lambda w: (len(w.tokens), w.tokens))
    batch = enumerate_trajectories(mdp, behavior=behavior)
    assert rows_of(batch) == rows_of_words(listed) and len(batch) == count_trajectories(mdp)
    assert np.abs(batch.weights.numpy() - [w.probability for w in listed]).max() <= PROBABILITY
    assert abs(float(batch.weights.sum()) - 1) <= PROBABILITY * len(batch)
    prompts = [w.tokens[: w.actions.index(1)] if 1 in w.actions else w.tokens for w in listed]
    same = [[p == q for q in prompts] for p in prompts]
    assert (batch.group_ids[:, None] == batch.group_ids).tolist() == same


@every_environment
def test_listing_environments(name: str) -> None:
    """Weights sum to 1 where the strings can be counted; where not, the message says so, with the exact number."""
    mdp = make(name)
    total = count_trajectories(mdp)
    if total is None:
        with pytest.raises(ValueError, match="infinitely many"):
            enumerate_trajectories(mdp)
    elif total > 20_000:
        with pytest.raises(ValueError, match=rf"^max_trajectories: .*\b{total}\b"):
            enumerate_trajectories(mdp, 20_000)
    else:
        batch = enumerate_trajectories(mdp)
        assert len(batch) == total and abs(float(batch.weights.sum()) - 1) <= PROBABILITY * total
        assert batch.terminated.all() and batch.input_ids.shape[1] == longest_episode(mdp)


def test_strings_of_probability_zero_are_left_out() -> None:
    mdp = make("Tree", depth=2, n_tokens=3)
    behavior = np.array(uniform_policy(mdp))
    behavior[mdp.is_policy] = np.where(np.arange(mdp.n_tokens) == 0, 0.0, -np.inf)
    batch = enumerate_trajectories(mdp, behavior=behavior)
    assert len(batch) == 1 and batch.weights.tolist() == [1.0]


def test_a_behavior_by_tokens_spent() -> None:
    """float[T, S, V]: at t tokens spent its own table; here token 0 first, token 1 second."""
    mdp = replace(make("Tree", depth=2, n_tokens=3), horizon=2)
    say = lambda a: np.where(mdp.is_policy[:, None], np.where(np.arange(mdp.n_tokens) == a, 0.0, -np.inf), mdp.ref_logits)  # noqa: E731
    tables = np.stack([say(0), say(1)])
    for batch in (enumerate_trajectories(mdp, behavior=tables), sample(mdp, tables, 4, rng=0)):
        assert {row[0][1:] for row in rows_of(batch)} == {(0, 1)}


@pytest.mark.parametrize("spoil", ["nan", "sum", "forbidden", "shape"])
def test_what_is_no_behavior_is_refused(spoil: str) -> None:
    """By listing and sampling alike; weights that sum to less than 1 would be the silent alternative."""
    mdp = make("Forbidden")
    table = np.array(uniform_policy(mdp))
    state = int(np.flatnonzero(mdp.is_policy & (mdp.allowed.sum(1) > 1))[0])
    if spoil == "nan":
        table[state] = np.nan
    elif spoil == "sum":
        table[state] -= 1.0
    elif spoil == "forbidden":
        table[state] = -np.log(mdp.n_tokens)
    else:
        table = table[:, :-1]
    with pytest.raises(ValueError, match=r"^behavior: "):
        enumerate_trajectories(mdp, behavior=table)
    with pytest.raises(ValueError, match=r"^log_policy: "):
        sample(mdp, table, 2, rng=0)


def test_a_policy_at_the_root_is_refused() -> None:
    mdp = replace(make("Tree"), start=0)
    assert mdp.is_policy[0]
    for call in (enumerate_trajectories, lambda m: sample(m, m.ref_log_policy, 1, rng=0), TabularLM):
        with pytest.raises(ValueError, match="with_prompt"):
            call(mdp)


# ------------------------------------------------------------------------------------------------------------ sampling
FAILURE = 1e-6  # probability that a right sampler fails one of the frequency tests below, union bound over their strings


@pytest.mark.parametrize("name", ["ToolCall", "RandomTool", "Forbidden", "Star"])
def test_frequencies(name: str) -> None:
    """Counts of whole strings against their exact probabilities: Bernstein's bound, over all strings at once.

    P(|k/n - p| > e) <= 2 exp(-n e^2 / (2 p (1 - p) + 2 e / 3)); with x = ln(2 m / FAILURE) for m strings it is solved by
    e = x / (3 n) + sqrt(x^2 / (9 n^2) + 2 x p (1 - p) / n).
    """
    mdp = small_dialogue(name) if "Tool" in name else make(name, **({"depth": 3} if name == "Forbidden" else {}))
    behavior = mixture(uniform_policy(mdp), reference_policy(mdp), 0.5)
    listed = enumerate_trajectories(mdp, behavior=behavior)
    n = 8_000
    drawn = rows_of(replace(sample(mdp, behavior, n, rng=7), states=None))
    count = {row: 0 for row in rows_of(replace(listed, states=None))}
    for row in drawn:
        count[row] += 1  # a string that cannot be said is a KeyError
    p = listed.weights.numpy()
    x = np.log(2 * len(p) / FAILURE)
    bound = x / (3 * n) + np.sqrt(x**2 / (9 * n**2) + 2 * x * p * (1 - p) / n)
    assert (np.abs(np.array(list(count.values())) / n - p) <= bound).all()


@every_environment
def test_samples_obey_the_automaton(name: str) -> None:
    """Every token is an edge, every reward the automaton's, every end an end or a cut in a policy state; seeds repeat."""
    mdp = make(name)
    policy = uniform_policy(mdp)
    prompt = 1
    while True:
        try:
            batches = [sample(mdp, policy, 16, rng=seed, max_tokens=prompt + 3) for seed in (0, 0, 1)]
            break
        except ValueError as error:  # shorter than a prompt
            assert "max_tokens" in str(error)
            prompt += 1
    assert rows_of(batches[0]) == rows_of(batches[1])
    for ids, acts, rewards, states, terminated in rows_of(batches[0]) + rows_of(batches[2]):
        state, spent = mdp.start, 0
        for a, act, reward, after in zip(ids, acts, rewards, states, strict=True):
            assert mdp.allowed[state, a] and act == mdp.is_policy[state] and reward == (mdp.reward[state, a] if act else 0.0)
            spent += act
            state = -1 if mdp.horizon is not None and act and spent >= mdp.horizon else int(mdp.next_state[state, a])
            assert state == after
        assert len(ids) <= prompt + 3 and (state == -1) == terminated and (terminated or mdp.is_policy[state])


def test_truncated_rows_of_a_loop() -> None:
    """At most max_tokens, cut where the policy speaks; a fresh generator and its seed draw the same rows."""
    mdp = make("Loop")
    batch = sample(mdp, uniform_policy(mdp), 200, rng=np.random.default_rng(3), max_tokens=4)
    assert rows_of(batch) == rows_of(sample(mdp, uniform_policy(mdp), 200, rng=3, max_tokens=4))
    cut_rows = ~batch.terminated
    assert cut_rows.any() and batch.terminated.any() and (batch.attention_mask[cut_rows].sum(1) == 4).all()
    assert mdp.is_policy[batch.states[cut_rows, 3]].all()
    whole = sample(mdp, uniform_policy(mdp), 200, rng=3)
    assert whole.terminated.all() and whole.input_ids.shape[1] > 4


def test_horizon_ends_rows() -> None:
    mdp = make("RandomWalk", horizon=3)
    batch = sample(mdp, uniform_policy(mdp), 200, rng=0)
    assert batch.terminated.all() and batch.completion_mask.sum(1).max() == 3
    assert batch.input_ids.shape[1] == longest_episode(mdp)


def test_a_cut_inside_a_prompt_is_refused() -> None:
    """A row that ends in the environment's turn would bootstrap there; it cannot be cut back, so the sampler says so."""
    mdp = make("Parity")
    for wrong in (1, 2):
        with pytest.raises(ValueError, match=r"^max_tokens: .*every prompt"):
            sample(mdp, uniform_policy(mdp), 2, rng=0, max_tokens=wrong)
    for name, n, most in (("n", 0, None), ("max_tokens", 2, 0), ("max_tokens", 2, -1)):
        with pytest.raises(ValueError, match=rf"^{name}: "):
            sample(mdp, uniform_policy(mdp), n, rng=0, max_tokens=most)


def test_states_by_walking() -> None:
    mdp = make("RandomTool")
    batch = sample(mdp, uniform_policy(mdp), 64, rng=0)
    assert torch.equal(with_states(replace(batch, states=None), mdp).states, batch.states)
    packed = pack(batch, 24)
    assert torch.equal(with_states(replace(packed, states=None), mdp).states, packed.states)


# ------------------------------------------------------------------------------------------------------------ policies
@every_environment
def test_behaviours_are_policies(name: str) -> None:
    """Rows of probabilities sum to 1, forbidden tokens get none, allowed ones some; environment rows are its own."""
    mdp = make(name)
    random = np.random.default_rng(0).normal(size=mdp.ref_logits.shape)
    made = {
        "reference": reference_policy(mdp),
        "uniform": uniform_policy(mdp),
        "softmax": softmax_policy(mdp, random),
        "mixture": mixture(uniform_policy(mdp), reference_policy(mdp), 0.25),
        "on path": on_path(mdp, reference_policy(mdp), 0.1),
        "covering": covering(mdp),
    }
    for label, table in made.items():
        assert table.shape == mdp.ref_logits.shape, label
        assert np.abs(np.exp(table).sum(1) - 1).max() <= 16 * EPS * mdp.n_tokens, label
        assert ((table > -np.inf) == mdp.allowed)[mdp.is_policy].all(), label
        speech = ~mdp.is_policy
        np.testing.assert_allclose(np.exp(table[speech]), np.exp(mdp.ref_logits[speech]), atol=8 * EPS)
    likeliest = np.where(mdp.allowed, reference_policy(mdp), -np.inf).argmax(1)
    chance = np.exp(made["on path"])[np.arange(mdp.n_states), likeliest]
    several = mdp.is_policy & (mdp.allowed.sum(1) > 1)
    np.testing.assert_allclose(chance[several], 0.9, atol=8 * EPS)
    for weight, pure in ((0.0, made["uniform"]), (1.0, made["reference"])):
        np.testing.assert_array_equal(mixture(made["uniform"], made["reference"], weight), pure)


@every_environment
def test_covering_comes_by_everywhere(name: str) -> None:
    """Every reachable state is visited at least 1e-3 / S times an episode, in expectation."""
    mdp = make(name)
    mdp = mdp if mdp.horizon is None else mdp.unroll()
    visits = Population(mdp, covering(mdp), 1.0).arrivals
    assert visits[mdp.reachable].min() >= 1e-3 / mdp.n_states


def test_wrong_parameters_of_behaviours_are_named() -> None:
    mdp = make("Bandit")
    for weight in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"^weight: "):
            mixture(uniform_policy(mdp), uniform_policy(mdp), weight)
    for leave in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"^leave: "):
            on_path(mdp, uniform_policy(mdp), leave)


def test_unique_rows_carry_the_weight_of_all_their_copies() -> None:
    """Rows are one where all that a loss reads is one: tokens, actions, their rewards, states, the end, the group."""
    batch = sample(make("RandomTool"), uniform_policy(make("RandomTool")), 400, rng=0)
    batch = replace(batch, weights=torch.arange(1.0, 401.0, dtype=torch.float64))
    expected: dict[Any, float] = {}
    for row, weight in zip(rows_of(batch), batch.weights.tolist(), strict=True):
        expected[row] = expected.get(row, 0.0) + weight
    few_rows = unique(batch)
    assert len(few_rows) == len(expected) < 400
    assert dict(zip(rows_of(few_rows), few_rows.weights.tolist(), strict=True)) == expected


ONE = {
    "input_ids": torch.tensor([[9, 5, 6, 7]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1]]),
    "completion_mask": torch.tensor([[0, 1, 0, 1]]),
    "rewards": torch.tensor([[0.0, 1.0, 0.0, 2.0]]),
    "terminated": torch.tensor([False]),
    "group_ids": torch.tensor([0]),
    "states": torch.tensor([[0, 1, 2, 3]]),
}
CHANGES = {
    "input_ids": torch.tensor([[9, 5, 6, 8]]),
    "completion_mask": torch.tensor([[0, 1, 1, 1]]),
    "rewards": torch.tensor([[0.0, 1.0, 0.0, 3.0]]),
    "terminated": torch.tensor([True]),
    "group_ids": torch.tensor([1]),
    "states": torch.tensor([[0, 1, 2, 4]]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_rows_that_differ_at_all_stay_apart(name: str) -> None:
    assert len(unique(concatenate([TokenBatch(**ONE), TokenBatch(**ONE)]))) == 1
    assert len(unique(concatenate([TokenBatch(**ONE), TokenBatch(**ONE | {name: CHANGES[name]})]))) == 2


def test_rewards_that_no_action_earns_keep_nothing_apart() -> None:
    idle = ONE | {"rewards": torch.tensor([[7.0, 1.0, 7.0, 2.0]])}
    assert len(unique(concatenate([TokenBatch(**ONE), TokenBatch(**idle)]))) == 1


def test_rows_that_fill_the_width_exactly_are_packed_together() -> None:
    one = TokenBatch(**ONE)
    packed = pack(concatenate([one, one, one]), 8)
    assert packed.segment_ids is not None
    assert packed.segment_ids.tolist() == [[1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 0, 0, 0, 0]]


def test_infinite_rewards_are_named() -> None:
    with pytest.raises(ValueError, match="rewards: expected finite numbers, got inf at row 0, position 3"):
        TokenBatch(**ONE | {"rewards": torch.tensor([[torch.inf, 1.0, 0.0, torch.inf]])})


def test_a_mixture_takes_its_weight_of_the_second() -> None:
    first, second = np.log([[0.9, 0.1]]), np.log([[0.2, 0.8]])
    np.testing.assert_allclose(np.exp(mixture(first, second, 0.25)), [[0.725, 0.275]], atol=1e-15)


def test_the_limit_of_a_listing_is_the_number_of_strings() -> None:
    mdp = small_dialogue("ToolCall")
    n = count_trajectories(mdp)
    assert n is not None and len(enumerate_trajectories(mdp, n)) == n
    with pytest.raises(ValueError, match=f"max_trajectories: expected at least the number of strings, {n}, got {n - 1}"):
        enumerate_trajectories(mdp, n - 1)


def test_a_loop_out_of_reach_can_be_listed_all_the_same() -> None:
    mdp = TokenMDP(np.array([[-1, -1], [1, -1]]), np.zeros((2, 2)), np.zeros((2, 2))).with_prompt(0)
    assert count_trajectories(mdp) == 2 == len(enumerate_trajectories(mdp))
    assert longest_episode(mdp) == 2


def test_covering_counts_what_lies_beyond_a_loop() -> None:
    """0 <-> 1, and 1 alone leads on to 2: behind 0 and 1 lie the same three states, and the end counts 1."""
    next_state = np.array([[1, -1], [0, 2], [-1, -1]])
    chance = np.exp(covering(TokenMDP(next_state, np.zeros((3, 2)), np.zeros((3, 2)))))
    np.testing.assert_allclose(chance, [[3 / 4, 1 / 4], [3 / 4, 1 / 4], [1 / 2, 1 / 2]], atol=1e-15)


def test_the_lowest_draw_never_selects_a_forbidden_token() -> None:
    """random() may be 0.0 itself; the first token, of probability 0, is not the one that it selects."""

    class Lowest(np.random.Generator):
        def random(self, size: Any = None, *args: Any, **kwargs: Any) -> Any:
            return np.zeros(size)

    mdp = TokenMDP(np.array([[-1, -1]]), np.zeros((1, 2)), np.array([[-np.inf, 0.0]])).with_prompt(1)
    batch = sample(mdp, mdp.ref_log_policy, 3, rng=Lowest(np.random.PCG64(0)))
    assert (batch.input_ids == 1).all()
