"""What do random tools do to ShiQ, and do the two repairs of F11 converge? Beyond the paper, on its kind of multi-turn task.

Setting. ToolCall (a call is always answered alike) and RandomTool (at random), 2 functions, 2 arguments, 3 values, beta 0.2,
gamma 0.9, data uniform and of pi* itself; tables from l_ref, all rows with exact chances, and samples of them. Two automata
with loops, Ring and Roundabout, for stability. The tiny version trains a network (2 values) on RandomTool's prefix tree by
Adam. Chance, from the seed: prices, worths, odds, the reference, the samples, the network's initial weights.

Theory. With random replies the expected gradient of ShiQ at l* is 2 beta E[X (mu - pi*)] (F9): not zero off-policy, zero on
pi*'s own data. The semi-gradient through the token and the turn-cut loss keep l* stationary (F11). Are they stable? The
expected semi-gradient at l* is 2 beta^2 D (I - gamma P_mu)^-1 (I - gamma P_pi*) (l - l*): D the visits, P over (state, token).
- Without loops (every language model whose state is all that was said) the matrix is triangular in time with the diagonal
  2 beta^2 D, whatever the behaviour and gamma: stable for every step below 1 / (beta^2 max D), at the speed of the rarest
  token; scaled by visits it is nilpotent: exact after as many sweeps as a row has tokens.
- With loops the product of the two brackets may have eigenvalues of negative real part, as Q(lambda) without corrections
  has for behaviours far from the target (Harutyunyan et al. 2016, arXiv 1602.04951): then no step is small enough.
Through the value the semi-gradient sees one number a state.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shiq_lab import facts
from shiq_lab.batch import TokenBatch
from shiq_lab.builders import END, Row, from_states, random_reference
from shiq_lab.envs import make
from shiq_lab.graph import Floats
from shiq_lab.learning import rows_of, world_of
from shiq_lab.losses.methods import METHODS
from shiq_lab.losses.residuals import actions_of, ahead
from shiq_lab.mdp import TokenMDP
from shiq_lab.objectives import World
from shiq_lab.plotting import COLORS, GREY, MARKERS, PALETTE, figure, style
from shiq_lab.policies import softmax_policy, uniform_policy
from shiq_lab.population import Population
from shiq_lab.studies.frame import Case, Claim, Record, Result, Settings, Study
from shiq_lab.studies.statistics import interval, said
from shiq_lab.tiny import pretrain, train_tiny
from shiq_lab.training import measure as compare
from shiq_lab.training import train, train_on_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BETA, GAMMA = 0.2, 0.9
FORMS = {"ShiQ": "shiq", "semi-gradient": "semi-gradient", "turn-cut": "turn-cut"}
WORLDS, DATA = ("ToolCall", "RandomTool"), ("uniform", "pi*")
LOOPS = ("Ring", "Roundabout")


# ------------------------------------------------------------------------------------------------- expected updates
@dataclass(frozen=True, eq=False)
class Field:
    """The expected update of a form on given rows: J'(left' W (right z - paid)), z = (c of all E edges, u of all P states).

    Residuals are linear in z; `right` says which are squared, `left` through which of their parts the gradient goes; J = dz/dl.
    """

    world: World
    matrix: Tensor  # 2 left' W right, [E + P, E + P]
    paid: Tensor  # 2 left' W (rewards summed), [E + P]
    visits: Tensor  # float[E]

    @classmethod
    def of(cls, world: World, rows: TokenBatch, form: str) -> "Field":
        """form: "ShiQ", "semi-gradient" (through the token), "value" (through the value), "turn-cut"."""
        c, u, reward, turn = _features(world, rows)
        T = c.shape[1]
        k = torch.arange(T)
        lag = (k[None] - k[:, None]).double()
        powers = torch.where(lag >= 0, world.gamma ** lag.clamp(min=0), 0.0)[None]  # (1, T, T)
        same = (turn[:, :, None] == turn[:, None]) & (turn >= 0)[:, None]
        follow = torch.nn.functional.pad(u[:, 1:], (0, 0, 0, 1))
        inside = (ahead(torch.ones_like(reward), 1, turn) > 0)[..., None]
        total = powers.expand(len(c), T, T) if form != "turn-cut" else torch.where(same, powers, 0.0)
        right = total @ (c - world.gamma * follow)
        left = {"semi-gradient": c, "value": u, "ShiQ": right}.get(form, total @ (c - world.gamma * follow * inside))
        weight = rows.weights / rows.weights.sum()
        paid = torch.einsum("b,btk,bt->k", weight, left, (total @ reward[..., None])[..., 0])
        visits = torch.einsum("b,btk->k", weight, c)[: len(world.edges)]
        return cls(world, 2 * torch.einsum("b,btj,btk->jk", weight, left, right), 2 * paid, visits)

    def z(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(z, pi of every edge, the state's number of every edge) at logits float[E]."""
        mdp, edges = self.world.mdp, self.world.edges
        states, row = torch.unique(edges[:, 0], return_inverse=True)
        table = torch.full((len(states), mdp.n_tokens), -torch.inf, dtype=logits.dtype).index_put((row, edges[:, 1]), logits)
        level, ref = table.logsumexp(1), torch.tensor(np.array(mdp.ref_logits))
        c = self.world.beta * (logits - ref[edges[:, 0], edges[:, 1]])
        u = self.world.beta * (level - ref.logsumexp(1)[states])
        return torch.cat([c, u]), torch.exp(logits - level[row]), row

    def __call__(self, logits: Tensor) -> Tensor:
        """float[E]: what gradient descent subtracts, times its step."""
        z, pi, row = self.z(logits)
        by_z, E = self.matrix @ z - self.paid, len(logits)
        return self.world.beta * (by_z[:E] + by_z[E:][row] * pi)

    def jacobian(self, logits: Tensor) -> Tensor:
        """J' matrix J: the field's derivative where the expected part through every u is zero, as at l*."""
        z, pi, row = self.z(logits)
        E = len(logits)
        J = torch.zeros(len(z), E, dtype=logits.dtype)
        J[torch.arange(E), torch.arange(E)] = self.world.beta
        J[E + row, torch.arange(E)] = self.world.beta * pi
        return J.T @ self.matrix @ J


def _features(world: World, rows: TokenBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One-hot c and u of every action float[B, T, E + P], its reward float[B, T], its turn int[B, T]."""
    actions = actions_of(rows)
    state = rows.known_states()[:, :-1].gather(1, actions.index).clamp(min=0)
    token = rows.input_ids[:, 1:].gather(1, actions.index)
    E, states = len(world.edges), torch.unique(world.edges[:, 0])
    number = torch.zeros(world.mdp.next_state.shape, dtype=torch.int64).index_put(tuple(world.edges.T), torch.arange(E))
    place = torch.zeros(world.mdp.n_states, dtype=torch.int64).index_put((states,), torch.arange(len(states)))
    hot = torch.eye(E + len(states), dtype=torch.float64)
    real = actions.real[..., None]
    c = torch.where(real, hot[number[state, torch.where(actions.real, token, 0)]], 0.0)
    u = torch.where(real, hot[E + place[state]], 0.0)
    return c, u, actions.of(rows.rewards[:, 1:]), actions.turn


def at_edges(world: World, table: Floats) -> Tensor:
    """A table float[S, V] at the world's edges, float[E]."""
    return torch.from_numpy(table[tuple(world.edges.numpy().T)])


def on_table(world: World, logits: Tensor) -> Floats:
    """The reference's table with these logits at the world's edges."""
    table = np.array(world.mdp.ref_logits)
    table[tuple(world.edges.numpy().T)] = logits.numpy()
    return table


# ------------------------------------------------------------------------------------------------- worlds with loops
def looping(name: str, seed: int) -> tuple[TokenMDP, Floats]:
    """(automaton, behaviour). Ring: 8 states, pi* goes left, the data right (0.9) and stop (0.05). Roundabout: 5 states, two
    ways on, one of which pays 1 and the other costs 1; the data take both about alike and stop with 0.01."""
    if name == "Ring":
        follow = [[(i - 1) % 8, (i + 1) % 8] for i in range(8)]
        pays, chance = [0] * 8, [[0.05, 0.9, 0.05]] * 8
    else:
        follow, pays = [[3, 4], [4, 2], [3, 4], [0, 2], [1, 3]], [0, 1, 0, 1, 0]
        left = [0.653, 0.595, 0.571, 0.433, 0.576]
        chance = [[0.99 * p, 0.99 * (1 - p), 0.01] for p in left]

    def row(i: int) -> Row:
        return Row(next={0: follow[i][0], 1: follow[i][1], 2: END}, reward={pays[i]: 1.0, 1 - pays[i]: -1.0, 2: 0.0})

    mdp = random_reference(from_states(0, row, 4, tokens=["a", "b", "stop", "<bos>"], name=name), seed).with_prompt("<bos>")
    table = np.array(mdp.ref_logits)
    number, queue = {int(mdp.next_state[mdp.start].max()): 0}, [int(mdp.next_state[mdp.start].max())]
    while queue:  # which of the builder's states is which of ours
        s = queue.pop()
        table[s, :3] = np.log(chance[number[s]])
        for a in (0, 1):
            after = int(mdp.next_state[s, a])
            if after not in number:
                number[after] = follow[number[s]][a]
                queue.append(after)
    return mdp, softmax_policy(mdp, table)


def iteration(world: World, behavior: Floats) -> tuple[Floats, Floats]:
    """(K, D): K = (I - gamma P_mu)^-1 (I - gamma P_pi*) float[E, E] over (state, token), and the visits float[E].

    At l* the expected semi-gradient is 2 beta^2 D K (l - l*). For worlds without random replies.
    """
    edges = world.edges.numpy()
    follow = world.mdp.next_state[edges[:, 0], edges[:, 1]]
    speaks = follow >= 0
    for _ in range(world.mdp.n_states):  # through replies, which are certain
        reply = speaks & ~world.mdp.is_policy[follow]
        follow = np.where(reply, world.mdp.next_state[follow, world.mdp.allowed[follow].argmax(1)], follow)
        speaks = follow >= 0
    meets = follow[:, None] == edges[None, :, 0]
    mu, pi = (np.exp(t[edges[:, 0], edges[:, 1]]) for t in (behavior, world.solution.log_policy()))
    unit, g = np.eye(len(edges)), world.gamma
    K = np.linalg.solve(unit - g * meets * mu, unit - g * meets * pi)
    population = Population(world.mdp, behavior, world.beta, g)
    return K, population.arrivals[edges[:, 0]] * mu


def _loop_numbers(name: str, gamma: float, seed: int, updates: int = 200) -> dict[str, Any]:
    """Plain and scaled by visits: least real part over the largest modulus; growth an update, predicted and measured."""
    mdp, behavior = looping(name, seed)
    world = world_of(mdp, BETA, gamma)
    K, D = iteration(world, behavior)
    population = Population(mdp, behavior, BETA, gamma)
    best, edges = at_edges(world, world.solution.optimal_logits()), tuple(world.edges.numpy().T)
    out: dict[str, Any] = {}
    for how, share in (("plain", D), ("scaled", np.ones_like(D))):
        values, vectors = np.linalg.eig(share[:, None] * K)
        step = 1 / np.abs(values).max()
        worst = int(np.abs(1 - step * values).argmax())
        seen = np.linalg.inv(vectors)[worst]  # the coordinate along that vector
        x = best + torch.from_numpy(np.ascontiguousarray(vectors[:, worst].real)) * 1e-9  # small enough to stay linear for long
        begin, done = abs(seen @ (x - best).numpy()), 0
        while done < updates and 1e-12 < float((x - best).abs().max()) < 1e-4:  # neither rounding nor curvature
            rho = population.residual_mean(torch.tensor(on_table(world, x)))[edges]
            x = x - step / BETA * torch.from_numpy(share) * rho
            done += 1
        found = (abs(seen @ (x - best).numpy()) / begin) ** (1 / done)
        out[how] = {"least": values.real.min() * step, "predicted": abs(1 - step * values[worst]), "measured": float(found)}
    return out


# ---------------------------------------------------------------------------------------------------------- measuring
def cases(settings: Settings) -> list[Case]:
    """What is measured, case by case."""
    talk: list[Case] = [{"environment": name, "data": data} for name in WORLDS for data in DATA]
    return talk + [{"environment": name, "gamma": gamma} for name in LOOPS for gamma in settings["gammas"]]


def _world(name: str, seed: int) -> World:
    return world_of(make(name, n_functions=2, n_arguments=2, n_values=3, seed=seed), BETA, GAMMA)


def _behavior(world: World, data: str) -> Floats:
    return uniform_policy(world.mdp) if data == "uniform" else world.solution.log_policy()


def measure(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """A dialogue: bias, where training settles, rates, updates, samples. A loop: stability."""
    if "gamma" in case:
        return _loop_numbers(case["environment"], case["gamma"], seed)
    world = _world(case["environment"], seed)
    behavior = _behavior(world, case["data"])
    rows = rows_of(world, behavior)
    fields = {form: Field.of(world, rows, form) for form in (*FORMS, "value")}
    best = at_edges(world, world.solution.optimal_logits())
    asked = facts.Case(world.mdp, BETA, GAMMA, policy=behavior)
    formulas = facts.bias_formulas(asked)
    out: dict[str, Any] = {"range": float(np.ptp(world.solution.q()[tuple(world.edges.numpy().T)]))}
    out["bias"] = {"ShiQ": [_size(formulas["shiq"]), _size(facts.expected_gradient(asked, "shiq"))],
                   "one-step": [_size(formulas["shifted"]), _size(facts.expected_gradient(asked, "shifted"))]}  # fmt: skip
    apart = at_edges(world, formulas["shiq"]) - fields["ShiQ"](best)
    out["bias gap"] = _size(apart.numpy())
    out["stationary"] = {form: _size(fields[form](best).numpy()) for form in (*FORMS, "value")}
    out["settled"] = {}
    for form, method in FORMS.items():
        trained = train(world.mdp, method, beta=BETA, gamma=GAMMA, behavior=behavior)
        out["settled"][form] = {"q_error": trained.metrics.q_error, "kl": trained.metrics.kl}
        if form == "ShiQ":
            out["minimum"] = _minimum(Population(world.mdp, behavior, BETA, GAMMA), world, trained.logits)
    value = fields["value"]
    rank = int(np.linalg.matrix_rank(value.jacobian(best).numpy(), tol=1e-9 * float(value.matrix.abs().max()) * BETA**2))
    out["value"] = {"rank": rank, "states": len(torch.unique(world.edges[:, 0])), "edges": len(best)}
    out["rates"] = {form: _rate(fields[form], best) for form in ("semi-gradient", "turn-cut")}
    out["diagonal"] = _diagonal(fields["semi-gradient"], best)
    out["sweeps"] = _sweeps(fields["semi-gradient"], world, best)
    if case["data"] == "uniform":
        out["adam"] = {form: _adam(fields[form], world, best, settings) for form in FORMS}
        out["samples"] = [_sampled(world, behavior, n, seed) for n in settings["samples"]]
    return out


def _minimum(population: Population, world: World, settled: Floats) -> dict[str, float]:
    """ShiQ's loss at l* and where training settles, and its curvature at l* towards there, by differences."""
    best = torch.tensor(world.solution.optimal_logits())
    way = torch.where(torch.isfinite(best), torch.tensor(settled) - best, 0.0)
    way = torch.where(torch.isfinite(way), way, 0.0)
    at = lambda t: float(population.loss(best + t * way))  # noqa: E731
    step = 1e-3
    return {"at l*": at(0.0), "settled": at(1.0), "curvature": (at(step) + at(-step) - 2 * at(0.0)) / step**2}


def _size(x: Any) -> float:
    return float(np.abs(np.asarray(x)).max())


def _rate(field: Field, best: Tensor, updates: int = 60) -> dict[str, float]:
    """Plain descent at the step 1 / max |eigenvalue|: 1 - contraction by the Jacobian, and seen along its slowest direction."""
    values, vectors = np.linalg.eig(field.jacobian(best).numpy())
    step = 1 / np.abs(values).max()
    slow = int(np.abs(1 - step * values).argmax())
    start = torch.from_numpy(np.ascontiguousarray(vectors[:, slow].real)) * 1e-6
    x = best + start
    for _ in range(updates):
        x = x - step * field(x)
    seen = np.linalg.inv(vectors)[slow]
    found = abs(seen @ (x - best).numpy()) / abs(seen @ start.numpy())
    predicted = 1 - abs(1 - step * values[slow])
    return {
        "predicted": float(predicted),
        "measured": float(1 - found ** (1 / updates)),
        "least": float(values.real.min() * step),
    }


def _diagonal(field: Field, best: Tensor) -> float:
    """How far the semi-gradient's eigenvalues are from 2 beta^2 times the visits, relative to the largest."""
    values = np.sort(np.linalg.eigvals(field.jacobian(best).numpy()).real)
    wanted = np.sort(2 * BETA**2 * field.visits.numpy())
    return _size(values - wanted) / float(wanted[-1])


def _sweeps(field: Field, world: World, best: Tensor) -> int | None:
    """Updates scaled by visits, l -= field / (2 beta^2 visits), from l_ref until l* is reached to 1e-9."""
    x = at_edges(world, world.mdp.ref_logits)
    for done in range(20):
        if float((x - best).abs().max()) <= 1e-9:
            return done
        x = x - field(x) / (2 * BETA**2 * field.visits)
    return None


def _adam(field: Field, world: World, best: Tensor, settings: Settings) -> dict[str, Any]:
    """Adam from l_ref, the same step for every form: updates to a max Q error of 1e-3, and the error at the end."""
    x = at_edges(world, world.mdp.ref_logits).clone().requires_grad_()
    stepper = torch.optim.Adam([x], lr=settings["adam"])
    reached, error = None, np.inf
    for done in range(settings["updates"] + 1):
        error = BETA * float((x.detach() - best).abs().max())
        if error <= 1e-3 and reached is None:
            reached = done
        x.grad = field(x.detach())
        stepper.step()
    return {"updates": reached, "q_error": error}


def _sampled(world: World, behavior: Floats, n: int, seed: int) -> dict[str, float]:
    """KL(pi* || pi) of each form where it settles on n sampled rows; tokens never tried keep their reference logit."""
    rows = rows_of(world, behavior, n, seed=seed)
    out = {"ShiQ": train_on_rows(world.mdp, "shiq", rows, beta=BETA, gamma=GAMMA).metrics.kl}
    for form in ("semi-gradient", "turn-cut"):
        x = _settle(Field.of(world, rows, form), at_edges(world, world.mdp.ref_logits))
        out[form] = compare(world.solution, on_table(world, x), METHODS["shiq"]).kl
    return out


def _settle(field: Field, x: Tensor, most: int = 60) -> Tensor:
    """A zero of the field over the tokens that its rows take, by Newton steps with the Jacobian that leaves out curvature."""
    tried = field.visits > 0
    for _ in range(most):
        matrix = field.jacobian(x)[tried][:, tried]
        move = torch.linalg.lstsq(matrix, field(x)[tried][:, None], driver="gelsd", rcond=1e-12).solution[:, 0]
        x = x.clone()
        x[tried] -= move * min(1.0, 4.0 / float(move.abs().max().clamp(min=1e-300)))
        if float(move.abs().max()) <= 1e-10:
            break
    return x


def summarise(settings: Settings, records: list[Record]) -> dict[str, Any]:
    """A line a dialogue and data; curves over the number of rows and over gamma; the worst gaps of predicted and measured."""
    out: dict[str, Any] = {"lines": {}, "loops": {}, "worst": {}}
    talk = [r for r in records if "data" in r.case]
    for name in WORLDS:
        for data in DATA:
            mine = [r.numbers for r in talk if (r.case["environment"], r.case["data"]) == (name, data)]
            line: dict[str, Any] = {"bias": {k: vars(interval([n["bias"][k][1] for n in mine])) for k in ("ShiQ", "one-step")}}
            for what in ("q_error", "kl"):
                line[what] = {form: vars(interval([n["settled"][form][what] for n in mine])) for form in FORMS}
            line["1 - contraction"] = {
                form: vars(interval([n["rates"][form]["predicted"] for n in mine])) for form in mine[0]["rates"]
            }
            line["least"] = min(x["least"] for n in mine for x in n["rates"].values())
            line["minimum"] = [n["minimum"] for n in mine]
            line["sweeps"] = [n["sweeps"] for n in mine]
            line["value"] = [n["value"] for n in mine]
            line["stationary"] = {form: max(n["stationary"][form] for n in mine) for form in mine[0]["stationary"]}
            if "adam" in mine[0]:
                line["adam"] = {form: [n["adam"][form]["updates"] for n in mine] for form in FORMS}
                line["samples"] = {form: vars(interval([[s[form] for s in n["samples"]] for n in mine])) for form in FORMS}
            out["lines"][f"{name}, {data}"] = line
    rates = [x for r in talk for x in r.numbers["rates"].values() if x["predicted"] >= 1e-6]  # below, rounding decides
    out["worst"]["bias"] = max(abs(a - b) for r in talk for a, b in r.numbers["bias"].values())
    out["worst"]["rate"] = max(abs(x["measured"] / x["predicted"] - 1) for x in rates)
    out["worst"]["diagonal"] = max(r.numbers["diagonal"] for r in talk)
    loops = [r for r in records if "gamma" in r.case]
    for name in LOOPS:
        for how in ("plain", "scaled"):
            many = [
                [list(r.numbers[how].values()) for r in loops if (r.case["environment"], r.case["gamma"]) == (name, gamma)]
                for gamma in settings["gammas"]
            ]
            array = np.array(many)  # (gammas, seeds, 3)
            out["loops"][f"{name}, {how}"] = {
                key: vars(interval(array[..., i].T)) for i, key in enumerate(("least", "predicted", "measured"))
            }
    growing = [r.numbers[how] for r in loops for how in ("plain", "scaled") if r.numbers[how]["predicted"] > 1]
    out["worst"]["growth"] = max((abs(np.log(x["measured"]) / np.log(x["predicted"]) - 1) for x in growing), default=None)
    return out


def claims(settings: Settings, summary: dict[str, Any]) -> list[Claim]:
    """What the figure shows, each with its numbers."""
    lines, worst = summary["lines"], summary["worst"]
    off, own = lines["RandomTool, uniform"], lines["RandomTool, pi*"]
    sure = [lines[f"ToolCall, {data}"] for data in DATA]
    lower = [x for x in own["minimum"] if x["settled"] < x["at l*"] * (1 - 1e-6) and x["curvature"] < 0]
    repaired = [line["q_error"][form]["high"] for line in lines.values() for form in ("semi-gradient", "turn-cut")]
    return [
        Claim(
            "Random tools bias ShiQ off-policy, by exactly what F9 predicts; not on pi*'s own data, and certain tools never.",
            f"largest gradient at l*, RandomTool: uniform {said(off['bias']['ShiQ'])}, own data "
            f"{own['stationary']['ShiQ']:.1e}; predicted within {worst['bias']:.1e}",
            off["bias"]["ShiQ"]["low"] > 1e-3 and own["stationary"]["ShiQ"] <= 1e-13 and worst["bias"] <= 1e-13
            and all(x["stationary"]["ShiQ"] <= 1e-13 for x in sure),
        ),
        Claim(
            "So ShiQ settles elsewhere; both repairs reach q* from l_ref, on uniform data and on pi*'s own.",
            f"max Q error, RandomTool, uniform: ShiQ {said(off['q_error']['ShiQ'])}; repairs anywhere {max(repaired):.1e}",
            off["q_error"]["ShiQ"]["low"] > 0.05
            and max(repaired) <= 1e-8
            and all(x["q_error"]["ShiQ"]["high"] <= 1e-8 for x in sure),
        ),
        Claim(
            "Stationary is not minimal: on pi*'s own data, where ShiQ's gradient is 0 at l*, l* can be a saddle, and training "
            "from l_ref then ends elsewhere, at a lower loss.",
            f"lower by more than 1e-6 of it, and curved downwards at l* towards there, in {len(lower)} of "
            f"{len(own['minimum'])} seeds; max Q error where it settles {said(own['q_error']['ShiQ'])}",
            len(lower) > 0,
        ),
        Claim(
            "Without loops the semi-gradient's matrix has the eigenvalues 2 beta^2 visits, and both repairs contract as "
            "predicted; scaled by visits the semi-gradient is exact after a sweep a token.",
            f"eigenvalues within {worst['diagonal']:.1e}, 1 - contraction within {worst['rate']:.1e}; sweeps at most "
            f"{max(max(x['sweeps']) for x in lines.values())}; least real part {min(x['least'] for x in lines.values()):.1e}",
            worst["diagonal"] <= 1e-10 and worst["rate"] <= 1e-2 and all(x["least"] > 0 for x in lines.values())
            and all(s is not None and s <= 4 for x in lines.values() for s in x["sweeps"]),
        ),
        *_more(settings, summary),
    ]  # fmt: skip


def _more(settings: Settings, summary: dict[str, Any]) -> list[Claim]:
    loops, off = summary["loops"], summary["lines"]["RandomTool, uniform"]
    bad_ring, bad_round = loops["Ring, scaled"], loops["Roundabout, plain"]
    value = [v for line in summary["lines"].values() for v in line["value"]]
    end = {form: {key: off["samples"][form][key][-1] for key in ("value", "low", "high")} for form in FORMS}
    return [
        Claim(
            "With loops and gamma near 1 the semi-gradient can diverge at every step size: plain on Roundabout, scaled by "
            "visits on Ring; at the smallest gamma both contract.",
            f"growth an update at gamma {settings['gammas'][-1]}: Ring {bad_ring['predicted']['value'][-1]:.3f}, Roundabout "
            f"{bad_round['predicted']['value'][-1]:.3f}; measured within {summary['worst']['growth']:.1e} in ln",
            all(
                x["least"]["high"][-1] < 0 and x["measured"]["low"][-1] > 1 and x["measured"]["high"][0] < 1
                for x in (bad_ring, bad_round)
            )
            and summary["worst"]["growth"] <= 0.05,
        ),
        Claim(
            "Through the value the semi-gradient fixes one number a state.",
            f"rank {value[0]['rank']} of {value[0]['edges']}, {value[0]['states']} states",
            all(v["rank"] == v["states"] < v["edges"] for v in value),
        ),
        Claim(
            f"More rows help the repairs, not ShiQ: KL(pi* || pi) at {settings['samples'][-1]} uniform rows of RandomTool.",
            "; ".join(f"{form} {said(x)}" for form, x in end.items()),
            end["ShiQ"]["low"] > 3 * max(end[form]["high"] for form in ("semi-gradient", "turn-cut"))
            and all(off["samples"][f]["high"][-1] < off["samples"][f]["low"][0] for f in ("semi-gradient", "turn-cut")),
        ),
    ]


@style()
def draw(result: Result) -> "Figure":
    """Where training settles; KL over sampled rows; growth an update on loops over gamma."""
    page = figure(figsize=(9.6, 3.6))
    left, middle, right = page.subplots(1, 3)
    summary, settings = result.summary, result.settings
    names = list(summary["lines"])
    for i, (form, method) in enumerate(FORMS.items()):
        look: dict[str, Any] = {"color": COLORS[method], "marker": MARKERS[method], "label": form}
        y = [max(summary["lines"][name]["q_error"][form]["value"], 1e-17) for name in names]
        left.plot(np.arange(len(names)) + 0.16 * (i - 1), y, ls="", ms=7, **look)
        curve = summary["lines"]["RandomTool, uniform"]["samples"][form]
        middle.plot(settings["samples"], curve["value"], ls=("-", "-", ":")[i], **{**look, "label": None})
        middle.fill_between(settings["samples"], curve["low"], curve["high"], color=look["color"], alpha=0.15, lw=0)
    left.set(yscale="log", ylabel="max |q̂ − q*| where training settles", ylim=(1e-17, 10), title="Exact training")
    left.set_xticks(
        range(len(names)),
        [name.replace(", ", "\n").replace("RandomTool", "Random-\nTool").replace("ToolCall", "Tool-\nCall") for name in names],
    )
    middle.set(xscale="log", yscale="log", xlabel="uniform rows", ylabel="KL(π* ‖ π), nats", title="RandomTool, sampled")
    for (key, name), color, marker in zip(
        (("Ring, scaled", "Ring, scaled by visits"), ("Roundabout, plain", "Roundabout, plain")),
        ("pink", "green"),
        "Dv",
        strict=True,
    ):
        x, curve = [1 - g for g in settings["gammas"]], summary["loops"][key]
        right.plot(x, curve["predicted"]["value"], color=PALETTE[color], label=f"{name}: predicted")
        right.plot(x, curve["measured"]["value"], color=PALETTE[color], marker=marker, ls="", mfc="white", label="measured")
    right.axhline(1, color=GREY, lw=0.8)
    right.text(1 - settings["gammas"][-1], 0.98, "above 1: diverges", color=GREY, fontsize=8, ha="right", va="top")
    right.set(xscale="log", xlabel="1 − γ", ylabel="growth of the error an update", title="Semi-gradient with loops")
    right.invert_xaxis()
    right.set_ylim(0.82, 2.45)  # room for the legend
    right.legend(fontsize=7.5, loc="upper left")
    for axes in (left, middle, right):
        axes.grid(axis="y")
    page.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return page


MULTI_TURN = Study(
    name="multi-turn",
    title="Random tools: the bias of ShiQ and its two repairs",
    question="What do random replies do to ShiQ, and do semi-gradient and turn-cut ShiQ converge, and how fast?",
    settings={
        "seeds": 10,
        "gammas": [0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99],
        "samples": [300, 1000, 3000, 10_000, 30_000],
        "adam": 0.03,
        "updates": 1500,
    },
    fast={"seeds": 2, "gammas": [0.5, 0.9, 0.99], "samples": [300, 10_000], "updates": 900},
    cases=cases,
    measure=measure,
    summarise=summarise,
    claims=claims,
    draw=draw,
)


# ------------------------------------------------------------------------------------------------------ a tiny transformer
SUBJECTS = {"ShiQ": "ShiQ", "semi-gradient": "semi-gradient, through the token", "turn-cut": "turn-cut"}


def tiny_cases(settings: Settings) -> list[Case]:
    """What is measured on the network, case by case."""
    return [{"loss": form} for form in FORMS]


def tiny_measure(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """Max Q error over the range of q*, and KL(pi* || pi), over all prefixes along the run."""
    mdp = make("RandomTool", n_functions=2, n_arguments=2, n_values=2, seed=seed)
    start = pretrain(mdp, beta=BETA, gamma=GAMMA, seed=seed, width=settings["width"])
    tree = start.world.mdp
    uniform = uniform_policy(tree)
    marks = [round(settings["steps"] * i / 10) for i in range(11)]
    trace, _ = train_tiny(
        start, SUBJECTS[case["loss"]], rows_of(start.world, uniform), uniform, steps=settings["steps"], record_at=marks
    )
    size = float(np.ptp(start.world.solution.q()[tree.allowed & tree.is_policy[:, None]]))
    return {
        "at": trace.at, "q_error": [m.q_error / size for m in trace.metrics], "kl": [m.kl for m in trace.metrics],
        "prefixes": int((tree.is_policy & tree.reachable).sum()),
    }  # fmt: skip


def tiny_summarise(settings: Settings, records: list[Record]) -> dict[str, Any]:
    """The same for the network."""
    out: dict[str, Any] = {"at": records[0].numbers["at"], "prefixes": records[0].numbers["prefixes"]}
    for form in FORMS:
        mine = [r.numbers for r in records if r.case["loss"] == form]
        out[form] = {key: vars(interval([n[key] for n in mine])) for key in ("q_error", "kl")}
    return out


def tiny_claims(settings: Settings, summary: dict[str, Any]) -> list[Claim]:
    """What the figure of the network shows."""
    end = {form: {key: summary[form]["q_error"][key][-1] for key in ("value", "low", "high")} for form in FORMS}
    kl = {form: {key: summary[form]["kl"][key][-1] for key in ("value", "low", "high")} for form in FORMS}
    curves = {form: summary[form]["q_error"]["value"] for form in FORMS}
    late = {form: curve[-1] / curve[len(curve) // 2] for form, curve in curves.items()}
    repairs = ("semi-gradient", "turn-cut")
    return [
        Claim(
            "A network trained by ShiQ on uniform rows of a random tool misses q*; by either repair it comes near, everywhere.",
            "max Q error over the range of q*: " + "; ".join(f"{form} {said(x)}" for form, x in end.items()),
            all(end[form]["high"] <= settings["near"] for form in repairs) and end["ShiQ"]["low"] > 2 * settings["near"],
        ),
        Claim(
            "And so it does by policy: the repairs' KL(pi* || pi) is below ShiQ's by more than a factor 5.",
            "; ".join(f"{form} {said(x)}" for form, x in kl.items()),
            all(5 * kl[form]["high"] < kl["ShiQ"]["low"] for form in repairs),
        ),
        Claim(
            "ShiQ's is not want of updates: over their second half its error stays, theirs falls by a fifth or more.",
            "error at the end over that in the middle: " + "; ".join(f"{form} {x:.2f}" for form, x in late.items()),
            late["ShiQ"] > 0.9 and all(late[form] < 0.8 for form in repairs),
        ),
    ]


@style()
def tiny_draw(result: Result) -> "Figure":
    """Max Q error and KL along training."""
    page = figure(figsize=(7.2, 3.4))
    panels = page.subplots(1, 2)
    labels = {"q_error": "max |q̂ − q*| / range of q*", "kl": "KL(π* ‖ π), nats"}
    for axes, (what, label) in zip(panels, labels.items(), strict=True):
        for form, method in FORMS.items():
            curve = result.summary[form][what]
            axes.plot(result.summary["at"], curve["value"], color=COLORS[method], marker=MARKERS[method], label=form)
            axes.fill_between(result.summary["at"], curve["low"], curve["high"], color=COLORS[method], alpha=0.15, lw=0)
        axes.set(yscale="log", xlabel="updates", ylabel=label)
        axes.grid(axis="y")
    panels[0].set_title(f"A network on RandomTool, {result.summary['prefixes']} prefixes")
    page.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return page


MULTI_TURN_TINY = Study(
    name="multi-turn-tiny",
    title="Random tools and a tiny transformer",
    question="Do the repairs of ShiQ for random tools bring a network to q* where ShiQ does not?",
    settings={"seeds": 10, "steps": 500, "width": 32, "near": 0.05},
    fast={"seeds": 1, "steps": 250},
    cases=tiny_cases,
    measure=tiny_measure,
    summarise=tiny_summarise,
    claims=tiny_claims,
    draw=tiny_draw,
)
