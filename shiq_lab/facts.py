"""The twelve facts of the derivation, each measured on an automaton: what `selftest` prints and the property tests assert.

A fact is a plain function of a Case that yields Findings: what was measured and the bound that theory or rounding gives.
"It vanishes" and "it must not vanish" are both findings, so a fact that holds for want of anything to compare is a failure.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch, cut
from shiq_lab.bellman import EPS, Solution, environment_average, evaluate, solve
from shiq_lab.enumeration import count_trajectories, enumerate_trajectories
from shiq_lab.graph import Floats
from shiq_lab.losses import shiq, steps
from shiq_lab.losses.methods import METHODS, Method
from shiq_lab.losses.residuals import actions_of
from shiq_lab.mdp import TokenMDP
from shiq_lab.policies import softmax_policy
from shiq_lab.population import Population
from shiq_lab.sampling import sample
from shiq_lab.stats import TokenStats

LISTABLE = 5_000  # strings; facts that average over all rows are measured where no more than these exist
DENSE = 150  # edges; F8's Jacobian is built entry by entry


@dataclass(frozen=True)
class Finding:
    """One measured number against its bound; `above` turns "at most" into "at least"."""

    fact: str
    claim: str
    measured: float
    bound: float
    above: bool = False

    @property
    def holds(self) -> bool:
        """The measurement keeps its bound; False where it is not finite."""
        good = self.measured >= self.bound if self.above else self.measured <= self.bound
        return bool(np.isfinite(self.measured)) and good


@dataclass(frozen=True, eq=False)
class Case:
    """An automaton without horizon and with a prompt, its solution, a random table, a random behaviour and rows of it."""

    mdp: TokenMDP
    beta: float
    gamma: float
    seed: int = 0
    rows: int = 64
    policy: Floats | None = None  # the behaviour, where it is not to be a random one

    @cached_property
    def solution(self) -> Solution:
        """The exact solution."""
        return solve(self.mdp, beta=self.beta, gamma=self.gamma)

    @cached_property
    def ref(self) -> Tensor:
        """The reference's logits, float[S, V]."""
        return torch.tensor(self.mdp.ref_logits)

    @cached_property
    def optimal(self) -> Tensor:
        """l*, float[S, V]."""
        return torch.tensor(self.solution.optimal_logits())

    @cached_property
    def logits(self) -> Tensor:
        """A random table, another level in every state."""
        rng = np.random.default_rng(self.seed + 1)
        noise = rng.normal(size=self.mdp.ref_logits.shape) + rng.normal(size=(self.mdp.n_states, 1))
        return torch.tensor(np.where(self.mdp.allowed, np.where(self.mdp.allowed, self.mdp.ref_logits, 0.0) + noise, -np.inf))

    @cached_property
    def behavior(self) -> Floats:
        """`policy`, or the reference tilted at random: full support, and episodes that end."""
        if self.policy is not None:
            return self.policy
        noise = np.random.default_rng(self.seed + 2).normal(size=self.mdp.ref_logits.shape)
        return softmax_policy(self.mdp, np.where(self.mdp.allowed, self.mdp.ref_log_policy, 0.0) + 0.5 * noise)

    @cached_property
    def listed(self) -> bool:
        """True where the strings are few enough to be listed."""
        count = count_trajectories(self.mdp)
        return count is not None and count <= LISTABLE

    @cached_property
    def batch(self) -> TokenBatch:
        """All rows of the behaviour with exact weights where they can be listed, else a sample, cut at 200 tokens."""
        if self.listed:
            return enumerate_trajectories(self.mdp, LISTABLE, behavior=self.behavior)
        return sample(self.mdp, self.behavior, self.rows, rng=self.seed, max_tokens=200)

    @cached_property
    def ragged(self) -> TokenBatch:
        """Rows of which some are cut: at random lengths, in policy states; the one with the most actions stays whole."""
        few = self.batch.select(torch.arange(min(len(self.batch), self.rows)))
        width = few.input_ids.shape[1]
        length = torch.from_numpy(np.random.default_rng(self.seed + 3).integers(1, width + 1, len(few)))
        length[few.completion_mask.sum(1).argmax()] = width
        return cut(few, length)

    @cached_property
    def population(self) -> Population:
        """Expected losses under the behaviour."""
        return Population(self.mdp, self.behavior, self.beta, self.gamma)

    def stats(self, table: Tensor, batch: TokenBatch) -> TokenStats:
        """The two numbers a token of a table of logits, and the joint ones."""
        return TokenStats.from_table(table, batch, ref_table=self.ref)

    def residuals(self, table: Tensor, batch: TokenBatch, n_steps: int | None, gamma: float | None = None) -> Tensor:
        """rho^(n) of the shifted step, float[B, T]."""
        stats, ref = self.stats(table, batch), self.stats(self.ref, batch)
        return shiq.residuals_of(steps.shifted, stats, ref, batch, self.beta, gamma or self.gamma, n_steps)[0]

    @cached_property
    def rounding(self) -> float:
        """One ulp of what residuals are made of, times the numbers that a row adds up: every bound is a multiple of it."""
        tables = (self.ref, self.logits, self.optimal)
        biggest = max(float(t[torch.isfinite(t)].abs().max()) for t in tables)
        row = float((self.batch.rewards * self.batch.completion_mask).abs().sum(1).max())
        longest = self.batch.input_ids.shape[1]
        return 4 * EPS * longest * (self.solution.scale + row + self.beta * (1 + biggest) * longest)

    def gradient(self, table: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """d loss / d table with forbidden entries left at 0."""
        allowed = torch.tensor(np.array(self.mdp.allowed))
        x = torch.where(allowed, table, 0.0).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(torch.where(allowed, x, -torch.inf)), x)
        return gradient

    def value(self, loss: Callable[..., Tensor], stats: TokenStats, ref: TokenStats, batch: TokenBatch) -> float:
        """A loss of statistics at this case's beta and gamma."""
        return float(loss(stats, ref, batch, beta=self.beta, gamma=self.gamma))

    def batch_loss(self, name: str, batch: TokenBatch, **options: object) -> Callable[[Tensor], Tensor]:
        """The named token loss as a function of a table, summed with the batch's weights."""
        ref, loss = self.stats(self.ref, batch), METHODS[name].loss
        return lambda table: loss(
            self.stats(table, batch), ref, batch, beta=self.beta, gamma=self.gamma, reduction="sum", **options
        )


def _worst(x: Tensor | Floats) -> float:
    """The largest |x|; NaN, which no finding holds with, where there was nothing to compare."""
    values = np.abs(np.asarray(x.detach() if isinstance(x, Tensor) else x))
    return float(values.max()) if values.size else float("nan")


def f1(case: Case) -> Iterator[Finding]:
    """At the optimum beta (l* - l_ref) = q* and Dv = v*: the shifted logits are the Q-values, level included."""
    c, u = (x.numpy() for x in case.population.pieces(case.optimal))
    rows = case.mdp.is_policy
    edges = case.mdp.allowed & rows[:, None]
    yield Finding("F1", "beta (l* - l_ref) = q*", _worst((c - case.solution.q())[edges]), case.rounding)
    yield Finding("F1", "Dv = v*", _worst((u - case.solution.v())[rows]), case.rounding)
    best = evaluate(case.mdp, softmax_policy(case.mdp, case.optimal.numpy()), beta=case.beta, gamma=case.gamma)
    yield Finding("F1", "J(softmax l*) = v*(start)", abs(best.objective - case.solution.objective), case.rounding)


def f2(case: Case) -> Iterator[Finding]:
    """rho = A d with the upper-triangular discount matrix A, and rho^(n)_t = rho_t - gamma^n rho_{t+n}."""
    batch = case.ragged
    d, rho, three = (case.residuals(case.logits, batch, n) for n in (1, None, 3))
    T = d.shape[1]
    k = torch.arange(T)
    A = torch.where(k[:, None] <= k, case.gamma ** (k - k[:, None]).clamp(min=0).double(), 0.0)
    yield Finding("F2", "rho = A d", _worst(rho - d @ A.T), case.rounding)
    ahead = torch.nn.functional.pad(rho, (0, 3))[:, 3:]
    yield Finding("F2", "rho^(3)_t = rho_t - gamma^3 rho_{t+3}", _worst(three - rho + case.gamma**3 * ahead), case.rounding)
    yield Finding("F2", "residuals of a random table are not 0", _worst(rho), 1e3 * case.rounding, above=True)


def f3(case: Case) -> Iterator[Finding]:
    """The closed-form gradient equals autograd; summed over the vocabulary ShiQ's is 2 beta rho_k."""
    batch, ref = case.ragged, case.stats(case.ref, case.ragged)
    names = ("token_logit", "logsumexp", "end_logsumexp")
    plain = case.stats(case.logits, batch)
    size = 2 * case.beta * case.rounding * batch.input_ids.shape[1]
    for n in (None, 1, 2):
        leaf = TokenStats(*[getattr(plain, name).clone().requires_grad_() for name in names])
        total = shiq.shiq_loss(leaf, ref, batch, beta=case.beta, gamma=case.gamma, n_steps=n, reduction="none").sum()
        auto = torch.autograd.grad(total, [getattr(leaf, name) for name in names], allow_unused=True)
        closed = shiq.shiq_gradient(plain, ref, batch, beta=case.beta, gamma=case.gamma, n_steps=n)
        gaps = [_worst(getattr(closed, m) - (0 if g is None else g)) for m, g in zip(names, auto, strict=True)]
        yield Finding("F3", f"closed form = autograd, n_steps={n}", max(gaps), size)
        if n is None:
            rho, actions = shiq.residuals_of(steps.shifted, plain, ref, batch, case.beta, case.gamma, None)
            summed = actions.of(closed.token_logit + closed.logsumexp)
            yield Finding("F3", "summed over the vocabulary: 2 beta rho_k", _worst(summed - 2 * case.beta * rho), size)


def f4(case: Case) -> Iterator[Finding]:
    """At l = l_ref: rho_t = -(reward-to-go); with r = 0 the loss is 0 with the shift, and without it only if lse(l_ref) = 0."""
    batch = case.batch
    actions = actions_of(batch)
    reward = actions.of(batch.rewards[:, 1:])
    togo = reward.clone()
    for t in reversed(range(reward.shape[1] - 1)):
        togo[:, t] += case.gamma * togo[:, t + 1]
    rho = case.residuals(case.ref, batch, None)
    yield Finding("F4", "rho_t = -(reward-to-go) at l_ref", _worst(torch.where(actions.real, rho + togo, 0.0)), case.rounding)
    silent = replace(batch, rewards=torch.zeros_like(batch.rewards))
    ref = case.stats(case.ref, silent)
    yield Finding("F4", "shifted loss at l_ref, r = 0", case.value(shiq.shiq_loss, ref, ref, silent), case.rounding**2)
    level = torch.tensor(case.mdp.ref_logsumexp)[silent.known_states().clamp(min=0)][:, :-1]
    here = actions.of(level)
    after = torch.nn.functional.pad(here, (0, 1))[:, 1:]
    predicted = torch.where(actions.real, (case.beta * (here - case.gamma * after)) ** 2, 0.0).sum(1)
    predicted = (predicted * silent.weights).sum() / silent.weights.sum()
    easy = case.value(shiq.easy_sampling_loss, ref, ref, silent)
    whole = bool(silent.terminated.all())
    if whole:
        size = 8 * case.rounding * (1 + float(predicted))
        yield Finding("F4", "unshifted loss at l_ref, r = 0, as predicted", abs(easy - float(predicted)), size)
    if not whole or float(predicted) > 1e-2 * case.beta**2:  # levels differ from 0, as those of pretrained models do
        yield Finding("F4", "and that is not 0", easy, 1e-3 * case.beta**2, above=True)


def f5(case: Case) -> Iterator[Finding]:
    """Gauge: c(s) added to l and l_ref changes nothing; added to l alone it changes ShiQ, and rho_0 only by the level there."""
    batch = case.ragged
    shift = torch.tensor(np.random.default_rng(case.seed + 4).normal(size=(case.mdp.n_states, 1)))
    ref, plain = case.stats(case.ref, batch), case.stats(case.logits, batch)
    both = case.stats(case.logits + shift, batch), case.stats(case.ref + shift, batch)
    value = case.value(shiq.shiq_loss, plain, ref, batch)
    size = case.rounding * 8 * (1 + value)
    yield Finding("F5", "l + c, l_ref + c: loss unchanged", abs(case.value(shiq.shiq_loss, *both, batch) - value), size)
    alone = case.value(shiq.shiq_loss, both[0], ref, batch)
    yield Finding("F5", "l + c alone: ShiQ loss changes", abs(alone - value), 1e-6 * case.beta**2, above=True)
    moved, still = (softmax_policy(case.mdp, t.numpy()) for t in (case.logits + shift, case.logits))
    most = 1 + float(torch.where(torch.isfinite(case.logits), case.logits.abs() + shift.abs(), 0.0).max())
    yield Finding("F5", "l + c alone: policy unchanged", _worst(np.exp(moved) - np.exp(still)), 16 * EPS * most)
    first = torch.tensor(case.population.first > 0)[:, None]
    inner = case.stats(torch.where(first, case.logits, case.logits + shift), case.batch)
    whole = case.batch
    if whole.terminated.all() and not _returns_to_first(case):
        before = case.value(shiq.sequence_loss, case.stats(case.logits, whole), case.stats(case.ref, whole), whole)
        after = case.value(shiq.sequence_loss, inner, case.stats(case.ref, whole), whole)
        yield Finding("F5", "c on inner states: rho_0 unchanged", abs(after - before), case.rounding * 8 * (1 + before))


def _returns_to_first(case: Case) -> bool:
    """Can a first policy state be visited later in the row? Then its level is an inner one too."""
    arrivals = case.population.arrivals * case.mdp.is_policy
    return bool((np.abs(arrivals - case.population.first)[case.population.first > 0] > 1e-9).any())


def f6(case: Case) -> Iterator[Finding]:
    """(r, beta) -> (c r, c beta) multiplies the residuals by c at the same logits."""
    factor = 3.7
    louder = replace(case.ragged, rewards=case.ragged.rewards * factor)
    scaled = replace(case, beta=case.beta * factor)
    gap = scaled.residuals(case.logits, louder, None) - factor * case.residuals(case.logits, case.ragged, None)
    yield Finding("F6", "residuals scale with (r, beta)", _worst(gap), 2 * factor * case.rounding)


def shaped_twin(mdp: TokenMDP, potential: Floats, gamma: float) -> TokenMDP:
    """r + gamma Phi(s') - Phi(s) in policy states; Phi(end) = 0, and Phi of environment states must be its own average."""
    after = np.append(potential, 0.0)[mdp.next_state]
    return replace(mdp, reward=np.where(mdp.is_policy[:, None], mdp.reward + gamma * after - potential[:, None], 0.0))


def f7(case: Case) -> Iterator[Finding]:
    """Potential-based shaping leaves pi* alone and lowers v* by Phi; under a horizon a stationary Phi moves pi*."""
    mdp, gamma = case.mdp, case.gamma
    free = np.where(mdp.is_policy, np.random.default_rng(case.seed + 5).normal(size=mdp.n_states), 0.0)
    potential = case.population.lift.solve(free)  # averaged over replies in environment states
    twin = solve(shaped_twin(mdp, potential, gamma), beta=case.beta, gamma=gamma)
    yield Finding("F7", "v* falls by Phi", _worst(twin.v() + potential - case.solution.v()), case.rounding)
    same = np.exp(twin.log_policy()) - np.exp(case.solution.log_policy())
    yield Finding("F7", "pi* stays", _worst(same), 4 * case.rounding / case.beta)
    short = replace(mdp, horizon=1)  # nothing is said after the first action, yet it was paid Phi of where it leads
    plain = solve(short, beta=case.beta, gamma=gamma).log_policy()
    paid = solve(shaped_twin(short, potential, gamma), beta=case.beta, gamma=gamma).log_policy()
    gain = gamma * np.append(potential, 0.0)[mdp.next_state] / case.beta
    moved = softmax_policy(mdp, np.where(mdp.allowed, plain, 0.0) + gain)
    gap = _worst(np.exp(paid) - np.exp(moved))
    yield Finding("F7", "under a horizon pi* moves by exp(gamma Phi(s') / beta)", gap, 4 * case.rounding / case.beta)
    if _worst(np.exp(plain) - np.exp(moved)) > 1e-5:  # somewhere tokens of weight lead to different potentials
        yield Finding("F7", "and that is not 0", _worst(np.exp(plain) - np.exp(paid)), 1e-6, above=True)


def f8(case: Case) -> Iterator[Finding]:
    """The one-step residual's Jacobian is beta (I - gamma P_pi), invertible: one zero, no other stationary point; over all
    edges."""
    mdp = case.mdp
    edges = np.argwhere(mdp.allowed & mdp.is_policy[:, None])
    if len(edges) > DENSE or not mdp.deterministic:
        return
    flat = torch.tensor(edges)
    base = torch.where(torch.tensor(np.array(mdp.allowed)), case.logits, 0.0)

    def residual(x: Tensor) -> Tensor:
        c, u = case.population.pieces(base.index_put((flat[:, 0], flat[:, 1]), x))
        lifted = torch.tensor(_lands(mdp)) @ u
        follow = torch.tensor(np.where(mdp.next_state < 0, mdp.n_states, mdp.next_state))
        d = c - torch.tensor(np.array(mdp.reward)) - case.gamma * torch.nn.functional.pad(lifted, (0, 1))[follow]
        return d[flat[:, 0], flat[:, 1]]

    start = base[flat[:, 0], flat[:, 1]].clone()
    jacobian = torch.autograd.functional.jacobian(residual, start).numpy()
    pi = np.exp(softmax_policy(mdp, case.logits.numpy()))
    arrive = np.append(_lands(mdp), np.zeros((1, mdp.n_states)), 0)[mdp.next_state[edges[:, 0], edges[:, 1]]]  # (E, S)
    P = arrive[:, edges[:, 0]] * pi[edges[:, 0], edges[:, 1]]
    formula = case.beta * (np.eye(len(edges)) - case.gamma * P)
    yield Finding("F8", "Jacobian = beta (I - gamma P_pi)", _worst(jacobian - formula), 64 * EPS * case.beta * len(edges))
    least = float(np.linalg.svd(formula, compute_uv=False)[-1])
    yield Finding("F8", "its least singular value / beta", least / case.beta, 1e-9, above=True)


def _lands(mdp: TokenMDP) -> Floats:
    """float[S, S]: the policy state that an environment state leads to, with its probability; itself for policy states."""
    return environment_average(mdp).solve(np.diag(mdp.is_policy.astype(np.float64)))


def bias_formulas(case: Case) -> dict[str, Floats]:
    """F9's expected gradient at l* of each full-gradient loss, float[S, V], from the listed one-step residuals d.

        one-step   -2 beta gamma E[ d_{k-1} pi*(.|s_k) ]
        ShiQ        2 beta E[ X (mu - pi*)(.|s_k) ],    X = sum_{j<k} gamma^{k-j} d_j sum_{i<=j} gamma^{2i}
        rho_0       the same with                       X = gamma^k sum_{j<k} gamma^j d_j

    The naive and the easy step have the same d at their own optimum, so they share the first line.
    """
    batch, beta, gamma = case.batch, case.beta, case.gamma
    actions = actions_of(batch)
    d = case.residuals(case.optimal, batch, 1).numpy()
    k = np.arange(d.shape[1])
    earlier = k[:, None] > k[None]  # [k, j]
    lag = np.where(earlier, gamma ** np.maximum(k[:, None] - k[None], 0), 0.0)
    state = batch.known_states()[:, :-1].gather(1, actions.index).clamp(min=0).numpy()
    weight = np.where(actions.real.numpy(), batch.weights.numpy()[:, None], 0.0)
    best = np.where(case.mdp.allowed, np.exp(case.solution.log_policy()), 0.0)

    def per_state(x: Floats) -> Floats:
        total = np.zeros(case.mdp.n_states)
        np.add.at(total, state, weight * x)
        return total[:, None]

    off_policy = np.where(case.mdp.is_policy[:, None], np.exp(case.behavior) - best, 0.0)
    one = -2 * beta * gamma * per_state(np.pad(d, ((0, 0), (1, 0)))[:, :-1]) * best * case.mdp.is_policy[:, None]
    multi = 2 * beta * per_state(d * np.cumsum(gamma ** (2.0 * k)) @ lag.T) * off_policy
    first = 2 * beta * per_state(gamma**k * ((gamma**k * d) @ earlier.T)) * off_policy
    return {"naive": one, "easy": one, "shifted": one, "shiq": multi, "sequence": first}


def optimum_of(case: Case, method: Method) -> Tensor:
    """The table at which a method's logits say q*: q* / beta, + ln pi_ref for the easy step, + l_ref for the shifted ones."""
    q = torch.tensor(np.where(case.mdp.allowed & case.mdp.is_policy[:, None], case.solution.q(), 0.0)) / case.beta
    if method.step is steps.naive:
        return torch.where(torch.tensor(np.array(case.mdp.allowed)), q, -torch.inf)
    return q + (torch.tensor(case.mdp.ref_log_policy) if method.step is steps.easy else case.ref)


def expected_gradient(case: Case, name: str) -> Floats:
    """The exact expected gradient float[S, V] of a method at its own optimum, by differentiating the population loss."""
    method = METHODS[name]
    first = method.form == "first"

    def loss(table: Tensor) -> Tensor:
        return case.population.loss(table, step=method.step, n_steps=method.n_steps, first_only=first)

    return np.asarray(case.gradient(optimum_of(case, method), loss))


def f9(case: Case) -> Iterator[Finding]:
    """In a random world the expected gradient at l* is what `bias_formulas` says; ShiQ's is zero on data of pi* itself."""
    if not case.listed:
        return
    size = 4 * case.beta * case.rounding * case.batch.input_ids.shape[1]
    for name, formula in bias_formulas(case).items():
        gradient = expected_gradient(case, name)
        yield Finding("F9", f"{name}: expected gradient at l* = formula", _worst(gradient - formula), size)
        if name == "shiq" and _worst(formula) > 1e3 * size:  # a choice follows replies that are worth unlike amounts
            yield Finding("F9", "ShiQ's off-policy bias is not 0", _worst(gradient), 100 * size, above=True)
    own = replace(case, policy=case.solution.log_policy())
    yield Finding("F9", "ShiQ's on data of pi* itself", _worst(expected_gradient(own, "shiq")), size)


def f10(case: Case) -> Iterator[Finding]:
    """In a deterministic world each row's gradient is 0 at l*, cut rows and n-step too; with random replies it is not."""
    size = 4 * case.beta * case.rounding * case.batch.input_ids.shape[1]
    if not case.mdp.deterministic:
        d, luck = case.residuals(case.optimal, case.batch, 1).numpy(), _luck(case)
        yield Finding("F10", "d at l* = gamma (v* after the action - v* after the reply)", _worst(d - luck), case.rounding)
        if _worst(luck) * case.beta > 1e3 * size:  # replies of unlike worth were drawn
            stats, ref = case.stats(case.optimal, case.batch), case.stats(case.ref, case.batch)
            single = shiq.shiq_gradient(stats, ref, case.batch, beta=case.beta, gamma=case.gamma).token_logit
            yield Finding("F10", "a row's gradient at l*, random replies", _worst(single), 100 * size, above=True)
        return
    for batch, name in ((case.batch, "whole rows"), (case.ragged, "cut rows")):
        stats, ref = case.stats(case.optimal, batch), case.stats(case.ref, batch)
        for n in (None, 1, 2):
            parts = shiq.shiq_gradient(stats, ref, batch, beta=case.beta, gamma=case.gamma, n_steps=n)
            worst = max(_worst(parts.token_logit), _worst(parts.logsumexp), _worst(parts.end_logsumexp))
            yield Finding("F10", f"largest gradient of one row at l*, {name}, n_steps={n}", worst, size)


def _luck(case: Case) -> Floats:
    """gamma (v*(where the action leads) - v*(the next policy state)), float[B, T]: what random replies leave in d at l*."""
    batch, actions = case.batch, actions_of(case.batch)
    value = torch.tensor(np.append(case.solution.v(), 0.0))  # the last entry, index -1, is the end
    state = value[batch.states]  # after each token
    led, before = state[:, 1:].gather(1, actions.index), state[:, :-1].gather(1, actions.index)
    at_end = state[torch.arange(len(batch)), batch.last_index()][:, None]
    following = torch.nn.functional.pad(actions.real[:, 1:], (0, 1))
    after = torch.where(following, torch.nn.functional.pad(before[:, 1:], (0, 1)), at_end)
    return torch.where(actions.real, case.gamma * (led - after), 0.0).numpy()


def f11(case: Case) -> Iterator[Finding]:
    """Semi-gradient and turn-cut ShiQ keep l* stationary under any behaviour, random replies or not."""
    if not case.batch.terminated.all() or not case.listed:
        return
    size = 4 * case.beta * case.rounding * case.batch.input_ids.shape[1]
    for through in ("token", "value"):
        loss = case.batch_loss("semi-gradient", case.batch, through=through)
        yield Finding(
            "F11", f"semi-gradient ({through}): expected gradient at l*", _worst(case.gradient(case.optimal, loss)), size
        )
    turns = case.gradient(case.optimal, case.batch_loss("turn-cut", case.batch))
    yield Finding("F11", "turn-cut: expected gradient at l*", _worst(turns), size)
    moved = case.gradient(case.logits, case.batch_loss("turn-cut", case.batch))
    yield Finding("F11", "turn-cut: away from l* it is not 0", _worst(moved), 10 * size, above=True)


def f12(case: Case) -> Iterator[Finding]:
    """The population losses by recursion equal the sum over all rows."""
    if not case.listed:
        return
    for name in ("naive", "easy", "shifted", "shiq", "sequence"):
        method = METHODS[name]
        listed = float(case.batch_loss(name, case.batch)(case.logits))
        first = method.form == "first"
        recursion = float(case.population.loss(case.logits, step=method.step, n_steps=method.n_steps, first_only=first))
        yield Finding("F12", f"{name}: recursion = listing", abs(recursion - listed), 8 * case.rounding * (1 + listed))


FACTS: dict[str, Callable[[Case], Iterator[Finding]]] = {
    "F1": f1, "F2": f2, "F3": f3, "F4": f4, "F5": f5, "F6": f6, "F7": f7, "F8": f8,
    "F9": f9, "F10": f10, "F11": f11, "F12": f12,
}  # fmt: skip
