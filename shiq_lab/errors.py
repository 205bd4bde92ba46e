"""One form for every complaint: the argument, what was expected, what came, and the remedy."""


def bad(argument: str, expected: str, received: object, remedy: str = "") -> ValueError:
    """Return (not raise) the ValueError that says all four; `raise bad(...)` keeps the traceback at the caller."""
    return ValueError(f"{argument}: expected {expected}, got {received}." + (f" {remedy}" if remedy else ""))
