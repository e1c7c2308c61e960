"""Every sampler of the table draws from a distribution whose exact answer is known."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import Tensor

from library.generation.guidance import combine
from library.generation.samplers import SAMPLERS, Sampler, Start, check_sampler, make_sampler, start_from_image
from library.options.sampling import SAMPLERS as SAMPLER_OPTION
from library.sampling_spec import SamplingSpec
from tests.gaussian import STD, GaussianFamily

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 about diffusers
MEAN = 1.0
ANCESTRAL = [name for name in SAMPLERS if name.endswith("_a")]
DETERMINISTIC = [name for name in SAMPLERS if not name.endswith("_a")]
FIRST_ORDER = {"ddim", "euler", "k_euler", "dpmsingle"}
PREDICTION_TYPES = ("epsilon", "v_prediction")


def run(sampler: Sampler, family: GaussianFamily, seeds: list[int], size: int = 16) -> tuple[Tensor, Tensor]:
    """(unscaled starting noise, result) of the loop that the engine runs, [B,4,size,size]."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.cat([torch.randn(1, 4, size, size, generator=g) for g in generators])
    x = noise * sampler.initial_sigma
    for index, timestep in enumerate(sampler.timesteps):
        t = torch.full((len(x),), timestep)
        prediction = family.denoiser(sampler.model_input(x, index), t, torch.tensor(MEAN))
        x = sampler.step(prediction, x, index, generators)
    return noise, x


def exact(noise: Tensor, sigma: float) -> Tensor:
    """Where the probability flow ODE takes x = sigma * noise: it keeps the quantile within N(mean, std^2 + sigma^2)."""
    return MEAN + (noise * sigma - MEAN) * STD / (STD**2 + sigma**2) ** 0.5


def terminal_sigma(betas: Tensor) -> float:
    """sqrt((1 - abar) / abar) at the last timestep, at most 4096."""
    abar = max(float(torch.cumprod(1 - betas.double(), 0)[-1]), 2.0**-24)
    return ((1 - abar) / abar) ** 0.5


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_follow_the_probability_flow(name: str, prediction_type: str) -> None:
    family = GaussianFamily(prediction_type)
    spec = family.sampling_spec()
    noise, x = run(make_sampler(name, spec, 100, (16, 16)), family, [1])
    error = float((x - exact(noise, terminal_sigma(spec.betas))).pow(2).mean().sqrt())
    assert error < (0.03 if name in FIRST_ORDER else 0.02), error


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", ANCESTRAL)
def test_ancestral_samplers_draw_from_the_distribution(name: str, prediction_type: str) -> None:
    family = GaussianFamily(prediction_type)
    noise, x = run(make_sampler(name, family.sampling_spec(), 100, (48, 48)), family, [1], size=48)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(x.std()) == pytest.approx(STD, abs=0.04)
    assert float(torch.corrcoef(torch.stack([noise.flatten(), x.flatten()]))[0, 1]) < 0.1  # new noise at every step


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmsolver", "dpmsolver++"])
def test_zero_terminal_snr_reaches_the_mean(name: str, prediction_type: str) -> None:
    """With the plain schedule the mean is 4 % short, because the start is taken for pure noise."""
    family = GaussianFamily(prediction_type, zero_terminal_snr=True)
    _, x = run(make_sampler(name, family.sampling_spec(), 100, (32, 32)), family, [1], size=32)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x.std()) == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("name", ["pndm", "lms", "heun", "dpm_2", "dpm_2_a", "dpmsingle"])
def test_samplers_without_zero_terminal_snr_are_refused(name: str) -> None:
    spec = GaussianFamily(zero_terminal_snr=True).sampling_spec()
    with pytest.raises(ValueError, match=rf"'{name}' cannot start from zero terminal SNR.*ddim, euler"):
        make_sampler(name, spec, 10, (8, 8))


@pytest.mark.parametrize("name", SAMPLERS)
def test_images_do_not_depend_on_their_place_in_a_batch(name: str) -> None:
    family = GaussianFamily()
    _, together = run(make_sampler(name, family.sampling_spec(), 8, (8, 8)), family, [3, 4, 5], size=8)
    _, alone = run(make_sampler(name, family.sampling_spec(), 8, (8, 8)), family, [4], size=8)
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=0.1)


@pytest.mark.parametrize("name", ["lms", "euler", "euler_a", "dpmsolver", "dpmsolver++", "dpmsingle"])
@pytest.mark.parametrize("steps", [1, 3, 30])
def test_single_evaluation_samplers_call_the_model_once_per_step(name: str, steps: int) -> None:
    sampler = make_sampler(name, GaussianFamily().sampling_spec(), steps, (8, 8))
    assert len(sampler.timesteps) == steps
    assert all(0 <= t < 1000 for t in sampler.timesteps)


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_a", "dpmsolver", "dpmsolver++"])
def test_zero_terminal_snr_begins_at_the_last_step(name: str) -> None:
    spec = GaussianFamily("v_prediction", zero_terminal_snr=True).sampling_spec()
    assert make_sampler(name, spec, 10, (8, 8)).timesteps[0] == 999.0


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_every_number_of_steps_can_be_sampled(name: str, steps: int) -> None:
    timesteps = make_sampler(name, GaussianFamily().sampling_spec(), steps, (8, 8)).timesteps
    assert len(timesteps) >= steps and all(0 <= t < 1000 for t in timesteps)


def test_ddim_starts_one_after_the_even_spacing_and_does_not_clip() -> None:
    family = GaussianFamily()
    sampler = make_sampler("ddim", family.sampling_spec(), 10, (8, 8))
    assert sampler.timesteps == [901.0, 801.0, 701.0, 601.0, 501.0, 401.0, 301.0, 201.0, 101.0, 1.0]
    _, x = run(sampler, family, [1])
    assert float(x.max()) > 1.5  # latents beyond 1 survive


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rectified_flow_is_sampled_with_euler_whatever_the_name(shift: float) -> None:
    family = GaussianFamily(with_flow=True)
    sampler = make_sampler("heun", family.sampling_spec(), 100, (16, 16), flow_shift=shift)
    assert sampler.timesteps[0] == 1000.0 and len(sampler.timesteps) == 100
    noise, x = run(sampler, family, [1])
    error = float((x - (MEAN + noise * STD)).pow(2).mean().sqrt())
    assert error < 0.03, error


def test_unknown_sampler_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(ValueError, match=r"--sample_sampler: there is no sampler 'eular'.*euler_a"):
        check_sampler("eular", "--sample_sampler")


def test_the_option_offers_exactly_the_table() -> None:
    assert set(SAMPLER_OPTION) == set(SAMPLERS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_making_a_sampler_is_silent(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.utils import logging as diffusers_logging

    monkeypatch.setattr(diffusers_logging.get_logger(), "propagate", True)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error", FutureWarning)
        make_sampler(name, GaussianFamily().sampling_spec(), 5, (8, 8))
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "strength", "zero_offset", "first", "noise"),
    [
        ("euler_a", 1.0, True, 0, 0), ("euler_a", 0.75, True, 3, 3), ("euler_a", 0.5, True, 5, 5),
        ("euler_a", 0.0, True, 10, 10),
        ("euler_a", 1.0, False, 1, 0), ("euler_a", 0.75, False, 3, 2), ("euler_a", 0.5, False, 5, 4),
        ("euler_a", 0.0, False, 10, 9),
        ("dpmsingle", 1.0, False, 0, 0), ("dpmsingle", 0.5, False, 5, 5),
    ],
)  # fmt: skip
def test_redrawing_begins_after_the_part_of_the_steps_that_its_strength_leaves_out(
    name: str, strength: float, zero_offset: bool, first: int, noise: int
) -> None:
    assert start_from_image(name, 10, strength, zero_offset=zero_offset) == Start(first, noise, zero_offset)


def test_a_spec_is_either_ddpm_or_flow() -> None:
    with pytest.raises(ValueError, match="either betas"):
        SamplingSpec()


def test_guidance_formulas() -> None:
    unconditional, conditional, empty = (torch.full((1, 1, 1, 1), value) for value in (1.0, 3.0, 0.5))
    assert combine(torch.cat([unconditional, conditional]), 7.5, None).item() == 1 + 7.5 * 2
    three = torch.cat([unconditional, conditional, empty])
    assert combine(three, 7.5, 2.0).item() == 0.5 + 7.5 * 2.5 - 2.0 * 0.5
    assert torch.equal(combine(conditional, 1.0, None), conditional)
