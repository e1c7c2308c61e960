"""Schedules, noise, losses and hashes against values recorded from the reference."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from library import losses
from library.hashes import file_sha256, legacy_file_hash, sshs_hashes
from library.losses import HuberConfig
from library.lr_schedulers import create_lr_scheduler
from library.noise import NoiseConfig, apply_noise_offset, draw_noise, perturb, pyramid_noise
from library.objectives import DdpmConfig, DdpmObjective, FlowConfig, NoiseLevel, RectifiedFlow
from library.optimizers import create_optimizer
from library.options.optimizer import OptimizerOptions
from library.schedulers import (
    DensityConfig,
    draw_density,
    flow_sigmas,
    packed_tokens,
    rescale_to_zero_terminal_snr,
    resolution_shift_mu,
    resolution_shifted_inference_sigmas,
    scaled_linear_schedule,
    shifted_inference_sigmas,
    sigma_weight,
    time_shift,
)

GOLDEN_FILE = Path(__file__).parent / "data" / "golden_math.json"


@cache
def _file() -> dict[str, Any]:
    return json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))


def golden(section: str) -> Any:
    return _file()[section]


def cases(section: str) -> list[Any]:
    return golden(section)["cases"]


def tensor(record: dict[str, Any]) -> Tensor:
    return torch.tensor(record["values"]).reshape(record["shape"])


def at(table: Tensor, section: str) -> Tensor:
    return table[golden(section)["timesteps"]]


def levels(section: str, **config: Any) -> tuple[DdpmObjective, NoiseLevel]:
    objective = DdpmObjective(DdpmConfig(**config))
    return objective, objective.at(torch.tensor(golden(section)["timesteps"]))


# --- schedules ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("column", ["betas", "alphas_cumprod", "snr"])
def test_ddpm_schedule(column: str) -> None:
    expected = torch.tensor(golden("ddpm_schedule")[column])
    assert_close(at(getattr(scaled_linear_schedule(), column), "ddpm_schedule"), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("column", ["betas", "alphas_cumprod"])
def test_zero_terminal_schedule(column: str) -> None:
    schedule = scaled_linear_schedule(zero_terminal_snr=True)
    expected = torch.tensor(golden("zero_terminal_snr")[column])
    assert_close(at(getattr(schedule, column), "zero_terminal_snr"), expected, rtol=2e-4, atol=2e-8)
    assert schedule.alphas_cumprod[-1] == 0


def test_snr_belongs_to_the_schedule_before_the_zero_terminal_rescaling() -> None:
    schedule = scaled_linear_schedule(zero_terminal_snr=True)
    wanted = torch.tensor(golden("zero_terminal_snr")["snr_if_computed_before_the_fix"])
    assert_close(at(schedule.snr, "zero_terminal_snr"), wanted, rtol=2e-6, atol=0)


def test_rescaling_refuses_a_schedule_that_does_not_lose_signal() -> None:
    with pytest.raises(ValueError, match="needs at least two betas"):
        rescale_to_zero_terminal_snr(torch.zeros(10))


# --- weights -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gamma", ["1.0", "5.0", "20.0"])
@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_min_snr_weight(gamma: str, kind: str) -> None:
    section = golden("min_snr_weight")["by_gamma"]
    assert gamma in section and len(section) == 3
    objective, level = levels("min_snr_weight", min_snr_gamma=float(gamma), v_parameterization=kind == "v")
    result = objective.post_weight(torch.ones(11), level)
    assert_close(result, torch.tensor(section[gamma][kind]), rtol=2e-6, atol=0)


def test_v_prediction_loss_scale() -> None:
    objective, level = levels("v_pred_loss_scale", scale_v_pred_loss_like_noise_pred=True, v_parameterization=True)
    result = objective.post_weight(torch.ones(11), level)
    assert_close(result, torch.tensor(golden("v_pred_loss_scale")["scale"]), rtol=2e-6, atol=0)


def test_v_prediction_like_loss() -> None:
    section = golden("v_pred_like_loss")
    objective, level = levels("v_pred_like_loss", v_pred_like_loss=section["weight"])
    result = objective.post_weight(torch.ones(11), level)
    assert_close(result, torch.tensor(section["factor_on_loss_1"]), rtol=2e-6, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_debiased_estimation(kind: str) -> None:
    objective, level = levels("debiased_estimation", debiased_estimation_loss=True, v_parameterization=kind == "v")
    result = objective.post_weight(torch.ones(11), level)
    assert_close(result, torch.tensor(golden("debiased_estimation")[kind]), rtol=2e-6, atol=0)


# --- losses ------------------------------------------------------------------------------------------------
def wanted_scale(case: dict[str, Any]) -> float:
    """The reference leaves `huber_scale` out of the `snr` schedule; we multiply by it."""
    return case["huber_scale"] if case["huber_schedule"] == "snr" else 1.0


@pytest.mark.parametrize("case", cases("huber_threshold_schedule"), ids=lambda c: str(list(c.values())[:3]))
def test_huber_threshold(case: dict[str, Any]) -> None:
    huber = HuberConfig(case["huber_schedule"], case["huber_c"], case["huber_scale"])
    objective, level = levels("huber_threshold_schedule", huber=huber)
    expected = torch.tensor(case["threshold"]) * wanted_scale(case)
    assert_close(objective.huber_threshold(level), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("case", cases("losses"), ids=lambda c: "-".join(str(v) for v in c.values() if type(v) is str))
def test_elementwise_loss(case: dict[str, Any]) -> None:
    section = golden("losses")
    threshold = torch.tensor(case["threshold"]) if "threshold" in case else None
    loss = losses.elementwise_loss(tensor(section["pred"]), tensor(section["target"]), case["loss_type"], threshold)
    reduced = {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[case["reduction"]]
    assert_close(reduced, tensor(case["result"]), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("case", [c for c in cases("losses") if "threshold" in c and c["reduction"] == "none"])
def test_threshold_of_loss_cases(case: dict[str, Any]) -> None:
    huber = HuberConfig(case["huber_schedule"], case["huber_c"], case["huber_scale"])
    objective, level = levels("losses", huber=huber)
    expected = torch.tensor(case["threshold"]) * wanted_scale(case)
    assert_close(objective.huber_threshold(level), expected, rtol=2e-6, atol=0)


def test_masks() -> None:
    section = golden("masked_loss")
    loss = tensor(section["loss"])
    masks = {name: tensor(section[name]) for name in ("alpha_masks", "conditioning_images")}
    for name, mask in masks.items():
        assert_close(losses.apply_mask(loss, **{name: mask}), tensor(section[f"with_{name}"]), rtol=2e-6, atol=1e-7)
    assert_close(losses.apply_mask(loss, **masks), tensor(section["with_conditioning_images"]), rtol=2e-6, atol=1e-7)
    assert_close(losses.apply_mask(loss), tensor(section["with_none"]))


# --- noise -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", cases("noise_offset"))
def test_noise_offset(case: dict[str, Any]) -> None:
    section = golden("noise_offset")
    torch.manual_seed(case["torch_seed"])
    noise = apply_noise_offset(
        tensor(section["latents"]), tensor(section["noise"]), case["noise_offset"], case["adaptive_noise_scale"]
    )
    assert_close(noise, tensor(case["result"]), rtol=1e-6, atol=1e-6)


def pyramid_cases() -> list[tuple[Tensor, dict[str, Any]]]:
    section, base = golden("pyramid_noise"), tensor(golden("noise_offset")["noise"])
    nonsquare = section["nonsquare"]
    return [(base, case) for case in section["cases"]] + [(tensor(nonsquare["noise"]), nonsquare)]


@pytest.mark.parametrize(("noise", "case"), pyramid_cases())
def test_pyramid_noise(noise: Tensor, case: dict[str, Any]) -> None:
    torch.manual_seed(case["torch_seed"])
    random.seed(case["python_random_seed"])
    result = pyramid_noise(noise, case["iterations"], case["discount"])
    assert_close(result, tensor(case["result"]), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("case", cases("noise_and_timesteps_sd"), ids=lambda c: c["name"])
def test_draws_of_a_ddpm_step_keep_their_order(case: dict[str, Any]) -> None:
    x0 = tensor(golden("noise_offset")["latents"])
    options = dict(case["options"])
    limits = {name: options.pop(name, None) for name in ("min_timestep", "max_timestep")}
    config, objective = NoiseConfig(**options), DdpmObjective(DdpmConfig(**limits))
    torch.manual_seed(case["torch_seed"])
    random.seed(case["python_random_seed"])
    noise = draw_noise(x0, config)
    level = objective.sample_timesteps(len(x0), x0.shape[-2:], x0.device)
    noisy = objective.corrupt(x0, perturb(noise, config, draws_strength_last=objective.draws_strength_last), level)
    assert level.timesteps.dtype == torch.float32
    assert level.timesteps.tolist() == case["timesteps"]
    assert_close(noise, tensor(case["noise"]), rtol=1e-6, atol=2e-6)
    assert_close(noisy, tensor(case["noisy"]), rtol=1e-6, atol=2e-6)


def test_velocity_target() -> None:
    section = golden("velocity")
    objective = DdpmObjective(DdpmConfig(v_parameterization=True))
    level = objective.at(torch.tensor([section["timestep"]]))
    target = objective.target(tensor(section["latents"]), tensor(section["noise"]), level)
    assert_close(target, tensor(section["velocity"]), rtol=1e-6, atol=1e-6)


# --- flow --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", cases("density_for_timestep_sampling"), ids=lambda c: c["weighting_scheme"])
def test_density(case: dict[str, Any]) -> None:
    settings = {name: value for name, value in case.items() if name not in ("torch_seed", "u")}
    torch.manual_seed(case["torch_seed"])
    assert_close(draw_density(4, DensityConfig(**settings)), torch.tensor(case["u"]), rtol=1e-6, atol=1e-7)


def test_loss_weighting_at_sigma() -> None:
    section = golden("sd3_loss_weighting")
    assert set(section["by_scheme"]) == {"sigma_sqrt", "cosmap", "logit_normal", "mode", "none", "uniform"}
    for scheme, expected in section["by_scheme"].items():
        assert_close(sigma_weight(torch.tensor(section["sigmas"]), scheme), torch.tensor(expected), rtol=1e-6, atol=0)


def flow_step(case: dict[str, Any], config: FlowConfig, noise_config: NoiseConfig) -> tuple[NoiseLevel, Tensor]:
    """Timesteps, then the perturbation, then the noisy input, from the case's seed."""
    x0, noise = (tensor(golden("flux_timesteps")[name]) for name in ("latents", "noise"))
    objective = RectifiedFlow(config)
    torch.manual_seed(case["torch_seed"])
    level = objective.sample_timesteps(len(x0), x0.shape[-2:], x0.device)
    perturbed = perturb(noise, noise_config, draws_strength_last=objective.draws_strength_last)
    return level, objective.corrupt(x0, perturbed, level)


def assert_flow_step(case: dict[str, Any], level: NoiseLevel, noisy: Tensor) -> None:
    assert_close(level.timesteps, torch.tensor(case["timesteps"]), rtol=1e-6, atol=0)
    assert_close(level.sigmas, torch.tensor(case["sigmas"]), rtol=1e-6, atol=0)
    assert_close(noisy, tensor(case["noisy"]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", cases("flux_timesteps"), ids=lambda c: "-".join(str(v) for v in c["options"].values()))
def test_flow_timesteps(case: dict[str, Any]) -> None:
    options = dict(case["options"])
    kind = options.pop("timestep_sampling")
    noise = NoiseConfig(**{name: options.pop(name) for name in list(options) if name.startswith("ip_noise")})
    density = DensityConfig(
        **{name: options.pop(name) for name in list(options) if name in DensityConfig.__dataclass_fields__}
    )
    config = FlowConfig(
        timestep_sampling="resolution_shift" if kind == "flux_shift" else kind,
        density=density,
        shift=options.pop("discrete_flow_shift", 3.0),
        **options,
    )
    assert_flow_step(case, *flow_step(case, config, noise))


@pytest.mark.parametrize("case", cases("sd3_timesteps"), ids=lambda c: str(c["options"]))
def test_whole_flow_timesteps(case: dict[str, Any]) -> None:
    options = dict(case["options"])
    config = FlowConfig(
        timestep_sampling="whole_steps",
        density=DensityConfig(options.pop("weighting_scheme", "uniform")),
        shift=options.pop("training_shift", 1.0),
        **options,
    )
    assert_flow_step(case, *flow_step(case, config, NoiseConfig()))


@pytest.mark.parametrize("case", golden("flux_timesteps")["scheduler"], ids=lambda c: str(c["discrete_flow_shift"]))
def test_training_sigmas(case: dict[str, Any]) -> None:
    sigmas = flow_sigmas(1000, case["discrete_flow_shift"])
    assert len(sigmas) == case["n_sigmas"]
    picked = sigmas[[0, 1, 500, 998, 999]]
    assert_close(picked, torch.tensor(case["sigmas_at_0_1_500_998_999"]), rtol=1e-6, atol=0)
    assert_close(picked * 1000, torch.tensor(case["timesteps_at_0_1_500_998_999"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", cases("flux_model_prediction_type"))
def test_flow_prediction_types(case: dict[str, Any]) -> None:
    section = golden("flux_model_prediction_type")
    sigmas = torch.tensor(section["sigmas"])
    level = NoiseLevel(sigmas * 1000, sigmas)
    density = DensityConfig(case["weighting_scheme"])
    objective = RectifiedFlow(FlowConfig(prediction_type=case["model_prediction_type"], density=density))
    result = objective.prediction(tensor(section["model_pred"]), tensor(section["noisy_model_input"]), level)
    assert_close(result, tensor(case["result"]), rtol=1e-6, atol=1e-6)
    expected = torch.ones(2) if case["weighting"] is None else tensor(case["weighting"]).flatten()
    assert_close(objective.weight(level), expected, rtol=1e-6, atol=0)


def test_resolution_shift() -> None:
    section = golden("flux_shift_mu")
    for case in section["cases"]:
        tokens = packed_tokens((case["latent_h"], case["latent_w"]))
        assert tokens == case["seq_len"]
        assert resolution_shift_mu(tokens) == pytest.approx(case["mu"], rel=1e-12)
    for case in section["time_shift"]:
        assert time_shift(case["mu"], torch.tensor(case["t"])).item() == pytest.approx(case["result"], rel=3e-7)


@pytest.mark.parametrize("case", golden("flux_inference_schedule"), ids=lambda c: f"{c['steps']}-{c['seq_len']}")
def test_resolution_shifted_inference_sigmas(case: dict[str, Any]) -> None:
    result = resolution_shifted_inference_sigmas(case["steps"], case["seq_len"], shifted=case["shift"])
    assert_close(result, torch.tensor(case["timesteps"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", golden("sd3_inference_sigmas"), ids=lambda c: f"{c['shift']}-{c['steps']}")
def test_shifted_inference_sigmas(case: dict[str, Any]) -> None:
    result = shifted_inference_sigmas(case["steps"], case["shift"])
    assert_close(result, torch.tensor(case["sigmas"]), rtol=1e-6, atol=0)


# --- learning rates ----------------------------------------------------------------------------------------
def schedule_options(case: dict[str, Any]) -> OptimizerOptions:
    values = {"lr_warmup_steps": 10} | case["options"] | {"lr_scheduler": case["lr_scheduler"]}
    return OptimizerOptions(learning_rate=golden("lr_schedules")["base_lr"], **values)


def rates_of(case: dict[str, Any]) -> list[float]:
    options = schedule_options(case)
    created = create_optimizer(options, [torch.nn.Parameter(torch.zeros(2))])
    steps = golden("lr_schedules")["max_train_steps"]
    scheduler = create_lr_scheduler(options, created, num_training_steps=steps)
    rates = []
    for _ in range(steps + 1):
        rates.append(scheduler.get_last_lr()[0])
        created.optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("case", cases("lr_schedules"), ids=lambda c: f"{c['lr_scheduler']}-{c['options']}")
def test_learning_rates(case: dict[str, Any]) -> None:
    if "error" in case:
        with pytest.raises(ValueError, match="--lr_"):
            rates_of(case)
    else:
        assert rates_of(case) == pytest.approx(case["lr"], rel=1e-9, abs=1e-18)


# --- hashes ------------------------------------------------------------------------------------------------
def hashed_tensors(name: str) -> dict[str, Tensor]:
    if name == "small":
        return {
            "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
            "b.alpha": torch.tensor(4.0),
            "c": torch.arange(5),
        }
    return {"w1": torch.arange(300000, dtype=torch.float32) / 7, "w0": torch.ones(16, dtype=torch.float16)}


@pytest.mark.parametrize("case", cases("precalculated_hashes"), ids=lambda c: c["name"])
def test_hashes_of_tensors(case: dict[str, Any]) -> None:
    hashes = sshs_hashes(hashed_tensors(case["name"].split(",")[0]), case["metadata"])
    assert hashes.model_hash == case["sshs_model_hash"]
    assert hashes.legacy_hash == case["sshs_legacy_hash"]


@pytest.mark.parametrize("case", cases("file_hashes"), ids=lambda c: c["old_model_hash"])
def test_hashes_of_files(case: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path if "directory" in case else tmp_path / "file.bin"
    if "length" in case:
        path.write_bytes(bytes((7 * i + 3) % 256 for i in range(256)) * (case["length"] // 256 + 1))
        with open(path, "r+b") as file:
            file.truncate(case["length"])
    assert legacy_file_hash(path) == case["old_model_hash"]
    assert file_sha256(path) == case["sha256"]
