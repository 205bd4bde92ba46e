"""TokenMDP, its builders, and graph.py, the machinery under every exact answer.

Small automata are held against hand-made arrays entry by entry; graphs against networkx, recursions against dense numpy.
"""

import math
import os
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiq_lab import TokenMDP, solve
from shiq_lab.builders import END, Act, Row, Say, from_states, from_turns, prefix_tree, random_reference
from shiq_lab.graph import Recursion, blocks, loop_matrix, reachable_from, reaches

inf = math.inf
LN2 = math.log(2)
EPS = float(np.finfo(np.float64).eps)
ARRAYS = ("next_state", "reward", "ref_logits", "is_policy")


def same(one: TokenMDP, other: TokenMDP) -> bool:
    fields = ("start", "horizon", "tokens", "name")
    return all(np.array_equal(getattr(one, k), getattr(other, k)) for k in ARRAYS) and all(
        getattr(one, k) == getattr(other, k) for k in fields
    )


@st.composite
def automata(draw: st.DrawFn, most_states: int = 12, most_tokens: int = 4, horizon: bool = False) -> TokenMDP:
    """Random automata with loops, forbidden tokens and random replies; from every state the end is an edge or near.

    Policy states keep their last token as a way to the end, so no loop of environment states is endless either.
    """
    S, V = draw(st.integers(1, most_states)), draw(st.integers(2, most_tokens))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    next_state = rng.integers(-1, S, (S, V))
    next_state[:, -1] = -1
    is_policy = rng.random(S) < 0.7
    allowed = rng.random((S, V)) < 0.7
    allowed[:, -1] = True
    logits = np.where(allowed, rng.normal(size=(S, V)), -inf)
    level = np.log(np.exp(logits).sum(1, keepdims=True))
    return TokenMDP(
        next_state,
        np.where(is_policy[:, None], rng.normal(size=(S, V)), 0.0),
        np.where(is_policy[:, None], logits, logits - level),
        is_policy,
        start=int(rng.integers(S)),
        horizon=draw(st.integers(1, 5)) if horizon else None,
    )


# ------------------------------------------------------------------------------------------------- canonical form
def test_forbidden_edges_are_no_edges() -> None:
    """What stands at a forbidden token or a reply of probability 0 is never looked at, be it NaN or out of range."""
    mdp = TokenMDP(
        next_state=[[1, 99], [-1, -77]],
        reward=[[0, math.nan], [1, inf]],
        ref_logits=[[0, -inf], [3, -inf]],
        is_policy=[False, True],
    )
    clean = TokenMDP([[1, -1], [-1, -1]], [[0, 0], [1, 0]], [[0, -inf], [3, -inf]], [False, True])
    assert same(mdp, clean)
    assert mdp.allowed.tolist() == [[True, False], [True, False]]


def test_a_reply_whose_probability_underflows_is_no_edge() -> None:
    """exp(-750) is 0 in float64: such a reply is forbidden in an environment row, and a mere preference in a policy row."""
    mdp = TokenMDP([[1, 1], [-1, -1]], np.zeros((2, 2)), [[0, -750], [0, -750]], [False, True])
    assert mdp.ref_logits.tolist() == [[0, -inf], [0, -750]]
    assert mdp.next_state.tolist() == [[1, -1], [-1, -1]]


def test_defaults_dtypes_and_views() -> None:
    mdp = TokenMDP([[1, 1], [-1, -1]], [[1, 2], [3, 4]], [[0, 0], [1, 1]])
    assert (mdp.start, mdp.horizon, mdp.tokens, mdp.name) == (0, None, None, "")
    assert mdp.is_policy.tolist() == [True, True]
    assert [getattr(mdp, k).dtype for k in ARRAYS] == [np.int64, np.float64, np.float64, bool]
    assert (mdp.n_states, mdp.n_tokens) == (2, 2)
    np.testing.assert_allclose(mdp.ref_logsumexp, [LN2, 1 + LN2], rtol=2 * EPS)
    np.testing.assert_allclose(mdp.ref_log_policy, np.full((2, 2), -LN2), rtol=4 * EPS)


def test_arrays_are_read_only_and_its_own() -> None:
    """Neither the automaton nor the caller's array can change the other."""
    given = {
        "next_state": np.array([[-1, -1]]),
        "reward": np.array([[0.0, 1.0]]),
        "ref_logits": np.zeros((1, 2)),
        "is_policy": np.array([True]),
    }
    mdp = TokenMDP(**given)
    for name, array in given.items():
        before = getattr(mdp, name).tolist()
        array[...] = 0 if name == "is_policy" else 5
        assert getattr(mdp, name).tolist() == before
    for name in (*ARRAYS, "allowed", "ref_logsumexp", "ref_log_policy", "reachable"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(mdp, name)[...] = 0
    with pytest.raises(FrozenInstanceError):
        mdp.start = 0  # type: ignore[misc]


def test_tokens_are_found_and_shown() -> None:
    mdp = TokenMDP([[-1, -1]], [[0, 0]], [[0, 0]], tokens=["x", "y"])
    assert (mdp.token("y"), mdp.token(1), mdp.show(1)) == (1, 1, "y")
    assert (mdp.place(0), mdp.place(0, 1)) == ("state 0", "state 0, token 1 ('y')")
    assert TokenMDP([[-1, -1]], [[0, 0]], [[0, 0]]).show(1) == "1"


# ------------------------------------------------------------------------------------------------------ on disk
@settings(max_examples=40, deadline=None)
@given(mdp=automata(horizon=True), name=st.text(max_size=8), data=st.data())
def test_a_saved_automaton_comes_back_whole(
    mdp: TokenMDP, name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokens = data.draw(st.lists(st.text(max_size=5), min_size=mdp.n_tokens, max_size=mdp.n_tokens))
    odd = TokenMDP(*(getattr(mdp, k) for k in ARRAYS), mdp.start, mdp.horizon, tuple(tokens), name)
    path = tmp_path_factory.getbasetemp() / "odd.npz"
    odd.save(path)
    assert same(TokenMDP.load(path), odd)


def test_names_with_odd_characters(tmp_path: Path) -> None:
    """A newline, a NUL at the end (which a fixed-width numpy string would drop), an emoji, a lone surrogate, nothing at all."""
    tokens = ("a\nb", "end\0", "🙂", "\udce9", "")
    mdp = TokenMDP([[-1] * 5], [[0] * 5], [[0] * 5], tokens=tokens, name="zero\0")
    mdp.save(tmp_path / "odd.npz")
    back = TokenMDP.load(tmp_path / "odd.npz")
    assert (back.tokens, back.name) == (tokens, "zero\0")


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether writing or the final rename fails, the old file stays, and nothing half-written is left beside it."""
    path = tmp_path / "world.npz"
    old, new = (TokenMDP([[-1]], [[reward]], [[0.0]]) for reward in (1.0, 2.0))
    old.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["world.npz"]

    def full(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError("disk full")

    def refuse(*args: Any) -> None:
        raise OSError("no rename")

    for owner, method, broken in ((Path, "write_bytes", full), (os, "replace", refuse)):
        with monkeypatch.context() as patch, pytest.raises(OSError, match=r"disk full|no rename"):
            patch.setattr(owner, method, broken)
            new.save(path)
        assert same(TokenMDP.load(path), old)
        assert [p.name for p in tmp_path.iterdir()] == ["world.npz"]
    new.save(path)
    assert same(TokenMDP.load(path), new)


def test_no_pickle_in_the_file(tmp_path: Path) -> None:
    """Every array of the file has a plain dtype: numpy reads it with pickle off."""
    TokenMDP([[-1]], [[0]], [[0]], tokens=("a",), name="x").save(tmp_path / "plain.npz")
    with np.load(tmp_path / "plain.npz", allow_pickle=False) as file:
        assert {key: file[key].dtype.kind for key in file.files} == {
            "meta": "u", "next_state": "i", "reward": "f", "ref_logits": "f", "is_policy": "b"
        }  # fmt: skip


# --------------------------------------------------------------------------------------------------- new from old
@settings(max_examples=40, deadline=None)
@given(mdp=automata(), gamma=st.sampled_from([0.9, 0.5]))
def test_a_prompt_leaves_values_as_they_are(mdp: TokenMDP, gamma: float) -> None:
    """The new root says one token for sure, unrewarded and undiscounted: v* there is v* of the old start.

    To rounding: which form of the log-sum-exp is used depends on the rows computed together.
    """
    with_root = mdp.with_prompt(0)
    assert (with_root.start, with_root.is_policy[-1]) == (mdp.n_states, False)
    assert with_root.next_state[-1, 0] == mdp.start
    assert with_root.allowed[-1].tolist() == [True] + [False] * (mdp.n_tokens - 1)
    before, after = solve(mdp, beta=0.5, gamma=gamma), solve(with_root, beta=0.5, gamma=gamma)
    tolerance = 1e-13 * before.scale + before.error_bound + after.error_bound
    np.testing.assert_allclose(after.v()[:-1], before.v(), rtol=0, atol=tolerance)
    assert after.objective == after.v()[mdp.start]


@settings(max_examples=60, deadline=None)
@given(mdp=automata(horizon=True), gamma=st.sampled_from([1.0, 0.9]))
def test_unrolling_is_the_horizon(mdp: TokenMDP, gamma: float) -> None:
    """State t S + s of the unrolled automaton is s after t tokens: backward induction and the sweep agree.

    Up to 5 backups of |v| < 50, each rounding a log-sum-exp by a few eps: 1e-13 with room.
    """
    assert mdp.horizon is not None
    flat = mdp.unroll()
    S, T = mdp.n_states, mdp.horizon
    assert (flat.n_states, flat.horizon, flat.start) == (T * S, None, mdp.start)
    layered, swept = solve(mdp, beta=0.5, gamma=gamma), solve(flat, beta=0.5, gamma=gamma)
    for t in range(T):
        part = swept.v()[t * S : (t + 1) * S]
        reach = flat.reachable[t * S : (t + 1) * S]
        assert t > 0 or reach[mdp.start], "nothing compared"
        if layered.time_dependent:  # else no path is as long as the horizon, and layers beyond it are cut short
            np.testing.assert_allclose(part, layered.v(t), rtol=0, atol=1e-13 * (1 + np.abs(part).max()))
        else:
            np.testing.assert_allclose(part[reach], layered.v()[reach], rtol=0, atol=1e-13 * (1 + np.abs(part).max()))


def test_unrolling_by_hand() -> None:
    """An environment state 0 -> policy state 1, whose token 0 goes back to 0 and whose token 1 ends; two tokens."""
    mdp = TokenMDP([[1, -1], [0, -1]], [[0, 0], [5, 6]], [[0, -inf], [0, 1]], [False, True], horizon=2)
    flat = mdp.unroll()
    assert flat.next_state.tolist() == [[1, -1], [2, -1], [3, -1], [-1, -1]]
    assert flat.reward.tolist() == [[0, 0], [5, 6], [0, 0], [5, 6]]
    assert flat.is_policy.tolist() == [False, True, False, True]
    assert mdp.unroll(1).next_state.tolist() == [[1, -1], [-1, -1]]


def test_deterministic_is_about_replies_not_prompts() -> None:
    """Random prompts do no harm; a random reply after an action does, and one that no action leads to does not count."""
    prompts = from_turns([Say({(0,): 0.5, (1,): 0.5}), Act(1, (0, 1))], lambda p: 0.0, 2)
    replies = from_turns([Act(1, (0, 1)), Say({(0,): 0.5, (1,): 0.5}), Act(1, (0,))], lambda p: 0.0, 2)
    answers = from_turns([Act(1, (0, 1)), Say({(0,): 1.0}), Act(1, (0,))], lambda p: 0.0, 2)
    assert prompts.deterministic
    assert not replies.deterministic
    assert answers.deterministic
    stray = TokenMDP([[-1, -1], [-1, -1]], np.zeros((2, 2)), [[0, 0], [-LN2, -LN2]], [True, False])
    assert stray.deterministic
    assert stray.reachable.tolist() == [True, False]


@settings(max_examples=60, deadline=None)
@given(mdp=automata())
def test_reachable_is_what_networkx_reaches(mdp: TokenMDP) -> None:
    graph = to_networkx(mdp.next_state, mdp.allowed)
    expected = networkx.descendants(graph, mdp.start) | {mdp.start}
    assert set(np.flatnonzero(mdp.reachable)) == expected
    assert np.array_equal(reachable_from(mdp.start, mdp.next_state, mdp.allowed), mdp.reachable)
    goal = np.arange(mdp.n_states) % 3 == 0
    reached = reaches(mdp.next_state, mdp.allowed, goal)
    for s in range(mdp.n_states):
        assert reached[s] == bool((networkx.descendants(graph, s) | {s}) & set(np.flatnonzero(goal)))


# ------------------------------------------------------------------------------------------------------- builders
def test_a_prefix_tree_by_hand() -> None:
    """States in breadth-first order: (), (0,), (1,); after (1,) only token 1 may follow."""

    def describe(prefix: tuple[int, ...]) -> Row:
        if prefix == (1,):
            return Row({1: END}, reward={1: 2.0}, logits={1: 0.5})
        if prefix:
            return Row({0: END, 1: END}, reward={1: float(sum(prefix)) + 1})
        return Row({0: True, 1: True}, reward={0: -1.0}, logits={0: 3.0})

    mdp = prefix_tree(describe, 2, tokens=("a", "b"), name="tree", horizon=7)
    assert mdp.next_state.tolist() == [[1, 2], [-1, -1], [-1, -1]]
    assert mdp.reward.tolist() == [[-1, 0], [0, 1], [0, 2]]
    assert mdp.ref_logits.tolist() == [[3, 0], [0, 0], [-inf, 0.5]]
    assert mdp.is_policy.tolist() == [True, True, True]
    assert (mdp.start, mdp.horizon, mdp.tokens, mdp.name) == (0, 7, ("a", "b"), "tree")


def test_from_states_by_hand() -> None:
    """A coin (environment) that leads to a choice; "again" goes back to the coin, so states repeat and a loop closes."""
    rows = {
        "coin": Row({0: "choice", 1: END, 2: "never"}, probs={0: 0.25, 1: 0.75}),
        "choice": Row({0: "coin", 2: END}, reward={2: 4.0}, logits={0: -1.0}),
        "never": Row({1: END}),
    }
    mdp = from_states("coin", rows.__getitem__, 3)
    assert mdp.next_state.tolist() == [[1, -1, -1], [0, -1, -1], [-1, -1, -1]]
    assert mdp.reward.tolist() == [[0, 0, 0], [0, 0, 4], [0, 0, 0]]
    np.testing.assert_array_equal(mdp.ref_logits, [[math.log(0.25), math.log(0.75), -inf], [-1, -inf, 0], [-inf, 0, -inf]])
    assert mdp.is_policy.tolist() == [False, True, True]


def test_from_turns_by_hand() -> None:
    """Prompt 0 1 or 0 2 (a shared beginning), then one or two tokens of {0, 1}, where 1 stops; paid by length.

    States, breadth first: (), (0,), then after each prompt "said nothing" and "said 0"; the reward is called with the
    whole prefix that ends in the policy's token.
    """
    turns = [Say({(0, 1): 0.25, (0, 2): 0.75}), Act(2, (0,), stop=1)]
    mdp = from_turns(turns, lambda prefix: 10.0 * len(prefix) + prefix[-1], 3)
    assert mdp.next_state.tolist() == [
        [1, -1, -1],  # ()            -> (0,)
        [-1, 2, 3],  # (0,)           -> (0, 1) or (0, 2)
        [4, -1, -1],  # (0, 1)        -> (0, 1, 0), or 1 stops
        [5, -1, -1],  # (0, 2)
        [-1, -1, -1],  # (0, 1, 0)    two tokens: over
        [-1, -1, -1],  # (0, 2, 0)
    ]
    assert mdp.reward.tolist() == [[0, 0, 0], [0, 0, 0], [30, 31, 0], [30, 31, 0], [40, 41, 0], [40, 41, 0]]
    np.testing.assert_array_equal(
        mdp.ref_logits,
        [[0, -inf, -inf], [-inf, math.log(0.25), math.log(0.75)], *[[0, 0, -inf]] * 4],
    )
    assert mdp.is_policy.tolist() == [False, False, True, True, True, True]


@settings(max_examples=60, deadline=None)
@given(
    replies=st.dictionaries(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), st.integers(1, 9), min_size=1),
    by_function=st.booleans(),
)
def test_replies_that_share_beginnings_keep_their_probabilities(replies: dict[tuple[int, ...], int], by_function: bool) -> None:
    """The product of the rows along a reply is its probability; strings that begin another are left out beforehand.

    At most 4 factors and sums of at most 81 terms, each rounded by eps: 100 eps relative.
    """
    kept = {r: w for r, w in replies.items() if not any(o != r and o[: len(r)] == r for o in replies)}
    total = sum(kept.values())
    probabilities = {reply: weight / total for reply, weight in kept.items()}
    mdp = from_turns([Act(1, (0, 1)), Say((lambda prefix: probabilities) if by_function else probabilities)], sum, 3)
    assert not mdp.is_policy[int(mdp.next_state[0, 0])]
    for action in (0, 1):
        for reply, probability in probabilities.items():
            state, logp = int(mdp.next_state[mdp.start, action]), 0.0
            for token in reply:
                assert state >= 0
                logp += mdp.ref_logits[state, token]
                state = int(mdp.next_state[state, token])
            assert state == -1
            assert math.exp(logp) == pytest.approx(probability, rel=100 * EPS)


def test_a_random_reference_changes_only_policy_rows() -> None:
    mdp = from_turns([Say({(0,): 0.5, (1,): 0.5}), Act(2, (0, 1))], lambda p: 1.0, 3)
    noisy = random_reference(mdp, 5)
    assert np.array_equal(noisy.ref_logits[~mdp.is_policy], mdp.ref_logits[~mdp.is_policy])
    assert np.array_equal(noisy.allowed, mdp.allowed)
    assert np.array_equal(noisy.reward, mdp.reward)
    assert np.ptp(noisy.ref_logsumexp[mdp.is_policy]) > 0.1, "every state has a level of its own"
    assert same(noisy, random_reference(mdp, 5))
    assert not same(noisy, random_reference(mdp, 6))


# ---------------------------------------------------------------------------------------------------------- graph
@st.composite
def graphs(draw: st.DrawFn) -> tuple[Any, Any]:
    """(next_state, active) of 2..200 states: narrow chains beside wide levels, some edges back, some states alone.

    Most edges go up by a few states or to anywhere above; a few go anywhere, so that loops of all sizes appear, and the
    names of the states are shuffled. Kahn's algorithm then meets levels of one state and levels of a hundred.
    """
    n = draw(st.sampled_from([2, 3, 5, 10, 40, 100, 200]))
    V = draw(st.integers(1, 4))
    back = draw(st.sampled_from([0.0, 0.02, 0.2, 1.0]))
    near = draw(st.sampled_from([0.0, 0.5, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    state = np.arange(n)[:, None]
    step = np.where(rng.random((n, V)) < near, 1, rng.integers(1, n + 1, (n, V)))
    target = np.where(state + step < n, state + step, -1)
    target = np.where(rng.random((n, V)) < back, rng.integers(-1, n, (n, V)), target)
    order = rng.permutation(n)
    shuffled = np.empty_like(target)
    shuffled[order] = np.where(target < 0, -1, order[target])
    return shuffled, rng.random((n, V)) < draw(st.sampled_from([0.5, 0.9, 1.0]))


def to_networkx(next_state: Any, active: Any) -> Any:
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(next_state)))
    rows, tokens = np.nonzero(active & (next_state >= 0))
    graph.add_edges_from(zip(rows.tolist(), next_state[rows, tokens].tolist(), strict=True))
    return graph


def check_blocks(next_state: Any, active: Any) -> None:
    found = blocks(next_state, active)
    n = len(next_state)
    members = np.concatenate([block.states for block in found])
    assert sorted(members.tolist()) == list(range(n)), "every state is in exactly one block"
    position = np.empty(n, dtype=int)
    for i, block in enumerate(found):
        position[block.states] = i
        assert np.array_equal(np.arange(n)[block.index], block.states)
    graph = to_networkx(next_state, active)
    expected = {
        frozenset(c) for c in networkx.strongly_connected_components(graph) if len(c) > 1 or graph.has_edge(*(2 * tuple(c)))
    }
    assert {frozenset(b.states.tolist()) for b in found if b.cyclic} == expected
    inside = {s for component in expected for s in component}
    for source, target in graph.edges:
        if position[source] == position[target]:
            assert source in inside, "states of a block without loops do not follow each other"
        else:
            assert position[target] < position[source], "successors come first"


@settings(max_examples=200, deadline=None)
@given(graph=graphs())
def test_blocks_are_an_order_and_the_loops(graph: tuple[Any, Any]) -> None:
    check_blocks(*graph)


def test_narrow_levels_beside_wide_ones() -> None:
    """A chain (levels of one state) into a fan of 100 and back into a chain: levels are counted both ways, each once.

    State 0..9 a chain, 9 -> 10..109 through a table of 100 tokens, all of these -> 110, then a chain to the end.
    """
    n, V = 120, 100
    next_state = np.full((n, V), -1)
    next_state[:9, 0] = np.arange(1, 10)
    next_state[9] = np.arange(10, 110)
    next_state[10:110, :3] = 110
    next_state[110:119, 0] = np.arange(111, 120)
    check_blocks(next_state, np.ones((n, V), dtype=bool))
    order = [block.states.tolist() for block in blocks(next_state, np.ones((n, V), dtype=bool))]
    assert order == [*[[s] for s in range(119, 109, -1)], list(range(10, 110)), *[[s] for s in range(9, -1, -1)]]


@settings(max_examples=60, deadline=None)
@given(graph=graphs(), seed=st.integers(0, 2**32 - 1))
def test_recursions_agree_with_dense_algebra(graph: tuple[Any, Any], seed: int) -> None:
    """x = c + W x and y = c + W' y against numpy.linalg.solve; rows of W sum to at most 0.95, so |x| <= 20 max|c|.

    Both roads round by about n eps times the condition number (at most 2 / 0.05 in the largest norm): 1e-11 with room.
    """
    next_state, active = graph
    n = len(next_state)
    rng = np.random.default_rng(seed)
    weights = np.where(active, rng.random(next_state.shape), 0.0)
    weights *= 0.95 / np.maximum(weights.sum(1, keepdims=True), 1.0)
    dense = np.zeros((n, n))
    rows, tokens = np.nonzero(next_state >= 0)
    np.add.at(dense, (rows, next_state[rows, tokens]), weights[rows, tokens])
    assert np.array_equal(loop_matrix(next_state, weights, np.arange(n)), dense)
    recursion = Recursion(next_state, weights)
    for c in (rng.normal(size=n), rng.normal(size=(n, 3))):
        np.testing.assert_allclose(recursion.solve(c), np.linalg.solve(np.eye(n) - dense, c), rtol=0, atol=1e-11)
    c = rng.normal(size=n)
    np.testing.assert_allclose(recursion.solve_transpose(c), np.linalg.solve(np.eye(n) - dense.T, c), rtol=0, atol=1e-11 * n)


def test_a_loop_that_never_loses_weight_is_singular() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        Recursion(np.array([[0]]), np.array([[1.0]]))


@pytest.mark.parametrize(("off", "accepted"), [(5e-10, True), (-5e-10, True), (5e-9, False), (-5e-9, False)])
def test_environment_rows_sum_to_one_within_1e_9(off: float, accepted: bool) -> None:
    arrays = ([[-1, -1], [0, 0]], np.zeros((2, 2)), [[0.0, 0.0], [-LN2, math.log(0.5 + off)]], [True, False])
    if accepted:
        assert TokenMDP(*arrays).n_states == 2
    else:
        with pytest.raises(ValueError, match="ref_logits: expected log-probabilities that sum to 1"):
            TokenMDP(*arrays)


def test_rare_replies_stay_edges() -> None:
    """exp(-600) is a number, exp(-701) as good as none."""
    mdp = TokenMDP([[-1, -1, -1], [0, 0, 0]], np.zeros((2, 3)), [[0.0] * 3, [0.0, -600.0, -701.0]], [True, False])
    assert mdp.allowed[1].tolist() == [True, True, False]


def test_two_replies_are_random_and_a_coin_tossed_nowhere_is_not() -> None:
    """The environment state draws one of two tokens: random after an action, harmless out of reach or as a prompt."""
    reward, logits, owner = np.zeros((3, 2)), np.array([[0.0, 0.0], [-LN2, -LN2], [0.0, 0.0]]), [True, False, True]
    assert not TokenMDP([[1, -1], [2, -1], [-1, -1]], reward, logits, owner).deterministic
    assert TokenMDP([[-1, -1], [2, -1], [1, 1]], reward, logits, owner).deterministic
    assert TokenMDP([[-1, -1], [0, 2], [-1, -1]], reward, logits, owner, start=1).deterministic


def test_a_builder_may_have_exactly_as_many_states_as_allowed() -> None:
    line = lambda s: Row(next={0: s + 1 if s < 4 else END})  # noqa: E731
    assert from_states(0, line, 1, max_states=5).n_states == 5
    with pytest.raises(ValueError, match="describe: expected at most 4 states, got more"):
        from_states(0, line, 1, max_states=4)


def test_the_scale_of_a_random_reference() -> None:
    mdp = from_states(0, lambda s: Row(next=dict.fromkeys(range(2000), END)), 2000)
    spread = [random_reference(mdp, 0, scale=scale, level=0.0).ref_logits.std() for scale in (0.0, 0.5, 2.0)]
    np.testing.assert_allclose(spread, [0.0, 0.5, 2.0], rtol=0.1)  # 2000 draws: 1.6% each


def test_a_loop_that_hardly_loses_weight_is_solved_to_the_last_digit() -> None:
    """|c + W x - x| stays a few ulps of |x| where x is a million times c; one product with the inverse leaves 100 ulps."""
    worst = 0.0
    for n in (10, 30, 100):
        for seed in range(30):
            rng = np.random.default_rng(seed)
            next_state = np.stack([(np.arange(n) + 1) % n, np.zeros(n, dtype=int)], 1)
            weights = rng.uniform(0.1, 1.0, (n, 2)) * [1.0, 3.0]
            weights *= (1 - 1e-6) / weights.sum(1, keepdims=True)
            c = 1e-3 * rng.normal(size=n)
            c[-1] = 5.0
            x = Recursion(next_state, weights).solve(c)
            residual = c.astype(np.longdouble) + (weights * x[next_state].astype(np.longdouble)).sum(1) - x
            worst = max(worst, float(np.abs(residual).max() / np.abs(x).max()))
    assert worst <= 8 * EPS
