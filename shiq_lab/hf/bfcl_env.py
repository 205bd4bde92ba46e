"""BFCLEnv: the official multi-turn entries as a gymnasium environment, `gymnasium.make("shiq_lab.hf.bfcl_env:shiq/BFCL-v0")`.

An episode is one entry, an action is what the assistant writes.

Observation  the dialogue so far as text, a message after another, "role: content" (info["messages"] has them as messages, for
             a chat template); letters outside printable ASCII are written as escapes
Action       text: calls as parse_calls reads them, or `[]`. Text that it refuses counts as no calls, as the official harness
             counts it, and the refusal is the tool's reply; nothing of it is executed
Reward       at the end of a turn: 1 if the official checker calls the turns so far valid, else 0; else 0
terminated   the last turn is over
info         "entry" its id, "turn", "messages", "error" (why the last action was refused; "" otherwise)

A turn is over after `steps` actions, or earlier with an action without calls. The default is one: all calls of a turn at
once, as `dialogues` has them; the checker puts the steps of a turn together in any case. With more, the model sees the
replies before it calls again (the official harness allows 20).
"""

import string
from collections.abc import Sequence
from typing import Any

import gymnasium
from gymnasium.spaces import Text

from shiq_lab.errors import at_least, bad, is_whole
from shiq_lab.hf.bfcl import REPLY_CHARACTERS, Entry, entries, execute, score, shown_replies
from shiq_lab.hf.bfcl_calls import MAX_CALLS, MAX_CHARACTERS, Call

ID = "shiq/BFCL-v0"
LETTERS = frozenset(string.printable)
ESCAPED = 10  # letters at most that one letter is written as, \U0001f600
REFUSAL = 1000  # letters of an error text that are shown


class BFCLEnv(gymnasium.Env[str, str]):
    """One entry an episode (see the file's head). found: the entries, default all of `base`; drawn by the seed of reset.

    reset(options={"entry": i}) plays the i-th one. reply_characters: each tool reply is cut to so many.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self, found: Sequence[Entry] | None = None, *, steps: int = 1, reply_characters: int = REPLY_CHARACTERS,
        render_mode: str | None = None,
    ) -> None:  # fmt: skip
        self.entries = entries() if found is None else list(found)
        if not self.entries:
            raise bad("found", "at least one entry", "none")
        self.steps, self.reply_characters = at_least("steps", steps, 1), at_least("reply_characters", reply_characters, 1)
        self.render_mode = render_mode
        told = max(len(entry.system()) + sum(map(len, entry.turns)) for entry in self.entries)
        turns = max(len(entry.turns) for entry in self.entries)
        step = MAX_CHARACTERS + MAX_CALLS * (self.reply_characters + 4) + REFUSAL
        longest = told + turns * (self.steps * step + 4096)  # 4096: role names, functions told late
        self.action_space = Text(MAX_CHARACTERS, min_length=0, charset=LETTERS)
        self.observation_space = Text(ESCAPED * longest, charset=LETTERS)
        self._over = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin an entry."""
        super().reset(seed=seed)
        chosen = (options or {}).get("entry", int(self.np_random.integers(len(self.entries))))
        if not is_whole(chosen) or not 0 <= chosen < len(self.entries):
            raise bad('options["entry"]', f"a number from 0 to {len(self.entries) - 1}", repr(chosen))
        self.entry = self.entries[chosen]
        self._calls: list[list[Call]] = [[]]
        self._steps, self._over, self._error = 0, False, ""
        self._messages = [{"role": "system", "content": self.entry.system()}, {"role": "user", "content": self.entry.user(0)}]
        return self._observation(), self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """What the assistant writes; the tool's replies and, where the turn is over, the reward and the next user message."""
        if self._over:
            raise bad("step", "an episode that goes on", "one that is over or was never begun", "Call reset first.")
        if not isinstance(action, str):
            raise bad("action", "text", type(action).__name__)
        calls = self._play(action)
        self._steps += 1
        reward = 0.0
        if not calls or self._steps == self.steps:
            reward = score(self.entry, self._calls)[-1]
            self._over = len(self._calls) == len(self.entry.turns)
            if not self._over:
                self._messages.append({"role": "user", "content": self.entry.user(len(self._calls))})
                self._calls.append([])
                self._steps = 0
        return self._observation(), reward, self._over, False, self._info()

    def _play(self, action: str) -> list[Call]:
        """Parse and execute; the assistant's and the tool's message."""
        self._messages.append({"role": "assistant", "content": action[:MAX_CHARACTERS]})
        calls: list[Call] = []
        try:
            calls, self._error = self.entry.parse(action), ""
        except ValueError as error:
            self._error = str(error)[:REFUSAL]
        self._calls[-1] += calls
        # From the beginning again: the back ends are deterministic, and nothing of them outlives a call.
        replies = execute(self.entry, self._calls)[-1][-len(calls) :] if calls else []
        if calls or self._error:
            shown = self._error or shown_replies(replies, self.reply_characters)
            self._messages.append({"role": "tool", "content": shown})
        return calls

    def render(self) -> str:
        """The dialogue so far."""
        return self._observation()

    def _observation(self) -> str:
        text = "\n".join(f"{message['role']}: {message['content']}" for message in self._messages)
        return "".join(c if c in LETTERS else c.encode("unicode_escape").decode("ascii") for c in text)

    def _info(self) -> dict[str, Any]:
        turn = len(self._calls) - 1
        return {"entry": self.entry.id, "turn": turn, "messages": [dict(m) for m in self._messages], "error": self._error}


if ID not in gymnasium.registry:
    gymnasium.register(ID, entry_point="shiq_lab.hf.bfcl_env:BFCLEnv")
