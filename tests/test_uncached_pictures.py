"""Pictures without cached latents: how many are encoded at once, which the random draws depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.methods.base import LossRecipe, batch_latents
from tests.embedding_training import batch_of, start_run
from tests.test_run_wiring import fresh_process, network_run  # noqa: F401


def latents_of(method, batch, seed: int = 5) -> torch.Tensor:
    torch.manual_seed(seed)
    return batch_latents(method.family, batch, method.recipe.vae_batch_size)


def encoded(family, *chunks: torch.Tensor, seed: int = 5) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return family.latent.normalize(torch.cat([family.encode_images(chunk) for chunk in chunks]))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_batch_is_encoded_at_once_unless_a_number_is_given(images, tmp_path, fresh_process):  # noqa: F811
    run = start_run("train_textual_inversion", output_dir=tmp_path)
    batch = replace(batch_of(run, "a", "b", "c"), latents=None, images=images)
    method = run.method
    at_once = encoded(method.family, images)
    assert torch.equal(latents_of(method, batch), at_once)
    two = LossRecipe.from_options(method.options.with_values(vae_batch_size=2), method.family)
    assert two.vae_batch_size == 2
    method.recipe = two
    assert torch.equal(latents_of(method, batch), encoded(method.family, images[:2], images[2:]))
    assert not torch.equal(latents_of(method, batch), at_once)


def test_networks_encode_one_by_one(images, tmp_path, fresh_process):  # noqa: F811
    method = network_run(tmp_path).method
    assert method.recipe.vae_batch_size == 1
    assert network_run(tmp_path, vae_batch_size=2).method.recipe.vae_batch_size == 2
