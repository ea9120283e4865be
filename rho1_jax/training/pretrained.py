"""Trained weights to start from or to refer to: a run's checkpoint, or a Hugging Face folder."""

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
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path
from rho1_jax.training import checkpoint
from rho1_jax.training.config import differences, run_settings


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model on the disk.

    Attributes:
      path: checkpoint directory or Hugging Face folder.
      model: its config.
      tokenizer_path: the folder of its tokenizer.
      tokenizer_fingerprint: of that.
      folder: the Hugging Face folder; None for a checkpoint.
    """

    path: pathlib.Path
    model: ModelConfig
    tokenizer_path: pathlib.Path
    tokenizer_fingerprint: str
    folder: HuggingFaceFolder | None

    def load(self, mesh: Mesh, dtype: str) -> Params:
        """The parameters in a dtype, laid on the mesh. Raises UserError where they are not those of the model."""
        if self.folder is not None:
            return self.folder.load(self.model, mesh, dtype)
        return checkpoint.load_params(self.path, self.model, mesh, dtype)


def open_pretrained(path: str, key: str, config: ml_collections.ConfigDict, store: Store) -> Pretrained:
    """A model for use in a run on the data of `store`.

    Args:
      path: a run directory, one of its checkpoints, or a Hugging Face folder.
      key: the config key it came from, for errors.
      config: of the run.
      store: its training data.

    Raises:
      UserError: there is none, or its tokenizer or vocabulary are others.
    """
    if is_hugging_face_folder(local_path(path, key)):
        folder = HuggingFaceFolder(path)
        model = hf_config.from_hf(folder.config, f"{path}/config.json", run_settings(config))
        found = Pretrained(folder.path, model, folder.path, Tokenizer(path).fingerprint, folder)
    else:
        try:
            directory = checkpoint.find(path, key)
        except UserError:
            kinds = "a run's directory, nor one of its checkpoints, nor a Hugging Face folder with safetensors"
            raise UserError(f"{key}={path} is neither {kinds}") from None
        meta = checkpoint.load_meta(directory)
        model = ModelConfig(**meta.config["model"] | run_settings(config))
        found = Pretrained(directory, model, checkpoint.tokenizer_path(directory), meta.tokenizer, None)
    if found.tokenizer_fingerprint != store.tokenizer_fingerprint:
        raise UserError(
            f"{key}={found.path} has another tokenizer ({found.tokenizer_fingerprint[:12]}) than {store.path} was "
            f"prepared with ({store.tokenizer_fingerprint[:12]}): prepare the data with {found.tokenizer_path}"
        )
    if model.vocab_size != config.model.vocab_size:
        raise UserError(
            f"{key}={found.path} has a vocabulary of {model.vocab_size}, "
            f"config.model.vocab_size is {config.model.vocab_size}"
        )
    return found


def open_same_model(
    path: str, key: str, config: ml_collections.ConfigDict, policy_config: ModelConfig, store: Store
) -> Pretrained | None:
    """A model like the policy, if `key` names one. Raises UserError where it is another one."""
    if not path:
        return None
    found = open_pretrained(path, key, config, store)
    same_length = dataclasses.replace(found.model, context_length=policy_config.context_length)
    changed = differences(dataclasses.asdict(same_length), dataclasses.asdict(policy_config), "config.model")
    if changed:
        raise UserError(f"{key}={found.path} is another model: {'; '.join(changed)}")
    return found
