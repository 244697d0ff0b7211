"""The error that means "the user can fix this": one sentence, exit code 2, no traceback."""


class UserError(Exception):
    """A mistake in the input; the message says what, where and what to do about it.

    Every room that imports `aim` raises this class or a subclass; `sweeps.cli.main` prints the message and exits
    with `exit_code`.
    """

    exit_code = 2
