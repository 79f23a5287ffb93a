"""Errors that the user can fix, told apart from bugs."""


class InputError(Exception):
    """Bad input: a file, key or value that the user can fix.

    The message is one line that names the file or key and the fix. Commands print it without a
    traceback and exit with code 2.

    shared: every rank of the job has raised it, so that one may report it for all.
    """

    shared = False


class SampleError(Exception):
    """One sample cannot be read or decoded. The message is the reason, as the ledger records it."""


class Stopped(Exception):
    """A signal asked the run to stop, and its checkpoint is saved. Commands exit with code 3."""
