"""What trainers call on any network: a recording third party, networks with few members, and real LyCORIS."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from networks import contract
from networks.contract import HostModels, NetworkRequest
from tests import network_hosts as hosts


class MinimalNetwork(nn.Module):
    """The members every network must have, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.calls: list[tuple] = []

    def apply_to(self, *args) -> None:
        self.calls.append(("apply_to", *args))

    def load_weights(self, path: str) -> str:
        self.calls.append(("load_weights", path))
        return "loaded"

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr):
        return [{"params": (p for p in [self.weight]), "lr": (text_encoder_lr, unet_lr)}]

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        return self.parameters()


class MergingNetwork(MinimalNetwork):
    def merge_to(self, *args) -> None:
        self.calls.append(("merge_to", *args))


@pytest.fixture
def third_party(monkeypatch):
    """A module `third_party_net` that records how it is called."""
    module = types.ModuleType("third_party_net")
    module.calls = []

    def create_network(*args, **kwargs):
        module.calls.append(("create_network", args, kwargs))
        return MergingNetwork()

    def create_network_from_weights(*args, **kwargs):
        module.calls.append(("create_network_from_weights", args, kwargs))
        return MergingNetwork(), {"key": torch.zeros(1)}

    module.create_network = create_network
    module.create_network_from_weights = create_network_from_weights
    monkeypatch.setitem(sys.modules, "third_party_net", module)
    return module


MODELS = HostModels(vae=nn.Identity(), text_encoder=[nn.Linear(2, 2), nn.Linear(2, 2)], unet=nn.Conv2d(2, 2, 1))


@pytest.fixture
def weights_file(tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"not read by the recording module")
    return path


# --- how modules are called ------------------------------------------------------------------------------------
def test_a_fresh_network_gets_six_positionals_and_text_arguments(third_party):
    request = NetworkRequest("third_party_net", dim=8, alpha=2.0, dropout=0.1, arguments={"conv_dim": "4"})
    contract.create(request, MODELS)
    positional = (1.0, 8, 2.0, MODELS.vae, MODELS.text_encoder, MODELS.unet)
    keywords = {"neuron_dropout": 0.1, "conv_dim": "4", "dropout": 0.1}
    assert third_party.calls == [("create_network", positional, keywords)]
    assert contract.training_arguments(request) == {"conv_dim": "4", "dropout": 0.1}


def test_the_users_own_dropout_argument_wins(third_party):
    contract.create(NetworkRequest("third_party_net", dropout=0.1, arguments={"dropout": "0.5"}), MODELS)
    assert third_party.calls[0][2] == {"neuron_dropout": 0.1, "dropout": "0.5"}


def test_a_network_with_the_ranks_of_a_file_gets_the_users_arguments_only(third_party, weights_file, caplog):
    request = NetworkRequest("third_party_net", dropout=0.1, arguments={"a": "b"}, weights=weights_file)
    contract.create(request, MODELS)
    positional = (1, str(weights_file), MODELS.vae, MODELS.text_encoder, MODELS.unet)
    assert third_party.calls == [("create_network_from_weights", positional, {"a": "b"})]
    assert "--network_dropout" in caplog.text


def test_base_weights_are_created_for_inference_and_merged(third_party, weights_file, monkeypatch):
    network = MergingNetwork()
    original = third_party.create_network_from_weights

    def keep(*args, **kwargs):
        original(*args, **kwargs)
        return network, {"key": 1}

    monkeypatch.setattr(third_party, "create_network_from_weights", keep)
    contract.merge_base_weights("third_party_net", weights_file, 0.5, MODELS, dtype=torch.float16, device="cpu")
    positional = (0.5, str(weights_file), MODELS.vae, MODELS.text_encoder, MODELS.unet)
    assert third_party.calls == [("create_network_from_weights", positional, {"for_inference": True})]
    assert network.calls == [("merge_to", MODELS.text_encoder, MODELS.unet, {"key": 1}, torch.float16, "cpu")]


def test_generation_passes_files_by_path_and_tensors_by_position(third_party, weights_file):
    contract.create_for_generation("third_party_net", weights_file, MODELS, 0.7, {"x": "y"})
    tensors = {"t": torch.zeros(1)}
    contract.create_from_tensors("third_party_net", tensors, MODELS, 0.6)
    models = (MODELS.vae, MODELS.text_encoder, MODELS.unet)
    assert third_party.calls == [
        ("create_network_from_weights", (0.7, str(weights_file), *models), {"for_inference": True, "x": "y"}),
        ("create_network_from_weights", (0.6, None, *models, tensors, True), {}),
    ]
    contract.create_for_generation("third_party_net", weights_file, MODELS)
    contract.create_from_tensors("third_party_net", tensors, MODELS)
    assert [arguments[0] for _, arguments, _ in third_party.calls[2:]] == [1.0, 1.0], "full strength is the default"


class Filled(MinimalNetwork):
    """A network that may have the values of its file as soon as it is made: one module with two parameters."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        module = nn.Module()
        module.lora_name = "lora_unet_q"
        module.first, module.second = (nn.Parameter(value.clone()) for value in weights.values())
        self.unet_loras = [module]


@pytest.mark.parametrize(("change", "is_loaded"), [
    ({}, False), ({"lora_unet_q.alpha": torch.tensor(1.0)}, False), ({"lora_unet_q.diff": torch.zeros(2, 2)}, True),
    ({"lora_unet_q.diff_b": torch.zeros(3)}, True), ({"lora_unet_other.diff": torch.ones(2, 2)}, True),
])  # fmt: skip
def test_a_file_is_not_loaded_again_into_a_network_that_holds_it(change, is_loaded, third_party, tmp_path, monkeypatch):
    values = {"lora_unet_q.diff": torch.ones(2, 2), "lora_unet_q.diff_b": torch.ones(2)}
    monkeypatch.setattr(
        third_party, "create_network_from_weights", lambda *_, **__: (Filled(values), {**values, **change})
    )
    path = tmp_path / "net.safetensors"
    save_file({**values, **change}, path)
    for network in (
        contract.create(NetworkRequest("third_party_net", weights=path), MODELS),
        contract.create_for_generation("third_party_net", path, MODELS)[0],
    ):
        assert contract.load_weights(network, path) == ("loaded" if is_loaded else {})
        assert network.calls == ([("load_weights", str(path))] if is_loaded else [])


class Reporting(MinimalNetwork):
    """A network that says which keys of its file found no place: those of a module that it does not have."""

    def load_weights(self, path: str) -> dict[str, list[str]]:
        return {"unexpected keys": ["lora_unet_other.lora_up.weight", "lora_unet_other.lora_down.weight"]}


def test_a_file_of_which_nothing_fits_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({f"lora_unet_other.lora_{part}.weight": torch.ones(2, 2) for part in ("up", "down")}, path)
    with pytest.raises(ValueError, match=r"net\.safetensors.*none of its 2 tensors belongs to this model"):
        contract.load_weights(Reporting(), path)


def test_apply_passes_both_flags(third_party):
    network = MinimalNetwork()
    contract.apply(network, MODELS, False, True)
    assert network.calls == [("apply_to", MODELS.text_encoder, MODELS.unet, False, True)]


def test_a_network_without_parameters_is_an_error():
    class Empty(nn.Module):
        def apply_to(self, *args) -> None: ...

    with pytest.raises(ValueError, match="no layer to adapt in Conv2d"):
        contract.apply(Empty(), MODELS, True, True)


def test_a_module_that_makes_no_network_is_an_error(third_party, monkeypatch):
    monkeypatch.setattr(third_party, "create_network", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="third_party_net made no network"):
        contract.create(NetworkRequest("third_party_net"), MODELS)


@pytest.mark.parametrize(("name", "expected"), [
    ("netwroks.lora", "no such Python module.*Looked in.*networks.lora"),
    ("networks.loar", "no such Python module"),
    ("json", "has no create_network"),
    ("", "--network_module is missing"),
])  # fmt: skip
def test_modules_that_cannot_be_used_say_why(name, expected):
    with pytest.raises(ValueError, match=expected):
        contract.import_network_module(name)


def test_a_module_whose_own_import_fails_names_the_missing_package(tmp_path, monkeypatch):
    (tmp_path / "needs_something.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="needs_something needs a_package_that_is_not_there"):
        contract.import_network_module("needs_something")


def test_missing_files_name_the_option(tmp_path):
    with pytest.raises(FileNotFoundError, match="--base_weights"):
        contract.merge_base_weights("networks.lora", tmp_path / "x", 1.0, MODELS, dtype=None, device="cpu")
    with pytest.raises(FileNotFoundError, match="--network_weights"):
        contract.create(NetworkRequest("networks.lora", weights=tmp_path / "x"), MODELS)


# --- arguments -------------------------------------------------------------------------------------------------
def test_network_args_are_cut_at_the_first_sign():
    assert contract.parse_network_args(["a=1", "b=x=y", "c="]) == {"a": "1", "b": "x=y", "c": ""}
    assert contract.parse_network_args(None) == {}


@pytest.mark.parametrize("items", [["conv_dim"], ["=4"], ["a=1", "a=2"]])
def test_bad_network_args_name_the_item(items):
    with pytest.raises(ValueError, match=items[-1].partition("=")[0] or "=4"):
        contract.parse_network_args(items)


# --- optimizer groups ------------------------------------------------------------------------------------------
def test_two_argument_networks_get_the_first_rate_and_no_default():
    groups, names = contract.optimizer_groups(MinimalNetwork(), [1e-4, 2e-4], 1e-3, 1e-5)
    assert [group["lr"] for group in groups] == [(1e-4, 1e-3)]
    assert len(groups[0]["params"]) == 1 and names == ["textencoder"]


def test_an_error_inside_a_three_argument_network_is_not_hidden():
    class Failing(MinimalNetwork):
        def prepare_optimizer_params(self, text_encoder_lr, unet_lr, default_lr=None):
            raise TypeError("inside")

    with pytest.raises(TypeError, match="inside"):
        contract.optimizer_groups(Failing(), None, 1e-3, 1e-5)


def test_only_a_tuple_is_unpacked_and_names_are_trimmed():
    class Named(MinimalNetwork):
        def prepare_optimizer_params(self, text_encoder_lr, unet_lr, default_lr):
            assert (text_encoder_lr, unet_lr, default_lr) == (None, 1e-3, 1e-5)
            return [{"params": [self.weight]}, {"params": [self.weight]}], ["textencoder 1 ", "unet"]

    class Listed(MinimalNetwork):
        def prepare_optimizer_params(self, *rates):
            return [{"params": [self.weight]}, {"params": [self.weight]}]

    assert contract.optimizer_groups(Named(), [], 1e-3, 1e-5)[1] == ["textencoder 1", "unet"]
    assert contract.optimizer_groups(Listed(), None, 1e-3, 1e-5)[1] == ["textencoder", "unet"]


def test_networks_for_several_rates_get_them_all_as_a_list():
    class Several(MinimalNetwork):
        def prepare_optimizer_params_with_multiple_te_lrs(self, text_encoder_lr, unet_lr, default_lr):
            assert text_encoder_lr == [1e-4, 2e-4] and isinstance(text_encoder_lr, list)
            return [{"params": [self.weight]}] * 3

    _, names = contract.optimizer_groups(Several(), (1e-4, 2e-4), None, 1e-5)
    assert names == ["group0", "group1", "group2"]


def test_groups_without_parameters_are_an_error():
    class Nothing(MinimalNetwork):
        def prepare_optimizer_params(self, *rates):
            return [{"params": []}]

    with pytest.raises(ValueError, match="nothing to train"):
        contract.optimizer_groups(Nothing(), None, None, 1e-5)


# --- optional members ------------------------------------------------------------------------------------------
def test_absent_optional_members_have_fallbacks():
    network = MinimalNetwork()
    contract.prepare(network, object())
    assert contract.reported_norms(network) == {}
    assert contract.is_mergeable(network) is False


def test_reported_norms_are_averaged_and_may_be_missing():
    class Norms(MinimalNetwork):
        def weight_norms(self):
            return torch.tensor([1.0, 3.0])

        def grad_norms(self):
            return None

    assert contract.reported_norms(Norms()) == {"norm/avg_key_norm": 2.0}


def test_prepare_hands_over_the_options():
    class Curious(MinimalNetwork):
        def prepare_network(self, options) -> None:
            self.options = options

    network, options = Curious(), types.SimpleNamespace(seed=1)
    contract.prepare(network, options)
    assert network.options is options


# --- real networks ---------------------------------------------------------------------------------------------
class UnetWithOwnTimeEmbedding:
    """Builds a U-Net whose time embedding has a class name that third parties do not look for."""

    def __new__(cls) -> nn.Module:
        unet = hosts.sd_unet()

        class OwnTimeEmbedding(type(unet.time_embedding)):
            pass

        unet.time_embedding.__class__ = OwnTimeEmbedding
        return unet


@pytest.fixture
def lycoris():
    """LyCORIS keeps presets as process-wide class state: put them back afterwards."""
    from lycoris import kohya

    network_class = kohya.LycorisNetworkKohya
    saved = {name: value for name, value in vars(network_class).items() if name.isupper()}
    yield kohya
    for name, value in saved.items():
        setattr(network_class, name, value)


@pytest.mark.parametrize(("module", "arguments", "changing"), [
    ("networks.lora", {"conv_dim": "2"}, "lora_up"),
    ("lycoris.kohya", {"algo": "lora", "preset": "full"}, "lora_up"),
    ("lycoris.kohya", {"algo": "lokr", "preset": "full", "factor": "4"}, "lokr_w2"),
])  # fmt: skip
def test_real_networks_train_save_and_load(module, arguments, changing, lycoris, tmp_path):
    torch.manual_seed(0)
    models = HostModels(None, hosts.ClipEncoder(), UnetWithOwnTimeEmbedding())
    models.text_encoder.requires_grad_(False)
    models.unet.requires_grad_(False)
    inputs = hosts.unet_inputs(models.unet)
    original = models.unet(**inputs).sample
    network = contract.create(NetworkRequest(module, dim=4, alpha=2.0, arguments=arguments), models)
    contract.apply(network, models, True, True)
    groups, names = contract.optimizer_groups(network, [1e-3], 1e-2, 1e-4)
    assert (names[0], names[-1]) == ("textencoder", "unet")
    assert groups[0]["lr"] == 1e-3 and groups[-1]["lr"] == 1e-2
    network.prepare_grad_etc(models.text_encoder, models.unet)
    network.on_epoch_start(models.text_encoder, models.unet)
    optimizer = torch.optim.SGD(groups)
    for _ in range(2):
        context = models.text_encoder(torch.randint(0, 90, (2, 7)))
        models.unet(**{**inputs, "encoder_hidden_states": context}).sample.square().mean().backward()
        optimizer.step()
    trained = models.unet(**inputs).sample
    assert not torch.equal(trained, original)

    path = tmp_path / "net.safetensors"
    network.save_weights(str(path), torch.float32, {"ss_network_dim": "4"})
    state = network.state_dict()
    assert any(key.startswith("lora_te_text_model_encoder_layers_0_self_attn_q_proj.") for key in state)
    assert any(key.startswith("lora_unet_mid_block_attentions_0_") and changing in key for key in state)

    fresh = HostModels(None, hosts.ClipEncoder(), UnetWithOwnTimeEmbedding())
    fresh.unet.load_state_dict(models.unet.state_dict())
    continued = contract.create(NetworkRequest(module, dim=4, alpha=2.0, arguments=arguments), fresh)
    contract.apply(continued, fresh, True, True)
    contract.load_weights(continued, path)
    continued.eval()
    torch.testing.assert_close(fresh.unet(**inputs).sample, trained, atol=1e-5, rtol=1e-4)
