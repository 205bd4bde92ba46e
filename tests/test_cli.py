"""The command line as a stranger meets it: outputs, JSON, exit codes, messages, files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import shiq_lab
from shiq_lab import cli
from shiq_lab.envs import ENVIRONMENTS

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
    for heading in ("pi_ref", "most likely under pi*", "highest return"):
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
    ("solve", "nothing.npz"): "error ENV: expected an existing .npz file, got 'nothing.npz'.",
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
    code = re.search(r"```python\n(.*?)```", text, re.S)
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
