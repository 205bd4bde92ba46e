"""Training any model by any loss: gradient steps on the table of logits that the model gives, whoever the model is.

A table's parameter is itself; a network's table is its logits at every prefix (models/prefixes.py). Losses come by name from
objectives.py, rows with their chances or their counts, and every so often the table is measured against the exact solution.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch, unique
from shiq_lab.errors import at_least, bad, check_beta, check_gamma, is_real, is_whole
from shiq_lab.graph import Floats
from shiq_lab.mdp import TokenMDP
from shiq_lab.objectives import Point, Subject, World, lookup, spoken
from shiq_lab.policies import check_log_policy
from shiq_lab.progress import progress
from shiq_lab.sampling import sample
from shiq_lab.training import Metrics, measure, stationary

Optimizer = Literal["adam", "sgd"]
Schedule = Literal["cosine", "constant"]


def world_of(mdp: TokenMDP, beta: float, gamma: float = 1.0) -> World:
    """An automaton (unrolled, where it has a horizon) as what losses are asked about."""
    return World(mdp.name, "", check_gamma(gamma), stationary(mdp), check_beta(beta))


def rows_of(world: World, behavior: Floats, n: int | None = None, *, seed: int = 0) -> TokenBatch:
    """Rows of a behaviour float[S, V]: all of them with their exact chances, or n sampled ones, equal rows counted together.

    Weights sum to 1. Sampled rows are what a data set would hold; the listing is its limit for n to infinity.
    """
    _check_world(world)
    table = check_log_policy(world.mdp, behavior, "behavior")
    if n is None:
        chance = torch.exp(spoken(world.mdp, world.rows, torch.tensor(table), policy=True))
        rows = replace(world.rows, weights=chance * world.rows.weights)
        return rows.select(rows.weights > 0)
    rows = unique(sample(world.mdp, table, at_least("n", n, 1), rng=seed))
    return replace(rows, weights=rows.weights / rows.weights.sum())


@dataclass(frozen=True, eq=False)
class Trace:
    """What a run came by: after `at[i]` updates the loss was loss[i] and the table stood metrics[i] from the truth."""

    at: list[int]
    loss: list[float]
    metrics: list[Metrics]
    logits: Floats

    def updates_to(self, goal: float, of: str = "q_error") -> int | None:
        """The first recorded number of updates from which on the metric stays at most `goal`; None where it never does."""
        over = [i for i, m in enumerate(self.metrics) if not getattr(m, of) <= goal]
        first = over[-1] + 1 if over else 0
        return self.at[first] if first < len(self.at) else None


class Table(torch.nn.Module):
    """A table of logits as a model of itself: one parameter float[S, V]; forbidden tokens are -inf when it is called."""

    def __init__(self, mdp: TokenMDP, logits: Floats | None = None) -> None:
        super().__init__()
        allowed = torch.tensor(np.array(mdp.allowed))
        self.register_buffer("allowed", allowed)
        start = torch.tensor(np.array(mdp.ref_logits if logits is None else logits))
        self.logits = torch.nn.Parameter(torch.where(allowed, start, 0.0))
        self.allowed: Tensor

    def forward(self) -> Tensor:
        return torch.where(self.allowed, self.logits, -torch.inf)


def descend(
    loss: str | Subject,
    world: World,
    rows: TokenBatch | None,
    behavior: Floats | None = None,
    *,
    model: Callable[[], Tensor] | None = None,
    parameters: Iterable[torch.nn.Parameter] | None = None,
    steps: int,
    learning_rate: float,
    optimizer: Optimizer = "adam",
    schedule: Schedule = "constant",
    record_at: Sequence[int] | None = None,
    goal: float = 0.0,
    value_rate: float | None = None,
) -> Trace:
    """Train a model by a loss on fixed rows, or on its own rows (rows=None: the exact listing, weighted by the current policy).

    model() gives the table float[S, V] from `parameters`; default: a Table at the reference. behavior float[S, V] is what the
    rows were drawn with, for losses that ask. A loss with values of its own learns them along, from 0, at value_rate (default:
    learning_rate). record_at: after how many updates to measure, default about 20 times over the run; stops early where
    max Q error <= goal (at a recorded one).
    """
    subject = loss if isinstance(loss, Subject) else lookup(loss)
    if subject.twos:
        raise bad(
            "loss", "one of single rows or of all pairs", repr(subject.name), "Groups of two are for the fixed-point table."
        )
    if not is_real(learning_rate) or not 0 < learning_rate < np.inf:
        raise bad("learning_rate", "a finite number > 0", repr(learning_rate))
    steps = at_least("steps", steps, 1)
    _check_world(world)
    _check_rows(world, rows)
    if record_at is not None and not all(is_whole(mark) and 0 <= mark <= steps for mark in record_at):
        raise bad("record_at", f"whole numbers from 0 to {steps}", repr(record_at))
    if model is None:
        model = own_table = Table(world.mdp)
        parameters = own_table.parameters()
    if parameters is None:
        raise bad("parameters", "the model's parameters", "None")
    marks = sorted({0, steps, *(_marks(steps) if record_at is None else record_at)})
    values = torch.zeros(world.mdp.n_states, dtype=torch.float64, requires_grad=subject.values is not None)
    learned: list[dict[str, Any]] = [{"params": [*parameters]}]
    if subject.values:
        learned.append({"params": [values], "lr": learning_rate if value_rate is None else value_rate})
    step_size, stepper = _stepper(optimizer, learned, learning_rate, schedule, steps)
    point = _point(world, world.rows if rows is None else rows, behavior)
    at: list[int] = []
    losses: list[float] = []
    metrics: list[Metrics] = []
    for done in progress(range(steps + 1), f"{subject.name} on {world.name or 'a table'}"):
        table = model()
        here = _on_policy(point, table, values) if rows is None else point.at(table, values)
        value = subject.loss(here)
        if done in marks:
            at.append(done)
            losses.append(float(value.detach()))
            metrics.append(measure(world.solution, table.detach().double().numpy(), subject.readout))
            if metrics[-1].q_error <= goal or done == steps:
                break
        stepper.zero_grad(set_to_none=True)
        value.backward()
        stepper.step()
        step_size.step()
    return Trace(at, losses, metrics, table.detach().double().numpy())


def _check_world(world: object) -> None:
    if not isinstance(world, World):
        raise bad("world", "a World", repr(world)[:80], "learning.world_of(mdp, beta, gamma) makes one.")


def _check_rows(world: World, rows: object) -> None:
    """Rows must know their states, and these must be the world's own."""
    if rows is None:
        return
    if not isinstance(rows, TokenBatch):
        raise bad("rows", "a TokenBatch, or None for the policy's own", type(rows).__name__, "learning.rows_of makes one.")
    acted = rows.completion_mask[:, 1:] == 1
    state, token = rows.known_states()[:, :-1][acted].numpy(), rows.input_ids[:, 1:][acted].numpy()
    mdp = world.mdp
    inside = (state >= 0) & (state < mdp.n_states) & (token >= 0) & (token < mdp.n_tokens)
    if not inside.all() or not (mdp.allowed & mdp.is_policy[:, None])[state, token].all():
        raise bad("rows", "rows of this world", "rows of another automaton", "Draw them with rows_of(world, behavior).")


def _marks(steps: int) -> list[int]:
    return [round(steps * i / 20) for i in range(21)]


def _stepper(name: str, learned: list[Any], rate: float, schedule: str, steps: int) -> tuple[Any, Any]:
    """The optimiser and its schedule, by name; both warm up over the first 2 % of the steps if the schedule is "cosine"."""
    makers = {
        "adam": lambda: torch.optim.Adam(learned, lr=rate, betas=(0.9, 0.99)),
        "sgd": lambda: torch.optim.SGD(learned, lr=rate),
    }
    shapes: dict[str, Callable[[int], float]] = {
        "constant": lambda done: 1.0,
        "cosine": lambda done: min(1.0, (done + 1) / (0.02 * steps + 1)) * 0.5 * (1 + np.cos(np.pi * min(done / steps, 1.0))),
    }
    for argument, given, known in (("optimizer", name, makers), ("schedule", schedule, shapes)):
        if given not in known:
            raise bad(argument, f"one of {', '.join(known)}", repr(given))
    stepper = makers[name]()
    return torch.optim.lr_scheduler.LambdaLR(stepper, shapes[schedule]), stepper


def _point(world: World, rows: TokenBatch, behavior: Floats | None) -> Point:
    table = world.mdp.ref_log_policy if behavior is None else check_log_policy(world.mdp, behavior, "behavior")
    ref = torch.tensor(np.array(world.mdp.ref_logits))
    nothing = torch.zeros(world.mdp.n_states, dtype=torch.float64)
    point = Point(world, rows, ref, nothing, torch.tensor(np.array(table)), torch.zeros(len(rows), dtype=torch.int64))
    _ = point.ref, point.first_state, point.v_star, point.behavior_logprobs  # once; Point.at keeps them
    return point


def _on_policy(point: Point, table: Tensor, values: Tensor) -> Point:
    """The full listing weighted by the policy's own chances, without gradient: data drawn from the model as it stands."""
    world = point.world
    with torch.no_grad():
        environment = torch.tensor(~np.array(world.mdp.is_policy))[:, None]
        own = torch.where(environment, torch.tensor(world.mdp.ref_log_policy), table.double().log_softmax(1))
        chance = torch.exp(spoken(world.mdp, world.rows, own, policy=True))
    return point.at(table, values, weights=chance * world.rows.weights, behavior=own)
