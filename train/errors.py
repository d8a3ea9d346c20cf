"""Errors that reach the user as one line, with the exit code that goes with them."""


class UserError(Exception):
    """Something the user can put right; `nha` prints the message as one line and exits.

    Attributes:
        exit_code: what the process returns to the shell.
    """

    exit_code = 1


class ConfigError(UserError):
    """A configuration, corpus or run folder that cannot be used as it is."""

    exit_code = 2


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or is damaged."""


class DataError(UserError):
    """A file of a corpus that is missing or damaged."""


class TrainingError(UserError):
    """Training cannot go on, e.g. because the loss stays non-finite."""
