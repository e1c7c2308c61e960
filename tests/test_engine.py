"""The engine and the sample images of a training run, on a family whose exact answer is known."""

from __future__ import annotations

import logging
import random
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.families.base import Conditioning, SizeConditioning
from library.generation.engine import draw, evaluation_mode, to_pil
from library.generation.request import ImageRequest
from library.generation.training_samples import TrainingSampler, sampling_problems
from library.options import Options, make_options
from tests.gaussian import STD, GaussianFamily
from tests.golden import FOLDER

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


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpm_2_a"])
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

    (changed,) = images_of(family, request("0.2"), predict_for=shifted_by)
    (direct,) = images_of(family, request("0.7"))
    assert asked == ["0.2"]
    assert np.abs(np.asarray(changed).astype(int) - np.asarray(direct)).max() <= 1


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


def test_broken_pixels_are_black_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(GaussianFamily):
        def decode_latents(self, latents: Tensor) -> Tensor:
            return super().decode_latents(latents) * float("nan")

    (image,) = images_of(Broken(), request(steps=1))
    assert image.getextrema() == ((0, 0),) * 3
    assert "--no_half_vae" in caplog.text


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
        def encode_prompts(self, *args: Any, clip_skip: int | None = None) -> Any:
            seen.append(clip_skip)
            return super().encode_prompts(*args, clip_skip=clip_skip)

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


def test_unknown_samplers_in_the_file_are_found_before_training(tmp_path: Path) -> None:
    (problem,) = sampling_problems(training_options(tmp_path, "a\nb --ss eular\n"))
    assert "line 2" in problem and "'eular'" in problem and "euler_a" in problem


def test_prompts_without_a_reason_to_sample_are_no_problem() -> None:
    assert sampling_problems(make_options(sample_prompts="none.txt")) == []


# --- against another program ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_a_real_model_draws_what_diffusers_pipeline_draws(sampler: str) -> None:
    import diffusers

    from library.families.sd import StableDiffusion

    family = StableDiffusion(
        make_options(
            pretrained_model_name_or_path=str(FOLDER / "models" / "sd1_tiny.safetensors"),
            tokenizer_cache_dir=str(FOLDER / "tokenizers"),
        )
    )
    family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    prompt, negative = "a (red:1.3) castle near the water", "dark, sketch"
    ours = draw(
        family, request(prompt, negative_prompt=negative, height=64, steps=4, scale=5.0, sampler=sampler),
        device="cpu", dtype=torch.float32,
    )[0]  # fmt: skip

    schedule: dict[str, Any] = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    }  # fmt: skip
    scheduler = {
        "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False, **schedule),
        "euler_a": lambda: diffusers.EulerAncestralDiscreteScheduler(**schedule),
    }[sampler]()
    pipeline = diffusers.StableDiffusionPipeline(
        vae=family.vae, unet=family.denoiser, scheduler=scheduler, text_encoder=None, tokenizer=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    positive, unconditional = family.encode_prompts([prompt], [negative])
    theirs = pipeline(
        prompt_embeds=positive["context"], negative_prompt_embeds=unconditional["context"], width=128, height=64,
        num_inference_steps=4, guidance_scale=5.0, generator=[torch.Generator().manual_seed(1)],
    ).images[0]  # fmt: skip
    assert np.asarray(ours).std() > 10
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1
