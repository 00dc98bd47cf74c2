"""Run by mergekit's own Python: merges the arrays of a folder by mergekit's methods, over a base of zeros. See dense_merging.with_mergekit."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorGroup

folder = Path(sys.argv[1])
told = json.loads((folder / "told.json").read_text())
vectors, masks = (np.load(folder / f"{what}.npz") for what in ("vectors", "masks"))
merged = {}
for place, ((kind, parameters), name) in enumerate((ask, name) for ask in told["asked"] for name in told["names"]):
    tensors = [torch.from_numpy(vectors[f"{number}|{name}"]) for number in range(told["parents"])]
    drawn = iter([torch.from_numpy(masks[f"{number}|{name}"]) for number in range(told["parents"])])
    torch.bernoulli = lambda like, drawn=drawn: next(drawn).to(like.dtype)
    over_base = kind != "linear"
    group = TensorGroup.from_tensors([torch.zeros_like(tensors[0]), *tensors] if over_base else tensors, base_index=0 if over_base else None)
    weights = {} if kind == "model_stock" else {"weight": told["weights"]}
    merged[f"{place // len(told['names'])}|{name}"] = registry.get(kind)([group], parameters=weights | parameters)[0].numpy()
np.savez(folder / "merged.npz", **merged)
