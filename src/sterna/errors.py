"""Every error that Sterna raises on purpose: one root, and the builtin that fits beside it."""

from __future__ import annotations


class SternaError(Exception):
    """Root of all errors of Sterna. The message says what was wrong, the value, what was expected and what to do."""


class InvalidArgument(SternaError, ValueError):
    """An argument out of range, or arguments that contradict each other."""


class InvalidFile(SternaError, ValueError):
    """A file that is not a whole, well-formed expert, checkpoint or adapter."""


class Unsupported(SternaError, NotImplementedError):
    """Something real that Sterna does not carry; named by its field or tensor."""


class PairingError(SternaError, ValueError):
    """A base and a tuned model that do not belong together."""


class WrongBase(SternaError, ValueError):
    """The expert was made for another base than the one at hand."""


class WrongModel(SternaError, TypeError):
    """The live model's class or its tensors cannot take the expert."""


class AlreadyAttached(SternaError, RuntimeError):
    """A second expert on a model that already carries one."""


class AlreadyTuned(SternaError, RuntimeError):
    """A model that is being tuned is to be tuned, or to carry an expert."""


class TuningError(SternaError, RuntimeError):
    """A tuning used after it ended, or one that has learned nothing."""


class PatchError(SternaError, RuntimeError):
    """A patch used after it was detached, or whose weights were changed by others."""


class NotFound(SternaError, FileNotFoundError):
    """A path or hub id that leads to no model, file or adapter."""


class CannotWrite(SternaError, OSError):
    """The result could not be written; nothing half-written is left."""
