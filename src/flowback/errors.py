"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class InputError(ValueError):
    """A value from outside is not usable. The message is one sentence: which value, and what is allowed.

    The command line prints it as a single line and exits with status 2; library users catch a `ValueError`.
    """
