"""Errors that a user can fix, as opposed to bugs, and the stop on request."""


class InputError(Exception):
    """Bad input: a file, key or value that the user can fix.

    The message is one line that names the file or key and the fix. Commands print it without a
    traceback and exit with code 2.

    Args:
        shared: every rank of the job raises this error, so only rank 0 needs to report it.
    """

    def __init__(self, message: str, shared: bool = False):
        super().__init__(message)
        self.shared = shared


class SampleError(Exception):
    """One sample cannot be read or decoded. The message is the reason, as the ledger records it."""


class Stopped(Exception):
    """A signal asked the run to stop, and its checkpoint is saved. Commands exit with code 3."""

    shared = True  # every rank stops after the same step
