"""Hugging Face folders: safetensors and config.json, in and out.

The tensor table of the model's family says which tensor stores each parameter, in both directions.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax.sharding import Mesh
from pydantic_core import PydanticCustomError
from safetensors import SafetensorError, safe_open

from rho1_jax.configs.default import ModelConfig
from rho1_jax.models.decoder import Params, abstract_params, param_count
from rho1_jax.models.families import Tensor, family_of
from rho1_jax.models.hf_config import HfConfigJson, text_model
from rho1_jax.models.hf_tensors import Place, from_hf_axes, fused_axis, places
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path
from rho1_jax.runtime.progress import Progress
from rho1_jax.runtime.schema import read_json
from rho1_jax.runtime.sharding import param_shardings, path_name

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def _file_name(text: str) -> str:
    """Refuses a name with folders, which could leave the model's. Links are fine: Hugging Face's cache has them."""
    if {"/", "\\", "\0"} & set(text) or not text.endswith(".safetensors"):
        raise PydanticCustomError("file_name", "input should be the name of a .safetensors file in the same folder")
    return text


@pydantic.dataclasses.dataclass(frozen=True)
class Index:
    """The index of weights in several files: the file of each tensor. Other keys are ignored."""

    weight_map: dict[str, Annotated[str, pydantic.AfterValidator(_file_name)]]


class _Stored(NamedTuple):
    """A tensor in a file."""

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name for it


DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ALIGNMENT = 64  # bytes
SHOWN = 150  # characters of a name from a file
# Buffers in older files: rotary frequencies, and the causal masks of GPT-NeoX. Both we and Transformers compute them.
_IGNORED = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


def is_hugging_face_folder(path: str | pathlib.Path) -> bool:
    """True if a folder contains safetensors under the names that Hugging Face gives them."""
    return any((local_path(path, "model") / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))


class HuggingFaceFolder:
    """The tensors of a folder, read only when and where they are needed.

    Attributes:
      path: the folder.
      config: content of its config.json. For a model of text and images, that of its text model.
    """

    def __init__(self, path: str | pathlib.Path):
        """Raises UserError if the folder has no config.json or no safetensors, or if one of its files is damaged."""
        self.path = local_path(path, "Hugging Face folder")
        config_file = self.path / "config.json"
        self.config, prefix = text_model(read_json(config_file, HfConfigJson), str(config_file))
        weight_map: dict[str, str] = {}
        if (self.path / INDEX_FILE).is_file():
            weight_map = read_json(self.path / INDEX_FILE, Index).weight_map
            files = sorted(set(weight_map.values()))
        elif (self.path / SINGLE_FILE).is_file():
            files = [SINGLE_FILE]
        else:
            raise UserError(
                f"{self.path}: has neither {SINGLE_FILE} nor {INDEX_FILE}; pickled weights are not supported"
            )
        self._stored: dict[str, _Stored] = {}
        for file in (self.path / name for name in files):
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    if name.startswith(prefix) and not name.endswith(_IGNORED):
                        view = opened.get_slice(name)
                        self._stored[name.removeprefix(prefix)] = _Stored(
                            file, name, tuple(view.get_shape()), view.get_dtype()
                        )
        for name, file_name in weight_map.items():
            stored = self._stored.get(name.removeprefix(prefix))
            expected = name.startswith(prefix) and not name.endswith(_IGNORED)
            if expected and (stored is None or stored.file.name != file_name):
                raise UserError(f"{self.path / INDEX_FILE}: {_shown(name)} is not in {file_name}")

    @property
    def stored(self) -> list[_Stored]:
        """The file, name, shape and dtype of each tensor."""
        return list(self._stored.values())

    def _open(self, path: pathlib.Path):
        try:
            return safe_open(path, "np")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot read it: {error}") from error

    def read(self, tensor: str, blocks: Sequence[tuple[slice, ...]], axis: int | None = None) -> np.ndarray:
        """Blocks of a tensor, joined along an axis. Closes the file; otherwise all that was read would stay mapped."""
        stored = self._stored[tensor]
        with self._open(stored.file) as file:
            opened = file.get_slice(stored.name)
            arrays = [opened[block] for block in blocks]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)

    def check(self, config: ModelConfig) -> None:
        """Compares the tensors with those of the model, before anything of the model's size is allocated.

        Raises:
          UserError: some are missing, unexpected, or of the wrong shape or dtype. It names them.
        """
        tensors = family_of(config).tensors
        head, embedding = tensors["head"].name, tensors["embedding"].name
        if config.layers > len(self._stored):  # names for a billion layers would fill the memory
            raise UserError(
                f"{self.path}: num_hidden_layers is {config.layers} in config.json, but the files hold only "
                f"{len(self._stored)} tensors"
            )
        if config.tied_embeddings and head in self._stored and embedding not in self._stored:
            # `safetensors.torch.save_model` stores the one matrix of a tied model as the head.
            self._stored[embedding] = self._stored.pop(head)
        expected = {
            name: place.hf_shape
            for place in _places(config, abstract_params(config)).values()
            for name in _names(place.tensor, range(config.layers))
        }
        shapes = {name: stored.shape for name, stored in self._stored.items()}
        missing = sorted(expected.keys() - shapes.keys())
        extra = sorted(shapes.keys() - expected.keys())
        if config.tied_embeddings and head in extra and self._are_equal(head, embedding):
            extra.remove(head)
        wrong = [
            f"{name} {list(shapes[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ]
        of_other_types = [
            f"{name} ({stored.dtype})" for name, stored in self._stored.items() if stored.dtype not in DTYPES
        ]
        problems = [
            f"{what}: {_some(names)}"
            for what, names in (
                ("missing", missing),
                ("unexpected", extra),
                ("of the wrong shape", wrong),
                (f"not {', '.join(DTYPES)}", of_other_types),
            )
            if names
        ]
        if problems:
            raise UserError(f"{self.path}: the tensors do not match config.json; {'; '.join(problems)}")

    def _are_equal(self, *names: str) -> bool:
        """True if two matrices have the same shape, dtype and values."""
        first, second = (self._stored[name] for name in names)
        if first[2:] != second[2:] or first.dtype not in DTYPES or len(first.shape) != 2:
            return False
        whole = slice(None), slice(None)
        return np.array_equal(self.read(names[0], [whole]), self.read(names[1], [whole]))

    def load(self, config: ModelConfig, mesh: Mesh, dtype: str | None) -> Params:
        """Reads the parameters onto the mesh. Each device's part is read separately, layer by layer.

        Args:
          config: the folder's model.
          mesh: where to put them.
          dtype: of the parameters; None keeps the dtype of each tensor in the file.

        Raises:
          UserError: the tensors do not match the model.
        """
        self.check(config)
        shapes = abstract_params(config)
        stored = _places(config, shapes)
        with Progress(f"reading {self.path.name}", param_count(config), unit="params") as progress:

            def leaf(path: tuple, like: jax.ShapeDtypeStruct, sharding) -> jax.Array:
                place = stored[path_name(path)]
                array = jax.make_array_from_callback(
                    like.shape, sharding, lambda index: self._part(place, like.shape, index, dtype)
                )
                progress.advance(like.size)
                return array

            return jax.tree_util.tree_map_with_path(leaf, shapes, param_shardings(shapes, mesh))

    def _part(self, place: Place, shape: tuple[int, ...], index: Any, dtype: str | None) -> np.ndarray:
        """The part of a parameter that one device holds."""
        tensor, numbers = place.tensor, range(1)
        if tensor.stacked:
            numbers = range(*index[0].indices(shape[0]))
            shape, index = shape[1:], index[1:]
        names, blocks = _names(tensor, numbers), place.blocks(index)
        part_shape = tuple(len(range(*part.indices(size))) for part, size in zip(index, shape))
        stored = jnp.result_type(*(DTYPES[self._stored[name].dtype] for name in names))
        rows = _aligned_empty((len(names), *part_shape), jnp.dtype(dtype or stored))
        for row, name in zip(rows, names):
            row[...] = from_hf_axes(tensor, self.read(name, blocks, fused_axis(tensor)), part_shape)
        return rows if tensor.stacked else rows[0]


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array aligned so that JAX on CPU uses its memory instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _places(config: ModelConfig, params: Any) -> dict[str, Place]:
    """The place of each parameter, from their shapes."""
    tensors = family_of(config).tensors
    leaves = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    return places(tensors, {path: shape[1:] if tensors[path].stacked else shape for path, shape in leaves.items()})


def _names(tensor: Tensor, layers: range) -> list[str]:
    """The names of a parameter's tensors in these layers; the one name of a parameter that is not in the layers."""
    return [tensor.name.format(n=n) for n in (layers if tensor.stacked else range(1))]


def _shown(text: str) -> str:
    """Text from a file, escaped and shortened for an error of one line."""
    return ascii(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")[1:-1]


def _some(names: list[str]) -> str:
    shown = ", ".join(map(_shown, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
