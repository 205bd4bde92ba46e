"""A trainer under test: what its factory declares, the models that it is given, how its gradient is read and measured."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from shiq_lab.checks.report import Measured, Skip
from shiq_lab.checks.runner import SubjectError
from shiq_lab.checks.tolerances import EPS
from shiq_lab.checks.trainer.rows import GROUPED, Example, TrainerConfig, World, worlds
from shiq_lab.checks.traits import KINDS
from shiq_lab.errors import bad
from shiq_lab.mdp import TokenMDP
from shiq_lab.models.tabular import TabularLM

# A log-probability is off by a few roundings of the largest logit, a row sums L of them, and a residual holds those of two
# models (and two answers); SLACK is for their number. Seen: a tenth of it.
SLACK = 16
# bfloat16 rounds each row's share of the gradient once more; its tables are rounded alike beforehand, so what is left is that
# and the sums: 4 of them, two models and two answers.
HALF_SLACK = 4
MakeModel = Callable[..., Any]
Factory = Callable[[Any, Any, Sequence[Example], TrainerConfig], Any]


class NoisyTable(TabularLM):
    """TabularLM with dropout on the table in training mode: a trainer must switch it off."""

    def __init__(self, mdp: TokenMDP, logits: Tensor, *, trainable: bool, dropout: float) -> None:
        super().__init__(mdp, logits, trainable=trainable)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, segment_ids: Tensor | None = None) -> Any:
        found = super().forward(input_ids, attention_mask, segment_ids)
        lowest = torch.finfo(found.logits.dtype).min
        return replace(found, logits=torch.where(found.logits == lowest, lowest, self.dropout(found.logits)))


def plain_model(mdp: TokenMDP, logits: Tensor, *, trainable: bool, dropout: float, dtype: torch.dtype) -> TabularLM:
    """The oracle without transformers."""
    allowed = torch.tensor(mdp.allowed)
    return NoisyTable(mdp, torch.where(allowed, logits, 0.0).to(dtype), trainable=trainable, dropout=dropout)


@dataclass(frozen=True)
class TrainerTraits:
    """What a factory declares as its attribute `trainer_traits`, or the caller of check_trainer says.

    kind          bellman, trajectory, policy_only, on_policy, preference
    make_model    makes the models that the trainer takes: (mdp, logits, *, trainable, dropout, dtype) -> model with .table
    dtypes        what it stands; the first is the one that the checks run in
    padding       the sides that it pads on
    pad_widths    whether it follows config.pad_to_multiple_of and config.pad_id
    packing       whether it follows config.packing
    multi_turn    stands observation tokens between the policy's
    gamma         the discount that it follows (1: none)
    dropout       True: it keeps dropout on while training, on purpose
    plain_sgd     whether its optimiser is plain SGD of rate config.lr (False: a step need only go against the gradient)
    accumulation  whether it follows config.batch_size and config.accumulation
    windows       whether a call of several optimiser steps takes the rows in order (False: it shuffles them first)
    options       {name: value}: each must change the gradient
    same          {name: value}: none may change it, alone or together with an option
    """

    kind: str = "bellman"
    make_model: MakeModel = plain_model
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16")
    padding: tuple[str, ...] = ("right", "left")
    pad_widths: bool = True
    packing: bool = False
    multi_turn: bool | None = None
    gamma: float | None = None
    dropout: bool = False
    plain_sgd: bool = True
    accumulation: bool = True
    windows: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    same: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise bad("kind", f"one of {', '.join(KINDS)}", repr(self.kind))
        if not self.dtypes or not set(self.dtypes) <= set(EPS):
            raise bad("dtypes", f"some of {', '.join(EPS)}", repr(self.dtypes))
        if not self.padding or not set(self.padding) <= {"right", "left"}:
            raise bad("padding", "'right', 'left' or both", repr(self.padding))


def trainer_traits(factory: Factory, **overrides: Any) -> TrainerTraits:
    """What the factory declares, with what is not None put on top and the kind's own choices filled in."""
    known = [f.name for f in fields(TrainerTraits)]
    said = {**getattr(factory, "trainer_traits", {}), **{k: v for k, v in overrides.items() if v is not None}}
    for name in said:
        if name not in known:
            raise bad("traits", f"one of {', '.join(known)}", repr(name))
    traits = TrainerTraits(**said)
    bellman = traits.kind in ("bellman", "trajectory")
    turns = bellman if traits.multi_turn is None else traits.multi_turn
    gamma = traits.gamma if traits.gamma is not None else (0.9 if bellman else 1.0)
    if traits.kind == "preference" and turns:
        raise bad("multi_turn", "False for preference trainers, whose answers are one turn", "True")
    return replace(traits, multi_turn=turns, gamma=gamma)


@dataclass(frozen=True)
class Cell:
    """Calls whose weighted gradients must add up to 0 at the optimum: [(rows of one call, weight)]."""

    calls: list[tuple[list[Example], float]]


class TrainerSubject:
    """A factory under test: builds trainers, runs steps, reads gradients; whatever goes wrong there becomes a verdict."""

    def __init__(self, factory: Factory, traits: TrainerTraits) -> None:
        self.factory, self.traits = factory, traits
        self.notes: list[str] = []
        self.lr = 0.0
        self._built: dict[tuple[str, ...], Any] = {}

    @cached_property
    def worlds(self) -> list[World]:
        """The automata that suit the trainer's kind."""
        return worlds(self.traits.kind, self.traits.gamma or 1.0, bool(self.traits.multi_turn))

    # ----------------------------------------------------------------------------------------------- running it
    def config(self, world: World, **changes: Any) -> TrainerConfig:
        """The configuration for a world, with changes."""
        base = TrainerConfig(
            self.traits.kind, world.beta, world.gamma, lr=self.lr, pad_id=world.end_id,
            padding_side=self.traits.padding[0], dtype=self.traits.dtypes[0],
        )  # fmt: skip
        return replace(base, **changes)

    def build(self, world: World, which: str, *, dropout: float = 0.0, coarse: str = "", **changes: Any) -> Any:
        """A trainer whose model is at world.table(which), as (trainer, model, ref_model); `coarse` rounds both tables first."""
        config = self.config(world, **changes)
        dtype = getattr(torch, config.dtype)
        models = []
        for name, trainable in ((which, True), ("reference", False)):
            table = world.table(name)
            table = table.to(getattr(torch, coarse)).to(table.dtype) if coarse else table
            models.append(self.traits.make_model(world.mdp, table, trainable=trainable, dropout=dropout, dtype=dtype))
        rows = copy.deepcopy(world.dataset)
        trainer = self.guarded("the factory", lambda: self.factory(models[0], models[1], rows, config))
        for name in ("step", "model"):
            if not hasattr(trainer, name):
                raise SubjectError(f"the factory returned {type(trainer).__name__} without .{name}")
        return trainer, *models

    def guarded(self, what: str, run: Callable[[], Any]) -> Any:
        """What the trainer's own code raises is a verdict about it."""
        try:
            return run()
        except (SubjectError, Skip):
            raise
        except Exception as error:
            raise SubjectError(f"{what} raised {type(error).__name__}: {error}") from error

    def cached(self, world: World, which: str, **changes: Any) -> Any:
        """`build`, once for each setting: with learning rate 0 a trainer does not change (with 1 its table is put back)."""
        key = (world.name, which, repr(sorted(changes.items())), str(self.lr))
        if key not in self._built:
            self._built[key] = self.build(world, which, **changes)
        return self._built[key]

    def gradient(self, world: World, which: str, rows: Sequence[Example], **changes: Any) -> Tensor:
        """d loss / d table of one call of step(rows), float64[S, V], 0 where a token is forbidden."""
        return self.run(world, which, rows, **changes)[0]

    def run(self, world: World, which: str, rows: Sequence[Example], **changes: Any) -> tuple[Tensor, float | None]:
        """(gradient, loss or None) of one call of step(rows)."""
        trainer = self.cached(world, which, **changes)[0]
        table = trainer.model.table
        before = table.detach().clone()
        table.grad = None
        loss = self.step(trainer, rows)
        found = getattr(trainer, "gradient", None)
        found = table.grad if found is None else found
        if found is None and self.lr == 0.0:
            self.lr, self._built = 1.0, {}
            self.notes.append("gradient read from the change of the table under SGD with learning rate 1")
            return self.run(world, which, rows, **changes)
        if found is None:
            found = before - table.detach()
        with torch.no_grad():
            table.copy_(before)
        found = found.detach().double().cpu()
        if found.shape != torch.Size(world.mdp.next_state.shape):
            raise SubjectError(f"the gradient has shape {tuple(found.shape)}, not the table's {world.mdp.next_state.shape}")
        allowed = torch.tensor(world.mdp.allowed)
        return torch.where(allowed, found, 0.0), None if loss is None else float(loss)

    def step(self, trainer: Any, rows: Sequence[Example]) -> Any:
        """trainer.step on a copy of the rows."""
        return self.guarded("step(rows)", lambda: trainer.step(copy.deepcopy(list(rows))))

    def expected(self, world: World, which: str, cell: Cell) -> Tensor:
        """The weighted sum of a cell's gradients, float64[S, V]."""
        return torch.stack([weight * self.gradient(world, which, rows) for rows, weight in cell.calls]).sum(0)

    # ---------------------------------------------------------------------------------------------------- units
    def units(self, world: World) -> list[list[Example]]:
        """The smallest lists of examples that a step takes: rows, pairs, or two completions of one prompt."""
        if self.traits.kind not in GROUPED:
            return [[row] for row in world.dataset]
        rows = world.dataset
        own = self.traits.kind == "on_policy"  # the policy may say the same thing twice
        return [
            [y, z] for i, y in enumerate(rows) for z in rows[i if own else i + 1 :] if y["group"] == z["group"]
        ]  # fmt: skip

    def cells(self, world: World, which: str) -> list[Cell]:
        """What must vanish: a row, two rows of a prompt, a pair over its two labels, a prompt over the policy's groups."""
        units = self.units(world)
        if self.traits.kind == "preference":
            twin = {(u[0]["group"], tuple(u[0]["chosen_ids"]), tuple(u[0]["rejected_ids"])): u for u in units}
            found = []
            for (group, yes, no), unit in twin.items():
                if yes < no:
                    other = twin[group, no, yes]
                    found.append(Cell([(unit, unit[0]["weight"]), (other, other[0]["weight"])]))
            return found
        if self.traits.kind != "on_policy":
            return [Cell([(unit, 1.0)]) for unit in units]
        table = world.table(which)
        logp = torch.tensor([world.log_probability(table, row) for row in world.dataset], dtype=torch.float64)
        groups = sorted({row["group"] for row in world.dataset})
        chance = lambda u: float(torch.exp(logp[u[0]["index"]] + logp[u[1]["index"]])) * (1 if u[0] is u[1] else 2)  # noqa: E731
        return [Cell([(u, chance(u)) for u in units if u[0]["group"] == g]) for g in groups]

    def some(self, world: World, count: int) -> list[Example]:
        """The rows of `count` units of different lengths and prompts, spread over the data."""
        units = [u for u in self.units(world) if len(u) == 1 or u[0]["index"] != u[1]["index"]]
        step = max(1, (len(units) - 1) // max(1, count - 1))
        return [row for unit in units[::step][:count] for row in unit]

    # ------------------------------------------------------------------------------------------------ measuring
    def rounding(self, world: World, dtype: str | None = None) -> float:
        """The share of the reference's gradient that rounding can leave: L roundings of beta max|l| against the rewards.

        Grows with max|q| / beta through the logits l* = l_ref + q* / beta, as it must.
        """
        eps = EPS[dtype or self.traits.dtypes[0]]
        return SLACK * world.longest * eps * max(1.0, world.beta * world.largest / world.spread)

    def place(self, world: World, error: Tensor) -> str:
        """Where the largest entry sits."""
        state, token = divmod(int(error.abs().nan_to_num(torch.inf).argmax()), error.shape[1])
        return world.mdp.place(state, token)

    def compare(
        self,
        what: str,
        world: World,
        found: Tensor,
        wanted: Tensor | None,
        rows: Sequence[Example],
        *,
        tolerance: float | None = None,
        scale: float | None = None,
        detail: str = "",
        hint: str = "",
    ) -> Measured:
        """The largest difference of two gradients (wanted None: of one from 0) as a share of the larger, or of `scale`.

        tolerance defaults to `rounding`. Where there is no gradient at all the share is NaN, which misses every bound.
        """
        wanted = torch.zeros_like(found) if wanted is None else wanted
        error = (found - wanted).abs()
        size = scale if scale is not None else max(found.abs().max().item(), wanted.abs().max().item())
        bound = self.rounding(world) if tolerance is None else tolerance
        if size == 0.0:
            return Measured(what, float("nan"), bound, 1, world.name, detail="there is no gradient at all", hint=hint)
        if self.lr:  # read from the change of the table, whose entries keep the digits of their own size
            bound += EPS[self.traits.dtypes[0]] * world.largest / size
        said = f"rows: {world.text(rows)}" + (f"; {detail}" if detail else "")
        worst = (error / size).nan_to_num(float("inf")).max().item()
        return Measured(
            what, worst, bound, int(world.mdp.allowed.sum()), world.name, self.place(world, error), detail=said, hint=hint
        )
