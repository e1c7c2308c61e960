"""The engine on a real (tiny) Stable Diffusion against the pipelines of diffusers: equal images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from library.families.sd import StableDiffusion
from library.generation.engine import DrawSettings, ImageNoise, draw_batch
from library.generation.pictures import load_picture
from library.generation.request import ImageRequest
from library.generation.samplers import SAMPLERS
from library.options import make_options
from tests.golden import FOLDER

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PROMPT, NEGATIVE = "a (red:1.3) castle near the water", "dark, sketch"
SCHEDULE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}),
    "pndm": ("PNDMScheduler", {"steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
}


@pytest.fixture(scope="module")
def family() -> StableDiffusion:
    family = StableDiffusion(
        make_options(
            pretrained_model_name_or_path=str(FOLDER / "models" / "sd1_tiny.safetensors"),
            tokenizer_cache_dir=str(FOLDER / "tokenizers"),
        )
    )
    family.load(weight_dtype=torch.float32, vae_dtype=torch.float32, device="cpu")
    return family


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = torch.rand(64, 96, 3, generator=torch.Generator().manual_seed(3))
    Image.fromarray((pixels * 255).to(torch.uint8).numpy()).save(tmp_path / "init.png")
    return tmp_path / "init.png"


def request(**changes: Any) -> ImageRequest:
    values = {"negative_prompt": NEGATIVE, "width": 96, "height": 64, "steps": 5, "scale": 5.0, "seed": 1, **changes}
    return ImageRequest(PROMPT, **values)


def ours(family: StableDiffusion, *requests: ImageRequest, **settings: Any) -> Tensor:
    """Pixels in [0,1]."""
    pixels = draw_batch(family, list(requests), device="cpu", dtype=torch.float32, settings=DrawSettings(**settings))
    return (pixels / 2 + 0.5).clamp(0, 1)


def theirs(family: StableDiffusion, kind: str, sampler: str, **arguments: Any) -> Tensor:
    """Pixels in [0,1] of a diffusers pipeline around the same modules."""
    import diffusers

    name, settings = SCHEDULERS[sampler]
    scheduler = getattr(diffusers, name)(**SCHEDULE, **settings)
    pipeline = getattr(diffusers, kind)(
        vae=family.vae, unet=family.denoiser, scheduler=scheduler, text_encoder=None, tokenizer=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        positive, negative = family.encode_prompts([PROMPT], [NEGATIVE])
    return pipeline(
        prompt_embeds=positive["context"], negative_prompt_embeds=negative["context"], num_inference_steps=5,
        guidance_scale=5.0, output_type="pt", **arguments,
    ).images  # fmt: skip


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_text_to_image_is_that_of_diffusers(family: StableDiffusion, sampler: str) -> None:
    drawn = ours(family, request(sampler=sampler))
    generator = [torch.Generator().manual_seed(1)]
    expected = theirs(family, "StableDiffusionPipeline", sampler, width=96, height=64, generator=generator)
    assert drawn.std() > 0.04
    assert (drawn - expected).abs().max() < 1e-4


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpmsolver++", "dpmsingle"])
def test_image_to_image_is_that_of_diffusers(family: StableDiffusion, sampler: str, picture: Path) -> None:
    """Without the offset of one step, which diffusers does not have."""
    wanted = request(sampler=sampler, init_image=picture, strength=0.65)
    drawn = ours(family, wanted, zero_steps_offset=True)
    noise = ImageNoise(
        wanted, (1, 4, 8, 12), family.sampling_spec(), device=torch.device("cpu"), dtype=torch.float32
    )
    stream = torch.Generator().manual_seed(1)
    per_step = SAMPLERS[sampler].noises_per_step
    drawn_noise = [torch.randn(1, 4, 8, 12, generator=stream) for _ in range(2 + 5 * per_step)]
    assert torch.equal(noise.start, drawn_noise[0]) and torch.equal(noise.for_picture, drawn_noise[-1])
    with torch.no_grad():
        latents = family.encode_images(load_picture(picture, (96, 64)), stream) * 0.18215

    stream = torch.Generator().manual_seed(1)  # at the place of the picture's noise, all that the pipeline draws
    for _ in range(1 + 5 * per_step):
        torch.randn(1, 4, 8, 12, generator=stream)
    expected = theirs(
        family, "StableDiffusionImg2ImgPipeline", sampler, image=latents, strength=0.65, generator=[stream]
    )
    assert (drawn - expected).abs().max() < 1e-4
    assert (drawn - ours(family, request(sampler=sampler))).abs().max() > 1e-2


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if not name.startswith("k_")])  # k_ is another name
def test_a_batch_reproduces_single_images(family: StableDiffusion, sampler: str, picture: Path) -> None:
    wanted = [request(sampler=sampler, seed=seed, steps=4) for seed in (5, 6)]
    from_picture = [
        request(sampler=sampler, seed=seed, steps=4, init_image=picture, strength=0.7) for seed in (5, 6)
    ]
    for pair in (wanted, from_picture):
        together = ours(family, *pair)
        alone = torch.cat([ours(family, one) for one in pair])
        assert (together - alone).abs().max() < 1e-4
        assert (together[0] - together[1]).abs().max() > 1e-2
