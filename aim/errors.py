"""Words to the user: the error to mend (one sentence, exit code 2, no traceback), and messages on the console."""

import difflib
import importlib.util
import logging
from collections.abc import Collection

MAX_NAMED, MAX_KNOWN = 5, 16
"""Maximum number of names that a sentence lists, and of known names to choose from."""


class UserError(Exception):
    """A mistake in the input; the message says what, where and what to do about it.

    Every package that imports `aim` raises this class or a subclass; `sweeps.cli.main` prints the message and exits
    with `exit_code`.
    """

    exit_code = 2


def did_you_mean(name: str, names: Collection[str], otherwise: str) -> str:
    """Suggest the known name nearest to a mistyped one; without a near one, list some after `otherwise`."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"{otherwise} {some(list(dict.fromkeys(names)), MAX_KNOWN)}"


def some(names: Collection[object], most: int = MAX_NAMED) -> str:
    """List at most so many of the names, and say how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(map(str, list(names)[:most]))}{more}"


def printable(text: str) -> str:
    """Escape what a terminal would obey, such as escape sequences, in text from elsewhere."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def check_training_installed(what: str) -> None:
    """Check that torch is installed; analysis alone needs none.

    Args:
        what: who needs it, the subject of the sentence.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{what} needs torch, which is not installed; pip install 'aimscale[train]'")


def log_to_console() -> None:
    """Print messages of the library's loggers, from INFO on, as plain lines on the standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("aimscale")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
