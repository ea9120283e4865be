"""Hugging Face folders: safetensors and config.json, in and out.

One table, TENSORS, says where each parameter lies; it is read in both directions.
"""

import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.decoder import Params, abstract_params, param_count
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path, read_json
from rho1_jax.runtime.progress import Progress
from rho1_jax.runtime.sharding import param_shardings, path_name

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class _Stored(NamedTuple):
    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it


class Tensor(NamedTuple):
    """Where a parameter lies in a Hugging Face folder.

    Attributes:
      name: of the tensor; {n} is the layer.
      ours: the parameter's axes (without N), one letter each.
      theirs: the tensor's axes, divided by spaces; letters that stand together are one axis of it.
    """

    name: str
    ours: str
    theirs: str

    @property
    def stacked(self) -> bool:
        """Whether each layer has one."""
        return "{n}" in self.name


DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_LAYER = "model.layers.{n}."
# Torch keeps a matrix as outputs by inputs, we as inputs by outputs.
TENSORS = {
    "embedding": Tensor("model.embed_tokens.weight", "VD", "V D"),
    "layers/attention_norm/scale": Tensor(_LAYER + "input_layernorm.weight", "D", "D"),
    "layers/attention/q": Tensor(_LAYER + "self_attn.q_proj.weight", "DHC", "HC D"),
    "layers/attention/k": Tensor(_LAYER + "self_attn.k_proj.weight", "DKC", "KC D"),
    "layers/attention/v": Tensor(_LAYER + "self_attn.v_proj.weight", "DKC", "KC D"),
    "layers/attention/q_bias": Tensor(_LAYER + "self_attn.q_proj.bias", "HC", "HC"),
    "layers/attention/k_bias": Tensor(_LAYER + "self_attn.k_proj.bias", "KC", "KC"),
    "layers/attention/v_bias": Tensor(_LAYER + "self_attn.v_proj.bias", "KC", "KC"),
    "layers/attention/q_norm/scale": Tensor(_LAYER + "self_attn.q_norm.weight", "C", "C"),
    "layers/attention/k_norm/scale": Tensor(_LAYER + "self_attn.k_norm.weight", "C", "C"),
    "layers/attention/o": Tensor(_LAYER + "self_attn.o_proj.weight", "HCD", "D HC"),
    "layers/feed_forward_norm/scale": Tensor(_LAYER + "post_attention_layernorm.weight", "D", "D"),
    "layers/feed_forward/gate": Tensor(_LAYER + "mlp.gate_proj.weight", "DF", "F D"),
    "layers/feed_forward/up": Tensor(_LAYER + "mlp.up_proj.weight", "DF", "F D"),
    "layers/feed_forward/down": Tensor(_LAYER + "mlp.down_proj.weight", "FD", "D F"),
    "norm/scale": Tensor("model.norm.weight", "D", "D"),
    "head": Tensor("lm_head.weight", "VD", "V D"),
}
ALIGNMENT = 64  # bytes
# Buffers that older files carry; both sides compute them.
_IGNORED = ("rotary_emb.inv_freq",)


def to_theirs(tensor: Tensor, array: np.ndarray) -> np.ndarray:
    """A parameter of one layer, in the axes of its Hugging Face tensor."""
    letters = tensor.theirs.replace(" ", "")
    sizes = dict(zip(tensor.ours, array.shape))
    shape = [math.prod(sizes[letter] for letter in group) for group in tensor.theirs.split()]
    return array.transpose([tensor.ours.index(letter) for letter in letters]).reshape(shape)


def _to_ours(tensor: Tensor, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    letters = tensor.theirs.replace(" ", "")
    sizes = dict(zip(tensor.ours, shape))
    return array.reshape([sizes[letter] for letter in letters]).transpose([letters.index(x) for x in tensor.ours])


def _their_slices(tensor: Tensor, index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The part of the tensor that holds a part of the parameter. Only the first letter of a group may be divided."""
    ranges = {letter: part.indices(size)[:2] for letter, part, size in zip(tensor.ours, index, shape)}
    sizes = dict(zip(tensor.ours, shape))
    slices = []
    for group in tensor.theirs.split():
        rest = group[1:]
        assert all(ranges[letter] == (0, sizes[letter]) for letter in rest)
        unit = math.prod(sizes[letter] for letter in rest)
        start, stop = ranges[group[0]]
        slices.append(slice(start * unit, stop * unit))
    return tuple(slices)


def is_hugging_face_folder(path: str | pathlib.Path) -> bool:
    """Whether a folder holds safetensors under the names that Hugging Face gives them."""
    return any((local_path(path, "model") / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))


class HuggingFaceFolder:
    """The tensors of a folder, read where and when they are needed.

    Attributes:
      path: the folder.
      config: its config.json.
    """

    def __init__(self, path: str | pathlib.Path):
        """Raises UserError where it holds no config.json or no safetensors."""
        self.path = local_path(path, "Hugging Face folder")
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        if (self.path / INDEX_FILE).is_file():
            index = read_json(self.path / INDEX_FILE)
            if "weight_map" not in index:
                raise UserError(f"{self.path / INDEX_FILE}: lacks weight_map")
            names = sorted(set(index["weight_map"].values()))
        elif (self.path / SINGLE_FILE).is_file():
            names = [SINGLE_FILE]
        else:
            raise UserError(f"{self.path}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; pickled weights are not read")
        self._stored: dict[str, _Stored] = {}
        for file in (self.path / name for name in names):
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no dict)
                    if not name.endswith(_IGNORED):
                        view = opened.get_slice(name)
                        self._stored[name] = _Stored(file, tuple(view.get_shape()), view.get_dtype())

    def _open(self, path: pathlib.Path):
        try:
            return safe_open(path, "np")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error

    def read(self, tensor: str, part: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor. The file is closed behind it, or all that was read would stay mapped."""
        with self._open(self._stored[tensor].file) as file:
            return file.get_slice(tensor)[part]

    def check(self, config: ModelConfig) -> None:
        """Raises UserError, naming them, where tensors are missing, unexpected or of another shape than the model's."""
        expected = {
            name: shape
            for path, leaf in _leaves(abstract_params(config))
            for name, shape in _expected(path, leaf.shape).items()
        }
        found = {name: stored.shape for name, stored in self._stored.items()}
        missing = sorted(expected.keys() - found.keys())
        extra = sorted(found.keys() - expected.keys())
        if config.tied_embeddings and TENSORS["head"].name in extra and self._same_as_embedding():
            extra.remove(TENSORS["head"].name)
        wrong = [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ]
        of_other_types = [
            f"{name} ({stored.dtype})" for name, stored in self._stored.items() if stored.dtype not in DTYPES
        ]
        problems = [
            f"{what}: {_some(names)}"
            for what, names in (
                ("missing", missing),
                ("unexpected", extra),
                ("misshapen", wrong),
                (f"none of {', '.join(DTYPES)}", of_other_types),
            )
            if names
        ]
        if problems:
            raise UserError(f"{self.path}: the tensors are not those of its config.json; {'; '.join(problems)}")

    def _same_as_embedding(self) -> bool:
        everything = (slice(None), slice(None))
        head, embedding = (self.read(TENSORS[name].name, everything) for name in ("head", "embedding"))
        return head.dtype == embedding.dtype and bool((head == embedding).all())

    def load(self, config: ModelConfig, mesh: Mesh, dtype: str | None) -> Params:
        """The parameters, laid on the mesh. Each device's part is read by itself, layer by layer.

        Args:
          config: the folder's model.
          mesh: where they go.
          dtype: what they become; None leaves each as it is in the file.

        Raises:
          UserError: the tensors are not those of the model.
        """
        self.check(config)
        wanted = abstract_params(config)
        with Progress(f"reading {self.path.name}", param_count(config), unit="params") as progress:

            def leaf(path: tuple, like: jax.ShapeDtypeStruct, sharding) -> jax.Array:
                name = path_name(path)
                array = jax.make_array_from_callback(
                    like.shape, sharding, lambda index: self._part(name, like.shape, index, dtype)
                )
                progress.advance(like.size)
                return array

            return jax.tree_util.tree_map_with_path(leaf, wanted, param_shardings(wanted, mesh))

    def _part(self, path: str, shape: tuple[int, ...], index: Any, dtype: str | None) -> np.ndarray:
        """The part of a parameter that one device holds."""
        tensor = TENSORS[path]
        numbers = range(1)
        if tensor.stacked:
            numbers = range(*index[0].indices(shape[0]))
            shape, index = shape[1:], index[1:]
        names = [tensor.name.format(n=n) for n in numbers]
        slices = _their_slices(tensor, index, shape)
        part_shape = tuple(len(range(*part.indices(size))) for part, size in zip(index, shape))
        stored = jnp.result_type(*(DTYPES[self._stored[name].dtype] for name in names))
        rows = _aligned_empty((len(names), *part_shape), jnp.dtype(dtype or stored))
        for row, name in zip(rows, names):
            row[...] = _to_ours(tensor, self.read(name, slices), part_shape)
        return rows if tensor.stacked else rows[0]


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array whose memory JAX takes over on CPU instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _leaves(params: Any) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]]


def _expected(path: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Name and shape of the tensors that a parameter is kept in."""
    tensor = TENSORS[path]
    layers, ours = (shape[0], shape[1:]) if tensor.stacked else (1, shape)
    theirs = to_theirs(tensor, np.broadcast_to(np.int8(0), ours)).shape
    return {tensor.name.format(n=n): theirs for n in range(layers)}


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def named_tensors(path: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """A parameter as the Hugging Face tensors that keep it."""
    tensor = TENSORS[path]
    layers = array if tensor.stacked else array[None]
    for n, layer in enumerate(layers):
        yield tensor.name.format(n=n), np.ascontiguousarray(to_theirs(tensor, layer))
