"""The second road: the losses, their gradients, the listing and the population recursion as plain loops in float64.

Nothing here shares the package's algebra. A residual is written as the derivation's table states it, a state's value minus
the discounted rewards and log-ratios after it; no telescoping, no scan, no statistics, no masks beyond reading the contract's
arrays once. Slow on purpose, and small enough to be read beside math.md.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from shiq_lab import TokenBatch, TokenMDP
from shiq_lab.graph import blocks

Vector = list[float]


# ------------------------------------------------------------------------------------------------------- reading rows
@dataclass
class Sequence:
    """One sequence without padding: what the contract's arrays say of it.

    actions   (column of the logits that scores it, token, reward) of every action, in order
    replied   does the environment speak between this action and the next one (or the cut end)?
    end       column after the last real token, None where the row terminated
    where     (row, number of the segment)
    """

    actions: list[tuple[int, int, float]]
    replied: list[bool]
    end: int | None
    where: tuple[int, int]
    weight: float


def sequences(batch: TokenBatch) -> list[Sequence]:
    """Every row, or every packed segment, as a Sequence."""
    out = []
    for b in range(len(batch)):
        for n in range(1 if batch.segment_ids is None else batch.terminated.shape[1]):
            own = (lambda i, b=b: batch.attention_mask[b, i].item() == 1) if batch.segment_ids is None else (
                lambda i, b=b, n=n: batch.segment_ids[b, i].item() == n + 1
            )  # fmt: skip
            real = [i for i in range(batch.input_ids.shape[1]) if own(i)]
            at = b if batch.segment_ids is None else (b, n)
            acts = [i for i in real if batch.completion_mask[b, i].item() == 1]
            actions = [(i - 1, int(batch.input_ids[b, i]), float(batch.rewards[b, i])) for i in acts]
            replied = [later != i + 1 for i, later in zip(acts, [*acts[1:], *([real[-1] + 1] if acts else [])], strict=True)]
            end = None if bool(batch.terminated[at]) else real[-1]
            out.append(Sequence(actions, replied, end, (b, n), float(batch.weights[at])))
    return out


# ---------------------------------------------------------------------------------------------------------- one state
def lse(x: Vector) -> float:
    top = max(x)
    return top + math.log(sum(math.exp(y - top) for y in x))


def softmax(x: Vector) -> Vector:
    level = lse(x)
    return [math.exp(y - level) for y in x]


@dataclass
class Meaning:
    """What logits mean at a step of the derivation: the value of a state and the policy they stand for.

    step 0  "naive"    V = beta ln sum pi_ref exp(l)    pi = pi_ref exp(l) / sum
    step 1  "easy"     V = beta lse(l)                  pi = softmax(l)
    step 2  "shifted"  V = beta (lse(l) - lse(l_ref))   pi = softmax(l)
    """

    step: str
    beta: float

    def value(self, l: Vector, ref: Vector) -> float:  # noqa: E741
        if self.step == "naive":
            return self.beta * math.log(sum(p * math.exp(x) for p, x in zip(softmax(ref), l, strict=True) if p > 0))
        return self.beta * (lse(l) - (lse(ref) if self.step == "shifted" else 0.0))

    def policy(self, l: Vector, ref: Vector) -> Vector:  # noqa: E741
        return softmax([x + y for x, y in zip(l, ref, strict=True)] if self.step == "naive" else l)

    def log_ratio(self, l: Vector, ref: Vector, a: int) -> float:  # noqa: E741
        return math.log(self.policy(l, ref)[a]) - math.log(softmax(ref)[a])


def one_step(step: str, l: Vector, ref: Vector, a: int, r: float, after: float, beta: float, gamma: float) -> float:  # noqa: E741
    """The one-step residual, word for word from the derivation's table; `after` is the next state's value."""
    left = {"naive": l[a], "easy": l[a] - math.log(softmax(ref)[a]), "shifted": l[a] - ref[a]}[step]
    return beta * left - r - gamma * after


# ----------------------------------------------------------------------------------------------- residuals along a row
@dataclass
class Residual:
    """rho_t, the action's number, and its gradient by the logits, {column: vector}: only what is not stopped."""

    t: int
    value: float
    gradient: dict[int, Vector]


def residuals(
    seq: Sequence,
    logits: Any,
    ref: Any,
    *,
    beta: float,
    gamma: float,
    form: str = "shiq",
    step: str = "shifted",
    n_steps: int | None = None,
    through: str = "token",
    target: Any = None,
) -> list[Residual]:
    """rho_t = V(s_t) - sum_k gamma^{k-t} [r_k - beta ln(pi/pi_ref)(a_k|s_k)] - gamma^n V(s_{t+n}), term by term.

    logits, ref   nested [L][V] of the sequence's row; target: a target network's logits, whence bootstrapped values
    form          "shiq"; "sequence": rho_0 alone; "semi": gradient `through` one place; "turns": stop at the world's answer
    """
    meaning = Meaning(step, beta)
    V = len(logits[0])
    out = []
    for t in range(len(seq.actions)):
        if form == "sequence" and t > 0:
            break
        gradient: dict[int, Vector] = {}

        def add(column: int, vector: Vector, factor: float, gradient: dict[int, Vector] = gradient) -> None:
            old = gradient.get(column, [0.0] * V)
            gradient[column] = [x + factor * y for x, y in zip(old, vector, strict=True)]

        here = seq.actions[t][0]
        value = meaning.value(logits[here], ref[here])
        add(here, meaning.policy(logits[here], ref[here]), beta)
        k, answered = t, False
        while k < len(seq.actions) and (n_steps is None or k < t + n_steps) and not answered:
            column, a, r = seq.actions[k]
            discount = gamma ** (k - t)
            value -= discount * (r - beta * meaning.log_ratio(logits[column], ref[column], a))
            e = [1.0 if x == a else 0.0 for x in range(V)]
            p = meaning.policy(logits[column], ref[column])
            add(column, [x - y for x, y in zip(e, p, strict=True)], beta * discount)
            answered = form == "turns" and seq.replied[k]
            k += 1
        after = seq.actions[k][0] if k < len(seq.actions) else seq.end
        if after is not None:
            source = logits if target is None else target
            value -= gamma ** (k - t) * meaning.value(source[after], ref[after])
            if target is None and not answered:
                add(after, meaning.policy(logits[after], ref[after]), -beta * gamma ** (k - t))
        if form == "semi":
            gradient = {}
            own = [1.0 if x == seq.actions[t][1] else 0.0 for x in range(V)]
            gradient[here] = [beta * x for x in (own if through == "token" else softmax(logits[here]))]
        out.append(Residual(t, value, gradient))
    return out


def loss_and_gradient(
    batch: TokenBatch,
    logits: np.ndarray,
    ref: np.ndarray,
    *,
    beta: float,
    gamma: float,
    reduction: str = "mean",
    **options: Any,
) -> tuple[Any, np.ndarray]:
    """The loss of a batch and, for "sum" and "mean", its gradient float[B, L, V] by the logits; for "none" by their sum."""
    rows = np.zeros(tuple(batch.terminated.shape))
    gradient = np.zeros(logits.shape)
    seqs = sequences(batch)
    total = sum(seq.weight for seq in seqs)
    target = options.pop("target", None)
    for seq in seqs:
        b, n = seq.where
        own = {} if target is None else {"target": target[b].tolist()}
        factor = {"none": 1.0, "sum": seq.weight, "mean": seq.weight / total}[reduction]
        for rho in residuals(seq, logits[b].tolist(), ref[b].tolist(), beta=beta, gamma=gamma, **options, **own):
            rows[(b, n) if rows.ndim == 2 else b] += factor * rho.value**2
            for column, vector in rho.gradient.items():
                gradient[b, column] += 2 * factor * rho.value * np.array(vector)
    return (rows if reduction == "none" else float(rows.sum())), gradient


# ------------------------------------------------------------------------------------------------------------- listing
@dataclass
class Word:
    """One trajectory: tokens, which are actions, rewards, the state after each token, and its probability."""

    tokens: tuple[int, ...] = ()
    actions: tuple[int, ...] = ()
    rewards: tuple[float, ...] = ()
    states: tuple[int, ...] = ()
    probability: float = 1.0


def words(mdp: TokenMDP, log_policy: np.ndarray, state: int | None = None, before: Word | None = None) -> Iterator[Word]:
    """Every trajectory, depth first; log_policy float[S, V] (policy rows are read, the environment has its own)."""
    state = mdp.start if state is None else state
    before = before or Word()
    for a in range(mdp.n_tokens):
        acts = bool(mdp.is_policy[state])
        chance = math.exp((log_policy if acts else mdp.ref_logits)[state, a]) if mdp.ref_logits[state, a] > -math.inf else 0.0
        if chance == 0:
            continue
        after = int(mdp.next_state[state, a])
        if mdp.horizon is not None and sum(before.actions) + acts >= mdp.horizon and acts:
            after = -1
        word = Word(
            (*before.tokens, a),
            (*before.actions, int(acts)),
            (*before.rewards, float(mdp.reward[state, a]) if acts else 0.0),
            (*before.states, after),
            before.probability * chance,
        )
        if after < 0:
            yield word
        else:
            yield from words(mdp, log_policy, after, word)


def best_cut(word: Word, length: int, is_policy: np.ndarray) -> int:
    """How many tokens a row keeps when cut after at most `length`: the contract's rule, by trying one place after another."""
    if length >= len(word.tokens):
        return len(word.tokens)
    allowed = [k for k in range(1, len(word.tokens)) if is_policy[word.states[k - 1]]]  # after k tokens the policy speaks
    if not allowed:
        return len(word.tokens)  # no action at all: the prompt is the row
    return max([k for k in allowed if k <= length], default=allowed[0])  # at least the prompt


# ---------------------------------------------------------------------------------------------------------- population
@dataclass
class Edge:
    """From a policy state by a token to the next policy state (None: the end), with the chance of the replies between."""

    state: int
    token: int
    chance: float
    after: int | None
    answered: bool


def next_policy_states(mdp: TokenMDP) -> np.ndarray:
    """float[S + 1, S]: from each state (the last row: the end), the chance that the next policy state is s'; dense."""
    S = mdp.n_states
    P = np.zeros((S, S))
    arrive = np.zeros((S, S))
    for s in range(S):
        if mdp.is_policy[s]:
            arrive[s, s] = 1.0
            continue
        for a in range(mdp.n_tokens):
            if mdp.ref_logits[s, a] > -math.inf and mdp.next_state[s, a] >= 0:
                P[s, mdp.next_state[s, a]] += math.exp(mdp.ref_logits[s, a])
    return np.vstack([np.linalg.solve(np.eye(S) - P, arrive), np.zeros(S)])


def edges(mdp: TokenMDP, log_policy: np.ndarray) -> list[Edge]:
    reach = next_policy_states(mdp)
    out = []
    for s in range(mdp.n_states):
        for a in range(mdp.n_tokens):
            if not mdp.is_policy[s] or mdp.ref_logits[s, a] == -math.inf or log_policy[s, a] == -math.inf:
                continue
            follow, mu = int(mdp.next_state[s, a]), math.exp(log_policy[s, a])
            answered = follow >= 0 and not mdp.is_policy[follow]
            for after in range(mdp.n_states):
                if reach[follow, after] > 0:
                    out.append(Edge(s, a, mu * reach[follow, after], after, answered))
            missing = 1 - reach[follow].sum()
            if missing > 1e-12:  # the episode's end; chances below that are the rounding of a sum to 1
                out.append(Edge(s, a, mu * missing, None, answered))
    return out


def population_loss(
    mdp: TokenMDP,
    log_policy: np.ndarray,
    logits: np.ndarray,
    *,
    beta: float,
    gamma: float,
    form: str = "shiq",
    step: str = "shifted",
    n_steps: int | None = None,
) -> float:
    """F12 word for word: m1 = E[d + gamma m1'], m2 = E[d^2 + 2 gamma d m1' + gamma^2 m2'], loss = sum of occupancy x m2.

    n_steps: the recursion n times from 0. "turns": nothing is added after an edge where the world answers.
    """
    S = mdp.n_states
    meaning = Meaning(step, beta)
    policy = [s for s in range(S) if mdp.is_policy[s]]
    table, ref = logits.tolist(), mdp.ref_logits.tolist()
    value = {s: meaning.value(table[s], ref[s]) for s in policy}
    moves = edges(mdp, log_policy)
    d = [one_step(step, table[e.state], ref[e.state], e.token, mdp.reward[e.state, e.token],
                  0.0 if e.after is None else value[e.after], beta, gamma) for e in moves]  # fmt: skip
    go = [e.after is not None and not (form == "turns" and e.answered) for e in moves]

    def recursion(rhs: Vector, factor: float) -> np.ndarray:
        """x(s) = E[rhs + factor x(s')]: dense."""
        A, b = np.eye(S), np.zeros(S)
        for e, on, x in zip(moves, go, rhs, strict=True):
            b[e.state] += e.chance * x
            if on:
                A[e.state, e.after] -= factor * e.chance
        return np.linalg.solve(A, b)

    if n_steps is None:
        m1 = recursion(d, gamma)
        m2 = recursion(
            [x**2 + (2 * gamma * x * m1[e.after] if on else 0.0) for e, on, x in zip(moves, go, d, strict=True)], gamma**2
        )
    else:
        m1, m2 = np.zeros(S), np.zeros(S)
        for _ in range(n_steps):
            new1, new2 = np.zeros(S), np.zeros(S)
            for e, on, x in zip(moves, go, d, strict=True):
                new1[e.state] += e.chance * (x + (gamma * m1[e.after] if on else 0.0))
                new2[e.state] += e.chance * (x**2 + (2 * gamma * x * m1[e.after] + gamma**2 * m2[e.after] if on else 0.0))
            m1, m2 = new1, new2
    first = next_policy_states(mdp)[mdp.start]
    if form == "sequence":
        return float(first @ m2)
    flow = np.eye(S)
    for e in moves:
        if e.after is not None:
            flow[e.after, e.state] -= e.chance
    return float(np.linalg.solve(flow, first) @ m2)


def longest_episode(mdp: TokenMDP) -> int | None:
    """Tokens (prompts and replies included) of the longest row; None where loops make them unbounded."""
    table = mdp if mdp.horizon is None else mdp.unroll()
    length = np.zeros(table.n_states + 1, dtype=np.int64)
    for block in blocks(table.next_state, table.allowed & table.reachable[:, None]):
        if block.cyclic:
            return None
        rows = block.states
        edge = table.allowed[rows]
        length[rows] = 1 + np.where(edge, length[table.next_state[rows]], 0).max(1)
    return int(length[table.start])
