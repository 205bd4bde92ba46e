"""What does each step of the derivation buy: naive, easy sampling, the shift, multi-step? A reconstruction of the ablation.

ABLATION, tables: Tree (depth 4, four letters, 85 prefixes, a reward on every token, beta 0.5, gamma 0.9, uniform data), the
same tree with every reward 0, and Needle (two letters, one string of T = 2, 4, 8 letters pays 1, beta 1/(2T), gamma 1, data
that leave the string with probability 1/T a letter). Every row with its exact chance, so no curve has sampling noise; a seed
is another environment: rewards, string, reference logits with another level in every state. Plain gradient descent from
l_ref, each loss with the step 1 / L that its own curvature allows, L the largest eigenvalue of its Hessian at the optimum.
ABLATION_TINY, networks: the same questions to a tiny transformer at 85 prefixes (Tree as above; Needle with four letters and
T = 4), pretrained by cross-entropy, trained by Adam (3e-3, cosine); a seed is another environment and other initial weights.

Theory. As functions of the read-out q_hat the losses of steps 0, 1 and 2 are one and the same, so on a table they differ in
where l_ref puts q_hat, and in nothing else: beta l_ref, beta lse(l_ref), 0. Where nothing is paid the last is the truth and
the others are not: their loss there is E sum (c - gamma u(s'))^2 > 0, and training moves a policy that was right. Step 3
changes the metric from I to A'A (F2): a terminal reward reaches the first of T letters at the first update, not at the T-th,
and more is won on longer strings. Naive logits sampled without the reference stay off by KL(pi* || softmax(q* / beta)).
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.envs import make
from shiq_lab.graph import Floats
from shiq_lab.learning import Table, Trace, descend, rows_of, world_of
from shiq_lab.losses.residuals import actions_of
from shiq_lab.mdp import TokenMDP
from shiq_lab.objectives import World
from shiq_lab.plotting import COLORS, GREY, MARKERS, figure, style
from shiq_lab.policies import on_path, softmax_policy, uniform_policy
from shiq_lab.population import Population
from shiq_lab.studies.frame import Case, Claim, Record, Result, Settings, Study, numbers_of
from shiq_lab.studies.statistics import interval, said
from shiq_lab.tiny import pretrain, train_tiny
from shiq_lab.training import episode_kl

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEPS = ("naive", "easy", "shifted, one step", "ShiQ")
LOOKS = dict(zip(STEPS, ("naive", "easy", "shifted", "shiq"), strict=True))
SHORT = dict(zip(STEPS, ("0 naive", "1 easy sampling", "2 shifted", "3 ShiQ"), strict=True))
CURVES = ("q_error", "v_error", "kl")
EXACT = 1e-10  # of losses and errors made of some hundred float64 numbers below 100


# ----------------------------------------------------------------------------------------------------------------- worlds
def environment(case: Case, seed: int) -> tuple[TokenMDP, float, float]:
    """(automaton, beta, gamma); the silent tree is the tree without its rewards.

    Needle's beta falls with its length, so that the reward is worth the surprise of the whole string and every q* has to move.
    """
    if case["world"] == "Needle":
        return make("Needle", length=case["length"], n_tokens=case["letters"], seed=seed), 0.5 / case["length"], 1.0
    mdp = make("Tree", depth=case["depth"], n_tokens=4, seed=seed)
    return (mdp if case["world"] == "Tree" else silent(mdp)), 0.5, 0.9


def silent(mdp: TokenMDP) -> TokenMDP:
    """The same automaton where nothing is paid: pi* = pi_ref, q* = 0."""
    return replace(mdp, reward=np.zeros_like(mdp.reward))


def behavior_of(world: World, case: Case) -> Floats:
    """Uniform on the trees; on Needle data that stay on the string, where q* is largest, with probability 1 - 1/T a letter.

    pi* itself need not stay there: where the reference seldom says the rest of the string, it prefers what is likely.
    """
    if case["world"] != "Needle":
        return uniform_policy(world.mdp)
    q = np.where(world.mdp.allowed, world.solution.q(), 0.0)
    return on_path(world.mdp, softmax_policy(world.mdp, q), 1 / case["length"])


def spread(world: World) -> float:
    """max q* - min q* over reachable policy states and allowed tokens; 1 where nothing is paid."""
    q = world.solution.q()[world.edges[:, 0], world.edges[:, 1]]
    return float(q.max() - q.min()) or 1.0


# ------------------------------------------------------------------------------------------------------------ second roads
def readouts(world: World) -> dict[str, tuple[Floats, Floats]]:
    """(q_hat [S, V], v_hat [S]) that l_ref stands for, by hand: beta l_ref; beta lse(l_ref); 0."""
    mdp, beta = world.mdp, world.beta
    policy = mdp.is_policy
    ref = np.where(mdp.allowed & policy[:, None], mdp.ref_logits, 0.0)
    twice = np.log(np.where(mdp.allowed, np.exp(2 * ref), 0.0).sum(1))
    level = np.where(policy, mdp.ref_logsumexp, 0.0)
    none = np.zeros_like(ref)
    raised = np.broadcast_to(beta * level[:, None], ref.shape)
    naive = (beta * ref, np.where(policy, beta * (twice - level), 0.0))
    return dict(zip(STEPS, (naive, (raised, beta * level), (none, none[:, 0]), (none, none[:, 0])), strict=True))


def start_error(world: World, loss: str) -> float:
    """max |q_hat - q*| at l_ref by that formula."""
    wrong = np.abs(readouts(world)[loss][0] - world.solution.q())
    return float(wrong[world.edges[:, 0], world.edges[:, 1]].max())


def start_loss(world: World, behavior: Floats, loss: str) -> float:
    """The one-step loss at l_ref: E sum (q_hat(s, a) - r - gamma v_hat(s'))^2, occupancy by recursion and not by rows.

    For automata where no reply follows the first action.
    """
    mdp = world.mdp
    q_hat, v_hat = readouts(world)[loss]
    after = np.append(v_hat, 0.0)[mdp.next_state]
    population = Population(mdp, behavior, world.beta, world.gamma)
    weight = np.where(mdp.is_policy, population.arrivals, 0.0)[:, None] * population.chance
    error = np.where(weight > 0, q_hat - mdp.reward - world.gamma * after, 0.0)
    return float((weight * error**2).sum())


def hessian(world: World, rows: TokenBatch, *, multi_step: bool) -> Floats:
    """The loss's Hessian at the optimum, float[E, E] over world.edges: 2 beta^2 sum J'J (F2, F8).

    d's Jacobian by q_hat is e(s, a) - gamma sum_b pi*(b | s') e(s', b), the same for steps 0, 1, 2; rho's its discounted sum.
    """
    mdp, edges = world.mdp, world.edges.numpy()
    number = np.full(mdp.next_state.shape, -1)
    number[edges[:, 0], edges[:, 1]] = np.arange(len(edges))
    policy = np.exp(world.solution.log_policy())[edges[:, 0], edges[:, 1]]
    follow = mdp.next_state[edges[:, 0], edges[:, 1]]
    one = np.eye(len(edges)) - world.gamma * np.where(follow[:, None] == edges[None, :, 0], policy, 0.0)  # (E, E)
    actions = actions_of(rows)
    states = torch.nn.functional.pad(rows.known_states()[:, :-1], (1, 0), value=mdp.start)[:, 1:]
    place = number[actions.of(states.double()).long().numpy(), actions.of(rows.input_ids[:, 1:].double()).long().numpy()]
    live, weight = actions.real.numpy(), rows.weights.numpy()[:, None]
    found, ahead = np.zeros((len(edges), len(edges))), np.zeros((len(rows), len(edges)))
    for t in reversed(range(live.shape[1])):
        ahead = np.where(live[:, t, None], one[place[:, t]] + world.gamma * multi_step * ahead, 0.0)
        found += 2 * world.beta**2 * ahead.T @ (weight * ahead)
    return found


def without_reference(world: World, trace: Trace) -> dict[str, float]:
    """Naive logits sampled as if they were a policy: KL(pi* || softmax(l)), and what theory says, at l = q* / beta.

    Both differ by at most the discounted number of tokens times 2 max |l - q* / beta|.
    """
    mdp = world.mdp
    q = np.where(mdp.allowed & mdp.is_policy[:, None], world.solution.q(), 0.0) / world.beta
    seen, predicted = (episode_kl(world.solution, softmax_policy(mdp, x)) for x in (trace.logits, q))
    tokens = sum(world.gamma**t for t in range(actions_of(world.rows).real.shape[1]))
    return {"seen": seen, "predicted": predicted, "bound": tokens * 2 * trace.metrics[-1].q_error / world.beta}


# --------------------------------------------------------------------------------------------------------------- measuring
def curves(world: World, trace: Trace, loss: str, goal: float) -> dict[str, Any]:
    """A run's numbers; errors in units of the spread of q*, `updates` until max Q error stays within `goal` of it."""
    size = spread(world)
    unit = {"q_error": size, "v_error": size, "kl": 1.0}
    out: dict[str, Any] = {name: [getattr(m, name) / unit[name] for m in trace.metrics] for name in CURVES}
    worst = max(out["kl"])
    updates = trace.updates_to(goal * size)
    more = without_reference(world, trace) if loss == "naive" else {}
    return {"at": trace.at, "start_loss": trace.loss[0], "updates": updates, "worst_kl": worst, "spread": size, **out, **more}


def marks(steps: int) -> list[int]:
    """0, 1, 2, 3, ... in steps of about 12 %: enough for a logarithmic axis."""
    return sorted({0, *(round(x) for x in np.geomspace(1, steps, 60))})


def cases(settings: Settings) -> list[Case]:
    """What is measured, case by case."""
    trees = [{"world": w, "depth": settings["depth"], "loss": s} for w in ("Tree", "silent") for s in STEPS]
    needles = [{"world": "Needle", "length": T, "letters": 2, "loss": s} for T in settings["lengths"] for s in STEPS[2:]]
    return [*trees, {"world": "Tree", "depth": settings["depth"], "loss": "one start"}, *needles]


def measure(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """One case at one seed."""
    mdp, beta, gamma = environment(case, seed)
    world, loss = world_of(mdp, beta, gamma), case["loss"]
    behavior = behavior_of(world, case)
    rows = rows_of(world, behavior)
    values = np.linalg.eigvalsh(hessian(world, rows, multi_step=loss == "ShiQ"))
    rate = 1 / float(values[-1])
    if loss == "one start":
        return {"gap": one_start(world, rows, behavior, rate)}
    steps = settings["needle_steps" if case["world"] == "Needle" else "steps"]
    table = Table(world.mdp)
    touched: list[bool] = []
    begin = table.logits.detach().clone()
    first = int(world.starts[0])

    def model() -> Tensor:
        if len(touched) <= 2 * case.get("length", 0):
            touched.append(not torch.equal(table.logits[first], begin[first]))
        return table()

    trace = descend(
        loss, world, rows, behavior, model=model, parameters=table.parameters(), steps=steps, learning_rate=rate,
        optimizer="sgd", record_at=marks(steps), goal=0.0 if case["world"] != "Needle" else settings["goal"] * spread(world),
    )  # fmt: skip
    out = curves(world, trace, loss, settings["goal"])
    out |= {"formula_error": start_error(world, loss) / out["spread"], "condition": float(values[-1] / values[0])}
    if loss != "ShiQ":
        out["formula_loss"] = start_loss(world, behavior, loss)
    if case["world"] == "Needle":  # when a stopped run ends is all that counts; the first letter's logits moved when?
        out["moved"] = touched.index(True) if True in touched else None
        out = {key: value for key, value in out.items() if key not in (*CURVES, "at")}
    return out


def one_start(world: World, rows: TokenBatch, behavior: Floats, rate: float, steps: int = 50) -> float:
    """Steps 0, 1, 2 from the logits that each reads as q_hat = 0: the largest difference of their q_hat after some updates."""
    mdp = world.mdp
    ref = np.where(mdp.allowed, mdp.ref_logits, 0.0)
    zeros = (np.zeros_like(ref), np.where(mdp.allowed, mdp.ref_log_policy, 0.0), ref)
    found = []
    for loss, zero in zip(STEPS[:3], zeros, strict=True):
        own = np.where(mdp.is_policy[:, None], np.where(mdp.allowed, zero, -np.inf), mdp.ref_logits)
        table = Table(mdp, own)
        trace = descend(
            loss, world, rows, behavior, model=table, parameters=table.parameters(), steps=steps, learning_rate=rate,
            optimizer="sgd", record_at=[steps],
        )  # fmt: skip
        edges = (world.edges[:, 0], world.edges[:, 1])
        found.append(world.beta * (trace.logits - zero)[edges])
    return float(max(np.abs(f - found[2]).max() for f in found[:2]) / np.abs(found[2]).max())


# --------------------------------------------------------------------------------------------------------------- summing up
def counts(numbers: list[Any], most: int) -> dict[str, Any]:
    """Updates over seeds; a run that never came there counts as `most`, and how many did is said."""
    whole = [most if x is None else x for x in numbers]
    return {**vars(interval(whole)), "reached": sum(x is not None for x in numbers), "of": len(numbers)}


def of_world(runs: dict[str, list[dict[str, Any]]], steps: int) -> dict[str, Any]:
    """What is shown of one world: a curve a loss, starts, updates to the goal."""
    out: dict[str, Any] = {}
    for loss, many in runs.items():
        out[loss] = {name: vars(interval([x[name] for x in many])) for name in CURVES}
        out[loss] |= {"at": many[0]["at"], "updates": counts([x["updates"] for x in many], steps)}
        out[loss] |= {k: vars(interval([x[k] for x in many])) for k in ("start_loss", "worst_kl")}
        out[loss]["start"] = {name: vars(interval([x[name][0] for x in many])) for name in CURVES}
        out[loss]["end"] = {name: vars(interval([x[name][-1] for x in many])) for name in CURVES}
        out[loss]["largest_start_loss"] = max(x["start_loss"] for x in many)
        out[loss]["largest_end"] = max(x["q_error"][-1] for x in many)
    out["naive"]["without_reference"] = {k: vars(interval([x[k] for x in runs["naive"]])) for k in ("seen", "predicted")}
    out["naive"]["beyond_bound"] = max(abs(x["seen"] - x["predicted"]) - x["bound"] for x in runs["naive"])
    for loss in STEPS[:3]:  # paired: the same environment, the same reference
        pairs = zip(runs[loss], runs["ShiQ"], strict=True)
        ratio = [(a["updates"] or steps) / max(b["updates"] or steps, 1) for a, b in pairs]
        out[loss]["updates_over_shiq"] = vars(interval(ratio))
        pairs = zip(runs[loss], runs["ShiQ"], strict=True)
        out[loss]["end_over_shiq"] = vars(interval([a["q_error"][-1] / max(b["q_error"][-1], 1e-300) for a, b in pairs]))
    return out


def summarise(settings: Settings, records: list[Record]) -> dict[str, Any]:
    """What the figure and the claims need, with intervals over the seeds."""
    out: dict[str, Any] = {}
    for world in ("Tree", "silent"):
        runs = {loss: numbers_of(records, world=world, loss=loss) for loss in STEPS}
        out[world] = of_world(runs, settings["steps"])
        for loss in STEPS:
            out[world][loss]["formula_gap"] = max(abs(x["formula_error"] - x["q_error"][0]) for x in runs[loss])
            out[world][loss]["condition"] = vars(interval([x["condition"] for x in runs[loss]]))
            if loss != "ShiQ":
                gaps = [abs(x["formula_loss"] - x["start_loss"]) / (1 + x["formula_loss"]) for x in runs[loss]]
                out[world][loss]["formula_loss_gap"] = max(gaps)
    out["one_start"] = max(n["gap"] for n in numbers_of(records, loss="one start"))
    out["Needle"] = {str(T): _needle(settings, records, T) for T in settings["lengths"]}
    return out


def _needle(settings: Settings, records: list[Record], T: int) -> dict[str, Any]:
    runs = {loss: numbers_of(records, world="Needle", length=T, loss=loss) for loss in STEPS[2:]}
    most = settings["needle_steps"]
    out: dict[str, Any] = {}
    for loss, many in runs.items():
        moved = [x["moved"] for x in many if x["moved"] is not None]  # None: below rounding for 2 T updates
        out[loss] = {
            "updates": counts([x["updates"] for x in many], most),
            "condition": vars(interval([x["condition"] for x in many])),
            "moved": sorted(set(moved)),
        }
    one, multi = (runs[loss] for loss in STEPS[2:])
    ratio = [(a["updates"] or most) / (b["updates"] or most) for a, b in zip(one, multi, strict=True)]
    out["ratio"] = vars(interval(ratio))
    out["condition_ratio"] = vars(interval([a["condition"] / b["condition"] for a, b in zip(one, multi, strict=True)]))
    return out


# ------------------------------------------------------------------------------------------------------------------- claims
def claim_start(tree: dict[str, Any]) -> str:
    """How far each step is from q* before the first update."""
    return ", ".join(f"{SHORT[s]} {said(tree[s]['start']['q_error'])}" for s in STEPS)


def claim_updates(tree: dict[str, Any]) -> str:
    """How many updates each step needs."""

    def one(s: str) -> str:
        u = tree[s]["updates"]
        return f"{SHORT[s]} {said(u, '.0f')}" + (f" ({u['reached']} of {u['of']} there)" if u["reached"] < u["of"] else "")

    return ", ".join(one(s) for s in STEPS)


def silent_claims(still: dict[str, Any], exact: float) -> list[Claim]:
    """With no reward: what the shift is for."""
    lost = [still[s]["start_loss"]["low"] for s in STEPS[:2]]
    zero = [still[s]["largest_start_loss"] for s in STEPS[2:]]
    drift = {s: still[s]["worst_kl"] for s in STEPS}
    return [
        Claim(
            "Where nothing is paid the loss at the pretrained start is 0 with the shift, and not 0 for naive and easy.",
            ", ".join(f"{SHORT[s]} {said(still[s]['start_loss'])}" for s in STEPS),
            min(lost) > 0.1 * 0.5**2 and max(zero) <= exact,
        ),
        Claim(
            "There naive starts off pi*, reading l_ref as a value, easy sampling leaves it and returns, the shifted stay.",
            "KL(pi* || pi) at first and at most: "
            + ", ".join(f"{SHORT[s]} {still[s]['start']['kl']['value']:.2g}, {said(drift[s])}" for s in STEPS),
            still["naive"]["start"]["kl"]["low"] > 1e-3
            and still["easy"]["start"]["kl"]["high"] <= exact
            and drift["easy"]["low"] > 1e-3
            and max(drift[s]["high"] for s in STEPS[2:]) <= exact,
        ),
    ]


def without_claim(tree: dict[str, Any]) -> Claim:
    """Naive logits sampled as if they were a policy."""
    naive = tree["naive"]
    seen, predicted = (naive["without_reference"][k] for k in ("seen", "predicted"))
    return Claim(
        "Naive logits sampled without the reference end off by KL(pi* || softmax(q*/beta)), as theory gives.",
        f"measured {said(seen)}, predicted {said(predicted)} nats; with the reference {said(naive['end']['kl'])}",
        naive["beyond_bound"] <= 0 and seen["low"] > 10 * naive["end"]["kl"]["high"],
    )


def claims(settings: Settings, summary: dict[str, Any]) -> list[Claim]:
    """What the figure shows, each with its numbers."""
    tree, needle = summary["Tree"], summary["Needle"]
    gap = max(tree[s]["formula_gap"] for s in STEPS)
    lengths = [str(T) for T in settings["lengths"]]
    ratios = [needle[T]["ratio"] for T in lengths]
    moved = {T: (needle[T][STEPS[2]]["moved"], needle[T]["ShiQ"]["moved"]) for T in lengths}
    loss_gap = max(summary[w][s]["formula_loss_gap"] for w in ("Tree", "silent") for s in STEPS[:3])
    start = {s: tree[s]["start"]["q_error"] for s in STEPS}
    return [
        Claim(
            "Steps 0, 1 and 2 are one loss of q_hat, and differ in their start alone: begun at one q_hat they stay together.",
            f"largest relative difference of q_hat after 50 updates {summary['one_start']:.1e}; starts and their losses as by"
            f" formula to {max(gap, loss_gap):.1e}",
            summary["one_start"] <= EXACT and max(gap, loss_gap) <= EXACT,
        ),
        Claim(
            "The pretrained start is nearer to the truth with the shift: max Q error at update 0, in units of the range of q*.",
            claim_start(tree),
            start["ShiQ"]["high"] < min(start[s]["low"] for s in STEPS[:2]),
        ),
        *silent_claims(summary["silent"], EXACT),
        Claim(
            f"Dense rewards: ShiQ needs the fewest updates until the Q error stays below {settings['goal']:.0%} of the range.",
            claim_updates(tree) + f"; one-step over ShiQ {said(tree[STEPS[2]]['updates_over_shiq'])}",
            all(tree[s]["updates_over_shiq"]["low"] > 1 for s in STEPS[:3]),
        ),
        Claim(
            "Sparse reward: one step leaves the first letter's logits as they are for T - 1 updates, multi-step for none.",
            "first moved at update " + ", ".join(f"{a} and {b} at T = {T}" for T, (a, b) in moved.items()),
            all(min(a) == int(T) and b == [1] for T, (a, b) in moved.items()),
        ),
        Claim(
            "Multi-step saves more on the longer strings than on the shortest: updates of one-step over those of ShiQ.",
            ", ".join(f"T = {T}: {said(r)}" for T, r in zip(lengths, ratios, strict=True)),
            all(r["low"] > 1 for r in ratios) and ratios[-1]["low"] > ratios[0]["high"],
        ),
        without_claim(tree),
    ]


# ------------------------------------------------------------------------------------------------------------------ drawing
def band(axes: "Axes", at: list[int], x: dict[str, Any], loss: str, floor: float = 0.0, last: int = 1) -> None:
    """An interquartile mean and its interval against updates; update 0 stands at 0.7 of a logarithmic axis."""
    color, marker = COLORS[LOOKS[loss]], MARKERS[LOOKS[loss]]
    where = np.maximum(at, 0.7)
    value, low, high = (np.maximum(x[k], floor) for k in ("value", "low", "high"))
    if len(at) == 1:  # it was right from the start and stopped there
        where, value, low, high = (np.repeat(y, 2) for y in (where, value, low, high))
        where[1] = last
    axes.fill_between(where, low, high, color=color, alpha=0.18, lw=0)
    axes.plot(where, value, color=color, marker=marker, markevery=0.12, label=SHORT[loss])


def updates_axis(axes: "Axes", steps: int) -> None:
    """A logarithmic axis of updates with a place for 0."""
    ticks = [0.7, *(10**k for k in range(1, 6) if 10**k <= steps)]
    axes.set_xscale("log")
    axes.set_xlabel("updates")
    axes.set_xticks(ticks, ["0", *(f"{t:,.0f}" for t in ticks[1:])])
    axes.minorticks_off()
    axes.grid(axis="y")


def draw_curves(axes: Any, world: dict[str, Any], name: str, floor: float, ylabel: str, title: str) -> None:
    """One panel: a curve a step."""
    for loss in STEPS:
        band(axes, world[loss]["at"], world[loss][name], loss, floor)
    updates_axis(axes, world["ShiQ"]["at"][-1])
    axes.set(yscale="log", ylabel=ylabel)
    axes.set_title(title, fontsize=10)


@style()
def draw(result: Result) -> "Figure":
    """The figure."""
    page = figure(figsize=(9, 3.5))
    left, middle, right = page.subplots(1, 3)
    tree, needle = result.summary["Tree"], result.summary["Needle"]
    draw_curves(left, tree, "q_error", 1e-4, "max |q̂ − q*| / range of q*", "Tree: Q error")
    left.axhline(result.settings["goal"], color=GREY, lw=0.8, ls=":")
    draw_curves(middle, tree, "kl", 1e-6, "KL(π* ‖ π), nats", "Tree: policy")
    lengths = result.settings["lengths"]
    for loss in STEPS[2:]:
        x = [needle[str(T)][loss]["updates"] for T in lengths]
        value, low, high = (np.array([u[k] for u in x]) for k in ("value", "low", "high"))
        look = LOOKS[loss]
        right.errorbar(lengths, value, [value - low, high - value], color=COLORS[look], marker=MARKERS[look], capsize=3)
    right.set(xscale="log", yscale="log", xlabel="letters T of the string", ylabel="updates to the goal")
    right.set_xticks(lengths, [str(T) for T in lengths])
    right.minorticks_off()
    right.grid(axis="y")
    right.set_title("Needle: one step and many", fontsize=10)
    page.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return page


ABLATION = Study(
    name="ablation",
    title="The derivation's ablation on tables (a reconstruction)",
    question="What does each step of the derivation buy: naive logits, easy sampling, the shift, multi-step?",
    settings={"seeds": 10, "depth": 4, "steps": 1000, "lengths": [2, 4, 8], "needle_steps": 3000, "goal": 0.05},
    fast={"seeds": 2, "depth": 2, "steps": 60, "lengths": [2, 4], "needle_steps": 120},
    cases=cases,
    measure=measure,
    summarise=summarise,
    claims=claims,
    draw=draw,
)


# --------------------------------------------------------------------------------------------------------- the tiny version
def cases_tiny(settings: Settings) -> list[Case]:
    """What is measured on the network, case by case."""
    needle = {"world": "Needle", "length": settings["length"], "letters": 4}
    return [{"world": "Tree", "depth": settings["depth"]}, {"world": "silent", "depth": settings["depth"]}, needle]


def measure_tiny(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """All four losses from one pretrained network."""
    mdp, beta, gamma = environment(case, seed)
    start = pretrain(mdp, beta=beta, gamma=gamma, seed=seed, steps=settings["pretraining"])
    world = start.world
    behavior = behavior_of(world, case)
    rows = rows_of(world, behavior)
    steps = settings["silent_steps" if case["world"] == "silent" else "steps"]
    levels = world.mdp.ref_logsumexp[world.mdp.is_policy]
    out: dict[str, Any] = {"levels": [float(levels.mean()), float(levels.std())], "cross_entropy": start.cross_entropy}
    for loss in STEPS:
        trace, _ = train_tiny(start, loss, rows, behavior, steps=steps, record_at=marks(steps)[::2])
        out[loss] = curves(world, trace, loss, settings["goal"])
        out[loss]["formula_error"] = start_error(world, loss) / out[loss]["spread"]
    return out


def summarise_tiny(settings: Settings, records: list[Record]) -> dict[str, Any]:
    """The same for the network."""
    out: dict[str, Any] = {}
    for world in ("Tree", "silent", "Needle"):
        found = numbers_of(records, world=world)
        steps = settings["silent_steps" if world == "silent" else "steps"]
        out[world] = of_world({loss: [x[loss] for x in found] for loss in STEPS}, steps)
        gaps = [abs(x[loss]["formula_error"] - x[loss]["q_error"][0]) for x in found for loss in STEPS]
        out[world]["formula_gap"] = max(gaps)
        out[world]["levels"] = vars(interval([x["levels"] for x in found]))
    return out


def claims_tiny(settings: Settings, summary: dict[str, Any]) -> list[Claim]:
    """What the figure of the network shows."""
    tree, still = summary["Tree"], summary["silent"]
    gap = max(summary[w]["formula_gap"] for w in ("Tree", "silent", "Needle"))
    mean, deviation = tree["levels"]["value"]
    end = {s: tree[s]["end"]["q_error"] for s in STEPS}
    return [
        Claim(
            "Pretraining leaves levels of its own; where nothing is paid only the shift starts at the truth.",
            f"lse(l_ref) {mean:.2f}, between prefixes +-{deviation:.2f}; max Q error at update 0, in ranges of q*: "
            f"{claim_start(tree)}; silent, in units of reward: {claim_start(still)}; as by formula to {gap:.0e}",
            still["ShiQ"]["start"]["q_error"]["high"] <= 1e-9
            and min(still[s]["start"]["q_error"]["low"] for s in STEPS[:2]) > 0.5
            and gap <= 1e-9,
        ),
        *silent_claims(summary["silent"], EXACT),
        Claim(
            f"All four train the network to the same q*, within {settings['goal']:.0%} of its range at every prefix and token.",
            claim_updates(tree) + " updates; at the end " + ", ".join(f"{SHORT[s]} {said(end[s], '.2g')}" for s in STEPS),
            all(end[s]["high"] <= settings["goal"] for s in STEPS),
        ),
        Claim(
            "Dense rewards: ShiQ needs fewer updates than its one-step twin.",
            f"one step over ShiQ, paired: {said(tree[STEPS[2]]['updates_over_shiq'])}",
            tree[STEPS[2]]["updates_over_shiq"]["low"] > 1,
        ),
        without_claim(tree),
    ]


@style()
def draw_tiny(result: Result) -> "Figure":
    """The figure of the network."""
    page = figure(figsize=(9, 3.5))
    left, middle, right = page.subplots(1, 3)
    summary = result.summary
    draw_curves(left, summary["Tree"], "q_error", 1e-4, "max |q̂ − q*| / range of q*", "Tree: Q error")
    left.axhline(result.settings["goal"], color=GREY, lw=0.8, ls=":")
    draw_curves(middle, summary["Needle"], "kl", 1e-5, "KL(π* ‖ π), nats", "Needle: policy")
    still = summary["silent"]
    last = still["naive"]["at"][-1]
    for loss in STEPS:
        band(right, still[loss]["at"], still[loss]["kl"], loss, last=last)
    updates_axis(right, last)
    right.set(ylabel="KL($π_{ref}$ ‖ π), nats")
    right.set_title("Nothing is paid: policy", fontsize=10)
    page.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return page


ABLATION_TINY = Study(
    name="ablation-tiny",
    title="The derivation's ablation on a tiny transformer (a reconstruction)",
    question="What does each step of the derivation buy a pretrained network?",
    settings={"seeds": 10, "depth": 4, "length": 4, "steps": 400, "silent_steps": 100, "pretraining": 200, "goal": 0.05},
    fast={"seeds": 2, "depth": 2, "length": 2, "steps": 40, "silent_steps": 20, "pretraining": 20},
    cases=cases_tiny,
    measure=measure_tiny,
    summarise=summarise_tiny,
    claims=claims_tiny,
    draw=draw_tiny,
)
