"""What a trainer or generator calls on any network, ours or a third party's such as `lycoris.kohya`.

A network module offers `create_network` and `create_network_from_weights`. A network is an `nn.Module` with
apply_to(text_encoder, unet, train_text_encoder, train_unet), prepare_optimizer_params(text_encoder_lr, unet_lr, lr),
prepare_grad_etc(text_encoder, unet), on_epoch_start(text_encoder, unet), enable_gradient_checkpointing(),
get_trainable_params() and save_weights(path, dtype, metadata); load_weights(path) if it shall continue a file.
Optional: prepare_network(options), on_step_start(text_encoder, unet), set_multiplier(value), merge_to(...),
apply_max_norm_regularization(value, device), update_norms(), update_grad_norms(), weight_norms(), grad_norms(),
combined_weight_norms(), is_mergeable(), train_t5xxl. Never hand in a network that is wrapped (DDP): unwrap it first.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.finite import check_finite
from library.checkpoints.tensors import load_tensors, open_tensors
from library.options.key_values import read_texts
from networks.weights_file import DENOISER_PREFIXES, check_denoiser_fits

logger = logging.getLogger(__name__)

BUILT_IN = "networks.lora"
Network = Any  # an nn.Module with the methods above
#: mark of a network that was made with the values of its file
_FILLED = "holds_its_file"
_INSTALL_HINTS = {"lycoris": "pip install lycoris-lora"}


@dataclass(frozen=True)
class HostModels:
    """The models that a network hooks into. `text_encoder` is one bare module, or a real `list` of several."""

    vae: nn.Module | None
    text_encoder: Any
    unet: nn.Module


@dataclass(frozen=True)
class NetworkRequest:
    """The user's choices for a network to train; `weights` is the file that ranks are taken from, if any."""

    module: str | None
    dim: int | None = None
    alpha: float | None = 1.0
    dropout: float | None = None
    arguments: Mapping[str, str] = field(default_factory=dict)
    weights: str | Path | None = None


def parse_network_args(items: Sequence[str] | None, option: str = "--network_args") -> dict[str, str]:
    """`key=value` items as a dictionary of texts. Raises ValueError that names the item."""
    return read_texts(items, option)


def training_arguments(request: NetworkRequest) -> dict[str, Any]:
    """The keyword arguments of a network to train: the user's pairs, all text.

    A fresh network also gets `dropout` (a number or None), where third-party networks look for it. With
    `--network_args` given, this is the value of the metadata key `ss_network_args`.
    """
    arguments: dict[str, Any] = dict(request.arguments)
    if request.weights is None:
        arguments.setdefault("dropout", request.dropout)
    return arguments


# --- creating --------------------------------------------------------------------------------------------------
def import_network_module(name: str | None) -> ModuleType:
    """The module of `--network_module`. Raises ValueError that says where it was looked for, or what it lacks."""
    if not name:
        raise ValueError(f"--network_module is missing. For LoRA: --network_module {BUILT_IN}")
    _add_script_folder()
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(f"--network_module {name} needs {error.name}, which is not installed.") from error
        raise ValueError(_not_found(name)) from error
    except ImportError as error:
        raise ValueError(f"--network_module {name} was found but cannot be imported: {error}") from error
    for function in ("create_network", "create_network_from_weights"):
        if not callable(getattr(module, function, None)):
            raise ValueError(f"--network_module {name} ({module.__file__}) is not a network: it has no {function}().")
    return module


def _add_script_folder() -> None:
    folder = str(Path(__file__).resolve().parent.parent)
    if folder not in sys.path:
        sys.path.append(folder)


def _not_found(name: str) -> str:
    hint = _INSTALL_HINTS.get(name.partition(".")[0])
    advice = f"Install it ({hint})" if hint else f"Check the spelling (LoRA is {BUILT_IN}) or install its package"
    return f"--network_module {name}: no such Python module. Looked in: {', '.join(filter(None, sys.path))}. {advice}."


def create(request: NetworkRequest, models: HostModels) -> Network:
    """A network to train. Raises ValueError if the module makes none, FileNotFoundError without the rank file.

    With `request.weights` it has the ranks of that file; the weights themselves are loaded after `apply`.
    """
    module = import_network_module(request.module)
    arguments = training_arguments(request)
    if request.weights is None:
        network = module.create_network(
            1.0, request.dim, request.alpha, models.vae, models.text_encoder, models.unet,
            neuron_dropout=request.dropout, **arguments,
        )  # fmt: skip
        return _created(network, request.module, "these options")
    if request.dropout is not None:
        logger.warning("--network_dropout has no effect together with --dim_from_weights")
    with _naming("--network_weights", request.weights, is_built_in=_is_built_in(module)):
        network, weights = module.create_network_from_weights(
            1, str(request.weights), models.vae, models.text_encoder, models.unet, **arguments
        )
        return _created(network, request.module, request.weights, weights)


def create_for_generation(
    module_name: str, path: str | Path, models: HostModels, multiplier: float = 1.0,
    arguments: Mapping[str, str] | None = None,
) -> tuple[Network, dict[str, Tensor]]:
    """(network, its weights) of a file; load the weights after `apply`, or merge them."""
    module = import_network_module(module_name)
    with _naming("--network_weights", path, is_built_in=_is_built_in(module)):
        network, weights = module.create_network_from_weights(
            multiplier, str(path), models.vae, models.text_encoder, models.unet, for_inference=True,
            **(arguments or {}),
        )  # fmt: skip
        return _from_file(network, module_name, path, weights), weights


def create_from_tensors(
    module_name: str, weights: dict[str, Tensor], models: HostModels, multiplier: float = 1.0
) -> tuple[Network, dict[str, Tensor]]:
    """(network for generation, its weights) of tensors that are already read."""
    network, weights = import_network_module(module_name).create_network_from_weights(
        multiplier, None, models.vae, models.text_encoder, models.unet, weights, True
    )
    return _created(network, module_name, "the given weights", weights), weights


def merge_base_weights(
    module_name: str | None, path: str | Path, multiplier: float, models: HostModels,
    *, dtype: torch.dtype | None, device: torch.device | str,
) -> None:
    """Merge a network file into the model before training (`--base_weights`)."""
    module = import_network_module(module_name)
    with _naming("--base_weights", path, is_built_in=_is_built_in(module)):
        network, weights = module.create_network_from_weights(
            multiplier, str(path), models.vae, models.text_encoder, models.unet, for_inference=True
        )
        network = _from_file(network, module_name, path, weights)
        if not hasattr(network, "merge_to"):
            raise ValueError(f"networks of {module_name} cannot be merged into a model.")
        network.merge_to(models.text_encoder, models.unet, weights, dtype, device)


def _created(
    network: Network | None, module_name: str | None, source: Any, weights: Mapping[str, Any] | None = None
) -> Network:
    """The network. Raises ValueError if there is none, or if it has no part for the denoiser but its file does."""
    if network is None:
        raise ValueError(f"--network_module {module_name} made no network from {source}.")
    if weights and not getattr(network, "unet_loras", True):
        check_denoiser_fits({key.partition(".")[0] for key in weights}, ())
    if weights and _holds(network, weights):
        setattr(network, _FILLED, True)
    return network


def _from_file(
    network: Network | None, module_name: str | None, path: str | Path, weights: Mapping[str, Any]
) -> Network:
    """The network, which knows its file's name."""
    network = _created(network, module_name, path, weights)
    if hasattr(network, "weights_source"):
        network.weights_source = str(path)
    _look_for_nan(network, path)
    return network


def _look_for_nan(network: Network, path: str | Path) -> None:
    """Does for networks of other packages what ours do by themselves; a file format of their own is their business."""
    if hasattr(network, "weights_source"):
        return
    try:
        tensors = load_tensors(path)
    except ValueError:
        return
    check_finite(str(path), tensors)


def _holds(network: Network, weights: Mapping[str, Any]) -> bool:
    """Whether a network that was made from a file has the file's values already (LyCORIS', under whatever names).

    Loading them again would count them twice where an algorithm trains whole weights.
    """
    modules = (*getattr(network, "text_encoder_loras", ()), *getattr(network, "unet_loras", ()))
    own = {module.lora_name: [parameter.detach() for parameter in module.parameters()] for module in modules}
    values = {key: value for key, value in weights.items() if isinstance(value, Tensor) and value.dim() > 0}
    return bool(own and values) and all(
        any(value.shape == one.shape and torch.equal(value.to(one), one) for one in own.get(key.partition(".")[0], ()))
        for key, value in values.items()
    )


def _is_built_in(module: ModuleType) -> bool:
    return module.__name__.startswith("networks.")


@contextmanager
def _naming(option: str, path: str | Path, *, is_built_in: bool = True) -> Iterator[None]:
    """Errors about a file name it and its option. Raises FileNotFoundError without the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{option}: {path} does not exist.")
    try:
        yield
    except (TypeError, KeyError, AttributeError, RuntimeError) as error:
        if is_built_in:
            raise
        raise ValueError(f"{option} {path}: the network module cannot use this file ({error}).") from error
    except ValueError as error:
        if str(error).startswith(option):
            raise
        raise ValueError(f"{option}: {error}" if str(path) in str(error) else f"{option} {path}: {error}") from error


# --- attaching -------------------------------------------------------------------------------------------------
def prepare(network: Network, options: Any) -> None:
    """Give the network a read-only view of all options, if it wants one."""
    if hasattr(network, "prepare_network"):
        network.prepare_network(options)


def apply(network: Network, models: HostModels, train_text_encoder: bool, train_unet: bool) -> None:
    """Hook the network into the models. Raises ValueError if it has no parameters then."""
    network.apply_to(models.text_encoder, models.unet, train_text_encoder, train_unet)
    if next(network.parameters(), None) is None:
        raise ValueError(
            f"The network ({type(network).__module__}) has nothing to train: it found no layer to adapt in "
            f"{type(models.unet).__name__}. Does --network_module fit the model family?"
        )


def load_weights(network: Network, path: str | Path) -> Any:
    """Load `--network_weights` into an applied network; returns the network's own report.

    Raises ValueError if nothing in the file fits the network, or nothing of its part for the denoiser.
    """
    if getattr(network, _FILLED, False):
        return {}
    with _naming("--network_weights", path):
        _look_for_nan(network, path)
        report = network.load_weights(str(path))
        if _unexpected_keys(report):
            check_loaded(network, list(open_tensors(path)), report)
    return report


def check_loaded(network: Network, keys: Collection[str], report: Any) -> list[str]:
    """The keys of a file that found no place in a network, by the network's own report.

    Raises ValueError if none did, or none of the denoiser's. Networks of this project have checked that themselves.
    """
    unused = _unexpected_keys(report)
    if hasattr(network, "convert_weights"):
        return unused
    if unused and len(unused) == len(keys):
        raise ValueError(
            f"none of its {len(keys)} tensors belongs to this model (first key: {unused[0]}). Is it a file for "
            "another model family, or for another --network_module?"
        )
    own = {key.partition(".")[0] for key in network.state_dict() if key.startswith(DENOISER_PREFIXES)}
    if own:
        check_denoiser_fits({key.partition(".")[0] for key in keys}, own)
    return unused


def _unexpected_keys(report: Any) -> list[str]:
    """The keys that found no place, from what a network's `load_weights` or `load_state_dict` returned."""
    if isinstance(report, dict):
        return list(report.get("unexpected keys", ()))
    return list(getattr(report, "unexpected_keys", ()))


def is_mergeable(network: Network) -> bool:
    """Whether the network says that it can be merged into the model; False if it does not say."""
    return bool(network.is_mergeable()) if hasattr(network, "is_mergeable") else False


# --- optimizer -------------------------------------------------------------------------------------------------
def optimizer_groups(
    network: Network,
    text_encoder_lr: float | Sequence[float] | None,
    unet_lr: float | None,
    default_lr: float | None,
    *,
    trains_text_encoder: bool = True,
) -> tuple[list[dict[str, Any]], list[str]]:
    """(optimizer groups, one name per group for the logs). Raises ValueError if there is nothing to train.

    Networks with `prepare_optimizer_params_with_multiple_te_lrs` get all text-encoder rates, others the first one;
    methods that take two rates only get no default.
    """
    if isinstance(text_encoder_lr, tuple):
        text_encoder_lr = list(text_encoder_lr)
    if hasattr(network, "prepare_optimizer_params_with_multiple_te_lrs"):
        result = network.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)
    else:
        method = network.prepare_optimizer_params
        rates = [_first_rate(text_encoder_lr), unet_lr, default_lr]
        result = method(*rates) if _accepts(method, len(rates)) else method(*rates[:2])
    groups, descriptions = result if isinstance(result, tuple) else (result, None)
    groups = [{**group, "params": list(group["params"])} for group in groups]
    if not any(group["params"] for group in groups):
        raise ValueError("The network has nothing to train: its parts are switched off or have no learning rate.")
    if descriptions is None or len(descriptions) != len(groups):
        descriptions = _default_descriptions(len(groups), trains_text_encoder=trains_text_encoder)
    return groups, [str(description).strip() for description in descriptions]


def _first_rate(rates: float | Sequence[float] | None) -> float | None:
    if rates is None or isinstance(rates, (int, float)):
        return rates
    if len(rates) > 1:
        logger.warning("--text_encoder_lr: this network has one rate for all text encoders, %s is used", rates[0])
    return rates[0] if rates else None


def _accepts(method: Any, count: int) -> bool:
    """Whether a method can be called with `count` positional arguments."""
    try:
        inspect.signature(method).bind(*range(count))
    except TypeError:
        return False
    return True


def _default_descriptions(count: int, *, trains_text_encoder: bool) -> list[str]:
    if count > 2:
        return [f"group{index}" for index in range(count)]
    names = ["textencoder", "unet"] if trains_text_encoder else ["unet", "group1"]
    return names[:count]


# --- logs ------------------------------------------------------------------------------------------------------
def reported_norms(network: Network) -> dict[str, float]:
    """Mean norms that the network reports by itself, for the logs; empty if it reports none."""
    if not hasattr(network, "weight_norms"):
        return {}
    scalars = {}
    for member, name in (
        ("weight_norms", "norm/avg_key_norm"),
        ("grad_norms", "norm/avg_grad_norm"),
        ("combined_weight_norms", "norm/avg_combined_norm"),
    ):
        norms = getattr(network, member)() if hasattr(network, member) else None
        if norms is not None:
            scalars[name] = float(norms.mean())
    return scalars
