"""Blocks by layer name, presets and lists of learning-rate factors, ranks per block."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from networks import lora
from networks.blocks import require_block_index
from tests import network_hosts as hosts

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "golden_math.json").read_text(encoding="utf-8"))
CASES = GOLDEN["block_lr_weight"]["cases"]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_block_index_of_recorded_names(family):
    for name, expected in GOLDEN["block_index"][family].items():
        assert lora.get_block_index(name, family == "sdxl") == expected["training"], name


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_block_index_of_every_unet_layer(family):
    lists = json.loads((DATA / f"lora_modules_{family}.json").read_text(encoding="utf-8"))
    entries = lists["unet"] + lists["unet_conv_dim_extra"]
    assert len(entries) == {"sd15": 278, "sd21": 278, "sdxl": 788}[family]
    for entry in entries:
        assert lora.get_block_index(entry["name"], family == "sdxl") == entry["block"], entry["name"]


def test_layer_outside_all_blocks_is_an_error():
    with pytest.raises(ValueError, match="lora_unet_conv_in"):
        require_block_index("lora_unet_conv_in", is_sdxl=False)


def test_recorded_learning_rate_factors():
    assert len(CASES) == 40
    compared = 0
    for case in CASES:
        if "result" not in case:
            continue
        result = lora.parse_block_lr_kwargs(case["sdxl"], case["network_args"])
        assert result == (case["result"] if case["result"] is None else pytest.approx(case["result"], abs=1e-12)), case
        compared += 1
    assert compared == 34


@pytest.mark.parametrize("value", ["unknown", "0.5", "sine+x", "0.1,b"])
def test_text_that_is_no_preset_and_no_list_names_the_presets(value):
    with pytest.raises(ValueError, match="reverse_linear"):
        lora.parse_block_lr_kwargs(False, {"down_lr_weight": value})


@pytest.mark.parametrize(("is_sdxl", "length"), [(False, 25), (True, 23)])
def test_a_list_that_is_too_long_is_cut_with_a_warning(is_sdxl, length, caplog):
    with caplog.at_level(logging.WARNING):
        result = lora.parse_block_lr_kwargs(is_sdxl, {"down_lr_weight": ",".join(["0.5"] * 15)})
    assert result is not None and len(result) == length
    assert "down_lr_weight" in caplog.text
    assert result.count(0.5) == (9 if is_sdxl else 12)


def test_a_list_that_is_too_short_is_filled_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert lora.parse_block_lr_kwargs(False, {"down_lr_weight": ",".join(["0.5"] * 12)}) == [0.5] * 12 + [1.0] * 13
        assert not caplog.records
        assert lora.parse_block_lr_kwargs(False, {"down_lr_weight": ",".join(["0.5"] * 10)}) == [0.5] * 10 + [1.0] * 15
    assert "down_lr_weight has 10 values; the other 2 are 1.0" in caplog.text


def test_convolutions_have_lists_of_their_own():
    ranks, alphas = ",".join(str(index + 1) for index in range(25)), ",".join(str(index / 2) for index in range(25))
    network = lora.create_network(
        1.0, 4, 1.0, None, hosts.ClipEncoder(), hosts.sd_unet(), block_dims=",".join(["2"] * 25),
        conv_block_dims=ranks, conv_block_alphas=alphas,
    )  # fmt: skip
    spatial = [item for item in network.unet_loras if item.lora_down.weight.shape[2:] == (3, 3)]
    assert spatial and len(spatial) < len(network.unet_loras)
    for adapter in spatial:
        index = lora.get_block_index(adapter.lora_name)
        assert (adapter.lora_dim, float(adapter.alpha)) == (index + 1, index / 2)
    assert {item.lora_dim for item in network.unet_loras if item not in spatial} == {2}


def test_a_factor_of_zero_removes_the_modules_of_its_block():
    network = lora.create_network(
        1.0, 4, 1.0, None, hosts.ClipEncoder(), hosts.sd_unet(), down_lr_weight="zeros", mid_lr_weight="0.5"
    )
    blocks = {lora.get_block_index(adapter.lora_name) for adapter in network.unet_loras}
    assert blocks == {12, *range(16, 25)}
    assert len(network.text_encoder_loras) == 12


def test_block_ranks_and_alphas_apply_per_block_and_kind():
    ranks = ",".join(str(index + 1) for index in range(25))
    network = lora.create_network(
        1.0, 4, 1.0, None, hosts.ClipEncoder(), hosts.sd_unet(), block_dims=ranks, conv_dim="3", conv_alpha="1.5"
    )
    assert {adapter.lora_dim for adapter in network.text_encoder_loras} == {4}
    kinds = set()
    for adapter in network.unet_loras:
        is_spatial = adapter.lora_down.weight.dim() == 4 and adapter.lora_down.weight.shape[-1] == 3
        kinds.add(is_spatial)
        index = lora.get_block_index(adapter.lora_name)
        assert adapter.lora_dim == (3 if is_spatial else index + 1)
        assert float(adapter.alpha) == (1.5 if is_spatial else 1.0)
    assert kinds == {False, True}


def test_a_block_rank_of_zero_skips_the_block():
    ranks = ["4"] * 25
    ranks[12] = "0"
    network = lora.create_network(1.0, 4, 1.0, None, hosts.ClipEncoder(), hosts.sd_unet(), block_dims=",".join(ranks))
    assert not any("mid_block" in adapter.lora_name for adapter in network.unet_loras)
    assert len(network.unet_loras) == 192 - 12


def test_alphas_of_blocks_have_no_effect_without_their_ranks(caplog):
    alphas = {"block_alphas": ",".join(["3"] * 25)}
    with caplog.at_level(logging.WARNING):
        network = lora.create_network(1.0, 4, 1.0, None, hosts.ClipEncoder(), hosts.sd_unet(), **alphas)
    assert {float(adapter.alpha) for adapter in network.adapters} == {1.0}
    assert "without effect unless block_dims is given: block_alphas" in caplog.text
    with_ranks = lora.create_network(
        1.0, 4, 1.0, None, hosts.ClipEncoder(), hosts.sd_unet(), block_dims=",".join(["2"] * 25), **alphas
    )
    assert {(adapter.lora_dim, float(adapter.alpha)) for adapter in with_ranks.unet_loras} == {(2, 3.0)}


@pytest.mark.parametrize("arguments", [{"block_dims": "4,4"}, {"block_dims": "a" + ",4" * 24}, {"mid_lr_weight": "x"}])
def test_bad_block_arguments_name_the_argument(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        lora.create_network(1.0, 4, 1.0, None, hosts.ClipEncoder(), hosts.sd_unet(), **arguments)


def test_dims_and_alphas_default_to_those_of_the_network():
    lists = lora.get_block_dims_and_alphas(True, None, None, 8, 4.0, None, None, 2, None)
    assert lists == ([8] * 23, [4.0] * 23, [2] * 23, [1.0] * 23)
    factors = [0.0] * 3 + [1.0] * 20
    assert lora.remove_block_dims_and_alphas(True, *lists, factors)[0] == [0] * 3 + [8] * 20
