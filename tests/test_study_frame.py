"""Studies keep what they have measured: killed and started again, or in several processes, they give the same numbers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shiq_lab.plotting import figure
from shiq_lab.studies import frame, page, tiny_truth
from shiq_lab.studies.frame import Case, Claim, Record, Result, Settings, Study, run, write_json
from shiq_lab.studies.statistics import interval, iqm

HERE = Path(__file__).resolve().parent


def measure(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """A walk of normals; it says in a file that it was called, and may take its time."""
    if settings.get("log"):
        with open(settings["log"], "a", encoding="utf-8") as file:
            file.write(f"{case['drift']} {seed}\n")
    time.sleep(settings.get("pause", 0.0))
    walk = np.random.default_rng([seed, abs(case["drift"])]).normal(case["drift"], size=settings["length"]).cumsum()
    return {"end": walk[-1], "walk": walk, "none": None, "n": np.int64(3)}


def cases(settings: Settings) -> list[Case]:
    return [{"drift": d} for d in settings["drifts"]]


def summarise(settings: Settings, records: list[Record]) -> dict[str, Any]:
    by = {str(d): [r.numbers["end"] for r in records if r.case["drift"] == d] for d in settings["drifts"]}
    return {d: {"iqm": interval(ends).value, "low": interval(ends).low} for d, ends in by.items()}


def claims(settings: Settings, summary: dict[str, Any]) -> list[Claim]:
    high = summary[str(max(settings["drifts"]))]
    return [Claim("The strongest drift ends above 0.", f"{high['iqm']:.2f}", high["low"] > 0)]


def study(**settings: Any) -> Study:
    base = {"seeds": 3, "drifts": [0, 2], "length": 5, "log": "", "pause": 0.0}
    return Study(
        "walk", "Walks", "Where do they end?", {**base, **settings}, {"length": 2}, cases, measure, summarise, claims,
        lambda result: figure(),
    )  # fmt: skip


def calls(log: Path) -> int:
    return len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0


def test_every_case_at_every_seed(tmp_path: Path) -> None:
    result = run(study(), cache=tmp_path)
    assert [(r.case["drift"], r.seed) for r in result.records] == [(d, s) for d in (0, 2) for s in range(3)]
    expected = np.random.default_rng([1, 2]).normal(2, size=5).cumsum()
    assert result.records[4].numbers["walk"] == expected.tolist() and result.records[4].numbers["n"] == 3
    assert result.passed and set(result.versions) == {"shiq_lab", "numpy", "torch", "python"}


def test_nothing_is_measured_twice(tmp_path: Path) -> None:
    """Nor after more seeds are asked for; other settings, and --fast, are measured for themselves."""
    log = tmp_path / "log"
    first = run(study(log=str(log)), cache=tmp_path / "kept")
    assert calls(log) == 6
    again = run(study(log=str(log)), cache=tmp_path / "kept")
    assert calls(log) == 6 and again == first
    more = run(study(log=str(log)), seeds=4, cache=tmp_path / "kept")
    assert calls(log) == 8 and [r for r in more.records if r.seed < 3] == first.records
    run(study(log=str(log)), fast=True, cache=tmp_path / "kept")
    assert calls(log) == 14
    run(study(log=str(log)), cache=None)
    assert calls(log) == 20


def test_a_fresh_record_equals_one_that_was_kept(tmp_path: Path) -> None:
    """Every bit of every float: the second run reads files only."""
    fresh, kept = (run(study(), cache=tmp_path) for _ in range(2))
    assert json.dumps(fresh.to_json()) == json.dumps(kept.to_json()) == json.dumps(run(study(), cache=None).to_json())


def test_a_damaged_file_is_measured_again(tmp_path: Path) -> None:
    first = run(study(), cache=tmp_path)
    files = sorted((tmp_path / "walk").iterdir())
    files[0].write_text(files[0].read_text(encoding="utf-8")[:-20], encoding="utf-8")
    files[1].write_text("[1, 2]", encoding="utf-8")
    assert run(study(), cache=tmp_path) == first
    assert all(json.loads(f.read_text(encoding="utf-8")) for f in files)


KILLED = """
import sys
sys.path.insert(0, {here!r})
from test_study_frame import run, study
if __name__ == "__main__":
    run(study(seeds=4, log={log!r}, pause=0.15), cache={cache!r}, jobs={jobs})
"""


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_in_the_middle(tmp_path: Path, jobs: int) -> None:
    """SIGKILL after a few measurements; what was kept is not measured again, and the result is that of an undisturbed run."""
    log, cache = tmp_path / "log", tmp_path / "kept"
    script = tmp_path / "script.py"
    script.write_text(KILLED.format(here=str(HERE), log=str(log), cache=str(cache), jobs=jobs), encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(cache.glob("walk/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept, called = len(list(cache.glob("walk/*.json"))), calls(log)
    assert 3 <= kept < 8
    assert not [f for f in cache.glob("walk/*.json") if not json.loads(f.read_text(encoding="utf-8"))]
    final = run(study(seeds=4, log=str(log), pause=0.15), cache=cache)
    assert calls(log) - called == 8 - kept
    assert final.records == run(study(seeds=4), cache=None).records


def test_several_processes_give_the_same(tmp_path: Path) -> None:
    """The frame's own test cases as a study, in two processes."""
    alone, together = (run(study(), cache=tmp_path / str(jobs), jobs=jobs) for jobs in (1, 2))
    assert alone == together


def test_results_survive_json(tmp_path: Path) -> None:
    result = run(study(), cache=None)
    path = write_json(tmp_path / "deep" / "walk.json", result.to_json())
    assert Result.from_json(json.loads(path.read_text(encoding="utf-8"))) == result
    assert [p.name for p in path.parent.iterdir()] == ["walk.json"]


def test_a_claim_that_does_not_hold() -> None:
    assert not run(study(drifts=[-2]), cache=None).passed
    silent = replace(study(), claims=lambda settings, summary: [])
    assert not run(silent, cache=None).passed  # nothing claimed is nothing shown


def test_nan_is_no_number() -> None:
    def broken(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
        return {"x": [1.0, float("nan")]}

    with pytest.raises(ValueError, match=re.escape("numbers: expected finite numbers (None for what is not there), got nan.")):
        run(replace(study(), measure=broken), cache=None)


def test_fresh_measures_again_and_keeps(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = run(study(log=str(log)), cache=tmp_path / "kept")
    again = run(study(log=str(log)), cache=tmp_path / "kept", fresh=True)
    assert calls(log) == 12 and again == first
    run(study(log=str(log)), cache=tmp_path / "kept")
    assert calls(log) == 12


def test_other_code_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key holds the study's own file and all of the package under it: a change in a loss makes what was kept void."""
    seen = frame._code(tiny_truth.__file__)
    assert seen == frame._code(tiny_truth.__file__)
    loss = Path(frame.__file__).parent.parent / "losses" / "shiq.py"
    real = Path.read_text
    other = lambda self, **kw: real(self, **kw) + ("\n# other" if self == loss else "")  # noqa: E731
    monkeypatch.setattr(Path, "read_text", other)
    frame._code.cache_clear()
    assert frame._code(tiny_truth.__file__) != seen
    monkeypatch.undo()
    frame._code.cache_clear()
    log = tmp_path / "log"
    run(study(log=str(log)), cache=tmp_path / "kept")
    monkeypatch.setattr(frame, "_code", lambda path: "other code")
    run(study(log=str(log)), cache=tmp_path / "kept")
    assert calls(log) == 12


INTERRUPTED = """
import signal, sys, torch
sys.path.insert(0, {here!r})
from test_study_frame import run, study
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born deaf to it
    run(study(seeds=40, log={log!r}, pause=0.1), cache={cache!r}, jobs=2)
"""


def test_an_interrupt_ends_all_processes(tmp_path: Path) -> None:
    """Ctrl-C reaches the whole group; within seconds nobody works on."""
    log, cache, script = tmp_path / "log", tmp_path / "kept", tmp_path / "script.py"
    script.write_text(INTERRUPTED.format(here=str(HERE), log=str(log), cache=str(cache)), encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(list(cache.glob("walk/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert b"KeyboardInterrupt" in said and process.returncode != 0
    stopped = calls(log)
    time.sleep(0.5)
    assert calls(log) == stopped < 80


@pytest.mark.parametrize(("text", "told"), [("{", "Expecting property name"), ('{"a": 1}', "something else ('records')")])
def test_a_foreign_result_is_named(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"path: expected a file that .* wrote, got ") as error:
        Result.read(tmp_path / "x.json")
    assert "x.json" in str(error.value) and told in str(error.value)


@pytest.mark.parametrize(("option", "name"), [({"seeds": 0}, "seeds"), ({"jobs": 0}, "jobs")])
def test_bad_input(option: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected a whole number >= 1, got 0"):
        run(study(), cache=None, **option)


# ---------------------------------------------------------------------------------------------------------- statistics
@pytest.mark.parametrize(("n", "kept"), [(1, 1), (3, 3), (4, 2), (10, 6), (12, 6)])
def test_the_interquartile_mean_in_loops(n: int, kept: int) -> None:
    values = np.random.default_rng(n).normal(size=n).tolist()
    middle = sorted(values)[n // 4 : n - n // 4]
    assert len(middle) == kept and float(iqm(values)) == pytest.approx(sum(middle) / kept, abs=1e-15)


def test_curves_are_resampled_whole() -> None:
    """Point by point the interval of a curve is that of its column, with the same resamples."""
    curves = np.random.default_rng(0).normal(size=(10, 4))
    whole = interval(curves, seed=5)
    for k in range(4):
        column = interval(curves[:, k], seed=5)
        assert (whole.value[k], whole.low[k], whole.high[k]) == (column.value, column.low, column.high)  # type: ignore[index]


def test_the_bootstrap_in_loops() -> None:
    values = [3.0, -1.0, 4.0, 1.5, 9.0]
    draws = np.random.default_rng(7).integers(5, size=(400, 5))
    many = sorted(float(iqm([values[i] for i in row])) for row in draws.tolist())
    found = interval(values, resamples=400, level=0.9, seed=7)
    place = lambda p: (400 - 1) * p  # noqa: E731
    for seen, p in ((found.low, 0.05), (found.high, 0.95)):
        k = int(place(p))
        assert seen == pytest.approx(many[k] + (place(p) - k) * (many[k + 1] - many[k]), abs=1e-12)


def test_the_interval_covers() -> None:
    """300 samples of 20 normals: the mean lies in the 95 % interval of the mean nearly as often (at least 85 %)."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        found = interval(rng.normal(size=20), np.mean, resamples=300)
        inside += found.low <= 0 <= found.high  # type: ignore[operator]
    assert 0.85 <= inside / 300 <= 0.99


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interval([]), "x: expected at least one value a seed, none of them NaN, got shape (0,)."),
        (lambda: interval([1.0, float("nan")]), "x: expected at least one value a seed, none of them NaN, got shape (2,)."),
        (lambda: interval([1.0], level=1.0), "level: expected a number between 0 and 1, got 1.0."),
        (lambda: iqm([]), "x: expected at least one value, got none."),
    ],
)
def test_bad_statistics(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_one_false_claim_is_enough() -> None:
    two: Any = lambda settings, summary: [Claim("a", "1", True), Claim("b", "2", False)]  # noqa: E731
    result = run(replace(study(), claims=two), cache=None)
    assert not result.passed
    text = page.section(replace(result, claims=[Claim("a | b", "x", False), Claim("c", "y", True)]))
    assert "| a \\| b | x | **fails** |" in text and "| c | y | holds |" in text


def test_other_versions_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    run(study(log=str(log)), cache=tmp_path / "kept")
    monkeypatch.setattr(frame, "_versions", lambda: {"torch": "99"})
    run(study(log=str(log)), cache=tmp_path / "kept")
    assert calls(log) == 12


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_json(tmp_path / "x.json", {"a": 1})

    def broken(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def threads(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """How many threads torch has where a study is measured."""
    return {"end": 1.0 + case["drift"], "walk": [], "none": None, "n": torch.get_num_threads()}


@pytest.mark.parametrize("jobs", [1, 2])
def test_one_thread_a_process(jobs: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = run(replace(study(), measure=threads), cache=None, jobs=jobs)
        assert {r.numbers["n"] for r in found.records} == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_interval_is_one_of_95_per_cent() -> None:
    values = np.random.default_rng(3).normal(size=9)
    assert interval(values) == interval(values, level=0.95, resamples=2000, seed=0) != interval(values, level=0.9)
