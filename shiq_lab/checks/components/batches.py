"""Component checks of what makes batches: collators (rows of a data set to padded tensors) and packers (many rows in one)."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch, concatenate, cut
from shiq_lab.builders import Act, Say, from_turns, random_reference
from shiq_lab.checks.components.masks import EXACT
from shiq_lab.checks.components.rows import EOS, OBSERVATION, PAD, PLAIN, POLICY, TURNS, Talk
from shiq_lab.checks.components.subject import EPS, PURE, Case, Component, Kind, as_tensor, compare, exact
from shiq_lab.checks.report import Check, Measured, Skip
from shiq_lab.checks.runner import SubjectError
from shiq_lab.enumeration import enumerate_trajectories
from shiq_lab.losses.shiq import shiq_loss
from shiq_lab.models.tabular import TabularLM
from shiq_lab.stats import TokenStats

IGNORED = -100  # label of a token that is not trained


# ------------------------------------------------------------------------------------------------------- collator
@dataclass(frozen=True)
class Example:
    """One row of a data set; reward is NaN nowhere and different for every row."""

    talk: Talk
    reward: float

    def columns(self) -> dict[str, Any]:
        """The example as a collator is given it: ids and rewards, and a mask where turns need one."""
        prompt = len(self.talk.turns[0][1])
        roles = self.talk.roles[prompt:]
        return {
            "prompt_ids": self.talk.ids[:prompt],
            "completion_ids": self.talk.ids[prompt:],
            "reward": self.reward,
            **({"completion_mask": [int(r == POLICY) for r in roles]} if OBSERVATION in roles else {}),
        }


def examples(talks: tuple[Talk, ...]) -> list[Example]:
    """Talks with different rewards."""
    return [Example(t, 0.25 + 0.5 * i) for i, t in enumerate(talks)]


def _collate(component: Component, those: list[Example], place: str, pad_id: int = PAD, side: str = "right") -> dict[str, Any]:
    """What comes back, as a dict."""
    arguments = {"rows": [e.columns() for e in those], "pad_id": pad_id, "eos_id": EOS, "side": side}
    got = component.call(arguments, place)
    if not isinstance(got, Mapping):
        if not hasattr(got, "__dict__"):
            raise SubjectError(f"{place}: expected a mapping of tensors, got {type(got).__name__}")
        got = vars(got)
    found = {k: as_tensor(v, place) for k, v in got.items() if isinstance(v, Tensor)}
    for name in ("input_ids", "attention_mask"):
        if name not in found or found[name].ndim != 2 or len(found[name]) != len(those):
            raise SubjectError(f"{place}: expected {name} of shape ({len(those)}, L), got {[*found] or 'no tensors'}")
    if "completion_mask" not in found and "labels" not in found:
        raise SubjectError(f"{place}: expected completion_mask, or labels that are {IGNORED} off the completion")
    for name in ("attention_mask", "completion_mask", "labels"):
        if name in found and found[name].shape != found["input_ids"].shape:
            raise SubjectError(f"{place}: {name} of shape {tuple(found[name].shape)}, ids {tuple(found['input_ids'].shape)}")
    return found


def _lists(what: str, got: list[list[float]], expected: list[list[float]], place: str) -> Measured:
    """How many entries of lists differ; a wrong length counts every missing or surplus entry."""
    apart = [
        (b, i)
        for b, (x, y) in enumerate(zip(got, expected, strict=True))
        for i, (p, q) in enumerate(itertools.zip_longest(x, y))
        if p != q
    ]
    where = f"row {apart[0][0]}, real token {apart[0][1]}" if apart else ""
    detail = f"got {got[apart[0][0]]}, expected {expected[apart[0][0]]}" if apart else ""
    return Measured(what, float(len(apart)), 0.0, sum(map(len, expected)), place, where, detail=detail)


def _real(found: dict[str, Tensor], name: str) -> list[list[float]]:
    return [x[m == 1].tolist() for x, m in zip(found[name], found["attention_mask"], strict=True)]


def _trained(found: dict[str, Tensor]) -> list[list[float]]:
    """1 where a real token is trained, by completion_mask or labels."""
    if "completion_mask" in found:
        return _real(found, "completion_mask")
    return [[float(y != IGNORED) for y in row] for row in _real(found, "labels")]


def _compare_batch(component: Component, those: list[Example], place: str, **options: Any) -> Iterator[Measured]:
    """Every claim on one collated batch."""
    found = _collate(component, those, place, **options)
    talks = [e.talk for e in those]
    yield _lists(
        "real tokens that differ from prompt + completion",
        _real(found, "input_ids"),
        [[float(i) for i in t.ids] for t in talks],
        place,
    )
    masks = [[float(r == POLICY) for r in t.roles] for t in talks]
    yield _lists("tokens wrongly in or out of the completion", _trained(found), masks, place)
    if "labels" in found:
        labels = [[float(i) if r == POLICY else IGNORED for i, r in zip(t.ids, t.roles, strict=True)] for t in talks]
        yield _lists("labels that differ from ids (-100 off the completion)", _real(found, "labels"), labels, place)
    yield _no_padding_trained(found, place)
    for name in ("rewards", "reward"):
        if name in found and (found[name].ndim == 1 or any(t.actions for t in talks)):
            yield _rewards(found[name], found, those, place)
    if "position_ids" in found:
        yield _lists(
            "position ids that do not count from 0",
            _real(found, "position_ids"),
            [list(map(float, range(len(t.ids)))) for t in talks],
            place,
        )


def _no_padding_trained(found: dict[str, Tensor], place: str) -> Measured:
    pad = found["attention_mask"] == 0
    trained = found["completion_mask"] != 0 if "completion_mask" in found else found["labels"] != IGNORED
    bad_ones = (pad & trained).nonzero()
    where = f"row {int(bad_ones[0][0])}, position {int(bad_ones[0][1])}" if len(bad_ones) else ""
    return Measured("padding tokens that are trained", float(len(bad_ones)), 0.0, trained.numel(), place, where)


def _rewards(got: Tensor, found: dict[str, Tensor], those: list[Example], place: str) -> Measured:
    truth = exact([e.reward for e in those])
    if got.ndim == 1:
        return compare(got, truth, 1e-6, place, what="rewards a row", axes=("row",))  # float32 of numbers below 4
    expected = torch.zeros(found["input_ids"].shape, dtype=torch.float64)
    for b, (e, mask) in enumerate(zip(those, found["attention_mask"], strict=True)):
        places = mask.nonzero()[:, 0].tolist()
        if e.talk.actions and e.talk.actions[-1] < len(places):
            expected[b, places[e.talk.actions[-1]]] = truth[b]
    live = torch.tensor([bool(e.talk.actions) for e in those])[:, None].expand(expected.shape)
    return compare(got, expected, 1e-6, place, live=live, what="rewards a token, on the last action")


def run_collated(component: Component) -> Iterator[Measured]:
    """Rows of unequal length."""
    yield from _compare_batch(component, examples(PLAIN), "rows of unequal length")


def run_collated_ends(component: Component) -> Iterator[Measured]:
    """Ended rows and cut rows, where the pad id is the end token."""
    for name, talks in (("ended", [t for t in PLAIN if t.terminated]), ("cut", [t for t in PLAIN if not t.terminated])):
        yield from _compare_batch(component, examples(tuple(talks)), f"rows that {name}, pad id = EOS id", pad_id=EOS)


def run_collated_padding(component: Component) -> Iterator[Measured]:
    """Both sides where the collator takes one; real tokens are contiguous; pad = EOS changes nothing but the padding."""
    sides = component.padding if component.takes("side") else component.padding[:1]
    for side, pad_id in itertools.product(sides, (PAD, EOS)):
        place = f"{side} padding, pad id {pad_id}, EOS id {EOS}"
        yield from _compare_batch(component, examples(PLAIN), place, pad_id=pad_id, side=side)
        mask = _collate(component, examples(PLAIN), place, pad_id, side)["attention_mask"]
        jumps = (mask[:, 1:] != mask[:, :-1]).sum(1)
        yield Measured(
            "changes between padding and tokens in a row",
            float(jumps.max()),
            1.0,
            len(mask),
            place,
            f"row {int(jumps.argmax())}",
        )


def run_collated_rows(component: Component) -> Iterator[Measured]:
    """Every row alone, and the rows in reverse order."""
    for i, e in enumerate(examples(PLAIN)):
        yield from _compare_batch(component, [e], f"row {i} alone")
    yield from _compare_batch(component, examples(PLAIN)[::-1], "the rows in reverse order")


def run_collated_turns(component: Component) -> Iterator[Measured]:
    """Rows with observations, of which the mask tells the actions."""
    if not component.multi_turn:
        raise Skip("declared: multi_turn=False")
    yield from _compare_batch(component, examples(TURNS), "two turns, the rows say which completion tokens are actions")


def _collator_cases(component: Component) -> list[Case]:
    arguments = {"rows": [e.columns() for e in examples(PLAIN)], "pad_id": PAD, "eos_id": EOS, "side": "right"}
    return [Case("PU", "rows of unequal length", arguments, torch.zeros(1), EXACT)]


COLLATOR = Kind(
    "collator",
    {
        "rows": "a list of dicts: prompt_ids, completion_ids (lists), reward; with turns also completion_mask (a list)",
        "pad_id": "int; may equal eos_id",
        "eos_id": "int",
        "side": "'left' or 'right'",
    },
    "a mapping (or dataclass): input_ids, attention_mask, completion_mask or labels [B, L]; "
    "rewards [B] or [B, L] and position_ids where made",
    _collator_cases,
    (
        Check(
            "OR", "real tokens, completion and rewards are the rows' own", run_collated, "Tokens lost, or a mask a token off."
        ),
        Check(
            "TE", "EOS is kept, attended and trained with pad = EOS", run_collated_ends, "Masks are made from `ids != pad_id`."
        ),
        Check(
            "PAD", "the same on either padding side and with pad = EOS", run_collated_padding, "Masks padded on the other side."
        ),
        Check(
            "MT", "observation tokens inside a completion are not trained", run_collated_turns, "The row's own mask is ignored."
        ),
        Check(
            "BS",
            "the same for a row alone and in another order",
            run_collated_rows,
            "Rows were sorted, their rewards were not.",
        ),
        PURE,
    ),
    first="rows",
)


# -------------------------------------------------------------------------------------------------------- packing
@lru_cache(1)
def packable() -> tuple[Any, TokenBatch]:
    """Rows of a dialogue of unequal lengths, ended and cut, weights all different; and their automaton."""
    turns = (Say({(0,): 0.4, (1, 0, 3): 0.6}), Act(2, (0, 1), stop=2), Say({(3,): 1.0}), Act(3, (0, 1), stop=2))
    mdp = random_reference(from_turns(turns, lambda prefix: 0.1 * len(prefix) + prefix[-1], 4), 8)
    full = enumerate_trajectories(mdp)
    length = full.attention_mask.sum(1)
    picked = torch.cat([(length == n).nonzero()[:2, 0] for n in sorted(set(length.tolist()))])
    rows = full.select(picked)
    both = concatenate([rows, cut(full.select(slice(3, 40, 9)), 6)])
    weights = torch.linspace(0.5, 2.0, len(both)).double()
    return mdp, replace(both, weights=weights, group_ids=torch.arange(len(both)))


def _pack(component: Component, batch: TokenBatch, width: int, place: str) -> tuple[TokenBatch, Mapping[str, Any]]:
    got = component.call({"batch": batch, "width": width}, place)
    if isinstance(got, TokenBatch):
        return got, {}
    if not isinstance(got, Mapping):
        raise SubjectError(f"{place}: expected a TokenBatch or a mapping of its fields, got {type(got).__name__}")
    names = [f.name for f in fields(TokenBatch)]
    try:
        return TokenBatch(**{k: v for k, v in got.items() if k in names}), got
    except (ValueError, TypeError) as error:
        raise SubjectError(f"{place}: what came back is no packed batch: {error}") from error


def _segments(packed: TokenBatch, place: str) -> Iterator[tuple[int, int, Tensor]]:
    """(row, segment, its columns) for every segment; segments must be contiguous."""
    if packed.segment_ids is None or packed.position_ids is None:
        raise SubjectError(f"{place}: expected segment_ids and position_ids [P, W]")
    for p, labels in enumerate(packed.segment_ids):
        for n in range(1, int(labels.max()) + 1):
            columns = (labels == n).nonzero()[:, 0]
            if len(columns):
                yield p, n, columns


def _key(ids: Tensor, completion: Tensor) -> tuple[Any, ...]:
    return tuple(ids.tolist()), tuple(completion.tolist())


def _settings(component: Component) -> Iterator[tuple[str, TokenBatch, TokenBatch, Mapping[str, Any]]]:
    _, batch = packable()
    longest = int(batch.attention_mask.sum(1).max())
    ways = (
        ("two or three rows in one", batch, 2 * longest),
        ("one row in one", batch, longest),
        ("a single row", batch.select([0]), 3 * longest),
    )
    for name, rows, width in ways:
        place = f"{name}, width {width}"
        packed, raw = _pack(component, rows, width, place)
        yield place, rows, packed, raw


def run_packed(component: Component) -> Iterator[Measured]:
    """Each source row is one segment, tokens, masks, rewards, weight, group and ending included."""
    for place, rows, packed, _ in _settings(component):
        real = rows.attention_mask == 1
        sources = {_key(rows.input_ids[b][real[b]], rows.completion_mask[b][real[b]]): b for b in range(len(rows))}
        wrong: dict[str, list[str]] = {k: [] for k in ("tokens", "rewards", "terminated", "weights", "group_ids")}
        seen: list[int] = []
        for p, n, columns in _segments(packed, place):
            b = sources.get(_key(packed.input_ids[p, columns], packed.completion_mask[p, columns]))
            where = f"row {p}, segment {n}"
            if b is None:
                wrong["tokens"].append(where)
                continue
            seen.append(b)
            acts = (rows.completion_mask[b] == 1)[real[b]]
            if not torch.equal(packed.rewards[p, columns][acts], rows.rewards[b][real[b]][acts]):
                wrong["rewards"].append(where)
            for name in ("terminated", "weights", "group_ids"):
                if n > packed.terminated.shape[1] or getattr(packed, name)[p, n - 1] != getattr(rows, name)[b]:
                    wrong[name].append(where)
        times = torch.tensor([seen.count(b) for b in range(len(rows))])
        yield compare(
            times, torch.ones(len(rows)), 0.0, place, what="times that a row was packed, off from once", axes=("row",)
        )
        for name, places in wrong.items():
            yield Measured(f"segments with wrong {name}", len(places), 0, len(rows), place, places[0] if places else "")


def run_positions(component: Component) -> Iterator[Measured]:
    """Position ids restart with every segment; padding belongs to none."""
    for place, _, packed, _ in _settings(component):
        expected = torch.zeros_like(packed.input_ids)
        live = torch.zeros_like(packed.input_ids, dtype=torch.bool)
        for p, _, columns in _segments(packed, place):
            expected[p, columns], live[p, columns] = torch.arange(len(columns)), True
        yield compare(packed.position_ids, expected, 0.0, place, live=live, what="position ids")
        segment = (packed.segment_ids != 0).long()  # type: ignore[union-attr]  # _segments has looked
        yield compare(segment, packed.attention_mask, 0.0, place, what="segment ids in padding, or none on tokens")


def run_labels(component: Component) -> Iterator[Measured]:
    """No label crosses a boundary: `labels` (unshifted) and `shifted_labels` hold actions of their own segment."""
    found = 0
    for place, _, packed, raw in _settings(component):
        for name, shift in (("labels", 0), ("shifted_labels", 1)):
            if name not in raw:
                continue
            found += 1
            expected = torch.full_like(packed.input_ids, IGNORED)
            for p, _, columns in _segments(packed, place):
                for i in columns.tolist()[1:]:
                    if packed.completion_mask[p, i] == 1:
                        expected[p, i - shift] = packed.input_ids[p, i]
            yield compare(raw[name], expected, 0.0, place, what=name)
    if not found:
        raise Skip("it makes neither labels nor shifted_labels")


def _logits(model: TabularLM, batch: TokenBatch) -> Tensor:
    return model(batch.input_ids, batch.attention_mask, segment_ids=batch.segment_ids).logits


def run_through_model(component: Component) -> Iterator[Measured]:
    """The ShiQ loss and its gradient through a TabularLM: packed rows equal the rows themselves."""
    mdp, _ = packable()
    ref = TabularLM(mdp, trainable=False)
    for place, rows, packed, _ in _settings(component):
        results = []
        for batch in (rows, packed):
            model = TabularLM(mdp, torch.tensor(mdp.ref_logits).clamp(min=-50) * 0.7)
            try:
                stats, own = (TokenStats.from_logits(_logits(m, batch), batch) for m in (ref, model))
                loss = shiq_loss(own, stats, batch, beta=0.5, gamma=0.9, reduction="sum")
            except ValueError as error:
                raise SubjectError(f"{place}: the model or the loss refuses the packed batch: {error}") from error
            (grad,) = torch.autograd.grad(loss, model.table)
            results.append((loss.detach(), grad))
        (one, grad_one), (two, grad_two) = results
        # sums over some dozens of residuals, in another order
        scale = float(one.abs()) + 1
        yield compare(two, one, 1e3 * EPS * scale, place, what="ShiQ loss, packed against unpacked", axes=())
        size = 1 + float(grad_one.abs().max())
        yield compare(grad_two, grad_one, 1e3 * EPS * size, place, what="its gradient", axes=("state", "token"))


def _packing_cases(component: Component) -> list[Case]:
    _, batch = packable()
    return [Case("PU", "rows of a dialogue", {"batch": batch, "width": 40}, torch.zeros(1), EXACT)]


PACKING = Kind(
    "packing",
    {"batch": "a TokenBatch of right-padded rows", "width": "int; columns of a packed row"},
    "a packed TokenBatch or a mapping of its fields: segment_ids from 1, position_ids, terminated, weights, group_ids [P, N]; "
    "labels (unshifted) or shifted_labels [P, W] where made",
    _packing_cases,
    (
        Check(
            "OR",
            "each row is one segment with its own numbers",
            run_packed,
            "terminated or weights of the row, not the segment.",
        ),
        Check(
            "PK", "position ids restart, padding is no segment", run_positions, "Positions run on; attention crosses samples."
        ),
        Check(
            "PK-labels", "no label crosses a boundary", run_labels, "A roll over the packed row: the next sample's first token."
        ),
        Check(
            "EG",
            "loss and gradient through a model, packed = unpacked",
            run_through_model,
            "Segments see or bootstrap from each other.",
        ),
        PURE,
    ),
    first="batch",
)
KINDS = (COLLATOR, PACKING)
