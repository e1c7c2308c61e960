"""The demo's SDXL, SD3 and FLUX.1 models: small, loadable, and right about what they draw."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

DEMO = Path(__file__).resolve().parents[1] / "demo"
sys.path.insert(0, str(DEMO))

import family_models  # noqa: E402
import train_family_bases  # noqa: E402
from base_vae import build_wide_vae, psnr  # noqa: E402
from judge import judge  # noqa: E402

MODEL = DEMO / "model"
FILES = {
    "sdxl": ["shapes_sdxl"],
    "sd3": ["shapes_sd3", "shapes_clip_l", "shapes_clip_g", "shapes_t5xxl"],
    "flux": ["shapes_flux", "shapes_ae", "shapes_clip_l", "shapes_t5xxl"],
}


@pytest.mark.parametrize("name", FILES)
def test_a_base_with_all_its_parts_is_at_most_6_megabytes(name: str) -> None:
    assert family_models.megabytes(*(MODEL / f"{file}.safetensors" for file in FILES[name])) <= 6.0


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_base_draws_what_the_prompt_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DEMO.parent)  # the paths in the training options begin there
    base = train_family_bases.BASES[name]
    drawn = train_family_bases.draw_known(base, MODEL / base.file, 1, base.scale)
    right = [judge(picture).matches(*triple) for triple, picture in drawn]
    assert len(right) == 54 and sum(right) / len(right) >= 0.85


def test_scaled_latents_have_variance_1_and_the_same_pictures() -> None:
    torch.manual_seed(0)
    vae, batch = build_wide_vae().eval(), torch.rand(16, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(batch).latent_dist.mode()).sample
        family_models.scale_latents(vae, 1.5305, batch)
        posterior = vae.encode(batch).latent_dist
        after = vae.decode(posterior.mode()).sample
    variance = (posterior.mean.var((0, 2, 3)) + posterior.std.pow(2).mean((0, 2, 3))) * 1.5305**2
    assert torch.allclose(variance, torch.ones(16), atol=1e-4)
    assert psnr(before, after).min() > 60


def test_the_t5_tokenizer_knows_the_words_of_the_captions(tmp_path: Path) -> None:
    from library.text.t5 import load_tokenizer

    pieces = family_models.write_t5_tokenizer(tmp_path / family_models.T5_ID)
    tokenizer = load_tokenizer(model_path=None, cache_dir=str(tmp_path))
    ids, mask = tokenizer.ids_and_mask(["a red circle on a white background"], family_models.T5_LENGTH)
    assert ids.shape == (1, 24) and int(mask.sum()) == 8  # seven words and the end
    assert int(ids.max()) < pieces and 2 not in ids[0].tolist()
