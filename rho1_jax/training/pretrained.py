"""Trained models: those a run starts from or refers to, and those that are evaluated."""

import dataclasses
import pathlib

import ml_collections
from jax.sharding import Mesh

from rho1_jax.configs.default import ModelConfig
from rho1_jax.data.store import Store
from rho1_jax.data.tokenizer import Tokenizer
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


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A checkpoint and the config of its run.

    Attributes:
      directory: the checkpoint's directory.
      meta: the checkpoint's description.
      config: the run's config; keys that an older version did not have are filled in.
      model: the `model` section of that config.
    """

    directory: pathlib.Path
    meta: Meta
    config: ml_collections.ConfigDict
    model: ModelConfig

    @classmethod
    def open(cls, path: str | pathlib.Path, key: str) -> "TrainedRun":
        """Opens a run's newest checkpoint, or one of its checkpoints.

        Args:
          path: a run directory or a checkpoint directory.
          key: the config key or flag the path came from, for errors.

        Raises:
          UserError: there is no checkpoint, or this version cannot read it.
        """
        directory = checkpoint.find(path, key)
        meta = checkpoint.load_meta(directory)
        config = ml_collections.ConfigDict(meta.config)
        return cls(directory, meta, config, ModelConfig(**config.model))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the run keeps beside its checkpoints. Raises UserError if it was replaced or does not fit."""
        return open_tokenizer(checkpoint.tokenizer_path(self.directory), self.model, self.meta.tokenizer)

    def load(self, mesh: Mesh, dtype: str) -> Params:
        """The parameters in a dtype, on the mesh."""
        return checkpoint.load_params(self.directory, self.model, mesh, dtype)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model on disk.

    Attributes:
      path: checkpoint directory or Hugging Face folder.
      model: its config.
      tokenizer_path: folder of its tokenizer.
      tokenizer_fingerprint: fingerprint of that tokenizer.
      folder: the Hugging Face folder; None for a checkpoint.
    """

    path: pathlib.Path
    model: ModelConfig
    tokenizer_path: pathlib.Path
    tokenizer_fingerprint: str
    folder: HuggingFaceFolder | None

    def load(self, mesh: Mesh, dtype: str) -> Params:
        """The parameters in a dtype, on the mesh. Raises UserError if they are not those of the model."""
        if self.folder is not None:
            params = self.folder.load(self.model, mesh, dtype)
            check_finite(params, self.path)
            return params
        return checkpoint.load_params(self.path, self.model, mesh, dtype)


def open_pretrained(path: str, key: str, config: ml_collections.ConfigDict, store: Store) -> Pretrained:
    """Opens a model for a run on the data of `store`.

    Args:
      path: a run directory, one of its checkpoints, or a Hugging Face folder.
      key: the config key the path came from, for errors.
      config: the run's config.
      store: the run's training data.

    Raises:
      UserError: there is no model, or its tokenizer or vocabulary differ from the run's.
    """
    if is_hugging_face_folder(local_path(path, key)):
        folder = HuggingFaceFolder(path)
        model = hf_config.from_hf(folder.config, f"{path}/config.json", run_settings(config))
        pretrained = Pretrained(folder.path, model, folder.path, open_tokenizer(folder.path, model).fingerprint, folder)
    else:
        try:
            directory = checkpoint.find(path, key)
        except UserError:
            kinds = "a run's directory, nor one of its checkpoints, nor a Hugging Face folder with safetensors"
            raise UserError(f"{key}={path} is neither {kinds}") from None
        meta = checkpoint.load_meta(directory)
        model = ModelConfig(**meta.config["model"] | run_settings(config))
        pretrained = Pretrained(directory, model, checkpoint.tokenizer_path(directory), meta.tokenizer, None)
    model_tokenizer, data_tokenizer = pretrained.tokenizer_fingerprint, store.tokenizer_fingerprint
    if not store.has_tokenizer(pretrained.tokenizer_path, model_tokenizer):
        raise UserError(
            f"{key}={pretrained.path} has another tokenizer ({model_tokenizer[:12]}) than {store.path} was prepared "
            f"with ({data_tokenizer[:12]}); prepare the data with {pretrained.tokenizer_path}"
        )
    if model.vocab_size != config.model.vocab_size:
        raise UserError(
            f"{key}={pretrained.path} has a vocabulary of {model.vocab_size}, but "
            f"config.model.vocab_size is {config.model.vocab_size}"
        )
    return pretrained


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
