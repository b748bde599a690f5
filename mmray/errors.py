"""The errors that a user can fix: each says in one line what is wrong, where, and how to fix it."""


class InputError(Exception):
    """Bad input or set-up; the command line prints the message alone and ends with status 2."""


class StorageError(InputError):
    """Storage refused: credentials, permission, a bucket that is not there."""


class OutageError(StorageError):
    """Storage can't be reached or asks for patience; it passes by itself, and is no shard's fault."""


class ShardError(Exception):
    """A shard that could not be finished; the run goes on without it and ends with status 4."""


class DamagedError(InputError):
    """Something stored is not what was written: cut, changed, or taken from somewhere else."""
