"""What is written on the pictures is the truth: every number is read back from the texts and compared by another road."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Patch, Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from shiq_lab import TokenBatch, TokenMDP, TokenStats, enumerate_trajectories, make, pictures, plotting, shiq_loss, solve
from shiq_lab.batch import cut, pack, pad
from shiq_lab.bellman import Solution
from shiq_lab.pictures import credit, drawing
from shiq_lab.sampling import sample

TREES: dict[str, TokenMDP] = {
    "bandit": make("Bandit", n_arms=4),
    "tree": make("Tree", depth=2, n_tokens=3),
    "brackets": make("Brackets", max_length=2),
    "needle": make("Needle", length=3, n_tokens=2),
    "tool": make("ToolCall", n_functions=2, n_arguments=1, n_values=2),
    "random tool": make("RandomTool", n_functions=2, n_arguments=1, n_values=2),
    "loop, horizon": replace(make("Loop", n_states=3), horizon=3),
}
AUTOMATA = TREES | {
    "loop": make("Loop", n_states=4),
    "loop to itself": make("Loop", n_states=1),
    "walk": make("RandomWalk", n_nodes=5),
    "brackets, longer": make("Brackets", max_length=4),
    "needle, wider": make("Needle", length=3, n_tokens=4),
}


def optimum(mdp: TokenMDP, gamma: float = 0.9) -> Solution:
    return solve(mdp, beta=0.5, gamma=gamma)


def texts(figure: Figure, kind: str) -> dict[int, str]:
    """The texts of a kind, by number: {3: "0.53"} for a Text of gid "v-3"."""
    found = [t for t in figure.findobj(Text) if (t.get_gid() or "").rpartition("-")[0] == kind]
    out = {int((t.get_gid() or "").rpartition("-")[2]): t.get_text() for t in found}
    assert len(out) == len(found), f"two texts of one name among {kind}"
    return out


def agree(written: str, truth: float) -> None:
    """A printed number is the truth, rounded: within half a unit of its last digit (and float64's rounding at the tie)."""
    said = written.split()[-1].strip("()").replace("\N{MINUS SIGN}", "-")
    if said == "<0.01":
        assert 0 < truth < 0.005
        return
    mantissa, _, power = said.partition("e")
    unit = 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))
    assert abs(float(said) - truth) <= unit / 2 + 1e-9, (written, truth)


def shapes(figure: Figure) -> dict[str, Any]:
    return {str(p.get_gid()): p for p in figure.axes[0].patches if p.get_gid()}


# ------------------------------------------------------------------------------------------------------------ the tree
@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("name", TREES)
def test_the_tree_shows_the_exact_values_of_every_string(name: str, gamma: float) -> None:
    """v*, q*, pi* and pi_ref as written, against the solution of the unrolled automaton walked token by token."""
    mdp, solution = TREES[name], optimum(TREES[name], gamma)
    figure, graph = pictures.tree_figure(solution, max_states=80), pictures.tree_graph(solution, max_states=80)
    flat = mdp if mdp.horizon is None else mdp.unroll()
    other = solve(flat, beta=0.5, gamma=gamma)  # the second road where a horizon makes values depend on t
    v, q, token, chance = (texts(figure, kind) for kind in ("v", "q", "token", "pi"))
    at, compared = {0: flat.start}, 0
    for i, edge in enumerate(graph.edges):
        (a,), s = edge.tokens, at[edge.source]
        at[edge.target] = int(flat.next_state[s, a])
        assert token[i] == mdp.show(a)
        if flat.is_policy[s]:
            after = at[edge.target]
            agree(q[i], flat.reward[s, a] + gamma * (other.v()[after] if after >= 0 else 0.0))
            agree(chance[i].split()[1], math.exp(other.log_policy()[s, a]))
            agree(chance[i].split()[2], math.exp(flat.ref_log_policy[s, a]))
            compared += 1
        else:
            assert i not in q
            agree(chance[i], math.exp(flat.ref_logits[s, a]))
    assert compared > 0 and len(token) == len(graph.edges) == len(at) - 1
    assert v.keys() == {i for i, s in at.items() if s >= 0}
    for i, said in v.items():
        agree(said, other.v()[at[i]])


@pytest.mark.parametrize("name", TREES)
def test_the_tree_holds_every_string_once_with_its_probability(name: str) -> None:
    """Strings and their probabilities under pi*, multiplied along the edges, are those of the listing."""
    mdp, solution = TREES[name], optimum(TREES[name])
    graph = pictures.tree_graph(solution, max_states=80)
    said: dict[int, tuple[tuple[int, ...], float]] = {0: ((), 1.0)}
    for edge in graph.edges:
        string, p = said[edge.source]
        said[edge.target] = (string + edge.tokens, p * edge.policy)
    horizon = mdp.horizon or 1
    table = np.stack([solution.log_policy(t) for t in range(horizon)])
    batch = enumerate_trajectories(mdp, behavior=table if mdp.horizon else table[0])
    listed = {
        tuple(ids[real == 1].tolist()): float(w)
        for ids, real, w in zip(batch.input_ids, batch.attention_mask, batch.weights, strict=True)
    }
    drawn = {string: p for i, (string, p) in said.items() if graph.nodes[i].owner == "end"}
    assert drawn.keys() == listed.keys() and len(drawn) > 1
    # a product of at most 8 factors, each exp of a difference of numbers of size |q| / beta < 10: about 100 eps
    assert all(abs(drawn[y] - listed[y]) <= 3e-14 for y in drawn)


@pytest.mark.parametrize("name", TREES)
def test_shapes_tell_who_speaks_and_widths_are_the_policy(name: str) -> None:
    solution = optimum(TREES[name])
    graph, seen = pictures.tree_graph(solution, max_states=80), shapes(pictures.tree_figure(solution, max_states=80))
    for i, node in enumerate(graph.nodes):
        owner = "end" if node.state < 0 else "policy" if solution.mdp.is_policy[node.state] else "environment"
        shape = seen[f"{owner}-{i}"]
        assert isinstance(shape, Rectangle if owner == "environment" else Circle)
        assert shape.get_facecolor()[:3] == matplotlib.colors.to_rgb(drawing.FILL[owner])
    for i, edge in enumerate(graph.edges):
        width = seen[f"edge-{i}"].get_linewidth()
        assert width == pytest.approx(0.4 + 4.4 * edge.policy, rel=1e-15), "a hair line, then proportional"
    assert len(seen) == len(graph.nodes) + len(graph.edges)


def test_a_tree_that_is_too_large_says_its_size() -> None:
    remedy = "Take smaller parameters, or a shorter horizon."
    for mdp, size in ((make("Brackets", max_length=4), "63"), (make("Loop"), "infinitely many")):
        with pytest.raises(ValueError) as error:
            pictures.tree_figure(optimum(mdp))
        assert str(error.value) == f"max_states: expected at least the tree's {size} states and ends, got 40. {remedy}"
    solution = optimum(make("Brackets", max_length=4))
    assert len(pictures.tree_graph(solution, max_states=63).nodes) == 63
    with pytest.raises(ValueError, match="expected at least the tree's 63"):
        pictures.tree_graph(solution, max_states=62)
    with pytest.raises(ValueError) as error:
        pictures.automaton_figure(optimum(make("ToolCall")))
    assert str(error.value) == (
        "max_states: expected at least the automaton's 67 reachable states, got 40. Take smaller parameters."
    )
    for draw in (pictures.tree_figure, pictures.automaton_figure):
        with pytest.raises(ValueError, match=r"^solution: expected a Solution, got 'Tree'\. shiq_lab\.solve"):
            draw("Tree")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- the automaton
@pytest.mark.parametrize("name", AUTOMATA)
def test_the_automaton_shows_every_edge_once_and_v_in_every_state(name: str) -> None:
    mdp, solution = AUTOMATA[name], optimum(AUTOMATA[name])
    graph, figure = pictures.automaton_graph(solution), pictures.automaton_figure(solution)
    states = [n.state for n in graph.nodes if n.owner != "end"]
    assert sorted(states) == np.flatnonzero(mdp.reachable).tolist() and states[0] == mdp.start
    drawn = sorted((graph.nodes[e.source].state, a, graph.nodes[e.target].state) for e in graph.edges for a in e.tokens)
    edges = [(s, a, mdp.next_state[s, a]) for s, a in np.argwhere(mdp.allowed & mdp.reachable[:, None]).tolist()]
    assert drawn == sorted(edges)
    pairs = [(e.source, e.target) for e in graph.edges]
    assert len(set(pairs)) == len(pairs), "tokens with one successor share an edge"
    v, token = texts(figure, "v"), texts(figure, "token")
    for i, s in enumerate(states):
        agree(v[i], solution.v()[s])
    seen = shapes(figure)
    for i, e in enumerate(graph.edges):
        s = graph.nodes[e.source].state
        share = float(np.exp(solution.log_policy()[s, list(e.tokens)]).sum())
        assert seen[f"edge-{i}"].get_linewidth() == pytest.approx(0.4 + 4.4 * share, rel=1e-12)  # a sum of few terms
        names, _, chance = token[i].partition("  P ")
        assert names in (" ".join(mdp.show(a) for a in e.tokens), f"{len(e.tokens)} tokens")
        assert bool(chance) == (not mdp.is_policy[s] and int(mdp.allowed[s].sum()) > 1)
        if chance:
            agree(chance, share)
    assert len(v) == len(states) and len(token) == len(graph.edges)
    for i, node in enumerate(graph.nodes):
        assert isinstance(seen[f"{node.owner}-{i}"], Rectangle if node.owner == "environment" else Circle)


@pytest.mark.parametrize("name", AUTOMATA)
def test_a_band_is_a_turn(name: str) -> None:
    """Bands cover the columns without gap, owners alternate, and every state stands in a band of its owner."""
    graph = pictures.automaton_graph(optimum(AUTOMATA[name]))
    assert [b[0] for b in graph.bands] == [0, *(b[1] + 1 for b in graph.bands[:-1])]
    for node in graph.nodes:
        if node.owner != "end":
            (band,) = [b for b in graph.bands if b[0] <= node.column <= b[1]]
            assert band[2].endswith("policy") == (node.owner == "policy")
    owners = [b[2].endswith("policy") for b in graph.bands]
    assert all(a != b for a, b in itertools.pairwise(owners))


def test_the_turns_are_named() -> None:
    named = lambda mdp: [b[2] for b in pictures.automaton_graph(optimum(mdp)).bands]  # noqa: E731
    assert named(AUTOMATA["tool"]) == ["prompt", "turn 1: policy", "tool replies", "turn 2: policy"]
    assert named(AUTOMATA["loop"]) == ["prompt", "policy"]
    assert list(texts(pictures.automaton_figure(optimum(AUTOMATA["tool"])), "band").values()) == named(AUTOMATA["tool"])


def test_an_automaton_with_a_horizon_shows_the_layer_asked_for() -> None:
    solution = optimum(TREES["loop, horizon"])
    shown = [texts(pictures.automaton_figure(solution, t=t), "v") for t in (0, 2)]
    graph = pictures.automaton_graph(solution, t=2)
    for i, said in shown[1].items():
        agree(said, solution.v(2)[graph.nodes[i].state])
    assert shown[0] != shown[1]
    with pytest.raises(ValueError, match="t: expected less than the horizon 3"):
        pictures.automaton_figure(solution, t=3)


# ------------------------------------------------------------------------------------------------------ the trajectory
def a_batch(mdp: TokenMDP, side: str, shortest: int | None) -> tuple[TokenBatch, TokenStats, TokenStats]:
    batch = sample(mdp, mdp.ref_log_policy, 4, rng=5)
    batch = pad(cut(batch, shortest) if shortest else batch, side, width=9)  # type: ignore[arg-type]
    ref = torch.from_numpy(np.where(mdp.allowed, mdp.ref_logits, -1e9))
    noise = torch.randn(ref.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return batch, TokenStats.from_table(ref + noise, batch), TokenStats.from_table(ref, batch)


SETTINGS = [
    ("tool", "right", None, 1.0, None),
    ("tool", "left", None, 0.9, None),
    ("tool", "right", 6, 0.9, None),
    ("random tool", "left", 6, 0.9, 2),
    ("tree", "right", None, 0.8, 1),
]


@pytest.mark.parametrize(("name", "side", "shortest", "gamma", "n"), SETTINGS)
def test_the_credit_on_the_picture_is_autograds(
    name: str, side: str, shortest: int | None, gamma: float, n: int | None
) -> None:
    """D as written is d(loss of the row) / d token_logit / (2 beta) by autograd; rho from its definition, by plain loops."""
    mdp, beta = TREES[name], 0.5
    batch, stats, ref = a_batch(mdp, side, shortest)
    assert bool(batch.terminated.all()) == (shortest is None), "cut rows are bootstrapped: they must be among these"
    live = replace(stats, token_logit=stats.token_logit.clone().requires_grad_())
    for row in range(len(batch)):
        loss = shiq_loss(live, ref, batch, beta=beta, gamma=gamma, n_steps=n, reduction="none")[row]
        (gradient,) = torch.autograd.grad(loss, live.token_logit)
        figure = pictures.trajectory_figure(
            stats, ref, batch, row, beta=beta, gamma=gamma, tokens=mdp.tokens, n_steps=n, max_tokens=9
        )
        places = torch.nonzero(batch.completion_mask[row])[:, 0].tolist()
        shown = {kind: texts(figure, kind) for kind in ("r", "ratio", "rho", "D", "token")}
        assert all(sorted(shown[kind]) == places for kind in ("r", "ratio", "rho", "D")), "actions, and nothing else"
        plain = by_hand(stats, ref, batch, row, beta, gamma, n)
        for k, i in enumerate(places):
            agree(shown["r"][i], float(batch.rewards[row, i]))
            agree(shown["ratio"][i], plain[k][0])
            agree(shown["rho"][i], plain[k][1])
            agree(shown["D"][i], float(gradient[row, i - 1]) / (2 * beta))
            assert shown["token"][i] == mdp.show(int(batch.input_ids[row, i]))
        assert float(loss.detach()) == pytest.approx(sum(rho**2 for _, rho in plain), rel=1e-12)  # few terms of one sign


def by_hand(
    stats: TokenStats, ref: TokenStats, batch: TokenBatch, row: int, beta: float, gamma: float, n: int | None
) -> list[tuple[float, float]]:
    """(beta ln ratio, rho) of every action: rho_t = Dv(s_t) - sum gamma^{k-t} [r_k - beta ln ratio_k] - gamma^m Dv(s_{t+m})."""
    places = [i - 1 for i in torch.nonzero(batch.completion_mask[row])[:, 0].tolist()]
    get = lambda x, i: float(x[row, i])  # noqa: E731
    dv = [beta * (get(stats.logsumexp, i) - get(ref.logsumexp, i)) for i in places]
    end = 0.0 if bool(batch.terminated[row]) else beta * float(stats.end_logsumexp[row] - ref.end_logsumexp[row])
    dv.append(end)
    ratio = [beta * (get(stats.token_logit, i) - get(ref.token_logit, i)) - dv[k] for k, i in enumerate(places)]
    out = []
    for t in range(len(places)):
        stop = len(places) if n is None else min(len(places), t + n)
        paid = sum(gamma ** (k - t) * (float(batch.rewards[row, places[k] + 1]) - ratio[k]) for k in range(t, stop))
        out.append((ratio[t], dv[t] - paid - gamma ** (stop - t) * dv[stop]))
    return out


def test_boxes_are_shaded_by_who_spoke() -> None:
    batch, stats, ref = a_batch(TREES["tool"], "left", 6)
    row = int(torch.argmax((~batch.terminated).int()))
    assert not bool(batch.terminated[row]), "the case that is to be seen, a cut row, is missing"
    data = pictures.credit_of(stats, ref, batch, row, beta=0.5)
    expected, spoken = [], False
    for real, acts in zip(batch.attention_mask[row].tolist(), batch.completion_mask[row].tolist(), strict=True):
        spoken = spoken or bool(acts)
        expected.append("padding" if not real else "policy" if acts else "tool reply" if spoken else "prompt")
    assert list(data.kind) == expected and set(expected) == {"padding", "prompt", "policy", "tool reply"}
    figure = pictures.trajectory_figure(stats, ref, batch, row, beta=0.5)
    boxes = shapes(figure)
    for i, kind in enumerate(expected):
        box = boxes[f"{kind.replace(' ', '-')}-{i}"]
        assert box.get_facecolor()[:3] == matplotlib.colors.to_rgb(credit.SHADE[kind])
    assert data.cut == 8, "left-padded: the last token is the last column"
    words = [t.get_text() for t in figure.legends[0].get_texts()]
    assert words == ["prompt", "policy", "tool reply", "padding", "the row is cut here"]
    spelled = texts(figure, "token")
    assert spelled == {
        i: str(int(a)) if m else "" for i, (a, m) in enumerate(zip(data.ids, batch.attention_mask[row], strict=True))
    }


def test_bars_are_as_long_as_their_numbers_say() -> None:
    batch, stats, ref = a_batch(TREES["tool"], "right", None)
    data = pictures.credit_of(stats, ref, batch, 0, beta=0.5, gamma=0.9)
    figure = pictures.trajectory_figure(stats, ref, batch, 0, beta=0.5, gamma=0.9)
    for axes, values in zip(figure.axes[1:], (data.reward, data.log_ratio, data.rho, data.D), strict=True):
        bars = {round(b.get_x() + b.get_width() / 2): b.get_height() for b in itertools.chain(*axes.containers)}
        known = np.flatnonzero(~np.isnan(values)).tolist()
        assert bars == {i: values[i] for i in known} and len(bars) > 1


def test_what_no_trajectory_can_be_drawn_of() -> None:
    batch, stats, ref = a_batch(TREES["tool"], "right", None)
    for row, received in ((4, "4"), (-1, "-1"), (True, "True")):
        with pytest.raises(ValueError, match=f"row: expected a .*, got {received}"):
            pictures.trajectory_figure(stats, ref, batch, row, beta=0.5)
    with pytest.raises(ValueError) as error:
        pictures.trajectory_figure(stats, ref, batch, 0, beta=0.5, max_tokens=8)
    assert str(error.value) == (
        "max_tokens: expected at least the row's 9 tokens, padding included, got 8. Cut the batch, or draw a shorter row."
    )
    packed = pack(batch, 20)
    table = torch.zeros(TREES["tool"].ref_logits.shape, dtype=torch.float64)
    flat = TokenStats.from_table(table, packed)
    with pytest.raises(ValueError, match="batch: expected rows that are not packed"):
        pictures.trajectory_figure(flat, flat, packed, beta=0.5)


# ------------------------------------------------------------------------------------------------------------ all three
def a_trajectory(side: str = "right") -> Figure:
    batch, stats, ref = a_batch(TREES["tool"], side, None)
    return pictures.trajectory_figure(stats, ref, batch, beta=0.5, gamma=0.9, tokens=TREES["tool"].tokens)


def a_tree(name: str) -> Figure:
    return pictures.tree_figure(optimum(TREES[name]), max_states=80)


def an_automaton(name: str) -> Figure:
    return pictures.automaton_figure(optimum(AUTOMATA[name]))


PAGES: dict[str, Callable[[], Figure]] = {
    **{f"tree of {name}": partial(a_tree, name) for name in TREES},
    **{f"automaton of {name}": partial(an_automaton, name) for name in AUTOMATA},
    "trajectory": a_trajectory,
    "trajectory, left": partial(a_trajectory, "left"),
}


LARGE = {"tree of random tool"}  # 68 nodes: seconds


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] if p in LARGE else []) for p in PAGES])
def test_no_text_covers_another_or_leaves_the_page(page: str) -> None:
    figure = PAGES[page]()
    figure.canvas.draw()
    found = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    boxes = [(t.get_text(), t.get_window_extent().padded(-0.5)) for t in found]  # half a pixel of antialiasing
    assert len(boxes) > 8
    for text, box in boxes:
        assert figure.bbox.x0 < box.x0 and box.x1 < figure.bbox.x1, f"{text!r} leaves the page"
        assert figure.bbox.y0 < box.y0 and box.y1 < figure.bbox.y1, f"{text!r} leaves the page"
    for (a, box), (b, other) in itertools.combinations(boxes, 2):
        assert not cover(box, other), f"{a!r} on {b!r}"
    named = lambda artist: str(artist.get_gid()).partition("-")[0]  # noqa: E731
    states = [p for p in figure.findobj(Patch) if named(p) in drawing.FILL and len(figure.axes) == 1]
    labels = [t for t in found if named(t) in ("token", "q", "pi", "band")]
    for label, state in itertools.product(labels, states):
        assert not cover(label.get_window_extent(), state.get_window_extent()), f"{label.get_text()!r} on {state.get_gid()}"


def cover(a: Bbox, b: Bbox) -> bool:
    return bool(a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1)


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
@pytest.mark.parametrize("page", ["tree of bandit", "automaton of loop", "trajectory"])
def test_the_same_picture_is_the_same_bytes(page: str, kind: str, tmp_path: Path) -> None:
    """Saved twice, built again, and built under somebody else's matplotlib settings."""
    figure = PAGES[page]()
    paths = [plotting.save(figure, tmp_path / f"{i}.{kind}") for i in range(2)]
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "svg.hashsalt": "other", "savefig.dpi": 20}):
        paths.append(plotting.save(PAGES[page](), tmp_path / f"2.{kind}"))
        assert matplotlib.rcParams["font.size"] == 20, "the style stays inside"
    assert dict(matplotlib.rcParams) == before
    first, *others = (path.read_bytes() for path in paths)
    assert all(first == other for other in others) and len(first) > 1000
    assert not any(word in first for word in (b"Matplotlib v", b"CreationDate", b"dc:date", b"Software"))


def test_tokens_of_real_tokenizers_can_be_printed(tmp_path: Path) -> None:
    """White space, formulas, letters that the font lacks, long strings; a missing glyph would warn, an error here."""
    strings = ["$x^2$", " the", "a\nb", "\N{CJK UNIFIED IDEOGRAPH-8A9E}", "<|endoftext|>", "\ud800"]
    expected = ["$x^2$", "␣the", "a\\nb", "\\u8a9e", "<|endof…", "\\ud800"]
    assert [drawing.spell(s) for s in strings] == expected and drawing.spell("") == "∅"
    mdp = TokenMDP(np.full((1, 6), -1), np.arange(6.0)[None], np.zeros((1, 6)), tokens=tuple(strings))
    for draw in (pictures.tree_figure, pictures.automaton_figure):
        plotting.save(draw(solve(mdp, beta=1.0)), tmp_path / "a.png")
    assert list(texts(pictures.tree_figure(solve(mdp, beta=1.0)), "token").values()) == expected


@pytest.mark.parametrize(
    ("x", "places", "said"),
    [
        (0.125, 2, "0.12"),
        (-0.001, 2, "0.00"),
        (-1.5, 0, "−2"),
        (1234.5, 0, "1234"),
        (2.5e7, 0, "2.5e+07"),
        (3e-9, 9, "3.0e-09"),
    ],
)
def test_numbers_are_rounded_honestly(x: float, places: int, said: str) -> None:
    assert drawing.number(x, places).replace("e−", "e-") == said


def test_places_follow_the_largest_number() -> None:
    assert [drawing.decimals(x) for x in ([], [0.0], [5.0, -0.2], [0.03], [250.0], [-4e-5])] == [2, 2, 2, 3, 0, 6]
