"""Converts between parameters and Hugging Face tensors, in both directions, as a family's table describes.

A tensor stores one parameter or, if it is fused, several. The | in their rows marks where they follow one another.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np

from rho1_jax.models.families import Tensor


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a parameter of one layer is stored.

    Attributes:
      tensor: the parameter's row of the table.
      shape: of the parameter.
      offset: elements between the | and the parameter. 0 if the tensor stores nothing else.
      period: elements of all parts after the |.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    offset: int
    period: int

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of the tensor, with all of its parts."""
        sizes = dict(zip(self.tensor.axes, self.shape))
        return tuple(
            _size(before, sizes) * self.period if fused else _size(after, sizes)
            for before, after, fused in _axes(self.tensor)
        )

    def blocks(self, index: tuple[slice, ...]) -> list[tuple[slice, ...]]:
        """The blocks of the tensor, in order, that store a part of the parameter.

        There are several if something else is stored between them. Only the first letter of an axis, or of each side of
        a |, may be sharded.
        """
        ranges = {x: part.indices(size)[:2] for x, part, size in zip(self.tensor.axes, index, self.shape)}
        sizes = dict(zip(self.tensor.axes, self.shape))
        blocks: list[tuple[slice, ...]] = [()]
        for before, after, fused in _axes(self.tensor):
            first, rest = after[0], after[1:]
            assert all(ranges[letter] == (0, sizes[letter]) for letter in rest)
            offset = self.offset if fused else 0
            start, stop = (offset + end * _size(rest, sizes) for end in ranges[first])
            repeats = [n * self.period for n in range(*ranges[before])] if before else [0]
            blocks = [(*block, slice(n + start, n + stop)) for block in blocks for n in repeats]
        return blocks


def _axes(tensor: Tensor) -> Iterator[tuple[str, str, bool]]:
    """Yields for each axis of the tensor: the letter before the |, or ""; the other letters; True if it has a |."""
    for group in tensor.hf_axes.split():
        before, _, after = group.rpartition("|")
        yield before, after, "|" in group


def _size(letters: str, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[letter] for letter in letters)


def fused_axis(tensor: Tensor) -> int | None:
    """The index of the tensor's axis that has a |; None if there is none."""
    return next((n for n, (_, _, fused) in enumerate(_axes(tensor)) if fused), None)


def places(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """The place of each parameter.

    Args:
      tensors: the table of the model's family.
      shapes: path -> shape of the parameter in one layer, for all parameters of the model.
    """
    sizes_by_name: dict[str, dict[str, int]] = {}  # the parts of each tensor, with their sizes after the |
    for path, tensor in tensors.items():
        if path in shapes:
            sizes = dict(zip(tensor.axes, shapes[path]))
            size = sum(_size(after, sizes) for _, after, fused in _axes(tensor) if fused)
            sizes_by_name.setdefault(tensor.name, {})[path] = size
    result = {}
    for parts in sizes_by_name.values():
        offset = 0
        for path, size in parts.items():
            result[path] = Place(tensors[path], shapes[path], offset, sum(parts.values()))
            offset += size
    return result


def _letters(tensor: Tensor) -> str:
    return tensor.hf_axes.replace(" ", "").replace("|", "")


def to_hf_axes(tensor: Tensor, array: np.ndarray) -> np.ndarray:
    """A parameter of one layer with the axes of its Hugging Face tensor, without the tensor's other parts."""
    sizes = dict(zip(tensor.axes, array.shape))
    shape = [_size(before + after, sizes) for before, after, _ in _axes(tensor)]
    return array.transpose([tensor.axes.index(letter) for letter in _letters(tensor)]).reshape(shape)


def from_hf_axes(tensor: Tensor, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The reverse of `to_hf_axes`: the parameter of the given shape."""
    letters, sizes = _letters(tensor), dict(zip(tensor.axes, shape))
    return array.reshape([sizes[letter] for letter in letters]).transpose([letters.index(x) for x in tensor.axes])


def fused_with(tensors: Mapping[str, Tensor], path: str) -> set[str]:
    """The parameters that share a tensor with this one, itself included."""
    return {other for other, tensor in tensors.items() if tensor.name == tensors[path].name}


def named_tensors(tensors: Mapping[str, Tensor], params: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the names and contents of the Hugging Face tensors that store the parameters.

    Args:
      tensors: the table of the model's family.
      params: path -> parameter, with all parameters of a fused tensor or none of them.
    """
    by_name: dict[str, list[tuple[Tensor, np.ndarray]]] = {}
    for path, tensor in tensors.items():
        if path in params:
            layers = params[path] if tensor.stacked else params[path][None]
            by_name.setdefault(tensor.name, []).append((tensor, layers))
    for name, parts in by_name.items():
        for n in range(len(parts[0][1])):
            yield name.format(n=n), _fuse([(tensor, layers[n]) for tensor, layers in parts])


def _fuse(parts: list[tuple[Tensor, np.ndarray]]) -> np.ndarray:
    """The tensor that stores these parameters of one layer, in C order, the only one safetensors writes."""
    tensor, array = parts[0]
    axis, arrays = fused_axis(tensor), [to_hf_axes(tensor, array) for tensor, array in parts]
    if axis is None:
        return np.ascontiguousarray(arrays[0])
    before, _, _ = list(_axes(tensor))[axis]
    repeats = _size(before, dict(zip(tensor.axes, array.shape)))
    outer, inner = arrays[0].shape[:axis], arrays[0].shape[axis + 1 :]
    split = [array.reshape(*outer, repeats, -1, *inner) for array in arrays]
    return np.ascontiguousarray(np.concatenate(split, axis + 1).reshape(*outer, -1, *inner))
