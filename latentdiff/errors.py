"""The one exception for a user's mistake: its message is one clear line."""


class UserError(ValueError):
    """What was asked cannot be done; the message says what was wrong and what to do.

    The command line prints it without a traceback and exits with status 2.
    """
