"""Reward against KL: where does each loss end, beside the best that any policy can do? A reconstruction of the usual plot.

A tree of all 27 strings of 3 letters out of 3, a standard normal reward on every token, random reference logits; gamma = 1,
8 values of beta over two decades. ShiQ, DPO (Bradley-Terry labels), DRO-V and CoPG train on the same n rows, drawn from half
reference, half uniform; REINFORCE, with the KL in its reward, on its own rows at every step (their exact expectation, so it is
given more than the others: it may ask what any string pays). The same number of updates of the same Adam on a table that
starts at the reference. The seed draws rewards, reference and rows. The paper's tasks are not known; this is the idea alone.

Theory. The most return at a KL of k is what pi*_beta gets, at the beta where KL(pi*_beta || pi_ref) = k, and for any beta

    F(k) = min_beta v*_beta(start) + beta k,    so    0 <= F(k) - E_pi R <= J*_beta - J_beta(pi) = beta KL(pi || pi*_beta)

with k = KL(pi || pi_ref): no point lies above the frontier, and none is further below it than its own J gap. Reaching the
frontier is not reaching one's own point: a loss may sit on it at another beta's place. On all strings every loss here whose
optimum is pi*_beta ends at its own point. DPO is one of them at any beta: labels are sigma(R - R'), margins beta (l - l'), so
beta (l - l') = R - R' at its optimum (labels of c R would give pi*_{beta / c}). With hard labels it knows the order of answers
and not by how much, and leaves. On n rows all residuals can vanish while strings never seen get any mass, so where a loss ends
depends on the path that it takes.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shiq_lab.bellman import evaluate, solve
from shiq_lab.envs.tree import tree
from shiq_lab.graph import Floats
from shiq_lab.learning import descend, rows_of, world_of
from shiq_lab.mdp import TokenMDP
from shiq_lab.objectives import World, spoken
from shiq_lab.plotting import COLORS, INK, MARKERS, PALETTE, figure, style
from shiq_lab.policies import mixture, softmax_policy, uniform_policy
from shiq_lab.studies.frame import Case, Claim, Record, Result, Settings, Study
from shiq_lab.studies.statistics import interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPO, HARD, REINFORCE = "DPO, Bradley-Terry labels", "DPO, hard labels", "REINFORCE, KL in the reward"
OFF_POLICY = ("ShiQ", "CoPG", "DRO-V", DPO)
WIDEST = (1e-3, 1e5)  # betas between which the frontier is followed; a tree's KL spans all it can there
ROUNDING = 1e-12  # of returns and KLs, sums of at most a hundred numbers of size 10


# ------------------------------------------------------------------------------------------------------- the frontier
def listed(world: World) -> tuple[Floats, Floats]:
    """(ln pi_ref(y), R(y)) of every string, float[N] each."""
    ref = spoken(world.mdp, world.rows, torch.tensor(world.mdp.ref_log_policy), policy=True)
    return ref.numpy(), (world.rows.rewards * world.rows.completion_mask).sum(1).numpy()


def tilt(log_ref: Floats, paid: Floats, beta: Floats) -> tuple[Floats, Floats, Floats]:
    """(KL to pi_ref, return, v*) of pi_ref exp(R / beta) / Z for betas float[K]: the frontier, by listing the strings."""
    beta = np.asarray(beta, dtype=np.float64)[:, None]
    score = log_ref + paid / beta
    top = score.max(1, keepdims=True)
    log_z = top + np.log(np.exp(score - top).sum(1, keepdims=True))
    chance = np.exp(score - log_z)
    gained = (chance * paid).sum(1)
    return (chance * (paid / beta - log_z)).sum(1), gained, (beta * log_z)[:, 0]


def frontier(log_ref: Floats, paid: Floats, kl: Floats) -> Floats:
    """The most return that any policy has at these KLs, float[K]: F(k) = v*_beta + beta k at the beta that minimises it.

    KL falls as beta grows, so ln beta is bisected; at any beta the formula bounds F from above, with an error of second order.
    """
    low, high = (np.full(len(kl), np.log(x)) for x in WIDEST)
    for _ in range(80):
        middle = (low + high) / 2
        more = tilt(log_ref, paid, np.exp(middle))[0] > kl
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    beta = np.exp((low + high) / 2)
    best: Floats = tilt(log_ref, paid, beta)[2] + beta * kl
    return best


def two_roads(mdp: TokenMDP, world: World, betas: Floats) -> float:
    """The largest difference between solve + evaluate and the tilted listing, over (KL, return) at these betas."""
    kl, gained, _ = tilt(*listed(world), betas)
    off = 0.0
    for i, beta in enumerate(betas):
        found = evaluate(mdp, solve(mdp, beta=beta).log_policy(), beta=beta)
        off = max(off, abs(found.kl_to_ref - kl[i]), abs(found.expected_return - gained[i]))
    return float(off)


# ---------------------------------------------------------------------------------------------------------- measuring
def betas_of(settings: Settings) -> list[float]:
    """The values of beta, evenly on a logarithmic axis."""
    low, high = settings["beta_range"]
    return [float(f"{b:.3g}") for b in np.geomspace(low, high, settings["betas"])]


def cases(settings: Settings) -> list[Case]:
    """What is measured, case by case."""
    betas = betas_of(settings)
    sampled = [{"data": "sampled", "loss": loss, "beta": b} for loss in OFF_POLICY for b in betas]
    own = [{"data": "own", "loss": REINFORCE, "beta": b} for b in betas]
    whole = [{"data": "all", "loss": loss, "beta": b} for loss in (*OFF_POLICY, HARD) for b in betas[1::2]]
    return [{"data": "frontier", "loss": "", "beta": 1.0}, *sampled, *own, *whole]


def measure(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """Train one loss at one beta; where its policy stands, and where it should."""
    beta = case["beta"]
    world = world_of(tree(settings["depth"], settings["n_tokens"], seed), beta)
    if case["data"] == "frontier":
        return _frontier(settings, world)
    behavior = mixture(world.mdp.ref_log_policy, uniform_policy(world.mdp), 0.5)
    n = settings["n"] if case["data"] == "sampled" else None
    rows = None if case["data"] == "own" else rows_of(world, behavior, n, seed=seed)
    trace = descend(
        case["loss"], world, rows, behavior, steps=settings["steps"], learning_rate=settings["learning_rate"],
        schedule="cosine", record_at=[],
    )  # fmt: skip
    return standing(world, softmax_policy(world.mdp, trace.logits)) | {
        "seen": 1.0 if rows is None else len(rows) / len(world.rows)
    }


def standing(world: World, log_policy: Floats) -> dict[str, float]:
    """(KL, return) of a policy, its distance below the frontier, and its distance in J from the point of its own beta."""
    found = evaluate(world.mdp, log_policy, beta=world.beta)
    own = evaluate(world.mdp, world.solution.log_policy(), beta=world.beta)
    start = evaluate(world.mdp, world.mdp.ref_log_policy, beta=world.beta)
    best = frontier(*listed(world), np.array([found.kl_to_ref]))[0]
    return {
        "kl": found.kl_to_ref,
        "return": found.expected_return,
        "own_kl": own.kl_to_ref,
        "own_return": own.expected_return,
        "below": float(best) - found.expected_return,
        "gap": own.objective - found.objective,
        "gap_by_kl": world.beta * found.kl_to_optimal,  # another road to the gap
        "room": own.objective - start.objective,
        "scale": world.solution.scale + abs(found.objective),
    }


def _frontier(settings: Settings, world: World) -> dict[str, Any]:
    betas = np.geomspace(settings["beta_range"][0] / 4, settings["beta_range"][1] * 4, settings["frontier"])
    kl, gained, _ = tilt(*listed(world), betas)
    return {"kl": kl.tolist(), "return": gained.tolist(), "roads": two_roads(world.mdp, world, betas)}


# -------------------------------------------------------------------------------------------------------- summing up
def summarise(settings: Settings, records: list[Record]) -> dict[str, Any]:
    """What the figure and the claims need, with intervals over the seeds."""
    curves = [r for r in records if r.case["data"] == "frontier"]
    points = [r for r in records if r.case["data"] != "frontier"]
    numbers = [r.numbers for r in points]
    out: dict[str, Any] = {
        "frontier": {key: curves[0].numbers[key] for key in ("kl", "return")},  # of seed 0, as the points drawn
        "roads": max(r.numbers["roads"] for r in curves),
        "points": len(points),
        "least_below": min(x["below"] / x["scale"] for x in numbers),
        "below_minus_gap": max((x["below"] - x["gap"]) / x["scale"] for x in numbers),
        "gap_roads": max(abs(x["gap"] - x["gap_by_kl"]) / x["scale"] for x in numbers),
        "seen": interval([r.numbers["seen"] for r in points if r.case["data"] == "sampled"]).__dict__,
        "runs": {},
    }
    for data, loss in dict.fromkeys((c["data"], c["loss"]) for c in cases(settings) if c["data"] != "frontier"):
        found = [r for r in points if (r.case["data"], r.case["loss"]) == (data, loss)]
        betas = list(dict.fromkeys(r.case["beta"] for r in found))
        table = {
            key: np.array([[r.numbers[key] / (r.numbers["room"] if key in ("gap", "below") else 1) for r in found
                            if r.case["beta"] == b] for b in betas]).T
            for key in ("gap", "below", "kl", "own_kl", "return", "own_return")
        }  # fmt: skip
        run: dict[str, Any] = {"beta": betas}
        run |= {key: table[key][0].tolist() for key in ("kl", "return", "own_kl", "own_return")}  # seed 0, to be drawn
        for key in ("gap", "below"):  # in units of J* - J(pi_ref); logarithms are averaged, since gaps differ by factors
            band = interval(np.log(np.maximum(table[key], 1e-16)))
            run[key] = {part: np.exp(getattr(band, part)).tolist() for part in ("value", "low", "high")}
        run["kl_over_own"] = interval(table["kl"] / table["own_kl"]).__dict__
        run["mean_log_gap"] = interval(np.log10(np.maximum(table["gap"], 1e-16)).mean(1)).__dict__
        out["runs"][f"{loss} ({data})"] = run
    out["worse_than_shiq"] = _against_shiq(points)
    return out


def _against_shiq(points: list[Record]) -> dict[str, Any]:
    """How many times ShiQ's gap another loss has on the same rows: log10 of it, a mean over betas, paired by seed."""

    def logs(loss: str) -> Floats:
        found = [r for r in points if (r.case["data"], r.case["loss"]) == ("sampled", loss)]
        seeds, betas = sorted({r.seed for r in found}), list(dict.fromkeys(r.case["beta"] for r in found))
        gap = {(r.seed, r.case["beta"]): max(r.numbers["gap"], 1e-16) for r in found}
        return np.log10([[gap[s, b] for b in betas] for s in seeds])

    return {loss: interval((logs(loss) - logs("ShiQ")).mean(1)).__dict__ for loss in OFF_POLICY if loss != "ShiQ"}


def claims(settings: Settings, summary: dict[str, Any]) -> list[Claim]:
    """What the figure shows, each with its numbers."""
    runs, others = summary["runs"], summary["worse_than_shiq"]
    whole = {loss: max(runs[f"{loss} (all)"]["gap"]["value"]) for loss in OFF_POLICY}
    hard, soft = runs[f"{HARD} (all)"], runs[f"{DPO} (all)"]
    own = runs[f"{REINFORCE} (own)"]["gap"]["value"]
    sampled = {loss: runs[f"{loss} (sampled)"]["gap"] for loss in OFF_POLICY}
    on_it = {loss: runs[f"{loss} (sampled)"]["below"] for loss in OFF_POLICY}
    least = min(min(x["value"]) for x in sampled.values())
    share = {loss: float(np.median(np.divide(on_it[loss]["value"], sampled[loss]["value"]))) for loss in OFF_POLICY}
    return [
        Claim(
            "The frontier is that of pi*_beta, by backward induction and by listing all strings.",
            f"{settings['frontier']} betas: largest difference {summary['roads']:.0e}",
            summary["roads"] <= ROUNDING * 10,
        ),
        Claim(
            "No point lies above the frontier, and none is further below it than its own gap in J.",
            f"{summary['points']} points: least distance {summary['least_below']:.0e}, most over the gap "
            f"{summary['below_minus_gap']:.0e}; gap = beta KL(pi || pi*) to {summary['gap_roads']:.0e} (all over 1 + max|q*|)",
            summary["least_below"] >= -ROUNDING and max(summary["below_minus_gap"], summary["gap_roads"]) <= ROUNDING,
        ),
        Claim(
            "Given all strings, ShiQ, CoPG, DRO-V and DPO end at the point of their own beta.",
            "largest gap / (J* - J_ref): " + ", ".join(f"{SHORT[loss]} {x:.0e}" for loss, x in whole.items()),
            max(whole.values()) <= 1e-2,
        ),
        Claim(
            "DPO with hard labels does not: it leaves for more KL than its beta allows, the more the larger beta is.",
            f"at beta = {hard['beta'][-1]:g}: gap {hard['gap']['value'][-1]:.2g} [{hard['gap']['low'][-1]:.2g}, "
            f"{hard['gap']['high'][-1]:.2g}], KL {hard['kl_over_own']['value'][-1]:.3g} times that of pi*; with Bradley-Terry "
            f"labels {soft['kl_over_own']['value'][-1]:.3f} times",
            hard["gap"]["low"][-1] > 0.1 and hard["kl_over_own"]["low"][-1] > 1.5,
        ),
        Claim(
            "REINFORCE on its own rows comes to its own point too.",
            f"gap at most {max(own):.1e} of J* - J_ref",
            max(own) <= 2e-2,
        ),
        Claim(
            f"On {settings['n']} rows none does: strings never seen take mass, and the rows matter more than the loss.",
            f"smallest gap of any loss {least:.1e}, {least / max(whole.values()):.3g} times the largest on all strings; over "
            "ShiQ on the same rows: " + ", ".join(f"{SHORT[k]} {_times(x)}" for k, x in others.items()),
            least / max(whole.values()) > max(10 ** x["high"] for x in others.values()),
        ),
        Claim(
            "What is missed there is missed below the frontier, not along it: most of the gap is distance below.",
            "distance below / gap, median over beta: " + ", ".join(f"{SHORT[k]} {x:.2f}" for k, x in share.items()),
            all(0.5 < x <= 1 for x in share.values()),
        ),
    ]  # fmt: skip


def _times(x: dict[str, Any]) -> str:
    return f"{10 ** x['value']:.2g} [{10 ** x['low']:.2g}, {10 ** x['high']:.2g}]"


# ------------------------------------------------------------------------------------------------------------ drawing
LOOKS = {
    "ShiQ": (COLORS["shiq"], MARKERS["shiq"]), "CoPG": (PALETTE["green"], "^"), "DRO-V": (PALETTE["blue"], "D"),
    DPO: (PALETTE["orange"], "s"), HARD: (PALETTE["pink"], "X"), REINFORCE: (PALETTE["black"], "v"),
}  # fmt: skip
SHORT = {"ShiQ": "ShiQ", "CoPG": "CoPG", "DRO-V": "DRO-V", DPO: "DPO", HARD: "DPO, hard labels", REINFORCE: "REINFORCE"}


@style()
def draw(result: Result) -> "Figure":
    """The frontier with the points of seed 0; the gap to the own point on n rows, and on all strings."""
    summary, n = result.summary, result.settings["n"]
    page = figure(figsize=(10, 4))
    first, second, third = page.subplots(1, 3)
    first.plot(summary["frontier"]["kl"], summary["frontier"]["return"], color=INK, lw=1.2, label="exact frontier")
    for data, axes in (("sampled", second), ("own", second), ("all", third)):
        for loss, (color, marker) in LOOKS.items():
            run = summary["runs"].get(f"{loss} ({data})")
            if run is None:
                continue
            if data != "all":
                first.plot(run["kl"], run["return"], marker, color=color, mec="white", mew=0.4, ms=6)
            gap = run["gap"]
            axes.plot(run["beta"], gap["value"], color=color, marker=marker, label=SHORT[loss])
            axes.fill_between(run["beta"], gap["low"], gap["high"], color=color, alpha=0.15, lw=0)
    own = summary["runs"][f"{REINFORCE} (own)"]
    first.plot(own["own_kl"], own["own_return"], "o", mfc="none", mec=INK, ms=11, mew=0.8, label="π* of each β")
    first.set(xscale="log", xlabel="KL(π ‖ π_ref) (nats)", ylabel="expected return")
    first.set_title(f"On {n} rows (seed 0)")
    first.legend(loc="upper left")
    for axes, title in ((second, f"Gap to π* of the same β, {n} rows"), (third, "The same, all strings")):
        axes.set(xscale="log", yscale="log", xlabel="β", ylabel="(J* − J) / (J* − J_ref)")
        axes.xaxis.set_minor_formatter("")
        axes.set_title(title)
        axes.grid(axis="y")
    shown = {label: handle for axes in (second, third)
             for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}  # fmt: skip
    page.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=6)
    return page


REWARD_KL = Study(
    name="reward-kl",
    title="Reward against KL, beside the exact frontier (a reconstruction)",
    question="Where does each loss end in the plane of return and KL, and how far from the best that is possible?",
    settings={
        "seeds": 10, "depth": 3, "n_tokens": 3, "n": 50, "betas": 8, "beta_range": [0.2, 20.0], "steps": 150,
        "learning_rate": 0.25, "frontier": 60,
    },
    fast={"seeds": 2, "betas": 2, "beta_range": [0.5, 5.0], "steps": 70, "depth": 2, "n": 12, "frontier": 12},
    cases=cases,
    measure=measure,
    summarise=summarise,
    claims=claims,
    draw=draw,
)  # fmt: skip
