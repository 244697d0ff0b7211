"""The error that means "the user can fix this"."""


class AnalysisError(Exception):
    """A mistake in a table or in an option; the message says what, where and what to do about it."""

    exit_code = 2


class UndefinedError(AnalysisError, AttributeError):
    """A property that a result does not have, such as the likelihood of a fit that has none: `hasattr` is false."""
