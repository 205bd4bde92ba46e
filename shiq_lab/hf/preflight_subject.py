"""What preflight looks at: a run's own model, tokenizer, template, data and settings, and at most a few rows of the data.

Bounds come from the arithmetic: logits of size |l| are off by noise = C u |l| sqrt(2 layers), u the unit of rounding, and a
residual over T actions by beta noise sqrt(2 T). A count of wrong things must be 0.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from shiq_lab.checks.report import Measured, Skip
from shiq_lab.checks.tolerances import EPS, SUMS
from shiq_lab.hf.collator import token_batch
from shiq_lab.hf.formats import to_rows
from shiq_lab.hf.heads import core
from shiq_lab.hf.reference import Reference
from shiq_lab.hf.rows import Row, cut_row
from shiq_lab.hf.run import Job
from shiq_lab.hf.trainer import ShiQTrainer, vocabulary_of
from shiq_lab.losses.shiq import residuals_of

FEW = 4  # rows of the checks that need gradients of the weights
HALF, FULL = 2, 8  # roundings of a sub-layer that a bound allows for; seen in SmolLM2: 0.7 in bfloat16, 2.1 in float32
SAMPLED = 2048  # entries of each weight's gradient that are compared, beside its norm


class Pick(NamedTuple):
    """A chosen row as the run trains on it, the same before max_length, its example, and which answer of a pair it is."""

    row: Row
    whole: Row
    example: Mapping[str, Any]
    side: int


class Subject:
    """A job, the rows chosen from its data, and its trainer on them; a check that cannot be asked raises Skip here."""

    def __init__(self, job: Job, most: int = 16) -> None:
        self.job, self.args, self.model = job, job.args, job.model
        self.notes: list[str] = []
        self.rng = np.random.default_rng(job.args.seed)
        self.vocabulary = vocabulary_of(job.model)
        self.data_fault = self.start_fault = ""
        self.amp = True  # whether the run's autocast, if it has one, is on
        self.all_rows: list[Row] = []
        self.picks: list[Pick] = []
        try:
            self._choose(most)
        except ValueError as error:
            self.data_fault = str(error)

    def _choose(self, most: int) -> None:
        args, examples = self.args, list(self.job.train)
        more: dict[str, Any] = {"tokenizer": self.job.tokenizer, "vocabulary": self.vocabulary, "name": "train_dataset"}
        self.all_rows = to_rows(examples, max_length=args.max_length, **more | {"on_long": args.on_long})
        whole = self.all_rows if args.max_length is None else to_rows(examples, **more)
        self.whole_rows, limit = whole, args.max_length or math.inf
        fits = lambda row: len(row) <= limit or (args.on_long == "cut" and cut_row(row, int(limit)) is not None)  # noqa: E731
        source = [i for i, row in enumerate(whole) if fits(row)]
        per = len(whole) // len(examples)  # two of a preference pair
        self.chosen = choose(self.all_rows, most, self.rng)
        self.picks = [
            Pick(self.all_rows[i], whole[source[i]], examples[source[i] // per], source[i] % per) for i in self.chosen
        ]
        self.notes.append(
            f"{len(self.picks)} of {len(self.all_rows)} rows, {min(map(len, self.rows))} to {max(map(len, self.rows))} tokens"
        )

    @property
    def rows(self) -> list[Row]:
        """The rows looked at; a Skip where the data make none."""
        if not self.picks:
            raise Skip("the data make no rows: see DATA")
        return [pick.row for pick in self.picks]

    @cached_property
    def _trainer(self) -> ShiQTrainer | None:
        try:
            rows: Any = self.rows
            return ShiQTrainer(self.model, self.args, rows, ref_model=self.job.ref_model, processing_class=self.job.tokenizer)
        except ValueError as error:
            self.start_fault = str(error)
            return None

    @property
    def trainer(self) -> ShiQTrainer:
        """The run's own trainer on these rows; a Skip where there is none."""
        if not self.picks or self._trainer is None:
            raise Skip("there is no trainer: see DATA" if not self.picks else "there is no trainer: see START")
        return self._trainer

    # --------------------------------------------------------------------------------------------- what a run computes
    @property
    def few(self) -> list[int]:
        """The shortest rows, by number."""
        return sorted(range(len(self.rows)), key=lambda i: len(self.rows[i]))[:FEW]

    @contextlib.contextmanager
    def settings(self, **other: Any) -> Iterator[None]:
        """Other settings of the batch for a while."""
        before = {name: getattr(self.args, name) for name in other}
        try:
            for name, value in other.items():
                setattr(self.args, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(self.args, name, value)

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """The run's own: training mode, its autocast. Without gradient unless the caller switches it on."""
        self.trainer.model.train()
        with self.trainer.accelerator.autocast() if self.amp else contextlib.nullcontext():
            yield

    def collated(self, numbers: Sequence[int], rows: Mapping[int, Row] | None = None) -> dict[str, Tensor]:
        """The trainer's own tensors of some rows; `group_ids` says which. Other rows may stand in for them, longer ones too."""
        data, items = self.trainer.train_dataset, []
        for i in numbers:
            item = dict(data[i])
            row = self.rows[i] if rows is None else rows[i]
            item |= {"row": replace(row, group=i), "length": len(row)}
            if "reference" in item:
                item["reference"] = _fitted(item["reference"], len(row) - 1)
            items.append(item)
        return self.trainer._prepare_inputs(self.trainer.collate(items))

    def look(
        self, numbers: Sequence[int] | None = None, rows: Mapping[int, Row] | None = None,
        change: Callable[[dict[str, Tensor]], None] = lambda inputs: None, **settings: Any,
    ) -> dict[int, Tensor]:  # fmt: skip
        """Of each row, float64[5, T] at its actions: token logit and log-sum-exp of policy and of reference, and rho."""
        numbers, size = range(len(self.rows)) if numbers is None else numbers, max(2, self.args.per_device_train_batch_size)
        found: dict[int, Tensor] = {}
        with self.settings(**settings), torch.no_grad(), self.arithmetic():
            for begin in range(0, len(numbers), size):
                inputs = self.collated(numbers[begin : begin + size], rows)
                change(inputs)
                found |= self._numbers(inputs)
        return found

    def _numbers(self, inputs: dict[str, Tensor]) -> dict[int, Tensor]:
        batch = token_batch(inputs)
        stats, ref = self.trainer.both_statistics(self.trainer.model, batch, inputs)
        rho, actions = residuals_of(
            self.args.method.step, stats, ref, batch, self.args.beta, self.args.gamma, self.args.steps_ahead
        )
        four = [actions.of(x) for x in (stats.token_logit, stats.logsumexp, ref.token_logit, ref.logsumexp)]
        table = torch.stack([x.double() for x in (*four, rho)]).cpu()  # (5, B, T)
        segment, group = actions.segment.cpu(), batch.group_ids.cpu()
        owner = group.reshape(len(batch), -1).gather(1, segment.clamp(min=0))
        return {int(i): table[:, (owner == i) & (segment >= 0)] for i in owner[segment >= 0].unique()}

    @cached_property
    def base(self) -> dict[int, Tensor]:
        """Every chosen row as the run sees it before its first step."""
        found = self.look()
        if {i: x.shape[1] for i, x in found.items()} != {i: sum(row.completion_mask) for i, row in enumerate(self.rows)}:
            raise Skip("the batch does not hold the rows: see BATCH")
        return found

    # --------------------------------------------------------------------------------------------------------- bounds
    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in: autocast's dtype, else its weights'."""
        weights = next(p for p in self.model.parameters() if p.is_floating_point()).dtype
        named = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.trainer.accelerator.mixed_precision)
        return named if self.amp and named is not None and weights == torch.float32 else weights

    @cached_property
    def largest(self) -> float:
        """max |l| over the chosen tokens and log-sum-exps."""
        return max(1.0, *(float(x[:4].abs().max()) for x in self.base.values()))

    @property
    def depth(self) -> float:
        """sqrt(2 layers): every sub-layer of a transformer adds a rounding of its own, and independent ones add in squares."""
        config = getattr(core(self.model), "config", None)
        return math.sqrt(2 * (getattr(config, "num_hidden_layers", None) or 1))

    @property
    def rounding(self) -> float:
        """Relative error of a hidden state: half precision is summed in float32 and rounded once, others round every term."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        return (HALF if half else FULL) * EPS[str(self.dtype).removeprefix("torch.")] / 2 * self.depth

    @property
    def noise(self) -> float:
        """By how much a logit or a log-sum-exp may be off."""
        return self.rounding * self.largest

    def rho_bound(self, i: int) -> float:
        """By how much a residual of row i may be off: T log-ratios of two numbers each, and T rewards in float32."""
        paid, T = max(map(abs, self.rows[i].rewards)), sum(self.rows[i].completion_mask)
        return math.sqrt(2 * T) * self.args.beta * self.noise + SUMS * EPS["float32"] * T * paid

    def slack(self, numbers: Sequence[int]) -> float:
        """The same for gradients, relative: 2 beta D carries the residuals' error, the backward pass its own roundings."""
        size = torch.cat([self.base[i][4] for i in numbers]).square().mean().sqrt().item()
        if size == 0:
            raise Skip("every residual of these rows is 0")
        return 2 * self.rounding + max(map(self.rho_bound, numbers)) / size

    def compare(self, what: str, other: Mapping[int, Tensor]) -> Iterator[Measured]:
        """Statistics and residuals of the same rows, seen otherwise, against `base`."""
        stats = {i: ((x[:2] - self.base[i][:2]).abs().amax(0), self.noise) for i, x in other.items()}
        rho = {i: ((x[4] - self.base[i][4]).abs(), self.rho_bound(i)) for i, x in other.items()}
        yield self.worst(f"{what}: change of a token's two numbers", stats)
        yield self.worst(f"{what}: change of a residual rho", rho)

    def worst(self, what: str, found: Mapping[int, tuple[Tensor, float]]) -> Measured:
        """The entry that is worst against its row's bound; `found`: row -> (deviations at its actions, bound)."""
        compared = sum(x.numel() for x, _ in found.values())
        if not compared:
            return Measured(what, math.nan, 0.0, 0)
        ratio = {i: float((x / bound).nan_to_num(math.inf).max()) for i, (x, bound) in found.items() if x.numel()}
        i = max(ratio, key=lambda k: ratio[k])
        x, bound = found[i]
        k = int(x.nan_to_num(math.inf).argmax())
        place = [p for p, own in enumerate(self.rows[i].completion_mask) if own][k]
        where = f"row {self.chosen[i]}, position {place}, {self.spell(self.rows[i].input_ids[place])}"
        return Measured(what, float(x[k]), bound, compared, where=where)

    def spell(self, token: int) -> str:
        """A token as a person reads it."""
        return repr(self.job.tokenizer.decode([token]))

    # ------------------------------------------------------------------------------------------------------ gradients
    def trainable(self) -> dict[str, nn.Parameter]:
        """The weights that the run trains, by name."""
        return {name: p for name, p in self.trainer.model.named_parameters() if p.requires_grad}

    def gradient(self, backward: Callable[[], None]) -> Tensor:
        """A sketch of the weights' gradient: of each its norm and seeded entries, float64; gradients are cleared again."""
        self.trainer.model.zero_grad(set_to_none=True)
        pick = torch.Generator().manual_seed(self.args.seed)
        parts = []
        try:
            with self.arithmetic():
                backward()
            for p in self.trainable().values():
                index = torch.randint(p.numel(), (min(p.numel(), SAMPLED),), generator=pick)
                flat = torch.zeros(p.numel()) if p.grad is None else p.grad.detach().reshape(-1)
                parts += [flat.double().norm()[None].cpu(), flat[index.to(flat.device)].double().cpu()]
        finally:
            self.trainer.model.zero_grad(set_to_none=True)
            self.trainer.sums.clear()
        return torch.cat(parts)

    def random_ids(self, count: int) -> list[int]:
        """Tokens that occur in the rows, so that any model takes them."""
        return [int(t) for t in self.rng.choice(sorted({t for row in self.rows for t in row.input_ids}), count)]


def choose(rows: Sequence[Row], most: int, rng: np.random.Generator) -> list[int]:
    """Numbers of at most `most` rows: longest, shortest, most turns, best and worst paid, one cut; the rest at random."""
    size, paid = [len(row) for row in rows], [sum(row.rewards) for row in rows]
    turns = [len(runs(row)) for row in rows]
    ends = [
        int(f(x)) for x, f in ((size, np.argmax), (size, np.argmin), (turns, np.argmax), (paid, np.argmax), (paid, np.argmin))
    ]
    ends += [next((i for i, row in enumerate(rows) if not row.terminated), 0), *map(int, rng.permutation(len(rows))[:most])]
    return sorted(list(dict.fromkeys(ends))[:most])


def runs(row: Row) -> list[tuple[int, int]]:
    """(first, behind the last) of each run of the policy's tokens."""
    edge = np.flatnonzero(np.diff([0, *row.completion_mask, 0]))
    return [(int(a), int(b)) for a, b in zip(edge[::2], edge[1::2], strict=True)]


def _fitted(reference: Reference, length: int) -> Reference:
    """Of another length, for a row that was cut or made longer behind its last action."""
    fit = lambda x: np.pad(x[:length], (0, length - len(x[:length])))  # noqa: E731
    return Reference(fit(reference.token_logit), fit(reference.logsumexp), reference.end_logsumexp)


def reward_to_go(row: Row, gamma: float, n_steps: int | None, cut_turns: bool = False) -> list[float]:
    """sum of the next n rewards, discounted a policy token, at every action: in plain Python, action by action."""
    own = [i for i, acts in enumerate(row.completion_mask) if acts]
    paid = [k for k, i in enumerate(own) if row.rewards[i]]  # by their numbers among the actions
    found = []
    for t, here in enumerate(own):
        sees = [k for k in paid if k >= t and (n_steps is None or k < t + n_steps)]
        if cut_turns:  # nothing stands between the actions of a turn
            sees = [k for k in sees if own[k] - here == k - t]
        found.append(sum(gamma ** (k - t) * row.rewards[own[k]] for k in sees))
    return found


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|; inf where b is 0."""
    return float((a - b).norm() / b.norm()) if b.norm() > 0 else math.inf


def wrong(what: str, places: Sequence[str], compared: int, hint: str = "", warn: bool = False) -> Measured:
    """A count of wrong things that must be 0; the first of them is shown."""
    return Measured(what, len(places), 0, compared, detail=places[0] if places else "", hint=hint, warn_only=warn)
