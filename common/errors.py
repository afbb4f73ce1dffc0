"""The exception for invalid user input."""


class InputError(Exception):
    """Invalid user input.

    The message names the bad value, the accepted values, and how to fix it.
    """
