"""LP, FQ, WS: the probabilities of what was drawn, against the trainer's numbers and against the frequencies."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from shiq_lab.checks.report import Measured, Skip
from shiq_lab.checks.rollout.protocol import Setting
from shiq_lab.checks.rollout.subject import Pair, Place, Sample, gap

FALSE_ALARM = 1e-9  # of the frequency check, over everything that it compares
LEAST_DRAWS = 200  # after one context: with fewer the frequency bound lets a probability be 0.25 off
VISIBLE = 10  # an update must move some log-prob by so many tolerances, or a stale sampler could not be seen


# -------------------------------------------------------------------------------------------- LP: log-probs agree
def log_probs_agree(pair: Pair) -> Iterator[Measured]:
    """LP: the sampler's log-prob of every sampled token is the trainer's, at every setting."""
    for setting in pair.settings:
        sample = pair.at(setting)
        yield difference(sample, pair, f"sampler's log-prob minus trainer's at {setting}", partial(diagnose, pair, sample))


def difference(sample: Sample, pair: Pair, what: str, explain: Callable[[], str]) -> Measured:
    """The largest |sampler - trainer| of a sample; `explain` is asked where it misses."""
    compared = list(sample.pairs())
    gaps = [gap(theirs, mine) for _, _, theirs, mine in compared]
    tolerance = pair.allowance([x for _, _, *both in compared for x in both])
    worst = max(range(len(gaps)), key=lambda k: gaps[k], default=-1)
    if worst < 0:
        return Measured(what, 0.0, tolerance, 0)
    where, _, theirs, mine = compared[worst]
    detail = f"sampler {theirs:.6g}, trainer {mine:.6g}"
    if not gaps[worst] <= tolerance:
        detail += f"; {sum(not g <= tolerance for g in gaps)} of {len(gaps)} tokens are off"
        reason = explain()
        detail += f"; {reason}" if reason else ""
    return Measured(what, gaps[worst], tolerance, len(gaps), where=sample.place(where), detail=detail)


def diagnose(pair: Pair, sample: Sample) -> str:
    """In words, which other log-probs the sampler's are, or which setting the trainer ignores; "" where neither fits."""
    temperature, top_p = sample.setting
    mine = list(sample.pairs())

    def equal(theirs: list[float], others: list[tuple[Place, int, float, float]]) -> bool:
        """Whether numbers are the trainer's at another setting."""
        pairs = [(a, other[3]) for a, other in zip(theirs, others, strict=True)]
        return all(gap(a, b) <= pair.allowance((a, b)) for a, b in pairs)

    others = {
        Setting(1.0, top_p): f"at temperature 1, cut to top_p {top_p:g}",
        Setting(temperature): f"of the full vocabulary at temperature {temperature:g}",
        Setting(): "of the full vocabulary at temperature 1",
    }
    for setting, words in others.items():
        if setting == sample.setting:
            continue
        other = list(replace(sample, trainer=pair.logprobs(sorted(sample.trainer), setting)).pairs())
        if equal([x[2] for x in mine], other):
            return f"the sampler's are those {words}"
        same = equal([x[3] for x in mine], other)
        if same and setting == Setting(temperature):
            mass = [math.exp(min(m - s, 0.0)) for _, _, s, m in mine]
            kept = f"every ratio is the kept mass, {min(mass):.3g} to {max(mass):.3g}"
            return f"the trainer's are of the full vocabulary, the sampler's are renormalised over the kept tokens: {kept}"
        if same and setting == Setting(1.0, top_p):
            return "the trainer's do not depend on the temperature"
    return ""


# ------------------------------------------------------------------------------------------------ FQ: frequencies
def frequencies_agree(pair: Pair) -> Iterator[Measured]:
    """FQ: tokens are drawn as often as their log-probs say; the exact bound of `evidence`."""
    settings = [s for s in pair.settings if s.top_p == 1 or pair.logprobs_of == "sampled"]
    if not settings:
        raise Skip("log-probs are declared to be of the full vocabulary, and every setting has top_p < 1")
    if len(settings) < len(pair.settings):
        pair.notes.append("FQ: settings with top_p < 1 left out, log-probs are declared to be of the full vocabulary")
    for setting in settings:
        yield from frequencies(pair.at(setting), pair, f"at {setting}", FALSE_ALARM / len(settings))


def frequencies(sample: Sample, pair: Pair, when: str, false_alarm: float) -> Iterator[Measured]:
    """The measurements of FQ on one sample: enough draws, one log-prob a token, the evidence against them."""
    trees = [first_turns(sample, k) for k in range(len(sample.prompts))]
    nodes = [draws for tree in trees for draws in tree.values()]
    most = max(map(len, nodes), default=0)
    if most < LEAST_DRAWS:
        yield Measured(f"draws after one context {when}", most, LEAST_DRAWS, 1, at_least=True, hint="Raise n.")
    seen = [logprob for draws in nodes for _, logprob in draws]
    spread = max(
        (gap(logprob, one[token]) for draws in nodes for one in [dict(draws)] for token, logprob in draws), default=0.0
    )
    what = f"log-probs of one token in one context apart from each other {when}"
    yield Measured(what, spread, pair.allowance(seen), len(seen))
    if not spread <= pair.allowance(seen):
        return  # there is no one probability to hold frequencies against
    worst, where, detail, compared = -1.0, "", "", 0
    for k, tree in enumerate(trees):
        for prefix, what, ratio, text in evidence(tree, false_alarm / len(trees), pair.allowance(seen)):
            compared += 1
            if ratio > worst:
                worst, detail = ratio, text
                where = f"prompt {k}, completion position {len(prefix)} after {list(prefix)}, {what}"
    what = f"evidence that tokens are not drawn with their log-probs {when}, 1 = a false alarm of {false_alarm:.1g}"
    yield Measured(what, worst, 1.0, compared, where=where, detail=detail)


Tree = dict[tuple[int, ...], list[tuple[int, float]]]  # what was said before in the turn -> (token, its log-prob) of every draw


def first_turns(sample: Sample, prompt: int) -> Tree:
    """Every draw of the first turns after one prompt. Later turns depend on replies whose probabilities nobody returned."""
    tree: Tree = {}
    for rollout in sample.rollouts[prompt * sample.n : (prompt + 1) * sample.n]:
        turn = rollout.turns[0]
        for i, (token, logprob) in enumerate(zip(turn.completion, turn.logprobs, strict=True)):
            tree.setdefault(tuple(turn.completion[:i]), []).append((token, logprob))
    return tree


def evidence(tree: Tree, false_alarm: float, slack: float) -> Iterator[tuple[tuple[int, ...], str, float, str]]:
    """(prefix, of what, N kl(k/N, p) over its bound, in words): some ratio is above 1 with probability < false_alarm.

    Of N draws after a prefix, k took a token of probability p. Chernoff: N kl(k/N, p) >= x has probability <= 2 exp(-x).
    With x = ln(2 / w), w = false_alarm 2^-(d+2) P(prefix) p, the w of a depth d add up to at most false_alarm 2^-(d+2), since
    the probabilities of all strings of a length add up to 1: no vocabulary need be known. As much goes to one test more a
    prefix: of the second half of its draws, as many are among the first half's tokens as those tokens' p add up to. It sees
    log-probs that leave out mass which is never drawn, as those do that were taken before top_p.
    """
    chance: dict[tuple[int, ...], float] = {(): 0.0}
    for prefix in sorted(tree, key=len):
        draws, before = tree[prefix], chance.get(prefix, 0.0)
        bound = math.log(2 / false_alarm) + (len(prefix) + 2) * math.log(2) - before
        p: dict[int, float] = {}
        for token, logp in draws:
            p.setdefault(token, math.exp(min(logp, 0.0)) if logp <= slack else 2.0)  # rounding aside, none is positive or NaN
        for token, share in p.items():
            k = sum(token == other for other, _ in draws)
            chance[(*prefix, token)] = before + (math.log(share) if share > 0 else -math.inf)
            yield prefix, f"token {token}", *_exceeds(k, len(draws), share, bound - math.log(share or 1.0))
        half = len(draws) // 2
        common = {token for token, _ in draws[:half]}
        if common:
            k, total = sum(token in common for token, _ in draws[half:]), sum(p[token] for token in common)
            share = min(total, 1.0) if total <= 1 + len(common) * slack else total
            yield prefix, f"any of {sorted(common)}", *_exceeds(k, len(draws) - half, share, bound)


def _exceeds(k: int, N: int, p: float, bound: float) -> tuple[float, str]:
    """N kl(k/N, p) over its bound, and in words."""
    return N * bernoulli_kl(k / N, p) / bound, f"drawn {k} of {N} times ({k / N:.4f}), by log-prob {p:.4f}"


def bernoulli_kl(a: float, p: float) -> float:
    """a ln(a/p) + (1-a) ln((1-a)/(1-p)); inf where p forbids what was seen, or is no probability."""
    if not 0 <= p <= 1:
        return math.inf
    parts = ((a, p), (1 - a, 1 - p))
    if any(x > 0 and y <= 0 for x, y in parts):
        return math.inf
    return max(sum(x * math.log(x / y) for x, y in parts if x > 0), 0.0)


# --------------------------------------------------------------------------------------------- WS: weights arrive
def weights_arrive(pair: Pair, rounds: int = 2) -> Iterator[Measured]:
    """WS: after the trainer moved and the sampler synchronised, what the sampler draws has the new weights' log-probs.

    Twice, since a first synchronisation may be served by start-up alone. Runs last: it leaves the weights moved.
    """
    setting = pair.settings[0]
    for k in range(1, rounds + 1):
        old = pair.draw(setting)
        pair.update()
        moved = pair.logprobs(sorted(old.trainer), setting)
        now = replace(old, trainer=moved)
        change = max((gap(a[3], b[3]) for a, b in zip(old.pairs(), now.pairs(), strict=True)), default=0.0)
        numbers = [x[3] for x in old.pairs()]
        what = f"change of the trainer's own log-probs by update {k}"
        hint = "trainer.update() must move the weights by enough to be seen; nothing else can be said until it does."
        yield Measured(what, change, VISIBLE * pair.allowance(numbers), len(numbers), at_least=True, hint=hint)
        pair.synchronise()
        fresh = pair.draw(setting)
        what = f"sampler's log-prob minus trainer's after update {k} and a synchronisation"
        yield difference(fresh, pair, what, partial(_stale, fresh, old, pair))
        yield from frequencies(fresh, pair, f"after update {k}", FALSE_ALARM / rounds)


def _stale(fresh: Sample, old: Sample, pair: Pair) -> str:
    """Whether the sampler's log-probs are still those of the weights before the update."""
    common = {row: old.trainer[row] for row in fresh.trainer if row in old.trainer}
    gaps = []
    for rollout in fresh.rollouts:
        for turn in rollout.turns:
            before = common.get((*turn.context, *turn.completion))
            if before is not None:
                pairs = zip(turn.logprobs, before[len(turn.context) :], strict=True)
                gaps += [gap(a, b) / pair.allowance([a]) for a, b in pairs]
    return "they are those of the weights before the update" if gaps and max(gaps) <= 1 else ""
