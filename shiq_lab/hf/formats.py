"""What users hand in, token ids, text, messages or preference pairs, to Rows; the policy's tokens found in a chat template.

Spans of a conversation: the template renders the text up to each assistant message, its header included, and the text through
that message. What lies between is the policy's, up to and with the end-of-turn token. Both must be beginnings of the whole
text, which is tokenised once; characters are mapped to tokens by offsets. A template with {% generation %} marks must agree.
"""

import difflib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from shiq_lab.errors import at_least, bad, is_real, is_whole
from shiq_lab.hf.rows import Problem, Row, cut_row, list_fault, raise_problems, row_problems

FORMATS = {
    "token ids": ("prompt_ids", "completion_ids"),
    "messages": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "prompt and completion": ("prompt", "completion"),
}
_SHARED = ("terminated", "weight", "group")
_OPTIONS = {
    "token ids": ("reward", "rewards", "completion_mask", *_SHARED),
    "messages": ("reward", "rewards", "tools", "prompt_messages", *_SHARED),
    "preference": ("chosen_score", "rejected_score", "tools", *_SHARED),
    "prompt and completion": ("reward", "rewards", "tools", *_SHARED),
}
ROLES = ("system", "developer", "user", "assistant", "tool")
_log = logging.getLogger(__name__)
Example = Mapping[str, Any]


class Wrong(Exception):
    """What is wrong with one column of one example; to_rows adds the row."""

    def __init__(self, column: str, expected: str, found: str, remedy: str = "") -> None:
        super().__init__(column, expected, found, remedy)
        self.column, self.rest = column, (expected, found, remedy)


class Draft(NamedTuple):
    """A row before its plain columns: tokens, mask, rewards, and the prompt that numbers its group."""

    ids: list[int]
    mask: list[int]
    rewards: list[float]
    prompt: tuple[int, ...]


def to_rows(
    examples: Iterable[Example], *, tokenizer: Any = None, vocabulary: int, max_length: int | None = None,
    on_long: Literal["error", "cut", "drop"] = "error", append_eos: bool = True, end_of_turn: str | None = None,
    template_options: Mapping[str, Any] | None = None, name: str = "train_dataset",
) -> list[Row]:  # fmt: skip
    """Rows from examples of one format, told by their columns; each passes check_rows.

      token ids    prompt_ids, completion_ids; reward or rewards (one a completion token); completion_mask
      text         prompt, completion: strings; reward
      messages     messages, or prompt and completion that are lists of messages; reward or rewards (one an assistant message
                   of the policy, paid on its last token); tools; prompt_messages = how many messages are the prompt
      preference   prompt, chosen, rejected: ids, strings or messages; chosen_score, rejected_score: two rows of one group
    all take terminated (default True), weight (1), group (default: equal prompts, equal numbers). Columns of None are absent.

    Text: the prompt is tokenised with the special tokens that begin a text, the completion by itself and without, so that no
    token can straddle the border, whatever the strings are; the end token is appended once (append_eos), as the policy's last
    action, unless the row is not terminated. At generation, too, the prompt is tokenised before the completion exists.
    Messages: an ended conversation loses what follows its last action, such as the newline after the end token; with
    terminated=False it loses its last end token, or gets the header of the turn to come. end_of_turn names the text that
    closes a turn where that is no special token. template_options go to the template. In a datasets.Dataset give tools and
    the arguments of calls as JSON text: its structs fill every key that any row has with None.
    A row longer than max_length is an error, cut by cut_row, or dropped; how many is logged. Raises ValueError that names row
    and column.
    """
    if on_long not in ("error", "cut", "drop"):
        raise bad("on_long", "'error', 'cut' or 'drop'", repr(on_long))
    if max_length is not None:
        at_least("max_length", max_length, 2, "A row has at least one prompt token and one action.")
    reader = _Reader(tokenizer, at_least("vocabulary", vocabulary, 1), append_eos, end_of_turn, dict(template_options or {}))
    rows: list[Row] = []
    source: list[int] = []
    problems: list[Problem] = []
    groups: dict[tuple[int, ...], int] = {}
    first: tuple[str, bool] | None = None
    for number, example in enumerate(examples):
        try:
            first, own, prompt = _read(reader, example, first)
        except Wrong as wrong:
            problems.append(Problem(number, wrong.column, *wrong.rest))
            continue
        rows += own if first[1] else [replace(row, group=groups.setdefault(prompt, len(groups))) for row in own]
        source += [number] * len(own)
    if not rows and not problems:
        raise bad(name, "at least one example", "none")
    problems += [p._replace(row=source[p.row]) for p in row_problems(rows, vocabulary)]
    if on_long == "error" and max_length is not None:
        remedy = 'Raise max_length, or choose on_long="cut" or "drop".'
        too_long = [(source[i], len(row)) for i, row in enumerate(rows) if len(row) > max_length]
        problems += [Problem(i, "(tokens)", f"at most max_length = {max_length} tokens", str(n), remedy) for i, n in too_long]
    raise_problems(problems, name)
    return rows if max_length is None else _short(rows, max_length, on_long, name)


def _read(
    reader: "_Reader", raw: Example, first: tuple[str, bool] | None
) -> tuple[tuple[str, bool], list[Row], tuple[int, ...]]:
    """((format, whether groups are given) as in the first example, the example's rows, the prompt that numbers their group)."""
    example = _present(raw)
    kind = _format(example), "group" in example
    _check_same(kind, first or kind)
    rows, prompts = [], []
    for one, columns in _unrolled(example, kind[0]):
        try:
            draft = reader.read(one)
            plain = _terminated(one), _number(one, "weight", 1.0), one.get("group", 0)
        except Wrong as wrong:
            raise Wrong(columns.get(wrong.column, wrong.column), *wrong.rest) from None
        rows.append(Row(draft.ids, draft.mask, draft.rewards, *plain))
        prompts.append(draft.prompt)
    return kind, rows, prompts[0]


def _short(rows: list[Row], max_length: int, on_long: str, name: str) -> list[Row]:
    """The rows cut or dropped to max_length tokens; says how many."""
    long = [len(row) > max_length for row in rows]
    kept = [
        row if not far else (cut_row(row, max_length) if on_long == "cut" else None)
        for row, far in zip(rows, long, strict=True)
    ]
    out = [row for row in kept if row is not None]
    dropped = len(rows) - len(out)
    if any(long):
        _log.warning(
            "%s: of %d rows, %d cut to %d tokens and %d dropped", name, len(rows), sum(long) - dropped, max_length, dropped
        )
    if not out:
        raise bad(name, f"rows with an action in their first {max_length} tokens", "none", "Raise max_length.")
    return out


# --- columns ---------------------------------------------------------------------------------------------------------------


def _present(example: object) -> dict[str, Any]:
    """The columns that are not None."""
    if not isinstance(example, Mapping):
        raise Wrong("(all)", "a dict of columns", type(example).__name__)
    return {column: value for column, value in example.items() if value is not None}


def _format(example: Example) -> str:
    """The format that the columns belong to; columns that it does not know are the user's own, unless they look mistyped."""
    found = [name for name, needed in FORMATS.items() if all(column in example for column in needed)]
    if len(found) != 1:
        known = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in FORMATS.items())
        raise Wrong("(columns)", f"the columns of one format ({known})", ", ".join(example) or "none")
    own = (*FORMATS[found[0]], *_OPTIONS[found[0]])
    others = {column for options in _OPTIONS.values() for column in options} - set(own)
    for column in example:
        if column in others:
            raise Wrong(column, f"no such column in the format {found[0]}", "one", f"It takes {', '.join(own)}.")
        near = difflib.get_close_matches(column, _OPTIONS[found[0]], n=1, cutoff=0.85)
        if column not in own and near and near[0] not in example:
            raise Wrong(column, f"a known column of the format {found[0]}", repr(column), f"Did you mean {near[0]!r}?")
    return found[0]


def _check_same(kind: tuple[str, bool], first: tuple[str, bool]) -> None:
    if kind[0] != first[0]:
        raise Wrong("(columns)", f"the format of the first row, {first[0]}", kind[0], "Use one format a data set.")
    if kind[1] != first[1]:
        raise Wrong("group", "a number in every row or in none", "both")


def _unrolled(example: Example, kind: str) -> Iterable[tuple[Example, Mapping[str, str]]]:
    """(example of one answer, its columns' names in the data set): a pair becomes two, a list of messages one conversation."""
    if kind == "preference":
        ids = all(not isinstance(example[column], str) and not _is_messages(example[column]) for column in FORMATS[kind])
        names = ("prompt_ids", "completion_ids") if ids else ("prompt", "completion")
        shared = {c: example[c] for c in ("tools", *_SHARED) if c in example}
        for answer in ("chosen", "rejected"):
            score = f"{answer}_score"
            if score not in example:
                raise Wrong(score, "a number", "none")
            single = {**shared, names[0]: example["prompt"], names[1]: example[answer], "reward": example[score]}
            to_own = {names[0]: "prompt", names[1]: answer, "reward": score}
            for one, part in _unrolled(single, "token ids" if ids else "prompt and completion"):
                yield one, {k: to_own.get(v, v) for k, v in {**{c: c for c in single}, **part}.items()}
    elif kind == "prompt and completion" and any(_is_messages(example[column]) for column in ("prompt", "completion")):
        for column in ("prompt", "completion"):
            if not _is_messages(example[column]):
                raise Wrong(column, "messages, as the other of prompt and completion", type(example[column]).__name__)
        rest = {column: value for column, value in example.items() if column not in ("prompt", "completion")}
        turns = [*example["prompt"], *example["completion"]]
        yield {**rest, "messages": turns, "prompt_messages": len(example["prompt"])}, {"messages": "completion"}
    else:
        yield example, {}


def _is_messages(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0 and isinstance(value[0], Mapping)


def _number(example: Example, column: str, default: float | None = None) -> float:
    value = example.get(column, default)
    value = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
    if not is_real(value) or not np.isfinite(value):
        raise Wrong(column, "a finite number", repr(value))
    return float(value)


def _list(example: Example, column: str, *, whole: bool, length: int | None = None, unit: str = "") -> list[Any]:
    fault = list_fault(example[column], whole=whole)
    if fault:
        raise Wrong(column, f"a list of {'whole ' if whole else ''}numbers", fault)
    if length is not None and len(example[column]) != length:
        raise Wrong(column, f"{length} entries, one {unit}", str(len(example[column])))
    values = np.asarray(example[column])
    if not np.isfinite(values).all():
        raise Wrong(
            column, "finite numbers", f"{values[~np.isfinite(values)][0]} at entry {int(np.argmin(np.isfinite(values)))}"
        )
    return values.tolist()


def _tokens(example: Example, column: str, vocabulary: int) -> list[int]:
    ids = _list(example, column, whole=True)
    if not ids:
        raise Wrong(column, "at least one token", "an empty list", "" if column != "prompt_ids" else _NO_PROMPT)
    outside = next((i for i, token in enumerate(ids) if not 0 <= token < vocabulary), None)
    if outside is not None:
        raise Wrong(column, f"tokens from 0 to {vocabulary - 1}", f"{ids[outside]} at entry {outside}")
    return ids


_NO_PROMPT = "Nothing scores an answer's first token without a prompt: put a beginning-of-sequence token there."


def _paid(example: Example, length: int, slots: Sequence[int], last: int, unit: str) -> list[float]:
    """float a token: `reward` at the last action, or `rewards` at their slots."""
    given = [column for column in ("reward", "rewards") if column in example]
    if len(given) != 1:
        raise Wrong("reward", "one of reward and rewards", "both" if given else "none")
    out = [0.0] * length
    if given == ["reward"]:
        out[last] = _number(example, "reward")
    else:
        for slot, value in zip(slots, _list(example, "rewards", whole=False, length=len(slots), unit=unit), strict=True):
            out[slot] = float(value)
    return out


def _terminated(example: Example) -> bool:
    value = example.get("terminated", True)
    if not isinstance(value, (bool, np.bool_)):
        raise Wrong("terminated", "True or False", repr(value))
    return bool(value)


# --- formats ---------------------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """An assistant message in the rendered text: characters start to stop, its closing token from `close` on."""

    message: int
    start: int
    close: int
    stop: int


@dataclass(frozen=True)
class _Reader:
    """One example to a Draft."""

    tokenizer: Any
    vocabulary: int
    append_eos: bool = True
    end_of_turn: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def read(self, example: Example) -> Draft:
        if "completion_ids" in example:
            return self._ids(example)
        if self.tokenizer is None:
            raise bad("tokenizer", "a tokenizer, as the data are no token ids", "None")
        return self._messages(example) if "messages" in example else self._text(example)

    def _ids(self, example: Example) -> Draft:
        prompt, answer = (_tokens(example, column, self.vocabulary) for column in FORMATS["token ids"])
        mask = [1] * len(answer)
        if "completion_mask" in example:
            mask = _list(example, "completion_mask", whole=True, length=len(answer), unit="a token of completion_ids")
        last = max((i for i, own in enumerate(mask) if own == 1), default=None)
        if last is None:
            raise Wrong("completion_mask", "at least one action, a 1", "an empty completion")
        rewards = _paid(example, len(answer), range(len(answer)), last, "a token of completion_ids")
        none = [0] * len(prompt)
        return Draft(prompt + answer, none + mask, [0.0] * len(prompt) + rewards, tuple(prompt))

    def _text(self, example: Example) -> Draft:
        for column in ("prompt", "completion"):
            if not isinstance(example[column], str):
                raise Wrong(column, "a string, or messages", type(example[column]).__name__)
        if "tools" in example:
            raise Wrong("tools", "messages in prompt and completion", "strings", "A template puts tools into a conversation.")
        if "rewards" in example:
            raise Wrong("rewards", "reward, a number, as text has no tokens yet", "rewards", "Hand in token ids instead.")
        prompt = self._opened(example["prompt"])
        answer = list(self.tokenizer(example["completion"], add_special_tokens=False)["input_ids"])
        if not prompt:
            raise Wrong("prompt", "at least one token", repr(example["prompt"]), _NO_PROMPT)
        if not answer:
            raise Wrong("completion", "at least one token", "an empty completion")
        if self.append_eos and _terminated(example):
            end = self.tokenizer.eos_token_id
            if end is None:
                raise bad("tokenizer", "one with an eos_token", "None", "Set it, or append_eos=False.")
            answer += [end] if answer[-1] != end else []
        P, T = len(prompt), len(answer)
        rewards = _paid(example, P + T, (), P + T - 1, "")
        return Draft(prompt + answer, [0] * P + [1] * T, rewards, tuple(prompt))

    def _opened(self, text: str) -> list[int]:
        """The text with the special tokens that begin one, without those that end one: the answer is still to come."""
        plain = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        full = list(self.tokenizer(text)["input_ids"])
        if not plain:
            return full[:1] if full[:1] == [self.tokenizer.bos_token_id] else []
        n = len(plain)
        before = next((i for i in range(len(full) - n, -1, -1) if full[i : i + n] == plain), None)
        return full if before is None else full[: before + n]

    # --- messages ---

    def _messages(self, example: Example) -> Draft:
        turns, tools, own = self._turns(example)
        ended = _terminated(example)
        whole, spans = self._spans(turns, tools, header=not ended and turns[-1]["role"] != "assistant")
        ids, starts, stops = self._tokenised(whole)
        cover = [self._place(ids, starts, stops, whole, span) for span in spans]
        self._compare(turns, tools, ids, cover)
        policy = [(span, first, last) for span, (first, last) in zip(spans, cover, strict=True) if span.message >= own]
        if not policy:
            raise Wrong("messages", "an assistant message after the prompt", "none")
        if not ended and turns[-1]["role"] == "assistant":
            span, first, _ = policy[-1]
            policy[-1] = (span, *self._place(ids, starts, stops, whole, span._replace(stop=span.close)))
        mask = np.zeros(len(ids), dtype=np.int64)
        for _, first, last in policy:
            mask[first : last + 1] = 1
        end = len(ids) if not ended and turns[-1]["role"] != "assistant" else policy[-1][2] + 1
        rewards = _paid(example, end, [last for *_, last in policy], policy[-1][2], "an assistant message of the policy")
        return Draft(ids[:end], mask[:end].tolist(), rewards, tuple(ids[: policy[0][1]]))

    def _turns(self, example: Example) -> tuple[list[dict[str, Any]], Any, int]:
        """(messages, tools, the first message that is not the prompt's)."""
        if not _is_messages(example["messages"]):
            raise Wrong("messages", "a list of messages", repr(example["messages"])[:60])
        turns = []
        for i, turn in enumerate(example["messages"]):
            role = turn.get("role") if isinstance(turn, Mapping) else turn
            if role not in ROLES:
                raise Wrong("messages", f"roles {', '.join(ROLES)}", f"{role!r} in message {i}")
            turns.append({key: value for key, value in turn.items() if value is not None})
        if turns[0]["role"] == "assistant":
            raise Wrong("messages", "a message before the first assistant's", "none", _NO_PROMPT)
        own = example.get("prompt_messages", 0)
        if not is_whole(own) or not 0 <= own < len(turns):
            raise Wrong("prompt_messages", f"a whole number from 0 to {len(turns) - 1}", repr(own))
        tools = example.get("tools")
        try:
            tools = json.loads(tools) if isinstance(tools, str) else tools
        except json.JSONDecodeError as error:
            raise Wrong("tools", "a list of tools, or such a list as JSON", str(error)) from None
        return turns, tools or None, int(own)

    def _render(self, turns: list[dict[str, Any]], tools: Any, header: bool) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise bad("tokenizer", "one with a chat template, as the data are messages", "none", "Set tokenizer.chat_template.")
        try:
            return self.tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=header, **self.options
            )
        except Exception as error:  # a template is a program of its own and may raise anything
            raise Wrong("messages", "messages that the chat template renders", f"{type(error).__name__}: {error}") from None

    def _spans(self, turns: list[dict[str, Any]], tools: Any, header: bool) -> tuple[str, list[Span]]:
        """(the whole text, the assistant messages in it)."""
        whole = self._render(turns, tools, header)
        if tools and whole == self._render(turns, None, header):
            raise Wrong("tools", "a chat template that shows them", "one that leaves them out", "Put them into a message.")
        spans = []
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            bare, before = (self._render(turns[:i], tools, add) for add in (False, True))
            through = self._render(turns[: i + 1], tools, False)
            for text in (before, through):
                if not whole.startswith(text):
                    at = next((k for k, (a, b) in enumerate(zip(whole, text, strict=False)) if a != b), len(whole))
                    found = f"around message {i} {text[at : at + 30]!r} turned into {whole[at : at + 30]!r}"
                    raise Wrong("messages", "a chat template that keeps earlier text as turns are added", found, _REWRITES)
            spans.append(self._span(i, turn, whole, len(before), len(through), bare == before))
        return whole, spans

    def _span(self, i: int, turn: Mapping[str, Any], whole: str, start: int, stop: int, headless: bool) -> Span:
        text = whole[start:stop]
        ends = [self.end_of_turn] if self.end_of_turn else list(self.tokenizer.all_special_tokens)
        close = max(((text.rfind(end), len(end)) for end in ends if end in text), default=None)
        if close is None or text[sum(close) :].strip():
            remedy = "Let the template close it with a special token, or name the text that does: end_of_turn."
            raise Wrong("messages", f"message {i} to end in an end-of-turn token", repr(text[-30:]), remedy)
        said = text[: close[0]]
        if not said.strip():
            raise Wrong(
                "messages", f"tokens of assistant message {i}", "nothing but its end", "Leave it out, or give it content."
            )
        shown = [*_texts(turn.get("content")), *_calls(turn.get("tool_calls"))]
        lost = next((piece for piece in shown if piece not in said), None)
        if lost is not None:
            found = f"{lost[:40]!r} is not in {said[:60]!r}"
            raise Wrong("messages", f"a chat template that shows all of assistant message {i}", found)
        if headless and shown and not said.lstrip().startswith(shown[0]):
            remedy = "Let the template honour add_generation_prompt."
            raise Wrong("messages", f"message {i} to begin with its content", repr(said[:40]), remedy)
        return Span(i, start, start + close[0], start + sum(close))

    def _tokenised(self, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
        """(ids, first character, character after the last) of each token."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise bad("tokenizer", "a fast tokenizer, which knows character offsets", type(self.tokenizer).__name__)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return list(encoded["input_ids"]), offsets[:, 0], offsets[:, 1]

    def _place(self, ids: list[int], starts: np.ndarray, stops: np.ndarray, text: str, span: Span) -> tuple[int, int]:
        """The first and last token of a span. Wrong where a token straddles its border, or where none is inside."""
        inside = np.flatnonzero((starts >= span.start) & (starts < span.stop) & (stops > span.start))
        straddling = np.flatnonzero((starts < span.start) & (stops > span.start))
        if len(inside) and text[span.stop : stops[inside[-1]]].strip():  # the blanks after it may belong to an end token
            straddling = np.append(straddling, inside[-1])
        if len(inside) and not len(straddling):
            blank = int(stops[: inside[0]].max(initial=0))
            if blank < span.start and not self._splits(ids, int(inside[0]), text[: span.start]):
                straddling = inside[:1]
        if len(straddling):
            token = int(straddling[0])
            shown = self.tokenizer.convert_ids_to_tokens(ids[token])
            found = f"token {token}, {shown!r}, on both sides of {text[max(span.start - 10, 0) : span.start + 10]!r}"
            remedy = "Generation would have split it there. Strip the message's blanks, or change the template."
            raise Wrong("messages", f"tokens that end where assistant message {span.message} begins and ends", found, remedy)
        if not len(inside):
            raise Wrong("messages", f"tokens of assistant message {span.message}", "none")
        return int(inside[0]), int(inside[-1])

    def _splits(self, ids: list[int], token: int, before: str) -> bool:
        """If the tokens before are those of the text before; asked where offsets leave out blanks that a token may hold."""
        return list(self.tokenizer(before, add_special_tokens=False)["input_ids"]) == ids[:token]

    def _compare(self, turns: list[dict[str, Any]], tools: Any, ids: list[int], cover: list[tuple[int, int]]) -> None:
        """The template's own marks, where it has them, against the spans: two roads to one mask."""
        if not re.search(r"\{%-?\s*generation\s*-?%\}", str(self.tokenizer.get_chat_template(None, tools))):
            return
        marked = self.tokenizer.apply_chat_template(
            turns, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **self.options
        )
        mask = np.zeros(len(ids), dtype=np.int64)
        for first, last in cover:
            mask[first : last + 1] = 1
        n = len(marked["input_ids"])
        if list(marked["input_ids"]) != ids[:n]:
            raise Wrong("messages", "the same tokens with and without the template's {% generation %} marks", "others")
        differ = np.flatnonzero(np.asarray(marked["assistant_masks"]) != mask[:n])
        if len(differ):
            token = int(differ[0])
            whose = "an answer by the spans alone" if mask[token] else "an answer by the marks alone"
            found = f"token {token}, {self.tokenizer.convert_ids_to_tokens(ids[token])!r}, {whose}"
            raise Wrong("messages", "the template's {% generation %} marks to hold each answer and its end token", found)


_REWRITES = (
    "A policy never saw the text as it is trained on then. Use a template that strips nothing (thinking, blanks) from earlier "
    "turns and whose generation prompt is how an answer begins; or split the conversation into rows."
)


def _texts(content: object) -> list[str]:
    """The texts of a message's content."""
    if isinstance(content, str):
        return [content.strip()] if content.strip() else []
    parts = content if isinstance(content, Sequence) else []
    return [part["text"].strip() for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]


def _calls(calls: object) -> list[str]:
    """The names of the functions that a message calls."""
    found = []
    for call in calls if isinstance(calls, Sequence) else []:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            found.append(function["name"])
    return found
