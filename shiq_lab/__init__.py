"""shiq_lab: token MDPs whose optimal Q-values are known exactly, and the losses that are checked against them."""

from importlib import import_module
from pathlib import Path as _Path
from typing import Any

__version__ = "0.1.0"

# The folder envs/ of the repository is installed as shiq_lab.envs; from an uninstalled clone it stands beside the package.
_root = _Path(__file__).resolve().parent.parent
if not (_Path(__file__).parent / "envs").exists() and (_root / "envs").is_dir():
    __path__.append(str(_root))

_HOME = {
    "TokenMDP": "mdp",
    "solve": "bellman",
    "Solution": "bellman",
    "evaluate": "bellman",
    "Evaluation": "bellman",
    "enumerate_trajectories": "enumeration",
    "sample": "sampling",
    "collect": "collect",
    "TokenBatch": "batch",
    "TokenStats": "stats",
    "shiq_loss": "losses.shiq",
    "TabularLM": "models.tabular",
    "make": "envs",
    "check_loss": "checks.loss",
    "check_component": "checks.components.suite",
    "check_trainer": "checks.trainer.suite",
    "check_rollout": "checks.rollout.suite",
    "check_distributed": "checks.distributed.suite",
    "component_signature": "checks.components.suite",
    "declare": "checks.traits",
    "from_logprobs": "checks.adapters",
    "from_response_logprobs": "checks.adapters",
    "from_stats": "checks.adapters",
    "parametrize_with_checks": "checks.pytest_plugin",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Import a public name from its room on first use (PEP 562), so that `import shiq_lab` stays light."""
    if name not in _HOME:
        raise AttributeError(f"module 'shiq_lab' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"shiq_lab.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


# gymnasium.make("shiq_lab:shiq/NAME-v0") imports this package and then looks the id up: so the ids are registered here.
from shiq_lab.gym import register_environments as _register  # noqa: E402

_register()
