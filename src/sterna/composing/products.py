"""LoRA's products of many experts weighed: one matrix product of all experts' factors a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sterna.composing.unions import Weights
from sterna.expert.changes import Product
from sterna.expert.expert import thin_matrices


class WeighProducts:
    """base + sum_i w_i B_i A_i of one tensor, in float32: the factors stand side by side, and each rank is scaled by its expert's weight.

    Products touch every entry, so the time is the tensor's, and the base is held whole. torch adds the ranks in an order of its own: a merged expert,
    whose order the format states, gives the same but for the last bits of float32.
    """

    def __init__(self, tensor: torch.Tensor, changes: Sequence[Product | None], weights: Weights) -> None:
        self._tensor = tensor
        self._weights = weights
        thin = [(number, *thin_matrices(change)) for number, change in enumerate(changes) if change is not None]
        device = tensor.device
        self._expert = np.concatenate([np.full(left.shape[1], number) for number, left, _ in thin])
        self._left = torch.from_numpy(np.concatenate([left for _, left, _ in thin], 1)).to(device, torch.float32)
        self._right = torch.from_numpy(np.concatenate([right for *_, right in thin])).to(device, torch.float32)
        self._saved = tensor.detach().clone()
        self.updates = int(self._left.count_nonzero() + self._right.count_nonzero())
        self.undo_bytes = self._left.nbytes + self._right.nbytes + self._saved.nbytes
        self.swallowed = 0

    def apply(self) -> None:
        scales = torch.from_numpy(self._weights[self._expert]).to(self._left.device, torch.float32)
        live = self._tensor.detach()
        flat = self._saved.reshape(self._left.shape[0], -1)
        if live.dtype == torch.float32 and live.is_contiguous():
            torch.addmm(flat, self._left * scales, self._right, out=live.view(flat.shape))
        else:
            live.copy_((flat.float() + (self._left * scales) @ self._right).reshape(live.shape))

    def revert(self) -> None:
        self._tensor.detach().copy_(self._saved)
