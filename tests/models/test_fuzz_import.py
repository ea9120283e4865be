"""Any Hugging Face folder is either read or refused with a `UserError`."""

import contextlib
import json
import shutil

import pytest
from helpers import tiny, write_hf_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from rho1_jax.models import decoder, hf_config
from rho1_jax.models.families import BUILT_IN
from rho1_jax.models.hf_config import HfConfigJson, LayerRopeJson
from rho1_jax.models.hf_folder import INDEX_FILE, SINGLE_FILE, HuggingFaceFolder
from rho1_jax.runtime import sharding
from rho1_jax.runtime.errors import UserError

CONFIG = tiny(tied_embeddings=False, vocab_size=300)
RUN_SETTINGS = {"compute_dtype": "float32", "attention": "auto", "remat": "none", "unroll": 1, "loss_chunk": 64}
NUMBERS = st.integers() | st.sampled_from([0, 1, 2, 3, 16, 2**31 - 1]) | st.floats()
TEXT = st.text('aZ.0/\\ \0\n"é\N{GRINNING FACE}', max_size=9)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
KINDS = st.sampled_from([*(family.architecture for family in BUILT_IN), *hf_config.TEXT_MODELS])
ROPE = st.dictionaries(
    st.sampled_from([*LayerRopeJson.__annotations__]),
    JSON | st.sampled_from(["llama3", "longrope", "su"]) | st.floats(0.5, 8) | st.lists(st.floats(0.5, 8), max_size=5),
    max_size=7,
)
ROPES = ROPE | st.dictionaries(st.sampled_from(["full_attention", "sliding_attention"]), ROPE)
CHANGES = st.dictionaries(
    st.sampled_from([*HfConfigJson.__annotations__, *hf_config.CONSTANTS, "hidden_act", "hidden_activation", "extra"]),
    JSON | ROPES,
    max_size=3,
)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "llama"
    return write_hf_folder(path, CONFIG, decoder.init_params(CONFIG, 3), tokenizer)


@pytest.fixture(scope="module")
def scratch(folder, tmp_path_factory):
    """A copy of the folder, which each example changes."""
    path = tmp_path_factory.mktemp("scratch") / "llama"
    shutil.copytree(folder, path)
    return path


def read(path) -> None:
    """Everything that import does with a folder before it writes."""
    with contextlib.suppress(UserError):
        folder = HuggingFaceFolder(path)
        model = hf_config.from_hf(folder.config, f"{path}/config.json", RUN_SETTINGS)
        decoder.build(model)
        folder.load(model, sharding.make_mesh(1, -1, 1), "float32")


@settings(deadline=None)
@given(CHANGES, KINDS)
def test_any_values_in_config_json(folder, scratch, changes, architecture):
    described = json.loads((folder / "config.json").read_text())
    (scratch / "config.json").write_text(json.dumps(described | {"architectures": [architecture]} | changes))
    read(scratch)


@settings(deadline=None)
@given(JSON.map(json.dumps) | TEXT | st.binary())
def test_any_json_and_any_bytes_as_config_json(scratch, text):
    (scratch / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    read(scratch)


@settings(deadline=None)
@given(st.dictionaries(TEXT, JSON | TEXT.map("{}.safetensors".format) | st.just(SINGLE_FILE)) | JSON)
def test_any_index(folder, scratch, weight_map):
    shutil.copy(folder / "config.json", scratch)
    (scratch / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    try:
        read(scratch)
    finally:
        (scratch / INDEX_FILE).unlink()


@settings(deadline=None)
@given(st.data())
def test_weights_that_are_cut_or_have_flipped_bits(folder, scratch, data):
    """Mostly in the header, which says what the rest means."""
    shutil.copy(folder / "config.json", scratch)
    content = bytearray((folder / SINGLE_FILE).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for place in data.draw(st.lists(st.integers(0, header) | st.integers(0, len(content) - 1), max_size=3)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    (scratch / SINGLE_FILE).write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    read(scratch)
