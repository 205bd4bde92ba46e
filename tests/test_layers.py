"""The rooms of the house: a file imports only files above it, and the pure rooms have no side effects.

Every rule is a function of (file name, source) that returns its violations, so each is also shown to catch a planted one.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A file may import only what stands above it; all the files of envs/ share one room.
PURE = (
    "errors",
    "graph",
    "mdp",
    "policies",
    "bellman",
    "builders",
    "envs",
    "batch",
    "sampling",
    "enumeration",
    "fused",
    "stats",
    "losses.__init__",
    "losses.steps",
    "losses.residuals",
    "losses.shiq",
    "losses.sequences",
    "losses.kl",
    "losses.preference",
    "losses.contrastive",
    "losses.consistency",
    "losses.policy_gradient",
    "losses.methods",
)
ROOMS = (
    *PURE,
    "population",
    "models.__init__",
    "models.tabular",
    "models.transformer",
    "models.prefixes",
    "gym",
    "progress",
    "training",
    "strings",
    "collect",
    "data",
    "roads",
    "facts",
    "objectives",
    "learning",
    "tiny",
    "fixed_points",
    "checks.__init__",
    "checks.report",
    "checks.runner",
    "checks.loading",
    "checks.timelimit",
    "checks.render",
    "checks.traits",
    "checks.tolerances",
    "checks.fixtures",
    "checks.subject",
    "checks.comparing",
    "checks.fixed_point",
    "checks.invariance",
    "checks.calls",
    "checks.against",
    "checks.adapters",
    "checks.likes",
    "checks.loss",
    "checks.components.__init__",
    "checks.components.subject",
    "checks.components.rows",
    "checks.components.masks",
    "checks.components.returns",
    "checks.components.groups",
    "checks.components.kl",
    "checks.components.batches",
    "checks.components.statistics",
    "checks.components.policy",
    "checks.components.suite",
    "checks.trainer.__init__",
    "checks.trainer.rows",
    "checks.trainer.subject",
    "checks.trainer.loop",
    "checks.trainer.suite",
    "checks.rollout.__init__",
    "checks.rollout.protocol",
    "checks.rollout.oracle",
    "checks.rollout.subject",
    "checks.rollout.probabilities",
    "checks.rollout.training_rows",
    "checks.rollout.suite",
    "checks.distributed.__init__",
    "checks.distributed.parallel",
    "checks.distributed.scenario",
    "checks.distributed.address",
    "checks.distributed.worker",
    "checks.distributed.processes",
    "checks.distributed.comparing",
    "checks.distributed.suite",
    "checks.bugs.__init__",
    "checks.bugs.plant",
    "checks.bugs.right_bellman",
    "checks.bugs.right_preference",
    "checks.bugs.right_policy",
    "checks.bugs.losses",
    "checks.bugs.rollouts",
    "checks.bugs.processes",
    "checks.bugs.accepted_components",
    "checks.bugs.components",
    "checks.bugs.trainers",
    "checks.bugs.matrix",
    "checks.pytest_plugin",
    "checks.command",
    "hf.__init__",
    "hf.tabular",
    "hf.rows",
    "hf.formats",
    "hf.collator",
    "hf.ultrafeedback",
    "hf.heads",
    "hf.reference",
    "hf.config",
    "hf.trainer",
    "hf.factories",
    "hf.smollm",
    "hf.adapters",
    "hf.run",
    "hf.preflight_subject",
    "hf.preflight_data",
    "hf.preflight_step",
    "hf.preflight_checks",
    "hf.preflight",
    "hf.restricted",
    "hf.bfcl_calls",
    "hf.bfcl",
    "hf.bfcl_env",
    "hf.bfcl_dialogues",
    "selftest",
    "plotting",
    "pictures.graphs",
    "pictures.drawing",
    "pictures.tree",
    "pictures.automaton",
    "pictures.credit",
    "pictures.__init__",
    "notebook",
    "studies.__init__",
    "studies.statistics",
    "studies.frame",
    "studies.tiny_truth",
    "studies.every_loss",
    "studies.reward_kl",
    "studies.ablation",
    "studies.off_policy",
    "studies.reward_level",
    "studies.horizon",
    "studies.multi_turn",
    "studies.data_size",
    "studies.metric",
    "studies.real_lm",
    "studies.bfcl",
    "studies.scale",
    "studies.table",
    "studies.page",
    "gallery",
    "cli",
)
ADD = "add it to ROOMS in tests/test_layers.py, below everything that it imports (and to PURE if it has no side effects)"
PUBLIC = "__init__"  # the package's own file: re-exports lazily, and registers the environments


def sources() -> dict[str, str]:
    """Every module of the package by its name inside it, "mdp" or "losses.shiq"; the files of envs/ by "envs.NAME"."""
    found = {}
    for path in sorted((ROOT / "shiq_lab").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "shiq_lab").with_suffix("").parts)
        found[name] = path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "envs").glob("*.py")):
        found[f"envs.{path.stem}"] = path.read_text(encoding="utf-8")
    return found


SOURCES = sources()


def room(module: str) -> str:
    """The entry of ROOMS that a module belongs to: the files of envs/ share one."""
    return "envs" if module == "envs" or module.startswith("envs.") else module


def imports(source: str) -> Iterator[str]:
    """Modules of shiq_lab that a source imports anywhere in it, functions and type-checking blocks included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (
                alias.name.removeprefix("shiq_lab").lstrip(".") or PUBLIC for alias in node.names if in_package(alias.name)
            )
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "a relative import"
            elif node.module and in_package(node.module):
                inner = node.module.removeprefix("shiq_lab").lstrip(".")
                for alias in node.names:
                    full = f"{inner}.{alias.name}".lstrip(".")
                    package = f"{inner}.__init__" if f"{inner}.__init__" in SOURCES and inner != "envs" else inner
                    yield full if full in SOURCES or full == "envs" else package or PUBLIC


def in_package(name: str) -> bool:
    return name == "shiq_lab" or name.startswith("shiq_lab.")


def upward(module: str, source: str) -> list[str]:
    """Imports of a file that do not stand above it."""
    here = room(module)
    if here not in ROOMS:
        return [f"{module} stands in no room: {ADD}"]
    out = []
    for target in imports(source):
        there = room(target)
        if there == here == "envs":
            continue
        if there not in ROOMS:
            out.append(f"{module} imports {target}, which stands in no room: {ADD}")
        elif ROOMS.index(there) >= ROOMS.index(here):
            out.append(f"{module} imports {target}, which does not stand above it")
    return out


@pytest.mark.parametrize("module", [name for name in SOURCES if name != PUBLIC])
def test_a_file_imports_only_what_stands_above_it(module: str) -> None:
    assert not upward(module, SOURCES[module])


def test_the_list_is_not_stale() -> None:
    """Each entry is a file, and the README's tree shows them in this order."""
    assert set(ROOMS) == {room(module) for module in SOURCES if module != PUBLIC}
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("A file imports only files above it")[2]
    files = [f"\n  {name}.py " for name in ROOMS if "." not in name and name != "envs"]
    places = [tree.find(file) for file in files]
    assert -1 not in places and places == sorted(places), dict(zip(files, places, strict=True))


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("graph", "from shiq_lab.mdp import TokenMDP", "graph imports mdp, which does not stand above it"),
        ("mdp", "def f():\n    import shiq_lab.bellman", "mdp imports bellman, which does not stand above it"),
        ("mdp", "from shiq_lab import bellman", "mdp imports bellman, which does not stand above it"),
        ("stats", "from shiq_lab.losses import shiq", "stats imports losses.shiq, which does not stand above it"),
        ("batch", "import shiq_lab.cli as c", "batch imports cli, which does not stand above it"),
        ("bellman", "from shiq_lab.envs import make", "bellman imports envs, which does not stand above it"),
        ("graph", "from shiq_lab.graph import blocks", "graph imports graph, which does not stand above it"),
        ("mdp", "from . import errors", f"mdp imports a relative import, which stands in no room: {ADD}"),
        ("attic", "", f"attic stands in no room: {ADD}"),
    ],
)
def test_a_planted_import_is_caught(module: str, source: str, complaint: str) -> None:
    assert upward(module, source) == [complaint]


# ------------------------------------------------------------------------------------------------ the second road
def closure(module: str) -> set[str]:
    """Everything a module imports, directly or through what it imports."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        for target in imports(SOURCES[todo.pop()]):
            if target not in seen:
                seen.add(target)
                todo += [target] if target in SOURCES else []
    return seen


def test_the_listing_never_sees_the_recursion() -> None:
    """enumeration.py is the second road: neither it nor anything under it imports bellman.py."""
    assert "mdp" in closure("enumeration"), "the closure is empty, so nothing was checked"
    assert "bellman" in closure("population"), "the closure does not follow imports"
    assert "bellman" not in closure("enumeration")


# --------------------------------------------------------------------------------------------------- side effects
SEEDED = {"default_rng", "Generator", "SeedSequence", "PCG64"}
OPENING = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "savez", "savez_compressed", "tofile", "fromfile"}
MAY_OPEN = {("mdp", "save"), ("mdp", "load")}


def dotted(node: ast.AST) -> str:
    """np.random.rand as "np.random.rand"; anything that is no chain of names is ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def effects(module: str, source: str) -> list[str]:
    """What a pure room must not do: print, open files, use global random numbers, pick a device."""
    tree = ast.parse(source)
    inside = {
        child: function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for child in ast.walk(function)
    }
    out = []
    for node in ast.walk(tree):
        name = dotted(node)
        if isinstance(node, ast.Call):
            called = dotted(node.func).split(".")[-1]
            if dotted(node.func) in ("print", "sys.stdout.write", "sys.stderr.write"):
                out.append(f"{module}:{node.lineno} prints")
            in_memory = dotted(node.func).startswith("np.savez") and dotted(node.args[0]) == "buffer"
            if called in OPENING and (module, inside.get(node)) not in MAY_OPEN and not in_memory:
                out.append(f"{module}:{node.lineno} opens a file with {called}")
        if name.startswith(("np.random.", "numpy.random.")) and name.split(".")[2] not in SEEDED:
            out.append(f"{module}:{node.lineno} uses global random state, {name}")
        if name in ("torch.manual_seed", "torch.seed", "torch.set_default_device", "torch.set_default_dtype"):
            out.append(f"{module}:{node.lineno} sets global state, {name}")
        if name in ("torch.rand", "torch.randn", "torch.randint", "torch.randperm", "torch.multinomial", "torch.bernoulli"):
            out.append(f"{module}:{node.lineno} draws from torch's global random state, {name}")
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            if "random" in modules:
                out.append(f"{module}:{node.lineno} imports the random module")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(":")[0] in ("cuda", "mps"):
            out.append(f"{module}:{node.lineno} picks the device {node.value!r}")
        if isinstance(node, ast.Attribute) and node.attr == "cuda":
            out.append(f"{module}:{node.lineno} picks the device cuda")
    return out


@pytest.mark.parametrize("module", [name for name in SOURCES if room(name) in PURE])
def test_pure_rooms_have_no_side_effects(module: str) -> None:
    assert not effects(module, SOURCES[module])


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("print(1)", "mdp:1 prints"),
        ("import sys\nsys.stdout.write('x')", "mdp:2 prints"),
        ("def f(p):\n    open(p)", "mdp:2 opens a file with open"),
        ("def f(p):\n    return p.read_text()", "mdp:2 opens a file with read_text"),
        ("np.savez('x.npz', a=1)", "mdp:1 opens a file with savez"),
        ("x = np.random.rand(3)", "mdp:1 uses global random state, np.random.rand"),
        ("np.random.seed(0)", "mdp:1 uses global random state, np.random.seed"),
        ("torch.manual_seed(0)", "mdp:1 sets global state, torch.manual_seed"),
        ("x = torch.randn(3)", "mdp:1 draws from torch's global random state, torch.randn"),
        ("import random", "mdp:1 imports the random module"),
        ("from random import choice", "mdp:1 imports the random module"),
        ("x.to('cuda:0')", "mdp:1 picks the device 'cuda:0'"),
        ("x.cuda()", "mdp:1 picks the device cuda"),
        ("torch.set_default_device('cpu')", "mdp:1 sets global state, torch.set_default_device"),
    ],
)
def test_a_planted_side_effect_is_caught(source: str, complaint: str) -> None:
    assert effects("mdp", source) == [complaint]


def test_saving_and_loading_are_the_only_exception() -> None:
    """The same call is a violation in another function of mdp.py, and in a function `save` of another file."""
    source = "def save(path):\n    path.write_bytes(b'')"
    assert effects("mdp", source) == []
    assert effects("graph", source) == ["graph:2 opens a file with write_bytes"]
    assert effects("mdp", source.replace("save", "dump")) == ["mdp:2 opens a file with write_bytes"]
