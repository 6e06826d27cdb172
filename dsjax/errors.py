"""Errors that name what is wrong and what to do about it."""


class DsjaxError(Exception):
    """Base class of every error that dsjax raises about its input."""


class ConfigError(DsjaxError, ValueError):
    """A model configuration that is unknown, incomplete, or asks for mathematics that is not supported."""


class CheckpointError(DsjaxError, ValueError):
    """A checkpoint that is missing, truncated, or does not fit its configuration."""


class ParameterError(DsjaxError, ValueError):
    """A parameter tree whose structure, shapes or dtypes do not fit its configuration."""


class RequestError(DsjaxError, ValueError):
    """A generation request that can not be served as given."""


class EngineError(DsjaxError, RuntimeError):
    """An engine can not do what it is asked to, or a step of it failed."""


class QueueFullError(RequestError):
    """So many requests wait that the engine takes no more."""
