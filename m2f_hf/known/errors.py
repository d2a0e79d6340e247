"""How errors are reported in one line."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not blank, or the error's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
