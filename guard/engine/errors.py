"""Errors that keep a guarded engine from starting."""


class GuardStartupError(RuntimeError):
    """The guard does not start: the message is one sentence that says what is wrong and what to do."""
