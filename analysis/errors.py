"""The error that means "the user can fix this"."""


class AnalysisError(Exception):
    """A mistake in a table or in an option; the message says what, where and what to do about it."""

    exit_code = 2
