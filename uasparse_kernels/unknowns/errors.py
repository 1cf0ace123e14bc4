"""The error that this package raises."""


class UnknownsError(ValueError):
    """Something the user can repair: what was expected, what came, what to do."""
