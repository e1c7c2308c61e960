"""`networks.lora_flux`: names, order and sizes, files, learning rates, and the programs that read its files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from library.checkpoints import layout_flux, layout_t5
from library.models.flux import Flux, FluxParams
from library.models.t5 import T5TextEncoder
from networks import contract, lora_flux
from tests import network_hosts as hosts
from tests.flux_tiny import dataset, flux_family, train_flux
from tests.golden import FOLDER, golden_run
from tests.test_third_party_networks import lycoris_presets  # noqa: F401 (a fixture)

DATA = Path(__file__).parent / "data"


def shapes_in(name: str) -> dict[str, tuple[int, ...]]:
    with gzip.open(DATA / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        return {key: tuple(shape) for key, shape in json.load(file).items() if key != "_about"}


def meta_flux(**changes: int) -> Flux:
    params = layout_flux.transformer_config(shapes_in("keys_flux_dev"))
    with torch.device("meta"):
        return Flux(FluxParams(**{**params, **changes}))


@pytest.fixture(scope="module")
def full_size():
    from transformers import T5Config

    with torch.device("meta"):
        t5 = T5TextEncoder(T5Config(**layout_t5.t5_config(shapes_in("keys_t5xxl"))))
        return [hosts.ClipEncoder(768, 12, 3072), t5], meta_flux()


def make(encoders, flux, **arguments) -> lora_flux.LoRANetwork:
    with torch.device("meta"):
        return lora_flux.create_network(1.0, 4, 1.0, None, encoders, flux, **arguments)


# --- which layers ----------------------------------------------------------------------------------------------
def assert_as_listed(adapters, entries) -> None:
    assert [adapter.lora_name for adapter in adapters] == [entry["name"] for entry in entries]
    for adapter, entry in zip(adapters, entries, strict=True):
        assert adapter.lora_down.weight.shape == (4, entry["in"])
        assert adapter.lora_up.weight.shape == (entry["out"], 4)


def test_modules_have_the_listed_names_order_and_shapes(full_size):
    lists = json.loads((DATA / "lora_modules_flux.json").read_text(encoding="utf-8"))
    network = make(*full_size)
    assert_as_listed(network.text_encoder_loras, lists["text_encoder_1"])
    assert_as_listed(network.unet_loras, lists["unet"])
    assert (len(network.text_encoder_loras), len(network.unet_loras)) == (72, 304)
    assert network.train_t5xxl is False
    with_t5 = make(*full_size, train_t5xxl="True")
    assert_as_listed(with_t5.text_encoder_loras, lists["text_encoder_1"] + lists["text_encoder_t5_opt_in"])
    assert with_t5.train_t5xxl is True


def test_initial_weights_repeat_a_recorded_run():
    """The recorded run with seed 42: after six latent samples the generator makes exactly these weights."""
    recorded = golden_run("flux_lora_sigmoid").initial_weights
    family = flux_family()
    torch.manual_seed(42)
    for _ in range(6):
        torch.randn(1, 16, 16, 16)
    state = lora_flux.create_network(1.0, 4, 2.0, None, family.text_encoders, family.denoiser).state_dict()
    assert recorded
    for key, value in recorded.items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize(("asked", "expected"), [((None, None), (4, 1.0)), ((6, None), (6, 1.0)), ((2, 3), (2, 3.0))])
def test_rank_and_alpha_are_as_asked_for_or_four_and_one(asked, expected):
    family = flux_family()
    network = lora_flux.create_network(1.0, *asked, None, family.network_text_encoders(), family.denoiser)
    assert {(adapter.lora_dim, float(adapter.alpha)) for adapter in network.adapters} == {expected}


def test_encoders_may_be_missing(full_size):
    encoders, flux = full_size
    assert make([None, None], flux).text_encoder_loras == []
    assert len(make([encoders[0], None], flux, train_t5xxl="True").text_encoder_loras) == 72
    with pytest.raises(ValueError, match="DoubleStreamBlock, SingleStreamBlock"):
        lora_flux.create_network(1.0, 4, 1.0, None, [], torch.nn.Sequential(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("argument", ["train_blocks=single", "split_qkv=True", "in_dims=1,1,1,1,1", "ggpo_sigma=0.03"])
def test_arguments_that_do_not_work_yet_are_refused_by_name(argument, full_size):
    name, _, value = argument.partition("=")
    with pytest.raises(ValueError, match=rf"{name}={value}: networks.lora_flux does not support it yet"):
        make(*full_size, **{name: value})


def test_every_argument_of_the_original_is_known_or_named_as_missing():
    missing = lora_flux.LoRANetwork.unsupported_arguments
    wanted = set(
        "train_blocks train_double_block_indices train_single_block_indices in_dims split_qkv img_attn_dim "
        "txt_attn_dim img_mlp_dim txt_mlp_dim img_mod_dim txt_mod_dim single_dim single_mod_dim "
        "network_reg_dims network_reg_lrs ggpo_sigma ggpo_beta verbose".split()
    )
    assert wanted <= {*missing, *lora_flux.known_arguments()}
    for name in missing:
        [told] = lora_flux.argument_problems({name: "1"}, lineage="flux")
        assert f"{name}=1" in told and "does not support it yet" in told


def test_arguments_without_effect_are_accepted_and_unknown_ones_named(full_size, caplog):
    make(*full_size, train_blocks="all", split_qkv="False", conv_dim="4")
    assert "networks.lora_flux: no effect of the network arguments conv_dim" in caplog.text
    with pytest.raises(ValueError, match="block_dims: networks.lora_flux does not have it; it is for networks.lora"):
        make(*full_size, block_dims="4")


# --- learning rates --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rates", "expected"),
    [(None, [1e-3, 1e-3]), (2e-4, [2e-4, 2e-4]), ([2e-4], [2e-4, 2e-4]), ([2e-4, 3e-4], [2e-4, 3e-4])],
)
def test_each_text_encoder_has_its_rate(rates, expected, full_size):
    network = make(*full_size, train_t5xxl="True")
    groups, names = contract.optimizer_groups(network, rates, 5e-4, 1e-3)
    assert names == ["textencoder 1", "textencoder 2", "unet"]
    assert [group["lr"] for group in groups] == [*expected, 5e-4]
    assert [len(group["params"]) for group in groups] == [2 * 72, 2 * 168, 2 * 304]


def test_loraplus_makes_a_second_group(full_size):
    network = make(*full_size, loraplus_unet_lr_ratio="4")
    groups, names = contract.optimizer_groups(network, None, 1e-4, 1e-3)
    assert names == ["textencoder 1", "unet", "unet plus"]
    assert [group["lr"] for group in groups] == [1e-3, 1e-4, 4e-4]


# --- files -----------------------------------------------------------------------------------------------------
def filled(network) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        key: value if key.endswith("alpha") else torch.randn(value.shape) * 0.1
        for key, value in network.state_dict().items()
    }


def outputs(family) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(1, 16, 8, 8, generator=generator)
    with torch.no_grad():
        conditioning = family.encode_text(family.tokenize(["a cat"]))
        return family.predict(x_t, torch.tensor([500.0]), conditioning)


def test_a_saved_network_loads_merges_and_generates_alike(tmp_path):
    family = flux_family(t5xxl_max_token_length=16)
    plain = outputs(family)
    network = lora_flux.create_network(
        1.0, 2, 1.0, None, family.text_encoders, family.denoiser, train_t5xxl="True"
    )
    network.apply_to(family.text_encoders, family.denoiser)
    network.load_state_dict(filled(network))
    changed = outputs(family)
    assert (changed - plain).abs().max() > 1e-3
    path = tmp_path / "lora.safetensors"
    network.save_weights(path, torch.float32, {})

    again = flux_family(t5xxl_max_token_length=16)
    models = contract.HostModels(None, again.text_encoders, again.denoiser)
    hooked, weights = contract.create_for_generation("networks.lora_flux", path, models)
    assert hooked.train_t5xxl
    contract.apply(hooked, models, True, True)
    assert not hooked.load_state_dict(weights, strict=False).missing_keys
    assert_close(outputs(again), changed, rtol=1e-5, atol=1e-5)

    merged = flux_family(t5xxl_max_token_length=16)
    models = contract.HostModels(None, merged.text_encoders, merged.denoiser)
    contract.merge_base_weights("networks.lora_flux", path, 1.0, models, dtype=None, device="cpu")
    assert_close(outputs(merged), changed, rtol=1e-4, atol=1e-4)


def test_layers_outside_the_blocks_are_taken_from_a_file():
    family = flux_family()
    weights = {
        "lora_unet_img_in.lora_down.weight": torch.ones(3, 64), "lora_unet_img_in.lora_up.weight": torch.ones(64, 3),
        "lora_unet_guidance_in_out_layer.lora_down.weight": torch.ones(1, 64),
        "lora_unet_guidance_in_out_layer.lora_up.weight": torch.ones(64, 1),
    }  # fmt: skip
    network, _ = lora_flux.create_network_from_weights(
        1.0, None, None, family.text_encoders, family.denoiser, weights, for_inference=True
    )
    assert {adapter.lora_name: adapter.lora_dim for adapter in network.adapters} == {
        "lora_unet_img_in": 3, "lora_unet_guidance_in_out_layer": 1,
    }  # fmt: skip


# --- training through the script -------------------------------------------------------------------------------
def zero_ups(weights: dict[str, torch.Tensor], prefix: str) -> list[str]:
    ups = {key: value for key, value in weights.items() if key.startswith(prefix) and key.endswith("lora_up.weight")}
    assert ups
    return [key for key, value in ups.items() if not value.any()]


def test_clip_is_trained_live_while_t5_comes_from_the_cache(tmp_path, caplog):
    path = train_flux(
        "flux_train_network", "--dataset_config", dataset(tmp_path), "--cache_latents", "--cache_text_encoder_outputs",
        "--max_train_steps", "2", "--t5xxl_max_token_length", "32", output_dir=tmp_path,
    )  # fmt: skip
    weights = load_file(path)
    assert {key.split("_")[1] for key in weights} == {"unet", "te1"}
    assert not zero_ups(weights, "lora_unet_")
    assert not zero_ups(weights, "lora_te1_")


def test_t5_is_trained_on_request_with_masks_and_checkpointing(tmp_path):
    path = train_flux(
        "flux_train_network", "--dataset_config", dataset(tmp_path), "--network_args", "train_t5xxl=True",
        "--cache_latents", "--gradient_checkpointing", "--apply_t5_attn_mask", "--max_train_steps", "1",
        "--t5xxl_max_token_length", "32", output_dir=tmp_path,
    )  # fmt: skip
    weights = load_file(path)
    for prefix in ("lora_unet_", "lora_te1_", "lora_te3_"):
        assert not zero_ups(weights, prefix)


def test_cached_t5_cannot_be_trained(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_flux(
            "flux_train_network", "--dataset_config", dataset(tmp_path), "--network_args", "train_t5xxl=True",
            "--cache_text_encoder_outputs", "--max_train_steps", "1", output_dir=tmp_path,
        )  # fmt: skip
    assert "not possible while T5 is trained (train_t5xxl)" in capsys.readouterr().err


def test_lycoris_trains_every_block_under_comfyui_names(lycoris_presets, tmp_path):  # noqa: F811
    path = train_flux(
        "flux_train_network", "--dataset_config", dataset(tmp_path), "--network_module", "lycoris.kohya",
        "--network_args", "algo=lora", "--network_alpha", "2", "--cache_latents", "--max_train_steps", "2",
        "--learning_rate", "1e-2", "--t5xxl_max_token_length", "32", output_dir=tmp_path,
    )  # fmt: skip
    weights = load_file(path)
    names = {key.split(".")[0] for key in weights}
    own = json.loads((FOLDER / "runs" / "flux_lora_sigmoid.json").read_text())["saved_tensors"]
    blocks = {key.split(".")[0] for key in own}
    assert blocks and blocks <= names, sorted(blocks - names)[:3]
    assert any(name.startswith("lora_te1_text_model_encoder_layers_0_") for name in names)
    assert any(value.any() for key, value in weights.items() if "lora_up" in key)


# --- diffusers -------------------------------------------------------------------------------------------------
def direction(width: int) -> torch.Tensor:
    """A fixed vector: two low-rank changes that move it alike are alike, without a full matrix in memory."""
    return torch.randn(width, generator=torch.Generator().manual_seed(width))


def test_a_network_at_real_width_opens_in_diffusers_with_equal_changes(tmp_path):
    """diffusers' converter is written for the width 3072."""
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    flux = meta_flux(double_depth=1, single_depth=1)
    network = lora_flux.create_network(1.0, 2, 1.0, None, [hosts.ClipEncoder(64, 1, 128), None], flux)
    state = filled(network)
    path = tmp_path / "lora.safetensors"
    save_file(state, path)
    ours = {"img_in.weight": torch.zeros(3072)}  # says the width
    for name, layer in flux.named_modules():
        up, down = (state.get(f"lora_unet_{name.replace('.', '_')}.lora_{part}.weight") for part in ("up", "down"))
        if up is not None and down is not None:
            ours[f"{name}.weight"] = up @ (down @ direction(layer.in_features)) * (1.0 / 2)
    assert len(ours) == 1 + 13
    expected = dict(layout_flux.to_diffusers(ours))
    expected.pop("x_embedder.weight")
    theirs = FluxLoraLoaderMixin.lora_state_dict(str(path))
    assert len([key for key in theirs if key.startswith("transformer.")]) == 2 * len(expected)
    for name, moved in expected.items():
        down, up = (theirs[f"transformer.{name.removesuffix('.weight')}.lora_{letter}.weight"] for letter in "AB")
        assert_close(up @ (down @ direction(down.shape[1])), moved, rtol=1e-4, atol=1e-4)
    assert any(key.startswith("text_encoder.text_model.encoder.layers.0.") for key in theirs)
