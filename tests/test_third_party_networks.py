"""Network modules of other projects, unchanged, through the whole script."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.training import PHOTOS, train, write_config

DEMO_MODEL = ROOT / "demo" / "model" / "shapes_sd15.safetensors"


@pytest.fixture
def lycoris_presets():
    """LyCORIS keeps its presets as class attributes of the whole process: put them back."""
    from lycoris import LycorisNetwork
    from lycoris.kohya import LycorisNetworkKohya

    classes = [LycorisNetwork, LycorisNetworkKohya]
    before = [{k: v for k, v in vars(c).items() if k.isupper()} for c in classes]
    yield
    for network_class, values in zip(classes, before, strict=True):
        for name, value in values.items():
            setattr(network_class, name, value)


def host_models():
    from library.model_util import load_checkpoint

    return load_checkpoint(DEMO_MODEL, v2=False, dtype=torch.float32)


def star_config(folder: Path) -> Path:
    """A dataset file over a few pictures of the demo's star."""
    command = [sys.executable, ROOT / "demo" / "shapes.py", "--kind", "star", "--count", "4", "--output",
               folder / "stars"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    path = folder / "stars.toml"
    path.write_text(
        '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 64\nbatch_size = 2\n'
        f"[[datasets.subsets]]\nimage_dir = {str(folder / 'stars')!r}\n"
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["lora", "lokr"])
def test_lycoris_trains_saves_and_loads_back(algorithm, lycoris_presets, tmp_path):
    from lycoris import kohya

    path = train("--pretrained_model_name_or_path", DEMO_MODEL, "--dataset_config", star_config(tmp_path),
                 "--network_module", "lycoris.kohya", "--network_args", f"algo={algorithm}", "factor=4",
                 "--network_dim", "4", "--network_alpha", "2", "--max_train_steps", "2", "--learning_rate", "1e-2",
                 output_dir=tmp_path / "out")
    saved = load_file(path)
    text_modules = {key.split(".")[0] for key in saved if key.startswith("lora_te_")}
    assert len(text_modules) == 12
    assert all(name.startswith("lora_te_text_model_encoder_layers_") for name in text_modules)
    assert len({key.split(".")[0] for key in saved if key.startswith("lora_unet_")}) >= 194
    trained = "lora_up" if algorithm == "lora" else "lokr_w"
    assert any(tensor.abs().max() > 0 for key, tensor in saved.items() if trained in key)

    host = host_models()
    network, weights = kohya.create_network_from_weights(1.0, str(path), host.vae, host.text_encoder, host.unet)
    network.apply_to(host.text_encoder, host.unet, True, True)
    report = network.load_state_dict(weights, strict=False)
    assert not report.unexpected_keys
    loaded = network.state_dict()
    assert all(torch.equal(loaded[key].float(), saved[key].float()) for key in saved)


THIRD_PARTY = '''
"""A network in the old style: two learning rates, no descriptions, a bias on every to_q layer."""
import torch

class BiasNetwork(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.layers = {n.replace(".", "_"): m for n, m in unet.named_modules() if n.endswith("to_q")}
        self.biases = torch.nn.ParameterDict({n: torch.zeros(m.out_features) for n, m in self.layers.items()})
    def apply_to(self, text_encoder, unet, apply_text_encoder=True, apply_unet=True):
        for name, layer in self.layers.items():
            def forward(x, original=layer.forward, name=name):
                return original(x) + self.biases[name]
            layer.forward = forward
    def prepare_network(self, args):
        assert args.network_dim == 2
        try:
            args.network_dim = 3
        except AttributeError:
            self.options_are_read_only = True
    def prepare_optimizer_params(self, text_encoder_lr, unet_lr):
        return [{"params": list(self.parameters()), "lr": unet_lr}]
    def prepare_grad_etc(self, text_encoder, unet): self.requires_grad_(True)
    def on_epoch_start(self, text_encoder, unet): self.train()
    def get_trainable_params(self): return self.parameters()
    def enable_gradient_checkpointing(self): pass
    def save_weights(self, file, dtype, metadata):
        from safetensors.torch import save_file
        assert self.options_are_read_only and metadata["ss_network_module"] == "bias_network"
        save_file({k: v.detach() for k, v in self.state_dict().items()}, file, metadata)

def create_network(multiplier, network_dim, network_alpha, vae, text_encoder, unet, neuron_dropout=None, **kwargs):
    assert kwargs["flavour"] == "a=b" and kwargs["dropout"] == 0.25
    return BiasNetwork(unet)

def create_network_from_weights(*args, **kwargs):
    raise NotImplementedError
'''


@pytest.mark.slow
def test_an_old_two_rate_module_plugs_in(tmp_path, monkeypatch):
    (tmp_path / "bias_network.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    photos = Path(shutil.copytree(PHOTOS, tmp_path / "photos"))
    path = train("--dataset_config", write_config(tmp_path, photos), "--network_module", "bias_network",
                 "--network_args", "flavour=a=b", "--network_dropout", "0.25", "--unet_lr", "1e-2",
                 "--max_train_steps", "2", output_dir=tmp_path / "out")
    assert all(float(bias.abs().max()) > 0 for bias in load_file(path).values())
    sys.modules.pop("bias_network", None)
