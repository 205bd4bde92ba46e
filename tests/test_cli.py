"""The command line as a stranger meets it: outputs, JSON, exit codes, messages, files."""

import heapq
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import shiq_lab
from shiq_lab import cli, data, envs, plotting, selftest, strings
from shiq_lab.envs import ENVIRONMENTS
from shiq_lab.facts import FACTS, Case, Finding
from shiq_lab.losses.methods import METHODS
from shiq_lab.policies import reference_policy, uniform_policy
from shiq_lab.selftest import Report, Trained
from shiq_lab.training import Metrics, stationary

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one call of the real entry point."""
    monkeypatch.setattr(sys, "argv", ["shiq-lab", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    text = capsys.readouterr()
    return code, text.out, text.err


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    return lambda *arguments: run(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_envs_lists_every_environment(call) -> None:  # type: ignore[no-untyped-def]
    code, text, _ = call("envs")
    assert code == 0
    assert all(name in text for name in ENVIRONMENTS)
    code, text, _ = call("envs", "--json")
    rows = json.loads(text)
    assert [row["name"] for row in rows] == list(ENVIRONMENTS)
    assert all(row["summary"] for row in rows), "a card without a first line"


def test_solve_prints_values_policy_and_strings(call) -> None:  # type: ignore[no-untyped-def]
    code, text, _ = call("solve", "Needle", "--set", "length=2", "--set", "n_tokens=2", "--beta", "0.5")
    assert code == 0
    truth = shiq_lab.solve(shiq_lab.make("Needle", length=2, n_tokens=2), beta=0.5)
    assert f"v*(start) = {truth.objective:.12g}" in text
    for heading in ("pi_ref", "most likely under pi*", "highest discounted return"):
        assert heading in text


def test_solve_json_holds_the_exact_numbers(call) -> None:  # type: ignore[no-untyped-def]
    code, text, _ = call("solve", "ToolCall", "--json")
    seen = json.loads(text)
    mdp = shiq_lab.make("ToolCall")
    truth = shiq_lab.solve(mdp, beta=ENVIRONMENTS["ToolCall"].beta)
    assert code == 0
    np.testing.assert_array_equal(seen["v"][0], truth.v())
    q = np.array([[-np.inf if x is None else x for x in row] for row in seen["q"][0]])
    np.testing.assert_array_equal(q, truth.q())


@pytest.mark.parametrize("name", ["Brackets", "RandomTool", "RandomWalk"])
def test_best_strings_agree_with_the_listing(name: str, call) -> None:  # type: ignore[no-untyped-def]
    """The likeliest strings under pi* and the highest returns, against all strings and their exact numbers."""
    parameters = {"horizon": 4} if name == "RandomWalk" else {}
    e = ENVIRONMENTS[name]
    mdp = shiq_lab.make(name, **parameters)
    mdp = mdp if mdp.horizon is None else mdp.unroll()
    truth = shiq_lab.solve(mdp, beta=e.beta, gamma=e.gamma)
    rows = shiq_lab.enumerate_trajectories(mdp, behavior=truth.log_policy())
    settings = [x for k, v in parameters.items() for x in ("--set", f"{k}={v}")]
    seen = json.loads(call("solve", name, "--json", "--strings", "5", *settings)[1])
    likely = np.sort(rows.weights.numpy())[::-1][:5]
    np.testing.assert_allclose(np.exp([s["total"] for s in seen["most_likely"]]), likely, rtol=1e-12)
    acted = rows.completion_mask.numpy()
    returns = (e.gamma ** (np.cumsum(acted, 1) - acted) * rows.rewards.numpy() * acted).sum(1)
    best = np.sort(returns)[::-1][:5]
    np.testing.assert_allclose([s["total"] for s in seen["highest_return"]], best, rtol=1e-12, atol=1e-14)


def test_solve_takes_files(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    saved = tmp_path / "bandit.npz"
    shiq_lab.make("Bandit").save(saved)
    mine = tmp_path / "mine.py"
    mine.write_text(
        "import shiq_lab\ndef build(n_arms=3):\n    return shiq_lab.make('Bandit', n_arms=n_arms)\ndef wrong():\n    return 3\n"
    )
    expected = shiq_lab.solve(shiq_lab.make("Bandit"), beta=0.5).objective
    assert json.loads(call("solve", str(saved), "--beta", "0.5", "--json")[1])["objective"] == expected
    assert len(json.loads(call("solve", f"{mine}:build", "--json")[1])["v"][0]) == 2
    assert (
        call("solve", f"{mine}:wrong")[2].split() == "error ENV: expected a builder that returns a TokenMDP, got int.".split()
    )


BAD = {
    ("solve", "Needl"): "error name: expected an environment, got 'Needl'. Did you mean 'Needle'?",
    ("solve", "nothing.npz"): "error ENV: expected an existing .npz file, got 'nothing.npz' (No such file or directory).",
    ("solve", "nothing.py:f"): "error ENV: expected FILE.py:builder with an existing file, got 'nothing.py:f'.",
    ("solve", "Tree", "--set", "depth"): "error --set: expected key=value, got 'depth'.",
    (
        "solve",
        "Tree",
        "--set",
        "dpth=3",
    ): "error --set: expected one of depth, n_tokens, seed, got 'dpth'. Did you mean 'depth'?",
    ("solve", "Bandit", "--beta", "0"): "error beta: expected a finite number > 0, got 0.0.",
    ("solve", "Bandit", "--gamma", "1.5"): "error gamma: expected a number in (0, 1], got 1.5.",
    ("train", "Bandit", "--loss", "shqi"): "error loss: expected a method, got 'shqi'. Did you mean 'shiq'?",
    ("train", "Bandit", "--data", "smapled"): "error data: expected one of population, listed, sampled, gym, got 'smapled'. "
    "Did you mean 'sampled'?",
    (
        "train",
        "Bandit",
        "--behavior",
        "unifrom",
    ): "error behavior: expected one of covering, uniform, reference, mixed, on-path, got 'unifrom'. Did you mean 'uniform'?",
    ("selftest", "--env", "bandit"): "error name: expected an environment, got 'bandit'. Did you mean 'Bandit'?",
}


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...], call) -> None:  # type: ignore[no-untyped-def]
    code, text, error = call(*arguments)
    assert (code, text) == (2, "")
    assert " ".join(error.split()) == BAD[arguments]


def test_an_unknown_command_gets_the_nearest_one() -> None:
    result = CliRunner().invoke(cli.app, ["slove"])
    assert result.exit_code == 2
    assert "no command 'slove'. Did you mean 'solve'?" in result.output


@pytest.mark.parametrize("data", ["population", "listed", "sampled", "gym"])
def test_train_reaches_the_same_q_from_every_source(data: str, call) -> None:  # type: ignore[no-untyped-def]
    code, text, _ = call("train", "ToolCall", "--data", data, "--json", "--rows", "4000")
    seen = json.loads(text)
    assert code == 0
    assert seen["untried"] == 0
    assert seen["metrics"]["q_error"] <= 1e-8


def test_train_by_sgd(call) -> None:  # type: ignore[no-untyped-def]
    """The same zero by constant steps on mini-batches, and no SGD without rows."""
    code, text, _ = call("train", "Bandit", "--data", "sampled", "--rows", "500", "--sgd", "1.0", "--steps", "600", "--json")
    seen = json.loads(text)
    assert code == 0 and seen["steps"] == 600 and seen["optimizer"] == "SGD, constant step 1"
    assert seen["metrics"]["q_error"] < 1e-6
    assert call("train", "Bandit", "--sgd", "1.0")[0] == 2


def test_a_costly_loop_has_best_and_likeliest_strings() -> None:
    """[[0, -1]] with rewards (-0.001, -5): ending is best however long that takes to show; chances 0.1, 0.09, 0.081, ..."""
    from itertools import islice

    from shiq_lab.strings import best_strings

    mdp = shiq_lab.TokenMDP([[0, -1]], [[-0.001, -5.0]], [[np.log(0.9), np.log(0.1)]])  # type: ignore[arg-type]
    assert [s for _, s in islice(best_strings(mdp, mdp.reward), 2)] == [[1], [0, 1]]
    likely = list(islice(best_strings(mdp, mdp.ref_log_policy), 3))
    np.testing.assert_allclose(np.exp([total for total, _ in likely]), [0.1, 0.09, 0.081])
    paying = shiq_lab.TokenMDP([[0, -1]], [[1.0, 0.0]], [[0.0, 0.0]])  # type: ignore[arg-type]
    assert not list(islice(best_strings(paying, paying.reward), 1))


HOSTILE = """
from __future__ import annotations
import numpy as np
from dataclasses import dataclass
from shiq_lab import TokenMDP
@dataclass
class Size:
    n: int = 2
def markup():
    return TokenMDP([[-1, -1]], [[0, 1]], [[0, 0]], tokens=("[/INST]", "[bold]"), name="[/x]")
def needs(x):
    return x
def quits():
    raise SystemExit(7)
"""


def test_hostile_files_are_read_or_refused_in_one_line(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Token strings that look like markup, builders that raise or quit, a folder, a file of no kind."""
    mine = tmp_path / "mine.py"
    mine.write_text(HOSTILE)
    code, text, _ = call("solve", f"{mine}:markup")
    assert code == 0 and "[/INST]" in text and "[bold]" in text and "[/x]" in text
    code, _, error = call("solve", f"{mine}:needs")
    assert code == 2 and "got TypeError: needs() missing 1 required positional argument: 'x'" in " ".join(error.split())
    assert "got SystemExit: 7" in call("solve", f"{mine}:quits")[2]
    folder = tmp_path / "folder.npz"
    folder.mkdir()
    assert call("solve", str(folder))[0] == 2
    assert "expected FILE.py:builder or FILE.npz" in " ".join(call("solve", str(mine))[2].split())
    assert call("selftest", "--env", "Bandit", "--figure", str(tmp_path))[0] == 2


def test_a_partial_run_leaves_the_figure_alone(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    code, text, _ = call("selftest", "--env", "Bandit", "--env", "Bandit")
    assert code == 0 and not list(tmp_path.iterdir())
    assert text.count("shiq ") == 1 and "F7" in text and "J(softmax" not in text


def test_random_replies_come_with_a_word_of_warning(call) -> None:  # type: ignore[no-untyped-def]
    assert "full-gradient losses are biased" in call("train", "RandomTool")[1]
    assert "biased" not in call("train", "RandomTool", "--loss", "turn-cut")[1]


def test_selftest_writes_its_figure_and_reports(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    figure = tmp_path / "here" / "selftest.png"
    code, text, _ = call("selftest", "--env", "Bandit", "--env", "RandomTool", "--figure", str(figure))
    assert code == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in figure.parent.iterdir()] == ["selftest.png"], "something half-written was left"
    assert "all checks hold" in text and "expected: biased" in text and "recovers q*, v*, pi*" in text


def test_selftest_json_is_strict(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, text, _ = call("selftest", "--env", "Bandit", "--json", "--figure", str(tmp_path / "f.png"))
    seen = json.loads(text, parse_constant=lambda x: pytest.fail(f"{x} in JSON"))
    assert code == 0 and seen["passed"] is True
    assert {"roads", "facts", "trained", "expected_failures", "failures"} < set(seen)


def test_selftest_fails_loudly_where_a_loss_is_wrong(
    call,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: Dv without its reference part. The table says FELL SHORT, the reasons follow, the exit code is 1."""
    from shiq_lab.losses import methods, steps

    def level_unshifted(logit, level, ref_logit, ref_level, joint, beta):  # type: ignore[no-untyped-def]
        return beta * (logit - ref_logit), beta * level

    broken = methods.Method(methods.METHODS["shiq"].loss, level_unshifted)
    monkeypatch.setitem(methods.METHODS, "shiq", broken)
    monkeypatch.setattr(steps, "shifted", level_unshifted)
    code, text, _ = call("selftest", "--env", "Needle", "--figure", str(tmp_path / "f.png"))
    assert code == 1
    assert "FELL SHORT" in text and "some checks fail" in text


def test_the_installed_command_is_the_same(tmp_path: Path) -> None:
    """`python -m` free: the console script, from another folder, with a pipe for output."""
    script = Path(sys.executable).with_name("shiq-lab")
    done = subprocess.run([script, "solve", "Bandit"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "J(pi*)" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_readme_is_true() -> None:
    """Its Python runs and prints a zero loss with a zero gradient; its commands exist."""
    text = (ROOT / "README.md").read_text()
    session, builder = re.findall(r"```python\n(.*?)```", text, re.S)
    scope: dict = {}
    exec(builder, scope)  # the example of a builder
    assert shiq_lab.solve(scope["build"](), beta=0.5).objective != 0
    code = re.search(r"(.*)", session, re.S)
    assert code is not None
    assert len(code.group(1).strip().splitlines()) <= 13
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code.group(1)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    objective, loss, gradient = map(float, done.stdout.split())
    assert objective == pytest.approx(shiq_lab.solve(shiq_lab.make("ToolCall"), beta=0.2).objective)
    assert 0 <= loss < 1e-28 and 0 <= gradient < 1e-14  # (64 eps)^2 and 64 eps of numbers of size 1
    for command in re.findall(r"shiq-lab ([a-z-]+)", text):
        assert command in {c.name or getattr(c.callback, "__name__", "") for c in cli.app.registered_commands}, command
    assert "demo:" in (ROOT / "Makefile").read_text() and "test-slow:" in (ROOT / "Makefile").read_text()


# ------------------------------------------------------------------------------------- what a report says and hides not
METRICS = Metrics(q_error=1e-14, v_error=1e-3, kl=0.0, objective=1.0, optimum=1.0, gap=0.0)


def line_of(environment: str = "Bandit", method: str = "shiq", ok: bool = True, **numbers: float) -> Trained:
    return Trained(environment, 1, 9, method, "covering", replace(METRICS, **numbers), selftest.EXACT, ok)


def report_of(**parts: Any) -> Report:
    """A report in which everything holds, but for the parts that are given."""
    good = [("Bandit", Finding("F1", "fine", 0.0, 1.0))]
    whole: dict[str, Any] = {"roads": [("Bandit", "a road", 1e-14)], "findings": good, "trained": [line_of()], "expected": good}
    return Report(**whole | parts)


WRONG = {
    "a road that differs": {"roads": [("Bandit", "a road", 1e-9)]},
    "a road that is NaN": {"roads": [("Bandit", "a road", float("nan"))]},
    "a fact": {"findings": [("Bandit", Finding("F2", "broken", 2.0, 1.0))]},
    "a fact that is NaN": {"findings": [("Bandit", Finding("F2", "broken", float("nan"), 1.0))]},
    "a failure that does not come": {"expected": [("Bandit", Finding("train", "missed", 0.5, 1.0, above=True))]},
    "a training": {"trained": [line_of(ok=False)]},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_whatever_falls_short_fails_the_report(wrong: str) -> None:
    report = report_of(**WRONG[wrong])
    assert report_of().passed and not report_of().failures()
    assert not report.passed and len(report.failures()) == 1
    seen: Any = report.to_json()
    assert seen["passed"] is False and seen["failures"] == report.failures()
    assert all(x["holds"] == f.holds for x, (_, f) in zip(seen["facts"], report.findings, strict=True))
    assert all(x["holds"] == f.holds for x, (_, f) in zip(seen["expected_failures"], report.expected, strict=True))


@pytest.mark.parametrize("part", ["roads", "findings", "trained"])
def test_a_report_of_nothing_has_not_passed(part: str) -> None:
    assert not report_of(**{part: []}).passed


def test_the_printed_report_counts_what_holds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    roads = [("Bandit", "one", 1e-14), ("Bandit", "other", 3e-12)]
    broken = ("Bandit", Finding("F2", "broken", 2.0, 1.0))
    cli._print_report(report_of(roads=roads, findings=[*report_of().findings, broken], expected=[broken]))
    text = " ".join(capsys.readouterr().out.split())
    assert "1 environments by 2 second roads, largest relative difference 3e-12" in text
    assert "F1 holds 1/1 measurements" in text and "F2 FAILS 0/1 measurements" in text
    assert "expected outcomes, each by its predicted size: 0/1" in text and "some checks fail" in text


SHORT = [  # environment, method, what its training measured: each must be said to fall short
    ("Bandit", "shiq", {"q_error": 1e-6}),
    ("Bandit", "shiq", {"v_error": 1e-6}),
    ("Bandit", "shiq", {"kl": 1e-9}),
    ("Bandit", "sequence", {"kl": 1e-9}),
    ("Bandit", "sequence", {"q_error": 1e-2}),  # not the predicted error, which is 0 where all states are first ones
    ("RandomTool", "shiq", {"q_error": 1e-6}),  # a bias that does not come
    ("RandomTool", "turn-cut", {"q_error": 1e-6}),
]


@pytest.mark.parametrize(("name", "key", "numbers"), SHORT)
def test_a_training_of_another_outcome_falls_short(
    name: str, key: str, numbers: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, real = ENVIRONMENTS[name], selftest.train
    case = Case(stationary(entry.builder()), entry.beta, entry.gamma)

    def train(mdp: Any, method: Any, **options: Any) -> Any:
        trained = real(mdp, method, **options)
        return replace(trained, metrics=replace(trained.metrics, **numbers)) if method is METHODS[key] else trained

    monkeypatch.setattr(selftest, "METHODS", {k: METHODS[k] for k in ("shiq", "sequence", "turn-cut")})
    monkeypatch.setattr(selftest, "train", train)
    for line, expected in selftest.train_all(name, case, case.mdp.deterministic):
        assert line.ok == (line.method != key) == all(f.holds for f in expected)
        assert (line.verdict == "FELL SHORT") == (line.method == key)


def test_the_selftest_measures_everything_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without names: each environment by each road, all facts, each method that theory has a word on."""
    monkeypatch.setattr(envs, "ENVIRONMENTS", {name: ENVIRONMENTS[name] for name in ("Bandit", "RandomTool")})
    report = selftest.run()
    assert report.passed, report.failures()
    assert {f.fact for e, f in report.findings if e == "Bandit"} == set(FACTS)
    roads = {"listing J(pi*)", "listing E exp(R/beta)", "linear system", "plain iteration"}
    assert {road for e, road, _ in report.roads if e == "Bandit"} == roads
    assert {road for e, road, _ in report.roads if e == "RandomTool"} == {"listing J(pi*)", "plain iteration"}
    assert [t.method for t in report.trained if t.environment == "RandomTool"] == list(METHODS)
    verdicts = {t.method: t.verdict for t in report.trained if t.environment == "RandomTool"}
    assert [m for m, v in verdicts.items() if v == selftest.EXACT] == ["semi-gradient", "turn-cut"]


# ------------------------------------------------------------------------------------------------ arguments that arrive
def test_a_saved_automaton_takes_beta_and_gamma(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    saved = tmp_path / "tree.npz"
    shiq_lab.make("Tree", depth=2).save(saved)
    seen = json.loads(call("solve", str(saved), "--beta", "0.3", "--gamma", "0.7", "--json")[1])
    truth = shiq_lab.solve(shiq_lab.make("Tree", depth=2), beta=0.3, gamma=0.7)
    assert (seen["beta"], seen["gamma"], seen["objective"]) == (0.3, 0.7, truth.objective)
    plain = json.loads(call("solve", str(saved), "--json")[1])
    assert (plain["beta"], plain["gamma"]) == (1.0, 1.0)


def test_envs_json_is_the_table(call) -> None:  # type: ignore[no-untyped-def]
    for row in json.loads(call("envs", "--json")[1]):
        entry = ENVIRONMENTS[row["name"]]
        mdp = entry.builder()
        assert (row["beta"], row["gamma"], row["horizon"]) == (entry.beta, entry.gamma, mdp.horizon)
        assert (row["states"], row["tokens"], row["deterministic"]) == (mdp.n_states, mdp.n_tokens, mdp.deterministic)
        assert row["policy_states"] == (mdp.reachable & mdp.is_policy).sum()


def test_solve_json_has_every_layer_and_the_error_bound(call) -> None:  # type: ignore[no-untyped-def]
    mdp = shiq_lab.make("RandomWalk", horizon=3)
    truth = shiq_lab.solve(mdp, beta=ENVIRONMENTS["RandomWalk"].beta)
    seen = json.loads(call("solve", "RandomWalk", "--set", "horizon=3", "--json")[1])
    assert len(seen["v"]) == len(seen["q"]) == len(seen["log_policy"]) == 3
    for t in range(3):
        np.testing.assert_array_equal(seen["v"][t], truth.v(t))
        policy = np.array([[-np.inf if x is None else x for x in row] for row in seen["log_policy"][t]])
        np.testing.assert_array_equal(policy, truth.log_policy(t))
    loop = json.loads(call("solve", "Loop", "--gamma", "0.9", "--json")[1])
    assert loop["error_bound"] == shiq_lab.solve(shiq_lab.make("Loop"), beta=0.25, gamma=0.9).error_bound > 0


def test_solve_prints_the_likeliest_tokens_of_the_first_states(call) -> None:  # type: ignore[no-untyped-def]
    mdp, entry = shiq_lab.make("Bandit"), ENVIRONMENTS["Bandit"]
    chance = np.exp(shiq_lab.solve(mdp, beta=entry.beta).log_policy())[0, mdp.allowed[0]]
    text = call("solve", "Bandit")[1]
    printed = [float(line.split()[-1]) for line in text.splitlines() if re.search(r"\ba\d ", line) and "0." in line][:4]
    np.testing.assert_allclose(printed, np.sort(chance)[::-1][:4], atol=5e-5)
    assert "... 4 more" in text
    assert "2 of 86 states" in call("solve", "Tree", "--set", "depth=4", "--states", "2")[1]


@pytest.mark.parametrize("source", ["sampled", "gym"])
def test_the_seed_reaches_the_rows(source: str, call) -> None:  # type: ignore[no-untyped-def]
    first, again, other = (
        json.loads(call("train", "ToolCall", "--data", source, "--rows", "30", "--seed", s, "--json")[1]) for s in "112"
    )
    assert first == again and first["loss"] != other["loss"]


def test_rows_that_are_too_few_are_named(call) -> None:  # type: ignore[no-untyped-def]
    assert "never occur in these rows" in " ".join(call("train", "Tree", "--data", "sampled", "--rows", "9")[1].split())
    code, _, error = call("train", "Bandit", "--data", "sampled", "--rows", "0")
    assert code == 2 and "error rows: expected at least 1, got 0." in " ".join(error.split())


def test_behaviours_by_name() -> None:
    mdp = shiq_lab.make("Bandit")
    half = (np.exp(uniform_policy(mdp)) + np.exp(reference_policy(mdp))) / 2
    np.testing.assert_allclose(np.exp(data.behavior(mdp, "mixed", 0.5, 1.0)), half, atol=1e-15)
    likely, truth = np.exp(data.behavior(mdp, "on-path", 0.5, 1.0)[0]), shiq_lab.solve(mdp, beta=0.5)
    assert likely[truth.log_policy()[0].argmax()] == pytest.approx(0.9) and likely.sum() == pytest.approx(1.0)


def test_bench_hands_on_repeats_and_failures(call, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    seen: list[list[str]] = []

    def run(arguments: list[str], check: bool) -> Any:
        seen.append(arguments)
        return SimpleNamespace(returncode=3 if len(seen) == 2 else 0)

    monkeypatch.setattr(cli.subprocess, "run", run)
    code, _, _ = call("bench", "--repeats", "7")
    assert code == 3 and len(seen) == 2, "the second script failed; nothing runs after it"
    assert all(arguments[-2:] == ["--repeats", "7"] for arguments in seen)


# ------------------------------------------------------------------------------------------------------------- pictures
def test_the_figure_shows_every_q_error_once(tmp_path: Path) -> None:
    lines = [
        line_of("Bandit", "shiq", q_error=0.0),
        line_of("Tree", "shiq", q_error=1e-13),
        line_of("Tree", "sequence", q_error=0.5),
    ]
    figure = plotting.selftest_figure(report_of(trained=lines))
    axes = figure.axes[0]
    points = {c.get_label(): np.asarray(c.get_offsets()).tolist() for c in axes.collections if c.get_label() in METHODS}
    assert {m: [x for x, _ in p] for m, p in points.items()} == {"shiq": [1e-17, 1e-13], "sequence": [0.5]}
    assert [round(y) for _, y in points["shiq"]] == [0, 1] and [round(y) for _, y in points["sequence"]] == [1]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["Bandit", "Tree"]
    for name in ("deep/down/figure.png", "figure.svg"):
        written = plotting.save(figure, tmp_path / name)
        assert [p.name for p in written.parent.iterdir() if p.is_file()] == [written.name]
    assert b"Software" not in (tmp_path / "deep/down/figure.png").read_bytes(), "a version in the file: no two are alike"


# ---------------------------------------------------------------------------------------------------------- best strings
def test_a_loop_that_pays_has_no_best_string(monkeypatch: pytest.MonkeyPatch) -> None:
    pushes = iter(range(100))  # a search that goes round for ever runs out of these
    push = lambda heap, item: (next(pushes), heapq.heappush(heap, item))  # noqa: E731
    monkeypatch.setattr(strings, "heapq", SimpleNamespace(heappush=push, heappop=heapq.heappop))
    paying = shiq_lab.TokenMDP(np.array([[0, -1]]), np.array([[0.5, 0.0]]), np.zeros((1, 2)))
    assert list(strings.best_strings(paying, paying.reward)) == []
    dear = replace(paying, reward=-paying.reward)
    first_three = [next_ for next_, _ in zip(strings.best_strings(dear, dear.reward), range(3), strict=False)]
    assert first_three == [(0.0, [1]), (-0.5, [0, 1]), (-1.0, [0, 0, 1])]


def test_a_builder_of_ones_own_takes_beta_and_gamma(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "own.py").write_text("from shiq_lab import make\n\ndef grow():\n    return make('Tree', depth=2)\n")
    which = f"{tmp_path / 'own.py'}:grow"
    seen = json.loads(call("solve", which, "--beta", "0.3", "--gamma", "0.7", "--json")[1])
    truth = shiq_lab.solve(shiq_lab.make("Tree", depth=2), beta=0.3, gamma=0.7)
    assert (seen["beta"], seen["gamma"], seen["objective"]) == (0.3, 0.7, truth.objective)
    plain = json.loads(call("solve", which, "--json")[1])
    assert (plain["beta"], plain["gamma"]) == (1.0, 1.0)


def test_the_best_string_is_the_one_whose_losses_are_discounted() -> None:
    """-1 after two tokens at gamma = 1/2 is better than -0.6 at once; undiscounted it would look worse."""
    reward = np.array([[0.0, -0.6], [-1.0, -9.0]])
    mdp = shiq_lab.TokenMDP(np.array([[1, -1], [-1, -1]]), reward, np.zeros((2, 2)))
    assert list(strings.best_strings(mdp, mdp.reward, 0.5))[:2] == [(-0.5, [0, 0]), (-0.6, [1])]


def test_the_best_string_may_win_by_what_comes_last() -> None:
    """101 in six tokens against 100.5 at once: the last 1 is a hundredth of what is ahead, and must still count."""
    next_state = np.stack([[1, 2, 3, 4, 5, -1], [-1] * 6], 1)
    reward = np.array([[0.0, 100.5], [0.0, 0.0], [0.0, 0.0], [100.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    mdp = shiq_lab.TokenMDP(next_state, reward, np.zeros((6, 2)))
    assert next(strings.best_strings(mdp, mdp.reward)) == (101.0, [0] * 6)


# ------------------------------------------------------------------------------------------------- selftest's other tables
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ("--table", "--env", "Tree", "--env", "Needle"),
            "--env: expected nothing beside --table, which has automata of its own",
        ),
        (("--table", "--env", "Tree", "--env", "Needle"), "got 'Tree', 'Needle'."),
        (("--table", "--figure", "x.png"), "got 'x.png'."),
        (("--table", "--matrix"), "--matrix: expected no other option than --json beside it, got --table."),
        (("--matrix", "--env", "Tree", "--figure", "x.png"), "beside it, got --env Tree, --figure x.png."),
    ],
)
def test_what_does_not_go_together_is_named(arguments: tuple[str, ...], complaint: str, call) -> None:  # type: ignore[no-untyped-def]
    code, text, error = call("selftest", *arguments)
    assert code == 2 and not text and complaint in " ".join(error.split())


def test_the_table_says_what_its_words_mean(call, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from shiq_lab import fixed_points

    monkeypatch.setattr(fixed_points, "table", lambda: ())
    _, text, _ = call("selftest", "--table")
    said = f"no: at least {'a million' if fixed_points.APART == 1e6 else fixed_points.APART} times the rounding"
    assert said in " ".join(text.split())


@pytest.mark.parametrize(
    "words", [["train-hf", "x.yaml"], ["preflight", "x.yaml"], ["study", "scale", "--jobs", "1", "--fresh"]]
)
def test_a_missing_extra_is_named(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without transformers: one line and exit code 2; any other missing module is a bug of ours, and stays a traceback."""
    hidden = [name for name in sys.modules if name.partition(".")[0] in cli.HF or name.startswith("shiq_lab.hf")]
    for name in {*cli.HF, *hidden} - {"shiq_lab.hf"}:
        monkeypatch.setitem(sys.modules, name, None)
    for name in hidden:
        if name.startswith("shiq_lab.hf"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", ["shiq-lab", *words])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2 and "error shiq-lab: expected the extra hf, got no module" in said
    assert said.endswith('In a clone: pip install -e ".[hf]"')
    monkeypatch.setattr(cli, "app", lambda: __import__("no_such_module"))
    with pytest.raises(ModuleNotFoundError):
        cli.main()
