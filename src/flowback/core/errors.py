"""What is wrong with the input, said once: the one exception, and a way to silence those who would say it again."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A value from outside is not usable. The message is one sentence: which value, and what it must be.

    The command line prints it as a single line and exits with status 2; library users catch a `ValueError`.
    """


@contextmanager
def only_errors(logger: str) -> Iterator[None]:
    """Only errors from a library's logger: the one sentence that we raise says what its warnings would."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
