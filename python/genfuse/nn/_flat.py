"""Many tensors side by side in memory, so that one call does for all what is done to each of their elements."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

ALIGNMENT = 64  # bytes: a line of the cache, and more than the kernels of matrix products ask for

# Of each tensor that `flatten` has laid out: the flat one, its place among those in it, and its first element there.
_places = WeakIdKeyDictionary()


@torch.no_grad()
def flatten(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Lay tensors side by side in memory; returns one flat tensor for each dtype and device, in which they are views.

    They stay the same objects with the same values: a module and an optimizer know their parameters as before, and the
    state_dict has the same entries. In the flat tensors each begins at a multiple of 64 bytes, with zeros in between.
    Left alone are tensors that are not contiguous; whose memory others share, as of tied weights, views, arrays, and of
    what was laid out already; and those of other classes than Tensor and Parameter, as parameters of lazy modules are.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.is_contiguous()
        if plain and tensor.device.type != "meta" and tensor.nbytes and not _shared(tensor):
            kinds[tensor.dtype, tensor.device].append(tensor)
    flats = []
    for (dtype, device), members in kinds.items():
        step = ALIGNMENT // dtype.itemsize
        sizes = [-(-tensor.numel() // step) * step for tensor in members]
        flats.append(flat := torch.zeros(sum(sizes), dtype=dtype, device=device))
        start = 0
        for place, (tensor, size) in enumerate(zip(members, sizes, strict=True)):
            tensor.data = flat[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
            _places[tensor] = flat, place, start
            start += size
    return flats


def _shared(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    return storage.nbytes() > tensor.nbytes or torch._C._storage_Use_Count(storage._cdata) > 2  # by tensor and storage


class Together:
    """Tensors, seen as the few that they are parts of since `flatten` laid them out."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self._pointers: list[int] | None = None

    def merged(self) -> list[Tensor]:
        """All elements in their order: flat views of those that lie side by side, the other tensors as they are. What
        is written to these is written to the tensors."""
        pointers = [tensor.data_ptr() for tensor in self.tensors]
        if pointers != self._pointers:
            self._pointers, self._merged = pointers, self._merge()
        return self._merged

    def _merge(self) -> list[Tensor]:
        merged: list[Tensor] = []
        begin, previous = 0, (0, 0)  # of the run that `merged` ends with: its first element, and its last member
        for tensor in self.tensors:
            flat, place, start = _places.get(tensor, (None, 0, 0))
            if flat is None or tensor.data_ptr() != flat.data_ptr() + start * flat.element_size():
                merged.append(tensor)  # of its own, or it was given other memory since
                previous = (0, 0)
                continue
            if (id(flat), place - 1) == previous:
                merged.pop()
            else:
                begin = start
            merged.append(flat[begin : start + tensor.numel()])
            previous = id(flat), place
        return merged
