"""Errors that a user can fix: each message says in one line what is wrong, where, and how to fix it."""


class InputError(Exception):
    """Bad input or set-up; the command line prints only the message and exits with status 2."""


class StorageError(InputError):
    """Storage refused a request: credentials, permissions, or a missing bucket."""


class OutageError(StorageError):
    """Storage is unreachable or throttles requests; passes by itself, and is no shard's fault."""


class ShardError(Exception):
    """A shard that could not be finished; the run continues without it and exits with status 4."""


class DamagedError(InputError):
    """A stored object is not what was written: truncated, changed, or from somewhere else."""
