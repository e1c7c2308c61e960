"""Regional prompts: masks per feature size, rows per sub-prompt, blending of the cross-attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import lora
from networks.regions import (
    Blend,
    Generation,
    Region,
    RegionalLayer,
    RegionKind,
    contract,
    mask_pyramid,
    region_kind,
    repeat_queries,
)
from tests import network_hosts as hosts


def halves(height: int = 64, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    left = torch.zeros(height, width)
    left[:, : width // 2] = 1.0
    return left, 1.0 - left


def layer(name: str, scale: float = 10.0) -> RegionalLayer:
    return RegionalLayer(name, lambda x: x, lambda x: scale * torch.ones_like(x))


def generation(b: int = 1, n: int = 2, mask: torch.Tensor | None = None) -> Generation:
    masks = mask_pyramid(torch.ones(64, 64) if mask is None else mask, 64, 64)
    return Generation(b, n, masks)


@pytest.mark.parametrize(("name", "kind"), [
    ("lora_te_text_model_encoder_layers_0_mlp_fc1", RegionKind.TEXT_ENCODER),
    ("lora_te2_text_model_encoder_layers_0_mlp_fc1", RegionKind.TEXT_ENCODER),
    ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v", RegionKind.CROSS_ATTENTION_TEXT),
    ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q", RegionKind.QUERY),
    ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0", RegionKind.OUT),
    ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", RegionKind.MASKED),
    ("lora_unet_mid_block_resnets_0_time_emb_proj", RegionKind.EVERYWHERE),
    ("lora_unet_input_blocks_1_0_emb_layers_1", RegionKind.MASKED),
])  # fmt: skip
def test_kind_of_a_layer_by_its_name(name, kind):
    assert region_kind(name) is kind


def test_pyramid_has_the_feature_sizes_of_the_unet():
    masks = mask_pyramid(torch.ones(8, 8), width=320, height=200, ds_ratio=0.5)
    sizes = {tuple(mask.shape) for mask in masks.values()}
    assert sizes == {(25, 40), (26, 40), (12, 20), (13, 20), (14, 20), (6, 10), (7, 10), (8, 10), (3, 5), (4, 5),
                     (4, 6), (2, 2)}  # fmt: skip
    for area, mask in masks.items():
        assert area == mask.numel()
        torch.testing.assert_close(mask, torch.ones_like(mask))


def test_a_mask_without_any_part_counts_as_everywhere():
    assert torch.equal(Region(0, True, torch.zeros(4, 4)).mask, torch.ones(4, 4))


@pytest.mark.parametrize("shape", [(2, 64, 3), (2, 3, 8, 8)])
def test_other_layers_are_changed_inside_the_mask(shape):
    left, _ = halves()
    x = torch.randn(shape)
    change = layer("lora_unet_mid_block_attentions_0_proj_in")(x, Region(0, True, left), generation(mask=left)) - x
    grid = change.reshape(2, 8, 8, 3) if len(shape) == 3 else change.movedim(1, -1)
    torch.testing.assert_close(grid[:, :, :4], torch.full((2, 8, 4, 3), 10.0))
    assert not grid[:, :, 4:].any()


def test_layers_without_place_share_evenly():
    x = torch.zeros(2, 5)
    output = layer("lora_unet_input_blocks_1_0_emb_layers_1")(x, Region(0, True, torch.ones(8, 8)), generation(n=4))
    assert torch.equal(output, torch.full((2, 5), 2.5))


def test_keys_and_values_change_for_their_own_sub_prompt_only():
    b, n = 2, 3
    x = torch.zeros(b + b * n + b, 7, 4)
    output = layer("lora_unet_x_attn2_to_k")(x, Region(1, False, torch.ones(8, 8)), generation(b, n))
    assert output[:, 0, 0].tolist() == [0, 0, *(0, 10, 0), *(0, 10, 0), 0, 0]


def test_text_encoders_change_for_their_own_sub_prompt_only():
    b, n = 2, 3
    text = layer("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    region = Region(2, False, torch.ones(8, 8))
    assert text(torch.zeros(b * n, 7, 4), region, generation(b, n))[:, 0, 0].tolist() == [0, 0, 10] * b
    assert not text(torch.zeros(b, 7, 4), region, generation(b, n)).any()


@pytest.mark.parametrize("has_real_uncond", [False, True])
def test_queries_are_repeated_and_results_blended(has_real_uncond):
    b, n = 2, 3
    rows = torch.arange(b * (3 if has_real_uncond else 2)).float()
    queries = rows[:, None, None].expand(-1, 64, 4)
    repeated = repeat_queries(queries, generation(b, n))
    real = [4, 5] if has_real_uncond else []
    assert repeated[:, 0, 0].tolist() == [0, 1, 2, 2, 2, 3, 3, 3, *real]
    blend = Blend(torch.zeros(b * n, 64, 4), [1.0, 1.0, 0.0])
    results = contract(repeated, blend, generation(b, n))
    torch.testing.assert_close(results, queries, rtol=1e-4, atol=0)


def test_each_place_gets_the_result_and_change_of_its_region():
    left, right = halves()
    name, x = "lora_unet_x_attn2_to_out_0", torch.zeros(3, 64, 2)
    x[1], x[2] = 1.0, 2.0  # results of the two sub-prompts
    shared: dict = {}
    inner_generation = Generation(1, 2, mask_pyramid(left, 64, 64), shared)
    outer_generation = Generation(1, 2, mask_pyramid(right, 64, 64), shared)
    inner = RegionalLayer(name, lambda x: x, lambda x: 10.0 * torch.ones_like(x))

    def wrapped(x):
        return inner(x, Region(0, False, left), inner_generation)

    outer = RegionalLayer(name, wrapped, lambda x: 20.0 * torch.ones_like(x))
    output = outer(x, Region(1, True, right), outer_generation)
    assert output.shape == (2, 64, 2) and not output[0].any()
    grid = output[1].reshape(8, 8, 2)
    torch.testing.assert_close(grid[:, :4], torch.full((8, 4, 2), 11.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(grid[:, 4:], torch.full((8, 4, 2), 22.0), rtol=1e-3, atol=0)
    assert shared == {}


def test_a_module_that_the_last_network_lacks_is_an_error():
    with pytest.raises(RuntimeError, match="attn2_to_out"):
        layer("lora_unet_x_attn2_to_out_0")(torch.zeros(3, 64, 2), Region(0, False, torch.ones(8, 8)), generation())


# --- a whole U-Net ---------------------------------------------------------------------------------------------
@pytest.fixture
def models():
    torch.manual_seed(0)
    return hosts.ClipEncoder(), hosts.sd_unet().requires_grad_(False)


def regional_networks(models: tuple[nn.Module, nn.Module], masks, size: int = 64) -> list[lora.LoRANetwork]:
    shared: dict = {}
    networks = []
    for index, mask in enumerate(masks):
        state = lora.create_network(1.0, 4, 4.0, None, *models).state_dict()
        network, weights = lora.create_network_from_weights(1.0, None, None, *models, state, True)
        network.load_state_dict(weights, False)
        network.apply_to(*models)
        network.set_region(index, index == len(masks) - 1, mask)
        network.set_current_generation(1, 2, size, size, shared)
        networks.append(network)
    return networks


def test_equal_sub_prompts_and_silent_networks_draw_the_ordinary_picture(models):
    sample, uncond, cond = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32), torch.randn(1, 7, 32)
    unet = models[1]
    with torch.no_grad():
        expected = unet(sample.expand(2, -1, -1, -1), 10.0, torch.cat([uncond, cond])).sample
        networks = regional_networks(models, halves())
        output = unet(sample.expand(2, -1, -1, -1), 10.0, torch.cat([uncond, cond, cond])).sample
        torch.testing.assert_close(output, expected, atol=5e-3, rtol=0)
        for network in networks:
            hosts.randomize(network)
        changed = unet(sample.expand(2, -1, -1, -1), 10.0, torch.cat([uncond, cond, cond])).sample
    assert (changed - expected).abs().max() > 0.05


def test_without_a_region_the_network_is_an_ordinary_one_again(models):
    sample, cond = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    network = regional_networks(models, [torch.ones(64, 64)])[0]
    hosts.randomize(network)
    network.set_region(0, True, None)
    with torch.no_grad():
        output = models[1](sample, 10.0, cond).sample
        network.set_enabled(False)
        assert (models[1](sample, 10.0, cond).sample - output).abs().max() > 1e-3


def test_training_networks_have_no_regions(models):
    network = lora.create_network(1.0, 4, 4.0, None, *models)
    with pytest.raises(ValueError, match="for_inference"):
        network.set_region(0, True, torch.ones(8, 8))
