"""The one exception that is the user's to mend."""


class InputError(Exception):
    """Something the user gave cannot be used. The message names it, what is accepted, and what mends it."""
