"""LoRA for SD3: which layers, under which names and in which order, T5 on request, files, LyCORIS on the same model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.checkpoints import layout_sd3
from library.families.base import Conditioning
from library.families.sd3 import StableDiffusion3
from networks import contract, lora_sd3
from networks.contract import HostModels, NetworkRequest
from tests.sd3_tiny import denoiser_inputs, tiny_family
from tests.test_mmdit import full_size, meta_model

DATA = Path(__file__).parent / "data"
MODULE = "networks.lora_sd3"


@pytest.fixture(scope="module")
def family() -> StableDiffusion3:
    return tiny_family()


def models_of(family: StableDiffusion3) -> HostModels:
    return HostModels(family.vae, family.network_text_encoders(), family.denoiser)


def create(family: StableDiffusion3, **arguments: Any) -> Any:
    return contract.create(NetworkRequest(MODULE, dim=2, alpha=1.0, arguments=arguments), models_of(family))


def full_size_clip(layers: int, width: int, mlp: int) -> nn.Module:
    from transformers import CLIPTextConfig

    from library.models.text_encoders import ClipTextEncoder

    with torch.device("meta"):
        return ClipTextEncoder(CLIPTextConfig(hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
                                              num_attention_heads=width // 64), with_projection=True)


@pytest.mark.parametrize("kind", ["sd3_medium", "sd35_large", "sd35_medium"])
def test_modules_of_full_size_models_have_the_published_names_in_order(kind):
    with gzip.open(DATA / "lora_modules_sd3.json.gz", "rt") as file:
        wanted = json.load(file)
    encoders = [full_size_clip(12, 768, 3072), full_size_clip(32, 1280, 5120), None]
    denoiser = meta_model(layout_sd3.transformer_tensors(full_size(kind)))
    with torch.device("meta"):
        network = lora_sd3.create_network(1.0, 4, 2.0, None, encoders, denoiser)
    names = [adapter.lora_name for adapter in network.adapters]
    lists = (wanted["text_encoder_1"], wanted["text_encoder_2"], wanted[f"mmdit_{kind}"])
    assert names == [entry["name"] for entries in lists for entry in entries]
    for adapter, entry in zip(network.unet_loras, wanted[f"mmdit_{kind}"], strict=True):
        assert tuple(adapter.lora_down.weight.shape) == (4, entry["in"])
        assert tuple(adapter.lora_up.weight.shape) == (entry["out"], 4)


@pytest.mark.parametrize(("asked", "expected"), [((None, None), (4, 1.0)), ((6, None), (6, 1.0)), ((2, 3), (2, 3.0))])
def test_rank_and_alpha_are_as_asked_for_or_four_and_one(family, asked, expected):
    network = lora_sd3.create_network(1.0, *asked, None, family.network_text_encoders(), family.denoiser)
    assert {(adapter.lora_dim, float(adapter.alpha)) for adapter in network.adapters} == {expected}


def test_t5_is_adapted_only_on_request(family):
    plain, with_t5 = create(family), create(family, train_t5xxl="True")
    added = {adapter.lora_name for adapter in with_t5.adapters} - {adapter.lora_name for adapter in plain.adapters}
    assert not plain.train_t5xxl and with_t5.train_t5xxl
    assert len(added) == 2 * 7 and all(name.startswith("lora_te3_encoder_block_") for name in added)
    assert "lora_te3_encoder_block_0_layer_0_SelfAttention_q" in added
    assert "lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_0" in added
    assert not create(tiny_family(t5xxl=None), train_t5xxl="True").of_encoder(2)


def test_every_encoder_has_a_group_and_a_rate_of_its_own(family):
    network = create(family, train_t5xxl="True")
    network.apply_to(family.text_encoders, family.denoiser, True, True)
    try:
        groups, names = contract.optimizer_groups(network, [1e-3, 2e-3], 3e-3, None)
        assert names == ["textencoder 1", "textencoder 2", "textencoder 3", "unet"]
        assert [group["lr"] for group in groups] == [1e-3, 2e-3, 2e-3, 3e-3]
    finally:
        for adapter in network.adapters:
            adapter.host.forward = adapter.org_forward


@pytest.mark.parametrize(
    "argument", ["emb_dims=[4,4,4,4,4,4]", "split_qkv=True", "train_block_indices=0-1", "x_attn_dim=2"]
)
def test_arguments_that_do_not_work_yet_are_refused_by_name(family, argument):
    key, value = argument.split("=")
    with pytest.raises(ValueError, match=f"network argument {key}="):
        create(family, **{key: value})


def output(family: StableDiffusion3) -> torch.Tensor:
    given = denoiser_inputs(family)
    with torch.no_grad():
        return family.predict(
            given["x_t"], given["timesteps"], Conditioning({n: given[n] for n in ("context", "vector")})
        )


def trained_file(path: Path) -> tuple[Path, torch.Tensor]:
    """A file with random weights, and what the model gives with them."""
    family = tiny_family()
    network = create(family)
    network.apply_to(family.text_encoders, family.denoiser, True, True)
    torch.manual_seed(1)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.3)
    network.save_weights(path, None, {"ss_network_module": MODULE})
    return path, output(family)


def test_a_saved_file_loads_applies_and_merges_alike(tmp_path):
    path, wanted = trained_file(tmp_path / "network.safetensors")
    plain = output(tiny_family())
    assert not torch.allclose(plain, wanted, atol=1e-2)
    keys = load_file(path).keys()
    assert "lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight" in keys
    assert "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha" in keys
    assert not any("joint_blocks_2_context_block_mlp" in key for key in keys)  # the last block's text side ends early

    applied = tiny_family()
    network, weights = contract.create_for_generation(MODULE, path, models_of(applied))
    contract.apply(network, models_of(applied), True, True)
    network.load_state_dict(weights)
    assert torch.allclose(output(applied), wanted, atol=1e-5)

    merged = tiny_family()
    network, weights = contract.create_for_generation(MODULE, path, models_of(merged))
    network.merge_to(merged.text_encoders, merged.denoiser, weights)
    assert torch.allclose(output(merged), wanted, atol=1e-4)


def test_lycoris_adapts_the_same_model():
    from lycoris.kohya import LycorisNetworkKohya

    before = {key: value for key, value in vars(LycorisNetworkKohya).items() if key.isupper()}
    family = tiny_family()
    try:
        network = contract.create(
            NetworkRequest("lycoris.kohya", dim=2, alpha=1.0, arguments={"algo": "lora", "preset": "full"}),
            models_of(family),
        )
        contract.apply(network, models_of(family), True, True)
    finally:
        for key, value in before.items():
            setattr(LycorisNetworkKohya, key, value)
    names = [adapter.lora_name for adapter in network.unet_loras]
    assert len(names) > 20 and len(network.text_encoder_loras) > 20
    assert "lora_unet_joint_blocks_0_x_block_attn_qkv" in names
