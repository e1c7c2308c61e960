"""The engine and the sample images of a training run, on a family whose exact answer is known."""

from __future__ import annotations

import logging
import math
import random
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.families.base import Conditioning, SizeConditioning
from library.generation.engine import DrawSettings, draw, evaluation_mode, to_pil
from library.generation.hooks import Drawing, StepHook, StepState
from library.generation.pictures import load_mask, load_picture
from library.generation.request import ImageRequest
from library.generation.samplers import SAMPLERS, Start, make_sampler
from library.generation.training_samples import TrainingSampler, sampling_problems, sampling_warnings
from library.options import Options, make_options
from tests.gaussian import STD, GaussianFamily

DIFFERENT_SAMPLERS = [name for name in SAMPLERS if not name.startswith("k_")]  # those are second names
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 about diffusers


def request(prompt: str = "0.4", **changes: Any) -> ImageRequest:
    return ImageRequest(prompt, **{"width": 128, "height": 128, "steps": 20, "scale": 1.0, "seed": 1, **changes})


def images_of(family: GaussianFamily, *requests: ImageRequest, **settings: Any) -> list[Image.Image]:
    return draw(family, list(requests), **{"device": "cpu", "dtype": torch.float32, **settings})


def latents_of(image: Image.Image) -> np.ndarray:
    """What `GaussianFamily.decode_latents` was given, first three channels, up to rounding and clamping."""
    return (np.asarray(image)[::8, ::8].astype(float) / 255 * 2 - 1) * 4


# --- pictures -------------------------------------------------------------------------------------------------


def test_images_follow_the_distribution_that_the_prompt_names() -> None:
    low, high = images_of(GaussianFamily(), request("-1", width=256, height=192), request("1.2", width=256, height=192))
    assert low.size == high.size == (256, 192) and low.mode == "RGB"
    assert latents_of(low).mean() == pytest.approx(-1, abs=0.1)
    assert latents_of(high).mean() == pytest.approx(1.2, abs=0.1)
    assert latents_of(high).std() == pytest.approx(STD, abs=0.1)


def test_rectified_flow_draws_through_the_same_engine() -> None:
    (image,) = images_of(GaussianFamily(with_flow=True), request("0.8", steps=40))
    assert latents_of(image).mean() == pytest.approx(0.8, abs=0.06)
    assert latents_of(image).std() == pytest.approx(STD, abs=0.06)


def test_v_prediction_family_draws_the_same_image() -> None:
    (epsilon,), (velocity,) = (images_of(GaussianFamily(kind), request()) for kind in ("epsilon", "v_prediction"))
    assert np.abs(np.asarray(epsilon).astype(int) - np.asarray(velocity)).max() <= 1


def test_equal_seeds_give_equal_images_and_other_seeds_do_not() -> None:
    family = GaussianFamily()
    first, again, other, unseeded, unseeded_too = images_of(
        family, request(), request(), request(seed=2), request(seed=None), request(seed=None)
    )
    assert first.tobytes() == again.tobytes()
    assert len({image.tobytes() for image in (first, other, unseeded, unseeded_too)}) == 4


@pytest.mark.parametrize("sampler", DIFFERENT_SAMPLERS)
def test_batching_does_not_change_an_image(sampler: str) -> None:
    family = GaussianFamily()
    requests = [request("0.3", seed=seed, sampler=sampler, steps=5) for seed in (5, 6, 7)]
    together = images_of(family, *requests, batch_size=3)
    rows = len(family.calls[0][0])
    alone = images_of(family, *requests)
    assert rows == 3 and len(family.calls[-1][0]) == 1
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def test_starting_noise_is_that_of_the_seed() -> None:
    family = GaussianFamily()
    images_of(family, request(seed=77))
    expected = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(77))
    assert torch.equal(family.calls[0][0][0], expected)


def test_timesteps_stay_float32_and_the_input_takes_the_dtype() -> None:
    family = GaussianFamily()
    images_of(family, request(steps=2), dtype=torch.bfloat16)
    x_t, timesteps, _, _ = family.calls[0]
    assert x_t.dtype == torch.bfloat16 and timesteps.dtype == torch.float32 and timesteps.tolist() == [501.0]


def test_pixels_are_rounded_and_clamped() -> None:
    (image,) = to_pil(torch.tensor([-2.0, 0.0, 2.0]).reshape(1, 3, 1, 1))
    assert image.getpixel((0, 0)) == (0, 128, 255)


def test_sizes_that_the_latents_cannot_have_are_errors() -> None:
    with pytest.raises(ValueError, match="130x128.*multiples of 8"):
        images_of(GaussianFamily(), request(width=130))


# --- guidance -------------------------------------------------------------------------------------------------


def test_guidance_moves_away_from_the_negative_prompt() -> None:
    """For one noise level the guided prediction is that of the mean m_u + s (m_c - m_u)."""
    family = GaussianFamily()
    guided, direct = images_of(family, request("0.5", negative_prompt="0.2", scale=3.0), request("1.1"))
    assert np.abs(np.asarray(guided).astype(int) - np.asarray(direct)).max() <= 1
    x_t, timesteps, conditioning, _ = family.calls[0]
    assert x_t.shape == (2, 4, 16, 16) and torch.equal(x_t[0], x_t[1])
    assert timesteps.shape == (2,)
    assert conditioning["mean"].tolist() == pytest.approx([0.2, 0.5])  # unconditional first


def test_negative_prompt_is_not_used_without_guidance() -> None:
    family = GaussianFamily()
    with_negative, without = images_of(family, request(negative_prompt="3"), request())
    assert with_negative.tobytes() == without.tobytes()
    assert family.encoded[0] == (["0.4"], [""])
    assert len(family.calls[0][0]) == 1


def test_negative_scale_uses_a_third_row_with_the_empty_prompt() -> None:
    family = GaussianFamily()
    pair = [request("0.5", negative_prompt="0.2", scale=3.0, negative_scale=0.5, seed=s) for s in (1, 2)]
    guided = images_of(family, *pair, batch_size=2)
    conditioning = family.calls[0][2]
    direct = images_of(family, *(request(str(3 * 0.5 - 0.5 * 0.2), seed=s) for s in (1, 2)))
    assert conditioning["mean"].tolist() == pytest.approx([0.2, 0.2, 0.5, 0.5, 0.0, 0.0])
    for one, other in zip(guided, direct, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def test_size_conditioning_follows_the_rows() -> None:
    family = GaussianFamily()
    images_of(
        family,
        request(scale=2.0, original_size_hw=(1000, 900), negative_original_size_hw=(64, 65), crop_top_left=(1, 2)),
        request(scale=2.0),
    )
    sizes, default = family.calls[0][3], family.calls[-1][3]
    assert sizes.original_hw.tolist() == [[64, 65], [1000, 900]]
    assert sizes.crop_top_left.tolist() == [[1, 2], [1, 2]]
    assert sizes.target_hw.tolist() == default.original_hw.tolist() == [[128, 128]] * 2


def test_embedded_guidance_reaches_models_that_have_it() -> None:
    family = GaussianFamily(with_flow=True, guidance_scale=3.5)
    images_of(family, request(), request(guidance_scale=1.5, scale=2.0))
    assert family.calls[0][2]["guidance"].tolist() == [3.5]
    assert family.calls[-1][2]["guidance"].tolist() == [1.5, 1.5]
    plain = GaussianFamily()
    images_of(plain, request(guidance_scale=1.5))
    assert "guidance" not in plain.calls[0][2].tensors


def test_another_forward_pass_can_take_the_place_of_the_familys() -> None:
    family = GaussianFamily()
    asked = []

    def shifted_by(wanted: ImageRequest) -> Any:
        asked.append(wanted.prompt)

        def predict(x_t: Tensor, t: Tensor, conditioning: Conditioning, sizes: SizeConditioning) -> Tensor:
            return family.predict(x_t, t, Conditioning({"mean": conditioning["mean"] + 0.5}), sizes)

        return predict

    (changed,) = images_of(family, request("0.2"), settings=DrawSettings(predict_for=shifted_by))
    (direct,) = images_of(family, request("0.7"))
    assert asked == ["0.2"]
    assert np.abs(np.asarray(changed).astype(int) - np.asarray(direct)).max() <= 1


# --- pictures to start from -----------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A dark left and a bright right half, 96 x 64: latents around -2 and 2."""
    pixels = np.full((64, 96, 3), 64, dtype=np.uint8)
    pixels[:, 48:] = 191
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def from_picture(path: Path, **changes: Any) -> ImageRequest:
    return request("0.5", **{"width": 96, "height": 64, "init_image": path, "strength": 0.5, **changes})


def test_strength_zero_gives_the_picture_back(picture: Path) -> None:
    family = GaussianFamily()
    (image,) = images_of(family, from_picture(picture, strength=0.0))
    assert family.calls == []
    assert np.abs(np.asarray(image).astype(int) - np.asarray(Image.open(picture))).max() <= 2


@pytest.mark.parametrize(("strength", "calls"), [(0.04, 0), (0.25, 5), (0.5, 10), (0.8, 16), (1.0, 19)])
def test_strength_decides_how_many_steps_are_left(picture: Path, strength: float, calls: int) -> None:
    family = GaussianFamily()
    images_of(family, from_picture(picture, strength=strength))
    assert len(family.calls) == calls
    by_order_two = GaussianFamily()
    images_of(by_order_two, from_picture(picture, strength=strength, sampler="heun"))
    assert len(by_order_two.calls) == max(0, 2 * calls - 1)


def test_without_offset_all_steps_of_the_strength_are_run(picture: Path) -> None:
    family = GaussianFamily()
    images_of(family, from_picture(picture, strength=1.0), settings=DrawSettings(zero_steps_offset=True))
    assert len(family.calls) == 20
    assert family.calls[0][1].tolist() == [950.0]  # ddim without the offset of its timesteps


@pytest.mark.parametrize("sampler", DIFFERENT_SAMPLERS)
def test_weak_redrawing_stays_near_the_picture_and_strong_does_not(picture: Path, sampler: str) -> None:
    family = GaussianFamily()
    weak, strong = images_of(
        family, from_picture(picture, strength=0.1, sampler=sampler), from_picture(picture, sampler=sampler, strength=1)
    )
    halves = [[latents_of(image)[:, :6].mean(), latents_of(image)[:, 6:].mean()] for image in (weak, strong)]
    assert halves[0] == pytest.approx([-2, 2], abs=0.7)
    assert halves[1] == pytest.approx([0.5, 0.5], abs=0.6)


@pytest.mark.parametrize("sampler", [name for name in DIFFERENT_SAMPLERS if not name.endswith("_a")])
def test_sampling_from_the_middle_is_as_exact_as_from_the_start(sampler: str) -> None:
    """The Gaussian's flow has a closed form: x_t = a mean + sqrt(a^2 std^2 + s^2) z for one z all along."""
    family, mean, steps = GaussianFamily(), 0.8, 20
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = []
    for first in (0, 5, 12):
        chosen = make_sampler(sampler, family.sampling_spec(), steps, (8, 8), start=Start(first_step=first))
        assert chosen.step_of_call[0] == first and set(chosen.step_of_call) == set(range(first, steps))
        signal = chosen.noised(torch.ones(()), torch.zeros(()), first)
        noise = chosen.noised(torch.zeros(()), torch.ones(()), first)
        x = signal * mean + (signal**2 * STD**2 + noise**2).sqrt() * z
        for call, timestep in enumerate(chosen.timesteps):
            raw = family.predict(
                chosen.model_input(x, call), torch.tensor([timestep]), Conditioning({"mean": torch.tensor([mean])})
            )
            x = chosen.step(raw, x, call, [torch.Generator()])
        errors.append(float((x - mean - STD * z).abs().max()))
    assert errors[0] < 0.3
    assert max(errors[1:]) < 1.3 * errors[0] + 0.01


def test_noise_of_a_picture_comes_after_the_samplers_and_before_the_encoders(picture: Path) -> None:
    class Watching(GaussianFamily):
        def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
            states.append(generator.get_state())
            return super().encode_images(images, generator)

    states: list[Tensor] = []
    family = Watching()
    images_of(family, from_picture(picture, seed=9, steps=4, strength=0.5, sampler="dpm_2_a"))
    stream = torch.Generator().manual_seed(9)
    noises = [torch.randn(1, 4, 8, 12, generator=stream) for _ in range(1 + 2 * 4 + 1)]
    assert torch.equal(states[0], stream.get_state())
    x0 = GaussianFamily().encode_images(load_picture(picture, (96, 64)), stream)
    abar = torch.cumprod(1 - family.betas.double(), 0)
    sigmas = ((1 - abar) / abar).sqrt()
    x = x0 + sigmas[666] * noises[-1]  # as noisy as the step before the first one, which is at timestep 333
    assert family.calls[0][1].tolist() == [333.0]
    assert torch.allclose(family.calls[0][0], (x / (sigmas[333] ** 2 + 1).sqrt()).float(), atol=1e-3)


def test_transparent_pixels_are_white_and_sizes_are_reached(tmp_path: Path) -> None:
    image = Image.new("RGBA", (50, 40), (0, 0, 0, 0))
    image.save(tmp_path / "clear.png")
    pixels = load_picture(tmp_path / "clear.png", (64, 32))
    assert pixels.shape == (1, 3, 32, 64) and pixels.min() == pixels.max() == 1


# --- masks and hooks ------------------------------------------------------------------------------------------


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """White, to be repainted, in the right third."""
    pixels = np.zeros((64, 96), dtype=np.uint8)
    pixels[:, 64:] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


@pytest.mark.parametrize("sampler", DIFFERENT_SAMPLERS)
def test_the_kept_area_is_the_picture_itself_at_the_end(picture: Path, mask: Path, sampler: str) -> None:
    family = GaussianFamily()
    wanted = from_picture(picture, mask_image=mask, strength=0.9, steps=6, sampler=sampler)
    painted, untouched = images_of(family, wanted, from_picture(picture, strength=0.0, steps=6, sampler=sampler))
    same = latents_of(painted)[:, :7] - latents_of(untouched)[:, :7]  # the next column is blended
    other = latents_of(painted)[:, 8:] - latents_of(untouched)[:, 8:]
    assert np.abs(same).max() < 0.05
    assert np.abs(other).mean() > 0.5


def test_grey_masks_blend(picture: Path, tmp_path: Path) -> None:
    Image.new("L", (96, 64), 128).save(tmp_path / "grey.png")
    keep = 1 - load_mask(tmp_path / "grey.png", (96, 64), (8, 12))
    assert keep.shape == (1, 1, 8, 12) and torch.allclose(keep, torch.tensor(127 / 255))


class ExactFamily(GaussianFamily):
    """Its VAE adds no noise."""

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        means = torch.nn.functional.avg_pool2d(images, 8) * 4
        return torch.cat([means, means[:, :1] * 0], dim=1)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "ddim"])
def test_the_mask_blends_only_where_a_step_begins_and_at_its_noise_level(
    picture: Path, mask: Path, sampler: str
) -> None:
    """Between the two calls of a step the state is the sampler's own, which no noise level of the table has."""
    checked = {True: 0, False: 0}

    def factory(drawing: Drawing) -> StepHook:
        last: dict[str, Tensor] = {}

        def hook(state: StepState) -> StepState:
            if state.moment == "after":
                last["x"], last["ended"] = state.x, torch.tensor(state.is_last_call)
            elif state.moment == "before" and last:
                kept = slice(None), slice(None), slice(None), slice(0, 7)
                begins = bool(last["ended"])
                family = drawing.family
                latents = family.encode_images(load_picture(picture, (96, 64)))
                if begins:  # known = signal * latents + amount * one noise, the same at every step
                    signal = drawing.sampler.noised(torch.ones(()), torch.zeros(()), state.step)
                    amount = drawing.sampler.noised(torch.zeros(()), torch.ones(()), state.step)
                    noise = (state.x[kept] - signal * latents[kept]) / amount
                    torch.testing.assert_close(noise, last.setdefault("noise", noise), atol=1e-3, rtol=1e-3)
                else:
                    assert torch.equal(state.x, last["x"])
                checked[begins] += 1
            return state

        return hook

    wanted = from_picture(picture, mask_image=mask, strength=0.9, steps=6, sampler=sampler)
    images_of(ExactFamily(), wanted, settings=DrawSettings(hooks=(factory,)))
    assert checked[True] > 2 and (checked[False] > 2) == (sampler != "ddim")


def test_hooks_see_every_call_in_order_and_can_change_it() -> None:
    seen = []

    def factory(drawing: Drawing) -> StepHook | None:
        def hook(state: StepState) -> StepState:
            seen.append((state.moment, state.call, state.step, state.is_last_call))
            assert (state.prediction is None) == (state.moment == "before")
            return replace(state, x=state.x * 0 + 3) if state.moment == "after" and state.call == 2 else state

        assert [one.seed for one in drawing.requests] == [1, 2]
        return hook

    settings = DrawSettings(hooks=(factory, lambda drawing: None))
    pair = [request(steps=2, sampler="heun", seed=seed) for seed in (1, 2)]
    images = images_of(GaussianFamily(), *pair, batch_size=2, settings=settings)
    assert seen == [
        (moment, call, step, is_last)
        for call, step, is_last in [(0, 0, False), (1, 0, True), (2, 1, True)]
        for moment in ("before", "predicted", "after")
    ]
    assert all(latents_of(image) == pytest.approx(3, abs=0.02) for image in images)


# --- modules --------------------------------------------------------------------------------------------------


def test_modules_are_in_eval_mode_and_get_their_modes_back() -> None:
    seen = []

    class Watching(GaussianFamily):
        def predict(self, *args: Any, **kwargs: Any) -> Tensor:
            seen.append((self.denoiser.training, self.text_encoders[0].training, torch.is_grad_enabled()))
            return super().predict(*args, **kwargs)

    family = Watching()
    family.text_encoders[0].eval()
    images_of(family, request(steps=1))
    assert seen == [(False, False, False)]
    assert family.denoiser.training and family.vae.training and not family.text_encoders[0].training


def test_modes_of_inner_modules_survive() -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    with evaluation_mode([module, None]):
        assert not any(part.training for part in module.modules())
    assert module.training and module[0].training and not module[1].training


def test_the_vae_decodes_in_its_own_dtype() -> None:
    dtypes = []

    class Watching(GaussianFamily):
        def decode_latents(self, latents: Tensor) -> Tensor:
            dtypes.append(latents.dtype)
            return super().decode_latents(latents)

    family = Watching()
    family.vae.to(torch.float16)
    images_of(family, request(steps=1))
    assert dtypes == [torch.float16]


def test_a_vae_without_weights_decodes_what_the_sampler_gives() -> None:
    family = GaussianFamily()
    (usual,) = images_of(family, request(steps=2))
    family.vae = torch.nn.Identity()
    (other,) = images_of(family, request(steps=2))
    assert usual.tobytes() == other.tobytes()


def test_text_encoders_and_vae_are_moved_while_they_are_used_and_back_again(tmp_path: Path) -> None:
    places: list[tuple[str, str, str]] = []

    class Watching(GaussianFamily):
        def note(self, what: str) -> None:
            modules = self.text_encoders[0], self.vae
            places.append((what, *(next(module.parameters()).device.type for module in modules)))

        def encode_prompts(self, *args: Any, **kwargs: Any) -> Any:
            self.note("text")
            return super().encode_prompts(*args, **kwargs)

        def encode_images(self, *args: Any) -> Tensor:
            self.note("picture")
            return super().encode_images(*args)

        def predict(self, *args: Any, **kwargs: Any) -> Tensor:
            self.note("step")
            return super().predict(*args, **kwargs)

        def decode_latents(self, latents: Tensor) -> Tensor:
            self.note("pixels")
            return super().decode_latents(latents)

    family = Watching()
    for module in (family.text_encoders[0], family.vae):
        module.to("meta")  # the only other device that there is everywhere; nothing can be copied from it
        module.to = lambda device, moved=module: moved.to_empty(device=device)
    Image.new("RGB", (128, 128)).save(tmp_path / "start.png")
    images_of(family, request(steps=2, init_image=str(tmp_path / "start.png"), strength=0.5))
    assert {what: (text, vae) for what, text, vae in places} == {
        "text": ("cpu", "meta"), "picture": ("meta", "cpu"), "step": ("meta", "meta"), "pixels": ("meta", "cpu"),
    }  # fmt: skip
    assert {next(module.parameters()).device.type for module in (family.text_encoders[0], family.vae)} == {"meta"}


def test_a_picture_that_is_broken_in_one_place_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Speck(GaussianFamily):
        def decode_latents(self, latents: Tensor) -> Tensor:
            pixels = super().decode_latents(latents)
            pixels[0, :, 3, 5] = math.inf
            pixels[0, :, 3, 6] = math.nan
            return pixels

    (image,) = images_of(Speck(), request(steps=1))
    (record,) = caplog.records
    assert "NaN or infinite pixels" in record.message
    assert image.getpixel((6, 3)) == (0, 0, 0) and image.getextrema() != ((0, 0),) * 3


def broken(part: str) -> GaussianFamily:
    """A family one part of which gives, or consists of, NaN."""

    class Broken(GaussianFamily):
        def decode_latents(self, latents: Tensor) -> Tensor:
            return super().decode_latents(latents) * (math.nan if part in ("vae", "half vae") else 1)

        def predict(self, *args: Any, **settings: Any) -> Tensor:
            return super().predict(*args, **settings) * (1 if "vae" in part else math.nan)

    family = Broken()
    if part == "half vae":
        family.vae.half()
    elif part in ("denoiser", "text encoder"):
        module = family.denoiser if part == "denoiser" else family.text_encoders[0]
        next(module.parameters()).data.fill_(math.nan)
    return family


@pytest.mark.parametrize(
    ("part", "dtype", "said"),
    [
        ("half vae", torch.float32, "runs in float16, in float32 it would not overflow (--no_half_vae)"),
        ("vae", torch.float32, "it runs in float32 already"),
        ("denoiser", torch.float32, "NaN or infinite weights in the denoiser"),
        ("text encoder", torch.float32, "NaN or infinite weights in the text encoder"),
        ("predictions", torch.float32, "became NaN or infinite in float32; a network's strength"),
        ("predictions", torch.float16, "became NaN or infinite in float16; compute in bfloat16 or float32"),
    ],
)
def test_a_black_picture_says_what_is_broken(
    part: str, dtype: torch.dtype, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    (image,) = draw(broken(part), request(steps=1), device="cpu", dtype=dtype)
    assert image.getextrema() == ((0, 0),) * 3
    (record,) = caplog.records
    assert said in record.message
    assert ("--no_half_vae" in record.message) == (part == "half vae")


# --- samples during training ----------------------------------------------------------------------------------


def accelerator(process: int = 0, processes: int = 1) -> Any:
    """The part of accelerate's interface that the sampler reads."""
    return SimpleNamespace(
        process_index=process, num_processes=processes, device=torch.device("cpu"), autocast=nullcontext, trackers=[]
    )


def training_options(folder: Path, prompts: str, name: str = "prompts.txt", **more: Any) -> Options:
    (folder / name).write_text(prompts, encoding="utf-8")
    values = {"sample_every_n_steps": 2, "sample_sampler": "euler", "output_dir": str(folder / "out"), **more}
    return make_options(sample_prompts=str(folder / name), **values)


PROMPTS = "0.4 --w 64 --h 64 --s 3 --d 42\n0.1 --w 64 --h 64 --s 3\n-1 --w 64 --h 128 --s 3 --d 7 --ss euler_a\n"


def test_file_names_say_when_which_and_seed(tmp_path: Path) -> None:
    sampler = TrainingSampler(training_options(tmp_path, PROMPTS, output_name="my"), accelerator=accelerator())
    by_step = [path.name for path in sampler.draw(GaussianFamily(), epoch=None, step=12)]
    by_epoch = [path.name for path in sampler.draw(GaussianFamily(), epoch=3, step=12)]
    assert re.fullmatch(r"my_000012_00_\d{14}_42\.png", by_step[0])
    assert re.fullmatch(r"my_000012_01_\d{14}\.png", by_step[1])
    assert re.fullmatch(r"my_000012_02_\d{14}_7\.png", by_step[2])
    assert re.fullmatch(r"my_e000003_00_\d{14}_42\.png", by_epoch[0])
    with Image.open(tmp_path / "out" / "sample" / by_step[2]) as image:
        assert image.size == (64, 128)


def test_without_output_name_the_number_comes_first(tmp_path: Path) -> None:
    sampler = TrainingSampler(training_options(tmp_path, PROMPTS), accelerator=accelerator())
    assert sampler.draw(GaussianFamily(), epoch=0, step=0)[0].name.startswith("e000000_00_")


def test_processes_share_the_prompts(tmp_path: Path) -> None:
    options = training_options(tmp_path, PROMPTS)
    names = [
        [path.name.split("_")[1] for path in TrainingSampler(options, accelerator=accelerator(process, 2)).draw(
            GaussianFamily(), epoch=None, step=2
        )]
        for process in range(2)
    ]  # fmt: skip
    assert names == [["00", "02"], ["01"]]


def test_the_prompt_file_is_read_again_each_time(tmp_path: Path) -> None:
    sampler = TrainingSampler(training_options(tmp_path, PROMPTS), accelerator=accelerator())
    (tmp_path / "prompts.txt").write_text("0.4 --w 64 --h 64 --s 1\n", encoding="utf-8")
    assert len(sampler.draw(GaussianFamily(), epoch=None, step=2)) == 1


def test_sampling_leaves_every_generator_as_it_was(tmp_path: Path) -> None:
    class Greedy(GaussianFamily):
        def predict(self, *args: Any, **kwargs: Any) -> Tensor:
            torch.randn(1), random.random(), np.random.rand()
            return super().predict(*args, **kwargs)

    family, sampler = Greedy(), TrainingSampler(training_options(tmp_path, PROMPTS), accelerator=accelerator())
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = (torch.randn(3).tolist(), random.random(), np.random.rand())
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    assert len(sampler.draw(family, epoch=None, step=2)) == 3
    assert (torch.randn(3).tolist(), random.random(), np.random.rand()) == expected


def test_bad_prompts_are_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sampler = TrainingSampler(training_options(tmp_path, PROMPTS), accelerator=accelerator())
    lines = ["0.4 --w 64 --h 64 --s 1 --zz 3", "not a number --s 1", "0.3 --ss eular", "0.2 --w 64 --h 64 --s 1"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        first = sampler.draw(GaussianFamily(), epoch=None, step=2)
        sampler.draw(GaussianFamily(), epoch=None, step=4)
    assert [path.name.split("_")[1] for path in first] == ["00", "03"]
    assert "line 2" in caplog.text and "no sampler 'eular'" in caplog.text
    assert caplog.text.count("there is no prompt option '--zz'") == 1  # not again at the next sampling


def test_a_prompt_file_that_vanishes_does_not_end_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sampler = TrainingSampler(training_options(tmp_path, PROMPTS), accelerator=accelerator())
    (tmp_path / "prompts.txt").unlink()
    assert sampler.draw(GaussianFamily(), epoch=None, step=2) == []
    assert "no such file" in caplog.text


def test_clip_skip_and_defaults_reach_the_family(tmp_path: Path) -> None:
    seen = []

    class Watching(GaussianFamily):
        def encode_prompts(self, *args: Any, clip_skip: int | None = None, **settings: Any) -> Any:
            seen.append(clip_skip)
            return super().encode_prompts(*args, clip_skip=clip_skip, **settings)

    family = Watching()
    options = training_options(tmp_path, "0.2 --s 1\n", clip_skip=2)
    (path,) = TrainingSampler(options, accelerator=accelerator()).draw(family, epoch=None, step=2)
    assert seen == [2]
    with Image.open(path) as image:
        assert image.size == (128, 128)  # this family's default


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sample_every_n_steps": 5}, "give --sample_prompts"),
        ({"sample_at_first": True, "sample_prompts": "none.txt"}, "no such file"),
        ({"sample_every_n_epochs": 1, "sample_prompts": __file__}, "must end in"),
        ({"sample_every_n_steps": 0}, "at least 1"),
    ],
)
def test_problems_are_found_before_training(values: dict[str, Any], message: str) -> None:
    options = make_options(**values)
    (problem,) = sampling_problems(options)
    assert message in problem
    with pytest.raises(ValueError, match=message):
        TrainingSampler(options, accelerator=accelerator())


def test_prompts_that_cannot_be_drawn_are_told_before_training_and_never_end_the_list(tmp_path: Path) -> None:
    lines = [
        "0.1 --w ten", "0.1 --zz 4", "0.1\t--d 5", "0.1 --d 12345678901234567890123", "(0.1:1.2.3)", "0.1 --ss eular",
        "0.2 --s 1",
    ]  # fmt: skip
    options = training_options(tmp_path, "# first\n" + "\n".join(lines))
    assert sampling_problems(options) == []
    told = sampling_warnings(options, GaussianFamily())
    skipped = [text for text in told if text.endswith("; it is skipped")]
    assert [text.split(":")[0][-6:] for text in skipped] == ["line 5", "line 6", "line 7"]
    for text, words in zip(skipped, ("seed", "1.2.3", "'eular'"), strict=True):
        assert words in text
    ignored = [text for text in told if text not in skipped]
    assert [text.split(":")[0][-6:] for text in ignored] == ["line 2", "line 3", "line 4"]
    sampler = TrainingSampler(options, accelerator=accelerator(), told=told)
    drawn = sampler.draw(GaussianFamily(), epoch=None, step=2)
    assert [path.name.split("_")[1] for path in drawn] == ["00", "01", "02", "06"]
    assert drawn[2].stem.endswith("_5")


def test_a_file_without_a_prompt_that_can_be_drawn_is_refused_before_training(tmp_path: Path) -> None:
    first, second = sampling_problems(training_options(tmp_path, "a --d 99999999999999999999\nb --ss eular\n"))
    assert "line 1" in first and "line 2" in second and "'eular'" in second and "euler_a" in second


def test_a_sampler_that_a_model_cannot_use_is_told(tmp_path: Path) -> None:
    class OneSampler(GaussianFamily):
        without_effect = {"sample_sampler": "always Euler."}
        reads_prompt_weights = False

    told = sampling_warnings(training_options(tmp_path, "0.1 --ss euler_a\n(0.1:1.2.3)\n"), OneSampler(with_flow=True))
    (warning,) = told
    assert "line 1" in warning and "'euler_a' has no effect: always Euler" in warning


def test_prompts_without_a_reason_to_sample_are_no_problem() -> None:
    assert sampling_problems(make_options(sample_prompts="none.txt")) == []
