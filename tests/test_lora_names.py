"""Names, order, shapes and initial values of LoRA modules, against lists of the full-size models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.checkpoints import layout_unet
from networks import lora
from networks.naming_unet import place_in_diffusers, place_in_original
from networks.targets import find_targets
from tests import network_hosts as hosts

DATA = Path(__file__).parent / "data"


def module_lists(family: str) -> dict:
    return json.loads((DATA / f"lora_modules_{family}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sd15():
    with torch.device("meta"):
        return hosts.ClipEncoder(768, 12, 3072), hosts.sd_unet(**hosts.FULL_SD15)


@pytest.fixture(scope="module")
def sd21():
    with torch.device("meta"):
        return hosts.ClipEncoder(1024, 23, 4096), hosts.sd_unet(**hosts.FULL_SD21)


@pytest.fixture(scope="module")
def sdxl():
    with torch.device("meta"):
        unet = hosts.sdxl_unet(**hosts.FULL_SDXL)
        return [hosts.ClipEncoder(768, 12, 3072), hosts.ClipEncoder(1280, 32, 5120)], unet


def make(models, **arguments) -> lora.LoRANetwork:
    with torch.device("meta"):
        return lora.create_network(1.0, 4, 1.0, None, *models, **arguments)


def assert_same_modules(adapters, entries) -> None:
    assert [adapter.lora_name for adapter in adapters] == [entry["name"] for entry in entries]
    assert_same_shapes(adapters, entries)


def assert_same_shapes(adapters, entries, conv_rank: int = 4) -> None:
    expected = {entry["name"]: entry for entry in entries}
    for adapter in adapters:
        entry = expected[adapter.lora_name]
        rank = conv_rank if entry["kernel"] and entry["kernel"] != [1, 1] else 4
        spatial = tuple(entry["kernel"] or ())
        assert adapter.lora_down.weight.shape == (rank, entry["in"], *spatial), adapter.lora_name
        assert adapter.lora_up.weight.shape == (entry["out"], rank, *(1 for _ in spatial)), adapter.lora_name
        if spatial:
            assert list(adapter.lora_down.stride) == entry["stride"]
            assert list(adapter.lora_down.padding) == entry["padding"]


def test_sd15_modules_have_the_listed_names_order_and_shapes(sd15):
    network, lists = make(sd15), module_lists("sd15")
    assert (len(network.text_encoder_loras), len(network.unet_loras)) == (72, 192)
    assert_same_modules(network.text_encoder_loras, lists["text_encoder"])
    assert_same_modules(network.unet_loras, lists["unet"])


def test_sd21_modules_have_linear_projections_under_the_listed_names(sd21):
    network, lists = make(sd21), module_lists("sd21")
    linear = {entry["name"]: entry for entry in lists["unet_linear_projection_variant"]}
    assert len(linear) == 32
    assert_same_modules(network.text_encoder_loras, lists["text_encoder"])
    assert_same_modules(network.unet_loras, [linear.get(entry["name"], entry) for entry in lists["unet"]])


def test_sdxl_modules_have_the_listed_names_order_and_shapes(sdxl):
    network, lists = make(sdxl), module_lists("sdxl")
    assert_same_modules(network.text_encoder_loras, lists["text_encoder_1"] + lists["text_encoder_2"])
    assert len(network.unet_loras) == 722
    assert_same_modules(network.unet_loras, lists["unet"])


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_conv_dim_adds_resnets_and_resamplers(family, request):
    network, lists = make(request.getfixturevalue(family), conv_dim="2"), module_lists(family)
    linear = {entry["name"]: entry for entry in lists.get("unet_linear_projection_variant", [])}
    entries = [linear.get(entry["name"], entry) for entry in lists["unet"] + lists["unet_conv_dim_extra"]]
    assert {adapter.lora_name for adapter in network.unet_loras} == {entry["name"] for entry in entries}
    assert_same_shapes(network.unet_loras, entries, conv_rank=2)


def test_conv_targets_of_one_network_do_not_leak_into_the_next(sd15):
    assert len(make(sd15, conv_dim="2").unet_loras) == 278
    assert len(make(sd15).unet_loras) == 192


def test_keys_and_shapes_equal_a_recorded_file(sd15):
    recorded = json.loads((DATA / "lora_file_sd15_example.json").read_text(encoding="utf-8"))["tensors"]
    state = make(sd15).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == {
        key: value["shape"] for key, value in recorded.items()
    }


def test_clip_without_its_text_model_level_gets_the_same_names():
    wrapped = find_targets(hosts.ClipEncoder(), "lora_te", ["CLIPAttention", "CLIPMLP"])
    bare = find_targets(hosts.bare_clip(), "lora_te", ["CLIPAttention", "CLIPMLP"])
    assert [target.name for target in bare] == [target.name for target in wrapped]
    assert bare[0].name == "lora_te_text_model_encoder_layers_0_self_attn_k_proj"


def test_nested_target_classes_are_refused():
    with pytest.raises(ValueError, match="lora_te_text_model_encoder_layers_0_self_attn_k_proj"):
        find_targets(hosts.ClipEncoder(), "lora_te", ["CLIPAttention", "CLIPEncoderLayer"])


def test_one_encoder_in_a_list_is_named_like_a_bare_one():
    network = lora.create_network(1.0, 4, 1.0, None, [hosts.ClipEncoder()], hosts.sd_unet())
    assert network.text_encoder_loras[0].lora_name.startswith("lora_te_text_model")


def test_initial_weights_repeat_a_recorded_run():
    """A recorded SDXL run with seed 42: after six latent samples the generator makes exactly these weights."""
    recorded = load_file(DATA / "golden" / "runs" / "init" / "init_c7023a71.safetensors")
    unet = hosts.sdxl_unet()
    encoders = [hosts.ClipEncoder(64, 3, 128), hosts.ClipEncoder(128, 3, 128)]
    torch.manual_seed(42)
    for _ in range(6):
        torch.randn(1, 4, 16, 16)
    state = lora.create_network(1.0, 4, 2.0, None, encoders, unet).state_dict()
    assert len(recorded) == 182
    for key, value in recorded.items():
        assert torch.equal(state[key], value), key
    ups = [value for key, value in state.items() if "lora_up" in key]
    assert all(not value.any() for value in ups)


def test_a_model_without_target_layers_is_an_error():
    with pytest.raises(ValueError, match="Transformer2DModel"):
        lora.create_network(1.0, 4, 1.0, None, hosts.ClipEncoder(), nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="CLIPAttention"):
        lora.create_network(1.0, 4, 1.0, None, nn.Linear(4, 4), hosts.sd_unet())


# --- checkpoints' names --------------------------------------------------------------------------------------
def flat_names(keys: Mapping[str, str]) -> dict[str, str]:
    """Layers with underscores, of weights under two names."""
    return {one.removesuffix(".weight").replace(".", "_"): two.removesuffix(".weight").replace(".", "_")
            for one, two in keys.items() if one.endswith(".weight")}  # fmt: skip


def test_layers_of_sd_files_are_known_by_the_names_of_checkpoints(sd15):
    pairs = flat_names(layout_unet.names_to_original(sd15[1].state_dict()))
    assert len(pairs) > 300
    for ours, original in pairs.items():
        place = place_in_diffusers(original)
        assert place is not None and place.layer == ours, original


def test_layers_of_sdxl_files_are_known_by_the_names_of_diffusers(sdxl):
    pairs = flat_names(layout_unet.names_to_diffusers(sdxl[1].state_dict()))
    assert len(pairs) > 800
    for ours, theirs in pairs.items():
        place = place_in_original(theirs)
        assert place is not None and place.layer == ours, theirs
