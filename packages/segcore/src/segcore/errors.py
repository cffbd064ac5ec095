"""Exceptions whose messages address users."""


class UserError(ValueError):
    """The user's input cannot be used. The message is one line that names the file, the value and the remedy.

    The command line prints it without a traceback and exits with status 1; from Python it is an ordinary ValueError.
    """

    agreed = False
    """Whether all processes know of the error, so that they can still save together."""


class UnreadError(UserError):
    """A file could not be read, by this version or at the moment; unlike a damaged one it may be intact."""


class UnnamedFileError(UserError):
    """What is stored needs a file of the user's, which is imported only where the user names it."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or a signal, whose number this holds, stops the run; raised where its state is consistent."""


class UsageError(UserError):
    """The command line cannot be parsed; it exits with status 2."""
