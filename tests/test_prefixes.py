"""The prefix tree of an automaton, and a network's logits on it: the truth about training that network."""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from strategies import EPS, World, automata, holds_for

from shiq_lab import TokenMDP, TokenStats, enumerate_trajectories, make, shiq_loss, solve
from shiq_lab.enumeration import count_prefixes, count_trajectories, unfold
from shiq_lab.losses.sequences import groups_of
from shiq_lab.models.prefixes import Prefixes
from shiq_lab.models.tabular import CausalLMOutput, TabularLM
from shiq_lab.models.transformer import TinyTransformer

SMALL: dict[str, Callable[[], TokenMDP]] = {
    "Tree": lambda: make("Tree", depth=3, n_tokens=3),
    "Loop with a horizon": lambda: replace(make("Loop"), horizon=4),
    "RandomWalk": lambda: make("RandomWalk", n_nodes=5, horizon=3),
    "ToolCall": lambda: make("ToolCall", n_functions=2, n_arguments=2, n_values=2),
    "RandomTool": lambda: make("RandomTool", n_functions=2, n_arguments=1, n_values=2),
    "Parity": lambda: make("Parity", prompt_length=2, length=3),
    "Forbidden": lambda: make("Forbidden", depth=3),
}
every = pytest.mark.parametrize("name", SMALL)


# ------------------------------------------------------------------------------------------------------------ the tree
@every
def test_a_prefix_is_worth_what_its_state_is(name: str) -> None:
    """Two solutions, by other recursions: of the tree, and of the automaton (its t-th layer, where it has a horizon)."""
    mdp = SMALL[name]()
    flat = mdp if mdp.horizon is None else mdp.unroll()
    tree, origin = unfold(mdp)
    found, expected = solve(tree, beta=0.3, gamma=0.9), solve(flat, beta=0.3, gamma=0.9)
    bound = 64 * EPS * expected.scale
    assert float(np.abs(found.v() - expected.v()[origin]).max()) <= bound
    edges = tree.allowed
    assert float(np.abs(found.q()[edges] - expected.q()[origin][edges]).max()) <= bound
    assert (tree.next_state[tree.next_state >= 0] == np.arange(1, tree.n_states)).all()  # every state but the root: one parent


@every
def test_the_tree_says_the_same_strings(name: str) -> None:
    mdp = SMALL[name]()
    tree, _ = unfold(mdp)
    said = {}
    for which in (mdp, tree):
        rows = enumerate_trajectories(which)
        keys = [tuple(ids[mask == 1].tolist()) for ids, mask in zip(rows.input_ids, rows.attention_mask, strict=True)]
        said[id(which)] = dict(zip(keys, rows.weights.tolist(), strict=True))
    first, second = said.values()
    assert first.keys() == second.keys() and len(first) == count_trajectories(mdp) == count_trajectories(tree)
    assert max(abs(first[key] - second[key]) for key in first) <= 32 * EPS


@every
def test_prefixes_are_counted_exactly(name: str) -> None:
    mdp = SMALL[name]()
    seen = set()
    for ids, mask in zip(*[getattr(enumerate_trajectories(mdp), k) for k in ("input_ids", "attention_mask")], strict=True):
        row = tuple(ids[mask == 1].tolist())
        seen |= {row[:k] for k in range(len(row))}
    assert count_prefixes(mdp) == len(seen) == unfold(mdp)[0].n_states


@holds_for(40, automata(loops=False))
def test_random_automata_unfold(case: World) -> None:
    total = count_prefixes(case.mdp)
    assert total is not None
    if total > 3000:
        return
    tree, origin = unfold(case.mdp)
    found, expected = (solve(m, beta=case.beta, gamma=case.gamma) for m in (tree, case.mdp))
    assert tree.n_states == total
    if case.mdp.horizon is None:
        assert float(np.abs(found.v() - expected.v()[origin]).max()) <= 256 * EPS * expected.scale
    else:
        assert abs(found.objective - expected.objective) <= 256 * EPS * expected.scale


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: unfold(make("Loop")),
            "max_states: expected at least the number of prefixes, infinitely many, got 100000. "
            "Take smaller parameters or a horizon.",
        ),
        (
            lambda: unfold(make("Needle", length=9), 1000),
            "max_states: expected at least the number of prefixes, 87382, got 1000. Take smaller parameters or a horizon.",
        ),
        (
            lambda: Prefixes.of(TokenMDP(np.array([[-1]]), np.zeros((1, 1)), np.zeros((1, 1)))),
            "mdp: expected an environment state at the start, got policy state 0. Add one: mdp.with_prompt(token).",
        ),
        (
            lambda: Prefixes.of(make("Bandit")).table(TinyTransformer(12)),
            "model: expected logits of 9 tokens, got 12.",
        ),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# ----------------------------------------------------------------------------------------------------------- the network
def network(mdp: TokenMDP) -> TinyTransformer:
    return TinyTransformer(mdp.n_tokens, width=16, layers=2, heads=2, seed=7).double()


@every
def test_few_rows_hold_every_prefix(name: str) -> None:
    """The table against one forward pass a prefix, read at its last token; -inf where forbidden."""
    mdp = SMALL[name]()
    prefixes = Prefixes.of(mdp)
    tree, model = prefixes.tree, network(mdp)
    table = prefixes.table(model).detach()
    paths = {0: []}
    for state in range(tree.n_states):
        for token in np.flatnonzero(tree.next_state[state] >= 0):
            paths[int(tree.next_state[state, token])] = [*paths[state], int(token)]
    assert int((prefixes.attention_mask.sum(1)).sum()) < sum(len(paths[s]) for s in np.flatnonzero(tree.is_policy))
    for state in np.flatnonzero(tree.is_policy):
        alone = model(torch.tensor([paths[int(state)]])).logits[0, -1].detach()
        allowed = torch.tensor(tree.allowed[state])
        assert float((table[state] - alone)[allowed].abs().max()) <= 1e-12
        assert (table[state][~allowed] == -torch.inf).all()
    environment = torch.tensor(~tree.is_policy)
    assert torch.equal(table[environment], torch.tensor(tree.ref_logits)[environment])


@every
def test_the_loss_of_the_table_is_the_loss_of_the_rows(name: str) -> None:
    """One loss object, two roads to its statistics: the table of prefixes, and logits of whole rows. Values and gradients."""
    mdp = SMALL[name]()
    model = network(mdp)
    prefixes = Prefixes.of(mdp).with_reference(TinyTransformer(mdp.n_tokens, width=16, heads=2, seed=1).double())
    tree = prefixes.tree
    rows = enumerate_trajectories(tree)
    ref = TokenStats.from_table(torch.tensor(np.array(tree.ref_logits)), rows)
    allowed = TabularLM(tree).allowed[rows.states.clamp(min=0)]
    gradients = []
    for road in ("table", "rows"):
        if road == "table":
            stats = TokenStats.from_table(prefixes.table(model), rows)
        else:
            logits = model(rows.input_ids, rows.attention_mask).logits
            stats = TokenStats.from_logits(torch.where(allowed, logits, -torch.inf), rows)
        loss = shiq_loss(stats, ref, rows, beta=0.3, gamma=0.9)
        gradients.append([loss.detach(), *(g for g in torch.autograd.grad(loss, list(model.parameters())))])
    for first, second in zip(*gradients, strict=True):
        size = 1 + float(first.abs().max())
        assert float((first - second).abs().max()) <= 1e-12 * size


@pytest.mark.parametrize("name", ["Tree", "Loop with a horizon", "ToolCall", "Parity", "Forbidden"])
def test_the_truth_about_a_network_by_listing(name: str) -> None:
    """v* of a prompt = beta ln E_{y ~ network} exp(R(y) / beta), the network's chances summed over whole rows: no recursion."""
    mdp = SMALL[name]()
    model, beta = network(mdp), 0.3
    tree = Prefixes.of(mdp).with_reference(model).tree
    rows = enumerate_trajectories(tree)
    logits = model(rows.input_ids, rows.attention_mask).logits.detach()
    allowed = TabularLM(tree).allowed[rows.states.clamp(min=0)]
    log_policy = torch.where(allowed, logits, -torch.inf).log_softmax(-1)
    taken = log_policy[:, :-1].gather(-1, rows.input_ids[:, 1:, None])[..., 0]
    chance = torch.exp(torch.where(rows.completion_mask[:, 1:] == 1, taken, 0.0).sum(1))
    returns = (rows.rewards * rows.completion_mask).sum(1)
    groups = groups_of(replace(rows, weights=chance), chance.dtype, population=True)
    total = torch.zeros(int(rows.group_ids.max()) + 1, dtype=chance.dtype)
    total = total.index_add(0, groups.index, chance * torch.exp(returns / beta))
    spoken = torch.zeros_like(total).index_add(0, groups.index, rows.weights)  # the environment's chances of each prompt
    expected = float((spoken / spoken.sum() * beta * torch.log(total)).sum())
    assert solve(tree, beta=beta).objective == pytest.approx(expected, abs=1e-12)


def test_the_reference_is_the_networks_own() -> None:
    """Levels are the network's; float32 logits become the reference to their last bit; replies keep their float64."""
    mdp = SMALL["RandomTool"]()
    model = TinyTransformer(mdp.n_tokens, width=16, heads=2, seed=7)
    bare, frozen = Prefixes.of(mdp), Prefixes.of(mdp).with_reference(model)
    speaks = frozen.tree.is_policy
    table = frozen.table(model).detach()
    assert table.dtype == torch.float32
    assert np.array_equal(frozen.tree.ref_logits[speaks], table[torch.tensor(speaks)].double().numpy())
    assert np.array_equal(frozen.tree.ref_logits[~speaks], bare.tree.ref_logits[~speaks])
    assert frozen.tree.ref_logsumexp[speaks].std() > 0.1


def test_a_table_one_token_late_is_caught() -> None:
    """The planted bug: logits read one position early. The comparison with single prefixes sees it."""
    mdp = SMALL["Tree"]()
    prefixes, model = Prefixes.of(mdp), network(mdp)

    def late(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> CausalLMOutput:
        return CausalLMOutput(model(input_ids, attention_mask).logits.roll(1, 1))

    edges = torch.tensor(prefixes.tree.allowed & prefixes.tree.is_policy[:, None])
    assert float((prefixes.table(late) - prefixes.table(model)).detach()[edges].abs().max()) > 1e-2


def test_limits_are_exact() -> None:
    mdp = SMALL["Tree"]()
    size = unfold(mdp)[0].n_states
    assert unfold(mdp, size)[0].n_states == size == Prefixes.of(mdp, size).tree.n_states
    for limited in (unfold, Prefixes.of):
        with pytest.raises(ValueError, match=f"the number of prefixes, {size}, got {size - 1}"):
            limited(mdp, size - 1)


def test_what_cannot_be_reached_is_not_counted() -> None:
    """A loop beside the way makes no string infinite."""
    mdp = TokenMDP(np.array([[-1, -1], [1, 1]]), np.zeros((2, 2)), np.zeros((2, 2))).with_prompt(0)
    assert count_prefixes(mdp) == 2 and count_trajectories(mdp) == 2
