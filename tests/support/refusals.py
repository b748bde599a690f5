"""Work that refuses some of what it is given, and what a shard then says."""

import torch


def stages(tables):
    """Return the samples that failed, each with the stage."""
    return {(row["sample_id"], row["stage"]) for row in tables["errors"].to_pylist()}


class Refusing:
    """Stands before a function and raises when `when` says so of its arguments."""

    def __init__(self, function, when, error):
        self.function, self.when, self.error, self.refusals = function, when, error, 0

    def __call__(self, *arguments, **named):
        if self.when(*arguments):
            self.refusals += 1
            raise self.error
        return self.function(*arguments, **named)


MEMORY = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")
