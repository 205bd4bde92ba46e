"""TokenMDP: a finite automaton over tokens, each state owned by the policy or by the environment.

Prompts, turns and tool replies are environment states; everything else the policy says. The arrays are the whole truth:
solving, listing, sampling, playing and training read these and nothing else.
"""

import difflib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from shiq_lab.errors import at_least, bad, is_whole
from shiq_lab.graph import PIECE, Bools, Floats, Ints, reachable_from, reaches, row_max, row_sum

# float64 log-softmax over V tokens sums to 1 within V * eps: 1.1e-11 at V = 49,152; anything beyond 1e-9 was never normalised.
PROBABILITY_TOLERANCE = 1e-9
MAX_ENTRIES = 500_000_000  # of a table with a layer for each token spent: 4 GB in float64
FORMAT = "shiq_lab.TokenMDP/1"


@dataclass(frozen=True, eq=False, repr=False)
class TokenMDP:
    """A token MDP as arrays; next_state, reward and ref_logits are [S, V].

    next_state  int      successor, -1 = the episode ends
    reward      float    of a policy token (0 in environment states)
    ref_logits  float    policy states: reference logits, -inf = forbidden; environment states: log-probabilities
    is_policy   bool[S]  default: all True
    start       int      the root; random prompts are environment states under it
    horizon     int      the episode terminates after so many policy tokens; None = never
    tokens      V strings to show; name: what messages call it

    Where a token is forbidden or has probability 0, next_state and reward are ignored: they are no edges. Raises
    ValueError, naming the argument and the place, for anything that is not such an automaton.
    """

    next_state: Ints
    reward: Floats
    ref_logits: Floats
    is_policy: Bools = None  # type: ignore[assignment]  # None only on the way in
    start: int = 0
    horizon: int | None = None
    tokens: tuple[str, ...] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        next_state = _integers("next_state", self.next_state)
        if next_state.ndim != 2 or 0 in next_state.shape:
            raise bad("next_state", "an array [S, V] with S >= 1 and V >= 1", f"shape {next_state.shape}")
        S, V = next_state.shape
        reward = real_array("reward", self.reward, (S, V))
        ref_logits = real_array("ref_logits", self.ref_logits, (S, V))  # a copy of its own
        is_policy = _mask("is_policy", np.ones(S, bool) if self.is_policy is None else self.is_policy, S)
        _check_logits(ref_logits, is_policy)
        spoken = ref_logits[~is_policy]
        ref_logits[~is_policy] = np.where(spoken < -700, -np.inf, spoken)  # exp underflows: a reply of probability 0
        allowed = ref_logits > -np.inf
        if not allowed.all():  # what is no edge may hold anything
            next_state[~allowed], reward[~allowed] = -1, 0.0
        _check_edges(next_state, reward, is_policy)
        start = _index("start", self.start, S)
        if self.horizon is not None and (not is_whole(self.horizon) or self.horizon < 1):
            raise bad("horizon", "a whole number of policy tokens >= 1, or None", repr(self.horizon))
        if not isinstance(self.name, str):
            raise bad("name", "a string", repr(self.name))
        fields = {
            "next_state": _frozen(next_state),
            "reward": _frozen(reward),
            "ref_logits": _frozen(ref_logits),
            "is_policy": _frozen(is_policy),
            "start": start,
            "horizon": None if self.horizon is None else int(self.horizon),
            "tokens": _token_names(self.tokens, V),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen for everybody else
        self._check_environment_loops()

    # ------------------------------------------------------------------------------------------------- views
    def __repr__(self) -> str:
        limit = "" if self.horizon is None else f", horizon {self.horizon}"
        owners = f"{int(self.is_policy.sum())} of the policy"
        return f"<TokenMDP {self.name!r}: {self.n_states} states, {owners}, {self.n_tokens} tokens{limit}>"

    @property
    def n_states(self) -> int:
        """S, environment states included."""
        return int(self.next_state.shape[0])

    @property
    def n_tokens(self) -> int:
        """V, the size of the vocabulary."""
        return int(self.next_state.shape[1])

    @cached_property
    def allowed(self) -> Bools:
        """bool[S, V]: the edges (a policy token that is not forbidden, a reply of probability > 0)."""
        return _frozen(self.ref_logits > -np.inf)

    @cached_property
    def ref_logsumexp(self) -> Floats:
        """float[S]: ln sum_a exp ref_logits(s, a), the level of the reference logits."""
        level, size = np.empty(self.n_states), max(1, PIECE // self.n_tokens)
        for i in range(0, self.n_states, size):
            rows = self.ref_logits[i : i + size]
            top = row_max(rows)
            level[i : i + size] = np.log(row_sum(np.exp(rows - top[:, None]))) + top
        return _frozen(level)

    @cached_property
    def ref_log_policy(self) -> Floats:
        """float[S, V]: ln pi_ref in policy states, the environment's own log-probabilities elsewhere."""
        return _frozen(self.ref_logits - np.where(self.is_policy, self.ref_logsumexp, 0.0)[:, None])

    @cached_property
    def reachable(self) -> Bools:
        """bool[S]: states that some string of allowed tokens leads to from the start (a horizon is not looked at)."""
        return _frozen(reachable_from(self.start, self.next_state, self.allowed))

    @cached_property
    def deterministic(self) -> bool:
        """True where no environment state draws a random token after the first action; random prompts do no harm."""
        acted = self.reachable & self.is_policy
        after = np.unique(self.next_state[acted])
        seen = np.zeros(self.n_states, dtype=bool)
        for state in after[after >= 0]:  # each search stops at what an earlier one saw
            if not seen[state]:
                seen |= reachable_from(int(state), self.next_state, self.allowed & ~seen[:, None])
        return not (seen & ~self.is_policy & (self.allowed.sum(1) > 1)).any()

    def token(self, token: int | str) -> int:
        """The id of a token given by id or by its string."""
        if isinstance(token, str):
            if self.tokens is None:
                raise bad("token", f"an id from 0 to {self.n_tokens - 1}, as this automaton names no tokens", repr(token))
            ids = [i for i, name in enumerate(self.tokens) if name == token]
            if len(ids) != 1:  # real tokenizers show several ids by one string
                near = difflib.get_close_matches(token, self.tokens, n=1)
                hint = f"Did you mean {near[0]!r}?" if near and not ids else "Give its id."
                raise bad(
                    "token",
                    f"a string that shows one of the {self.n_tokens} tokens",
                    f"{token!r}, which shows {len(ids)}",
                    hint,
                )
            return ids[0]
        return _index("token", token, self.n_tokens)

    def show(self, token: int) -> str:
        """The token's string, or its number where the automaton names none."""
        token = _index("token", token, self.n_tokens)
        return self.tokens[token] if self.tokens else str(token)

    def place(self, state: int, token: int | None = None) -> str:
        """'state 3, token 5 ("b")': how messages point at an entry."""
        if token is None:
            return f"state {state}"
        return f"state {state}, token {token}" + (f" ({self.tokens[token]!r})" if self.tokens else "")

    # -------------------------------------------------------------------------------------------- new from old
    def with_prompt(self, token: int | str) -> "TokenMDP":
        """The same automaton under a new environment root that always says `token` (a beginning of sequence).

        Batches, causal language models and gymnasium need one: nothing scores a row's first token. Values do not change.
        """
        chosen, S, V = self.token(token), self.n_states, self.n_tokens
        root = np.full((1, V), -np.inf)
        root[0, chosen] = 0.0
        return replace(
            self,
            next_state=np.concatenate([self.next_state, np.full((1, V), self.start)]),
            reward=np.concatenate([self.reward, np.zeros((1, V))]),
            ref_logits=np.concatenate([self.ref_logits, root]),
            is_policy=np.append(self.is_policy, False),
            start=S,
        )

    def unroll(self, horizon: int | None = None) -> "TokenMDP":
        """The automaton without a horizon whose state t * S + s is "in s after t policy tokens"; t < horizon.

        A policy token leads one layer down, an environment token stays in its layer. The optimal logits of an automaton
        with loops and a horizon depend on t: a table that is to hold them needs this form.
        """
        steps = self.horizon if horizon is None else horizon
        if steps is None:
            raise bad("horizon", "a whole number >= 1, as the automaton has none of its own", "None", "Say unroll(horizon=8).")
        steps = at_least("horizon", steps, 1)
        if self.horizon is not None and steps > self.horizon:
            raise bad("horizon", f"at most the automaton's own {self.horizon}", repr(steps))
        self.check_layers(int(steps))
        S = self.n_states
        layer = np.arange(steps)[:, None, None]
        follow = np.where(self.is_policy[:, None], layer + 1, layer) * S + self.next_state  # (T, S, V)
        follow = np.where((self.next_state < 0) | (follow >= steps * S), -1, follow)
        tile = lambda x: np.concatenate([x] * steps)  # noqa: E731
        return replace(
            self,
            next_state=follow.reshape(steps * S, -1),
            reward=tile(self.reward),
            ref_logits=tile(self.ref_logits),
            is_policy=tile(self.is_policy),
            horizon=None,
        )

    def check_layers(self, steps: int) -> None:
        """A ValueError where a table [T, S, V] of so many layers would not fit into memory."""
        entries = steps * self.next_state.size
        if entries > MAX_ENTRIES:
            raise bad("horizon", f"at most {MAX_ENTRIES} entries in a table [T, S, V]", f"{entries}", "Take a shorter horizon.")

    # ------------------------------------------------------------------------------------------------ on disk
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz without pickle; the file appears whole or not at all."""
        path = Path(path)
        meta = {
            "format": FORMAT,
            "start": self.start,
            "horizon": self.horizon,
            "tokens": self.tokens,
            "name": self.name,
        }
        buffer = io.BytesIO()
        arrays = {key: getattr(self, key) for key in ("next_state", "reward", "ref_logits", "is_policy")}
        np.savez_compressed(buffer, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8), **arrays)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # its own, should two processes save at once
        try:
            partial.write_bytes(buffer.getvalue())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TokenMDP":
        """Read what `save` wrote. Raises ValueError for a damaged or foreign file, OSError for one that cannot be opened."""
        data = Path(path).read_bytes()
        try:
            return cls(**_fields(data))
        except Exception as error:  # zip, zlib, json and numpy each have their own for a damaged file; none runs code in it
            raise bad("path", "a file written by TokenMDP.save", f"the damaged or foreign {str(path)!r} ({error})") from error

    def _check_environment_loops(self) -> None:
        """A loop of environment states alone is never discounted and no horizon ends it: some way out must exist."""
        environment = ~self.is_policy
        if not environment.any():
            return
        out = np.append(self.is_policy, True)[self.next_state] & self.allowed
        stuck = environment & ~reaches(self.next_state, self.allowed & environment[:, None], environment & out.any(1))
        if stuck.any():
            raise bad(
                "next_state",
                "every loop of environment states to be left with probability 1",
                f"environment state {int(np.argmax(stuck))}, from which neither the policy nor the end can be reached",
            )


def _fields(data: bytes) -> dict[str, Any]:
    """The arguments of TokenMDP out of a saved file's bytes; any exception where these are something else."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise ValueError("no complete zip archive")
    arrays = ("next_state", "reward", "ref_logits", "is_policy")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        missing = [key for key in ("meta", *arrays) if key not in file]
        if missing:
            raise ValueError(f"it holds no {missing[0]!r}")
        meta = json.loads(bytes(file["meta"]))
        if not isinstance(meta, dict) or meta.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        return {key: file[key] for key in arrays} | meta


def _index(name: str, value: object, size: int) -> int:
    if not is_whole(value) or not 0 <= value < size:  # type: ignore[operator]
        raise bad(name, f"a whole number from 0 to {size - 1}", repr(value))
    return int(value)  # type: ignore[call-overload]


def _frozen(array: Any) -> Any:
    array = np.ascontiguousarray(array)
    array.setflags(write=False)
    return array


def _array(name: str, value: ArrayLike) -> Any:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise bad(name, "a rectangular array", "a ragged one") from error
    except (TypeError, RuntimeError) as error:  # tensors with a gradient, or on another device
        received = f"a {type(value).__name__} that numpy cannot read"
        raise bad(name, "an array", received, "Take x.detach().cpu() of a tensor.") from error


def _integers(name: str, value: ArrayLike) -> Ints:
    array = _array(name, value)
    if array.dtype.kind not in "iu":
        raise bad(name, "integers", f"dtype {array.dtype}")
    if array.size and array.max() > np.iinfo(np.int64).max:
        raise bad(name, "integers that int64 can hold", str(array.max()))
    return array.astype(np.int64)


def real_array(name: str, value: ArrayLike, shape: tuple[int, ...] | None = None) -> Floats:
    """The value as a float64 array, of the shape of next_state where one is given; a ValueError says what else it is."""
    array = _array(name, value)
    if array.dtype.kind not in "iufb":
        raise bad(name, "real numbers", f"dtype {array.dtype}")
    if shape is not None and array.shape != shape:
        raise bad(name, f"shape {shape}, as next_state", f"shape {array.shape}")
    return array.astype(np.float64)


def check_mdp(mdp: object) -> None:
    """A ValueError for what is no TokenMDP, say an environment's name."""
    if not isinstance(mdp, TokenMDP):
        raise bad("mdp", "a TokenMDP", repr(mdp)[:80], "shiq_lab.make(name) builds one by name, TokenMDP.load(path) reads one.")


def _mask(name: str, value: ArrayLike, size: int) -> Bools:
    array = _array(name, value)
    if array.dtype != bool or array.shape != (size,):
        raise bad(name, f"booleans of shape ({size},)", f"dtype {array.dtype}, shape {array.shape}")
    return array.copy()


def _token_names(tokens: Sequence[str] | None, size: int) -> tuple[str, ...] | None:
    if tokens is None:
        return None
    if isinstance(tokens, (str, Mapping, Set)) or not isinstance(tokens, Iterable):
        raise bad("tokens", f"a sequence of {size} strings", repr(tokens)[:80])
    names = tuple(tokens)
    if not all(isinstance(name, str) for name in names):
        raise bad("tokens", f"a sequence of {size} strings", repr(names)[:80])
    if len(names) != size:
        raise bad("tokens", f"{size} strings, one a token", len(names))
    return names


def _first(mask: Bools) -> str:
    """Where the first true entry of a [S, V] mask sits."""
    state, token = np.unravel_index(int(np.argmax(mask)), mask.shape)
    return f"state {state}, token {token}"


def _check_logits(ref_logits: Floats, is_policy: Bools) -> None:
    strange = ~(ref_logits < np.inf)
    if strange.any():
        what = "NaN" if np.isnan(ref_logits[strange][0]) else "+inf"
        raise bad("ref_logits", "finite numbers, or -inf where a token is forbidden", f"{what} at {_first(strange)}")
    dead = row_max(ref_logits) == -np.inf
    if dead.any():
        owner = "policy" if is_policy[int(np.argmax(dead))] else "environment"
        raise bad("ref_logits", "at least one allowed token in every row", f"none in {owner} state {int(np.argmax(dead))}")
    total = np.exp(np.minimum(ref_logits[~is_policy], 700)).sum(1)
    wrong = np.abs(total - 1) > PROBABILITY_TOLERANCE
    if wrong.any():
        row = int(np.argmax(wrong))
        state = int(np.flatnonzero(~is_policy)[row])
        raise bad(
            "ref_logits",
            "log-probabilities that sum to 1 in every environment state",
            f"a sum of {total[row]:.12g} in state {state}",
            "Subtract the log-sum-exp of the row.",
        )


def _check_edges(next_state: Ints, reward: Floats, is_policy: Bools) -> None:
    """Of edges alone: whatever is none holds -1 and 0 already."""
    S = len(next_state)
    if next_state.min() < -1 or next_state.max() >= S:
        outside = (next_state < -1) | (next_state >= S)
        raise bad(
            "next_state", f"a state from 0 to {S - 1}, or -1 for the end", f"{next_state[outside][0]} at {_first(outside)}"
        )
    broken = ~np.isfinite(reward)
    if broken.any():
        value = reward[broken][0]
        raise bad("reward", "finite numbers", f"{value} at {_first(broken)}", "Forbid a token with ref_logits = -inf.")
    if reward[~is_policy].any():
        paid = (reward != 0) & ~is_policy[:, None]
        raise bad("reward", "0 in environment states", f"a reward at {_first(paid)}", "Pay it on the policy token before.")
