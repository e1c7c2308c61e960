"""The engine that draws: starting noise, denoising loop, guidance and decoding, for every model family."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Generator, Tensor, nn

from library.families.base import Conditioning, ModelFamily, SizeConditioning
from library.generation.guidance import combine
from library.generation.request import ImageRequest, batches
from library.generation.samplers import Sampler, make_sampler
from library.sampling_spec import SamplingSpec

logger = logging.getLogger(__name__)

# (x_t [R,C,h,w], timesteps float32 [R], conditioning, sizes) -> raw prediction [R,C,h,w]; R rows of all guidance parts
Predict = Callable[[Tensor, Tensor, Conditioning, SizeConditioning], Tensor]


@torch.no_grad()
def draw(
    family: ModelFamily,
    requests: ImageRequest | Sequence[ImageRequest],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    batch_size: int = 1,
    predict_for: Callable[[ImageRequest], Predict] | None = None,
) -> list[Image.Image]:
    """One RGB image per request, in order; equal neighbours share a batch of at most `batch_size`.

    An image depends on its own request and not on its place in a batch: all its noise comes from one generator
    seeded with its seed, on `device` in `dtype`. `dtype` is what the denoiser gets; the state between steps is
    float32. `predict_for` replaces `family.predict` (ControlNet). Text encoders and VAE are moved to `device` while
    they are used; the denoiser must be there. Raises ValueError for what the model or the sampler cannot do.
    """
    requests = [requests] if isinstance(requests, ImageRequest) else list(requests)
    device = torch.device(device)
    spec = family.sampling_spec()
    images: list[Image.Image] = []
    with evaluation_mode([family.denoiser, family.vae, *family.text_encoders]):
        for batch in batches(requests, batch_size):
            predict = family.predict if predict_for is None else predict_for(batch[0])
            latents = _denoise(family, batch, spec, predict, device=device, dtype=dtype)
            images += _decode(family, latents)
    return images


def _denoise(
    family: ModelFamily, batch: list[ImageRequest], spec: SamplingSpec, predict: Predict,
    *, device: torch.device, dtype: torch.dtype,
) -> Tensor:
    """Model latents float32 [B,C,h,w] of one batch."""
    request = batch[0]
    _check_size(request, family.latent.downsample)
    latent_hw = request.height // family.latent.downsample, request.width // family.latent.downsample
    sampler = make_sampler(
        request.sampler, spec, request.steps, latent_hw, flow_shift=request.flow_shift, device=device
    )
    conditioning, sizes = _guidance_rows(family, batch, spec, device)
    generators = [_generator(request.seed, device, spec) for request in batch]
    shape = (1, family.latent.channels, *latent_hw)
    noise_dtype = torch.float32 if spec.noise_on_cpu else dtype
    noise = [torch.randn(shape, generator=g, device=g.device, dtype=noise_dtype) for g in generators]
    x = torch.cat(noise).to(device, torch.float32) * sampler.initial_sigma
    return _sample(sampler, x, conditioning, sizes, predict, request, generators, dtype)


def _sample(
    sampler: Sampler, x: Tensor, conditioning: Conditioning, sizes: SizeConditioning, predict: Predict,
    request: ImageRequest, generators: list[Generator], dtype: torch.dtype,
) -> Tensor:
    """Run `sampler` from the scaled noise x [B,C,h,w] to the end."""
    rows = len(sizes.target_hw)
    for index, timestep in enumerate(sampler.timesteps):
        x_t = sampler.model_input(x, index).to(dtype)
        timesteps = torch.full((rows,), timestep, dtype=torch.float32, device=x.device)
        raw = predict(torch.cat([x_t] * (rows // len(x))), timesteps, conditioning, sizes).float()
        prediction = combine(raw, request.scale, request.negative_scale)
        x = sampler.step(prediction, x, index, generators).float()
    return x


def _check_size(request: ImageRequest, multiple: int) -> None:
    if request.width % multiple or request.height % multiple or min(request.width, request.height) < multiple:
        raise ValueError(f"image size {request.width}x{request.height}: both sides must be multiples of {multiple}")


def _generator(seed: int | None, device: torch.device, spec: SamplingSpec) -> Generator:
    """A generator of one image's noise; without a seed the system gives one (training generators stay untouched)."""
    place = "cpu" if spec.noise_on_cpu or device.type == "mps" else device
    return Generator(place).manual_seed(random.SystemRandom().randrange(2**32) if seed is None else seed)


# --- what is predicted ----------------------------------------------------------------------------------------


def _guidance_rows(
    family: ModelFamily, batch: list[ImageRequest], spec: SamplingSpec, device: torch.device
) -> tuple[Conditioning, SizeConditioning]:
    """Conditioning and sizes of all rows of a batch, in the order that `guidance.combine` expects."""
    request = batch[0]
    prompts = [r.prompt for r in batch]
    negatives = [r.negative_prompt if r.uses_guidance else "" for r in batch]
    needs_empty = request.uses_guidance and request.negative_scale is not None
    if needs_empty:  # encoded together, so that all parts have one length
        prompts, negatives = prompts * 2, negatives + [""] * len(batch)
    with on_device(family.text_encoders, device):
        positive, negative = family.encode_prompts(prompts, negatives, clip_skip=request.clip_skip)
    here = slice(0, len(batch))
    parts, size_parts = [_rows(positive, here)], [_sizes(batch, device, is_negative=False)]
    if request.uses_guidance:
        parts.insert(0, _rows(negative, here))
        size_parts.insert(0, _sizes(batch, device, is_negative=True))
    if needs_empty:
        parts.append(_rows(negative, slice(len(batch), None)))
        size_parts.append(_sizes(batch, device, is_negative=True))
    tensors = {name: torch.cat([part[name] for part in parts]) for name in positive.tensors}
    if spec.defaults.guidance_scale is not None:
        scale = spec.defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale
        tensors["guidance"] = torch.full((len(batch) * len(parts),), scale)
    sizes = SizeConditioning(
        torch.cat([part.original_hw for part in size_parts]),
        torch.cat([part.crop_top_left for part in size_parts]),
        torch.cat([part.target_hw for part in size_parts]),
    )
    return Conditioning(tensors).to(device), sizes


def _rows(conditioning: Conditioning, rows: slice) -> Conditioning:
    return Conditioning({name: tensor[rows] for name, tensor in conditioning.tensors.items()})


def _sizes(batch: list[ImageRequest], device: torch.device, *, is_negative: bool) -> SizeConditioning:
    originals = [r.original_size_hw or (r.height, r.width) for r in batch]
    if is_negative:
        originals = [r.negative_original_size_hw or size for r, size in zip(batch, originals, strict=True)]
    crops, targets = [r.crop_top_left for r in batch], [(r.height, r.width) for r in batch]
    return SizeConditioning(*(torch.tensor(pairs, device=device) for pairs in (originals, crops, targets)))


# --- pixels and modules ---------------------------------------------------------------------------------------


def _decode(family: ModelFamily, latents: Tensor) -> list[Image.Image]:
    """Model latents [B,C,h,w] -> B images, one VAE call each, in the VAE's own dtype without autocast."""
    parameter = next(family.vae.parameters(), None)
    dtype = latents.dtype if parameter is None else parameter.dtype
    with on_device([family.vae], latents.device), torch.autocast(latents.device.type, enabled=False):
        pixels = torch.cat([family.decode_latents(row).float() for row in latents.to(dtype).split(1)])
    if not pixels.isfinite().all():
        logger.warning("The VAE gave NaN or infinite pixels (black in the image); --no_half_vae may help.")
    return to_pil(pixels.nan_to_num(nan=-1.0))


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """[B,3,H,W] in [-1,1] -> B RGB images; values are clamped and rounded."""
    levels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in levels.permute(0, 2, 3, 1).cpu().numpy()]


@contextmanager
def on_device(modules: Iterable[nn.Module | None], device: torch.device) -> Iterator[None]:
    """Modules on `device`; afterwards each is back where it was."""
    moved = []
    for module in modules:
        parameter = None if module is None else next(module.parameters(), None)
        if module is not None and parameter is not None and parameter.device != _indexed(device):
            moved.append((module, parameter.device))
            module.to(device)
    try:
        yield
    finally:
        for module, former in moved:
            module.to(former)


def _indexed(device: torch.device) -> torch.device:
    """`cuda` with its index, as parameters report it."""
    return torch.empty(0, device=device).device


@contextmanager
def evaluation_mode(modules: Iterable[nn.Module | None]) -> Iterator[None]:
    """All modules in eval mode; afterwards every submodule has its former mode again."""
    former = [(part, part.training) for module in modules if module is not None for part in module.modules()]
    for part, _ in former:
        part.training = False
    try:
        yield
    finally:
        for part, was_training in former:
            part.training = was_training
