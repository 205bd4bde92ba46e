"""How many rows does ShiQ need, and what does it make of tokens that no row ever tries? Not a reconstruction.

A tree of all 64 strings of 3 letters out of 4 (21 states, 84 state-token pairs), a standard normal reward on every token,
random reference logits; beta = gamma = 1. n rows are drawn from the uniform, the reference or the optimal policy, and the
empirical minimum is found exactly: Gauss-Newton on the rows for ShiQ and for sequence only, closed forms for the losses that
estimate an expectation. The seed draws rewards, reference, rows, and which tokens are never tried.

Theory. Rewards are free of noise and the world is deterministic, so every residual is zero at l* on any rows (F10): nothing is
estimated, and the error vanishes as soon as every state-token pair was tried (F8), a threshold and no rate. Before that the
zero is known too. A token b never taken enters through log-sum-exp alone, with whatever logit it has; Gauss-Newton leaves it
at the reference, so with A(s) the tried tokens

    q(s, a) = r + v(s') for a in A(s),    v(s) = beta ln( sum_{a in A(s)} pi_ref e^{q(s,a)/beta} + sum_{b not in A(s)} pi_ref )

which are the exact values of the automaton where an untried token ends the episode and pays nothing. So a level added to all
returns, which leaves pi* alone, changes what partial support converges to. A first-order method moves the untried logits on
its way, wherever that leads; the same automaton, in which they pay beta (l - l_ref), then has what it found.

REINFORCE with importance weights w(y) = share of y / mu(y) is stationary where w(y) (R(y) - beta ln(pi/pi_ref)) is one number c
on all rows seen, and SFT at the shares themselves. Both are known up to 1 / sqrt(n): with N strings, for large n

    E KL(pi || pi*) = (v*/beta)^2 / (2n) sum_y pi*(1 - pi*) / mu     and, on rows of pi*,     (N - 1) / (2n)

while SFT on other rows goes to what made them.
"""

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shiq_lab.batch import TokenBatch
from shiq_lab.bellman import evaluate, solve
from shiq_lab.envs.tree import tree
from shiq_lab.graph import Bools, Floats, Ints
from shiq_lab.learning import descend, rows_of, world_of
from shiq_lab.mdp import TokenMDP
from shiq_lab.objectives import World, spoken
from shiq_lab.plotting import COLORS, GREY, MARKERS, PALETTE, figure, style
from shiq_lab.policies import softmax_policy, uniform_policy
from shiq_lab.studies.frame import Case, Claim, Record, Result, Settings, Study
from shiq_lab.studies.statistics import interval
from shiq_lab.training import train_on_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEHAVIORS = ("uniform", "reference", "optimal")
ROUNDING = 1e-10  # what Gauss-Newton leaves: float64's eps times the condition of rows whose shares are about 1e-5


def world_at(settings: Settings, seed: int, shift: float = 0.0) -> World:
    """The tree; `shift` is added to every return, on the last token."""
    mdp = tree(settings["depth"], settings["n_tokens"], seed)
    last = mdp.allowed & mdp.is_policy[:, None] & (mdp.next_state < 0)
    return world_of(replace(mdp, reward=np.where(last, mdp.reward + shift, mdp.reward)), settings["beta"])


def behavior_of(world: World, name: str) -> Floats:
    """ln mu, float[S, V]."""
    tables = {"uniform": uniform_policy, "reference": lambda mdp: mdp.ref_log_policy}
    return world.solution.log_policy() if name == "optimal" else tables[name](world.mdp)


# ------------------------------------------------------------------------------------------------ what theory predicts
def tried_in(mdp: TokenMDP, rows: TokenBatch) -> Bools:
    """bool[S, V]: which tokens the rows act with."""
    acted = rows.completion_mask[:, 1:] == 1
    tried = np.zeros(mdp.next_state.shape, dtype=bool)
    tried[rows.known_states()[:, :-1][acted].numpy(), rows.input_ids[:, 1:][acted].numpy()] = True
    return tried


def ending_where_untried(mdp: TokenMDP, tried: Bools, worth: Floats | float = 0.0) -> TokenMDP:
    """The automaton in which a policy token never tried ends the episode and pays `worth`."""
    untried = _policy_edges(mdp) & ~tried
    return replace(
        mdp, next_state=np.where(untried, -1, mdp.next_state), reward=np.where(untried, worth, mdp.reward)
    )  # fmt: skip


def _policy_edges(mdp: TokenMDP) -> Bools:
    return np.asarray(mdp.allowed & mdp.is_policy[:, None])


def predicted_q(world: World, tried: Bools, worth: Floats | float = 0.0) -> Floats:
    """beta (l - l_ref) at the zero of the ShiQ loss: 0 at untried tokens (or their `worth`) and where no row came by."""
    cut = ending_where_untried(world.mdp, tried, worth)
    visited = tried.any(1, keepdims=True)
    return np.where(visited & world.mdp.allowed, solve(cut, beta=world.beta).q(), np.where(world.mdp.allowed, worth, 0.0))


def untried_mass(world: World, tried: Bools, log_policy: Floats) -> float:
    """The chance that an episode of a policy says an untried token."""
    paid = (_policy_edges(world.mdp) & ~tried).astype(np.float64)
    counting = replace(ending_where_untried(world.mdp, tried), reward=paid)
    return evaluate(counting, log_policy, beta=world.beta).expected_return


def tilted(world: World, q: Floats) -> Floats:
    """ln of pi_ref exp(q / beta), row by row normalised."""
    return softmax_policy(world.mdp, np.where(world.mdp.allowed, world.mdp.ref_logits + q / world.beta, -np.inf))


# ----------------------------------------------------------------------------------- losses that estimate expectations
def strings(world: World, log_policy: Floats) -> Floats:
    """The probability of every string of the listing under a policy, float[N]."""
    found: Floats = torch.exp(spoken(world.mdp, world.rows, torch.tensor(log_policy), policy=True)).numpy()
    return found


def shares(world: World, rows: TokenBatch) -> Floats:
    """How much of the rows each string of the listing is, float[N]."""
    number = lambda batch: (batch.input_ids * world.mdp.n_tokens ** torch.arange(batch.input_ids.shape[1])).sum(1)  # noqa: E731
    listed = number(world.rows)
    order = torch.argsort(listed)
    place = order[torch.searchsorted(listed[order], number(rows))]
    return torch.zeros(len(listed), dtype=torch.float64).index_add(0, place, rows.weights).numpy()


def returns(world: World) -> Floats:
    """R(y) of every string of the listing, float[N]."""
    return (world.rows.rewards * world.rows.completion_mask).sum(1).numpy()


def weighted_reinforce(world: World, mu: Floats, share: Floats) -> Floats:
    """Where REINFORCE with importance weights is stationary and stable, float[N].

    w(y) (R(y) - beta ln(pi/pi_ref)) = c on all strings seen, c by bisection; strings not seen lose all mass if c > 0, and if
    their mass does not run out at c = 0 they keep what is left (shared out as the reference has it).
    """
    ref, paid, beta, seen = strings(world, world.mdp.ref_log_policy), returns(world), world.beta, share > 0
    w = share[seen] / mu[seen]
    mass = lambda c: ref[seen] * np.exp((paid[seen] - c / w) / beta)  # noqa: E731
    policy = np.zeros(len(ref))
    if not seen.all() and mass(0.0).sum() <= 1:
        policy[seen], policy[~seen] = mass(0.0), (1 - mass(0.0).sum()) * ref[~seen] / ref[~seen].sum()
        return policy
    reach = float(w.max()) * (np.abs(paid).max() + 50 * beta)
    low, high = -reach, reach
    with np.errstate(over="ignore"):
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if mass(middle).sum() > 1 else (low, middle)
    policy[seen] = mass((low + high) / 2)
    return policy / policy.sum()


def string_kl(policy: Floats, best: Floats) -> float:
    """KL(pi || pi*) of two distributions over strings; terms p e^-d - p + p d >= 0 each, d = ln(pi / pi*)."""
    seen = policy > 0
    d = np.log(policy[seen] / best[seen])
    return float((policy[seen] * (np.expm1(-d) + d)).sum() + best[~seen].sum())


# ---------------------------------------------------------------------------------------------------------- measuring
def cases(settings: Settings) -> list[Case]:
    """What is measured, case by case."""
    size = [{"kind": "size", "behavior": b, "n": n} for b in BEHAVIORS for n in settings["n"]]
    support = [{"kind": "support", "untried": k, "shift": 0.0} for k in range(settings["n_tokens"])]
    shift = [{"kind": "support", "untried": 1, "shift": c} for c in settings["shifts"]]
    return [*size, *support, *shift, {"kind": "adam", "untried": 1, "shift": 0.0}]


def measure(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """One case at one seed."""
    return _size(settings, case, seed) if case["kind"] == "size" else _support(settings, case, seed)


def _size(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """The empirical minimum of every loss on n rows."""
    world = world_at(settings, seed)
    behavior = behavior_of(world, case["behavior"])
    rows = rows_of(world, behavior, case["n"], seed=seed)
    best, mu, share = (strings(world, world.solution.log_policy()), strings(world, behavior), shares(world, rows))
    late = (world.solution.objective / world.beta) ** 2 / (2 * case["n"]) * float((best * (1 - best) / mu).sum())
    sequence = train_on_rows(world.mdp, "sequence", rows, beta=world.beta)
    return {
        **_shiq(world, rows),
        "sequence_kl": _kl(world, sequence.logits),
        "reinforce_kl": string_kl(weighted_reinforce(world, mu, share), best),
        "reinforce_predicted": late,
        "sft_kl": string_kl(share, best),
        "sft_limit": string_kl(mu, best),
        "sft_predicted": (len(best) - 1) / (2 * case["n"]),
    }


def _shiq(world: World, rows: TokenBatch) -> dict[str, Any]:
    """ShiQ trained on rows by Gauss-Newton, beside what theory says that it finds."""
    found, tried = train_on_rows(world.mdp, "shiq", rows, beta=world.beta), tried_in(world.mdp, rows)
    edges = world.mdp.allowed & (world.mdp.is_policy & world.mdp.reachable)[:, None]
    predicted = predicted_q(world, tried)
    return {
        "covered": 1 - found.untried / int(edges.sum()),
        "q_error": found.metrics.q_error,
        "kl": _kl(world, found.logits),
        "kl_predicted": _kl(world, np.where(world.mdp.allowed, world.mdp.ref_logits + predicted / world.beta, -np.inf)),
        "off": float(np.abs(_q_hat(world, found.logits) - predicted)[edges].max()),
        "untried_mass": untried_mass(world, tried, softmax_policy(world.mdp, found.logits)),
        "untried_mass_predicted": untried_mass(world, tried, tilted(world, predicted)),
    }


def _q_hat(world: World, logits: Floats) -> Floats:
    return np.where(world.mdp.allowed, world.beta * (np.where(world.mdp.allowed, logits, 0.0) - _ref(world)), 0.0)


def _ref(world: World) -> Floats:
    return np.where(world.mdp.allowed, world.mdp.ref_logits, 0.0)


def _kl(world: World, logits: Floats) -> float:
    """KL(pi || pi*) = (J* - J) / beta, at least 0 (it is a sum that may round below)."""
    return max(0.0, evaluate(world.mdp, softmax_policy(world.mdp, logits), beta=world.beta).kl_to_optimal)


def masked(world: World, untried: int, seed: int) -> Floats:
    """Uniform over all but `untried` random tokens of every state, ln mu float[S, V]."""
    mdp = world.mdp
    draw = np.where(mdp.allowed, np.random.default_rng([seed, 7]).random(mdp.next_state.shape), np.inf)
    rank: Ints = draw.argsort(1).argsort(1)
    keep = mdp.allowed & (rank >= untried)
    with np.errstate(divide="ignore"):
        return np.where(mdp.is_policy[:, None], np.log(keep / np.maximum(keep.sum(1, keepdims=True), 1)), mdp.ref_log_policy)


def _support(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """All rows of a behaviour that never tries some tokens: by Gauss-Newton, or by Adam."""
    world = world_at(settings, seed, case["shift"])
    behavior = masked(world, case["untried"], seed)
    rows = rows_of(world, behavior)
    if case["kind"] == "support":
        return _shiq(world, rows)
    trace = descend("ShiQ", world, rows, behavior, steps=settings["adam_steps"], learning_rate=0.1, schedule="cosine")
    tried, q_hat = tried_in(world.mdp, rows), _q_hat(world, trace.logits)
    edges = tried & world.mdp.is_policy[:, None]
    untried = _policy_edges(world.mdp) & ~tried & np.asarray(tried.any(1, keepdims=True))
    return {
        "loss": trace.loss[-1],
        "drift": float(np.abs(q_hat[untried]).max()),
        "off_frozen": float(np.abs(q_hat - predicted_q(world, tried))[edges].max()),
        "off": float(np.abs(q_hat - predicted_q(world, tried, q_hat))[edges].max()),
    }


# -------------------------------------------------------------------------------------------------------- summing up
def summarise(settings: Settings, records: list[Record]) -> dict[str, Any]:
    """What the figure and the claims need, with intervals over the seeds."""
    size = [r for r in records if r.case["kind"] == "size"]
    full = [r.numbers for r in size if r.numbers["covered"] == 1]
    short = [r.numbers for r in size if r.numbers["covered"] < 1]
    out: dict[str, Any] = {
        "threshold": {
            "covered_runs": len(full), "other_runs": len(short),
            "largest_error_covered": max((x["q_error"] for x in full), default=None),
            "least_error_uncovered": min((x["q_error"] for x in short), default=None),
            "largest_sequence_kl_covered": max((x["sequence_kl"] for x in full), default=None),
            "fewest_rows": min((r.case["n"] for r in size if r.numbers["covered"] == 1), default=None),
        },
        "largest_off": max(r.numbers["off"] for r in records if r.case["kind"] != "adam"),
        "points": [[r.numbers["covered"], r.numbers["q_error"]] for r in size],
        "size": {b: _by_n(settings, [r for r in size if r.case["behavior"] == b]) for b in BEHAVIORS},
        "support": [_support_line(c, [r.numbers for r in records if r.case == c]) for c in cases(settings)
                    if c["kind"] == "support"],
    }  # fmt: skip
    adam = [r.numbers for r in records if r.case["kind"] == "adam"]
    out["adam"] = {key: max(x[key] for x in adam) for key in ("loss", "off")}
    out["adam"] |= {f"least_{key}": min(x[key] for x in adam) for key in ("drift", "off_frozen")}
    return out


CURVES = ("covered", "kl", "sequence_kl", "reinforce_kl", "reinforce_predicted", "sft_kl", "sft_limit", "sft_predicted")


def _by_n(settings: Settings, records: list[Record]) -> dict[str, Any]:
    """Every curve over n: medians would hide nothing here, but IQMs are of logarithms, since errors fall by factors."""
    out: dict[str, Any] = {"n": settings["n"]}
    table = {key: [[r.numbers[key] for r in records if r.case["n"] == n] for n in settings["n"]] for key in CURVES}
    for key, values in table.items():
        x = np.array(values).T  # (seeds, n)
        band = interval(x if key == "covered" else np.log(np.maximum(x, 1e-18)))
        turn = (lambda y: y) if key == "covered" else (lambda y: np.exp(y).tolist())
        out[key] = {part: turn(getattr(band, part)) for part in ("value", "low", "high")}
    for key in ("reinforce", "sft"):  # means, as the prediction is one, over the last decade
        late = [i for i, n in enumerate(settings["n"]) if n * 10 >= settings["n"][-1]]
        ratio = np.array(table[f"{key}_kl"])[late] / np.array(table[f"{key}_predicted"])[late]
        out[f"{key}_over_predicted"] = interval(ratio.mean(0), np.mean).__dict__
    return out


def _support_line(case: Case, found: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("kl", "kl_predicted", "untried_mass", "untried_mass_predicted", "q_error")
    return {
        **case,
        **{key: interval([x[key] for x in found]).__dict__ for key in keys},
        "least_kl": min(x["kl"] for x in found),
    }


def claims(settings: Settings, summary: dict[str, Any]) -> list[Claim]:
    """What the figure shows, each with its numbers."""
    edge, size, adam = summary["threshold"], summary["size"], summary["adam"]
    support = {(x["untried"], x["shift"]): x for x in summary["support"]}
    reinforce, sft = size["uniform"]["reinforce_over_predicted"], size["optimal"]["sft_over_predicted"]
    last = {key: size["uniform"][key]["value"][-1] for key in ("sft_kl", "sft_limit", "reinforce_kl")}
    first_kl = size["uniform"]["reinforce_kl"]["value"][0]
    shifts = sorted(c for k, c in support if k == 1)
    masses = [support[1, c]["untried_mass"] for c in shifts]
    return [
        Claim(
            "ShiQ's error falls off a cliff: zero to rounding once every state-token pair was tried, never before.",
            f"{edge['covered_runs']} data sets that tried all, the smallest of {edge['fewest_rows']} rows: Q error at most "
            f"{edge['largest_error_covered'] or 0:.0e}; {edge['other_runs']} others: at least "
            f"{edge['least_error_uncovered']:.1e}",
            0 < edge["covered_runs"] and edge["largest_error_covered"] <= ROUNDING < 1e-4 < edge["least_error_uncovered"],
        ),
        Claim(
            "Before that, it finds the exact values of the world where an untried token ends the episode and pays nothing.",
            f"largest deviation {summary['largest_off']:.0e}, over all data sets and all masks",
            summary["largest_off"] <= ROUNDING,
        ),
        Claim(
            "Sequence only, also a regression without noise, has the same cliff in its policy.",
            f"KL to the optimum at most {edge['largest_sequence_kl_covered'] or 0:.0e} where all was tried",
            edge["largest_sequence_kl_covered"] is not None and edge["largest_sequence_kl_covered"] <= ROUNDING,
        ),
        Claim(
            "REINFORCE with importance weights and SFT on optimal rows only ever approach it, their KL as 1/n, as predicted.",
            f"measured over predicted {_told(reinforce)} and {_told(sft)}; REINFORCE from {first_kl:.1e} at n = "
            f"{settings['n'][0]} to {last['reinforce_kl']:.1e} at {settings['n'][-1]}",
            all(0.5 < x["value"] < 2 for x in (reinforce, sft)) and last["reinforce_kl"] > 1e-8,
        ),
        Claim(
            "SFT on uniform rows does not approach it at all: it goes to the uniform policy.",
            f"KL {last['sft_kl']:.3g} at n = {settings['n'][-1]}, of the uniform policy {last['sft_limit']:.3g}",
            abs(last["sft_kl"] / last["sft_limit"] - 1) < 0.1,
        ),
        Claim(
            "If a token is never tried, no number of rows helps; and a level added to all returns, which leaves pi* alone, "
            "changes how much mass stays on what was never tried.",
            f"KL at least {min(support[k, 0.0]['least_kl'] for k in range(1, settings['n_tokens'])):.1e}; mass "
            + ", ".join(f"{_told(m)} (returns {c:+g})" for c, m in zip(shifts, masses, strict=True)),
            all(support[k, 0.0]["least_kl"] > 1e-6 for k in range(1, settings["n_tokens"]))
            and all(a["low"] > b["high"] for a, b in pairwise(masses)),
        ),
        Claim(
            "Adam moves the untried logits too, and then finds the values of the world in which these are what they pay.",
            f"moved by at least {adam['least_drift']:.2g} in Q; at most {adam['off']:.0e} from that world's values, at least "
            f"{adam['least_off_frozen']:.1e} from those of a frozen one",
            adam["off"] <= 1e-6 and adam["least_drift"] > 1e-2 and adam["least_off_frozen"] > 1e-3,
        ),
    ]


def _told(x: dict[str, Any]) -> str:
    return f"{x['value']:.2f} [{x['low']:.2f}, {x['high']:.2f}]"


# ------------------------------------------------------------------------------------------------------------ drawing
FLOOR = 1e-17


@style()
def draw(result: Result) -> "Figure":
    """Error against coverage; KL against n; partial support, measured on predicted."""
    page = figure(figsize=(9, 7))
    grid = page.add_gridspec(2, 2)
    _draw_cliff(page.add_subplot(grid[0, 0]), result.summary)
    _draw_size(page.add_subplot(grid[0, 1]), result.summary)
    _draw_support(page.add_subplot(grid[1, :]), result.summary)
    return page


def _draw_cliff(axes: Any, summary: dict[str, Any]) -> None:
    x, y = np.array(summary["points"]).T
    axes.scatter(100 * x, np.maximum(y, FLOOR), s=14, color=COLORS["shiq"], marker=MARKERS["shiq"], alpha=0.5, lw=0)
    axes.set(yscale="log", xlabel="state-token pairs that were tried (%)", ylabel="max |q̂ − q*|", ylim=(FLOOR, 100))
    axes.set_title("ShiQ: a cliff, not a rate")
    axes.annotate("all tried", (100, 1e-15), (72, 1e-13), arrowprops={"arrowstyle": "->", "color": GREY}, color=GREY)
    axes.grid(axis="y")


def _draw_size(axes: Any, summary: dict[str, Any]) -> None:
    size = summary["size"]
    lines = (
        ("ShiQ", "uniform", "kl", COLORS["shiq"], MARKERS["shiq"]),
        ("sequence only", "uniform", "sequence_kl", COLORS["sequence"], MARKERS["sequence"]),
        ("REINFORCE, weighted", "uniform", "reinforce_kl", PALETTE["black"], "v"),
        ("SFT, uniform rows", "uniform", "sft_kl", PALETTE["sky"], "s"),
        ("SFT, optimal rows", "optimal", "sft_kl", PALETTE["blue"], "D"),
    )
    for name, behavior, key, color, marker in lines:
        n, band = size[behavior]["n"], size[behavior][key]
        axes.plot(n, np.maximum(band["value"], FLOOR), color=color, marker=marker, label=name)
        axes.fill_between(n, np.maximum(band["low"], FLOOR), np.maximum(band["high"], FLOOR), color=color, alpha=0.15, lw=0)
    for behavior, key in (("uniform", "reinforce_predicted"), ("optimal", "sft_predicted")):
        axes.plot(
            size[behavior]["n"], size[behavior][key]["value"], ":", color=GREY, label="predicted" * (behavior == "uniform")
        )
    axes.set(xscale="log", yscale="log", xlabel="rows n", ylabel="KL(π ‖ π*) (nats)", ylim=(FLOOR, 100))
    axes.legend(loc="center right", fontsize=8)
    axes.set_title("Regressions end, estimates go on")
    axes.grid(axis="y")


def _draw_support(axes: Any, summary: dict[str, Any]) -> None:
    lines = summary["support"]
    place = range(len(lines))
    found = [x["untried_mass"] for x in lines]
    spread = [[x["value"] - x["low"] for x in found], [x["high"] - x["value"] for x in found]]
    axes.errorbar(
        place, [x["value"] for x in found], yerr=spread, fmt="o", color=COLORS["shiq"], capsize=3, label="ShiQ, trained"
    )
    axes.plot(
        place, [x["untried_mass_predicted"]["value"] for x in lines], "D", mfc="none", ms=11, color=GREY, label="predicted"
    )  # fmt: skip
    names = [f"{x['untried']} untried" + (f"\nreturns {x['shift']:+g}" if x["shift"] else "") for x in lines]
    axes.set_xticks(list(place), names)
    axes.set(ylabel="mass on tokens never tried", ylim=(-0.03, 1.03))
    axes.set_title("Partial support: untried tokens count as an end that pays nothing")
    axes.legend(loc="upper right")
    axes.grid(axis="y")


DATA_SIZE = Study(
    name="data-size",
    title="How many rows, and what of the tokens that none of them tries",
    question="How does the error fall with the number of rows, and what does ShiQ make of tokens that no row tries?",
    settings={
        "seeds": 10, "depth": 3, "n_tokens": 4, "beta": 1.0, "n": [10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000],
        "shifts": [-2.0, 2.0], "adam_steps": 1000,
    },
    fast={"seeds": 2, "depth": 2, "n": [10, 300, 10000], "adam_steps": 400},
    cases=cases,
    measure=measure,
    summarise=summarise,
    claims=claims,
    draw=draw,
)  # fmt: skip
