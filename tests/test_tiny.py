"""The tiny transformer reaches q* and pi* at every prefix, on data it never chose; and what must not, does not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shiq_lab import cli, envs, solve
from shiq_lab.enumeration import count_prefixes
from shiq_lab.learning import rows_of
from shiq_lab.policies import uniform_policy
from shiq_lab.studies import tiny_truth
from shiq_lab.studies.frame import Record, Result
from shiq_lab.studies.tiny_truth import KL_WITHIN, Q_WITHIN, SIZES, TINY
from shiq_lab.tiny import pretrain, train_tiny

ROOT = Path(__file__).resolve().parent.parent
QUICK = TINY.fast["environments"]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in SIZES if n not in QUICK)])
def test_logits_become_q_values(name: str) -> None:
    settings = {"seeds": 1, "environments": [name]}
    n = tiny_truth.measure(settings, {"environment": name}, 0)
    assert (n["q_before"], n["q_error"]) == (n["q_curve"][0], n["q_curve"][-1]) and n["kl"] == n["kl_curve"][-1]
    assert n["q_error"] <= Q_WITHIN * n["q_range"] and n["kl"] <= KL_WITHIN
    assert n["q_before"] >= 0.5 * n["q_range"] and n["kl_before"] > 10 * KL_WITHIN  # it was not there from the start
    assert name == "Bandit" or n["level_spread"] >= 0.05


def test_every_deterministic_environment_is_there() -> None:
    """And at the size that is said: 100 to 400 prefixes where the policy speaks; Addition 100 prompts and 1,100."""
    deterministic = {name for name, e in envs.ENVIRONMENTS.items() if e.builder().deterministic}
    assert set(SIZES) == deterministic and len(SIZES) == 13
    committed = Result.from_json(json.loads((ROOT / "figures" / "tiny.json").read_text(encoding="utf-8")))
    sizes = {name: line["prefixes"] for name, line in committed.summary.items()}
    assert set(sizes) == deterministic
    assert sizes.pop("Addition") == 1100 and sizes.pop("Bandit") == 1  # one action: there are no more
    assert all(100 <= size <= 400 for size in sizes.values()), sizes


def test_the_committed_numbers_hold() -> None:
    """figures/tiny.json is a run of this study at its full settings, and its summary follows from its records."""
    committed = Result.from_json(json.loads((ROOT / "figures" / "tiny.json").read_text(encoding="utf-8")))
    assert committed.passed and committed.settings == TINY.settings
    assert TINY.summarise(committed.settings, committed.records) == committed.summary
    assert TINY.claims(committed.settings, committed.summary) == committed.claims


def test_a_shortfall_is_seen() -> None:
    """An environment whose error is 6 % of the range, or whose policy is 2e-3 nats off, fails the claim."""
    fine = {
        "q_error": 0.01, "q_range": 1.0, "kl": 1e-5, "q_before": 1.0, "kl_before": 1.0, "prefixes": 9, "edges": 9, "untried": 0,
        "steps": 1, "level_spread": 0.3,
    }  # fmt: skip
    changes: list[tuple[dict[str, float], bool, bool]] = [
        ({}, True, True),
        ({"q_error": 0.06}, False, False),
        ({"kl": 2e-3}, False, False),
        ({"level_spread": 0.0}, False, True),
        ({"q_before": 0.3}, False, True),
    ]
    for change, good, near in changes:
        worse = {**fine, **change}
        records = [
            Record({"environment": "A"}, 0, fine),
            *(Record({"environment": "B"}, k, n) for k, n in enumerate((worse, fine))),
        ]
        summary = TINY.summarise({}, records)  # the worst seed counts, wherever it stands
        assert all(c.holds for c in TINY.claims({}, summary)) is (good or "q_before" in change), change
        assert summary["B"]["holds"] is near and summary["A"]["holds"], change
    never = [Record({"environment": "A"}, 0, {**fine, "q_before": 0.3})]
    assert not all(c.holds for c in TINY.claims({}, TINY.summarise({}, never)))


def test_another_loss_finds_pi_star_but_no_q_values() -> None:
    """CoPG and REINFORCE (on its own rows) see no level: near pi*, but their logits are not q*. SFT gets nowhere."""
    start = pretrain(envs.make("Needle", length=2, n_tokens=3), beta=0.2, seed=1, width=32, heads=2, steps=80, rows=512)
    mu = uniform_policy(start.world.mdp)
    end: dict[str, Any] = {}
    for loss, own in (("CoPG", False), ("REINFORCE, KL in the reward", True), ("SFT", False), ("ShiQ", False)):
        rows = None if own else rows_of(start.world, mu)
        end[loss] = train_tiny(start, loss, rows, mu, steps=250)[0].metrics[-1]
    spread = np.ptp(solve(start.world.mdp, beta=0.2).q()[start.world.mdp.is_policy][:, :3])
    assert end["ShiQ"].kl < 1e-3 and end["ShiQ"].q_error < 0.05 * spread
    for loss in ("CoPG", "REINFORCE, KL in the reward"):
        assert end[loss].kl < 5e-3 and end[loss].q_error > 0.1 * spread, (loss, end[loss])
    assert end["SFT"].kl > 0.05


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.setattr("sys.argv", ["shiq-lab", "selftest", "--tiny", "--env", "Bandit", "--json"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    found = json.loads(capsys.readouterr().out)
    assert done.value.code == 0 and found["passed"] and found["summary"]["Bandit"]["holds"]
    monkeypatch.setattr("sys.argv", ["shiq-lab", "selftest", "--tiny", "--env", "Bandit"])
    with pytest.raises(SystemExit):
        cli.main()
    text = capsys.readouterr().out
    assert "Bandit" in text and "128/128" in text and "q*, pi*" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--env", "RandomTool"], "--env: expected a deterministic environment, got 'RandomTool'."),
        (["--env", "Tre"], "--env: expected a deterministic environment, got 'Tre'. Did you mean 'Tree'?"),
        (["--figure", "x.txt"], "--figure: expected a file that ends in .png, .svg or .pdf, got 'x.txt'."),
        (["--table"], "--tiny: expected no other table beside it, got --table."),
    ],
)
def test_bad_input(more: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["shiq-lab", "selftest", "--tiny", *more])
    with pytest.raises(SystemExit) as done:
        cli.main()
    said = " ".join(capsys.readouterr().err.split())
    assert done.value.code == 2 and message in said


def test_prefixes_of_addition() -> None:
    """100 prompts of 11 prefixes each: nothing said, or one digit."""
    assert count_prefixes(envs.make("Addition", **SIZES["Addition"].parameters)) == 100 * 11 + 1 + 1 + 10 + 10 + 100
    assert torch.get_num_threads() == 1


def test_untried_tokens_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against sets of (prefix, token) read off the rows; the seed reaches network and rows."""
    seen: dict[str, Any] = {}

    def spied(name: str) -> Any:
        real = getattr(tiny_truth, name)

        def call(*args: Any, **options: Any) -> Any:
            seen[name] = (options["seed"], real(*args, **options))
            return seen[name][1]

        return call

    for name in ("pretrain", "rows_of"):
        monkeypatch.setattr(tiny_truth, name, spied(name))
    monkeypatch.setitem(SIZES, "ToolCall", tiny_truth.Size({"n_functions": 2, "n_arguments": 2}, steps=1, rows=40))
    n = tiny_truth.measure({}, {"environment": "ToolCall"}, 7)
    (network, start), (data, rows) = seen["pretrain"], seen["rows_of"]
    tried, allowed = set(), set()
    for ids, mask, acted in zip(
        rows.input_ids.tolist(), rows.attention_mask.tolist(), rows.completion_mask.tolist(), strict=True
    ):
        tried |= {tuple(ids[: i + 1]) for i in range(sum(mask)) if acted[i]}
    tree = start.world.mdp
    paths: dict[int, tuple[int, ...]] = {tree.start: ()}
    for state in range(tree.n_states):
        for token in np.flatnonzero(tree.allowed[state]).tolist():
            if tree.is_policy[state]:
                allowed.add((*paths[state], token))
            if tree.next_state[state, token] >= 0:
                paths[int(tree.next_state[state, token])] = (*paths[state], token)
    assert tried <= allowed and n["untried"] == len(allowed - tried) > 0 and n["edges"] == len(allowed)
    assert network == data == 7
