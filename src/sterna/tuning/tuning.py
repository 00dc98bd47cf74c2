"""`tune`: a live model of which only what a method chooses is trained, and the tuning that holds it until it becomes an expert."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from sterna.compression import base_fingerprint
from sterna.errors import AlreadyAttached, InvalidArgument, InvalidFile, TuningError, Unsupported, WrongBase
from sterna.expert.changes import MaskRule
from sterna.expert.expert import Expert
from sterna.fingerprint import Fingerprint, require_base, tensor_digest
from sterna.live.patch import attached_to
from sterna.live.weights import Slot, live_weights, refuse_tuned
from sterna.precision import HeadPrecision
from sterna.sources.checkpoint import Checkpoint, Source, open_checkpoint
from sterna.sources.names import some
from sterna.sources.pairing import Pairing, pair
from sterna.sources.stored import unwrap
from sterna.tuning.hiwi import HiWi
from sterna.tuning.outcome import Values, expert_of
from sterna.tuning.pafi import PaFi
from sterna.tuning.parts import Adapter, Entries, Part, Whole, hangs_at
from sterna.writing import whole_file

Method = PaFi | HiWi

_CONTAINER = "sterna_tuning"
_tunings: weakref.WeakSet[Tuning] = weakref.WeakSet()


def tune(model: torch.nn.Module, method: Method, *, base: Source | None = None) -> Tuning:
    """Make a live model trainable in what `method` chooses, and in its task head; everything else is frozen, to the bit.

    Build the optimizer afterwards, over `tuning.parameters()` (or `model.parameters()`: no other requires a gradient). `base` is the checkpoint that
    the model was loaded from (a folder, hub id, ...): the expert then has its names and fingerprint, as those that `compress` makes from it;
    without it the model as it is now is the base.

    Raises InvalidArgument, Unsupported, WrongBase, AlreadyTuned or AlreadyAttached, with the model as it was.
    """
    if not isinstance(method, PaFi | HiWi):
        raise InvalidArgument(f"the method is {method!r}; expected sterna.PaFi(...) or sterna.HiWi(...)")
    root = unwrap(model)
    refuse_tuned(root)
    if attached_to(root) is not None:
        raise AlreadyAttached("the model carries an expert; detach it, or write it into the base by `sterna apply`, before tuning")
    if getattr(root, "is_quantized", False) or getattr(getattr(root, "config", None), "quantization_config", None):
        raise Unsupported("the base is quantized; tuning writes single weights: load it in float32, bfloat16 or float16")
    ground = Ground.of(root, base)
    return Tuning(root, method, ground)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """The model and its base brought together. `slots` are the ordinary tensors by base name, `heads` those trained in full, by their own."""

    base: Checkpoint
    live: Checkpoint
    pairing: Pairing
    fingerprint: Fingerprint
    slots: dict[str, Slot]
    heads: dict[str, Slot]
    buffers: dict[str, Slot]
    everywhere: tuple[Slot, ...]

    @classmethod
    def of(cls, root: torch.nn.Module, base: Source | None) -> Ground:
        live = open_checkpoint(root)
        opened = live if base is None else open_checkpoint(base)
        pairing = pair(opened, live)
        grown = [exact.name for exact in pairing.exact if exact.role in ("rows", "untied")]
        if grown:
            raise Unsupported(f"{some(grown)} gained rows or was untied; tune the model as its base is, or compress a full fine-tune")
        mark = base_fingerprint(opened)
        names = tuple(p.name for p in pairing.pairs)
        weights = live_weights(root, names, tuple(p.shape for p in pairing.pairs), {})
        if base is not None:
            digests = {name: (tensor_digest(slot.tensor), slot.tensor.dtype) for name, slot in weights.of_base.items()}
            try:
                require_base(mark, opened.label, digests, allow_narrower=False)
            except WrongBase as error:
                raise WrongBase(f"the model does not hold its base's values: {error}") from None
        heads = {exact.name: weights.all[exact.tuned] for exact in pairing.exact if exact.role == "head" and exact.tuned in weights.all}
        buffers = {name: slot for name, slot in weights.all.items() if not isinstance(slot.tensor, torch.nn.Parameter)}
        return cls(opened, live, pairing, mark, weights.of_base, heads, buffers, tuple(weights.all.values()))


class _Container(torch.nn.Module):
    """Where a tuned model keeps what is trained: seen by parameters() and by DistributedDataParallel, in no state dict."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *arguments: Any) -> None:
        pass


class Tuning:
    """A model that is being tuned. Made by `tune`; ended by `finish` or `discard`."""

    def __init__(self, root: torch.nn.Module, method: Method, ground: Ground) -> None:
        _refuse_frozen(root)
        self.method = method
        self.ground = ground
        self.rule: MaskRule | None = None
        self.parts: list[Part]
        self._root = root
        self._ended: str | None = None
        if isinstance(method, PaFi):
            self.rule = method.rule(ground.slots)
            _refuse_frozen_tensors(self.rule.names, ground.slots)
            self.parts = method.parts(ground.slots, ground.everywhere, ground.fingerprint.digest, self.rule)
        else:
            self.parts = method.parts(ground.slots, ground.everywhere, _width(root))
        self.heads = [
            Whole(name, hangs_at(slot.tensor, ground.everywhere), slot.tensor)
            for name, slot in ground.heads.items()
            if isinstance(slot.tensor, torch.nn.Parameter)
        ]
        self._buffers = {name: slot.tensor.detach().clone() for name, slot in ground.buffers.items()}
        self._required = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
        self._container = _Container()
        for part in self.parts:
            for role, parameter in part.parameters.items():
                self._container.register_parameter(f"{part.name.replace('.', '/')}/{role}", parameter)
        for parameter, _ in self._required:
            parameter.requires_grad_(False)
        for part in (*self.parts, *self.heads):
            part.install()
        root.add_module(_CONTAINER, self._container)
        _tunings.add(self)

    def __repr__(self) -> str:
        return f"<sterna.Tuning: {self.method}, {self.trained:,} trained values{f', {self._ended}' if self._ended else ''}>"

    @property
    def trained(self) -> int:
        """Numbers that the method trains, the head apart."""
        return sum(p.numel() for p in self._container.parameters()) + sum(p.parameter.numel() for p in self.parts if isinstance(p, Whole))

    @property
    def trained_head(self) -> int:
        """Numbers of the head, all trained."""
        return sum(head.parameter.numel() for head in self.heads)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """What an optimizer trains: the method's own vectors and matrices, then the head's tensors."""
        yield from self._container.named_parameters()
        for part in (*self.parts, *self.heads):
            if isinstance(part, Whole):
                yield part.name, part.parameter

    def parameters(self) -> list[torch.nn.Parameter]:
        """What an optimizer trains."""
        return [parameter for _, parameter in self.named_parameters()]

    def write(self) -> None:
        """Put the trained values into the model. Done after every step of a torch optimizer; call it after changing them in another way."""
        self._refuse_ended()
        with torch.no_grad():
            for part in self.parts:
                part.write()

    def unmoved(self) -> list[str]:
        """Names of the tensors that training has left as they were, to the bit: adapters that died, among others (see `HiWi`)."""
        self._refuse_ended()
        self.write()
        with torch.no_grad():
            return [part.name for part in self.parts if not part.moved()]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A checkpoint of the tuning: trained values, head and the buffers that changed; never the whole model."""
        self._refuse_ended()
        state = {name: parameter.detach().clone() for name, parameter in self.named_parameters()}
        return state | {f"buffer/{name}": tensor for name, tensor in self.changed_buffers().items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up a checkpoint again. Raises InvalidArgument, with nothing changed, where it is of another tuning."""
        self._refuse_ended()
        own = dict(self.named_parameters())
        buffers = {name.removeprefix("buffer/"): tensor for name, tensor in state.items() if name.startswith("buffer/")}
        given = {name: tensor for name, tensor in state.items() if not name.startswith("buffer/")}
        differing = sorted(set(own) ^ set(given) | set(buffers) - set(self._buffers))
        differing += [name for name in own if name in given and own[name].shape != given[name].shape]
        if differing:
            raise InvalidArgument(f"the checkpoint is of another tuning: {some(differing)} differ in name or shape")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(given[name])
            for name, tensor in buffers.items():
                self.ground.buffers[name].tensor.copy_(tensor)
        self.write()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint as a safetensors file, whole or not at all: `state_dict`, and how each layer takes its gradient."""
        from safetensors.torch import save

        with whole_file(path) as file:
            file.write(save({name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}, {"sampled": ",".join(self._sampled())}))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take up a checkpoint that `save` wrote, so that training goes on to the bit. Raises InvalidFile or InvalidArgument."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(Path(path), framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
                sampled = set(((file.metadata() or {}).get("sampled") or "").split(","))
        except (SafetensorError, OSError) as error:
            raise InvalidFile(f"{path} is no checkpoint of a tuning: {error}") from error
        self.load_state_dict(state)
        for part in self.parts:
            if isinstance(part, Entries):
                part.tap.sampled = part.name in sampled

    def _sampled(self) -> list[str]:
        return [part.name for part in self.parts if isinstance(part, Entries) and part.tap.sampled]

    def expert(
        self,
        *,
        values: Values = "exact",
        density: float | None = None,
        alpha: float | None = None,
        head: HeadPrecision = "exact",
        metadata: Mapping[str, Any] | None = None,
    ) -> Expert:
        """What was learned so far, as an expert for the base.

        `values`: "exact" stores them in the model's dtype; "fp32", "fp16" or "bf16" in that one; "ternary" runs ComPEFT over what they moved by
        (`density` .3 and `alpha` 2 unless given). HiWi's weight variant stores D and U, or with "ternary" the compressed change. `head` is the
        precision of the head, as in `compress`.

        Raises TuningError where no tensor has moved: an optimizer that was built before `tune` trains nothing here, and adapters that all died
        leave the base.
        """
        self._refuse_ended()
        self.write()
        if not any(part.moved() for part in self.parts):
            raise TuningError(_why_nothing_moved(self.parts))
        return expert_of(self, values=values, density=density, alpha=alpha, head=head, metadata=dict(metadata or {}))

    def finish(self) -> None:
        """Leave the tuned weights in a plain model: its own classes, names and requires_grad, nothing of the tuning left."""
        self._end("finished", lambda part: part.fold())

    def discard(self) -> None:
        """Leave the model as it was before `tune`, to the bit: base, head and buffers."""
        self._end("discarded", lambda part: part.restore())
        with torch.no_grad():
            for name, saved in self._buffers.items():
                self.ground.buffers[name].tensor.copy_(saved)

    def _end(self, how: str, each: Callable[[Part], None]) -> None:
        self._refuse_ended()
        with torch.no_grad():
            for part in (*self.parts, *self.heads):
                each(part)
        delattr(self._root, _CONTAINER)
        for parameter, required in self._required:
            parameter.requires_grad_(required)
            parameter.grad = None
        _tunings.discard(self)
        self._ended = how

    def changed_buffers(self) -> dict[str, torch.Tensor]:
        now = {name: self.ground.buffers[name].tensor.detach() for name in self._buffers}
        return {name: tensor.clone() for name, tensor in now.items() if not torch.equal(tensor.cpu(), self._buffers[name].cpu())}

    def _refuse_ended(self) -> None:
        if self._ended:
            raise TuningError(f"the tuning is {self._ended}; tune the model again")

    def _trains(self, optimizer: torch.optim.Optimizer) -> bool:
        own = {id(parameter) for parameter in self._container.parameters()}
        return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])


def _after_step(optimizer: torch.optim.Optimizer, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    for tuning in list(_tunings):
        if tuning._trains(optimizer):
            tuning.write()


register_optimizer_step_post_hook(_after_step)


def _why_nothing_moved(parts: Sequence[Part]) -> str:
    if any(isinstance(part, Adapter) and part.tap.U.detach().any() for part in parts):
        return (
            "every adapter has died: act(W D) is zero in all of its units, the tensors are the base's, and no gradient comes back; "
            "train at a lower learning rate, or with HiWi(activation='gelu')"
        )
    return "no trained value has moved; was the optimizer built before tune()? build it over tuning.parameters()"


def _refuse_frozen(root: torch.nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in root.parameters()):
        raise InvalidArgument("every parameter of the model is frozen (requires_grad=False); tune a model as it is loaded: tune freezes the rest")


def _refuse_frozen_tensors(names: Sequence[str], slots: Mapping[str, Slot]) -> None:
    frozen = [name for name in names if not slots[name].tensor.requires_grad]
    if frozen:
        raise InvalidArgument(
            f"{len(frozen)} of the tensors to be trained are frozen (requires_grad=False): {some(frozen)}; unfreeze them, or exclude them"
        )


def _width(root: torch.nn.Module) -> int | None:
    config = getattr(root, "config", None)
    return next((value for key in ("hidden_size", "d_model", "n_embd") if isinstance(value := getattr(config, key, None), int)), None)


