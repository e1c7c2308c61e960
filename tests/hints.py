"""What tests of training with hint pictures share: batches, a method without a loop, folders of picture pairs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageFilter
from torch import Tensor

from library.data.records import Batch
from library.families.base import ModelFamily
from library.methods.base import Placement, size_conditioning
from library.methods.hints import HintedTraining
from library.options import Options
from tests.golden import FOLDER

SIZE = 64
ON_CPU = Placement(torch.device("cpu"), torch.float32, torch.float32)


def hint_batch(family: ModelFamily, *, width: int = SIZE, height: int = SIZE, seed: int = 3) -> Batch:
    """Two samples with random latents (as cached) and random hints."""
    generator = torch.Generator().manual_seed(seed)
    captions = ["a cat on a mat", "best quality"]
    sizes = torch.tensor([[height, width]] * 2)
    latent_shape = (2, family.latent.channels, height // 8, width // 8)
    return Batch(
        captions=captions, loss_weights=torch.ones(2), original_sizes_hw=sizes, crop_top_lefts=torch.zeros_like(sizes),
        target_sizes_hw=sizes, network_multipliers=torch.ones(2), image_keys=["a", "b"],
        latents=torch.randn(latent_shape, generator=generator) / (1 if family.latent.cache_is_scaled else 0.2),
        tokens=family.tokenize(captions),
        conditioning_images=torch.rand(2, 3, height, width, generator=generator) * 2 - 1,
    )  # fmt: skip


def attached(method_class: type[HintedTraining], options: Options, family: ModelFamily) -> HintedTraining:
    """The method on a loaded family, ready for steps in float32 on the CPU."""
    torch.manual_seed(0)
    method = method_class(options, family)
    assert method.check_options() == []
    method.attach(ON_CPU)
    return method


def predictions(method: HintedTraining, batch: Batch) -> tuple[Tensor, Tensor]:
    """(with the hint, by the frozen model alone) for fixed noisy latents."""
    family = method.family
    x_t = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(9))
    timesteps = torch.tensor([300.0, 700.0])
    with torch.no_grad(), method.inference():
        conditioning = method.conditioning(batch)
        alone = family.predict(x_t, timesteps, conditioning, size_conditioning(batch))
        return method.predict(x_t, timesteps, conditioning, batch), alone


def train_on_one_batch(method: HintedTraining, batch: Batch, *, steps: int, rate: float) -> list[float]:
    """Losses of AdamW steps on one batch with fixed timesteps and noise."""
    optimizer = torch.optim.AdamW(method.trained_parameters(), lr=rate)
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(4))
    losses = []
    for _ in range(steps):
        loss = method.loss(batch, torch.tensor([500.0, 800.0]), noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def random_weights_(method: HintedTraining, scale: float = 0.02) -> None:
    """Move every trained weight, so that hints count."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in method.trained_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


@contextmanager
def frozen(family: ModelFamily) -> Iterator[None]:
    """Checks that nothing of the model changes and that nothing of it has a gradient."""
    modules = [family.denoiser, family.vae, *family.text_encoders]
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    yield
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
        assert all(parameter.grad is None for parameter in module.parameters())


def write_pairs(folder: Path) -> list[str | Path]:
    """The recorded pictures at 64 pixels with their edges as hints; returns the options that train on them."""
    images, hints = folder / "images", folder / "hints"
    for place in (images, hints):
        place.mkdir(parents=True)
    for name in ("a1", "a2", "a3", "b1"):
        with Image.open(FOLDER / "dataset" / f"{name}.png") as image:
            small = image.convert("RGB").resize((SIZE, SIZE))
        small.save(images / f"{name}.png")
        small.filter(ImageFilter.FIND_EDGES).save(hints / f"{name}.png")
        (images / f"{name}.txt").write_text(f"picture {name}", encoding="utf-8")
    return [
        "--train_data_dir", images, "--conditioning_data_dir", hints, "--caption_extension", ".txt", "--resolution",
        str(SIZE), "--train_batch_size", "2", "--cache_latents", "--max_data_loader_n_workers", "0", "--seed", "42",
        "--learning_rate", "1e-3",
    ]  # fmt: skip
