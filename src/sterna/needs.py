"""What training, charts and the demo need beyond the core: imported when it is used, with one clear error where it is missing, and kept quiet."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from sterna.errors import SternaError


class MissingDependency(SternaError, ImportError):
    """A package of an extra is not installed."""


def needed(name: str, install: str = "sterna[demo]") -> Any:
    """The module of that name, or an error that says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(f"{name.partition('.')[0]} is needed here and cannot be imported ({error}): pip install '{install}'") from error


def check_needs() -> None:
    """Raise for the first missing package of the demo before any work starts."""
    for name in ("transformers", "accelerate", "peft", "sklearn", "scipy", "pydantic", "yaml"):
        needed(name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence log lines, transformers' progress bars and the libraries' warnings inside, and put everything back after."""
    messages: ModuleType = needed("transformers.utils.logging")
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity(logging.CRITICAL)
    messages.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()
