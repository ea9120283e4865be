"""Models on disk: opened from runs, checkpoints and Hugging Face folders, and written without optimizer state."""

import dataclasses
import pathlib
import shutil
from collections.abc import Collection, Mapping

import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from rho1_jax.configs import default
from rho1_jax.configs.default import ModelConfig
from rho1_jax.data.store import Store
from rho1_jax.data.tokenizer import TOKENIZER_DIR, Tokenizer
from rho1_jax.models import hf_config
from rho1_jax.models.decoder import Params
from rho1_jax.models.hf_folder import HuggingFaceFolder, is_hugging_face_folder
from rho1_jax.models.vocabulary import open_tokenizer
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path
from rho1_jax.training import checkpoint
from rho1_jax.training.checkpoint import Meta
from rho1_jax.training.checksums import check_finite
from rho1_jax.training.config import changes, run_settings
from rho1_jax.training.state import TrainState

INIT = "config.init.checkpoint"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model on disk: a checkpoint of a run, or a Hugging Face folder.

    Attributes:
      path: the checkpoint directory or the folder.
      config: the run's config; keys that an older version did not have are filled in. For a folder, the default config
        with the folder's model, sharded over all devices.
      model: the `model` section of that config.
      meta: the checkpoint's description; None for a folder.
      folder: the folder's tensors; None for a checkpoint.
    """

    path: pathlib.Path
    config: ml_collections.ConfigDict
    model: ModelConfig
    meta: Meta | None = None
    folder: HuggingFaceFolder | None = None

    @classmethod
    def open(cls, path: str | pathlib.Path, key: str) -> "Pretrained":
        """Opens a run's newest checkpoint, one of its checkpoints, or a Hugging Face folder.

        Args:
          path: a run directory, a checkpoint directory or a folder with safetensors.
          key: the config key or flag the path came from, for errors.

        Raises:
          UserError: there is no model, or this version cannot read it.
        """
        if is_hugging_face_folder(local_path(path, key)):
            return cls.of_folder(HuggingFaceFolder(path))
        directory = checkpoint.find(path, key)
        meta = checkpoint.load_meta(directory)
        config = ml_collections.ConfigDict(meta.config)
        return cls(directory, config, ModelConfig(**config.model), meta=meta)

    @classmethod
    def of_folder(cls, folder: HuggingFaceFolder) -> "Pretrained":
        """The model of a Hugging Face folder. Raises UserError if its config.json asks for what we do not compute."""
        config = default.get_config("clm")
        model = hf_config.from_hf(folder.config, f"{folder.path}/config.json", run_settings(config))
        config.model.update(vars(model))
        config.mesh.update(data=1, fsdp=-1)  # so that a folder opens if it fits on all devices together
        return cls(folder.path, config, model, folder=folder)

    @property
    def tokenizer_path(self) -> pathlib.Path:
        """Folder of the tokenizer: the Hugging Face folder, or the one that the run keeps beside its checkpoints."""
        return self.path if self.folder else checkpoint.tokenizer_path(self.path)

    @property
    def tokenizer_fingerprint(self) -> str:
        """The fingerprint of the tokenizer that the model was trained with."""
        return self.meta.tokenizer if self.meta else self.tokenizer().fingerprint

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises UserError if it is missing, was replaced, or does not fit the vocabulary."""
        return open_tokenizer(self.tokenizer_path, self.model, self.meta.tokenizer if self.meta else None)

    def load(self, mesh: Mesh, dtype: str) -> Params:
        """The parameters in a dtype, on the mesh. Raises UserError if they do not fit the model or are not finite."""
        if self.folder is None:
            return checkpoint.load_params(self.path, self.model, mesh, dtype)
        params = self.folder.load(self.model, mesh, dtype)
        check_finite(params, self.path)
        return params


def write_parameters(
    output: pathlib.Path, params: Params, meta: Meta, metrics: Mapping[str, float], tokenizer: Tokenizer
) -> None:
    """Writes a run directory with one checkpoint, which holds the parameters and no optimizer state.

    Args:
      output: the directory, which must not exist. It is written beside, and renamed when it is complete.
      params: the parameters, as JAX or NumPy arrays.
      meta: the description of their run.
      metrics: the evaluations at that step.
      tokenizer: the model's tokenizer.
    """
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial / TOKENIZER_DIR)
    checkpoints = checkpoint.Checkpoints(partial, keep=1)
    checkpoints.save(TrainState(jnp.int32(meta.step), params, None), meta, metrics)
    checkpoints.close()
    partial.rename(output)


def open_pretrained(path: str, key: str, config: ml_collections.ConfigDict, store: Store) -> Pretrained:
    """Opens a model for a run on the data of `store`, with the run's settings for how it is computed.

    Args:
      path: a run directory, one of its checkpoints, or a Hugging Face folder.
      key: the config key the path came from, for errors.
      config: the run's config.
      store: the run's training data.

    Raises:
      UserError: there is no model, or its tokenizer or vocabulary differ from the run's.
    """
    pretrained = Pretrained.open(path, key)
    pretrained = dataclasses.replace(pretrained, model=dataclasses.replace(pretrained.model, **run_settings(config)))
    model_tokenizer, data_tokenizer = pretrained.tokenizer_fingerprint, store.tokenizer_fingerprint
    if not store.has_tokenizer(pretrained.tokenizer_path, model_tokenizer):
        raise UserError(
            f"{key}={pretrained.path} has another tokenizer ({model_tokenizer[:12]}) than {store.path} was prepared "
            f"with ({data_tokenizer[:12]}); prepare the data with {pretrained.tokenizer_path}"
        )
    if config.model.vocab_size not in (0, pretrained.model.vocab_size):
        raise UserError(
            f"{key}={pretrained.path} has a vocabulary of {pretrained.model.vocab_size}, but "
            f"config.model.vocab_size is {config.model.vocab_size}"
        )
    return pretrained


def take_model(config: ml_collections.ConfigDict, initial: Pretrained, given: Collection[str], seq_len: int) -> None:
    """Fills the `model` section of a run's config with the model that the run starts from.

    How the model is computed stays as the config says. So does context_length if it is given; otherwise, it is the
    model's or, if the rows are longer, theirs.

    Args:
      config: the run's config, which is changed.
      initial: the model, with the run's settings for how it is computed.
      given: the keys that the command line sets, such as model.layers. Keys that differ from their default count too.
      seq_len: targets per row of the training data.

    Raises:
      UserError: a key that was given contradicts the model.
    """
    contradicting, asked = [], ModelConfig(**config.model)
    for field in dataclasses.fields(ModelConfig):
        value, of_model = getattr(asked, field.name), getattr(initial.model, field.name)
        is_given = f"model.{field.name}" in given or value != field.default
        if field.name == "context_length":
            config.model.context_length = value if is_given else max(of_model, seq_len)
        elif is_given and value != of_model:
            contradicting.append(field.name)
        else:
            config.model[field.name] = of_model
    if contradicting:
        given_values = ", ".join(f"config.model.{name}={config.model[name]}" for name in contradicting)
        of_model = ", ".join(f"{name}={getattr(initial.model, name)}" for name in contradicting)
        verb, them = ("contradicts", "it") if len(contradicting) == 1 else ("contradict", "them")
        raise UserError(f"{given_values} {verb} {INIT}={initial.path}, which has {of_model}; remove {them}")


def open_same_model(
    path: str, key: str, config: ml_collections.ConfigDict, policy_config: ModelConfig, store: Store
) -> Pretrained | None:
    """Opens a model of the policy's shape; None if `path` is empty. Raises UserError if the shape differs."""
    if not path:
        return None
    pretrained = open_pretrained(path, key, config, store)
    same_length = dataclasses.replace(pretrained.model, context_length=policy_config.context_length)
    changed = changes(dataclasses.asdict(same_length), dataclasses.asdict(policy_config), "config.model")
    if changed:
        listed = "; ".join(f"{key}={old!r} there, {new!r} here" for key, old, new in changed)
        raise UserError(f"{key}={pretrained.path} is another model: {listed}")
    return pretrained
