"""`shiq-lab check` as a stranger meets it: exit codes, verdicts without tracebacks, hangs, crashes, files."""

import faulthandler
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from inspect import signature
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from shiq_lab import cli
from shiq_lab.checks import command, loading, timelimit
from shiq_lab.checks.loading import blame, load_loss
from shiq_lab.checks.timelimit import TimedOut, limited, time_limit
from shiq_lab.checks.traits import Traits

ROOT = Path(__file__).resolve().parent.parent
GOOD = f"{ROOT / 'examples' / 'my_shiq.py'}:loss"
BUGGY = f"{ROOT / 'examples' / 'my_shiq_with_a_bug.py'}:loss"
FORKS = pytest.mark.skipif(sys.platform != "linux", reason="the watcher is a parent process on Linux only")


@dataclass(frozen=True)
class Call:
    code: int
    out: str
    err: str


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Call]:
    """The real entry point in this process, so without the guard (which would fork pytest)."""

    def call(*arguments: str) -> Call:
        monkeypatch.setattr(sys, "argv", ["shiq-lab", "check", *arguments])
        monkeypatch.setattr(timelimit, "guard", lambda seconds, say: None)
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        seen = capsys.readouterr()
        assert "Traceback" not in seen.out + seen.err
        return Call(code, seen.out, " ".join(seen.err.split()))

    return call


@pytest.fixture
def user(tmp_path: Path) -> Callable[..., str]:
    """Writes a user's file whose function `loss` has this body, and names it."""

    def make(body: str, before: str = "", name: str = "mine.py") -> str:
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        tmp_path.joinpath(name).write_text(f"import torch\n{before}\ndef loss(logits, **batch):\n{lines}", encoding="utf-8")
        return f"{tmp_path / name}:loss"

    return make


def guarded(asked: command.Order, setting: Callable[[], None] = lambda: None) -> Call:
    """command.check in a forked copy of this process, guard and all: what a shell would see, without a second import."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(write, 2)
        faulthandler.disable()  # pytest's own, which would write a traceback for a crash that is meant
        code = 99
        try:
            setting()
            code = command.check(asked, Console(file=StringIO()), Console(file=open(2, "w", closefd=False)))
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os._exit(code)
    os.close(write)
    with open(read, encoding="utf-8", errors="replace") as pipe:
        text = pipe.read()
    assert "Traceback" not in text
    return Call(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "", " ".join(text.split()))


# -------------------------------------------------------------------------------------------------------- exit codes
def test_exit_0_and_nothing_but_the_verdict_when_quiet(check) -> None:  # type: ignore[no-untyped-def]
    seen = check(GOOD, "--strict", "--quiet")
    assert seen.code == 0 and not seen.err
    assert len(seen.out.splitlines()) == 1 and "all checks hold" in seen.out


def test_exit_1_for_the_example_with_a_bug(check) -> None:  # type: ignore[no-untyped-def]
    """The bug of the walk-through, a discount on tool replies: no check of a single turn sees it, and MT says what it is."""
    seen = check(BUGGY)
    assert seen.code == 1
    assert "Observation tokens enter the loss, the discount or the KL" in seen.out
    assert seen.out.rstrip().splitlines()[-1].split("  ")[1].startswith("4 checks failed: MT, TE, CV, SH")


def test_the_two_examples_differ_in_the_bug_alone() -> None:
    good, buggy = ((ROOT / "examples" / name).read_text().splitlines() for name in ("my_shiq.py", "my_shiq_with_a_bug.py"))
    assert len(set(good[1:]) ^ set(buggy[1:])) == 5, "two lines became three"


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("return logits.sum() * float('nan')", "nan"),
        ("return logits.sum(-1)", "shape"),
        ("return logits.detach().sum()", "no gradient"),
        ("return (logits.sum() > 0)", "bool"),
        ("return 1.0", "float"),
    ],
)
def test_what_is_no_loss_fails_the_check_CALL(body: str, verdict: str, user, check) -> None:  # type: ignore[no-untyped-def]
    seen = check(user(body), "--only", "CALL")
    assert seen.code == 1
    assert "1 check failed: CALL" in seen.out and verdict in seen.out


def test_another_dtype_is_accepted_or_named(user, check) -> None:  # type: ignore[no-untyped-def]
    """Computing in a lower precision than it was given is said in a note."""
    seen = check(user("return logits.float().logsumexp(-1).mean()"), "--only", "CALL")
    assert seen.code == 0 and "computes in float32 although its inputs are float64" in seen.out


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("return logits.sum() + batch['reward']", "KeyError: 'reward'"),
        ("return helper(logits)", "ValueError: no such thing"),
        ("import sys\nsys.exit(0)", "it called sys.exit(0)"),
    ],
)
def test_exit_2_when_the_loss_raises(body: str, verdict: str, user, check) -> None:  # type: ignore[no-untyped-def]
    seen = check(user(body, before="def helper(x):\n    raise ValueError('no such thing')\n"), "--only", "CALL")
    assert seen.code == 2
    assert verdict in seen.err and "mine.py" in seen.err, "the user's own file is named"
    assert "checks/" not in seen.err and "site-packages" not in seen.err


def test_exit_2_when_the_loss_needs_other_arguments(tmp_path: Path, check) -> None:  # type: ignore[no-untyped-def]
    tmp_path.joinpath("mine.py").write_text("def loss(logprobs, advantages):\n    return 0\n")
    seen = check(f"{tmp_path / 'mine.py'}:loss")
    assert seen.code == 2 and "argument 'logprobs'" in seen.err and "from_logprobs" in seen.err


def test_one_loss_that_cannot_be_loaded_does_not_hide_the_others(user, check, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    seen = check(GOOD, "nowhere.py:loss", BUGGY, "--only", "MT", "--json", str(tmp_path / "all.json"), "--quiet")
    assert seen.code == 2
    assert "all checks hold" in seen.out and "1 check failed: MT" in seen.out and "'nowhere.py'" in seen.err
    data = json.loads((tmp_path / "all.json").read_text())
    assert not data["passed"] and [r["passed"] for r in data["reports"]] == [True, False, False]
    assert "existing file" in data["reports"][1]["error"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "LOSS: expected FILE.py:NAME or package.module:NAME, at least one, got none."),
        ((GOOD, "--kind", "belman"), "--kind: expected one of bellman, trajectory"),
        ((GOOD, "--kind", "belman"), "Did you mean 'bellman'?"),
        ((GOOD, "--like", "shik"), "error --like: expected one of shiq, "),
        (
            (GOOD, "--like", "nowhere.py:loss"),
            "error --like: expected FILE.py:NAME or package.module:NAME with an existing file",
        ),
        ((GOOD, "--like", f"{ROOT / 'examples' / 'trl_like.py'}"), "Functions in"),
        ((GOOD, "--like", f"{ROOT / 'examples' / 'trl_like.py'}:dpo_loss"), "error --like: expected keyword arguments among"),
        ((GOOD, "--expect-fail", "PAD"), "--expect-fail: expected CHECK=reason, got 'PAD'."),
        ((GOOD, "--expect-fail", "PAD="), "An expected failure needs its reason."),
        ((GOOD, "--expect-fail", "PAT=x"), "error --expect-fail: expected names of checks: CALL, "),
        ((GOOD, "--only", "PU", "--expect-fail", "FP=x"), "error --expect-fail: expected names of checks (PU), got 'FP'."),
        ((GOOD, "--trait", "semi_gradient"), "--trait: expected name=value, got 'semi_gradient'."),
        ((GOOD, "--trait", "semigradient=true"), "error --trait: expected one of kind, "),
        ((GOOD, "--trait", "semigradient=true"), "Did you mean 'semi_gradient'?"),
        (
            (GOOD, "--trait", "padding=3"),
            "error --trait padding: expected some of 'right', 'left', got ('3',). For instance ('right',).",
        ),
        ((GOOD, "--trait", "dtypes=half"), "error --trait dtypes: expected among float64, float32"),
        ((GOOD, "--trait", "semi_gradient=maybe"), "--trait: expected semi_gradient=true or semi_gradient=false"),
        ((GOOD, "--trait", "reduction=median"), "error --trait reduction: expected one of sum, row mean"),
        ((GOOD, "--only", "PAT"), "error --only: expected names of checks: CALL, "),
        ((GOOD, "--only", "PAT"), "got 'PAT'. Did you mean 'PAD'?"),
        ((GOOD, "--only", "mtt"), "got 'mtt'. Did you mean 'MT'?"),
        ((GOOD, "--only", "PAD,"), "--only: expected names of checks, got 'PAD,'."),
        ((GOOD, "--dtype", "int8"), "--dtype: expected one of float64, float32, bfloat16, float16, got 'int8'."),
        ((GOOD, "--device", "tpu9"), "--device: expected a device of this machine, such as cpu or cuda, got 'tpu9'"),
        ((GOOD, "--time-limit", "-1"), "--time-limit: expected seconds >= 0 (0: no limit), got -1.0."),
        ((GOOD, "--html", str(ROOT)), "a folder"),
        ((GOOD, "--html", "-"), "Only --json may go to standard output."),
        ((GOOD, "--html", "r.x", "--junit", "r.x"), "--html: expected another file than --junit, got 'r.x'."),
        ((GOOD, "--html", f"{__file__}/r.html"), "below the file"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments: tuple[str, ...], complaint: str, check) -> None:  # type: ignore[no-untyped-def]
    seen = check(*arguments)
    assert seen.code == 2 and seen.out == ""
    assert complaint in seen.err and seen.err.startswith("error ")


def test_the_command_line_waits_as_long_as_the_library() -> None:
    assert signature(cli.check_losses).parameters["time_limit"].default == timelimit.DEFAULT


def test_traits_are_read_by_their_type(check) -> None:  # type: ignore[no-untyped-def]
    asked = command.order([GOOD], trait=["padding=right,left", "semi_gradient=TRUE", "reduction=row mean", "dtypes=bfloat16"])
    assert asked.traits == {
        "padding": ("right", "left"), "semi_gradient": True, "reduction": "row mean", "dtypes": ("bfloat16",),
    }  # fmt: skip


@pytest.mark.parametrize("text", ["(right,)", "right", "'right'", "['right']", " right ,"])
def test_a_tuple_of_one_is_read_however_it_is_written(text: str) -> None:
    assert command.order([GOOD], trait=[f"padding={text}"]).traits == {"padding": ("right",)}


def test_the_help_names_every_trait() -> None:
    for field in fields(Traits):
        assert field.name in cli.TRAITS and cli.TRAITS in str(
            signature(cli.check_losses).parameters["trait"].annotation.__metadata__[0].help
        )


def test_names_of_checks_in_lower_case() -> None:
    asked = command.order([GOOD], only=["mt,Pad"], expect_fail=["mt=a discount on replies"])
    assert asked.only == ("MT", "PAD") and asked.expect_fail == {"MT": "a discount on replies"}


def test_like_takes_a_function_of_a_file(check) -> None:  # type: ignore[no-untyped-def]
    """The same function is the same loss; one with another discount is another."""
    assert check(GOOD, "--only", "OR", "--like", GOOD).code == 0
    seen = check(GOOD, "--only", "OR", "--like", BUGGY)
    assert seen.code == 1 and "factor of the gradient from row to row" in seen.out


def test_a_like_that_hangs_at_import(user, check) -> None:  # type: ignore[no-untyped-def]
    seen = check(GOOD, "--only", "OR", "--like", user("pass", before="while True: pass"), "--time-limit", "0.3")
    assert seen.code == 2 and seen.err.startswith("error --like: ") and "took longer than 0.3 s" in seen.err


def test_quiet_does_not_hide_a_warning(user, check) -> None:  # type: ignore[no-untyped-def]
    body = (
        "taken = torch.log_softmax(logits, -1)[:, :-1].gather(-1, batch['input_ids'][:, 1:, None])[..., 0]\n"
        "return -(taken * batch['completion_mask'][:, 1:]).sum()"
    )
    seen = check(user(body), "--kind", "policy_only", "--only", "mi,pu", "-q")
    assert seen.code == 0 and seen.out.startswith("warn MI")
    assert "all checks hold (1 passed, 1 warning: MI, " in seen.out


def test_a_failure_that_is_expected_and_one_that_does_not_come(check) -> None:  # type: ignore[no-untyped-def]
    assert check(BUGGY, "--only", "MT,PAD", "--expect-fail", "MT=a discount on replies").code == 0
    seen = check(GOOD, "--only", "MT,PAD", "--expect-fail", "MT=a discount on replies")
    assert seen.code == 1 and "remove the expectation" in seen.out


def test_skips_alone_are_no_pass(check) -> None:  # type: ignore[no-untyped-def]
    seen = check(GOOD, "--only", "EG")
    assert seen.code == 1 and "nothing was checked" in seen.out


# ------------------------------------------------------------------------------------------------------------- files
def test_every_file_is_written_and_says_the_same(check, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    files = {o: tmp_path / "new" / f"r.{o}" for o in ("json", "junit", "html", "markdown")}
    seen = check(BUGGY, "--only", "MT,PAD,PK", *(x for o, path in files.items() for x in (f"--{o}", str(path))))
    assert seen.code == 1
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(p.name for p in files.values()), "drafts are gone"
    data = json.loads(files["json"].read_text())
    assert {r["name"]: r["status"] for r in data["results"]} == {"MT": "failed", "PAD": "passed", "PK": "skipped"}
    suite = ElementTree.parse(files["junit"]).getroot()[0]
    assert {c.get("name"): [e.tag for e in c] for c in suite} == {"MT": ["failure"], "PAD": [], "PK": ["skipped"]}
    assert "1 check failed: MT" in files["html"].read_text() and "❌" in files["markdown"].read_text()


def test_json_on_standard_output_is_json_whatever_the_loss_prints(user, check) -> None:  # type: ignore[no-untyped-def]
    seen = check(user("print('noise')\nreturn logits.sum() * float('nan')", before="print('more noise')"), "--json", "-")
    assert seen.code == 1
    data = json.loads(seen.out)
    assert data["results"][0]["status"] == "failed" and "noise" in seen.err


def test_a_file_that_cannot_be_written_leaves_the_old_one(check, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    old = tmp_path / "r.json"
    old.write_text("old")

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    seen = check(GOOD, "--only", "PU", "--json", str(old))
    assert seen.code == 2 and "--json: expected a file that can be written" in seen.err and "No space left" in seen.err
    assert old.read_text() == "old" and list(tmp_path.iterdir()) == [old]


# ----------------------------------------------------------------------------------------------------------- loading
def test_errors_of_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    files = {
        "mine.py": "import os\nWEIGHT = 1.0\nclass Loss:\n    def __call__(self): ...\ndef shiq(): ...\nbuilt = Loss()\n",
        "broken.py": "def loss(:\n    pass\n",
        "raising.py": "def setup():\n    return {}['seed']\nsetup()\n",
        "importing.py": "import no_such_package_here\n",
        "leaving.py": "raise SystemExit(3)\n",
        "importing_broken.py": "import broken\n",
        "notes.txt": "",
        "stack.py": (
            "import shiq_lab\nfrom shiq_lab import from_stats\n"
            "def dpo(logprobs, beta): ...\ndef direct(*, logits, **batch): ...\ndef helper(): ...\ndef _own(logits): ...\n"
            "loss = shiq_lab.from_logprobs(dpo)\nother: object = from_stats(lambda policy, ref, batch: 0)\nSIZE = int(3)\n"
        ),
    }
    for name, text in files.items():
        Path(name).write_text(text)
    for which, pieces in {
        "mine.py": ["expected FILE.py:NAME or package.module:NAME, got 'mine.py'", "Functions in mine.py: shiq."],
        "mine.py:": ["got 'mine.py:'", "shiq"],
        ":loss": ["got ':loss'"],
        "mime.py:shiq": ["an existing file, got 'mime.py'", "Did you mean 'mine.py'?"],
        "stack.py": ["Functions in stack.py: direct, loss, other, dpo, helper."],
        "stack.py:zzz": ["It defines: dpo, direct, helper, loss, other."],
        "mine.py:shik": ["a name in mine.py, got 'shik'", "Did you mean 'shiq'?"],
        "mine.py:zzz": ["It defines: Loss, shiq, built."],
        "mine.py:WEIGHT": ["got 'mine.py:WEIGHT', of type float"],
        "mine.py:Loss": ["got the class 'mine.py:Loss'", "`loss = Loss()`"],
        "./notes.txt:loss": ["a Python file"],
        "broken.py:loss": ["SyntaxError: invalid syntax `def loss(:` (broken.py:1)"],
        "importing_broken.py:loss": ["SyntaxError: invalid syntax `def loss(:` (broken.py:1)"],
        "raising.py:loss": ["'raising.py', which raises KeyError: 'seed' (raising.py:2, in setup)"],
        "importing.py:loss": ["ModuleNotFoundError: No module named 'no_such_package_here' (importing.py:1)"],
        "leaving.py:loss": ["SystemExit: 3 (leaving.py:1)"],
        "raisin:loss": ["no module 'raisin'", "Did you mean 'raising'?"],
        "mine.sub:loss": ["a module that can be imported", "mine.sub"],
        "a b:loss": ["A file's name ends in .py."],
    }.items():
        with pytest.raises(ValueError, match=r"^LOSS: ") as error:
            load_loss(which)
        assert all(piece in str(error.value) for piece in pieces), f"{which}: {error.value}"
        assert "\n" not in str(error.value)
    assert load_loss("mine.py:shiq").__name__ == "shiq"
    assert load_loss("mine:built.__call__") and load_loss(f"{tmp_path}/mine.py:built")


def test_neighbours_of_a_file_can_be_imported_and_nothing_is_shadowed(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """A lone file finds its neighbour; one in a package its relatives; a file called json.py does not become `json`."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "lone_neighbour.py").write_text("def f(): return 'neighbour'")
    (tmp_path / "json.py").write_text("from lone_neighbour import f\ndef loss(): return f()")
    package = tmp_path / "stack_for_test" / "losses"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    (package / "a.py").write_text("from ..b import f\ndef loss(): return f()")
    (package.parent / "b.py").write_text("def f(): return 'relative'")
    assert load_loss(f"{tmp_path / 'json.py'}:loss")() == "neighbour"
    assert sys.modules["json"] is json
    assert load_loss(f"{package / 'a.py'}:loss")() == "relative"
    assert load_loss("stack_for_test.losses.a:loss")() == "relative"


def test_blame_shows_the_users_frame_under_those_of_libraries(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    Path("deep.py").write_text("import torch\ndef loss(x):\n    return torch.nn.functional.linear(x, x[0, :1].repeat(2, 2))\n")
    import torch

    with pytest.raises(RuntimeError) as caught:
        load_loss("deep.py:loss")(torch.zeros(2, 3))
    said = blame(caught.value)
    assert said.startswith("RuntimeError: mat1 and mat2") and said.endswith("(deep.py:3, in loss)")
    Path("ours.py").write_text("from shiq_lab.errors import check_beta\ndef loss():\n    return check_beta(-1)\n")
    with pytest.raises(ValueError, match="beta") as raised:
        load_loss("ours.py:loss")()
    assert blame(raised.value).endswith("(ours.py:3, in loss)"), "no frame of this package"
    assert blame(ValueError("x " * 500)).endswith(" ...") and len(blame(ValueError("x " * 500))) < loading.MOST + 20

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert blame(Mute()) == "Mute: (its message cannot be shown)"


# ------------------------------------------------------------------------------------------------------------- limits
@pytest.mark.parametrize(
    "body", ["while True: pass", "time.sleep(60)", "while True:\n    try: 1 / 0\n    except Exception: pass"]
)
def test_a_hang_that_lets_signals_through(body: str, user, check) -> None:  # type: ignore[no-untyped-def]
    begun = time.monotonic()
    seen = check(user(body, before="import time"), "--time-limit", "0.3", "--only", "CALL")
    assert seen.code == 2 and "a call of" in seen.err and "took longer than 0.3 s" in seen.err
    assert time.monotonic() - begun < 30


def test_a_hang_at_import(user, check) -> None:  # type: ignore[no-untyped-def]
    seen = check(user("pass", before="while True: pass"), "--time-limit", "0.3")
    assert seen.code == 2 and "importing" in seen.err and "took longer than 0.3 s" in seen.err


def test_limits_nest_and_are_put_back() -> None:
    with time_limit("outer", 30):
        with pytest.raises(TimedOut, match=r"^inner took longer than 0.05 s$"), time_limit("inner", 0.05):
            time.sleep(5)
        with pytest.raises(TimedOut, match=r"^outer"), time_limit("outer", 0.05), time_limit("longer", 10):
            time.sleep(5)
    with pytest.raises(TimedOut, match=r"^swallowed"), time_limit("swallowed", 0.05):
        try:
            time.sleep(5)
        except BaseException:
            pass
    with pytest.raises(TimedOut, match=r"^after"), time_limit("after", 0.2):
        with time_limit("inner", 0.1):
            pass
        time.sleep(5)
    with time_limit("free"):
        time.sleep(0.1)


def test_a_limited_loss_is_the_same_to_who_looks_at_it() -> None:
    from shiq_lab.checks.traits import declare, traits_of

    @declare(kind="trajectory")
    def mine(logits: Any, beta: float) -> float:
        return beta

    watched = limited(mine, 1.0)
    assert watched(None, beta=2.0) == 2.0
    assert signature(watched) == signature(mine) and traits_of(watched) == traits_of(mine) and watched.__name__ == "mine"


HANGS = {
    "a long torch operation": "torch.ones(1).expand(10**13).sum()",
    "compiled code that keeps Python's lock": "sum(iter(int, 1))",
    "code that swallows the alarm": "while True:\n    try: time.sleep(60)\n    except BaseException: pass",
}


@FORKS
@pytest.mark.parametrize("what", HANGS)
def test_a_hang_that_lets_no_signal_through(what: str, user, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The watcher ends it, with the verdict in the report that was asked for in the place of the older, greener one."""
    report = tmp_path / "r.json"
    report.write_text('{"passed": true}')
    which = user(HANGS[what], before="import time")
    seen = guarded(command.order([which], time_limit=0.3, only=["CALL"], json=str(report)))
    assert seen.code == 2 and seen.err == f"error a call of {which} hangs: it was ended"
    data = json.loads(report.read_text())
    assert data["passed"] is False and data["error"] == f"a call of {which} hangs: it was ended"


@FORKS
@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "Python was ended by SIGSEGV, a crash in compiled code"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "Python was ended by SIGKILL, often for want of memory"),
        ("import os; os._exit(0)", "Python was left with exit code 0 before the checks were through"),
    ],
)
def test_a_crash_is_a_verdict(body: str, verdict: str, user) -> None:  # type: ignore[no-untyped-def]
    which = user(body)
    seen = guarded(command.order([which], only=["CALL"]))
    assert seen.code == 2 and seen.err == f"error {verdict}, in a call of {which}"


@FORKS
@pytest.mark.parametrize(("which", "code"), [(GOOD, 0), (BUGGY, 1), ("nowhere.py:loss", 2)])
def test_the_watcher_passes_the_exit_code_on(which: str, code: int) -> None:
    assert guarded(command.order([which], only=["MT"])).code == code


@FORKS
def test_a_backward_pass_that_hangs(user) -> None:  # type: ignore[no-untyped-def]
    """No call is under way then: what ends it is that nothing happens any more."""
    before = (
        "class Stuck(torch.autograd.Function):\n"
        "    @staticmethod\n    def forward(ctx, x): return x.sum()\n"
        "    @staticmethod\n    def backward(ctx, g): return sum(iter(int, 1))\n"
    )
    which = user("return Stuck.apply(logits)", before=before)

    def impatient() -> None:
        timelimit.IDLE, timelimit.LEAST_IDLE = 1.0, 2.0

    seen = guarded(command.order([which], time_limit=2.0, only=["CALL"]), impatient)
    assert seen.code == 2 and "hangs: it was ended" in seen.err and which in seen.err


@FORKS
def test_the_watcher_as_a_thread(user) -> None:  # type: ignore[no-untyped-def]
    """Where there is no fork: torch lets go of Python's lock, and the same verdict comes from the thread."""
    own = timelimit.guard

    def threaded() -> None:
        timelimit.guard = lambda seconds, say: own(seconds, say, fork=False)  # type: ignore[assignment]

    which = user(HANGS["a long torch operation"])
    seen = guarded(command.order([which], time_limit=0.3, only=["CALL"]), threaded)
    assert seen.code == 2 and seen.err == f"error a call of {which} hangs: it was ended"


@FORKS
@pytest.mark.slow
def test_the_whole_command_on_a_hang(user) -> None:  # type: ignore[no-untyped-def]
    """Through a shell's eyes: one line on standard error, nothing on standard output."""
    which = user(HANGS["a long torch operation"])
    program = [sys.executable, "-c", "from shiq_lab.cli import main; main()"]
    done = subprocess.run([*program, "check", which, "--time-limit", "0.5"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error a call of {which} hangs: it was ended\n"


# ------------------------------------------------------------------------------------------------------------- action
def action() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="PyYAML reads action.yml")
    return yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))


def test_no_input_of_the_action_is_pasted_into_a_script() -> None:
    data = action()
    steps = data["runs"]["steps"]
    scripts = [step["run"] for step in steps if "run" in step]
    assert scripts and not any("${{" in script for script in scripts)
    given = {e for step in steps for e in str(step).split() if e.startswith("inputs.")}
    assert {e.removeprefix("inputs.").strip("'}") for e in given} == set(data["inputs"]), "an input that nothing reads"


@FORKS
@pytest.mark.slow
def test_the_action_runs_the_command(tmp_path: Path) -> None:
    """Its own script, with quotes in an argument: the report, the summary, the output and the exit code."""
    (script,) = (step["run"] for step in action()["runs"]["steps"] if step.get("id") == "check")
    program = tmp_path / "bin" / "shiq-lab"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom shiq_lab.cli import main\nmain()\n")
    program.chmod(0o755)
    program.with_name("python").symlink_to(sys.executable)
    known = os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}", "LOSS": f"{BUGGY}\n{GOOD}\n", "KIND": "bellman",
        "ARGS": "--only MT,PU --trait 'reduction=row mean'", "REPORT": str(tmp_path / "report"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"), "GITHUB_OUTPUT": str(tmp_path / "output"),
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", script], env=known, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1, done.stdout + done.stderr
    assert (tmp_path / "output").read_text() == "exit-code=1\n"
    assert "| FAIL | **MT** |" in (tmp_path / "summary").read_text()
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"report.html", "report.json", "junit.xml", "summary.md"}
