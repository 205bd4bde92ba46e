"""What is installed: the wheel holds the package and nothing else, and works wherever it is imported from.

The folder envs/ stands at the top of the tree and is installed as shiq_lab.envs, so pyproject.toml lists the packages by
hand; the first tests hold that list against the tree, the others build and use the real files.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# What a distribution is made from; the rest of the tree (environments, caches, builds) must not be copied into a test.
PARTS = ("shiq_lab", "envs", "pyproject.toml", "README.md", "LICENSE")
NOT_SOURCES = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")


def copy_of_the_tree(folder: Path) -> Path:
    """The sources alone; README.md is made up where the tree has none yet, since pyproject.toml names it."""
    tree = folder / "tree"
    tree.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tree / part, ignore=NOT_SOURCES)
        elif source.exists():
            shutil.copy(source, tree / part)
        elif part == "README.md":
            (tree / part).write_text("# shiq_lab\n", encoding="utf-8")
    return tree


def installed_names() -> set[str]:
    """Where every source file of the tree belongs in an installation."""
    names = {"shiq_lab/py.typed"}
    for path in (ROOT / "shiq_lab").rglob("*.py"):
        names.add(path.relative_to(ROOT).as_posix())
    for path in (ROOT / "envs").rglob("*.py"):
        names.add(f"shiq_lab/{path.relative_to(ROOT).as_posix()}")
    return names


def python(code: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds shiq_lab in `path` alone: -P keeps the working folder out of the way.

    An editable installation is found by a finder of its own or by a .pth file; both come after PYTHONPATH.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, "-P", "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def without_editable(code: str, path: Path) -> str:
    """The code, after whatever else could provide shiq_lab or envs is taken off: what is left is `path` and the libraries."""
    return (
        "import sys\n"
        f"sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', type(f).__module__)]\n"
        f"sys.path[:] = [p for p in sys.path if p == {str(path)!r} or 'editable' not in p and p != {str(ROOT)!r}]\n"
    ) + code


USE = """
import pathlib, shiq_lab, shiq_lab.envs
mdp = shiq_lab.make("Bandit")
assert shiq_lab.solve(mdp, beta=0.5).objective > 0
print(pathlib.Path(shiq_lab.__file__).parent.parent)
print(pathlib.Path(shiq_lab.envs.__file__).parent)
"""


# ---------------------------------------------------------------------------------------------------- the tree
def test_the_list_of_packages_is_the_tree() -> None:
    """A new subpackage that is not in pyproject.toml would be missing from the wheel, and only there."""
    where = PROJECT["tool"]["setuptools"]["package-dir"]
    tree = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "shiq_lab").rglob("__init__.py")}
    tree |= {f"shiq_lab.{'.'.join(p.parent.relative_to(ROOT).parts)}" for p in (ROOT / "envs").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == tree
    assert where == {"shiq_lab.envs": "envs"}
    assert not (ROOT / "shiq_lab" / "envs").exists()


def test_every_source_file_is_in_a_package() -> None:
    """A folder with .py files but no __init__.py is in no package, and so in no wheel."""
    packages = {name.replace(".", "/") for name in PROJECT["tool"]["setuptools"]["packages"]}
    assert {str(Path(name).parent) for name in installed_names()} == packages


def test_the_test_extra_can_build() -> None:
    """`python -m build --no-isolation` needs build and the build system's own requirement in the same environment."""
    extra = " ".join(PROJECT["project"]["optional-dependencies"]["test"])
    assert "build" in extra
    assert "setuptools" in extra


def test_an_uninstalled_clone_works(tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path)
    done = python(without_editable(USE, tree), tree, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tree), str(tree / "envs")]


def test_envs_is_no_package_of_its_own(tmp_path: Path) -> None:
    """From the clone's root `import envs` finds the folder, which says by what name it is to be imported."""
    tree = copy_of_the_tree(tmp_path)
    done = python("import envs", tree, tree)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "ImportError: this folder is the package shiq_lab.envs; import it by that name"
    )


# ------------------------------------------------------------------------------------------------------ builds
@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist), the wheel built from the sdist, as `python -m build` does."""
    folder = tmp_path_factory.mktemp("build")
    tree = copy_of_the_tree(folder)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_the_tree_and_nothing_else(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[0]) as file:
        names = set(file.namelist())
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - info == installed_names()
    assert not any(name.startswith("envs/") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in info)
    assert any(name.endswith("entry_points.txt") for name in info)


def test_the_sdist_can_be_built_from(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[1]) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    sources = {name.removeprefix("shiq_lab/") if name.startswith("shiq_lab/envs/") else name for name in installed_names()}
    assert sources <= names
    assert {"pyproject.toml", "LICENSE", "README.md"} <= names


def test_the_wheel_works_away_from_the_clone(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "target"
    with zipfile.ZipFile(distributions[0]) as file:
        file.extractall(target)
    done = python(without_editable(USE, target), target, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(target), str(target / "shiq_lab" / "envs")]
    done = python(without_editable("import envs", target), target, tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "ModuleNotFoundError: No module named 'envs'"


def test_the_wheel_wins_over_the_clone_it_is_run_from(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """In the clone's root, with the wheel first on the path, both the package and its environments are the wheel's."""
    target = tmp_path / "target"
    with zipfile.ZipFile(distributions[0]) as file:
        file.extractall(target)
    done = python(without_editable(USE, target), target, copy_of_the_tree(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(target), str(target / "shiq_lab" / "envs")]
