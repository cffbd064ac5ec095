"""The one exception that is written for users."""


class UserError(ValueError):
    """Something the user gave cannot be used. The text is one line that names the file, the value and the remedy.

    The command line prints it without a traceback and ends with status 1; from Python it is an ordinary ValueError.
    """

    agreed = False
    """Whether all of several processes know of it, so that they can still save together."""


class Stopped(KeyboardInterrupt):
    """The run was told to stop, by Ctrl-C or a signal whose number this holds; raised where its state is whole."""


class UsageError(UserError):
    """Words of a command line that cannot be read; it ends with status 2."""
