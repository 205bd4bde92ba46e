"""`@parametrize_with_checks` as a user's test file meets it: each is run by a pytest of its own."""

import importlib.util
import sys
from pathlib import Path

import pytest

import shiq_lab
from shiq_lab.checks import pytest_plugin as plugin
from shiq_lab.checks.loss import LOSS_CHECKS
from shiq_lab.checks.pytest_plugin import parametrize_with_checks

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parent.parent

HEAD = f"""
import sys
sys.path.insert(0, {str(ROOT / "examples")!r})
import time
import torch
from shiq_lab import parametrize_with_checks
from my_shiq import loss as good
from my_shiq_with_a_bug import loss as buggy
"""


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other plugin in the inner pytest: importing them anew takes most of the time."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def run(pytester: pytest.Pytester, decorator: str, before: str = "", *arguments: str) -> pytest.RunResult:
    pytester.makepyfile(f"{HEAD}\n{before}\n@{decorator}\ndef test_mine(loss, check):\n    check(loss)\n")
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-rsxX", *arguments)


def text(ran: pytest.RunResult) -> str:
    return ran.stdout.str()


def test_one_test_for_every_loss_and_check(pytester: pytest.Pytester) -> None:
    ran = run(pytester, "parametrize_with_checks([good, buggy])", "", "--collect-only", "-q")
    names = [line.split("::")[1] for line in text(ran).splitlines() if "::" in line]
    assert names == [f"test_mine[{i}-{c.name}]" for i in ("my_shiq.py:loss", "my_shiq_with_a_bug.py:loss") for c in LOSS_CHECKS]


def test_namesakes_are_told_apart_by_as_much_of_their_path_as_it_takes(tmp_path: Path) -> None:
    def load(where: str) -> list[plugin.Loss]:
        path = tmp_path / where
        path.parent.mkdir(exist_ok=True)
        path.write_text("def loss(logits): ...\ndef other(logits): ...\n")
        module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("namesake", path))  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        return [module.loss, module.other]

    (a, other), (b, _), (c, _) = (load(where) for where in ("one/x.py", "two/x.py", "two/y.py"))
    assert plugin._labels([a, other]) == ["loss", "other"]
    assert plugin._labels([a, c, other]) == ["x.py:loss", "y.py:loss", "other"]
    assert plugin._labels([a, b, c]) == ["one/x.py:loss", "two/x.py:loss", "y.py:loss"]
    assert plugin._labels([a, a]) == ["one/x.py:loss1", "one/x.py:loss2"]
    adapted = [shiq_lab.from_logprobs(lambda logprobs: logprobs.sum()) for _ in range(2)]
    assert plugin._labels(adapted) == ["<lambda>1", "<lambda>2"], "not the adapters' file"


def test_right_losses_pass_and_what_does_not_apply_is_skipped_with_its_reason(pytester: pytest.Pytester) -> None:
    ran = run(pytester, "parametrize_with_checks([good], only=['FP', 'MT', 'PU', 'PK'], strict=True)")
    ran.assert_outcomes(passed=3, skipped=1)
    assert "the loss does not name segment_ids" in text(ran)


def test_a_bug_fails_its_check_with_a_message_and_no_frame_of_the_suite(pytester: pytest.Pytester) -> None:
    ran = run(pytester, "parametrize_with_checks([buggy], only=['MT', 'PAD'])")
    ran.assert_outcomes(failed=1, passed=1)
    seen = text(ran)
    assert "CheckFailed: MT, the same over turns with observation tokens: " in seen
    assert "Usually: Observation tokens enter the loss" in seen
    assert ">       check(loss)" in seen or ">   check(loss)" in seen
    assert "shiq_lab/checks" not in seen


def test_expected_failures_are_strict_and_carry_their_reasons(pytester: pytest.Pytester) -> None:
    decorator = "parametrize_with_checks([good, buggy], only=['MT', 'PU'], expect_fail={'MT': 'issue 12'})"
    ran = run(pytester, decorator)
    ran.assert_outcomes(passed=2, xfailed=1, failed=1)
    assert "issue 12" in text(ran) and "[XPASS(strict)] issue 12" in text(ran)


def test_reasons_may_depend_on_the_loss(pytester: pytest.Pytester) -> None:
    decorator = "parametrize_with_checks([good, buggy], only=['MT'], expect_fail=lambda f: {'MT': 'x'} if f is buggy else {})"
    run(pytester, decorator).assert_outcomes(passed=1, xfailed=1)


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("return logits.sum() + batch['reward']", "SubjectError: the loss raised KeyError: 'reward'"),
        ("while True: pass", "SubjectError: a call of the loss took longer than 0.3 s"),
    ],
)
def test_a_loss_that_cannot_run_fails_even_where_a_failure_is_expected(
    body: str, verdict: str, pytester: pytest.Pytester
) -> None:
    """A crash is no proof that the known bug is still there."""
    before = f"def broken(logits, **batch):\n    {body}\n"
    ran = run(pytester, "parametrize_with_checks([broken], only=['FP'], expect_fail={'FP': 'x'}, time_limit=0.3)", before)
    ran.assert_outcomes(failed=1)
    assert verdict in text(ran) and "shiq_lab/checks" not in text(ran)


def test_what_is_no_loss_fails_every_check(pytester: pytest.Pytester) -> None:
    before = "def nothing(logits, **batch):\n    return logits.sum(-1)\n"
    ran = run(pytester, "parametrize_with_checks([nothing], only=['CALL', 'FP'])", before)
    ran.assert_outcomes(failed=2)
    assert "shape" in text(ran) and "see CALL" in text(ran)


def test_a_warning_is_a_warning_and_under_strict_a_failure(pytester: pytest.Pytester) -> None:
    """NaN in masked places comes through a multiplication with the mask."""
    before = (
        "def leaky(logits, ref_logits, input_ids, completion_mask, **batch):\n"
        "    taken = torch.log_softmax(logits, -1)[:, :-1].gather(-1, input_ids[:, 1:, None])[..., 0]\n"
        "    return -(taken * completion_mask[:, 1:]).sum()\n"
    )
    ran = run(pytester, "parametrize_with_checks([leaky], only=['MI'], kind='policy_only')", before, "-W", "default")
    ran.assert_outcomes(passed=1, warnings=1)
    assert "ConformanceWarning: MI, masked places do not matter" in text(ran)
    run(pytester, "parametrize_with_checks([leaky], only=['MI'], kind='policy_only', strict=True)", before).assert_outcomes(
        failed=1
    )


def lossy(logits: object, **batch: object) -> object:
    return logits


@pytest.mark.parametrize(
    ("losses", "arguments", "complaint"),
    [
        ([], {}, "losses: expected a list of functions"),
        ([1.0], {}, "losses: expected a list of functions"),
        (lossy, {}, "losses: expected a list of functions"),
        ([lossy], {"only": ["PAT"]}, "'PAT'"),
        ([lossy], {"kind": "belman"}, "kind: expected one of bellman"),
        ([lossy], {"expect_fail": {"PAT": "x"}}, "expect_fail: expected names of checks"),
        ([lossy], {"stric": True}, "parametrize_with_checks: expected arguments among kind, like"),
        ([lambda advantages: 0], {}, "argument 'advantages'"),
    ],
)
def test_mistakes_are_named_when_the_file_is_collected(losses: object, arguments: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        parametrize_with_checks(losses, **arguments)  # type: ignore[arg-type]
    assert complaint in str(error.value)


def test_it_is_public_and_needs_no_pytest_to_import(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shiq_lab.parametrize_with_checks is parametrize_with_checks
    monkeypatch.setitem(sys.modules, "pytest", None)
    spec = importlib.util.spec_from_file_location("another_copy", str(plugin.__file__))
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    with pytest.raises(ImportError, match=r"^parametrize_with_checks needs pytest: pip install pytest$"):
        copy.parametrize_with_checks([lossy])
