"""The engine that draws: starting noise, denoising loop, guidance and decoding, for every model family."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Generator, Tensor, nn

from library.families.base import Conditioning, ModelFamily, SizeConditioning
from library.generation.guidance import combine
from library.generation.hooks import Drawing, HookFactory, KeepOutsideMask, StepHook, run_hooks, state_of_call
from library.generation.pictures import load_mask, load_picture
from library.generation.request import ImageRequest, batches, embedded_guidance
from library.generation.samplers import SAMPLERS, Start, make_sampler, start_from_image
from library.sampling_spec import SamplingSpec
from library.text.clip import PromptStyle

logger = logging.getLogger(__name__)

# (x_t [R,C,h,w], timesteps float32 [R], conditioning, sizes) -> raw prediction [R,C,h,w]; R rows of all guidance parts
Predict = Callable[[Tensor, Tensor, Conditioning, SizeConditioning], Tensor]
# the signature of `ModelFamily.encode_prompts`
EncodePrompts = Callable[..., tuple[Conditioning, Conditioning]]


@dataclass(frozen=True)
class DrawSettings:
    """How all images of a run are drawn.

    `predict_for` replaces `family.predict` where it gives something (ControlNet), `encode_prompts` the family's method
    of that name (released text encoders). `style` says how prompts are read (None: the family's own way). `hooks` are
    asked for a step hook once per batch. `vae_batch_size` images are decoded together.
    """

    predict_for: Callable[[ImageRequest], Predict | None] | None = None
    encode_prompts: EncodePrompts | None = None
    style: PromptStyle | None = None
    hooks: Sequence[HookFactory] = ()
    vae_batch_size: int = 1
    zero_steps_offset: bool = False
    show_progress: bool = False


def draw(
    family: ModelFamily,
    requests: ImageRequest | Sequence[ImageRequest],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    batch_size: int = 1,
    settings: DrawSettings = DrawSettings(),  # noqa: B008 (a frozen value)
) -> list[Image.Image]:
    """One RGB image per request, in order; equal neighbours share a batch of at most `batch_size`.

    An image depends on its own request and not on its place in a batch: all its noise comes from generators seeded
    with its seed, on `device` in `dtype`. `dtype` is what the denoiser gets; the state between steps is float32.
    Text encoders and VAE are moved to `device` while they are used; the denoiser must be there.
    Raises ValueError for what the model or the sampler cannot do, ImageError for pictures that cannot be read.
    """
    requests = [requests] if isinstance(requests, ImageRequest) else list(requests)
    images: list[Image.Image] = []
    for batch in batches(requests, batch_size):
        images += to_pil(draw_batch(family, batch, device=device, dtype=dtype, settings=settings))
    return images


@torch.no_grad()
def draw_batch(
    family: ModelFamily,
    batch: list[ImageRequest],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    settings: DrawSettings = DrawSettings(),  # noqa: B008 (a frozen value)
) -> Tensor:
    """The images of requests with equal `batch_key`: float32 [B,3,H,W] around [-1,1]. See `draw`."""
    with evaluation_mode([family.denoiser, family.vae, *family.text_encoders]):
        latents = _denoise(family, batch, settings, device=torch.device(device), dtype=dtype)
        pixels = _decode(family, latents, settings.vae_batch_size)
    if not pixels.isfinite().all():
        logger.warning("%s", broken_picture(family, latents, dtype))
    return pixels.nan_to_num(nan=-1.0)


def _denoise(
    family: ModelFamily, batch: list[ImageRequest], settings: DrawSettings, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Model latents float32 [B,C,h,w] of one batch."""
    request, spec = batch[0], family.sampling_spec()
    _check_size(request, family.latent.pixel_unit)
    latent_hw = request.height // family.latent.downsample, request.width // family.latent.downsample
    noises = [
        ImageNoise(request, (1, family.latent.channels, *latent_hw), spec, device=device, dtype=dtype)
        for request in batch
    ]
    start = _start(request, spec, settings)
    latents = None if request.init_image is None else _encode_pictures(family, batch, noises, device)
    if latents is not None and start.first_step >= request.steps:
        return latents
    sampler = make_sampler(
        request.sampler, spec, request.steps, latent_hw, flow_shift=request.flow_shift, device=device, start=start
    )
    start_noise = torch.cat([noise.start for noise in noises])
    masks: list[StepHook] = []
    if latents is None:
        x = start_noise * sampler.initial_sigma
    else:
        noise = torch.cat([noise.for_picture for noise in noises])
        x = sampler.noised(latents, noise, start.noise_step)
        if request.mask_image is not None:
            masks.append(KeepOutsideMask(latents, noise, _kept(batch, latent_hw, device)))
    predict = (settings.predict_for(request) if settings.predict_for else None) or family.predict
    conditioning, sizes = _guidance_rows(family, batch, spec, settings, device)
    drawing = Drawing(
        family, batch, sampler, conditioning, sizes, predict, [noise.of_sampler for noise in noises], dtype
    )
    hooks = [hook for hook in (factory(drawing) for factory in settings.hooks) if hook is not None]
    return _sample(drawing, x, hooks + masks, show_progress=settings.show_progress)


def _sample(drawing: Drawing, x: Tensor, hooks: Sequence[StepHook], *, show_progress: bool) -> Tensor:
    """Run the sampler from its first noisy state x [B,C,h,w] to the end."""
    from tqdm import tqdm

    request, sampler = drawing.requests[0], drawing.sampler
    rows = len(drawing.sizes.target_hw)
    for call, timestep in enumerate(tqdm(sampler.timesteps, desc="steps", disable=not show_progress, leave=False)):
        state = run_hooks(hooks, state_of_call(drawing, call, x))
        x_t = sampler.model_input(state.x, call).to(drawing.dtype)
        timesteps = torch.full((rows,), timestep, dtype=torch.float32, device=x.device)
        x_t = torch.cat([x_t] * (rows // len(x_t)))
        raw = drawing.predict(x_t, timesteps, drawing.conditioning, drawing.sizes).float()
        prediction = combine(raw, request.scale, request.negative_scale)
        state = run_hooks(hooks, replace(state, moment="predicted", prediction=prediction))
        prediction = prediction if state.prediction is None else state.prediction
        x = sampler.step(prediction, state.x, call, drawing.generators).float()
        x = run_hooks(hooks, replace(state, moment="after", x=x)).x
    return x


# --- noise ----------------------------------------------------------------------------------------------------


class ImageNoise:
    """All noise of one image, from one stream seeded with its seed.

    The order of the stream is: start noise, noise of all steps, noise for the picture to start from, noise of the
    VAE's encoder. `of_sampler` is a generator at the place of the steps' noise.
    """

    def __init__(
        self, request: ImageRequest, shape: tuple[int, int, int, int], spec: SamplingSpec,
        *, device: torch.device, dtype: torch.dtype,
    ) -> None:
        noise_dtype = torch.float32 if spec.noise_on_cpu else dtype

        def drawn(generator: Generator) -> Tensor:
            noise = torch.randn(shape, generator=generator, device=generator.device, dtype=noise_dtype)
            return noise.to(device, torch.float32)

        generator = _generator(request.seed, device, spec)
        self.start = drawn(generator)
        self.of_sampler = Generator(generator.device)
        self.of_sampler.set_state(generator.get_state())
        if request.init_image is not None:
            per_step = SAMPLERS[request.sampler].noises_per_step if spec.betas is not None else 0
            for _ in range(request.steps * per_step):  # as the sampler draws it
                torch.randn(shape, generator=generator, device=generator.device)
            self.for_picture = drawn(generator)
        self.of_encoder = generator


def _check_size(request: ImageRequest, multiple: int) -> None:
    if request.width % multiple or request.height % multiple or min(request.width, request.height) < multiple:
        raise ValueError(f"image size {request.width}x{request.height}: both sides must be multiples of {multiple}")


def _generator(seed: int | None, device: torch.device, spec: SamplingSpec) -> Generator:
    """A generator of one image's noise; without a seed the system gives one (training generators stay untouched)."""
    place = "cpu" if spec.noise_on_cpu or device.type == "mps" else device
    return Generator(place).manual_seed(random.SystemRandom().randrange(2**32) if seed is None else seed)


def _start(request: ImageRequest, spec: SamplingSpec, settings: DrawSettings) -> Start:
    """Where denoising begins."""
    zero_offset = settings.zero_steps_offset
    if request.init_image is None:
        return Start(zero_offset=zero_offset)
    if request.strength is None or not 0 <= request.strength <= 1:
        raise ValueError(f"strength {request.strength}: an image to start from needs a strength from 0 to 1")
    zero_offset = zero_offset or spec.betas is None
    return start_from_image(request.sampler, request.steps, request.strength, zero_offset=zero_offset)


def _encode_pictures(
    family: ModelFamily, batch: list[ImageRequest], noises: list[ImageNoise], device: torch.device
) -> Tensor:
    """Model latents float32 [B,C,h,w] of the pictures to start from; each is a posterior sample of its own."""
    encoded = []
    paths = [request.init_image for request in batch if request.init_image is not None]
    with on_device([family.vae], device):
        for path, noise in zip(paths, noises, strict=True):
            picture = load_picture(path, (batch[0].width, batch[0].height)).to(device)
            encoded.append(family.encode_images(picture, noise.of_encoder).float())
    latents = torch.cat(encoded)
    if not latents.isfinite().all():
        raise ValueError(f"The VAE gave NaN or infinite latents for an image to start from: {vae_advice(family)}")
    return latents if family.latent.cache_is_scaled else family.latent.normalize(latents)


def _kept(batch: list[ImageRequest], latent_hw: tuple[int, int], device: torch.device) -> Tensor:
    """Where the pictures are kept: float32 [B,1,h,w], 1 outside the white of the masks."""
    size = batch[0].width, batch[0].height
    masks = [load_mask(request.mask_image, size, latent_hw) for request in batch if request.mask_image is not None]
    return 1 - torch.cat(masks).to(device)


# --- what is predicted ----------------------------------------------------------------------------------------


def _guidance_rows(
    family: ModelFamily, batch: list[ImageRequest], spec: SamplingSpec, settings: DrawSettings, device: torch.device
) -> tuple[Conditioning, SizeConditioning]:
    """Conditioning and sizes of all rows of a batch, in the order that `guidance.combine` expects."""
    request, encode = batch[0], settings.encode_prompts or family.encode_prompts
    prompts, negatives = prompts_of(batch)
    needs_empty = len(prompts) > len(batch)
    with on_device(family.text_encoders, device):
        positive, negative = encode(prompts, negatives, clip_skip=request.clip_skip, style=settings.style)
    here = slice(0, len(batch))
    parts, size_parts = [_rows(positive, here)], [_sizes(batch, device, is_negative=False)]
    if request.uses_guidance:
        parts.insert(0, _rows(negative, here))
        size_parts.insert(0, _sizes(batch, device, is_negative=True))
    if needs_empty:
        parts.append(_rows(negative, slice(len(batch), None)))
        size_parts.append(_sizes(batch, device, is_negative=True))
    tensors = {name: torch.cat([part[name] for part in parts]) for name in positive.tensors}
    if (scale := embedded_guidance(request, spec)) is not None:
        tensors["guidance"] = torch.full((len(batch) * len(parts),), scale)
    sizes = SizeConditioning(
        torch.cat([part.original_hw for part in size_parts]),
        torch.cat([part.crop_top_left for part in size_parts]),
        torch.cat([part.target_hw for part in size_parts]),
    )
    return Conditioning(tensors).to(device), sizes


def prompts_of(batch: list[ImageRequest]) -> tuple[list[str], list[str]]:
    """(prompts, negative prompts) that are encoded together for a batch, so that all its parts have one length.

    With a weight for the negative prompt of its own, the lists are twice as long: the second half is for empty ones.
    """
    prompts = [r.prompt for r in batch]
    negatives = [r.negative_prompt if r.uses_guidance else "" for r in batch]
    if batch[0].uses_guidance and batch[0].negative_scale is not None:
        return prompts * 2, negatives + [""] * len(batch)
    return prompts, negatives


def _rows(conditioning: Conditioning, rows: slice) -> Conditioning:
    return Conditioning({name: tensor[rows] for name, tensor in conditioning.tensors.items()})


def _sizes(batch: list[ImageRequest], device: torch.device, *, is_negative: bool) -> SizeConditioning:
    originals = [r.original_size_hw or (r.height, r.width) for r in batch]
    if is_negative:
        originals = [r.negative_original_size_hw or size for r, size in zip(batch, originals, strict=True)]
    crops, targets = [r.crop_top_left for r in batch], [(r.height, r.width) for r in batch]
    return SizeConditioning(*(torch.tensor(pairs, device=device) for pairs in (originals, crops, targets)))


# --- pixels and modules ---------------------------------------------------------------------------------------


def _decode(family: ModelFamily, latents: Tensor, vae_batch_size: int) -> Tensor:
    """Model latents [B,C,h,w] -> pixels float32 [B,3,H,W], in the VAE's own dtype without autocast."""
    parameter = next(family.vae.parameters(), None)
    dtype = latents.dtype if parameter is None else parameter.dtype
    with on_device([family.vae], latents.device), torch.autocast(latents.device.type, enabled=False):
        pixels = torch.cat([family.decode_latents(rows).float() for rows in latents.to(dtype).split(vae_batch_size)])
    return pixels


def broken_picture(family: ModelFamily, latents: Tensor, dtype: torch.dtype) -> str:
    """Why a picture has NaN or infinite pixels, and what to do; `latents` were decoded, `dtype` is the denoiser's."""
    if latents.isfinite().all():
        return f"The VAE gave NaN or infinite pixels (black in the image): {vae_advice(family)}"
    names = [name for name, part in _parts(family) if not _is_finite(part)]
    if names:
        return (
            f"The picture is black: there are NaN or infinite weights in the {' and the '.join(names)}. The model file "
            "or a network that was added to it is damaged: use another one."
        )
    advice = "compute in bfloat16 or float32" if dtype == torch.float16 else "a network's strength may be too high"
    return f"The picture is black: the model's predictions became NaN or infinite in {_name(dtype)}; {advice}."


def vae_advice(family: ModelFamily) -> str:
    """What helps against NaN of the VAE: another number format, or another VAE."""
    parameter = next(family.vae.parameters(), None)
    if not _is_finite(family.vae):
        return "its weights are NaN or infinite: the file is damaged, use another VAE."
    if parameter is not None and parameter.dtype.itemsize < 4:
        return f"it runs in {_name(parameter.dtype)}, in float32 it would not overflow ({family.wide_vae_option})."
    return "it runs in float32 already: its latents are far outside of what it knows."


def _parts(family: ModelFamily) -> Iterator[tuple[str, nn.Module]]:
    yield "denoiser", family.denoiser
    for name, encoder in zip(family.text_encoder_names, family.text_encoders, strict=False):
        if encoder is not None:
            yield name.replace("_", " "), encoder


def _is_finite(module: nn.Module) -> bool:
    return all(bool(part.isfinite().all()) for part in module.parameters() if part.dtype.itemsize > 1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
