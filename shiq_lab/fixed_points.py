"""The fixed-point table: is pi* stationary under a loss, on which data, in which world, and what does the loss pin down?

Every entry is the exact expected gradient at the loss's own optimum: all rows of a small automaton with their exact
probabilities, float64. What theory predicts stands beside it; a yes is a gradient below a bound that rounding gives, a no
one that is orders of magnitude above it, and whatever lies in between is neither and fails.

Theory, in words; "path" means R_b(y) = R(y) - beta l(y) = v*(prompt) on every row, which a deterministic world grants.

    always         the residual has mean zero given what the gradient depends on, whatever the data and the replies
    path           zero row by row in a deterministic world; with random replies on data of pi* alone, where the score of
                   what comes later has mean zero
    deterministic  zero row by row in a deterministic world; with random replies nowhere: the gradient also passes through
                   what the reply decides
    on-policy      the expected score cancels it on data of pi* alone, in any world
    one token      on-policy, and only where a completion is one token long
    never          another optimum, or none

What a loss pins down is read off the Jacobian of the field (the expected gradient as a function of the logits, by differences
of fourth order; on-policy losses with data that follow the policy): its null directions are the levels that stay free.
All tables of one question are stacked into one batch, so that one backward pass answers them all.
"""

from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from shiq_lab.builders import random_reference
from shiq_lab.graph import Floats
from shiq_lab.mdp import TokenMDP
from shiq_lab.objectives import NOTHING, ONE_A_STATE, Level, Subject, Theory, World, fields, subjects
from shiq_lab.progress import progress

BEHAVIORS = ("on-policy", "reference", "uniform", "random")
APART = 1e6  # a "no" lies at least this factor above the bound of a "yes" (seen: 4e8 and more; at other rewards 1e7)
STEP = 1e-3  # of the differences; their error is STEP^4 times a fifth derivative, and rounding / STEP
MOVED = 1.3  # how far levels are shifted: any number that is not small
SEED = 32  # of the rewards: at this one the two prompts are worth unlike amounts in every world


# --------------------------------------------------------------------------------------------------------------- worlds
def _automaton(random_replies: bool, terminal: bool) -> TokenMDP:
    """Two prompts, two turns, strings of 1 to 5 actions that meet again, unlike levels and rewards in every state."""
    follow = np.array([
        [1, 2, -1],  # 0: the prompts
        [3, 4, -1], [5, 6, 4], [7, 8, -1], [8, 7, 6], [9, -1, -1],  # 1 to 5
        [9, 10, -1], [8, 10, 11],  # 6 and 7: the environment answers
        [-1, 11, 9], [11, -1, -1], [-1, -1, 11], [-1, -1, -1],  # 8 to 11
    ])  # fmt: skip
    is_policy = ~np.isin(np.arange(12), [0, 6, 7])
    chance = np.zeros(follow.shape)
    chance[0], chance[6], chance[7] = [0.6, 0.4, 0], [0.55, 0.45, 0], [0.3, 0.3, 0.4]
    if not random_replies:
        chance[6], chance[7] = [0, 1, 0], [0, 0, 1]
    allowed = np.ones(follow.shape, dtype=bool)
    allowed[5, 2] = False
    return _finish(follow, chance, is_policy, allowed, terminal)


def _single_token() -> TokenMDP:
    """Two prompts and one action of three."""
    follow = np.array([[1, 2, -1], [-1, -1, -1], [-1, -1, -1]])
    chance = np.zeros(follow.shape)
    chance[0] = [0.6, 0.4, 0]
    return _finish(follow, chance, np.array([False, True, True]), np.ones(follow.shape, dtype=bool), True)


def _finish(follow: Any, chance: Floats, is_policy: Any, allowed: Any, terminal: bool) -> TokenMDP:
    paid = is_policy[:, None] & allowed & ((follow < 0) | (not terminal))
    reward = np.where(paid, np.random.default_rng(SEED).normal(size=follow.shape), 0.0)
    with np.errstate(divide="ignore"):
        logits = np.where(is_policy[:, None], np.where(allowed, 0.0, -np.inf), np.log(chance))
    return random_reference(TokenMDP(follow, reward, logits, is_policy), seed=4)


@cache
def worlds() -> tuple[World, ...]:
    """Deterministic and random replies, dense and terminal rewards, gamma 1 and below; and completions of one token."""
    out = [
        World(name, rewards, gamma, _automaton(name == "random replies", rewards == "terminal"))
        for name in ("deterministic", "random replies")
        for rewards in ("dense", "terminal")
        for gamma in (1.0, 0.8)
    ]
    return (*out, World("one token", "terminal", 1.0, _single_token()))


# ----------------------------------------------------------------------------------------------------------- predictions
def predict(theory: Theory, world: World, behavior: str) -> bool:
    """Is the gradient zero, by theory?"""
    on_policy, deterministic = behavior == "on-policy", world.name != "random replies"
    return {
        "always": True,
        "path": deterministic or on_policy,
        "deterministic": deterministic,
        "on-policy": on_policy,
        "one token": on_policy and world.name == "one token",
        "never": False,
    }[theory]


def _name(level: str, values: str | None) -> str:
    """What is pinned down, in words."""
    base = {"all": "q*, v*", "start": "pi*, v* at the start", "none": "pi*"}[level]
    return base + {None: "", "start": ", V of the prompt", "states": ", V of every state"}[values]


def _seen(level: Level, world: World) -> Level:
    """Where every state is a first one, its level is seen or not: "all" and "start" are the same."""
    return "all" if level == "start" and not len(world.inner) else level


def predicted_fixes(subject: Subject, world: World) -> str | None:
    """What theory says that the loss pins down; None where pi* (with the loss's own values) is not stationary at all."""
    data = _data(subject, world, [name for name in BEHAVIORS if _predict_both(subject, world, name)])
    if data is None:
        return None
    return subject.fixes or _name(_seen(subject.level, world), subject.values)


def _predict_both(subject: Subject, world: World, behavior: str) -> bool:
    own = subject.values is None or predict(subject.value_theory, world, behavior)
    return predict(subject.theory, world, behavior) and own


def _data(subject: Subject, world: World, stationary: list[str]) -> str | None:
    """The data of the Jacobian: "random" where that is allowed, else such as "follow" the policy; None if there are none."""
    if subject.twos and world.name != "one token":
        return None
    if "random" in stationary and not subject.follow:
        return "random"
    return "follow" if "on-policy" in stationary else None


# ---------------------------------------------------------------------------------------------------------- measurements
@dataclass(frozen=True)
class Row:
    """One entry: a loss in a world under a behaviour, measured and predicted.

    gradient        largest entry of the expected gradient by the logits, at the loss's optimum
    value_gradient  the same by the loss's own values, None where it has none
    bound           a yes is at most this; a no is at least APART times it
    sees            levels of the logits that matter to the gradient: "all", "start", "none"
    fixes           what the Jacobian's null directions leave pinned down; None where pi* is not stationary
    free            how many directions stay free, and the least singular value of the others
    """

    loss: str
    world: str
    rewards: str
    gamma: float
    behavior: str
    gradient: float
    value_gradient: float | None
    bound: float
    predicted: bool
    value_predicted: bool | None
    sees: str
    sees_predicted: str
    fixes: str | None
    fixes_predicted: str | None
    free: int | None = field(default=None)
    least: float | None = field(default=None)

    @property
    def stationary(self) -> bool | None:
        """Yes, no, or None for a gradient that is neither."""
        return _verdict(self.gradient, self.bound)

    @property
    def value_stationary(self) -> bool | None:
        """Whether the loss's own value net stays at v*; None where it has none."""
        return None if self.value_gradient is None else _verdict(self.value_gradient, self.bound)

    @property
    def holds(self) -> bool:
        """Is everything as theory says?"""
        values = self.value_predicted is None or self.value_stationary is self.value_predicted
        same = (self.sees, self.fixes) == (self.sees_predicted, self.fixes_predicted)
        return self.stationary is self.predicted and values and same


def _verdict(gradient: float, bound: float) -> bool | None:
    if gradient <= bound:
        return True
    return False if gradient >= APART * bound else None


def measure(subject: Subject, world: World) -> list[Row]:
    """The rows of one loss in one world, one a behaviour."""
    best, v_star = subject.optimum(world), torch.tensor(world.solution.v())
    many = best.expand(len(BEHAVIORS), *best.shape)
    behaviors = torch.stack([world.policies[name] for name in BEHAVIORS])
    by_logits, by_values = fields(subject, world, many, v_star.expand(len(many), -1), behaviors)
    bound = world.bound(many)
    gradients = by_logits.abs().amax((1, 2)).tolist()
    value_gradients = by_values.abs().amax(1).tolist() if subject.values else [None] * len(BEHAVIORS)
    worst = zip(BEHAVIORS, gradients, value_gradients, strict=True)
    still = [name for name, g, w in worst if g <= bound and (w is None or w <= bound)]
    fixes, free, least = pinned_down(subject, world, _data(subject, world, still))
    sees = seen_levels(subject, world)
    return [
        Row(
            subject.name, world.name, world.rewards, world.gamma, name, gradient, value_gradient, bound,
            predict(subject.theory, world, name),
            predict(subject.value_theory, world, name) if subject.values else None,
            sees, _seen(subject.level, world), fixes, predicted_fixes(subject, world), free, least,
        )
        for name, gradient, value_gradient in zip(BEHAVIORS, gradients, value_gradients, strict=True)
    ]  # fmt: skip


def seen_levels(subject: Subject, world: World) -> str:
    """Which levels the loss sees, asked at a table of no meaning: it has a gradient along them (the sum over a state's
    tokens), or the gradient changes where they are shifted, those of inner states or those of first states."""
    base = world.elsewhere
    tables = base.repeat(3, 1, 1)
    tables[1, world.inner] += MOVED
    tables[2, world.starts] += MOVED
    behaviors = world.policies["random"].expand_as(tables)
    values = torch.tensor(world.solution.v()).expand(3, -1)
    by_logits, by_values = fields(subject, world, tables, values, behaviors)
    size = 1 + float(by_logits.abs().max())
    moved = (by_logits[1:] - by_logits[0]).abs().amax((1, 2)) + (by_values[1:] - by_values[0]).abs().amax(1)
    along = [by_logits[0, states].sum(1).abs().sum() for states in (world.inner, world.starts)]
    inner, start = (_verdict(float(m + a), size * world.bound(tables)) for m, a in zip(moved, along, strict=True))
    if not len(world.inner):
        inner = start
    names: dict[tuple[bool | None, bool | None], str] = {(True, True): "none", (True, False): "start", (False, False): "all"}
    return names.get((inner, start), "unclear")


def pinned_down(subject: Subject, world: World, data: str | None) -> tuple[str | None, int | None, float | None]:
    """(what is pinned down, how many directions stay free, the least singular value of the others) at the optimum."""
    if data is None:
        return None, None, None
    jacobian, noise = jacobian_of(subject, world, follow=data == "follow")
    singular = np.linalg.svd(jacobian, compute_uv=False)
    null = singular <= noise
    free = int(null.sum())
    least = float(singular[~null].min()) if not null.all() else None
    if least is not None and least < 100 * noise:
        return "unclear", free, least
    if null.all():
        return NOTHING, free, least
    edges = world.edges.numpy()
    level = lambda states: (edges[:, :1] == states.numpy()).astype(float)  # noqa: E731
    dead = {}
    for name, states in (("start", world.starts), ("inner", world.inner)):
        moves = jacobian[:, : len(edges)] @ level(states)
        dead[name] = (np.linalg.norm(moves, axis=0) <= noise * np.sqrt(len(edges))).all() if len(states) else None
    n_start, n_inner = len(world.starts), len(world.inner)
    for seen, expected in (("all", 0), ("start", n_inner), ("none", n_inner + n_start)):
        levels_free = {"all": (False, False), "start": (False, True), "none": (True, True)}[seen]
        matches = dead["start"] == levels_free[0] and dead["inner"] in (None, levels_free[1])
        if matches and free == expected:
            return _name(seen, subject.values), free, least
    rank = len(singular) - free
    return (ONE_A_STATE if rank == n_start + n_inner and not any(dead.values()) else "something else"), free, least


def jacobian_of(subject: Subject, world: World, *, follow: bool) -> tuple[Floats, float]:
    """The Jacobian [P, P] of the field at the optimum by differences of fourth order, and the singular values of its noise.

    Parameters are the reachable tokens' logits, then the loss's own values. `follow`: data follow the moved policy.
    (8 (f(+h) - f(-h)) - (f(+2h) - f(-2h))) / 12h: f's rounding enters 18 / 12h times, the fifth derivative h^4 / 30 times.
    """
    edges = world.edges
    states = {None: edges[:0, 0], "start": world.starts, "states": torch.cat([world.starts, world.inner])}[subject.values]
    E, P = len(edges), len(edges) + len(states)
    best, v_star = subject.optimum(world), torch.tensor(world.solution.v())
    best = torch.where(torch.tensor(np.array(world.mdp.allowed)), best, 0.0)
    step = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=best.dtype) * STEP
    tables, values = best.repeat(4, P, 1, 1), v_star.repeat(4, P, 1)
    number = torch.arange(E)
    tables[:, number, edges[:, 0], edges[:, 1]] += step[:, None]
    values[:, torch.arange(E, P), states] += step[:, None]
    tables, values = tables.reshape(4 * P, *best.shape), values.reshape(4 * P, -1)
    allowed = torch.tensor(np.array(world.mdp.allowed))
    if follow:
        behaviors = torch.where(allowed, tables, -torch.inf).log_softmax(2)
        speaks = torch.tensor(~np.array(world.mdp.is_policy))
        behaviors[:, speaks] = torch.tensor(world.mdp.ref_log_policy)[speaks]
    else:
        behaviors = world.policies["random"].expand_as(tables)
    by_logits, by_values = fields(subject, world, tables, values, behaviors)
    flat = torch.cat([by_logits[:, edges[:, 0], edges[:, 1]], by_values[:, states]], 1).reshape(4, P, P)
    jacobian = (8 * (flat[0] - flat[1]) - (flat[2] - flat[3])) / (12 * STEP)
    noise = P * (1.5 * world.bound(tables) / STEP + float(flat.abs().max()) / STEP * STEP**4 / 3)
    return jacobian.T.numpy(), noise


@cache
def _table() -> tuple[Row, ...]:
    jobs = [(f"{s.name}, {w.name}", s, w) for s in subjects() for w in worlds()]
    return tuple(row for _, subject, world in progress(jobs, "fixed points") for row in measure(subject, world))


def table() -> list[Row]:
    """Every loss in every world under every behaviour: 36 rows a loss. Takes seconds, once a process."""
    return list(_table())


# -------------------------------------------------------------------------------------------------------------- showing
@dataclass(frozen=True)
class Line:
    """A loss in the printed table: a cell for each world on data of pi* itself and on others, and what it pins down."""

    loss: str
    cells: tuple[str, ...]
    fixes: str
    holds: bool


COLUMNS = tuple((world, own) for world in ("deterministic", "random replies", "one token") for own in (True, False))
HEADS = ("loss", *(f"{world}, {'own' if own else 'other'} data" for world, own in COLUMNS), "pins down")


def summary(rows: list[Row]) -> list[Line]:
    """The table with rewards, discounts and foreign behaviours folded together."""
    out = []
    for loss in dict.fromkeys(r.loss for r in rows):
        mine = [r for r in rows if r.loss == loss]
        cells = [_cell([r for r in mine if (r.world, r.behavior == "on-policy") == column]) for column in COLUMNS]
        fixes = next((r.fixes for r in mine if r.fixes is not None), "-")
        out.append(Line(loss, tuple(cells), fixes, all(r.holds for r in mine)))
    return out


def _cell(rows: list[Row]) -> str:
    """ "yes", or "no" with the smallest gradient met; "mixed" and "unclear" name what should not happen."""
    answers = {r.stationary for r in rows}
    if len(answers) != 1:
        return "mixed" if answers else "-"
    (answer,) = answers
    if answer is None:
        return "unclear"
    if not answer:
        return f"no ({min(r.gradient for r in rows):.0e})"
    values = {r.value_stationary for r in rows}
    return "yes" if values <= {None, True} else "yes, its V not"


def to_markdown(rows: list[Row]) -> str:
    """The document docs/fixed_points.md."""
    lines = summary(rows)
    cells = lambda texts: "| " + " | ".join(texts) + " |"  # noqa: E731
    body = [cells(HEADS), cells(["---"] * len(HEADS))] + [cells((x.loss, *x.cells, x.fixes)) for x in lines]
    count = f"{len(rows)} expected gradients, {sum(r.holds for r in rows)} as theory predicts"
    return MARKDOWN.format(count=count, table="\n".join(body), behaviors=len(BEHAVIORS) - 1)


MARKDOWN = """# Is pi* a fixed point?

Each cell is an exact expected gradient at the optimum that the loss is after: all rows of a small automaton (two prompts, two
turns, 1 to 5 actions, another level of the reference's logits in every state) with their exact probabilities, in float64.
*yes*: zero to rounding under dense and terminal rewards, gamma = 1 and 0.8. *no*: the smallest of its largest entries, at
least a million times the rounding. *Own data*: rows drawn from pi* itself; *other data*: {behaviors} behaviours of full support
(the reference, uniform, random), all with the same answer. *Pins down* is what is left when the null directions of the gradient
field's Jacobian are taken away ("-": there is no optimum to ask at). {count}.

Printed by `shiq-lab selftest --table`, which also has every number (`--json`); this file is generated from it.

{table}

- *its V not*: the loss's own value net is pulled away from v*, while the policy stays.
- *one number a state*: the gradient through the value alone has one direction a state; it cannot tell the tokens apart.
- *nothing*: where the data follow the policy the expected gradient is zero at every policy.
- On *other data* GRPO's ratios are clipped; where one is out of bounds the token's gradient may be cut off altogether.
- On its own data k1 in the loss does nothing at all, k3 is the gradient of KL(pi_ref || pi), and k2 misses what a token does to
  the states after it: in the loss, pi* survives k2 alone, and only where a completion is one token long.
"""


def to_json(rows: list[Row]) -> dict[str, object]:
    """All of it, for programs."""
    more = lambda r: {"stationary": r.stationary, "value_stationary": r.value_stationary, "holds": r.holds}  # noqa: E731
    return {"passed": bool(rows) and all(r.holds for r in rows), "rows": [{**asdict(r), **more(r)} for r in rows]}
