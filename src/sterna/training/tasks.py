"""What a model can be trained and measured for."""

from __future__ import annotations

from typing import Literal

TaskName = Literal["classification", "regression", "causal-lm", "seq2seq"]
