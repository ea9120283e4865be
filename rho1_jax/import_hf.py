"""Turns a Hugging Face folder into a checkpoint, or compares our logits with those of Transformers.

rho1 import --hf=DIR --output=DIR [--dtype=bfloat16]
rho1 import --hf=DIR --verify=FILE.txt

Nothing is downloaded: the folder must be on this machine. --verify needs torch and transformers.
"""

import pathlib
import time

import jax
from absl import flags

from rho1_jax.models.hf_folder import DTYPES, HuggingFaceFolder
from rho1_jax.models.verify_hf import verify
from rho1_jax.runtime import sharding
from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path
from rho1_jax.runtime.processes import usage
from rho1_jax.training.checkpoint import Meta
from rho1_jax.training.config import as_saved
from rho1_jax.training.pretrained import Pretrained, write_parameters


def import_hf(hf: pathlib.Path, output: pathlib.Path, dtype: str | None) -> int:
    """Writes the folder's weights and tokenizer as a run directory with one checkpoint, at step 0.

    Args:
      hf: the Hugging Face folder.
      output: the run directory to write, which must not exist.
      dtype: dtype of the parameters; None keeps that of the files.

    Returns:
      The number of parameters.

    Raises:
      UserError: the folder is incomplete or damaged, its model family is unknown, its tokenizer has ids beyond the
        model's vocabulary, or `output` exists.
    """
    if output.exists():
        raise UserError(f"{output} exists; choose another --output")
    folder = HuggingFaceFolder(hf)
    pretrained = Pretrained.of_folder(folder)
    tokenizer = pretrained.tokenizer()
    mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1)
    params = folder.load(pretrained.model, mesh, dtype)
    meta = Meta(
        step=0,
        tokens_seen=0,
        tokens_selected=0,
        config=as_saved(pretrained.config),
        data=[],
        tokenizer=tokenizer.fingerprint,
        reference=None,
    )
    write_parameters(output, params, meta, {}, tokenizer)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def main() -> None:
    """The command: parses the flags and calls `import_hf` or `verify`."""
    hf = flags.DEFINE_string("hf", None, "Folder with config.json, safetensors and a tokenizer.", required=True)
    output = flags.DEFINE_string("output", None, "Run directory to write.")
    dtype = flags.DEFINE_enum("dtype", None, list(DTYPES.values()), "Dtype of the parameters. Default: the file's.")
    text = flags.DEFINE_string(
        "verify", None, "Text file to compare logits and losses on with Transformers, instead of --output."
    )

    def command() -> None:
        start = time.monotonic()
        if (output.value is None) == (text.value is None):
            raise UserError("give either --output or --verify")
        hf_path = local_path(hf.value, "--hf")
        if output.value is not None:
            count = import_hf(hf_path, local_path(output.value, "--output"), dtype.value)
            print(f"{output.value}: {count:,} parameters, {usage(start)}")
        elif text.value is not None:
            text_path, folder = local_path(text.value, "--verify"), HuggingFaceFolder(hf_path)
            for line in verify(folder, Pretrained.of_folder(folder).model, text_path):
                print(line)

    run(command)


if __name__ == "__main__":
    main()
