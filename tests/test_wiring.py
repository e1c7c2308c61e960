"""Options reach what they configure, and numbers reach the model as they are: the wiring beside the formulas."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from library import caching
from library.data.cache import CacheOptions, CacheReport
from library.data.text_cache import TextCacheOptions
from library.families.sd import StableDiffusion
from library.losses import HuberConfig
from library.methods.base import LossRecipe
from library.noise import NoiseConfig
from library.objectives import DdpmConfig, FlowConfig
from library.options import Options, make_options
from library.schedulers import DensityConfig
from library.train_util import DTYPES, Precision, _allow_unscaling_half_gradients
from tests.flux_tiny import SHORT, flux_family, flux_options
from tests.sd3_tiny import tiny_options
from tests.training import MODEL, TOKENIZERS


def assert_all_read(config: Any, default: Any, *, except_for: tuple[str, ...] = ()) -> None:
    """No field of a configuration has its default value, so that none can have been left out."""
    left = [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in except_for and getattr(config, field.name) == getattr(default, field.name)
    ]
    assert left == []


# --- options reach their configurations ------------------------------------------------------------------------
def test_every_field_of_the_ddpm_objective_is_read_from_an_option() -> None:
    values = {
        "zero_terminal_snr": True, "min_timestep": 10, "max_timestep": 900, "min_snr_gamma": 5.0,
        "scale_v_pred_loss_like_noise_pred": True, "v_pred_like_loss": 0.5, "debiased_estimation_loss": True,
    }  # fmt: skip
    options = make_options(**values, loss_type="huber", huber_schedule="constant", huber_c=0.3, huber_scale=2.0)
    config = DdpmConfig.from_options(options.noise, options.loss, v_parameterization=True)
    assert_all_read(config, DdpmConfig())
    assert {name: getattr(config, name) for name in values} == values
    assert config.huber == HuberConfig("constant", 0.3, 2.0)


FLOW = {
    "min_timestep": 10, "max_timestep": 900, "loss_type": "smooth_l1", "huber_schedule": "exponential", "huber_c": 0.3,
    "huber_scale": 2.0, "logit_mean": 0.3, "logit_std": 2.0, "mode_scale": 0.7, "weighting_scheme": "mode",
}  # fmt: skip
DENSITY = DensityConfig("mode", 0.3, 2.0, 0.7)
HUBER = HuberConfig("exponential", 0.3, 2.0)


def test_every_field_of_a_flow_objective_is_read_from_an_option() -> None:
    from library.families.flux import Flux
    from library.families.sd3 import StableDiffusion3

    chosen = {"timestep_sampling": "shift", "model_prediction_type": "additive", "sigmoid_scale": 2.5}
    config = Flux(flux_options(**FLOW, **chosen, discrete_flow_shift=4.0)).make_objective().config
    assert_all_read(config, FlowConfig())
    assert (config.timestep_sampling, config.prediction_type) == ("shift", "additive")
    assert (config.sigmoid_scale, config.shift) == (2.5, 4.0)
    assert (config.density, config.huber) == (DENSITY, HUBER)
    other = StableDiffusion3(tiny_options(**FLOW, training_shift=4.0)).make_objective().config
    assert_all_read(other, FlowConfig(), except_for=("sigmoid_scale",))
    assert (other.shift, other.min_timestep, other.max_timestep) == (4.0, 10, 900)
    assert (other.density, other.huber) == (DENSITY, HUBER)


def sd_family(**changes: Any) -> StableDiffusion:
    return StableDiffusion(
        make_options(pretrained_model_name_or_path=str(MODEL), tokenizer_cache_dir=str(TOKENIZERS), **changes)
    )


def test_every_field_of_the_loss_is_read_from_an_option() -> None:
    values = {"loss_type": "l1", "masked_loss": True, "weighted_captions": True, "vae_batch_size": 3}
    family = sd_family(**values, noise_offset=0.2, min_timestep=7, v_parameterization=True)
    recipe = LossRecipe.from_options(family.options, family)
    assert {name: getattr(recipe, name) for name in values} == values
    assert recipe.noise == NoiseConfig(noise_offset=0.2)
    assert recipe.objective.config == DdpmConfig(min_timestep=7, v_parameterization=True)


def test_the_input_perturbation_of_flow_models_is_read() -> None:
    family = flux_family(**SHORT, ip_noise_gamma=0.2, ip_noise_gamma_random_strength=True)
    assert family.training_noise() == NoiseConfig(ip_noise_gamma=0.2, ip_noise_gamma_random_strength=True)


@pytest.mark.parametrize("name", ["skip_cache_check", "cache_latents_to_disk", "vae_batch_size", "highvram"])
def test_every_option_of_a_latent_cache_is_handed_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    field = {"cache_latents_to_disk": "to_disk", "skip_cache_check": "skip_check", "highvram": "high_vram"}.get(
        name, name
    )
    value = 4 if name == "vae_batch_size" else True
    assert getattr(latent_choices(sd_family(**{name: value}).options, monkeypatch), field) == value
    assert getattr(CacheOptions(), field) != value


def latent_choices(options: Options, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `fill_latent_caches` asks of the cache room."""
    from accelerate import Accelerator

    asked: list[Any] = []

    def remember(group: object, encode: object, **settings: Any) -> CacheReport:
        asked.append(settings["options"])
        return CacheReport()

    monkeypatch.setattr(caching, "cache_latents", remember)
    family = StableDiffusion(options)
    family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    caching.fill_latent_caches(options, family, [], Accelerator(cpu=True))  # type: ignore[arg-type]
    assert asked[0].vae_identity == family.vae_identity != ""
    return asked[0]


def test_every_option_of_a_text_cache_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    asked: list[TextCacheOptions] = []
    monkeypatch.setattr(
        caching, "cache_text_outputs",
        lambda group, encode, *, options, **settings: asked.append(options) or CacheReport(),
    )  # fmt: skip
    family = flux_family(**SHORT, cache_text_encoder_outputs_to_disk=True, skip_cache_check=True,
                         text_encoder_batch_size=3)  # fmt: skip
    caching.fill_text_caches(family.options, family, family.tokenize, [], Accelerator(cpu=True))  # type: ignore[arg-type]
    assert asked == [TextCacheOptions(to_disk=True, batch_size=3, skip_check=True, encoders=family.text_identity)]


# --- number formats --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("no", "no", "no", None)),
        ({"mixed_precision": "bf16"}, ("bf16", "no", "bf16", None)),
        ({"mixed_precision": "bf16", "full_bf16": True}, ("bf16", "bf16", "bf16", None)),
        ({"mixed_precision": "fp16", "full_fp16": True}, ("fp16", "fp16", "fp16", None)),
        ({"mixed_precision": "fp16", "no_half_vae": True}, ("fp16", "no", "no", None)),
        ({"save_precision": "bf16"}, ("no", "no", "no", "bf16")),
        ({"save_precision": "float"}, ("no", "no", "no", "float")),
    ],
)
def test_options_decide_the_number_formats(given: dict[str, Any], expected: tuple[str | None, ...]) -> None:
    found = dataclasses.astuple(Precision.from_options(make_options(**given)))
    assert found == tuple(None if name is None else DTYPES[name] for name in expected)


def test_fp16_gradients_are_unscaled_only_with_full_fp16() -> None:
    for is_full in (False, True):
        weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        if is_full:
            _allow_unscaling_half_gradients(scaler)
        scaler.scale(weight.sum()).backward()
        if not is_full:
            with pytest.raises(ValueError, match="unscale FP16"):
                scaler.unscale_(optimizer)
            continue
        scaler.unscale_(optimizer)
        assert weight.grad is not None and weight.grad.tolist() == [1.0, 1.0]
        scaler.step(optimizer)
        assert weight.tolist() == [0.0, 0.0]


def test_timesteps_reach_the_model_in_float32_whatever_it_computes_in() -> None:
    family = flux_family(**SHORT)
    family.denoiser.to(torch.bfloat16)
    seen: list[torch.Tensor] = []
    family.denoiser.register_forward_pre_hook(lambda module, args, words: seen.append(words["timesteps"]),
                                              with_kwargs=True)  # fmt: skip
    x_t = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([501.25, 502.5])  # bfloat16 knows no difference between them
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        text = family.encode_text(family.tokenize(["a cat", "a cat"]))
        family.predict(x_t, timesteps, text)
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], timesteps / 1000)


@pytest.mark.slow
def test_a_full_bf16_run_trains_bf16_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from library import training_loop
    from tests.training import PHOTOS, train, write_config

    formats: list[set[torch.dtype]] = []
    changes: list[bool] = []
    run_epochs = training_loop.run_epochs

    def watched(run: Any, *rest: Any) -> None:
        before = [parameter.detach().clone() for parameter in run.method.trained_parameters()]
        run_epochs(run, *rest)
        after = run.method.trained_parameters()
        formats.append({parameter.dtype for parameter in after})
        changes.append(any(not torch.equal(one, other) for one, other in zip(before, after, strict=True)))

    monkeypatch.setattr(training_loop, "run_epochs", watched)
    config = write_config(tmp_path, PHOTOS)
    for further in (["--full_bf16"], []):
        train("--dataset_config", config, "--max_train_steps", "2", "--mixed_precision", "bf16", *further,
              output_dir=tmp_path / "out")  # fmt: skip
    assert formats == [{torch.bfloat16}, {torch.float32}]
    assert changes == [True, True]
