"""What preflight asks of the data, the template and the tokenizer, and of the size of rewards: checks that need few passes."""

import contextlib
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from shiq_lab.checks.report import Measured, Skip
from shiq_lab.checks.runner import SubjectError
from shiq_lab.hf import heads
from shiq_lab.hf.preflight_subject import Pick, Subject, runs, wrong
from shiq_lab.hf.rows import Row, row_problems

LOST = 0.1  # share of all that is paid: beyond it a run would not learn what its data say
DUPLICATES = 0.1  # share of rows; a few are usual in real data
NATS = (0.01, 50.0)  # |return| / beta: below, pi* is pi_ref to 1 %; above, its odds pass exp(50)
GUESSING = 0.5  # nats past ln V: a random head is off by about half the variance of its logits
TEXT = 8  # characters from which on a text of others is recognised inside the policy's


def check_data(s: Subject) -> Iterator[Measured]:
    """Rows can be made of all examples, they differ in what they are paid, and max_length leaves the rewards in."""
    if s.data_fault:
        raise SubjectError(s.data_fault)
    rows, whole = s.all_rows, s.whole_rows
    yield Measured("rows that cannot be trained on", len(row_problems(rows, s.vocabulary)), 0, len(rows))
    paid = {tuple(r for r in row.rewards if r) for row in rows}
    yield Measured("different rewards among the rows", len(paid), 2, len(rows), at_least=True)
    copies = len(rows) - len({hash((*row.input_ids, *row.rewards)) for row in rows})
    hint = "A row that comes again weighs more; say so with `weight`."
    yield Measured("share of rows that came before", copies / len(rows), DUPLICATES, len(rows), warn_only=True, hint=hint)
    if s.args.max_length is not None:
        long = sum(len(row) > s.args.max_length for row in whole)
        hint = "Raise trainer.max_length."
        yield Measured(
            "share of rows that max_length cuts or drops", long / len(whole), LOST, len(whole), warn_only=True, hint=hint
        )
        all_, kept = (sum(abs(r) for row in those for r in row.rewards) for those in (whole, rows))
        hint = "A reward at the end of a long row is cut off with it: raise trainer.max_length, or set on_long: drop."
        if all_ and s.args.on_long == "cut":
            yield Measured("share of the rewards that max_length takes away", 1 - kept / all_, LOST, len(whole), hint=hint)


class Said(NamedTuple):
    """What an example says by its own columns: the policy's answers, whether more than their text is shown (tool calls), what
    all others say, and what each answer is paid."""

    answers: list[str]
    more: list[bool]
    others: list[str]
    paid: list[float]


def columns_of(pick: Pick) -> dict[str, Any]:
    """The example's columns that are not None; of a preference pair those of its own answer, named as in the other formats."""
    columns = {key: value for key, value in pick.example.items() if value is not None}
    if "chosen" in columns:
        name = ("chosen", "rejected")[pick.side]
        columns |= {"completion": columns[name], "reward": columns[f"{name}_score"]}
        if not isinstance(columns["prompt"], str) and not isinstance(columns["prompt"][0], Mapping):
            columns |= {"prompt_ids": columns.pop("prompt"), "completion_ids": columns["completion"]}
    return columns


def said(pick: Pick) -> Said | None:
    """Read from the columns alone, without the road of formats.py; None for token ids."""
    columns = columns_of(pick)
    if "completion_ids" in columns:
        return None
    before = int(columns.get("prompt_messages", 0))
    if "messages" in columns:
        turns = columns["messages"]
    elif isinstance(columns["prompt"], str):
        return Said([columns["completion"]], [False], [columns["prompt"]], [float(columns["reward"])])
    else:
        turns, before = [*columns["prompt"], *columns["completion"]], len(columns["prompt"])
    own = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= before]
    if "rewards" in columns:
        paid = [float(x) for x in columns["rewards"]]
    else:
        paid = [0.0] * (len(own) - 1) + [float(columns["reward"])]
    others = [_text(turn) for i, turn in enumerate(turns[: own[-1]]) if i not in own]
    return Said([_text(turns[i]) for i in own], [bool(turns[i].get("tool_calls")) for i in own], others, paid)


def _text(turn: Mapping[str, Any]) -> str:
    content = turn.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def squeezed(text: str) -> str:
    """Without blanks, and without the empty thought that some templates put before an answer."""
    return re.sub(r"^<think></think>", "", "".join(text.split()))


@dataclass
class Faults:
    """What is wrong with answers, each a sentence."""

    other: list[str]
    open: list[str]
    header: list[str]
    foreign: list[str]
    unpaid: list[str]


def check_mask(s: Subject) -> Iterator[Measured]:
    """The policy's tokens are its answers with their end tokens and nothing else; each is paid on its last token."""
    faults, texts, numbers = Faults([], [], [], [], []), 0, sum(len(row) for row in s.rows)
    for number, pick in zip(s.chosen, s.picks, strict=True):
        wanted, own = said(pick), runs(pick.whole)
        faults.unpaid += _unpaid(number, pick, wanted.paid if wanted else [])
        if wanted is None:
            faults.other += _other_mask(number, pick)
            continue
        texts += len(wanted.answers)
        if len(own) != len(wanted.answers):
            faults.other.append(f"row {number}: {len(own)} runs of the policy's tokens for {len(wanted.answers)} answers")
            continue
        for k in range(len(own)):
            _look_at_answer(s, f"row {number}, answer {k}", pick.whole, own, k, wanted, faults)
    hint = "The mask and the answers are apart: the template, or what makes completion_mask."
    yield wrong("answers that are not what is trained on", faults.other, max(texts, len(s.picks)), hint)
    if texts:
        hint = "Without its end token in the mask a policy never learns to stop, and its last reward has no place."
        yield wrong("answers without their end token", faults.open, texts, hint)
        yield wrong("answers with special tokens inside", faults.header, texts, "Headers and next turns are the environment's.")
        yield wrong(
            "answers that hold another's text", faults.foreign, texts, "Only the assistant's messages are the policy's."
        )
    hint = "An answer's reward is paid on its last token."
    yield wrong("rewards that are not where they belong", faults.unpaid, numbers, hint)


def _look_at_answer(s: Subject, place: str, row: Row, own: list[tuple[int, int]], k: int, wanted: Said, faults: Faults) -> None:
    """The k-th run of the policy's tokens, decoded, beside the k-th answer."""
    (begin, end), ids, special = own[k], row.input_ids, set(s.job.tokenizer.all_special_ids)
    closed = end - begin > 1 and ids[end - 1] in special
    if not closed and (k < len(own) - 1 or row.terminated):
        faults.open.append(f"{place} ends in {s.spell(ids[end - 1])}")
    inside = s.job.tokenizer.decode(ids[begin : end - closed], skip_special_tokens=False)
    found, want = squeezed(inside), squeezed(wanted.answers[k])
    if want not in found or (found != want and not wanted.more[k]):
        faults.other.append(f"{place}: {inside[:60]!r} is trained on where the data say {wanted.answers[k][:60]!r}")
    strange = [t for t in ids[begin : end - 1] if t in special and s.job.tokenizer.decode([t]) not in wanted.answers[k]]
    faults.header.extend(f"{place} holds {s.spell(t)}" for t in strange[:1])
    rest = found.replace(want, "", 1)
    heard = [text for text in wanted.others if len(text) >= TEXT and squeezed(text) in rest]
    faults.foreign.extend(f"{place} holds {text[:40]!r}" for text in heard[:1])


def _other_mask(number: int, pick: Pick) -> list[str]:
    """Token ids: prompt and completion as they are, all of it the policy's unless completion_mask says otherwise."""
    columns = columns_of(pick)
    prompt, answer = (list(columns[f"{name}_ids"]) for name in ("prompt", "completion"))
    mask = [0] * len(prompt) + list(columns.get("completion_mask", [1] * len(answer)))
    same = pick.whole.input_ids == prompt + answer and pick.whole.completion_mask == mask
    return [] if same else [f"row {number}: other ids or another mask than in its columns"]


def _unpaid(number: int, pick: Pick, paid: Sequence[float]) -> list[str]:
    """Where a row pays another reward than its example says; `paid` a reward an answer, none for token ids."""
    want, own, columns = [0.0] * len(pick.whole), runs(pick.whole), columns_of(pick)
    if paid and len(own) == len(paid):
        for (_, end), reward in zip(own, paid, strict=True):
            want[end - 1] = reward
    elif paid:  # the answers are not even found, which is told above
        return []
    elif "rewards" in columns:
        want = [0.0] * (len(want) - len(columns["rewards"])) + [float(r) for r in columns["rewards"]]
    else:
        want[own[-1][1] - 1] = float(columns["reward"])
    differ = [i for i, (a, b) in enumerate(zip(pick.whole.rewards, want, strict=True)) if a != b]
    return [f"row {number}, position {i}: {pick.whole.rewards[i]:g} is paid, {want[i]:g} expected" for i in differ[:1]]


def check_tokens(s: Subject) -> Iterator[Measured]:
    """Tokenizer and model belong together; text survives the tokenizer, and the template shows what messages say."""
    tokenizer = s.job.tokenizer
    yield Measured("tokens of the tokenizer beyond the model's", max(0, len(tokenizer) - s.vocabulary), 0, len(tokenizer))
    config = getattr(heads.core(s.model), "config", None)
    ends = {t for c in (config, getattr(s.model, "generation_config", None)) for t in _ids(getattr(c, "eos_token_id", None))}
    if ends and tokenizer.eos_token_id is not None:
        text = f"the tokenizer's is {tokenizer.eos_token_id}, the model's {sorted(ends)}"
        astray = [] if tokenizer.eos_token_id in ends else [text]
        yield wrong("end tokens that the model does not stop at", astray, 1, "A tokenizer of another model?", warn=True)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        s.notes.append("the padding token is the end token: no harm, as masks come from lengths")
    if not s.picks:
        return
    bos, unk = tokenizer.bos_token_id, tokenizer.unk_token_id
    numbered = list(zip(s.chosen, s.rows, strict=True))
    begins = [i for i, row in numbered if bos is not None and row.input_ids[:2] == [bos, bos]]
    double = [f"row {i} begins {s.spell(bos)} twice" for i in begins]
    yield wrong(
        "rows with two beginning-of-sequence tokens", double, len(s.rows), "The template writes one, the tokenizer another."
    )
    names_else = unk in (None, bos, tokenizer.eos_token_id, tokenizer.pad_token_id)
    unknown = [f"row {i}" for i, row in numbered if not names_else and unk in row.input_ids]
    yield wrong(
        "rows with text that the tokenizer does not know", unknown, len(s.rows), "A tokenizer for another language?", warn=True
    )
    yield from _texts_survive(s)
    with contextlib.suppress(Skip):  # without a trainer, or a batch, the rest was still worth asking
        yield _guessing(s)


def _guessing(s: Subject) -> Measured:
    guess = torch.cat([x[3] - x[2] for x in s.base.values()]).mean().item()
    hint = "A model that guesses worse than at random was made for another tokenizer, or the template is not the one it knows."
    most = math.log(s.vocabulary if s.trainer.among is None else len(s.trainer.among)) + GUESSING
    return Measured("mean of -ln pi_ref of the actions, in nats", guess, most, len(s.base), warn_only=True, hint=hint)


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _texts_survive(s: Subject) -> Iterator[Measured]:
    tokenizer, lost, hidden, texts = s.job.tokenizer, [], [], 0
    for number, pick in zip(s.chosen, s.picks, strict=True):
        wanted = said(pick)
        if wanted is None:
            continue
        whole = tokenizer.decode(pick.whole.input_ids, skip_special_tokens=False)
        for text in [*wanted.answers, *wanted.others]:
            texts += 1
            again = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
            lost += [f"row {number}: {text[:40]!r} comes back as {again[:40]!r}"] if squeezed(again) != squeezed(text) else []
            hidden += [f"row {number}: {text[:40]!r}"] if squeezed(text) not in squeezed(whole) else []
    if texts:
        yield wrong("texts that change in the tokenizer", lost, texts, "It drops or replaces characters.", warn=True)
        hint = "The template drops messages, or shows them otherwise; after the last answer nothing is trained on."
        yield wrong("texts that the rows do not show", hidden, texts, hint)


def check_scale(s: Subject) -> Iterator[Measured]:
    """Rewards, beta and learning rate are of a size that can be learned from."""
    s.rows  # noqa: B018
    rate = float(s.args.learning_rate)
    yield Measured("learning rate", rate, math.ulp(0.0), 1, at_least=True, hint="Nothing would be trained.")
    returns = [_largest_return(row, s.args.gamma) for row in s.all_rows]
    most, hint = max(returns) / s.args.beta, "Rewards are in units of beta nats: scale one of the two."
    yield Measured("largest |return| / beta, in nats", most, NATS[1], len(returns), warn_only=True, hint=hint)
    yield Measured("largest |return| / beta, in nats", most, NATS[0], len(returns), warn_only=True, at_least=True, hint=hint)
    groups: dict[int, list[float]] = defaultdict(list)
    for row in s.all_rows:
        groups[row.group].append(sum(row.rewards))
    several = [paid for paid in groups.values() if len(paid) > 1]
    if several:
        apart = sum(min(paid) < max(paid) for paid in several)
        what, hint = "prompts whose answers are paid differently", "All answers to one prompt are paid alike: none is better."
        yield Measured(what, apart, 1, len(several), at_least=True, warn_only=True, hint=hint)


def _largest_return(row: Row, gamma: float) -> float:
    """max |G_t|, from the row's end: G_t = r_t + gamma G_{t+1}."""
    most = to_go = 0.0
    for acts, reward in zip(reversed(row.completion_mask), reversed(row.rewards), strict=True):
        if acts:
            to_go = reward + gamma * to_go
            most = max(most, abs(to_go))
    return most
