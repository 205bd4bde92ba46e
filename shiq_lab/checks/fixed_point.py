"""FP, MT, TE, IN, CV, EG: does the exact optimum stay where it is, and is it where the loss leads?"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from shiq_lab.checks.comparing import expected_gradient, realigned, row_chances, row_gradients, same, spot
from shiq_lab.checks.fixtures import Fixture, Inputs, fixture, fixtures
from shiq_lab.checks.report import Measured, Skip
from shiq_lab.checks.subject import Subject, arrange
from shiq_lab.checks.tolerances import DESCENT, DIFFERENCE, SUMS
from shiq_lab.graph import Floats

Slope = Callable[[Tensor], Tensor]
BIAS = "each row is divided by its own length: right once that is undone, but with rows of unequal length pi* moves"
AT_OPTIMUM = "gradient at the optimum"
CLEAR = 1e-6  # an expected gradient of this share of the usual one is more than float32's rounding
SURE = 1e-3  # share of the usual gradient that a wrong ending must at least give; a bootstrap is worth about 1e-1 of it


def fixed_point(subject: Subject) -> Iterator[Measured]:
    """FP: at the exact optimum the gradient is 0: in a deterministic world for every row, for others in expectation."""
    yield from stationary(subject, ("one turn", "terminal reward", "long rows", "large q / beta"))
    if subject.traits.trains_values and "values" in subject.names:
        yield from critic(subject)


def critic(subject: Subject) -> Iterator[Measured]:
    """The gradient by `values` is 0 at the exact critic, and pulls the value of any one state back that is too high."""
    case = fixture("small" if subject.traits.multi_turn else "one turn", subject.gammas[-1])
    table = case.optimum(subject.traits.readout) if subject.traits.kind == "policy_only" else case.perturbed(1)
    inputs = arrange(subject, case, table)
    chance = row_chances(case, table) if subject.traits.kind == "on_policy" else case.listing.weights
    before = torch.nn.functional.pad(inputs.batch.known_states(), (1, 0), value=-1)[:, :-1]
    acted = inputs.batch.completion_mask == 1

    def pull(values: Tensor) -> Tensor:
        """The expected gradient by the value of every state, float[S]."""
        grad = subject.call(inputs.change(values=values), watch=("values",)).others["values"]
        rows = torch.zeros_like(values) if grad is None else grad.double().cpu()
        state = torch.where(acted, before, case.mdp.n_states).flatten()
        weighted = (chance[: len(rows), None] * rows).flatten()
        return torch.zeros(case.mdp.n_states + 1, dtype=torch.float64).index_add_(0, state, weighted)[:-1]

    states = [int(s) for s in before[acted].unique()]
    raised = {s: pull(inputs.values + (acted & (before == s)).double())[s] for s in states}
    used = {s: x for s, x in raised.items() if x != 0} or raised  # DRO-V reads the first state's value alone
    size = max(float(abs(x)) for x in raised.values())
    bound = SUMS * subject.eps * inputs.size
    at = float(pull(inputs.values).abs().max())
    hint = "The critic's target, sign or detach is wrong: it is not pulled to the exact value."
    yield Measured(
        "gradient by values at the exact critic", at / size if size else torch.nan, bound, len(states), case.name, hint=hint
    )
    worst = min(used, key=lambda s: float(used[s]))
    what = "pull on a state's value that is 1 too high, as a share of the largest"
    share = float(used[worst]) / size if size else 0.0
    yield Measured(what, share, SURE, len(used), case.name, case.mdp.place(worst), at_least=True, hint=hint)


def multi_turn(subject: Subject) -> Iterator[Measured]:
    """MT: the same with observation tokens between actions; and more observation tokens change nothing."""
    if not subject.traits.multi_turn:
        raise Skip("declared: multi_turn=False")
    yield from stationary(subject, ("small",) if subject.grouped else ("two turns",))
    yield from longer_observations(subject)
    if subject.traits.random_world or subject.traits.kind == "on_policy":
        for case in fixtures(("random tool",), subject.gammas):
            yield vanishing(subject, case, *_expected(subject, case, case.optimum(subject.traits.readout)))


def stationary(subject: Subject, names: tuple[str, ...]) -> Iterator[Measured]:
    """The gradient at the optimum over the gradient one unit of logits away from it, on each fixture."""
    for case in fixtures(names, subject.gammas):
        optimum = case.optimum(subject.traits.readout)
        if subject.traits.kind == "on_policy":
            yield vanishing(subject, case, *_expected(subject, case, optimum))
            continue
        at, away = (settled(subject, case, table) for table in (optimum, case.perturbed(2, optimum)))
        rows = arrange(subject, case, optimum) if subject.traits.kind != "policy_only" else None
        yield vanishing(subject, case, at, away, rows=rows)


def settled(subject: Subject, case: Fixture, table: Floats, batch: object = None) -> Tensor:
    """The gradient that must vanish entry by entry: of every row, of every pair in both orders, of every prompt's rows."""
    inputs = arrange(subject, case, table, batch)
    if inputs.reverse is not None:
        assert inputs.pair_weights is not None
        grad = inputs.pair_weights[:, None, None] * subject.call(inputs).grad
        half = len(inputs.reverse)
        return grad[:half] + grad[half:][inputs.reverse]
    return row_gradients(subject, inputs)


def vanishing(
    subject: Subject, case: Fixture, at: Tensor, away: Tensor, label: str = AT_OPTIMUM, rows: Inputs | None = None
) -> Measured:
    """max|gradient at l*| over max|gradient one unit away|: rounding of the logits is all that may be left."""
    size = float(away.abs().max())
    axes = ("row", "position", "token") if at.ndim == 3 else ("state", "token")
    gap, where = spot(at.abs() / size if size > 0 else torch.full_like(at, torch.nan), rows, axes=axes)
    if size == 0:
        where = "the gradient is 0 away from it too: nothing that the loss reads there depends on the logits"
    bound = SUMS * subject.eps * case.inputs(case.optimum(subject.traits.readout)).size
    if at.ndim == 2 and where.startswith("state"):
        where = case.mdp.place(*[int(i) for i in np.unravel_index(int(at.abs().argmax()), at.shape)])
    return Measured(label, gap, bound, at.numel(), case.name, where)


def _expected(subject: Subject, case: Fixture, table: Floats) -> tuple[Tensor, Tensor]:
    """Expected gradients at a table and one unit away; of a mean over each row's tokens, with that mean undone."""
    away = case.perturbed(2, table)
    pair = lambda per: (  # noqa: E731
        expected_gradient(subject, case, table, per_token=per),
        expected_gradient(subject, case, away, per_token=per),
    )
    both = [pair(per) for per in ways(subject)]
    ratio = [float(at.abs().max() / off.abs().max().clamp(min=1e-300)) for at, off in both]
    best = len(ratio) - 1 if ratio[-1] < 0.1 * ratio[0] and ratio[0] > CLEAR else 0
    if ways(subject)[best] and BIAS not in subject.notes:
        subject.notes.append(BIAS)
    return both[best]


def ways(subject: Subject) -> tuple[bool, ...]:
    """Whether a row's gradient may be divided by its length: as declared, or either."""
    declared = subject.traits.reduction
    return (False, True) if declared is None else (declared == "mean of row means",)


def longer_observations(subject: Subject) -> Iterator[Measured]:
    """Two more observation tokens in every reply, with garbage in their place, must change nothing."""
    for case in fixtures(("two turns",), subject.gammas[-1:]):
        inputs = subject.plain(case)
        action = inputs.batch.completion_mask == 1
        B, L = action.shape
        position = torch.arange(L).expand(B, L)
        last = torch.where(action, position, -1).amax(1, keepdim=True)
        seen = action.cumsum(1) > 0
        gap = ~action & seen & (position < last) & (inputs.batch.attention_mask == 1)
        o = torch.where(gap, position, L).amin(1, keepdim=True)
        j = torch.arange(L + 2).expand(B, L + 2)
        source = torch.where(j < o, j, torch.where(j < o + 2, torch.where(o < L, -2, -1), j - 2))
        wide = subject.call(inputs.rearranged(source, junk=3.0))
        back, fallen = realigned(wide.grad, source, L)
        want = subject.call(inputs)
        yield from same(subject, replace(wide, grad=back), want, inputs, "two more observation tokens a reply")
        worst, where = spot(fallen.abs())
        yield Measured("gradient on observation tokens", worst, 0.0, fallen.numel(), case.name, where)


# ------------------------------------------------------------------------------------------------------ endings
def endings(subject: Subject) -> Iterator[Measured]:
    """TE: cut rows bootstrap, ended rows do not: at the optimum the first vanish, and calling them ended must not."""
    if not subject.traits.cut_rows and not (subject.traits.kind == "trajectory" and reads_endings(subject)):
        raise Skip("the loss does not bootstrap cut rows (trait cut_rows)")
    names = ("one turn", "two turns", "long rows") if subject.traits.multi_turn else ("one turn", "long rows")
    for case in fixtures(names, subject.gammas):
        optimum, batch = case.optimum(subject.traits.readout), case.cut_rows()
        at = settled(subject, case, optimum, batch)
        away = settled(subject, case, case.perturbed(2, optimum), batch)
        rows = arrange(subject, case, optimum, batch)
        yield vanishing(subject, case, at, away, "cut rows: gradient at the optimum", rows)
        ended = replace(batch, terminated=torch.ones_like(batch.terminated))
        wrong = settled(subject, case, optimum, ended)
        gap, where = spot(wrong.abs() / away.abs().max(), rows)
        what = "cut rows called terminated: gradient at the optimum"
        yield Measured(what, gap, SURE, wrong.numel(), case.name, where, at_least=True, hint="`terminated` is ignored.")
        real = case.listing
        mixed = arrange(subject, case, case.perturbed(4), batch)
        lone = mixed.change(terminated=mixed.batch.terminated & (torch.arange(len(real)) % 2 == 0)[: len(mixed.batch)])
        kept = (lone.batch.terminated == mixed.batch.terminated)[:, None, None]
        change = torch.where(kept, subject.call(lone).grad - subject.call(mixed).grad, 0.0)
        gap, where = spot(change.abs() / away.abs().max(), mixed)
        yield Measured(
            "a row's ending changes another row", gap, SUMS * subject.eps * mixed.size, change.numel(), case.name, where
        )


def reads_endings(subject: Subject) -> bool:
    """Whether `terminated` changes the gradient of cut rows: then the loss means to bootstrap them."""
    case = fixture("one turn", subject.gammas[-1])
    inputs = arrange(subject, case, case.perturbed(4), case.cut_rows())
    ended = inputs.change(terminated=torch.ones_like(inputs.batch.terminated))
    return not torch.equal(subject.call(inputs).grad, subject.call(ended).grad)


# ----------------------------------------------------------------------------------------- model = reference
def at_reference(subject: Subject) -> Iterator[Measured]:
    """IN: without rewards the reference is the optimum; at model = reference nothing depends on what the reference is."""
    names = ("one turn", "small") if subject.traits.multi_turn else ("one turn",)
    for plain in fixtures(names, subject.gammas):
        mdp = replace(plain.mdp, reward=np.zeros_like(plain.mdp.reward))
        case = Fixture(f"{plain.name}, rewards 0", mdp, plain.beta, plain.gamma)
        start = case.optimum(subject.traits.readout)
        if subject.traits.kind == "on_policy":
            yield vanishing(subject, case, *_expected(subject, case, start), "gradient at model = reference, rewards 0")
        else:
            at, away = settled(subject, case, start), settled(subject, case, case.perturbed(2, start))
            rows = arrange(subject, case, start) if subject.traits.kind != "policy_only" else None
            yield vanishing(subject, case, at, away, "gradient at model = reference, rewards 0", rows)
        if subject.traits.readout == "shifted" and not subject.traits.semi_gradient:
            yield _ratio_one(subject, plain)
    if subject.traits.kind == "on_policy" and "behavior_logprobs" in subject.names:
        yield _behavior_matters(subject)


def _behavior_matters(subject: Subject) -> Measured:
    """Rows of another policy: a loss that asks for behavior_logprobs must weigh them by the ratio."""
    case = fixture("one turn", subject.gammas[-1])
    table = case.perturbed(1)
    own = arrange(subject, case, table)
    other = case.inputs(table, behavior=case.policy(case.perturbed(1, table, 0.05)))  # near enough to stay inside any clip
    away = own.change(behavior_logprobs=other.behavior_logprobs[: len(own.batch)])
    one, two = subject.call(own), subject.call(away)
    moved = float((one.grad - two.grad).abs().max() / one.grad.abs().max().clamp(min=1e-300))
    note = "clipping of ratios is compared only with like="
    if subject.like is None and note not in subject.notes:
        subject.notes.append(note)
    what = "change of the gradient with other behavior_logprobs"
    hint = "The ratio is taken to the policy's own log-probs: rows of another policy are not corrected."
    return Measured(what, moved, SURE, one.grad.numel(), case.name, at_least=True, hint=hint)


def _ratio_one(subject: Subject, case: Fixture) -> Measured:
    """The loss at model = reference for two references: the ratio is 1 and the KL 0 for both, so the values are the same."""
    one, two = (subject.plain(case, case.perturbed(seed)) for seed in (5, 6))
    found = [subject.value(i.change(ref_logits=i.logits)) for i in (one, two)]
    gap = abs(found[0] - found[1]) / max(1.0, abs(found[0]))
    seen = f"loss {found[0]:.6g} and {found[1]:.6g}"
    bound = SUMS * subject.eps * one.size
    return Measured("loss at model = reference, for two references", gap, bound, 1, case.name, detail=seen)


# --------------------------------------------------------------------------------------------------- convergence
def convergence(subject: Subject) -> Iterator[Measured]:
    """CV: the optimum is identified (rank and signs of the gradient's Jacobian there), and descent from l_ref finds it."""
    case = fixture("small" if subject.traits.multi_turn else "terminal reward", subject.gammas[-1])
    optimum = case.optimum(subject.traits.readout)
    live = torch.from_numpy(case.mdp.allowed & (case.mdp.is_policy & case.mdp.reachable)[:, None])
    per = best_way(subject, case, optimum)

    def slope(table: Tensor) -> Tensor:
        return expected_gradient(subject, case, table.numpy(), per_token=per)[live]

    yield from identified(subject, case, torch.from_numpy(optimum), live, slope)
    yield descent(subject, case, torch.from_numpy(optimum), live, slope)


def best_way(subject: Subject, case: Fixture, optimum: Floats) -> bool:
    """Whether undoing a mean over each row's tokens is what makes the expected gradient vanish (on-policy losses alone)."""
    if subject.traits.kind != "on_policy":
        return False
    size = {per: float(expected_gradient(subject, case, optimum, per_token=per).abs().max()) for per in ways(subject)}
    return min(size, key=lambda per: size[per])


def identified(subject: Subject, case: Fixture, optimum: Tensor, live: Tensor, slope: Slope) -> Iterator[Measured]:
    """Eigenvalues of the Jacobian of the expected gradient at l*: none negative, and zero only along levels."""
    h = subject.eps ** (1 / 3)
    columns = []
    for state, token in live.nonzero().tolist():
        move = torch.zeros_like(optimum)
        move[state, token] = h
        columns.append((slope(optimum + move) - slope(optimum - move)) / (2 * h))
    jacobian = torch.stack(columns, 1)
    if not torch.isfinite(jacobian).all():
        what = "slopes of the gradient at the optimum that are not finite"
        odd = float((~torch.isfinite(jacobian)).sum())
        yield Measured(what, odd, 0.0, jacobian.numel(), case.name, hint="A root or a logarithm of something that is 0 there.")
        return
    size = float(jacobian.abs().max())
    floor = DIFFERENCE * subject.eps ** (2 / 3)
    values = torch.linalg.eigvals(jacobian / size if size > 0 else jacobian)
    rank = int((torch.linalg.svdvals(jacobian) / max(size, 1e-300) > floor).sum())
    states = int(live.any(1).sum())
    roots = int((_first_states(case)).sum())
    free = {"bellman": 0, "trajectory": states - roots}.get(subject.traits.kind, states)
    detail = f"rank {rank} of {len(jacobian)}, {free} levels may be free"
    missing = "Some logits are not identified: the data's level, a token or a state does not enter the loss."
    yield Measured(
        "directions that the loss leaves free",
        len(jacobian) - rank,
        free,
        len(jacobian),
        case.name,
        detail=detail,
        hint=missing,
    )
    if not subject.traits.semi_gradient or subject.traits.kind == "on_policy":
        worst = float(-values.real.min())
        wrong = "The optimum is a maximum or a saddle of the loss: a sign."
        yield Measured("most negative curvature at the optimum", max(worst, 0.0), floor, len(jacobian), case.name, hint=wrong)


def _first_states(case: Fixture) -> np.ndarray:
    """bool[S]: policy states where a row's first action is chosen."""
    batch = case.listing
    first = (batch.completion_mask == 1).long().argmax(1)
    at = batch.known_states()[torch.arange(len(batch)), first - 1]
    out = np.zeros(case.mdp.n_states, dtype=bool)
    out[at.numpy()] = True
    return out


def descent(subject: Subject, case: Fixture, optimum: Tensor, live: Tensor, slope: Slope, steps: int = 250) -> Measured:
    """Adam with a decaying step from the reference; the distance to what the kind fixes, as a share of that at the start."""
    table = torch.from_numpy(case.reference()).clone()
    start = distance(subject, case, table, optimum, live)
    mean, square = torch.zeros(int(live.sum()), dtype=table.dtype), torch.zeros(int(live.sum()), dtype=table.dtype)
    for k in range(1, steps + 1):
        g = slope(table)
        if not torch.isfinite(g).all():
            return Measured("distance to the optimum after descent", torch.nan, DESCENT, 1, case.name, f"step {k}")
        mean, square = 0.9 * mean + 0.1 * g, 0.99 * square + 0.01 * g**2
        step = (mean / (1 - 0.9**k)) / ((square / (1 - 0.99**k)).sqrt() + 1e-12 * g.abs().max() + 1e-300)
        table[live] -= 0.25 * (1 - (k - 1) / steps) * step
    end = distance(subject, case, table, optimum, live)
    seen = f"distance {end:.3g}, at the reference {start:.3g}"
    return Measured(
        "distance to the optimum after descent, of that before", end / start, DESCENT, int(live.sum()), case.name, detail=seen
    )


def distance(subject: Subject, case: Fixture, table: Tensor, optimum: Tensor, live: Tensor) -> float:
    """Largest error in what the kind fixes: every logit; probabilities and the first states' levels; probabilities."""
    if subject.traits.kind == "bellman":
        return float((table - optimum)[live].abs().max())
    there, here = (torch.where(live, t, -torch.inf) for t in (optimum, table))
    rows = live.any(1)
    gap = (here.softmax(1) - there.softmax(1))[live].abs().max()
    level = (here.logsumexp(1) - there.logsumexp(1))[rows & torch.from_numpy(_first_states(case))].abs().max()
    return float(torch.maximum(gap, level) if subject.traits.kind == "trajectory" else gap)


# ------------------------------------------------------------------------------------------- expected gradients
def policy_gradient(subject: Subject) -> Iterator[Measured]:
    """EG: on its own data an on-policy loss's expected gradient is that of -J, exactly, up to a positive factor."""
    if subject.traits.kind != "on_policy":
        raise Skip("only on-policy losses have the gradient of J as their expected gradient")
    names = ("one turn", "small", "random tool") if subject.traits.multi_turn else ("one turn", "terminal reward")
    for case in fixtures(names, subject.gammas):
        for seed in (1, 2):
            table = case.perturbed(seed)
            want = objective_gradient(case, table)
            tries = [(expected_gradient(subject, case, table, per_token=per), per) for per in ways(subject)]
            yield min((_direction(subject, case, got, want, table) for got, _ in tries), key=lambda m: m.badness)


def objective_gradient(case: Fixture, table: Floats) -> Tensor:
    """-dJ/dl by listing every row: J = sum_y P(y) sum_t gamma^t (r_t - beta ln(pi/pi_ref)): float[S, V]."""
    leaf = torch.from_numpy(table).requires_grad_()
    batch = case.listing
    before = torch.nn.functional.pad(batch.known_states(), (1, 0), value=case.mdp.start)[:, :-1].clamp(min=0)
    allowed = torch.from_numpy(np.array(case.mdp.allowed))
    live = torch.where(allowed, leaf, -torch.inf).log_softmax(1)
    chosen = batch.completion_mask == 1
    real = batch.attention_mask == 1
    environment = torch.from_numpy(np.array(case.mdp.ref_log_policy))[before, batch.input_ids]
    logp, ref = live[before, batch.input_ids], environment
    chance = torch.where(chosen, logp, torch.where(real, environment, 0.0)).sum(1).exp()
    time = (chosen.cumsum(1) - 1).clamp(min=0).double()  # an integer exponent would make it float32
    paid = torch.where(
        chosen, batch.rewards - case.beta * (torch.where(chosen, logp, 0.0) - torch.where(chosen, ref, 0.0)), 0.0
    )
    objective = (chance * (case.gamma**time * paid).sum(1)).sum()
    (grad,) = torch.autograd.grad(-objective, leaf)
    return torch.where(allowed & torch.from_numpy(np.array(case.mdp.is_policy))[:, None], grad, 0.0)


def _direction(subject: Subject, case: Fixture, got: Tensor, want: Tensor, table: Floats) -> Measured:
    factor = float((got * want).sum() / (want * want).sum())
    size = float(got.abs().max())
    gaps = (got - factor * want).abs() / size if size > 0 and factor > 0 else torch.full_like(got, torch.inf)
    gap, _ = spot(gaps, axes=("state", "token"))
    at = [int(i) for i in np.unravel_index(int(gaps.argmax()), gaps.shape)]
    seen = f"best factor {factor:.3g}" + ("" if factor > 0 else ": it must be positive")
    bound = SUMS * subject.eps * case.inputs(table).size
    return Measured(
        "expected gradient against that of -J", gap, bound, got.numel(), case.name, case.mdp.place(*at), detail=seen
    )
