"""Component checks of masks: which tokens the policy chose, which are real, how many there are, which rows were cut.

Truths are read off lists of turns; nothing here looks at ids to find an end.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shiq_lab.checks.components.rows import OBSERVATION, PLAIN, POLICY, PROMPT, Rows, build_cases, no_turns
from shiq_lab.checks.components.subject import PURE, Case, Component, Kind, check_cases

BATCH = {
    "input_ids": "int[B, L]; padding holds pad_id",
    "attention_mask": "{0, 1}[B, L]; 0 = padding, on either side",
    "completion_mask": "{0, 1}[B, L]; 1 = chosen by the policy",
    "lengths": "int[B]; real tokens of a row",
    "terminated": "bool[B]; False = the row was cut",
    "truncated": "bool[B]; its opposite",
    "pad_id": "int; may equal eos_id",
    "eos_id": "int; also ends prompts and inner turns",
    "side": "'left' or 'right', where the padding stands",
}
Made = Iterator[tuple[dict[str, Any], Tensor, Tensor | None, float]]
EXACT = 0.0  # whole numbers: no rounding


def only(*names: str) -> dict[str, str]:
    """Some of the batch's arguments."""
    return {name: BATCH[name] for name in names}


# ------------------------------------------------------------------------------------------------ completion_mask
def _completion(rows: Rows) -> Made:
    names = {PROMPT: "prompt", POLICY: "policy", OBSERVATION: "observation"}
    arguments = {
        "roles": rows.roles,
        "prompt_lengths": torch.tensor([len(t.turns[0][1]) for t in rows.talks]),
        "turns": [[(names[role], list(tokens)) for role, tokens in t.turns] for t in rows.talks],
        "width": rows.width,
    }
    expected = torch.zeros(len(rows.talks), rows.width)
    for b, places in enumerate(rows.actions):
        for i in places:
            expected[b, i] = 1
    yield arguments, expected, None, EXACT


def _completion_cases(component: Component) -> list[Case]:
    return build_cases(component, _completion, trailing=True)


COMPLETION = Kind(
    "completion_mask",
    {
        **only("input_ids", "attention_mask", "lengths", "pad_id", "eos_id", "side"),
        "roles": "int[B, L]; 0 prompt, 1 policy, 2 observation, -1 padding",
        "prompt_lengths": "int[B]; tokens before the first completion",
        "turns": "a list a row of (role, token ids), role 'prompt', 'policy' or 'observation'",
        "width": "int; columns of the padded batch",
    },
    "{0, 1}[B, L]: 1 exactly where the policy chose the token, EOS included",
    _completion_cases,
    (
        check_cases("OR", "the mask is 1 on every policy token and nowhere else", "The mask starts or ends a token off."),
        check_cases("TE", "the EOS of ended rows and the last token of cut rows are in", "The last action is dropped."),
        check_cases("PAD", "the same on either padding side, any width, pad = EOS", "Positions are counted from column 0."),
        check_cases("MT", "observation tokens are out, later turns are in", "Everything after the prompt counts as answer."),
        check_cases("BS", "the same for a row alone and in another order", "One row's lengths are used for another."),
        PURE,
    ),
    skips=no_turns,
)


# ------------------------------------------------------------------------------------------------- attention_mask
def _attention(rows: Rows) -> Made:
    expected = torch.zeros(len(rows.talks), rows.width)
    for b, t in enumerate(rows.talks):
        start = rows.last_real[b] - len(t.ids) + 1
        for i in range(len(t.ids)):
            expected[b, start + i] = 1
    yield {"rows": [t.ids for t in rows.talks], "width": rows.width}, expected, None, EXACT


def _attention_cases(component: Component) -> list[Case]:
    return build_cases(component, _attention)


ATTENTION = Kind(
    "attention_mask",
    {
        **only("input_ids", "lengths", "completion_mask", "terminated", "pad_id", "eos_id", "side"),
        "rows": "a list of token ids a row, without padding",
        "width": "int; columns of the padded batch",
    },
    "{0, 1}[B, L]: 1 on every real token, EOS included",
    _attention_cases,
    (
        check_cases("OR", "1 on real tokens, 0 on padding", "Lengths or sides are mixed up."),
        check_cases("TE", "an EOS is attended although pad = EOS", "The mask is `ids != pad_id`; it hides every EOS then."),
        check_cases("PAD", "the same on either padding side, any width, pad = EOS", "Padding is looked for on one side."),
        check_cases("MT", "observation tokens and inner EOS are attended", "Everything after the first EOS counts as padding."),
        check_cases("BS", "the same for a row alone and in another order", "One row's lengths are used for another."),
        PURE,
    ),
    skips=no_turns,
)


# ------------------------------------------------------------------------------------------------ response_length
def _length(rows: Rows) -> Made:
    expected = torch.tensor([float(sum(role == POLICY for role in t.roles)) for t in rows.talks])
    yield {"roles": rows.roles}, expected, None, EXACT


LENGTH = Kind(
    "response_length",
    {
        **only("completion_mask", "attention_mask", "input_ids", "lengths", "pad_id", "eos_id"),
        "roles": "int[B, L]; 0 prompt, 1 policy, 2 observation, -1 padding",
    },
    "int[B]: how many tokens the policy chose",
    lambda component: build_cases(component, _length, axes=("row",), trailing=True),
    (
        check_cases("OR", "the number of policy tokens", "The prompt or padding is counted."),
        check_cases("TE", "EOS counts, and a cut row's last token", "The EOS is left out of the count."),
        check_cases("PAD", "the same on either padding side, any width", "The width of the batch is the length."),
        check_cases(
            "MT", "observation tokens do not count", "The length is the span from first to last action, not mask.sum()."
        ),
        check_cases("BS", "the same for a row alone and in another order", "A maximum over the batch."),
        PURE,
    ),
    skips=no_turns,
)


# ------------------------------------------------------------------------------------------------------ truncated
def _truncated(rows: Rows) -> Made:
    live = torch.tensor([bool(t.actions) for t in rows.talks])
    reasons = ["stop" if t.terminated else "length" for t in rows.talks]
    # the sampler's own limit for each row: rows are cut at limits of their own, never at the batch's width
    limits = torch.tensor([len(t.actions) + (3 if t.terminated else 0) for t in rows.talks])
    expected = torch.tensor([float(not t.terminated) for t in rows.talks])
    yield {"finish_reasons": reasons, "max_tokens": limits}, expected, live, EXACT


def _truncated_cases(component: Component) -> list[Case]:
    cases = build_cases(component, _truncated, axes=("row",))
    # a row that ends with its last allowed token is complete: the fixture above never has EOS at the limit, this one does
    full = Rows((PLAIN[0], PLAIN[4]), component.padding[0])
    arguments = {**full.common(), "finish_reasons": ["stop", "stop"], "max_tokens": torch.tensor([4, 3])}
    cases.append(
        Case("TE", "rows whose EOS is the last token they were allowed", arguments, torch.zeros(2), EXACT, axes=("row",))
    )
    return cases


TRUNCATED = Kind(
    "truncated",
    {
        **only("input_ids", "attention_mask", "completion_mask", "lengths", "pad_id", "eos_id", "side"),
        "finish_reasons": "a list of 'stop' or 'length', the sampler's word",
        "max_tokens": "int[B]; how many tokens the policy was allowed in each row",
    },
    "bool[B]: True where the row was cut before it ended (rows without any action are not compared)",
    _truncated_cases,
    (
        check_cases("OR", "cut rows are truncated, ended rows are not", "The flag is inverted, or the width decides."),
        check_cases(
            "TE", "EOS decides, also at the length limit and with pad = EOS", "Reaching the limit counts as cut, EOS or not."
        ),
        check_cases(
            "PAD", "the same on either padding side, any width", "A row counts as cut if it reaches the batch's last column."
        ),
        check_cases("MT", "an EOS inside a row ends nothing", "Any EOS counts as the end."),
        check_cases("BS", "the same for a row alone and in another order", "The flag depends on the longest row of the batch."),
        PURE,
    ),
    skips=no_turns,
)

KINDS = (COMPLETION, ATTENTION, LENGTH, TRUNCATED)
