"""BFCL V3: what may reach the official `eval`, the official verdict by two roads, the environment and the dialogues."""

import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from decimal import getcontext
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

from shiq_lab.hf import bfcl
from shiq_lab.hf.bfcl_calls import LARGEST, MAX_CALLS, MAX_CHARACTERS, MAX_DEPTH, Call, parse_calls, show_calls
from shiq_lab.hf.bfcl_dialogues import PERTURBATIONS, TRUTH, dialogues, perturbed
from shiq_lab.hf.bfcl_env import BFCLEnv

FUNCTIONS = {"cd": ("folder",), "ls": ("a",), "power": ("base", "exponent"), "multiply": ("a", "b"), "sort": ("file_name",)}


# --------------------------------------------------------------------------------------------------------------- parsing
@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("[cd(folder='a'), ls()]", [Call("cd", (), (("folder", "a"),)), Call("ls")]),
        ("cd('a')\nls(a=True)", [Call("cd", ("a",)), Call("ls", (), (("a", True),))]),
        ("  cd('a')  ", [Call("cd", ("a",))]),
        ("cd(-1.5)", [Call("cd", (-1.5,))]),
        ("cd([1, {'a': [None, 'b']}])", [Call("cd", ([1, {"a": [None, "b"]}],))]),
        ("[]", []),
        ("", []),
    ],
)
def test_calls_are_read(text: str, calls: list[Call]) -> None:
    assert parse_calls(text, FUNCTIONS) == calls


HOSTILE = [
    ("__import__('os').system('ls')", "Attribute `__import__('os').system`"),
    ("__import__('os')", "'__import__'"),
    ("eval('1')", "'eval'"),
    ("cd.__class__()", "Attribute `cd.__class__`"),
    ("cd().__class__", "Attribute"),
    ("cd(folder=x)", "Name `x`"),
    ("cd(folder=__builtins__)", "Name `__builtins__`"),
    ("cd(cd())", "Call `cd()`"),
    ("cd()()", "Call `cd()`"),
    ("[cd() for _ in 'ab']", "ListComp"),
    ("cd([x for x in 'ab'])", "ListComp"),
    ("cd({'a': x for x in 'ab'})", "DictComp"),
    ("cd(x for x in 'ab')", "GeneratorExp"),
    ("cd(f'{1}')", "JoinedStr"),
    ("cd(*['a'])", "Starred"),
    ("cd(**{'folder': 'a'})", "starred dict"),
    ("cd({**{}})", "Dict"),
    ("cd('a' + 'b')", "BinOp"),
    ("cd('a' * 10**9)", "BinOp"),
    ("cd(not 1)", "UnaryOp"),
    ("cd(-True)", "-True"),
    ("cd(--1)", "UnaryOp"),
    ("cd((1, 2))", "Tuple"),
    ("cd({1})", "Set"),
    ("cd({1: 2})", "Dict"),
    ("cd(b'a')", "type bytes"),
    ("cd(1j)", "type complex"),
    ("cd(...)", "type ellipsis"),
    ("cd(1e999)", "a larger one"),
    (f"cd({LARGEST + 1})", "a larger one"),
    ("cd('\\ud800')", "lone surrogate"),
    ("cd(\ud800)", "no Python"),
    ("cd(folder='a', folder='b')", "'folder' twice"),
    ("cd(lambda: 1)", "Lambda"),
    ("(lambda: 1)()", "Lambda"),
    ("cd(a := 1)", "NamedExpr"),
    ("cd(1 if 1 else 2)", "IfExp"),
    ("cd()[0]", "Subscript"),
    ("cd", "Name `cd`"),
    ("[[cd()]]", "List"),
    ("[cd()] * 3", "BinOp"),
    ("await cd()", "Await"),
    ("x = cd()", "Assign"),
    ("import os", "Import"),
    ("del cd", "Delete"),
    ("def cd(): pass", "FunctionDef"),
    ("while True: cd()", "While"),
    ("I can't do that.", "no Python"),
    ("cd('a'", "no Python"),
    ("cd(\0)", "no Python"),
    ("nothing_such(a='a')", "'nothing_such'"),
    ("CD()", "Did you mean 'cd'?"),
    ("power(2, 10**9)", "BinOp"),
    ("power(2, 100000)", "100000"),
    ("power(base=2, exponent=-1e9)", "-1000000000.0"),
    ("multiply('a', 10000000000)", "10000000000"),
    ("(" * 300, "no Python"),
    ("cd(" + "-" * 9000 + "1)", "no Python"),
    ("a." * 5000 + "b", "no Python"),
    ("cd(" + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + ")", "deeper"),
    ("cd(" + "[" * 150 + "]" * 150 + ")", "deeper"),
    ("cd(" + "9" * 5000 + ")", "no Python"),
    ("x" * (MAX_CHARACTERS + 1), f"{MAX_CHARACTERS + 1:,}"),
    ("ls()\n" * (MAX_CALLS + 1), str(MAX_CALLS + 1)),
]


@pytest.mark.parametrize(("text", "named"), HOSTILE, ids=[repr(text[:24]) for text, _ in HOSTILE])
def test_all_else_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        parse_calls(text, FUNCTIONS)
    assert named in str(caught.value) and len(str(caught.value)) < 400


def test_the_limits_themselves_pass() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert len(parse_calls(f"cd({deep}, {LARGEST})\n" + "ls()\n" * (MAX_CALLS - 1), FUNCTIONS)) == MAX_CALLS
    assert parse_calls("power(2, 1000)", FUNCTIONS) and parse_calls(" " * (MAX_CHARACTERS - 4) + "ls()", FUNCTIONS)


def test_text_that_is_no_text() -> None:
    with pytest.raises(ValueError, match="text: expected a string, got NoneType"):
        parse_calls(None, FUNCTIONS)  # type: ignore[arg-type]


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-LARGEST, LARGEST)
    | st.floats(-1e18, 1e18)
    | st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("()'\"\\\n{}x28"), max_size=12)
)
NAMES = st.text("ab(", max_size=3)
VALUES = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(NAMES, x, max_size=2), max_leaves=6)


@given(st.lists(VALUES, max_size=3), st.dictionaries(st.sampled_from(["folder", "b", "c"]), VALUES, max_size=2))
def test_what_is_written_is_what_was_read(values: list[Any], keywords: dict[str, Any]) -> None:
    """text -> calls -> text, and Python's own eval of `code` gives the same literals; no "(" but the call's own is in it."""
    call = Call("cd", tuple(values), tuple(keywords.items()))
    assert parse_calls(show_calls([call, call]), FUNCTIONS) == [call, call]
    assert call.code.count("(") == 1
    assert eval(call.code, {"cd": lambda *a, **k: (a, k)}) == (tuple(values), keywords)


# --------------------------------------------------------------------------------------------------- without the package
def test_its_absence_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfcl, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"bfcl-eval.*pip install --no-deps -r requirements-assets\.txt"):
        bfcl.entries()


def test_another_version_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bfcl, "_root", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"2025\.6\.30\.4 holds V3"):
        bfcl.entries()


def test_a_wrong_category() -> None:
    with pytest.raises(ValueError, match="Did you mean 'miss_func'"):
        bfcl.entries("miss_fun")


# ------------------------------------------------------------------------------------------------------- official package
@pytest.fixture(scope="module")
def base() -> list[bfcl.Entry]:
    return bfcl.entries()


@pytest.fixture
def left_behind() -> Iterator[None]:
    """Nothing of a run stays in the executor's globals."""
    executor = importlib.import_module(bfcl.EXECUTOR)
    before = set(vars(executor))
    yield
    assert set(vars(executor)) == before


def raw_answers(category: str) -> list[str]:
    path = bfcl._root() / "data" / "possible_answer" / f"BFCL_v3_multi_turn_{category}.json"
    lines = path.read_text(encoding="utf-8").split("\n")
    return [call for line in lines if line for turn in json.loads(line)["ground_truth"] for call in turn]


@pytest.mark.slow
def test_all_answers_fit_the_whitelist() -> None:
    """All 4,701, and evaluating what is written from them gives what evaluating the original gives."""
    functions = bfcl.functions_of(bfcl.DOCUMENTS)
    space = {name: lambda *a, **k: (a, k) for name in functions}
    texts = [text for category in bfcl.CATEGORIES for text in raw_answers(category)]
    assert len(texts) == 4701 and len(functions) == 129
    for text in texts:
        (call,) = parse_calls(text, functions)
        assert eval(call.code, space) == eval(text, space) and text.split("(")[0] == call.name


@pytest.mark.slow
def test_the_limits_lie_far_above_the_answers() -> None:
    """The numbers beside the limits in bfcl_calls.py."""
    turns = [turn for category in bfcl.CATEGORIES for entry in bfcl.entries(category) for turn in entry.truth]
    values = [value for turn in turns for call in turn for value in call.values()]
    assert (max(len(show_calls(turn)) for turn in turns), max(map(len, turns))) == (6784, 34)
    assert max(abs(value) for value in values if isinstance(value, (int, float))) == 987_654
    assert max(depth(value) for value in values) == 1


def depth(value: Any) -> int:
    """Of lists and dicts in one another."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@pytest.mark.slow
@pytest.mark.usefixtures("left_behind")
@pytest.mark.parametrize(("category", "count", "turns"), [("base", 199, 740), *((c, 200, n) for c, n in (
    ("miss_func", 945), ("miss_param", 945), ("long_context", 745)))])  # fmt: skip
def test_every_answer_is_valid(category: str, count: int, turns: int) -> None:
    """The official checker says so at every turn, and no right call raises (else the checker would compare errors)."""
    found = bfcl.entries(category)
    assert len(found) == count
    assert sum(int(sum(bfcl.score(entry, entry.truth))) for entry in found) == turns
    replies = [reply for entry in found for turn in bfcl.execute(entry, entry.truth) for reply in turn]
    assert len(replies) > 1100 and not [reply for reply in replies if reply.startswith("Error during execution")]


@pytest.mark.slow
def test_the_entry_that_cannot_be_answered_is_left_out(base: list[bfcl.Entry]) -> None:
    """multi_turn_base_154 has five questions and six turns of answers."""
    assert {f"multi_turn_base_{i}" for i in range(200)} - {entry.id for entry in base} == {"multi_turn_base_154"}


def failed_turn(verdict: dict[str, Any]) -> int:
    """The other road: one look at the whole dialogue, and where it says that it stopped."""
    if "execution_result" in verdict:
        return len(verdict["execution_result"]) - 1
    return int(verdict["error_message"].rstrip(".").split()[-1])


@pytest.mark.slow
@pytest.mark.usefixtures("left_behind")
def test_rewards_by_two_roads(base: list[bfcl.Entry]) -> None:
    seen = 0
    for entry in base:
        for kind in PERTURBATIONS:
            calls = perturbed(entry, kind, 1)
            if calls is None:
                continue
            whole, rewards = bfcl.verdict(entry, calls), bfcl.score(entry, calls)
            first = len(calls) if whole["valid"] else failed_turn(whole)
            assert rewards == [float(t < first) for t in range(len(calls))]
            seen += not whole["valid"]
    assert seen > 700


@pytest.mark.slow
def test_a_leading_digit_is_a_trap(base: list[bfcl.Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a name that starts with a digit wrong answers are valid; under ours none of them is."""
    wrong = []
    for entry in base[:50]:
        calls = [list(turn) for turn in entry.truth]
        calls[0] = [Call(call.name, ("no",) * 9) for call in calls[0]]  # no function takes nine arguments
        wrong += [(entry, calls)] if calls[0] else []
    ours = [bfcl.verdict(entry, calls)["valid"] for entry, calls in wrong]
    monkeypatch.setattr(bfcl, "_PREFIX", "7shiq")
    trapped = [bfcl.verdict(entry, calls)["valid"] for entry, calls in wrong]
    replies = [bfcl.execute(entry, entry.truth)[0][0] for entry, _ in wrong]
    assert len(wrong) == 50 and not any(ours) and all(trapped)
    assert all(reply.startswith("Error during execution") for reply in replies)


@pytest.mark.slow
def test_the_executor_changes_text_in_strings(base: list[bfcl.Entry]) -> None:
    """It puts an object's name before `sort(` even in a string; so `code` writes the bracket as an escape."""
    entry = next(entry for entry in base if "echo" in entry.functions)
    call = Call("echo", (), (("content", "use sort(x), \\( and \\x28"),))
    run = importlib.import_module(bfcl.EXECUTOR)._process_method_calls
    mapping = dict.fromkeys(entry.functions, "object")
    assert "object.sort" in run(call.text, mapping) and run(call.code, mapping) == f"object.{call.code}"
    assert json.loads(bfcl.execute(entry, [[call]])[0][0]) == {"terminal_output": call.values()[0]}


@pytest.mark.slow
@pytest.mark.usefixtures("left_behind")
@pytest.mark.parametrize("call", [Call("__import__", ("os",)), Call("cd", (print,)), Call("cd", ((1, 2),)), Call("cd(1), cd")])
def test_a_call_made_by_hand_is_read_as_well(call: Call, base: list[bfcl.Entry]) -> None:
    with pytest.raises(ValueError, match="expected"):
        bfcl.execute(base[0], [[call]])
    with pytest.raises(ValueError, match="expected"):
        bfcl.score(base[0], [[call]])


@pytest.mark.slow
def test_too_many_turns(base: list[bfcl.Entry]) -> None:
    with pytest.raises(ValueError, match="at most 4 turns"):
        bfcl.score(base[0], [[]] * 5)


@pytest.mark.slow
def test_documents_and_back_ends_have_the_same_functions() -> None:
    paths = importlib.import_module(bfcl.EXECUTOR).CLASS_FILE_PATH_MAPPING
    assert set(paths) == set(bfcl.DOCUMENTS)
    for class_, path in paths.items():
        methods = inspect.getmembers(getattr(importlib.import_module(path), class_), inspect.isfunction)
        assert {name for name, _ in methods if not name.startswith("_")} == set(bfcl.documents(class_))


@pytest.mark.slow
@pytest.mark.usefixtures("left_behind")
def test_no_trace_is_left(base: list[bfcl.Entry], capsys: pytest.CaptureFixture[str]) -> None:
    """Not in `decimal` or mpmath, which the mathematical functions set; not on the screen; not beside the package."""
    mpmath = importlib.import_module("mpmath")
    site = bfcl._root().parent
    before = getcontext().prec, mpmath.mp.prec, files(site)
    maths = next(entry for entry in base if "MathAPI" in entry.classes)
    calls = [[Call("square_root", (2, 50)), Call("logarithm", (2, 3, 60)), Call("nothing")][:2]]
    (first, second), *_ = bfcl.execute(maths, calls)
    assert "1.41421356237309504880168872420969807856967187537" in first and "0.63092975357145743" in second
    dialogues(base[:5], seed=0)
    assert (getcontext().prec, mpmath.mp.prec, files(site)) == before
    assert capsys.readouterr() == ("", "")


def files(site: Path) -> set[str]:
    """The package's files, and what stands beside it; compiled files aside."""
    inside = {str(path) for path in (site / "bfcl_eval").rglob("*") if "__pycache__" not in path.parts}
    return inside | {path.name for path in site.iterdir()}


@pytest.mark.slow
def test_its_side_effects_at_import_are_avoided() -> None:
    """A fresh process that plays an entry never imports the modules that make folders inside site-packages."""
    code = (
        "import sys; from shiq_lab.hf import bfcl; e = bfcl.entries()[0]; assert all(bfcl.score(e, e.truth));"
        "print(sorted(m for m in sys.modules if m.startswith('bfcl_eval') and ('eval_config' in m or m == 'bfcl_eval.utils')))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.slow
def test_signatures_are_short(base: list[bfcl.Entry]) -> None:
    assert bfcl.signature(["GorillaFileSystem"], "echo") == "echo(content, file_name=None)"
    assert bfcl.signature(["MathAPI", "GorillaFileSystem"], "tail") == "tail(file_name, lines=10)"
    for class_, file in bfcl.DOCUMENTS.items():
        whole = (bfcl._root() / "data" / "multi_turn_func_doc" / f"{file}.json").read_text(encoding="utf-8")
        assert len(whole) > 10 * sum(len(bfcl.signature([class_], name)) for name in bfcl.documents(class_))


@pytest.mark.slow
def test_functions_that_come_late() -> None:
    """miss_func: a withheld function is told in its turn, and having no calls before is right."""
    entry = bfcl.entries("miss_func")[0]
    assert entry.withheld == {3: ("sort",)} and entry.truth[2] == ()
    assert "sort(file_name)" not in entry.system() and entry.user(3) == f"sort(file_name)\n{bfcl.MORE}"
    env = BFCLEnv([entry])
    env.reset()
    answers = [show_calls(turn) for turn in entry.truth]
    answers[2] = "I have no function that sorts."
    assert [env.step(text)[1] for text in answers] == [1.0] * 5


@pytest.mark.slow
def test_fewer_functions_are_told(base: list[bfcl.Entry]) -> None:
    """The answers' own stay, in the same order, and the answers stay valid; a withheld one may be among those left out."""
    for entry in base[:40]:
        few = entry.narrowed(8)
        used = {call.name for turn in entry.truth for call in turn}
        assert len(few.functions) == max(8, len(used)) and used <= set(few.functions)
        assert list(few.functions) == [name for name in entry.functions if name in few.functions]
        assert few == entry.narrowed(8) and all(bfcl.score(few, few.truth)) and few.system().count("\n") == len(few.functions)
    assert any(set(e.narrowed(8).functions) != set(e.narrowed(8, seed=1).functions) for e in base[:5])
    cut = bfcl.entries("miss_func")[0].first(3).narrowed(1)
    assert "sort" not in cut.functions and "sort" not in cut.system()


# ------------------------------------------------------------------------------------------------------------------ split
@pytest.mark.slow
def test_split(base: list[bfcl.Entry]) -> None:
    train, held = bfcl.split(base, train=100, held_out=99, seed=1)
    assert {e.id for e in train} | {e.id for e in held} == {e.id for e in base} and len(train) == 100
    again = bfcl.split(base[::-1], train=100, held_out=99, seed=1)
    assert [[e.id for e in part] for part in again] == [[e.id for e in part] for part in (train, held)]
    assert [e.id for e in bfcl.split(base, train=100, held_out=99, seed=2)[0]] != [e.id for e in train]
    mixed = [*base, *bfcl.entries("miss_param")]
    for n in (150, 151):  # one of them cuts between the two entries of a number
        train, held = bfcl.split(mixed, train=n, held_out=200)
        assert not {e.number for e in train} & {e.number for e in held}
    with pytest.raises(ValueError, match="at most the 199 entries"):
        bfcl.split(base, train=100, held_out=100)


# -------------------------------------------------------------------------------------------------------------- dialogues
@pytest.mark.slow
def test_dialogues(base: list[bfcl.Entry]) -> None:
    """Truth is right, what is perturbed mostly not; repeats are harmless as a rule, and a call left out never is."""
    rows = dialogues(base, seed=0)
    right = {kind: [row["right"] for row in rows if row["kind"] == kind] for kind in (TRUTH, *PERTURBATIONS)}
    assert len(right[TRUTH]) == 199 and all(right[TRUTH])
    assert len(right["empty turn"]) == 199 and not any(right["empty turn"])
    assert len(right["dropped call"]) > 150 and not any(right["dropped call"])
    for kind, most in (("wrong argument", 0.1), ("swapped function", 0.05)):
        assert len(right[kind]) > 180 and np.mean(right[kind]) < most
    assert 0.7 < np.mean(right["repeated call"]) < 0.95
    for row in rows:
        said = [m["role"] for m in row["messages"]]
        assert said[0] == "system" and said[-1] == "assistant" and said.count("assistant") == len(row["rewards"])
        assert row["right"] == all(row["rewards"]) and base[row["group"]].id == row["entry"]
        assert all(m["content"] for m in row["messages"])
    texts = [json.dumps([m for m in row["messages"] if m["role"] == "assistant"]) for row in rows]
    assert len({(row["group"], text) for row, text in zip(rows, texts, strict=True)}) == len(rows)


@pytest.mark.slow
def test_dialogues_depend_on_seed_and_entry_alone(base: list[bfcl.Entry]) -> None:
    one, two = dialogues(base[:6], seed=3), dialogues(base[:6], seed=3)
    assert one == two != dialogues(base[:6], seed=4)
    alone = [row for entry in base[5::-1] for row in dialogues([entry], seed=3)]
    key = lambda row: (row["entry"], row["kind"])  # noqa: E731
    assert [{**r, "group": 0} for r in sorted(one, key=key)] == sorted(alone, key=key)
    assert {row["kind"] for row in dialogues(base[:6], seed=3, perturbations=["empty turn"])} == {TRUTH, "empty turn"}
    with pytest.raises(ValueError, match="Did you mean 'empty turn'"):
        dialogues(base[:1], seed=0, perturbations=["empty turns"])


@pytest.mark.slow
def test_a_change_that_changes_nothing_is_left_out(base: list[bfcl.Entry]) -> None:
    """None has no other value of its type."""
    entry = replace(base[0].first(1), truth=((Call("ls", (), (("a", None),)),),))
    assert [row["kind"] for row in dialogues([entry], seed=0, perturbations=["wrong argument", "empty turn"])] == [
        TRUTH,
        "empty turn",
    ]


@pytest.mark.slow
def test_replies_are_cut_and_turns_too(base: list[bfcl.Entry]) -> None:
    short = [entry.first(2) for entry in base[:20]]
    assert [e.id for e in bfcl.entries(max_turns=2)[:20]] == [e.id for e in short]
    for row in dialogues(short, seed=0, reply_characters=50):
        assert len(row["rewards"]) <= 2
        assert all(len(line) <= 53 for m in row["messages"] if m["role"] == "tool" for line in m["content"].split("\n"))


# ------------------------------------------------------------------------------------------------------------ environment
@pytest.mark.slow
@pytest.mark.usefixtures("left_behind")
def test_the_environment_is_one() -> None:
    env = gymnasium.make("shiq_lab.hf.bfcl_env:shiq/BFCL-v0", render_mode="ansi")
    check_env(env.unwrapped)
    first, info = env.reset(seed=5)
    assert env.reset(seed=5)[1]["entry"] == info["entry"] and env.render() == first
    assert len({env.reset(seed=seed)[1]["entry"] for seed in range(30)}) > 20


@pytest.mark.slow
@pytest.mark.usefixtures("left_behind")
def test_the_environment_and_the_dialogues_say_the_same(base: list[bfcl.Entry]) -> None:
    """Every row, played: the same messages and rewards, turn by turn, as written at once."""
    env = BFCLEnv(base[:12])
    rows = dialogues(base[:12], seed=0)
    assert len(rows) > 60
    for row in rows:
        _, info = env.reset(options={"entry": row["group"]})
        rewards: list[float] = []
        for message in [m for m in row["messages"] if m["role"] == "assistant"]:
            observation, reward, terminated, truncated, info = env.step(message["content"])
            rewards.append(reward)
            assert observation in env.observation_space and not truncated and not info["error"]
        assert terminated and rewards == row["rewards"]
        played = [m for m in info["messages"] if m["role"] != "tool" or m is not info["messages"][-1]]
        assert played == row["messages"]


@pytest.mark.slow
def test_several_steps_a_turn(base: list[bfcl.Entry]) -> None:
    """A call at a time, then []: the rewards come at the ends of turns and are the same."""
    env, entry = BFCLEnv(base[:1], steps=20), base[0]
    env.reset()
    for turn, replies in zip(entry.truth, bfcl.execute(entry, entry.truth), strict=True):
        for call, reply in zip(turn, replies, strict=True):
            _, reward, _, _, info = env.step(show_calls([call]))
            assert reward == 0.0 and info["messages"][-1] == {"role": "tool", "content": bfcl.shown_replies([reply])}
        _, reward, terminated, _, _ = env.step("[]")
        assert reward == 1.0
    assert terminated


@pytest.mark.slow
@pytest.mark.usefixtures("left_behind")
@pytest.mark.parametrize("text", [text for text, _ in HOSTILE], ids=[repr(text[:24]) for text, _ in HOSTILE])
def test_malformed_text_is_answered(text: str, base: list[bfcl.Entry]) -> None:
    env = BFCLEnv(base[:1])
    env.reset()
    observation, reward, terminated, _, info = env.step(text)
    assert reward == 0 and not terminated and info["turn"] == 1 and observation in env.observation_space
    assert info["error"] and info["messages"][-2] == {"role": "tool", "content": info["error"]}


@pytest.mark.slow
def test_the_environment_names_bad_use(base: list[bfcl.Entry]) -> None:
    env = BFCLEnv(base[:1])
    with pytest.raises(ValueError, match="Call reset first"):
        env.step("[]")
    with pytest.raises(ValueError, match="a number from 0 to 0"):
        env.reset(options={"entry": 1})
    env.reset()
    with pytest.raises(ValueError, match="action: expected text, got int"):
        env.step(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one entry"):
        BFCLEnv([])


@pytest.mark.slow
def test_the_longest_observation_fits(base: list[bfcl.Entry]) -> None:
    """Letters that take ten escaped, in every turn, and replies that repeat them."""
    entry = next(entry for entry in base if "echo" in entry.functions)
    env = BFCLEnv([entry], reply_characters=10_000)
    observation, _ = env.reset()
    for _ in entry.turns:
        text = show_calls([Call("echo", ("\U0001f600" * 200,))] * MAX_CALLS)
        observation, *_ = env.step(text[:MAX_CHARACTERS])
        assert observation in env.observation_space and "\\U0001f600" in observation
