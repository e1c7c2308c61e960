"""Objectives against closed forms, at the edges of their schedules, and in what they draw."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from library.losses import HuberConfig, elementwise_loss, huber_thresholds
from library.noise import NoiseConfig, draw_noise, perturb
from library.objectives import (
    PREDICTION_TYPES,
    TIMESTEP_SAMPLING,
    DdpmConfig,
    DdpmObjective,
    FlowConfig,
    NoiseLevel,
    Objective,
    RectifiedFlow,
)
from library.options.loss import LossOptions
from library.options.noise import NoiseOptions
from library.schedulers import (
    DensityConfig,
    mode_density,
    packed_tokens,
    resolution_shift_mu,
    shift_sigmas,
    sigma_weight,
    time_shift,
)

STEPS = torch.tensor([0, 1, 250, 500, 750, 999])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def column(*values: float) -> Tensor:
    return torch.tensor(values)


def ddpm_weights(**config: Any) -> Tensor:
    objective = DdpmObjective(DdpmConfig(**config))
    return objective.post_weight(torch.ones(len(STEPS)), objective.at(STEPS))


# --- closed forms ------------------------------------------------------------------------------------------
def test_ddpm_table() -> None:
    schedule = DdpmObjective(DdpmConfig()).schedule
    alphas = column(0.99915, 0.99829603, 0.67379263, 0.27633268, 0.05616985, 0.00466010)
    assert_close(schedule.alphas_cumprod[STEPS], alphas, rtol=3e-6, atol=0)
    snr = column(1175.47, 585.864, 2.06553, 0.38185, 0.0595127, 0.00468192)
    assert_close(schedule.snr[STEPS], snr, rtol=3e-5, atol=0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"min_snr_gamma": 5.0}, column(0.00425362, 0.0085344, 1, 1, 1, 1)),
        (
            {"min_snr_gamma": 5.0, "v_parameterization": True},
            column(0.00425, 0.00851986, 0.673793, 0.276333, 0.0561698, 0.0046601),
        ),
        (
            {"scale_v_pred_loss_like_noise_pred": True, "v_parameterization": True},
            column(0.999001, 0.998296, 0.673793, 0.276333, 0.0561698, 0.0046601),
        ),
        ({"debiased_estimation_loss": True}, column(0.0316228, 0.0413144, 0.695799, 1.61828, 4.09916, 14.6146)),
        (
            {"debiased_estimation_loss": True, "v_parameterization": True},
            column(0.000999001, 0.00170397, 0.326207, 0.723667, 0.94383, 0.99534),
        ),
    ],
)
def test_ddpm_weights(config: dict[str, Any], expected: Tensor) -> None:
    assert_close(ddpm_weights(**config), expected, rtol=3e-5, atol=0)


def test_ddpm_weights_multiply() -> None:
    one = {"min_snr_gamma": 5.0}
    other = {"debiased_estimation_loss": True}
    assert_close(ddpm_weights(**one, **other), ddpm_weights(**one) * ddpm_weights(**other))
    assert torch.equal(ddpm_weights(min_snr_gamma=0.0, v_pred_like_loss=0.0), torch.ones(len(STEPS)))


def test_weights_stay_finite_at_the_zero_terminal_step() -> None:
    weights = ddpm_weights(zero_terminal_snr=True, min_snr_gamma=5.0, debiased_estimation_loss=True)
    assert torch.isfinite(weights).all()
    assert_close(weights, ddpm_weights(min_snr_gamma=5.0, debiased_estimation_loss=True))


def test_zero_terminal_table() -> None:
    objective = DdpmObjective(DdpmConfig(zero_terminal_snr=True))
    picked = objective.schedule.alphas_cumprod[[0, 500, 998, 999]]
    assert_close(picked, column(0.99915, 0.24101878, 2.0e-7, 0.0), rtol=3e-6, atol=4e-9)
    noise = randn(1, 4, 2, 2)
    assert torch.equal(objective.corrupt(randn(1, 4, 2, 2, seed=1), noise, objective.at(torch.tensor([999]))), noise)


def test_huber_thresholds() -> None:
    objective = DdpmObjective(DdpmConfig(huber=HuberConfig("snr", 0.1)))
    expected = column(0.94971, 0.930001, 0.412964, 0.231284, 0.134613, 0.103691)
    assert_close(objective.huber_threshold(objective.at(STEPS)), expected, rtol=6e-6, atol=0)
    exponential = huber_thresholds(HuberConfig("exponential", 0.1), column(0, 500, 1000))
    assert_close(exponential, column(1, 0.316228, 0.1), rtol=2e-6, atol=0)


def test_the_scale_acts_on_every_huber_schedule() -> None:
    for schedule in ("constant", "exponential", "snr"):
        single, double = (
            DdpmObjective(DdpmConfig(huber=HuberConfig(schedule, 0.1, scale))) for scale in (1.0, 2.0)
        )
        assert_close(double.huber_threshold(double.at(STEPS)), 2 * single.huber_threshold(single.at(STEPS)))


def test_huber_losses() -> None:
    error, threshold = column(0.5)[None], column(0.1)
    zero = torch.zeros(1, 1)
    assert elementwise_loss(error, zero, "huber", threshold).item() == pytest.approx(0.0819804, rel=1e-5)
    assert elementwise_loss(error, zero, "smooth_l1", threshold).item() == pytest.approx(0.819804, rel=1e-5)


def test_losses_are_float32_under_half_precision() -> None:
    prediction, target = randn(2, 4).bfloat16(), randn(2, 4, seed=1).bfloat16()
    for kind in ("l1", "l2", "huber", "smooth_l1"):
        loss = elementwise_loss(prediction, target, kind, column(0.1, 0.2))
        assert loss.dtype == torch.float32
        assert torch.equal(loss, elementwise_loss(prediction.float(), target.float(), kind, column(0.1, 0.2)))


@pytest.mark.parametrize(("kind", "message"), [("huber", "needs a threshold"), ("l3", "choose one of l1, l2, huber")])
def test_losses_refuse(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        elementwise_loss(randn(1, 2), randn(1, 2), kind)


# --- DDPM --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("v_parameterization", [False, True])
def test_target_and_noisy_input_determine_the_clean_latents(v_parameterization: bool) -> None:
    objective = DdpmObjective(DdpmConfig(v_parameterization=v_parameterization))
    level, x0, noise = objective.at(STEPS[2:]), randn(4, 4, 8, 8), randn(4, 4, 8, 8, seed=1)
    x_t, target = objective.corrupt(x0, noise, level), objective.target(x0, noise, level)
    signal, sigma = ((1 - level.sigmas**2).sqrt()[:, None, None, None], level.sigmas[:, None, None, None])
    recovered = signal * x_t - sigma * target if v_parameterization else (x_t - sigma * target) / signal
    assert_close(recovered, x0, rtol=1e-3, atol=1e-4)
    assert objective.prediction(target, x_t, level) is target


def test_ddpm_timesteps_stay_in_range_without_the_upper_end() -> None:
    torch.manual_seed(0)
    objective = DdpmObjective(DdpmConfig(min_timestep=10, max_timestep=13))
    level = objective.sample_timesteps(200, (8, 8), "cpu")
    assert set(level.timesteps.tolist()) == {10.0, 11.0, 12.0}
    assert torch.equal(level.sigmas, objective.at(level.timesteps).sigmas)


def test_a_timestep_range_of_one_value_draws_nothing() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    level = DdpmObjective(DdpmConfig(min_timestep=1000, max_timestep=1000)).sample_timesteps(2, (8, 8), "cpu")
    assert level.timesteps.tolist() == [999, 999]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("values", [{"min_timestep": -1}, {"max_timestep": 1001}])
@pytest.mark.parametrize("config", [DdpmConfig, FlowConfig])
def test_timestep_ranges_outside_the_schedule_are_refused(config: Any, values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(values))} must be between 0 and 1000"):
        config(**values)


def test_ddpm_config_from_options() -> None:
    noise = NoiseOptions(zero_terminal_snr=True, min_timestep=5, max_timestep=900)
    loss = LossOptions(loss_type="huber", huber_schedule="constant", huber_c=0.2, huber_scale=3.0, min_snr_gamma=5.0)
    assert DdpmConfig.from_options(noise, loss, v_parameterization=True) == DdpmConfig(
        v_parameterization=True, zero_terminal_snr=True, min_timestep=5, max_timestep=900, min_snr_gamma=5.0,
        huber=HuberConfig("constant", 0.2, 3.0),
    )  # fmt: skip
    assert DdpmConfig.from_options(NoiseOptions(), LossOptions(), v_parameterization=False) == DdpmConfig()


# --- flow --------------------------------------------------------------------------------------------------
def flow_level(*sigmas: float) -> NoiseLevel:
    return NoiseLevel(column(*sigmas) * 1000, column(*sigmas))


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_perfect_velocity_is_a_perfect_prediction(kind: str) -> None:
    objective, level = RectifiedFlow(FlowConfig(prediction_type=kind)), flow_level(0.3, 0.9)
    x0, noise = randn(2, 4, 4, 4), randn(2, 4, 4, 4, seed=1)
    x_t, velocity = objective.corrupt(x0, noise, level), noise - x0
    prediction = objective.prediction(velocity, x_t, level)
    meaning = {"raw": velocity, "additive": velocity + x_t, "sigma_scaled": x0, "denoised": x0}[kind]
    assert_close(prediction, meaning, rtol=1e-5, atol=1e-5)
    assert_close(objective.target(x0, noise, level), x0 if kind == "denoised" else velocity)


def test_the_loss_weight_acts_only_on_estimates_of_the_clean_latents() -> None:
    density, level = DensityConfig("sigma_sqrt"), flow_level(0.5, 0.1)
    weights = {
        kind: RectifiedFlow(FlowConfig(prediction_type=kind, density=density)).weight(level)
        for kind in PREDICTION_TYPES
    }
    assert_close(weights["raw"], torch.ones(2))
    assert_close(weights["additive"], torch.ones(2))
    assert_close(weights["sigma_scaled"], column(4.0, 100.0))
    assert_close(weights["denoised"], column(4.0, 100.0))


def test_the_loss_weight_is_finite_at_sigma_zero() -> None:
    assert_close(sigma_weight(column(0.0, 0.001, 0.5), "sigma_sqrt"), column(1e6, 1e6, 4.0), rtol=1e-5, atol=0)
    assert_close(sigma_weight(column(0.25, 0.5), "cosmap"), column(1.018592, 1.273240), rtol=1e-6, atol=0)


def test_closed_forms_of_shifts() -> None:
    assert [resolution_shift_mu(packed_tokens(hw)) for hw in ((64, 64), (64, 96), (128, 128), (128, 192))] == (
        pytest.approx([0.63, 0.7166667, 1.15, 1.4966667])
    )
    assert_close(time_shift(1.15, column(0.5, 0.25)), column(0.759511, 0.512844), rtol=2e-6, atol=0)
    assert_close(shift_sigmas(column(0.25, 0.5), 3.0), column(0.5, 0.75))
    assert_close(shift_sigmas(column(0.5), math.exp(1.15)), time_shift(1.15, column(0.5)))
    assert_close(mode_density(column(0, 0.25, 0.5, 0.75), 1.29), column(1, 0.616416, 0.5, 0.383584), rtol=2e-6, atol=0)
    assert time_shift(1.15, column(0.0)).item() == 0


@pytest.mark.parametrize(
    ("u", "sigma"), [(0.0, 1.0), (0.5, 0.75), (0.999, 0.00299401), (1.0, 0.00299401)], ids=lambda value: str(value)
)
def test_sigma_sampling_looks_positions_up(monkeypatch: pytest.MonkeyPatch, u: float, sigma: float) -> None:
    monkeypatch.setattr(torch, "rand", lambda count: torch.full((count,), u))
    level = RectifiedFlow(FlowConfig(timestep_sampling="sigma", shift=3.0)).sample_timesteps(2, (8, 8), "cpu")
    assert_close(level.sigmas, column(sigma, sigma), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("shift", "timestep"), [(1.0, 500), (3.0, 750)])
def test_whole_steps(monkeypatch: pytest.MonkeyPatch, shift: float, timestep: int) -> None:
    monkeypatch.setattr(torch, "rand", lambda count: torch.full((count,), 0.5))
    level = RectifiedFlow(FlowConfig(timestep_sampling="whole_steps", shift=shift)).sample_timesteps(1, (8, 8), "cpu")
    assert level.timesteps.tolist() == [timestep]


@pytest.mark.parametrize("kind", TIMESTEP_SAMPLING)
def test_timestep_ranges_hold_for_every_kind(kind: str) -> None:
    torch.manual_seed(0)
    config = FlowConfig(timestep_sampling=kind, min_timestep=200, max_timestep=600, shift=3.0)
    level = RectifiedFlow(config).sample_timesteps(500, (64, 64), "cpu")
    assert 200 <= level.timesteps.min() < 330 and 570 < level.timesteps.max() <= 600
    assert_close(level.sigmas * 1000, level.timesteps, rtol=1e-6, atol=0)
    one = FlowConfig(timestep_sampling=kind, min_timestep=400, max_timestep=400)
    assert RectifiedFlow(one).sample_timesteps(3, (8, 8), "cpu").timesteps.tolist() == pytest.approx([400] * 3)


def test_explicit_timesteps_ignore_the_shift() -> None:
    level = RectifiedFlow(FlowConfig(timestep_sampling="sigma", shift=3.0)).at(torch.tensor([200, 800]))
    assert_close(level.sigmas, column(0.2, 0.8))
    assert level.timesteps.dtype == torch.float32


def test_flow_refuses_the_snr_schedule_and_names_what_works() -> None:
    with pytest.raises(ValueError, match="--huber_schedule exponential"):
        FlowConfig(huber=HuberConfig.from_options(LossOptions(loss_type="huber")))
    assert FlowConfig(huber=HuberConfig.from_options(LossOptions(loss_type="l2"))).huber is None


def test_shifts_and_thresholds_are_greater_than_zero() -> None:
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="must be greater than 0"):
            FlowConfig(shift=value)
        with pytest.raises(ValueError, match="must be greater than 0"):
            HuberConfig(c=value)
    FlowConfig(shift=1e-6), HuberConfig(c=1e-6)


@pytest.mark.parametrize("kind", TIMESTEP_SAMPLING)
@pytest.mark.parametrize(("limit", "value", "low", "high"), [("min", 900, 900, 1000), ("max", 100, 0, 100)])
def test_a_timestep_range_may_be_open(kind: str, limit: str, value: int, low: int, high: int) -> None:
    torch.manual_seed(0)
    config = FlowConfig(timestep_sampling=kind, **{f"{limit}_timestep": value})
    timesteps = RectifiedFlow(config).sample_timesteps(200, (64, 64), "cpu").timesteps
    assert low <= timesteps.min() < low + 40 and high - 40 < timesteps.max() <= high
    drawn = DdpmObjective(DdpmConfig(**{f"{limit}_timestep": value})).sample_timesteps(500, (8, 8), "cpu").timesteps
    assert low <= drawn.min() < low + 10 and high - 10 < drawn.max() < high


@pytest.mark.parametrize(
    "make",
    [
        lambda: FlowConfig(timestep_sampling="other"),
        lambda: FlowConfig(prediction_type="other"),
        lambda: DensityConfig("other"),
        lambda: HuberConfig("other"),
    ],
)
def test_unknown_kinds_list_the_known_ones(make: Any) -> None:
    with pytest.raises(ValueError, match="'other' is unknown; choose one of"):
        make()


# --- both --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("objective", [DdpmObjective(DdpmConfig(v_parameterization=True)), RectifiedFlow(FlowConfig())])
def test_half_precision_latents_stay_half_while_levels_stay_float32(objective: Objective) -> None:
    level = objective.at(torch.tensor([333, 777]))
    x0, noise = randn(2, 4, 4, 4), randn(2, 4, 4, 4, seed=1)
    x_t = objective.corrupt(x0.bfloat16(), noise.bfloat16(), level)
    assert (level.timesteps.dtype, level.sigmas.dtype) == (torch.float32, torch.float32)
    assert x_t.dtype == objective.target(x0.bfloat16(), noise.bfloat16(), level).dtype == torch.bfloat16
    assert_close(x_t.float(), objective.corrupt(x0, noise, level), rtol=0, atol=0.03)


def test_levels_are_selected_by_row() -> None:
    level = flow_level(0.1, 0.2, 0.3)
    assert_close(level.select(torch.tensor([True, False, True])).sigmas, column(0.1, 0.3))
    assert_close(level.select(torch.tensor([2])).timesteps, column(300.0))


def test_noise_without_options_is_one_plain_draw() -> None:
    latents = torch.zeros(2, 4, 8, 8)
    torch.manual_seed(3)
    noise = perturb(draw_noise(latents, NoiseConfig.from_options(NoiseOptions())), NoiseConfig())
    following = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(noise, torch.randn(2, 4, 8, 8))
    assert torch.equal(following, torch.rand(1))


def test_noise_config_from_options_takes_every_noise_option() -> None:
    values = {
        "noise_offset": 0.1, "noise_offset_random_strength": True, "adaptive_noise_scale": 0.2,
        "multires_noise_iterations": 3, "multires_noise_discount": 0.4, "ip_noise_gamma": 0.5,
        "ip_noise_gamma_random_strength": True,
    }  # fmt: skip
    assert NoiseConfig.from_options(NoiseOptions(**values)) == NoiseConfig(**values)


def test_noise_keeps_the_dtype_of_the_latents() -> None:
    latents = torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)
    config = NoiseConfig(0.1, True, 0.1, 2, 0.3, 0.1, True)
    noise = draw_noise(latents, config)
    assert noise.dtype == perturb(noise, config).dtype == torch.bfloat16


@pytest.mark.parametrize("objective", [DdpmObjective(DdpmConfig()), RectifiedFlow(FlowConfig())])
def test_a_random_strength_is_drawn_before_the_noise_of_ddpm_models_and_after_that_of_flow_models(
    objective: Objective,
) -> None:
    noise, config = randn(2, 4, 8, 8), NoiseConfig(ip_noise_gamma=0.5, ip_noise_gamma_random_strength=True)
    torch.manual_seed(3)
    found = perturb(noise, config, draws_strength_last=objective.draws_strength_last)
    torch.manual_seed(3)
    if isinstance(objective, RectifiedFlow):
        fresh, strength = torch.randn(2, 4, 8, 8), torch.rand(1)
    else:
        strength, fresh = torch.rand(1), torch.randn(2, 4, 8, 8)
    assert_close(found, noise + 0.5 * strength * fresh, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["ddpm", *TIMESTEP_SAMPLING])
def test_whatever_is_drawn_is_on_the_device_of_the_latents(kind: str) -> None:
    elsewhere = torch.device("meta")  # a device that refuses tensors of others
    latents = torch.zeros(2, 4, 8, 8, device=elsewhere)
    config = NoiseConfig(0.1, True, 0.1, 2, 0.3, 0.1, True)
    noise = draw_noise(latents, config)
    objective = DdpmObjective(DdpmConfig()) if kind == "ddpm" else RectifiedFlow(FlowConfig(timestep_sampling=kind))
    for draws_strength_last in (False, True):
        assert perturb(noise, config, draws_strength_last=draws_strength_last).device == elsewhere
    level = objective.sample_timesteps(2, (8, 8), elsewhere)
    drawn = (noise, level.sigmas, level.timesteps, objective.corrupt(latents, noise, level))
    assert {tensor.device for tensor in drawn} == {elsewhere}
