"""Training a network, without a loop: what happens to the model before, in and after a step, and what is recorded."""

from __future__ import annotations

import dataclasses
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.data.records import Batch
from library.families.sd import StableDiffusion
from library.methods.base import Placement
from library.methods.network import NetworkTraining
from library.options import make_options
from networks.merging import lora_modules
from tests.hints import ON_CPU, hint_batch
from tests.lora_files import randomize, tiny_family, tiny_model, write_lora

LORA = {"network_module": "networks.lora", "network_dim": 4, "network_alpha": 2.0, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRA files for the tiny model: one rank and alpha, and two of each."""
    folder, host = tmp_path_factory.mktemp("loras"), tiny_model()
    return [
        write_lora(folder / "a.safetensors", host, 1, rank=3, alpha=1.5),
        write_lora(folder / "b.safetensors", host, 2, rank=2, alpha=1.0, conv_dim="3", conv_alpha="2"),
    ]


class Bias(nn.Module):
    """A network of a third party with few members."""

    def __init__(self, merged_on: list[Any]) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))
        self.merged_on = merged_on

    def apply_to(self, *_: Any) -> None: ...

    def prepare_grad_etc(self, *_: Any) -> None: ...

    def prepare_optimizer_params(self, text_encoder_lr: Any, unet_lr: Any, default_lr: Any) -> list[Any]:
        return [{"params": [self.bias], "lr": default_lr}]

    def merge_to(self, text_encoder: Any, unet: Any, weights: Any, dtype: Any, device: Any) -> None:
        self.merged_on.append(torch.device(device))


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `third_party_net`; `merged_on` lists where its files were merged."""
    module: Any = types.ModuleType("third_party_net")
    module.merged_on = []
    module.create_network = lambda *_, **__: Bias(module.merged_on)
    module.create_network_from_weights = lambda *_, **__: (Bias(module.merged_on), {})
    monkeypatch.setitem(sys.modules, "third_party_net", module)
    return module


def method_for(**options: Any) -> NetworkTraining:
    """The method on the tiny model, before anything is attached."""
    family: StableDiffusion = tiny_family()
    return NetworkTraining(make_options(**{**LORA, **options}), family)


def attached(**options: Any) -> NetworkTraining:
    """The method with a network in the tiny model that visibly changes what it predicts."""
    method = method_for(**options)
    method.attach(ON_CPU)
    randomize(method.network, 1)
    return method


def batch_for(method: NetworkTraining, **changes: Any) -> Batch:
    return dataclasses.replace(hint_batch(method.family), conditioning_images=None, **changes)


def loss_of(method: NetworkTraining, batch: Batch) -> Tensor:
    """Per-sample loss at fixed timesteps and noise."""
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return method.loss(batch, torch.tensor([300, 700]), noise)


# --- the model before training ---------------------------------------------------------------------------------
@pytest.mark.parametrize(("multipliers", "expected"), [
    (None, (1.0, 1.0)), ((0.5,), (0.5, 1.0)), ((0.5, -2.0), (0.5, -2.0)),
])  # fmt: skip
def test_base_weights_are_merged_with_their_multipliers_or_fully(files, multipliers, expected) -> None:
    method = method_for(base_weights=tuple(map(str, files)), base_weights_multiplier=multipliers)
    denoiser, encoder = method.family.denoiser, method.family.text_encoders[0]
    before = {f"lora_unet_{path.replace('.', '_')}": layer.weight.clone()
              for path, layer in denoiser.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}  # fmt: skip
    text_before = [parameter.clone() for parameter in encoder.parameters()]
    method.before_caching(ON_CPU)
    changes = [lora_modules(load_file(path), source=str(path)) for path in files]
    for path, layer in denoiser.named_modules():
        name = f"lora_unet_{path.replace('.', '_')}"
        if name in before:
            wanted = before[name].clone()
            for factor, modules in zip(expected, changes, strict=True):
                wanted += factor * modules[name].change().reshape(wanted.shape) if name in modules else 0
            assert torch.allclose(layer.weight, wanted, atol=1e-5), name
    assert any(not torch.equal(one, two) for one, two in zip(text_before, encoder.parameters(), strict=True))


@pytest.mark.parametrize(("lowram", "device"), [(False, "cpu"), (True, "meta")])
def test_base_weights_are_merged_in_main_memory_unless_it_is_scarce(third_party, files, lowram, device) -> None:
    method = method_for(network_module="third_party_net", base_weights=(str(files[0]),), lowram=lowram)
    method.before_caching(Placement(torch.device("meta"), torch.float32, torch.float32))
    assert third_party.merged_on == [torch.device(device)]


def test_without_base_weights_the_model_stays_as_it_is() -> None:
    method = method_for()
    before = {name: value.clone() for name, value in method.family.denoiser.state_dict().items()}
    method.before_caching(ON_CPU)
    assert all(torch.equal(value, before[name]) for name, value in method.family.denoiser.state_dict().items())


# --- what is recorded ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("index", "alpha", "expected"), [
    (0, None, (3, 1.5)), (1, None, ("Dynamic", "Dynamic")), (1, 2.0, ("Dynamic", 2.0)),
])  # fmt: skip
def test_ranks_and_alphas_that_a_file_brought_are_recorded(index, alpha, expected, files, tmp_path) -> None:
    tensors = load_file(files[index])
    if alpha:
        tensors = {key: torch.tensor(alpha) if key.endswith(".alpha") else value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "start.safetensors")
    method = attached(
        network_weights=str(tmp_path / "start.safetensors"), dim_from_weights=True, network_train_unet_only=True
    )
    entries = method.metadata()
    assert (entries["ss_network_dim"], entries["ss_network_alpha"]) == expected


def test_ranks_and_alphas_of_options_are_left_to_them(files) -> None:
    method = attached(network_weights=str(files[0]), network_dim=3)
    assert not {"ss_network_dim", "ss_network_alpha", "ss_scale_weight_norms"} & method.metadata().keys()


def test_a_network_that_cannot_limit_its_norms_is_warned_about_and_recorded(third_party, caplog) -> None:
    limits = {"scale_weight_norms": 1.0}
    able = attached(**limits)
    assert able.max_norm == 1.0 and "ss_scale_weight_norms" not in able.metadata()
    with caplog.at_level(logging.WARNING):
        unable = attached(network_module="third_party_net", **limits)
    assert unable.max_norm is None and unable.metadata()["ss_scale_weight_norms"] is False
    assert "--scale_weight_norms is ignored" in caplog.text


# --- a step ----------------------------------------------------------------------------------------------------
def test_the_strength_of_a_batch_is_its_datasets() -> None:
    method = attached()
    losses = [loss_of(method, batch_for(method, network_multipliers=torch.full((2,), m))) for m in (1.0, 0.5, 0.0)]
    method.network.set_enabled(False)
    alone = loss_of(method, batch_for(method))
    assert torch.allclose(losses[2], alone) and not torch.allclose(losses[1], alone)
    assert not torch.allclose(losses[0], losses[1])
    with pytest.raises(ValueError, match=r"network_multiplier: one batch mixes the strengths \[0\.5, 1\.0\]"):
        loss_of(method, batch_for(method, network_multipliers=torch.tensor([1.0, 0.5])))


def test_preserved_outputs_are_those_of_the_model_alone_and_the_strength_comes_back() -> None:
    method = attached()
    marks = [{"diff_output_preservation": True}, {}]
    batch = batch_for(method, custom_attributes=marks, network_multipliers=torch.full((2,), 0.5))
    kept, plain = loss_of(method, batch), loss_of(method, batch_for(method, network_multipliers=torch.full((2,), 0.5)))
    assert not torch.allclose(kept[0], plain[0]) and torch.equal(kept[1], plain[1])
    assert method.network.multiplier == 0.5
    method.network.set_enabled(False)
    assert loss_of(method, batch)[0] == pytest.approx(0.0, abs=1e-8)


def test_norms_are_limited_after_an_optimizer_step_only() -> None:
    method = attached(scale_weight_norms=0.01)
    before = {name: value.clone() for name, value in method.network.state_dict().items()}
    assert method.after_step(synced=False) == {}
    assert all(torch.equal(value, before[name]) for name, value in method.network.state_dict().items())
    reported = method.after_step(synced=True)
    assert reported["max_norm/keys_scaled"] == len(method.network.adapters)
    assert reported["norm/avg_key_norm"] <= reported["max_norm/max_key_norm"] <= 0.0101
    assert all(float(adapter.weight_norm()) <= 0.0101 for adapter in method.network.adapters)


def test_samples_are_drawn_at_full_strength_in_eval_mode() -> None:
    method = attached()
    method.on_epoch_start(0)
    method.network.set_multiplier(0.25)
    with method.inference():
        assert method.network.multiplier == 1.0 and not method.network.training
    assert method.network.training


# --- files -----------------------------------------------------------------------------------------------------
def test_a_file_appears_whole_and_alone(tmp_path) -> None:
    method = attached()
    path = tmp_path / f"a{method.file_extension}"
    method.save(path, dtype=torch.float16, metadata={"a": "b"})
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    saved, state = load_file(path), method.network.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(value, state[name].half()) for name, value in saved.items())
