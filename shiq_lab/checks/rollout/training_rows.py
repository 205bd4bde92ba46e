"""TP, ID, AL: from the turns that were sampled to the rows that are trained on."""

from collections.abc import Iterator, Mapping, Sequence

from shiq_lab.checks.report import Measured, Skip
from shiq_lab.checks.rollout.protocol import Ids, TrainingRow, Turn
from shiq_lab.checks.rollout.subject import Pair, gap


def turns_are_prefixes(pair: Pair) -> Iterator[Measured]:
    """TP: the first context is the prompt, and every context starts with the whole turn before it, id by id."""
    for setting in pair.settings[:1]:
        sample = pair.at(setting)
        broken, compared, where, detail = 0, 0, "", ""
        for r, rollout in enumerate(sample.rollouts):
            before: list[int] = [int(x) for x in sample.prompts[r // sample.n]]
            for t, turn in enumerate(rollout.turns):
                context = list(turn.context)
                ok = context[: len(before)] == before and (t > 0 or len(context) == len(before))
                compared += 1
                if not ok:
                    if not broken:
                        where, detail = f"prompt {r // sample.n}, rollout {r}, turn {t}", first_difference(before, context)
                    broken += 1
                before = [*context, *turn.completion]
        what = "turns whose context does not continue what came before"
        yield Measured(what, broken, 0, compared, where=where, detail=detail)


def first_difference(expected: Ids, got: Ids) -> str:
    """Where two lists of ids part, in words."""
    for i, (a, b) in enumerate(zip(expected, got, strict=False)):
        if a != b:
            return f"position {i}: expected id {a}, got {b} ({len(expected)} ids against {len(got)})"
    return f"one ends after {min(len(expected), len(got))} ids: {len(expected)} against {len(got)}"


def sampled_ids_are_trained(pair: Pair) -> Iterator[Measured]:
    """ID: under the masks stand the sampled ids, all of them, each behind the ids that it was sampled after."""
    rollouts = pair.at(pair.settings[0]).rollouts
    rows: dict[int, list[TrainingRow]] = {}
    for row in pair.rows:
        rows.setdefault(row.rollout, []).append(row)
    wrong, compared, where, detail = 0, 0, "", ""
    for r, rollout in enumerate(rollouts):
        sampled = [(turn, i) for turn in rollout.turns for i in range(len(turn.completion))]
        trained = [(row, i) for row in rows.get(r, []) for i, on in enumerate(row.completion_mask) if on]
        bad_here = [k for k, (s, t) in enumerate(zip(sampled, trained, strict=False)) if not _same_history(*s, *t)]
        missing = abs(len(sampled) - len(trained))
        compared += max(len(sampled), len(trained))
        if (bad_here or missing) and not wrong:
            where, detail = f"rollout {r}", f"{len(trained)} ids trained, {len(sampled)} sampled"
            if bad_here:
                (turn, i), (row, j) = sampled[bad_here[0]], trained[bad_here[0]]
                where += f", position {j} of the training row"
                expected = [*turn.context, *turn.completion[: i + 1]]
                detail += f"; {first_difference(expected, row.input_ids[: j + 1])}"
        wrong += len(bad_here) + missing
    yield Measured("ids trained on that are not the ids sampled", wrong, 0, compared, where=where, detail=detail)


def _same_history(turn: Turn, i: int, row: TrainingRow, j: int) -> bool:
    """Id i of a turn is id j of a row, and all before it is the same."""
    return tuple(row.input_ids[: j + 1]) == (*turn.context, *turn.completion[: i + 1])


def logprobs_are_aligned(pair: Pair) -> Iterator[Measured]:
    """AL: under the masks the old log-probs are the trainer's own of the same ids, so every ratio is 1 at step 0."""
    rows = [row for row in pair.rows if row.old_logprobs is not None]
    if not rows:
        raise Skip("no training row carries old log-probs: the trainer recomputes them")
    setting = pair.settings[0]
    mine = pair.logprobs(sorted({tuple(row.input_ids) for row in rows}), setting)
    gaps: list[tuple[float, int, int]] = []
    zeros, numbers = 0, []
    for k, row in enumerate(rows):
        now = mine[tuple(row.input_ids)]
        for i, on in enumerate(row.completion_mask):
            if on:
                old = row.old_logprobs[i]  # type: ignore[index]
                gaps.append((gap(old, now[i]), k, i))
                zeros += old == 0.0 and gap(old, now[i]) > 0
                numbers += [old, now[i]]
    tolerance = pair.allowance(numbers)
    what = f"old log-prob minus trainer's on the training rows at {setting}, before any update"
    if not gaps:
        yield Measured(what, 0.0, tolerance, 0)
        return
    worst, k, i = max(gaps)
    row, now = rows[k], mine[tuple(rows[k].input_ids)]
    detail = f"old {row.old_logprobs[i]:.6g}, trainer {now[i]:.6g}"  # type: ignore[index]
    if not worst <= tolerance:
        detail += f"; {sum(not g <= tolerance for g, _, _ in gaps)} of {len(gaps)} are off, {zeros} of them exactly 0"
        shift = _shift(rows, mine, tolerance)
        detail += f"; moved {abs(shift)} to the {'right' if shift > 0 else 'left'} they would fit" if shift else ""
    where = f"rollout {row.rollout}, position {i} of the training row, token {row.input_ids[i]}"
    yield Measured(what, worst, tolerance, len(gaps), where=where, detail=detail)


def _shift(rows: Sequence[TrainingRow], mine: Mapping[tuple[int, ...], Sequence[float]], tolerance: float) -> int:
    """By how many positions the old log-probs would have to move to fit everywhere that still has one; 0 for no such."""
    for shift in (1, -1):
        gaps = []
        for row in rows:
            mask, now, old = row.completion_mask, mine[tuple(row.input_ids)], row.old_logprobs
            inside = [i for i, on in enumerate(mask) if on and 0 <= i - shift < len(mask) and mask[i - shift]]
            gaps += [gap(old[i - shift], now[i]) for i in inside]  # type: ignore[index]
        if gaps and max(gaps) <= tolerance:
            return shift
    return 0
