"""The exception for invalid user input."""


class InputError(Exception):
    """Invalid user input. The message names the bad value, what is accepted, and how to fix it."""
