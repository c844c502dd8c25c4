"""The one exception for what a user can mend."""


class UserError(Exception):
    """A user's mistake in one sentence: what was given, what is wrong, what to do. `main` prints it and exits 2."""
