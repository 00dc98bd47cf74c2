"""Sterna: experts, small files of what fine-tuning taught a model.

expert = sterna.compress(base, tuned)          # a tuned model becomes a small file
expert.save("legal.safetensors")
with sterna.attached(model, sterna.load("legal.safetensors")):
    ...                                        # the live model is the tuned one, and the base again after, to the bit
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_WHERE = {
    "Bitmasks": "sterna.bitmasks",
    "Expert": "sterna.expert.expert",
    "Fingerprint": "sterna.fingerprint",
    "HiWi": "sterna.tuning.hiwi",
    "PaFi": "sterna.tuning.pafi",
    "Patch": "sterna.live.patch",
    "SternaError": "sterna.errors",
    "Trainer": "sterna.tuning.trainer",
    "Tuning": "sterna.tuning.tuning",
    "apply": "sterna.applying",
    "attach": "sterna.live.patch",
    "attached": "sterna.live.patch",
    "attached_to": "sterna.live.patch",
    "compose": "sterna.composing.compose",
    "compress": "sterna.compression",
    "evaluate": "sterna.scoring.evaluate",
    "inspect": "sterna.summary",
    "load": "sterna.expert.file",
    "merge": "sterna.merging.merge",
    "recode": "sterna.recoding",
    "search": "sterna.searching.search",
    "similarity": "sterna.similarities",
    "tune": "sterna.tuning.tuning",
    "verify": "sterna.verification",
    "with_head": "sterna.expert.heads",
}

if TYPE_CHECKING:
    from sterna.applying import apply as apply
    from sterna.bitmasks import Bitmasks as Bitmasks
    from sterna.composing.compose import compose as compose
    from sterna.compression import compress as compress
    from sterna.errors import SternaError as SternaError
    from sterna.expert.expert import Expert as Expert
    from sterna.expert.file import load as load
    from sterna.expert.heads import with_head as with_head
    from sterna.fingerprint import Fingerprint as Fingerprint
    from sterna.live.patch import Patch as Patch
    from sterna.live.patch import attach as attach
    from sterna.live.patch import attached as attached
    from sterna.live.patch import attached_to as attached_to
    from sterna.merging.merge import merge as merge
    from sterna.recoding import recode as recode
    from sterna.scoring.evaluate import evaluate as evaluate
    from sterna.searching.search import search as search
    from sterna.similarities import similarity as similarity
    from sterna.summary import inspect as inspect
    from sterna.tuning.hiwi import HiWi as HiWi
    from sterna.tuning.pafi import PaFi as PaFi
    from sterna.tuning.trainer import Trainer as Trainer
    from sterna.tuning.tuning import Tuning as Tuning
    from sterna.tuning.tuning import tune as tune
    from sterna.verification import verify as verify

__all__ = ["Bitmasks", "Expert", "Fingerprint", "HiWi", "PaFi", "Patch", "SternaError", "Trainer", "Tuning", "__version__"]
__all__ += ["apply", "attach", "attached", "attached_to", "compose", "compress", "evaluate", "inspect", "load"]
__all__ += ["merge", "recode", "search", "similarity", "tune", "verify", "with_head"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import sterna` and `sterna --help` stay quick."""
    if name not in _WHERE:
        raise AttributeError(f"module 'sterna' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
