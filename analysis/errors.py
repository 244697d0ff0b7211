"""The error that means "the user can fix this": one sentence, exit code 2, no traceback."""


class AnalysisError(Exception):
    """A mistake in a table or in an option; the message says what, where and what to do about it.

    `analysis` stands alone, so it has its own class instead of `aim.errors.UserError`.
    """

    exit_code = 2
