"""How messages of the library reach the console of our commands."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from aimscale.aim.errors import log_to_console


@pytest.fixture(autouse=True)
def restored() -> Any:
    logger = logging.getLogger("aimscale")
    before = logger.handlers, logger.level
    yield
    logger.handlers, logger.level = before


def test_messages_are_plain_lines_on_the_standard_error_once_however_often_it_is_called(capsys: Any) -> None:
    log_to_console()
    log_to_console()
    logging.getLogger("aimscale.harness.train.run").info("8 %s, 4 %%", "images")
    logging.getLogger("aimscale.harness").debug("nothing")
    logging.getLogger("elsewhere").info("nothing")
    assert capsys.readouterr() == ("", "8 images, 4 %\n")
