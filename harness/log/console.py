"""Messages of the library on the console of our commands and of the processes that they start."""

from __future__ import annotations

import logging


def log_to_console() -> None:
    """Print messages of the library's loggers, from INFO on, as plain lines on the standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("aimscale")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
