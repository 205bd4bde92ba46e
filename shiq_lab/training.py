"""Training a table: exactly, on the population loss, or on sampled rows; and measuring it against the truth."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch, unique
from shiq_lab.bellman import Solution, evaluate, solve
from shiq_lab.errors import at_least, bad, is_real
from shiq_lab.graph import Floats
from shiq_lab.losses import methods, shiq
from shiq_lab.losses.methods import Method
from shiq_lab.losses.steps import naive
from shiq_lab.mdp import TokenMDP, check_mdp, real_array
from shiq_lab.policies import covering, softmax_policy
from shiq_lab.population import Population
from shiq_lab.progress import progress
from shiq_lab.stats import TokenStats


# -------------------------------------------------------------------------------------------------------- measuring
@dataclass(frozen=True)
class Metrics:
    """How far a table is from the truth, over reachable policy states and allowed tokens.

    q_error    max |q_hat - q*|, q_hat read out as the method's logits mean
    v_error    max |u - v*|, u the method's state value (Dv for the shifted losses)
    kl         KL(pi* || pi) along an episode of pi*, in nats, discounted
    objective  J(pi); optimum: J(pi*); gap: (J* - J) / (J* - J(pi_ref)), 1 at the reference, 0 at the optimum
    """

    q_error: float
    v_error: float
    kl: float
    objective: float
    optimum: float
    gap: float


def policy_of(mdp: TokenMDP, logits: Floats, method: Method) -> Floats:
    """ln pi that a table stands for: softmax(l), but softmax(l + l_ref) for the naive step."""
    shift = np.where(mdp.allowed, mdp.ref_logits, 0.0) if method.step is naive else 0.0
    return softmax_policy(mdp, logits + shift)


def episode_kl(solution: Solution, log_policy: Floats) -> float:
    """KL(pi* || pi) along an episode; each term p (e^d - 1 - d) >= 0, so nothing cancels near 0."""
    mdp, best = solution.mdp, solution.log_policy()
    occupancy = evaluate(mdp, best, beta=solution.beta, gamma=solution.gamma).occupancy
    use = mdp.allowed & mdp.is_policy[:, None] & (occupancy > 0)
    delta = np.where(use, np.where(use, log_policy, 0.0) - np.where(use, best, 0.0), 0.0)
    return float((np.where(use, occupancy, 0.0) * (np.expm1(delta) - delta)).sum())


def measure(solution: Solution, logits: Floats, method: Method) -> Metrics:
    """Compare a table float[S, V] with the exact solution of the same (unrolled) automaton."""
    mdp, beta, gamma = solution.mdp, solution.beta, solution.gamma
    population = Population(mdp, mdp.ref_log_policy, beta, gamma)
    q_hat, v_hat = (x.numpy() for x in population.pieces(torch.tensor(logits), method.step))
    rows = mdp.reachable & mdp.is_policy
    edges = mdp.allowed & rows[:, None]
    policy = policy_of(mdp, logits, method)
    objective = evaluate(mdp, policy, beta=beta, gamma=gamma).objective
    at_reference = evaluate(mdp, mdp.ref_log_policy, beta=beta, gamma=gamma).objective
    room = solution.objective - at_reference
    return Metrics(
        q_error=float(np.abs(q_hat - solution.q())[edges].max()),
        v_error=float(np.abs(v_hat - solution.v())[rows].max()),
        kl=episode_kl(solution, policy),
        objective=objective,
        optimum=solution.objective,
        gap=(solution.objective - objective) / room if room > 0 else 0.0,
    )


# --------------------------------------------------------------------------------------------------- exact training
@dataclass(frozen=True)
class Training:
    """A trained table and how it came about; loss and q_error hold the value after each step that was recorded.

    untried counts the reachable (policy state, allowed token) pairs that the rows never act with: F8 promises nothing then.
    """

    logits: Floats
    metrics: Metrics
    loss: list[float]
    steps: int
    optimizer: str
    recorded_at: list[int] = field(default_factory=list)
    q_error: list[float] = field(default_factory=list)
    untried: int = 0

    def to_json(self) -> dict[str, object]:
        """Everything but the table."""
        out: dict[str, object] = asdict(self)
        del out["logits"]
        return out


def stationary(mdp: TokenMDP) -> TokenMDP:
    """The automaton a table can be trained on: itself, or unrolled where it has a horizon."""
    check_mdp(mdp)
    return mdp if mdp.horizon is None else mdp.unroll()


def train(
    mdp: TokenMDP,
    loss: str | Method = "shiq",
    *,
    beta: float,
    gamma: float = 1.0,
    behavior: Floats | None = None,
    start: Floats | None = None,
    max_steps: int = 200,
) -> Training:
    """Train a table on the exact population loss, from l_ref, to the last digit of float64.

    Losses that are squares: Gauss-Newton, each step by conjugate gradients on the loss's own Jacobian products, scaled by
    how often the behaviour comes by. "semi": the scaled expected semi-gradient. "turns": Gauss-Newton against targets
    frozen in between. behavior: float[S, V] log-probabilities of the (unrolled) automaton, default `policies.covering`.
    """
    method = loss if isinstance(loss, Method) else methods.lookup(loss)
    max_steps = at_least("max_steps", max_steps, 0)
    mdp = stationary(mdp)
    begin = real_array("start", mdp.ref_logits if start is None else start, mdp.next_state.shape)
    if not np.isfinite(begin[mdp.allowed]).all():
        raise bad("start", "finite logits of allowed tokens", "NaN or an infinity", "Forbid tokens in mdp.ref_logits.")
    solution = solve(mdp, beta=beta, gamma=gamma)
    population = Population(mdp, covering(mdp) if behavior is None else behavior, beta, gamma)
    logits = torch.tensor(np.where(mdp.allowed, begin, 0.0))
    follow = {"semi": _semi_gradient, "turns": _turns}.get(method.form, _squares)
    logits, losses, optimizer = follow(population, method, logits, max_steps)
    table = np.where(mdp.allowed, logits.numpy(), -np.inf)
    return Training(table, measure(solution, table, method), losses, len(losses), optimizer)


# A residual is a difference of numbers of size beta max|l|; a few roundings of these are its zero.
ROUNDING = 4 * float(np.finfo(np.float64).eps)
Squares = Callable[[Tensor], list[tuple[Tensor, Tensor]]]


def _squares(population: Population, method: Method, logits: Tensor, max_steps: int) -> tuple[Tensor, list[float], str]:
    first = method.form == "first"
    squares = lambda x: population.squares(x, method.step, method.n_steps, first, None)  # noqa: E731
    logits, losses = gauss_newton(squares, logits, scaling(population, method), _size(population, logits), max_steps)
    return logits, losses, "Gauss-Newton, conjugate gradients"


def scaling(population: Population, method: Method) -> Tensor:
    """Diagonal preconditioner float[S, V]: one over how much weight the behaviour puts on an entry, 0 where none.

    Even over the tokens of a state for the sequence loss, whose gradient then conserves each inner row's sum (F5).
    """
    first = method.form == "first"
    weight = population.spread(first) if method.n_steps is None else population.starts(first)
    use = population.mdp.is_policy[:, None] & (population.chance > 0) & (weight > 0)[:, None]
    share = weight[:, None] * (1.0 if first else population.chance)
    return torch.tensor(np.where(use, 1 / np.where(use, share, 1.0), 0.0))


def gauss_newton(squares: Squares, x: Tensor, scale: Tensor, size: float, max_steps: int) -> tuple[Tensor, list[float]]:
    """Minimise sum w F(x)^2: damped Gauss-Newton whose steps come from conjugate gradients in the given scaling.

    Only products with the Jacobian and its transpose are used (the first by differentiating the second). Stops at the
    rounding of residuals made of numbers of this `size`, or where the loss no longer falls.
    """
    history: list[float] = []
    value, tight = float("inf"), 1e-2
    for _ in progress(range(max_steps), "training"):
        x = x.detach().requires_grad_()
        parts = squares(x)
        value = sum(float((w * f.detach() ** 2).sum()) for w, f in parts)
        history.append(value)
        if value <= sum(float((w * (ROUNDING * size) ** 2 * torch.ones_like(f)).sum()) for w, f in parts):
            break
        roots = torch.cat([(w.sqrt() * f).reshape(-1) for w, f in parts])
        dummy = torch.zeros_like(roots, requires_grad=True)
        (pulled,) = torch.autograd.grad(roots, x, dummy, create_graph=True)  # J' dummy, linear in dummy

        def normal(v: Tensor, pulled: Tensor = pulled, roots: Tensor = roots, x: Tensor = x, dummy: Tensor = dummy) -> Tensor:
            (push,) = torch.autograd.grad(pulled, dummy, v, retain_graph=True)  # J v
            return torch.autograd.grad(roots, x, push, retain_graph=True)[0]  # J' J v

        (gradient,) = torch.autograd.grad(roots, x, roots.detach(), retain_graph=True)
        step = _conjugate_gradients(normal, -gradient, scale, tight)
        x, after = _line_search(squares, x.detach(), step, value)
        tight = min(tight, max(1e-10, after / value if value > 0 else 0.0))
        if after >= value * (1 - 1e-9):
            break
    return x.detach(), history


def _conjugate_gradients(normal: Callable[[Tensor], Tensor], b: Tensor, scale: Tensor, tight: float, most: int = 400) -> Tensor:
    """Solve normal(x) = b to a relative `tight` in the scaled norm; b lies in the range, so singular systems do no harm."""
    x, r = torch.zeros_like(b), b.clone()
    z = scale * r
    p, rz = z.clone(), float((r * z).sum())
    goal = rz * tight**2
    for _ in range(most):
        if rz <= goal or rz == 0:
            break
        Ap = normal(p)
        curve = float((p * Ap).sum())
        if not curve > 0:
            break
        x, r = x + rz / curve * p, r - rz / curve * Ap
        z = scale * r
        rz, before = float((r * z).sum()), rz
        p = z + rz / before * p
    return x


def _line_search(squares: Squares, x: Tensor, step: Tensor, value: float) -> tuple[Tensor, float]:
    """The longest of the steps 1, 1/2, 1/4, ... under which the loss falls; none: x itself."""
    for k in range(30):
        trial = x + step * 0.5**k
        with torch.no_grad():
            after = sum(float((w * f**2).sum()) for w, f in squares(trial))
        if after < value:
            return trial, after
    return x, value


def _size(population: Population, logits: Tensor) -> float:
    """What residuals are differences of: rewards, and beta times logits."""
    mdp = population.mdp
    return float(np.abs(mdp.reward).max()) + population.beta * float(logits.abs().max())


def _semi_gradient(population: Population, method: Method, logits: Tensor, max_steps: int) -> tuple[Tensor, list[float], str]:
    """l(s, a) -= E[rho | s, a] / beta: the expected semi-gradient, each entry scaled by how often it is visited."""
    history: list[float] = []
    for _ in range(max_steps):
        rho = population.residual_mean(logits)
        history.append(float((rho**2).max()))
        logits = logits - rho / population.beta
        if history[-1] <= 1e-30 or (len(history) > 50 and history[-1] >= 0.999 * history[-20]):
            break
    return logits, history, "expected semi-gradient, scaled by visits"


def _turns(population: Population, method: Method, logits: Tensor, max_steps: int) -> tuple[Tensor, list[float], str]:
    """Minimise the turn-cut loss against frozen targets, renew the targets, repeat: a sweep a turn in worlds without loops."""
    history: list[float] = []
    scale = scaling(population, method)
    for _ in range(max_steps):
        targets = population.pieces(logits)[1].detach()

        def squares(x: Tensor, targets: Tensor = targets) -> list[tuple[Tensor, Tensor]]:
            return population.squares(x, method.step, None, False, targets)[:-1]  # the last: noise of replies, no gradient

        moved, losses = gauss_newton(squares, logits, scale, _size(population, logits), max_steps)
        change = float((moved - logits).abs().max())
        history.append(losses[-1])
        logits = moved
        if change <= 1e-13 * (1 + float(logits.abs().max())):
            break
    return logits, history, "Gauss-Newton inside turns, targets renewed"


# ---------------------------------------------------------------------------------------------------- rows of data
def train_on_rows(
    mdp: TokenMDP, loss: str | Method, batch: TokenBatch, *, beta: float, gamma: float = 1.0, max_steps: int = 200
) -> Training:
    """Gauss-Newton on the empirical loss of a fixed set of rows that know their states (of the unrolled automaton).

    In a deterministic world the zero is that of the population loss as soon as the rows act in every reachable policy state
    with every allowed token (F8); what they never take keeps its reference logit here (gradient steps
    would move it through the log-sum-exp).
    """
    method = loss if isinstance(loss, Method) else methods.lookup(loss)
    if method.form not in ("square", "first"):
        raise bad(
            "loss", "a full-gradient loss for data in rows", f"one of form {method.form!r}", "Use population data, or SGD."
        )
    mdp, batch = stationary(mdp), unique(batch)
    allowed, ref = torch.tensor(np.array(mdp.allowed)), torch.tensor(mdp.ref_logits)
    ref_stats = TokenStats.from_table(ref, batch)
    weight = batch.weights[:, None] / batch.weights.sum()

    def squares(x: Tensor) -> list[tuple[Tensor, Tensor]]:
        table = torch.where(allowed, x, -torch.inf)
        stats = TokenStats.from_table(table, batch, ref_table=ref if method.step is naive else None)
        rho, _ = shiq.residuals_of(method.step, stats, ref_stats, batch, beta, gamma, method.n_steps)
        return [(weight.expand_as(rho[:, :1]), rho[:, :1])] if method.form == "first" else [(weight.expand_as(rho), rho)]

    acted = batch.completion_mask[:, 1:] == 1
    state, token = batch.known_states()[:, :-1][acted], batch.input_ids[:, 1:][acted]
    visits = torch.zeros(ref.shape, dtype=torch.float64).index_put_(
        (state, token), weight.expand(acted.shape)[acted], accumulate=True
    )
    weigh = visits.sum(1, keepdim=True).expand_as(visits) if method.form == "first" else visits
    scale = torch.where(weigh > 0, 1 / torch.where(weigh > 0, weigh, 1.0), 0.0)
    start = torch.where(allowed, ref, 0.0)
    size = float(np.abs(mdp.reward).max()) + beta * float(start.abs().max())
    logits, losses = gauss_newton(squares, start, scale, size, max_steps)
    table = np.where(mdp.allowed, logits.numpy(), -np.inf)
    metrics = measure(solve(mdp, beta=beta, gamma=gamma), table, method)
    edges = mdp.allowed & (mdp.reachable & mdp.is_policy)[:, None]
    untried = int((edges & (visits.numpy() == 0)).sum())
    return Training(table, metrics, losses, len(losses), "Gauss-Newton, conjugate gradients, on rows", untried=untried)


def train_sampled(
    mdp: TokenMDP,
    loss: str | Method,
    batches: Iterator[TokenBatch],
    *,
    beta: float,
    gamma: float = 1.0,
    learning_rate: float,
    steps: int,
    record_every: int = 100,
    stop_below: float = 0.0,
) -> Training:
    """Constant-step SGD on sampled rows, from l_ref: plain gradient descent, no momentum, no decay (F10).

    `batches` yields TokenBatches that know their states. Stops early once max Q error <= stop_below.
    """
    method = loss if isinstance(loss, Method) else methods.lookup(loss)
    if not is_real(learning_rate) or not 0 < learning_rate < np.inf:
        raise bad("learning_rate", "a finite number > 0", repr(learning_rate))
    steps, record_every = at_least("steps", steps, 1), at_least("record_every", record_every, 1)
    batches = iter(batches)
    mdp = stationary(mdp)
    solution = solve(mdp, beta=beta, gamma=gamma)
    allowed = torch.tensor(np.array(mdp.allowed))
    ref = torch.tensor(mdp.ref_logits)
    table = torch.where(allowed, ref, 0.0).requires_grad_()
    losses, at, errors = [], [], []
    done = 0
    for done in progress(range(1, steps + 1), f"SGD on {mdp.name or 'a table'}"):
        batch = next(batches, None)
        if batch is None:
            raise bad("batches", f"one for each of {steps} steps", done - 1)
        value = table_loss(method, torch.where(allowed, table, -torch.inf), ref, batch, beta, gamma)
        (gradient,) = torch.autograd.grad(value, table)
        with torch.no_grad():
            table -= learning_rate * gradient
        if done % record_every == 0 or done == steps:
            metrics = measure(solution, np.where(mdp.allowed, table.detach().numpy(), -np.inf), method)
            losses.append(float(value.detach()))
            at.append(done)
            errors.append(metrics.q_error)
            if metrics.q_error <= stop_below:
                break
    final = np.where(mdp.allowed, table.detach().numpy(), -np.inf)
    return Training(final, measure(solution, final, method), losses, done, f"SGD, constant step {learning_rate:g}", at, errors)


def minibatches(batch: TokenBatch, size: int, *, rng: np.random.Generator | int) -> Iterator[TokenBatch]:
    """Endless mini-batches drawn with replacement by the rows' weights: independent rows of what the weights describe."""
    rng = np.random.default_rng(rng)
    ladder = np.cumsum(batch.weights.numpy())
    plain = replace(batch, weights=torch.ones_like(batch.weights))
    while True:
        rows = np.searchsorted(ladder, rng.random(size) * ladder[-1], side="right")
        yield plain.select(torch.from_numpy(rows))


def hessian_condition(population: Population, method: Method, logits: Tensor) -> float:
    """Condition number of the population loss's Hessian at a zero of it, over the entries that the behaviour reaches."""
    use = torch.tensor(np.isfinite(population.mdp.ref_logits)) & (scaling(population, method) > 0)
    base = torch.where(use, logits, 0.0)

    def roots(x: Tensor) -> Tensor:
        parts = population.squares(
            base.index_put(torch.where(use), x), method.step, method.n_steps, method.form == "first", None
        )
        return torch.cat([(w.sqrt() * f).reshape(-1) for w, f in parts])

    jacobian = torch.autograd.functional.jacobian(roots, base[use])
    return float(torch.linalg.cond(jacobian)) ** 2


def table_loss(method: Method, table: Tensor, ref: Tensor, batch: TokenBatch, beta: float, gamma: float) -> Tensor:
    """The method's loss of a table float[S, V] on rows that know their states."""
    with_joint = ref if method.step is naive else None
    stats = TokenStats.from_table(table, batch, ref_table=with_joint)
    return method.loss(stats, TokenStats.from_table(ref, batch), batch, beta=beta, gamma=gamma)
