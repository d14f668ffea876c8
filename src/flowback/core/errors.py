"""What is wrong with the input, said once: the one exception, its text, a way to silence those who would say it again."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")  # terminals obey them


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


def plain(text: str) -> str:
    r"""Text with its control characters as escapes: names out of foreign files would drive the terminal.

    >>> plain("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)
