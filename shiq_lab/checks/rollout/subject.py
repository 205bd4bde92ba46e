"""The pair under test: every call of a sampler or trainer, checked for its form, and what was drawn kept for all the checks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from shiq_lab.checks.rollout.protocol import Ids, Rollout, Sampler, Setting, Trainer, TrainingRow, Turn
from shiq_lab.checks.runner import SubjectError
from shiq_lab.errors import is_whole

Place = tuple[int, int, int]  # rollout, turn, position in the completion


@dataclass(frozen=True)
class Sample:
    """Rollouts drawn at one setting, with the trainer's log-probs of the same ids under the weights of that moment."""

    setting: Setting
    prompts: Sequence[Ids]
    n: int
    given: Sequence[Rollout]  # as the sampler returned them: what the trainer is given
    rollouts: Sequence[Rollout]  # the same in plain numbers
    trainer: Mapping[tuple[int, ...], Sequence[float]]  # context + completion: an entry an id

    def pairs(self) -> Iterator[tuple[Place, int, float, float]]:
        """(where, token, the sampler's log-prob, the trainer's) of every sampled token."""
        for r, rollout in enumerate(self.rollouts):
            for t, turn in enumerate(rollout.turns):
                mine = self.trainer[(*turn.context, *turn.completion)][len(turn.context) :]
                for i, token in enumerate(turn.completion):
                    yield (r, t, i), token, turn.logprobs[i], mine[i]

    def place(self, where: Place) -> str:
        """Where a token stands, in words."""
        r, t, i = where
        token = self.rollouts[r].turns[t].completion[i]
        return f"prompt {r // self.n}, rollout {r}, turn {t}, completion position {i}, token {token}"


@dataclass(eq=False)
class Pair:
    """A sampler and a trainer under test; every call goes through here, so that what they raise becomes a verdict."""

    sampler: Sampler
    trainer: Trainer
    prompts: Sequence[Ids]
    settings: Sequence[Setting]
    n: int
    seed: int
    tolerance: float | None
    eps: float
    logprobs_of: str
    notes: list[str] = field(default_factory=list)
    _samples: dict[Setting, Sample] = field(default_factory=dict)
    _calls: int = 0

    def __post_init__(self) -> None:
        self.synchronise()

    def synchronise(self) -> None:
        """Asks the sampler to take over the trainer's weights."""
        _call("sampler.synchronise", self.sampler.synchronise)

    def update(self) -> None:
        """Asks the trainer for an optimiser step."""
        _call("trainer.update", self.trainer.update)

    def at(self, setting: Setting) -> Sample:
        """The sample at a setting under the first weights, drawn once."""
        if setting not in self._samples:
            self._samples[setting] = self.draw(setting)
        return self._samples[setting]

    def draw(self, setting: Setting) -> Sample:
        """A fresh sample."""
        options = {**setting._asdict(), "n": self.n, "seed": self.seed + self._calls}
        self._calls += 1
        given = _call("sampler.generate", lambda: list(self.sampler.generate(self.prompts, **options)))
        if len(given) != self.n * len(self.prompts):
            expected = f"{self.n} for each of {len(self.prompts)} prompts"
            raise SubjectError(f"sampler.generate: expected {expected}, got {len(given)} rollouts")
        rollouts = [_plain_rollout(r, rollout) for r, rollout in enumerate(given)]
        rows = {(*turn.context, *turn.completion) for rollout in rollouts for turn in rollout.turns}
        return Sample(setting, self.prompts, self.n, given, rollouts, self.logprobs(sorted(rows), setting))

    def logprobs(self, rows: Sequence[tuple[int, ...]], setting: Setting) -> dict[tuple[int, ...], Sequence[float]]:
        """The trainer's log-probs of each row under its weights now."""
        ask = lambda: [[float(x) for x in row] for row in self.trainer.logprobs(rows, **setting._asdict())]  # noqa: E731
        found = _call("trainer.logprobs", ask)
        if len(found) != len(rows):
            raise SubjectError(f"trainer.logprobs: expected {len(rows)} rows, got {len(found)}")
        for row, numbers in zip(rows, found, strict=True):
            if len(numbers) != len(row):
                raise SubjectError(
                    f"trainer.logprobs: expected {len(row)} numbers for a row of {len(row)} ids, got {len(numbers)}"
                )
        return dict(zip(rows, found, strict=True))

    @cached_property
    def rows(self) -> list[TrainingRow]:
        """The training rows of the first setting's sample."""
        given = self.at(self.settings[0]).given
        rows = _call("trainer.training_rows", lambda: list(self.trainer.training_rows(given)))
        return [_plain_row(k, row, len(given)) for k, row in enumerate(rows)]

    def allowance(self, logprobs: Sequence[float]) -> float:
        """How far two right computations of a log-prob may be apart.

        Each rounds logits about as large as the log-probs are (their spread is), divides by a temperature, takes a log-sum-exp
        and a difference: 8 eps (8 + max |log-prob|) leaves each of these steps of both an ulp. It holds for stacks whose
        *logits* agree to rounding, as tables do; kernels that differ in a deep network, and half precision, whose rounding
        depends on the level of the logits, need `tolerance`.
        """
        if self.tolerance is not None:
            return self.tolerance
        finite = [abs(x) for x in logprobs if math.isfinite(x)]
        return 8 * self.eps * (8 + max(finite, default=0.0))


def gap(a: float, b: float) -> float:
    """|a - b|, inf where one is not a number."""
    apart = 0.0 if a == b else abs(a - b)
    return math.inf if math.isnan(apart) else apart


def _call(name: str, function: Callable[[], Any]) -> Any:
    """What a method under test returns; what it raises becomes the verdict."""
    try:
        return function()
    except Exception as error:
        raise SubjectError(f"{name} raised {type(error).__name__}: {error}") from error


def _plain_rollout(r: int, rollout: Any) -> Rollout:
    """The same in whole numbers and floats; SubjectError for what is no rollout."""
    if not isinstance(rollout, Rollout) or not rollout.turns:
        raise SubjectError(f"sampler.generate: expected Rollouts of at least one turn, got {rollout!r} as rollout {r}"[:300])
    turns = []
    for t, turn in enumerate(rollout.turns):
        place = f"sampler.generate: rollout {r}, turn {t}"
        if not isinstance(turn, Turn):
            raise SubjectError(f"{place} is a {type(turn).__name__}, expected a Turn")
        if len(turn.completion) != len(turn.logprobs):
            raise SubjectError(f"{place} has {len(turn.logprobs)} log-probs for {len(turn.completion)} sampled ids")
        turns.append(Turn(_ids(place, turn.context), _ids(place, turn.completion), _floats(place, turn.logprobs)))
    return Rollout(turns)


def _plain_row(k: int, row: Any, rollouts: int) -> TrainingRow:
    place = f"trainer.training_rows: row {k}"
    if not isinstance(row, TrainingRow):
        raise SubjectError(f"{place} is a {type(row).__name__}, expected a TrainingRow")
    if not is_whole(row.rollout) or not 0 <= row.rollout < rollouts:
        raise SubjectError(f"{place} belongs to rollout {row.rollout!r} of {rollouts}")
    lengths = {len(x) for x in (row.input_ids, row.completion_mask, row.old_logprobs) if x is not None}
    if len(lengths) != 1:
        raise SubjectError(f"{place} has ids, mask and log-probs of unequal lengths {sorted(lengths)}")
    old = None if row.old_logprobs is None else _floats(place, row.old_logprobs)
    return TrainingRow(row.rollout, _ids(place, row.input_ids), _ids(place, row.completion_mask), old)


def _ids(place: str, ids: Ids) -> tuple[int, ...]:
    if not all(is_whole(token) for token in ids):
        raise SubjectError(f"{place} has ids that are not whole numbers")
    return tuple(map(int, ids))


def _floats(place: str, numbers: Sequence[float]) -> tuple[float, ...]:
    try:
        return tuple(map(float, numbers))
    except (TypeError, ValueError):
        raise SubjectError(f"{place} has log-probs that are not numbers") from None
