"""T5: its files in every accepted layout, its sizes, its tokenizer."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.checkpoints import layout_t5
from library.checkpoints.tensors import TensorDict, open_tensors
from library.models.t5 import T5TextEncoder, build_t5
from library.text import t5
from tests.flux_tiny import (
    FILES,
)
from tests.training import TOKENIZERS

DATA = Path(__file__).parent / "data"


def test_t5_has_the_keys_and_shapes_of_the_full_size_file():
    from transformers import T5Config

    with gzip.open(DATA / "keys_t5xxl.json.gz", "rt", encoding="utf-8") as file:
        listed = {key: tuple(shape) for key, shape in json.load(file).items() if key != "_about"}
    with torch.device("meta"):
        model = T5TextEncoder(T5Config(**layout_t5.t5_config(listed)))
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert found == {key: shape for key, shape in listed.items() if key != "encoder.embed_tokens.weight"}
    assert len(found) == 219
    assert model.config.dense_act_fn == "gelu_new"


def t5_outputs(tensors: dict[str, Tensor]) -> Tensor:
    part = layout_t5.encoder_tensors(TensorDict(tensors, source="test"), option="--t5xxl")
    with torch.no_grad():
        return build_t5(part, dtype=torch.float32)(torch.tensor([[5, 6, 1, 0]])).last_hidden_state


def test_t5_files_of_every_layout_are_the_same_encoder():
    plain = load_file(FILES["t5xxl"])
    expected = t5_outputs(plain)
    table = plain["shared.weight"]
    inner = {key: value for key, value in plain.items() if key != "shared.weight"}
    for tensors in (
        {**inner, "encoder.embed_tokens.weight": table},
        {**plain, "encoder.embed_tokens.weight": table.clone()},
        {f"text_encoders.t5xxl.transformer.{key}": value for key, value in plain.items()},
        {f"transformer.{key}": value for key, value in plain.items()},
        {**plain, "decoder.block.0.layer.0.layer_norm.weight": torch.ones(1), "lm_head.weight": torch.ones(2)},
    ):
        assert torch.equal(t5_outputs(tensors), expected)


def test_t5_weights_of_eight_bits_are_widened_and_other_ones_refused():
    plain = load_file(FILES["t5xxl"])
    small = {key: value.to(torch.float8_e4m3fn) for key, value in plain.items()}
    assert torch.equal(t5_outputs(small), t5_outputs({key: value.float() for key, value in small.items()}))
    with pytest.raises(ValueError, match="float8_e5m2; of 8-bit weights only float8_e4m3fn"):
        t5_outputs({key: value.to(torch.float8_e5m2) for key, value in plain.items()})
    with pytest.raises(ValueError, match="holds scaled fp8 weights"):
        t5_outputs({**small, "encoder.block.0.layer.0.SelfAttention.q.scale_weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"--t5xxl test holds no T5 encoder"):
        t5_outputs(load_file(FILES["clip_l"]))
    with pytest.raises(ValueError, match=r"blocks up to 1, but none of \[0\]"):
        layout_t5.t5_config({"shared.weight": (4, 4), "encoder.block.1.layer.0.layer_norm.weight": (4,)})


def test_t5_tokenizer_pads_cuts_and_travels():
    tokenizer = pickle.loads(pickle.dumps(t5.load_tokenizer(cache_dir=TOKENIZERS)))
    ids, mask = tokenizer.ids_and_mask(["a cat", "a cat girl " * 20], 12)
    assert ids.shape == mask.shape == (2, 12) and ids.dtype == mask.dtype == torch.int64
    length = int(mask[0].sum())
    assert ids[0, length - 1] == 1 and not ids[0, length:].any() and not mask[0, length:].any()
    assert ids[1, -1] == 1 and mask[1].all()


def test_a_tokenizer_of_another_kind_beside_the_model_is_passed_over(tmp_path):
    shutil.copytree(TOKENIZERS / "openai_clip-vit-large-patch14", tmp_path / "tokenizer_2")
    shutil.copy(TOKENIZERS / "google_t5-v1_1-xxl" / "spiece.model", tmp_path / "tokenizer_2" / "tokenizer.json")
    with pytest.raises(FileNotFoundError, match="google/t5-v1_1-xxl.*tokenizer_2"):
        t5.load_tokenizer(t5.T5_XXL, model_path=tmp_path / "nowhere", with_download=False)
    found = t5.load_tokenizer(model_path=tmp_path, cache_dir=TOKENIZERS, with_download=False)
    assert found.source == str(TOKENIZERS / "google_t5-v1_1-xxl")


def test_train_mode_changes_nothing():
    """Gradient checkpointing needs train mode, also of frozen encoders."""
    encoder = build_t5(layout_t5.encoder_tensors(open_tensors(FILES["t5xxl"]), option="--t5xxl"), dtype=torch.float32)
    ids = torch.tensor([[5, 6, 1, 0]])
    expected = encoder(ids).last_hidden_state
    assert torch.equal(encoder.train()(ids).last_hidden_state, expected)
