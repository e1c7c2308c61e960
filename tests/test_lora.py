"""LoRA: forward maths, dropouts, optimizer groups, norms, files, merging."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

from library.hashes import sshs_hashes
from networks import lora
from networks.adapter import Dropouts
from networks.naming_unet import DIFFUSERS_TO_SAI, convert_diffusers_to_sai_if_needed, original_layer_name
from tests import network_hosts as hosts

DATA = Path(__file__).parent / "data"

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 7, 6)),
    "conv1x1": (lambda: nn.Conv2d(6, 5, 1), (2, 6, 4, 4)),
    "conv3x3_stride2": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 9, 9)),
    "conv2x2": (lambda: nn.Conv2d(6, 5, 2, stride=2), (2, 6, 4, 4)),
}


def module_on(
    layer: nn.Module, *, size: int = 3, alpha: float = 1.5, inference: bool = False, **dropouts: float
) -> lora.LoRAModule:
    kind = lora.LoRAInfModule if inference else lora.LoRAModule
    module = kind("lora_unet_x", layer, 1.0, size, alpha, Dropouts(**dropouts))
    hosts.randomize(module, 1.0)
    return module


@pytest.fixture
def models():
    torch.manual_seed(0)
    return hosts.ClipEncoder(), hosts.sd_unet()


def make(models, rank=4, alpha=2.0, **arguments) -> lora.LoRANetwork:
    return lora.create_network(1.0, rank, alpha, None, *models, **arguments)


def applied(models, rank=4, alpha=2.0, **arguments) -> lora.LoRANetwork:
    network = make(models, rank, alpha, **arguments)
    network.apply_to(*models, True, True)
    return network


def predict(unet: nn.Module, inputs) -> torch.Tensor:
    with torch.no_grad():
        return unet(**inputs).sample


# --- one module ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("inference", [False, True])
def test_forward_adds_scaled_up_times_down(kind, inference):
    torch.manual_seed(0)
    make_layer, shape = LAYERS[kind]
    layer, x = make_layer(), torch.randn(shape)
    original = layer(x)
    module = module_on(layer, inference=inference)
    module.multiplier = 0.7
    module.apply_to()
    delta = torch.einsum("or,r...->o...", module.lora_up.weight.flatten(1), module.lora_down.weight) * (0.7 * 1.5 / 3)
    changed = type(layer)(*layer_arguments(layer), bias=False)
    changed.weight.data = delta
    torch.testing.assert_close(layer(x), original + changed(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.get_weight(), delta)
    torch.testing.assert_close(module.get_weight(1.0) * 0.7, delta)


def layer_arguments(layer: nn.Module) -> tuple:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding


@pytest.mark.parametrize("kind", LAYERS)
def test_merged_layer_equals_hooked_layer(kind):
    torch.manual_seed(0)
    make_layer, shape = LAYERS[kind]
    layer, x = make_layer(), torch.randn(shape)
    module = module_on(layer)
    module.apply_to()
    hooked = layer(x)
    module.enabled = False
    module.merge_to_host()
    torch.testing.assert_close(layer(x), hooked, atol=1e-5, rtol=1e-5)


def test_a_new_module_changes_nothing():
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    original = layer(x)
    lora.LoRAModule("lora_unet_x", layer).apply_to()
    assert torch.equal(layer(x), original)


@pytest.mark.parametrize("alpha", [None, 0, 0.0])
def test_alpha_of_nothing_means_the_rank(alpha):
    module = lora.LoRAModule("lora_unet_x", nn.Linear(6, 5), 1.0, 4, alpha)
    assert module.scale == 1.0
    assert module.alpha.dtype == torch.float32 and float(module.alpha) == 4.0


def test_modules_stack_and_switch_off():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    original = layer(x)
    first, second = module_on(layer), module_on(layer)
    first.apply_to()
    second.apply_to()
    both = original + nn.functional.linear(x, first.get_weight() + second.get_weight())
    torch.testing.assert_close(layer(x), both, atol=1e-5, rtol=1e-5)
    first.enabled = False
    torch.testing.assert_close(layer(x), original + nn.functional.linear(x, second.get_weight()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dropouts", [{"neuron": 0.3}, {"rank": 0.3}, {"neuron": 0.2, "rank": 0.4}])
def test_dropouts_keep_the_expected_output(dropouts):
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    module = module_on(layer, size=8, alpha=8.0, **dropouts)
    module.apply_to()
    x = torch.randn(1, 6)
    module.eval()
    expected = layer(x)
    module.train()
    samples = layer(x.expand(60_000, 6))
    error = (samples.mean(0) - expected[0]).abs() / (samples.std(0) / 60_000**0.5)
    assert error.max() < 4.5  # standard errors
    assert samples.std(0).min() > 0.1


@pytest.mark.parametrize(("shape", "layer"), [((2, 6), "linear"), ((2, 7, 6), "linear"), ((2, 6, 4, 4), "conv1x1")])
def test_rank_dropout_drops_the_same_ranks_for_a_whole_sample(shape, layer):
    torch.manual_seed(3)
    host = LAYERS[layer][0]()
    module = module_on(host, size=4, alpha=4.0, rank=0.5)
    with torch.no_grad():  # every rank writes to one output of its own
        module.lora_up.weight.zero_()
        module.lora_up.weight.flatten(1)[:4] = torch.eye(4)
        host.weight.zero_()
        host.bias.zero_()
    module.apply_to()
    x = torch.randn(shape)
    kept = module.lora_down(x) / 0.5
    output = host(x)
    if layer == "linear":
        output, kept = output.movedim(-1, 1), kept.movedim(-1, 1)
    output, kept = output[:, :4].reshape(2, 4, -1), kept.reshape(2, 4, -1)
    is_kept = (output != 0).all(-1)
    torch.testing.assert_close(output, kept * is_kept[..., None])
    assert 0 < int(is_kept.sum()) < 8


def test_module_dropout_of_one_leaves_the_layer_alone_in_training_only():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    original = layer(x)
    module = module_on(layer, module=1.0)
    module.apply_to()
    assert torch.equal(layer(x), original)
    module.eval()
    assert not torch.equal(layer(x), original)


def test_inference_modules_never_drop():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    module = module_on(layer, inference=True, neuron=0.9, rank=0.9, module=1.0)
    module.apply_to()
    module.train()
    expected = nn.functional.linear(x, layer.weight + module.get_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("asked", "expected"), [
    ((None, None), (4, 1.0)), ((6, None), (6, 1.0)), ((None, 3), (4, 3.0)), ((2, 0.5), (2, 0.5)),
])  # fmt: skip
def test_rank_and_alpha_are_as_asked_for_or_four_and_one(models, asked, expected):
    network = make(models, *asked)
    assert {(adapter.lora_dim, float(adapter.alpha)) for adapter in network.adapters} == {expected}
    state = network.state_dict()
    assert {tensor.shape[0] for name, tensor in state.items() if "lora_down" in name} == {expected[0]}
    assert {tensor.shape[1] for name, tensor in state.items() if "lora_up" in name} == {expected[0]}


def test_convolutions_have_ranks_and_alphas_of_their_own(models):
    made = make(models, 6, 2.0, conv_dim="3").adapters
    kinds = {(item.lora_down.weight.shape[2:] == (3, 3), item.lora_dim, float(item.alpha)) for item in made}
    assert kinds == {(False, 6, 2.0), (True, 3, 1.0)}


@pytest.mark.parametrize("arguments", [{"rank_dropout": "1.5"}, {"module_dropout": "x"}, {"conv_dim": "2.5"}])
def test_bad_arguments_are_named(models, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make(models, **arguments)


def test_unknown_arguments_are_refused_with_the_nearest_but_not_dropout(models, caplog):
    with pytest.raises(ValueError, match="conv_dimm is unknown to networks.lora; did you mean conv_dim"):
        make(models, conv_dimm="4")
    with pytest.raises(ValueError, match="img_attn_dim: networks.lora does not have it; it is for networks.lora_flux"):
        make(models, img_attn_dim="4")
    make(models, dropout=None)
    assert "--network_dropout" not in caplog.text
    network = make(models, dropout="0.3")
    assert "networks.lora ignores the network argument dropout; use --network_dropout" in caplog.text
    assert {adapter.dropouts for adapter in network.adapters} == {Dropouts()}


@pytest.mark.parametrize("argument", ["rank_dropout", "module_dropout"])
def test_dropping_everything_is_refused(models, argument):
    with pytest.raises(ValueError, match=f"{argument}=1 drops everything"):
        make(models, **{argument: "1"})


# --- the network -----------------------------------------------------------------------------------------------
def test_parts_that_are_not_trained_are_neither_hooked_nor_saved(models):
    network = make(models)
    network.apply_to(*models, False, True)
    assert network.text_encoder_loras == []
    assert all(key.startswith("lora_unet_") for key in network.state_dict())
    layer = models[0].text_model.encoder.layers[0].mlp.fc1
    assert "forward" not in vars(layer)
    assert "forward" in vars(models[1].mid_block.attentions[0].proj_in)


def test_gradients_reach_only_the_network(models):
    for model in models:
        model.requires_grad_(False)
    network = applied(models)
    hosts.randomize(network)
    network.prepare_grad_etc(*models)
    inputs = dict(hosts.unet_inputs(models[1]))
    inputs["encoder_hidden_states"] = models[0](torch.randint(0, 90, (2, 7)))
    models[1](**inputs).sample.square().mean().backward()
    grads = [parameter.grad for parameter in network.parameters()]
    assert all(grad is not None for grad in grads)
    assert sum(float(grad.abs().sum()) > 0 for grad in grads) > 0.95 * len(grads)
    assert all(parameter.grad is None for model in models for parameter in model.parameters())


def test_multiplier_scales_and_disabling_removes_the_change(models):
    inputs = hosts.unet_inputs(models[1])
    original = predict(models[1], inputs)
    network = applied(models)
    hosts.randomize(network)
    assert (predict(models[1], inputs) - original).abs().max() > 1e-3
    network.set_enabled(False)
    assert torch.equal(predict(models[1], inputs), original)
    network.set_enabled(True)
    network.set_multiplier(0.0)
    assert torch.equal(predict(models[1], inputs), original)


# --- optimizer groups ------------------------------------------------------------------------------------------
def group_table(network, *rates):
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(*rates)
    return [(name, group["lr"], len(group["params"])) for name, group in zip(names, groups, strict=True)]


def test_groups_are_text_encoder_then_unet(models):
    assert group_table(applied(models), 5e-4, 1e-3, 1e-4) == [("textencoder", 5e-4, 24), ("unet", 1e-3, 384)]
    assert group_table(applied(models), None, None, 1e-4) == [("textencoder", 1e-4, 24), ("unet", 1e-4, 384)]


def test_plus_ratio_makes_groups_of_up_factors(models):
    network = applied(models, loraplus_lr_ratio="4", loraplus_unet_lr_ratio="16")
    assert group_table(network, None, None, 1e-3) == [
        ("textencoder", 1e-3, 12), ("textencoder plus", 4e-3, 12), ("unet", 1e-3, 192), ("unet plus", 1.6e-2, 192),
    ]  # fmt: skip
    groups, _ = network.prepare_optimizer_params(None, None, 1e-3)
    ups = {id(module.lora_up.weight) for module in network.unet_loras}
    assert {id(parameter) for parameter in groups[3]["params"]} == ups


def test_blocks_with_factors_have_groups_in_order_of_appearance(models):
    network = applied(models, down_lr_weight="linear", mid_lr_weight="0.5", loraplus_lr_ratio="2")
    table = group_table(network, 0.0, 1e-2, 1e-4)
    names = [name for name, _, _ in table]
    order = [*(1, 2, 4, 5, 7, 8), *range(16, 25), 12]
    assert names == [name for index in order for name in (f"unet_block{index}", f"unet_block{index} plus")]
    rates = {name: rate for name, rate, _ in table}
    assert rates["unet_block4"] == pytest.approx(1e-2 * 4 / 11)
    assert rates["unet_block12 plus"] == pytest.approx(1e-2)


def test_parts_without_a_rate_are_frozen(models):
    network = applied(models)
    assert group_table(network, [0.0], 1e-3, 1e-4) == [("unet", 1e-3, 384)]
    network.prepare_grad_etc(*models)
    assert not any(p.requires_grad for module in network.text_encoder_loras for p in module.parameters())
    assert len(list(network.get_trainable_params())) == 384


def test_no_rate_at_all_is_an_error(models):
    with pytest.raises(ValueError, match="--learning_rate"):
        applied(models).prepare_optimizer_params(0.0, 0.0, 0.0)


def test_two_encoders_may_have_rates_of_their_own():
    unet = hosts.sdxl_unet()
    network = applied(([hosts.ClipEncoder(), hosts.ClipEncoder(32, 3)], unet))
    assert group_table(network, [1e-4, 2e-4], 1e-3, None) == [
        ("textencoder 1", 1e-4, 24), ("textencoder 2", 2e-4, 36), ("unet", 1e-3, 364),
    ]  # fmt: skip
    assert group_table(network, [1e-4], 1e-3, None)[0] == ("textencoder", 1e-4, 60)


# --- max-norm --------------------------------------------------------------------------------------------------
def test_max_norm_scales_only_what_is_too_strong(models):
    network = applied(models, conv_dim="2")
    hosts.randomize(network, 0.5)
    before = [module.get_weight(1.0).detach().norm() for module in network.adapters]
    limit = float(torch.stack(before).median())
    count, mean, largest = network.apply_max_norm_regularization(limit, "cpu")
    after = [module.get_weight(1.0).detach().norm() for module in network.adapters]
    assert count == sum(float(norm) > limit for norm in before) and 0 < count < len(before)
    for old, new in zip(before, after, strict=True):
        assert float(new) == pytest.approx(min(float(old), limit), rel=1e-4)
    assert mean == pytest.approx(float(torch.stack(after).mean()), rel=1e-4)
    assert largest == pytest.approx(limit, rel=1e-4)


def test_max_norm_of_a_fresh_network_is_zero(models):
    network = applied(models)
    downs = [module.lora_down.weight.clone() for module in network.adapters]
    assert network.apply_max_norm_regularization(1.0, "cpu") == (0, 0.0, 0.0)
    assert all(torch.equal(old, module.lora_down.weight) for old, module in zip(downs, network.adapters, strict=True))


# --- files -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_saving_and_loading_is_exact_and_byte_stable(models, tmp_path):
    network = applied(models)
    hosts.randomize(network)
    metadata = {"ss_network_dim": "4", "modelspec.title": "x"}
    network.save_weights(tmp_path / "a.safetensors", None, metadata)
    other = applied(models)
    other.load_weights(tmp_path / "a.safetensors")
    for key, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    other.save_weights(tmp_path / "b.safetensors", None, metadata)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_saved_tensors_are_cast_and_hashed_as_written(models, tmp_path, dtype):
    network = applied(models)
    hosts.randomize(network)
    path = tmp_path / "a.safetensors"
    network.save_weights(path, dtype, {"ss_network_dim": "4", "modelspec.title": "x"})
    written = load_file(path)
    assert {value.dtype for value in written.values()} == {dtype or torch.float32}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    serialised = save(written, {"ss_network_dim": "4"})
    start = 8 + int.from_bytes(serialised[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(serialised[start:]).hexdigest()
    assert metadata["sshs_legacy_hash"] == sshs_hashes(written, {"ss_network_dim": "4"}).legacy_hash
    assert metadata["modelspec.title"] == "x"


@pytest.mark.slow
def test_pickles_hold_the_same_tensors(models, tmp_path):
    network = applied(models)
    hosts.randomize(network)
    network.save_weights(tmp_path / "a.pt", torch.float32, {"ss_network_dim": "4"})
    other = applied(models)
    other.load_weights(tmp_path / "a.pt")
    assert all(torch.equal(other.state_dict()[key], value) for key, value in network.state_dict().items())


def test_loading_takes_alpha_and_scale_from_the_file(models, tmp_path):
    applied(models, alpha=4.0).save_weights(tmp_path / "a.safetensors", None, {})
    network = applied(models, alpha=1.0)
    assert network.unet_loras[0].scale == 0.25
    network.load_weights(tmp_path / "a.safetensors")
    assert {module.scale for module in network.adapters} == {1.0}


def test_file_without_alpha_has_alpha_equal_to_rank(models, tmp_path):
    state = {key: value for key, value in applied(models).state_dict().items() if not key.endswith("alpha")}
    save_file(state, tmp_path / "old.safetensors")
    network = applied(models, alpha=1.0)
    network.load_weights(tmp_path / "old.safetensors")
    assert {module.scale for module in network.adapters} == {1.0}
    created, _ = lora.create_network_from_weights(1.0, tmp_path / "old.safetensors", None, *models)
    assert {module.scale for module in created.adapters} == {1.0}


def test_other_rank_names_module_ranks_and_option(models, tmp_path):
    applied(models, rank=8).save_weights(tmp_path / "a.safetensors", None, {})
    with pytest.raises(ValueError, match=r"lora_te_text_model\S+: 8 in the file, 4 in the network.*--dim_from_weights"):
        applied(models).load_weights(tmp_path / "a.safetensors")


def test_file_that_fits_nowhere_is_an_error(models, tmp_path):
    save_file({"lora_unet_other.lora_down.weight": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="lora_unet_other"):
        applied(models).load_weights(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="--network_weights"):
        applied(models).load_weights(tmp_path / "missing.safetensors")


def test_unused_keys_are_summarised_in_one_warning(models, tmp_path, caplog):
    state = applied(models).state_dict()
    extra = {f"lora_unet_other_{i}.alpha": torch.ones(()) for i in range(3)}
    save_file(state | extra, tmp_path / "a.safetensors")
    with caplog.at_level(logging.WARNING):
        applied(models).load_weights(tmp_path / "a.safetensors")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "3 tensors of 3 modules" in warnings[0] and "lora_unet_other_0" in warnings[0]


@pytest.mark.parametrize("is_linear_host", [False, True])
def test_projection_weights_load_in_both_shapes(is_linear_host):
    """SD2 files exist with 1x1-convolution and with linear shapes under the same names."""
    encoder = hosts.ClipEncoder()
    conv_unet, linear_unet = hosts.sd_unet(), hosts.sd_unet(use_linear_projection=True)
    source, target = (conv_unet, linear_unet) if is_linear_host else (linear_unet, conv_unet)
    network = make((encoder, source))
    hosts.randomize(network)
    state = network.state_dict()
    loaded, weights = lora.create_network_from_weights(1.0, None, None, encoder, target, dict(state))
    loaded.load_state_dict(weights, False)
    name = "lora_unet_mid_block_attentions_0_proj_in"
    shape = (4, 64) if is_linear_host else (4, 64, 1, 1)
    assert loaded.state_dict()[f"{name}.lora_down.weight"].shape == shape
    up = f"{name}.lora_up.weight"
    assert torch.equal(loaded.state_dict()[up].flatten(), state[up].flatten())


def test_from_weights_takes_modules_ranks_and_alphas_from_the_file(models):
    arguments = {"block_dims": ",".join(str(1 + i % 3) for i in range(25)), "conv_dim": "5", "conv_alpha": "2"}
    network = make(models, **arguments)
    hosts.randomize(network)
    state = {key: value for key, value in network.state_dict().items() if "up_blocks" not in key}
    created, weights = lora.create_network_from_weights(1.0, None, None, *models, state, rank_dropout="0.25")
    assert {key: value.shape for key, value in created.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert all(not module.lora_up.weight.any() for module in created.adapters)
    assert created.adapters[0].dropouts.rank == 0.25
    created.load_state_dict(weights, False)
    assert all(torch.equal(created.state_dict()[key], value) for key, value in state.items())
    assert not any(isinstance(module, lora.LoRAInfModule) for module in created.adapters)
    generating, _ = lora.create_network_from_weights(0.5, None, None, *models, state, True)
    assert all(isinstance(module, lora.LoRAInfModule) for module in generating.adapters)
    assert generating.multiplier == 0.5


def test_from_weights_of_another_family_is_an_error(models):
    state = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.zeros(4, 8)}
    with pytest.raises(ValueError, match=r"a LoRA for FLUX\.1; the model here is Stable.*flux_train_network\.py"):
        lora.create_network_from_weights(1.0, None, None, *models, state)
    with pytest.raises(ValueError, match="no network file: none of its keys belongs to a LoRA"):
        lora.create_network_from_weights(1.0, None, None, *models, {"x.alpha": torch.zeros(())})


def test_a_recorded_file_fits_the_model_it_was_made_for():
    path = DATA / "golden" / "models" / "sd1_lora_start.safetensors"
    unet = hosts.sd_unet(cross_attention_dim=128, attention_head_dim=8)
    models = hosts.ClipEncoder(128, 2, 128), unet
    network, _ = lora.create_network_from_weights(1, path, None, *models)
    network.apply_to(*models, True, True)
    report = network.load_weights(path)
    assert not report.missing_keys and not report.unexpected_keys
    assert {module.scale for module in network.adapters} == {0.5}
    assert len(network.adapters) == 204


# --- merging ---------------------------------------------------------------------------------------------------
def test_merged_model_equals_hooked_model(models):
    for model in models:
        model.double()  # rounding would be amplified by the tiny model's norms
    network = make(models, conv_dim="2").double()
    hosts.randomize(network)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    inputs = {key: value.double() for key, value in hosts.unet_inputs(models[1]).items()}
    original = predict(models[1], inputs)
    ids = torch.randint(0, 90, (2, 7))
    network.apply_to(*models)
    network.set_multiplier(0.8)
    hooked, hooked_text = predict(models[1], inputs), models[0](ids)
    assert (hooked - original).abs().max() > 1e-3
    network.set_enabled(False)
    merging, weights = lora.create_network_from_weights(0.8, None, None, *models, state, for_inference=True)
    merging.double().merge_to(*models, weights, torch.float64, "cpu")
    torch.testing.assert_close(predict(models[1], inputs), hooked, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(models[0](ids), hooked_text, atol=1e-9, rtol=1e-9)


def test_merging_leaves_parts_alone_that_the_file_does_not_have(models):
    network = make(models)
    hosts.randomize(network)
    state = {key: value for key, value in network.state_dict().items() if key.startswith("lora_unet")}
    before = {key: value.clone() for key, value in models[0].state_dict().items()}
    before_unet = models[1].mid_block.attentions[0].proj_in.weight.clone()
    other = make(models)
    hosts.randomize(other)
    other.merge_to(*models, state)
    assert all(torch.equal(models[0].state_dict()[key], value) for key, value in before.items())
    assert not torch.equal(models[1].mid_block.attentions[0].proj_in.weight, before_unet)


def test_pre_calculation_of_two_networks_adds_up_and_restores(models):
    inputs = hosts.unet_inputs(models[1])
    original = predict(models[1], inputs)
    networks = [make(models), make(models)]
    for network in networks:
        hosts.randomize(network)
        network.apply_to(*models)
    hooked = predict(models[1], inputs)
    for network in networks:
        network.backup_weights()
    for _ in range(2):
        for network in networks:
            network.restore_weights()
        for network in networks:
            network.pre_calculation()
        torch.testing.assert_close(predict(models[1], inputs), hooked, atol=1e-5, rtol=1e-5)
    for network in networks:
        network.restore_weights()
        network.set_enabled(False)
    assert torch.equal(predict(models[1], inputs), original)


# --- SDXL names ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("diffusers", "original"),
    [
        ("down_blocks_1_attentions_0_transformer_blocks_1_ff_net_2", "input_blocks_4_1_transformer_blocks_1_ff_net_2"),
        ("down_blocks_0_downsamplers_0_conv", "input_blocks_3_0_op"),
        ("up_blocks_0_upsamplers_0_conv", "output_blocks_2_2_conv"),
        ("up_blocks_1_resnets_2_conv_shortcut", "output_blocks_5_0_skip_connection"),
        ("mid_block_attentions_0_proj_in", "middle_block_1_proj_in"),
        ("mid_block_resnets_1_time_emb_proj", "middle_block_2_emb_layers_1"),
        ("add_embedding_linear_1", "label_emb_0_0"),
        ("conv_in", "input_blocks_0_0"),
        ("conv_norm_out", "out_0"),
        ("nothing_known", None),
    ],
)
def test_sdxl_layer_names(diffusers, original):
    assert original_layer_name(diffusers) == original


def test_every_sdxl_layer_has_a_diffusers_name():
    lists = json.loads((DATA / "lora_modules_sdxl.json").read_text(encoding="utf-8"))
    back = {original: name for name, original in DIFFUSERS_TO_SAI.items()}
    assert len(back) == len(DIFFUSERS_TO_SAI)
    for entry in lists["unet"] + lists["unet_conv_dim_extra"]:
        layer = entry["name"].removeprefix("lora_unet_")
        prefix = max((item for item in back if layer == item or layer.startswith(f"{item}_")), key=len)
        assert original_layer_name(back[prefix] + layer.removeprefix(prefix)) == layer


def test_sdxl_files_in_diffusers_naming_load(caplog):
    unet = hosts.sdxl_unet()
    models = [hosts.ClipEncoder(), hosts.ClipEncoder()], unet
    network = make(models)
    hosts.randomize(network)
    state = network.state_dict()
    diffusers = {"input_blocks_4_1_": "down_blocks_1_attentions_0_", "middle_block_1": "mid_block_attentions_0"}
    renamed = dict(state)
    for key in state:
        for original, name in diffusers.items():
            if original in key:
                renamed[key.replace(original, name)] = renamed.pop(key)
    assert renamed.keys() != state.keys()
    created, weights = lora.create_network_from_weights(1.0, None, None, *models, renamed)
    assert weights.keys() == state.keys()
    assert created.state_dict().keys() == state.keys()
    unknown = {"lora_unet_down_blocks_9_x.alpha": torch.tensor(1.0)}
    with caplog.at_level(logging.WARNING):
        convert_diffusers_to_sai_if_needed(unknown)
    assert "lora_unet_down_blocks_9_x" in caplog.text
