"""The exception for invalid user input."""

MAX_MESSAGE = 3000  # characters


class InputError(Exception):
    """Invalid user input.

    The message names the bad value, the accepted values, and how to fix it. The middle of a very long one is left out.
    """

    on_every_rank = False  # under torchrun: every rank raises it, so rank 0 alone prints it

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE // 2]} ... {text[-MAX_MESSAGE // 2 :]}"


def shown(value: object) -> str:
    """Return the first 80 characters of repr(value), or its type if it has none (a number of 5,000 digits has none)."""
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):
        return f"(of type {type(value).__name__}, too long to show)"
