"""The command line: shiq-lab envs | solve | selftest | train | check | study | figures | bench | preflight | train-hf."""

import ast
import difflib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shiq_lab import envs
from shiq_lab.bellman import Solution, solve
from shiq_lab.checks.traits import Traits
from shiq_lab.errors import at_least, bad, unknown
from shiq_lab.losses import methods
from shiq_lab.mdp import TokenMDP

# A pipe has no width of its own; and a narrow terminal wraps a table better than cut numbers would read.
out = Console(width=None if sys.stdout.isatty() and Console().width >= 100 else 110)
err = Console(stderr=True)
HF = ("accelerate", "datasets", "peft", "safetensors", "tokenizers", "transformers", "trl", "yaml")  # what the extra hf brings
TRAITS = ", ".join(field.name for field in fields(Traits))


class _Commands(typer.core.TyperGroup):
    """Unknown commands get the nearest known one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
            ctx.fail(f"no command {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Token MDPs with exactly known Q-values, and losses checked against them.",
)  # fmt: skip
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON for programs instead of tables; null stands for an infinite number.")
]
Beta = Annotated[float | None, typer.Option(help="KL weight; default: the environment's own.")]
Gamma = Annotated[float | None, typer.Option(help="Discount; default: the environment's own.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="A parameter of the builder: key=value. Repeatable.")]
Which = Annotated[str, typer.Argument(metavar="ENV", help="A name, FILE.py:builder, or a saved FILE.npz.")]


def load(which: str, settings: list[str] | None, beta: float | None, gamma: float | None) -> tuple[TokenMDP, float, float]:
    """The automaton that an ENV argument means, with the beta and gamma to use."""
    parameters = dict(_setting(text) for text in settings or [])
    if which.endswith(".npz"):
        if parameters:
            raise bad("--set", "nothing for a saved automaton", ", ".join(parameters))
        try:
            mdp = TokenMDP.load(which)
        except OSError as error:
            raise bad("ENV", "an existing .npz file", f"{which!r} ({error.strerror})") from None
        return mdp, 1.0 if beta is None else beta, 1.0 if gamma is None else gamma
    if ":" in which:
        return _build(_builder(which), parameters), 1.0 if beta is None else beta, 1.0 if gamma is None else gamma
    if Path(which).is_file():
        raise bad("ENV", "FILE.py:builder or FILE.npz", repr(which))
    environment = envs.lookup(which)
    mdp = _build(environment.builder, parameters)
    return mdp, environment.beta if beta is None else beta, environment.gamma if gamma is None else gamma


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise bad("--set", "key=value", repr(text))
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _builder(which: str) -> Callable[..., Any]:
    path, _, name = which.rpartition(":")
    if not Path(path).is_file():
        raise bad("ENV", "FILE.py:builder with an existing file", repr(which))
    spec = importlib.util.spec_from_file_location("shiq_lab_user_environment", path)
    if spec is None or spec.loader is None:
        raise bad("ENV", "a Python file", repr(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise bad("ENV", "a file that can be imported", f"{path!r}, which raises {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise bad("ENV", f"a function in {path}", repr(name))
    return getattr(module, name)


def _build(builder: Callable[..., Any], parameters: dict[str, Any]) -> TokenMDP:
    known = inspect.signature(builder).parameters
    for key in parameters:
        if key not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            near = difflib.get_close_matches(key, known, n=1)
            raise bad("--set", f"one of {', '.join(known)}", repr(key), f"Did you mean {near[0]!r}?" if near else "")
    try:
        mdp = builder(**parameters)
    except ValueError:
        raise
    except (Exception, SystemExit) as error:
        raise bad("ENV", "a builder that runs", f"{type(error).__name__}: {error}", "Give its parameters by --set.") from error
    if not isinstance(mdp, TokenMDP):
        raise bad("ENV", "a builder that returns a TokenMDP", type(mdp).__name__)
    return mdp


def _json(value: Any) -> None:
    """Strict JSON on standard output: an infinite number becomes null."""
    from shiq_lab.studies.frame import plain

    print(json.dumps(plain(value, strict=False), allow_nan=False))


# ---------------------------------------------------------------------------------------------------------- commands
@app.command("envs")
def show_envs(json_: Json = False) -> None:
    """List the environments: what each tests, and its size."""
    rows = []
    for name, environment in envs.ENVIRONMENTS.items():
        mdp = environment.builder()
        card = inspect.getdoc(environment.builder) or ""
        rows.append({
            "name": name,
            "policy_states": int((mdp.reachable & mdp.is_policy).sum()),
            "states": mdp.n_states,
            "tokens": mdp.n_tokens,
            "horizon": mdp.horizon,
            "beta": environment.beta,
            "gamma": environment.gamma,
            "deterministic": mdp.deterministic,
            "summary": card.splitlines()[0].partition(": ")[2] if card else "",
        })  # fmt: skip
    if json_:
        return _json(rows)
    table = Table("environment", "policy states", "tokens", "beta", "gamma", "what it is", box=None, header_style="bold")
    for row in rows:
        table.add_row(row["name"], *(f"{row[k]:g}" for k in ("policy_states", "tokens", "beta", "gamma")), row["summary"])
    out.print(table)


@app.command("solve")
def show_solution(
    env: Which, beta: Beta = None, gamma: Gamma = None, set_: Sets = None,
    states: Annotated[int, typer.Option(min=1, help="How many states to print, along the likeliest strings.")] = 12,
    strings: Annotated[int, typer.Option(min=0, help="How many best and most likely strings to print.")] = 3,
    json_: Json = False,
) -> None:  # fmt: skip
    """Solve an environment exactly: values, policy, best and most likely strings."""
    mdp, beta, gamma = load(env, set_, beta, gamma)
    solution = solve(mdp, beta=beta, gamma=gamma)
    likely, best = _strings(mdp, beta, gamma, strings)
    if json_:
        return _json(_solution_json(solution, likely, best))
    title = f"[bold]{escape(mdp.name or env)}[/bold]  beta {beta:g}, gamma {gamma:g}:"
    out.print(f"{title}  J(pi*) = v*(start) = {solution.objective:.12g}")
    if solution.time_dependent:
        out.print(f"values at t = 0 of a horizon of {mdp.horizon} policy tokens; --json has every t", style="dim")
    table = Table("state", "owner", "v*", "token", "q*", "pi_ref", "pi*", box=None, header_style="bold")
    q, policy = solution.q(), np.exp(solution.log_policy())
    order = _along(mdp, likely, states)
    for state in order:
        owner = "policy" if mdp.is_policy[state] else "environment"
        tokens = np.flatnonzero(mdp.allowed[state])
        for i, token in enumerate(sorted(tokens, key=lambda a, s=state: -policy[s, a])[:4]):  # type: ignore[misc]
            head = (str(state), owner, f"{solution.v()[state]:.6g}") if i == 0 else ("", "", "")
            chances = (f"{np.exp(mdp.ref_log_policy[state, token]):.4f}", f"{policy[state, token]:.4f}")
            table.add_row(*head, escape(mdp.show(int(token))), f"{round(q[state, token], 12):.6g}", *chances)
        if len(tokens) > 4:
            table.add_row("", "", "", f"... {len(tokens) - 4} more", "", "", "")
    out.print(table)
    if mdp.n_states > len(order):
        out.print(f"{len(order)} of {mdp.n_states} states; --states for more, --json for all.", style="dim")
    for title, rows in (("most likely under pi*", likely), ("highest discounted return", best)) if strings else ():
        out.print(f"[bold]{title}[/bold]" + ("" if rows else ": none, in a loop going on always pays"))
        for total, said in rows:
            out.print(f"  {np.exp(total) if title.startswith('most') else total:10.6g}  {_say(mdp, said)}", markup=False)


def _say(mdp: TokenMDP, tokens: list[int]) -> str:
    more = f" ... ({len(tokens)} tokens)" if len(tokens) > 40 else ""
    return " ".join(mdp.show(token) for token in tokens[:40]) + more


Strings = list[tuple[float, list[int]]]


def _strings(mdp: TokenMDP, beta: float, gamma: float, count: int) -> tuple[Strings, Strings]:
    """The likeliest strings under pi* and those of the highest return."""
    from shiq_lab.strings import best_strings

    flat = mdp if mdp.horizon is None else mdp.unroll()
    chances = solve(flat, beta=beta, gamma=gamma).log_policy()
    return list(islice(best_strings(flat, chances), count)), list(islice(best_strings(flat, flat.reward, gamma), count))


def _along(mdp: TokenMDP, strings: Strings, most: int) -> list[int]:
    """States in the order in which the strings come through them."""
    seen: dict[int, None] = {mdp.start: None}
    for _, tokens in strings:
        state = mdp.start
        for token in tokens:
            state = int(mdp.next_state[state, token])
            if state < 0:
                break
            seen[state] = None
    return list(seen)[:most]


def _solution_json(solution: Solution, likely: Strings, best: Strings) -> dict[str, Any]:
    mdp = solution.mdp
    layers = len(solution.values) - 1 if solution.time_dependent else 1
    names = lambda rows: [{"total": t, "tokens": [mdp.show(a) for a in s], "ids": s} for t, s in rows]  # noqa: E731
    return {
        "name": mdp.name, "beta": solution.beta, "gamma": solution.gamma, "objective": solution.objective,
        "error_bound": solution.error_bound, "start": mdp.start, "is_policy": mdp.is_policy.tolist(),
        "v": [solution.v(t).tolist() for t in range(layers)], "q": [solution.q(t).tolist() for t in range(layers)],
        "log_policy": [solution.log_policy(t).tolist() for t in range(layers)],
        "most_likely": names(likely), "highest_return": names(best),
    }  # fmt: skip


@app.command()
def selftest(
    env: Annotated[list[str] | None, typer.Option(help="Only this environment. Repeatable.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Where the figure goes; default, of a full run: figures/selftest.png.")
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Show instead where pi* is stationary, loss by loss: the fixed-point table.")
    ] = False,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Show instead which check catches which planted bug; minutes, needs the extra hf.")
    ] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Show instead a tiny transformer trained by ShiQ against the exact q*; minutes.")
    ] = False,
    json_: Json = False,
) -> None:
    """Check the project's own losses against the exact truth; exit 1 if anything falls short."""
    import torch

    if figure is not None and (figure.suffix not in (".png", ".svg", ".pdf") or figure.is_dir()):
        raise bad("--figure", "a file that ends in .png, .svg or .pdf", repr(str(figure)))
    if tiny:
        if table or matrix:
            raise bad("--tiny", "no other table beside it", "--table" if table else "--matrix")
        raise typer.Exit(0 if _tiny(env or [], figure, json_) else 1)
    if matrix:
        given = ["--table"] * table + [f"--env {name}" for name in env or ()] + ([f"--figure {figure}"] if figure else [])
        raise typer.Exit(0 if _planted_bugs(given, json_) else 1)
    if table:
        raise typer.Exit(0 if _fixed_points(env or [], figure, json_) else 1)

    from shiq_lab import plotting
    from shiq_lab.selftest import run

    if figure is None and not env:
        figure = Path("figures/selftest.png")
    torch.set_num_threads(1)  # small tables: more threads only wait for each other
    report = run(env or None)
    if json_:
        _json(report.to_json())
    else:
        _print_report(report)
    if figure is not None:
        where = plotting.save(plotting.selftest_figure(report), figure)
        if not json_:
            out.print(f"figure: {where}", style="dim")
    raise typer.Exit(0 if report.passed else 1)


def _tiny(env: list[str], figure: Path | None, json_: bool) -> bool:
    """Print how far the tiny transformer is from the truth, environment by environment; is it near enough everywhere?"""
    from dataclasses import replace

    from shiq_lab import plotting
    from shiq_lab.studies.frame import run
    from shiq_lab.studies.tiny_truth import SIZES, TINY

    for name in env:
        if name not in SIZES:
            raise unknown("--env", "a deterministic environment", name, SIZES)
    study = replace(TINY, settings={**TINY.settings, "environments": env or None})
    with _resumable():
        result = run(study, jobs=os.cpu_count() or 1)
    if figure is not None:
        plotting.save(TINY.draw(result), figure)
    if json_:
        _json(result.to_json())
        return result.passed
    heads = ("environment", "prefixes", "tokens tried", "updates", "max q err / range", "KL(pi*||pi)", "before", "")
    view = Table(*heads, box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    for name, line in result.summary.items():
        tried = f"{line['edges'] - line['untried']}/{line['edges']}"
        before = f"{line['q_relative_before']:.0%}, {line['kl_before']:.0e}"
        mark = "[green]q*, pi*[/green]" if line["holds"] else "[red]FELL SHORT[/red]"
        reached = (f"{line['q_relative']:.2%}", f"{line['kl']:.0e}")
        view.add_row(name, str(line["prefixes"]), tried, str(line["steps"]), *reached, before, mark)
    out.print(view)
    _print_claims(result)
    return result.passed


def _print_claims(result: Any, judged: bool = True) -> None:
    for claim in result.claims:
        mark = "[green]holds[/green]" if claim.holds else "[red]FAILS[/red]" if judged else "[yellow]not here[/yellow]"
        out.print(f"  {mark}  {escape(claim.text)}  [dim]{escape(claim.measured)}[/dim]", highlight=False)


def _fixed_points(env: list[str], figure: Path | None, json_: bool) -> bool:
    """Print the fixed-point table; is everything as theory predicts?"""
    import torch

    from shiq_lab import fixed_points

    for option, given in (("--env", env), ("--figure", [str(figure)] if figure is not None else [])):
        if given:
            said = ", ".join(map(repr, given))
            raise bad(option, "nothing beside --table, which has automata of its own and draws no figure", said)
    torch.set_num_threads(1)  # small tables: more threads only wait for each other
    rows = fixed_points.table()
    good = sum(r.holds for r in rows)
    if json_:
        _json(fixed_points.to_json(rows))
        return good == len(rows)
    heads = ("deterministic", "", "random replies", "", "one token", "")
    view = Table("loss", *heads, "pins down", box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    view.add_row("[dim]data:[/dim]", *["[dim]pi*'s[/dim]", "[dim]other[/dim]"] * 3, "")
    short = {"yes": "[green]yes[/green]", "yes, its V not": "[green]yes[/green], V [yellow]no[/yellow]"}
    for line in fixed_points.summary(rows):
        cells = [short.get(cell, f"[yellow]{cell.split()[0]}[/yellow]") for cell in line.cells]
        view.add_row(line.loss if line.holds else f"[red]{line.loss}: not as predicted[/red]", *cells, line.fixes)
    out.print(view)
    out.print(
        "yes: the exact expected gradient at the optimum is 0 to rounding; no: at least a million times the rounding",
        style="dim",
    )
    for row in [r for r in rows if not r.holds]:
        out.print(f"[red]FELL SHORT[/red] {row}")
    out.print(f"{good}/{len(rows)} expected gradients as theory predicts")
    return good == len(rows)


def _planted_bugs(more: list[str], json_: bool) -> bool:
    """Print the matrix check x bug; is every planted bug caught, and its accepted twin not?"""
    from shiq_lab.checks.bugs import matrix
    from shiq_lab.progress import progress

    if more:
        raise bad("--matrix", "no other option than --json beside it", ", ".join(more))
    jobs = matrix.ids()
    rows = list(progress(matrix.compute(), "planted bugs", total=len(jobs)))
    found = matrix.Matrix(rows)
    if json_:
        _json(found.to_json())
        return not found.to_json()["missed"]
    view = Table("bug", "thread", "what one sees", "caught by", "smoke test", box=None, padding=(0, 1), header_style="bold")
    said = {True: "[yellow]passes[/yellow]", False: "fails", None: "[dim]-[/dim]"}
    for row in rows:
        checks = "[green]" + " ".join(row.caught_by) + "[/green]" if row.caught else "[red]MISSED[/red]"
        view.add_row(row.id, escape(row.thread), escape(row.symptom), checks, said[row.smoke_passed])
    out.print(view)
    for line in matrix.totals(found):
        out.print(line)
    for row in [r for r in rows if r.right_failed]:
        out.print(f"[red]FALSE ALARM[/red] {row.id}: {', '.join(row.right_failed)} on the accepted twin")
    return not found.to_json()["missed"]


def _print_report(report: Any) -> None:
    from shiq_lab.facts import FACTS
    from shiq_lab.selftest import EXACT

    heads = ("environment", "states", "tokens", "method", "max q err", "max v err", "KL", "gap", "verdict")
    table = Table(*heads, box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    last = ""
    for t in report.trained:
        head = (t.environment, str(t.states), str(t.tokens)) if t.environment != last else ("", "", "")
        numbers = (f"{x:.0e}" for x in (t.metrics.q_error, t.metrics.v_error, t.metrics.kl, t.metrics.gap))
        style = "red" if not t.ok else "green" if t.verdict == EXACT else "yellow"
        table.add_row(*head, t.method, *numbers, f"[{style}]{t.verdict}[/{style}]")
        last = t.environment
    out.print(table)
    worst = max((gap for _, _, gap in report.roads), default=float("nan"))
    names = {e for e, _, _ in report.roads}
    out.print(
        f"\ntwo roads: {len(names)} environments by {len(report.roads)} second roads, largest relative difference {worst:.0e}"
    )
    for fact, function in FACTS.items():
        mine = [(e, f) for e, f in report.findings if f.fact == fact]
        good = sum(f.holds for _, f in mine)
        mark = (
            "[red]FAILS[/red]" if good < len(mine) else "[green]holds[/green]" if mine else "[yellow]not measured here[/yellow]"
        )
        out.print(f"  {fact:4s}{mark}  {good}/{len(mine)} measurements on {len({e for e, _ in mine})} environments", end="  ")
        out.print(" ".join((function.__doc__ or "").split()).partition(";")[0].rstrip("."), style="dim", markup=False)
    _print_expected(report.expected)
    for line in report.failures():
        out.print(f"[red]FELL SHORT[/red] {line}")
    out.print("[bold green]all checks hold[/bold green]" if report.passed else "[bold red]some checks fail[/bold red]")


def _print_expected(expected: list[Any]) -> None:
    """What must fail, kind by kind: how large it is, over how many environments; and how well its size is predicted."""
    good = sum(f.holds for _, f in expected)
    out.print(f"expected outcomes, each by its predicted size: {good}/{len(expected)}")
    for key, claim in dict.fromkeys((f.fact, f.claim) for _, f in expected if f.fact != "train"):
        seen = [f.measured for _, f in expected if (f.fact, f.claim) == (key, claim)]
        size = (
            f"{min(seen):.0e} to {max(seen):.0e}"
            if "predicted" not in claim and "formula" not in claim
            else f"off by {max(seen):.0e}"
        )
        out.print(f"  {key:9s} {claim}: {size}, {len(seen)} environments", markup=False, highlight=False)


@app.command("train")
def train_table(
    env: Which,
    loss: Annotated[str, typer.Option(help=f"One of: {', '.join(methods.METHODS)}.")] = "shiq",
    data: Annotated[str, typer.Option(help="population (exact), listed, sampled or gym.")] = "population",
    behavior: Annotated[str, typer.Option(help="covering, uniform, reference, mixed or on-path.")] = "covering",
    rows: Annotated[int, typer.Option(help="Rows to sample or episodes to play.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Of the sampled rows.")] = 0,
    sgd: Annotated[float | None, typer.Option(metavar="STEP", help="Constant-step SGD of this step size, on rows.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of SGD.")] = 4000,
    batch_size: Annotated[int, typer.Option(help="Rows a step of SGD.")] = 32,
    beta: Beta = None, gamma: Gamma = None, set_: Sets = None, json_: Json = False,
) -> None:  # fmt: skip
    """Train a table of logits from the reference, and measure it against the exact optimum."""
    from shiq_lab import data as sources
    from shiq_lab.training import minibatches, stationary, train, train_on_rows, train_sampled

    mdp, beta, gamma = load(env, set_, beta, gamma)
    flat = stationary(mdp)
    policy = sources.behavior(flat, behavior, beta, gamma)
    if data == "population" and sgd is not None:
        raise bad("--sgd", "rows to step on: --data listed, sampled or gym", "--data population")
    if data == "population":
        trained = train(flat, loss, beta=beta, gamma=gamma, behavior=policy)
    else:
        batch = sources.rows(flat, data, policy, rows, seed)
        if sgd is None:
            trained = train_on_rows(flat, loss, batch, beta=beta, gamma=gamma)
        else:
            pick = minibatches(batch, at_least("--batch-size", batch_size, 1), rng=seed)
            trained = train_sampled(flat, loss, pick, beta=beta, gamma=gamma, learning_rate=sgd, steps=steps)
    m = trained.metrics
    if json_:
        return _json({"environment": mdp.name, "loss_name": loss, "data": data, "behavior": behavior} | trained.to_json())
    title = f"[bold]{escape(mdp.name or env)}[/bold]  {loss} on {data} data, behaviour {behavior}"
    out.print(f"{title}; {trained.steps} steps: {trained.optimizer}")
    if trained.untried:
        out.print(
            f"[yellow]{trained.untried} reachable (state, token) pairs never occur in these rows[/yellow]: q* is missed there"
        )
    if not mdp.deterministic and methods.lookup(loss).form in ("square", "first"):
        out.print("[yellow]replies are random: full-gradient losses are biased[/yellow]; see --loss semi-gradient, turn-cut")
    table = Table("max |q - q*|", "max |v - v*|", "KL(pi*||pi)", "J", "J*", "gap", box=None, header_style="bold")
    table.add_row(
        *(f"{x:.3e}" for x in (m.q_error, m.v_error, m.kl)), *(f"{x:.9g}" for x in (m.objective, m.optimum)), f"{m.gap:.1e}"
    )
    out.print(table)


@app.command("check")
def check_losses(
    losses: Annotated[list[str] | None, typer.Argument(metavar="LOSS...", help="FILE.py:NAME or package.module:NAME.")] = None,
    kind: Annotated[str | None, typer.Option(help="bellman, trajectory, policy_only, on_policy or preference.")] = None,
    like: Annotated[
        str | None, typer.Option(help="A reference loss, by name or FILE.py:NAME: must equal it up to a factor.")
    ] = None,
    expect_fail: Annotated[list[str] | None, typer.Option(metavar="CHECK=REASON", help="Must fail. Repeatable.")] = None,
    trait: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help=f"What the loss declares: {TRAITS}. Repeatable.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="CHECK", help="Only this check; several by commas.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are failures.")] = False,
    device: Annotated[str, typer.Option(help="Where the loss is called.")] = "cpu",
    dtype: Annotated[list[str] | None, typer.Option(help="A lower precision to run too. Repeatable.")] = None,
    time_limit: Annotated[float, typer.Option(metavar="S", help="Seconds for one call of the loss; 0: no limit.")] = 60.0,
    json_: Annotated[str | None, typer.Option("--json", metavar="FILE", help="The report as JSON; - prints it.")] = None,
    junit: Annotated[str | None, typer.Option(metavar="FILE", help="The report as JUnit XML.")] = None,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="The report as one HTML file.")] = None,
    markdown: Annotated[str | None, typer.Option(metavar="FILE", help="A summary in Markdown.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only failures, warnings and the verdict.")] = False,
) -> None:
    """Does your loss have the right fixed point? Exit 0: all checks hold; 1: a check failed; 2: it could not be run."""
    from shiq_lab.checks import command

    asked = command.order(
        losses, kind=kind, like=like, expect_fail=expect_fail, trait=trait, only=only, strict=strict, device=device,
        dtype=dtype, time_limit=time_limit, quiet=quiet, json=json_, junit=junit, html=html, markdown=markdown,
    )  # fmt: skip
    raise typer.Exit(command.check(asked, out, err))


@app.command("study")
def run_study(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Studies; without a name they are listed.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds, 0, 1, ...; default: the study's own.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A quick look: fewer cases and seeds.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core. Changes no number.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is kept in .shiq_lab/studies.")] = False,
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where NAME.json, .png and .svg go; default: nowhere.")
    ] = None,
    json_: Json = False,
) -> None:
    """Run experiments against the exact truth; a study that was killed goes on where it stopped. Exit 1: a claim fails."""
    from shiq_lab import gallery
    from shiq_lab.studies.frame import CACHE, run
    from shiq_lab.studies.table import STUDIES, lookup

    if not names:
        if json_:
            return _json([{"name": s.name, "title": s.title, "question": s.question} for s in STUDIES.values()])
        view = Table("study", "asks", box=None, header_style="bold")
        for study in STUDIES.values():
            view.add_row(study.name, escape(study.question))
        return out.print(view)
    chosen, found = [lookup(name) for name in names], []
    _folder(folder)
    for study in chosen:
        with _resumable():
            result = run(study, seeds=seeds, fast=fast, jobs=jobs or os.cpu_count() or 1, cache=CACHE, fresh=fresh)
        found.append(result)
        if folder is not None:
            gallery.keep(result, folder)
        if not json_:
            out.print(f"[bold]{escape(study.title)}[/bold]  ({study.name}, {result.settings['seeds']} seeds)")
            _print_claims(result, judged=not fast)
    if json_:
        _json([r.to_json() for r in found] if len(found) > 1 else found[0].to_json())
    elif fast:
        out.print("a quick look: what is claimed is claimed of the full settings", style="dim")
    raise typer.Exit(0 if fast or all(r.passed for r in found) else 1)


def _folder(folder: Path | None) -> None:
    """A ValueError, before anything is measured, for a place where no files can be written."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad("--out", "a folder to write to", f"{str(folder)!r} ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise bad("--out", "a folder to write to", f"{str(folder)!r}, which is read-only")


@contextmanager
def _resumable() -> Iterator[None]:
    """Ctrl-C ends a study with one line and exit code 130; what was measured is kept."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("[yellow]interrupted[/yellow]: what was measured is kept, the same command goes on from there")
        raise typer.Exit(130) from None


@app.command("figures")
def make_figures(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Only these figures.")] = None,
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where they go.")] = Path("figures"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is kept in .shiq_lab/studies.")] = False,
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Draw the studies from their numbers in DIR, measure nothing.")
    ] = False,
) -> None:
    """Make every figure again, as PNG and SVG, with its numbers as JSON; docs/studies.md too, in a clone. Long: minutes."""
    from shiq_lab import gallery
    from shiq_lab.progress import progress
    from shiq_lab.studies.frame import CACHE

    fine, chosen = True, gallery.choose(names or [])
    _folder(folder)
    for name in progress(chosen, "figures"):
        with _resumable():
            running: dict[str, Any] = {"jobs": jobs or os.cpu_count() or 1, "cache": CACHE, "fresh": fresh}
            result = gallery.make(name, folder, redraw=redraw, **running)
        good = result is None or result.passed
        fine &= good
        out.print(f"{name}: {folder / name}.png, .svg, .json" + ("" if good else "  [red]FAILS[/red]"))
    if page := gallery.write_page(folder):
        out.print(f"page: {page}", style="dim")
    raise typer.Exit(0 if fine else 1)


@app.command("preflight")
def look_before_training(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML file of train-hf.")],
    rows: Annotated[int, typer.Option(help="How many rows of the data at most.")] = 16,
    show: Annotated[int, typer.Option(help="How many of them to print, token by token.")] = 2,
    json_: Annotated[str | None, typer.Option("--json", metavar="FILE", help="The report as JSON; - prints it.")] = None,
    junit: Annotated[str | None, typer.Option(metavar="FILE", help="The report as JUnit XML.")] = None,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="The report as one HTML file.")] = None,
    markdown: Annotated[str | None, typer.Option(metavar="FILE", help="A summary in Markdown.")] = None,
) -> None:
    """Before the large run: your model, template, data and settings, one step, on a CPU. Exit 0: all checks hold; 1; 2."""
    from shiq_lab.hf import preflight

    files = {"json": json_, "junit": junit, "html": html, "markdown": markdown}
    raise typer.Exit(preflight.run_command(config, rows=rows, show_rows=show, **files, out=out, err=err))


@app.command("train-hf")
def train_full_size(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file: model, data, trainer.")],
    fresh: Annotated[bool, typer.Option("--fresh", help="From the start, not from the newest checkpoint.")] = False,
    json_: Json = False,
) -> None:
    """Train a transformers model by the same loss function; several processes: accelerate launch $(which shiq-lab) train-hf."""
    from shiq_lab.hf import run

    found = run.train(run.read(config), resume=not fresh)
    if int(os.environ.get("RANK", 0)) > 0:
        return None  # the first of several processes speaks for all
    if json_:
        return _json(found)
    for name in ("train_loss", "dv", "abs_rho", "log_ratio", "reward", "margin", "eval_loss"):
        if name in found:
            out.print(f"{name:12s} {found[name]:.6g}")


@app.command()
def bench(
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of every timing; medians are reported.")] = 5,
) -> None:
    """Run the benchmarks of this clone; each prints JSON."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    scripts = sorted(folder.glob("*.py"))
    if not scripts:
        raise bad("bench", "a clone of the repository with benchmarks/", f"none beside {folder.parent}")
    for script in scripts:
        done = subprocess.run([sys.executable, str(script), "--repeats", str(repeats)], check=False)
        if done.returncode:
            raise typer.Exit(done.returncode)


def main() -> None:
    """Entry point: bad input is one line on standard error and exit code 2, never a traceback."""
    try:
        app()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError):
            if (error.name or "").partition(".")[0] not in HF:
                raise
            error = bad("shiq-lab", "the extra hf", f"no module {error.name!r}", 'In a clone: pip install -e ".[hf]"')
        err.print("[red]error[/red] " + escape(str(error)), soft_wrap=True, highlight=False)
        sys.exit(2)
