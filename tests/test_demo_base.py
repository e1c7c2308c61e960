"""The demo's base model: tokenizer, latent normalisation, checkpoint layout, and what the committed model draws."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

DEMO = Path(__file__).resolve().parents[1] / "demo"
sys.path.insert(0, str(DEMO))

import base_models  # noqa: E402
import base_sampling  # noqa: E402
import base_tokenizer  # noqa: E402
import base_vae  # noqa: E402
import fast_norm  # noqa: E402
import judge  # noqa: E402
from base_captions import meaningless_words, training_caption  # noqa: E402
from base_denoiser import LatentCache, fold_normalisation, posteriors  # noqa: E402

from library.model_util import load_checkpoint  # noqa: E402

CHECKPOINT = DEMO / "model" / base_models.CHECKPOINT_NAME


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    base_tokenizer.write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def test_tokenizer_knows_its_words_and_any_text(tokenizer: CLIPTokenizer) -> None:
    for word in base_tokenizer.WORDS:
        assert tokenizer.tokenize(word) == [word + "</w>"]
    ends = tokenizer.convert_tokens_to_ids([base_tokenizer.START, base_tokenizer.END])
    assert ends == [len(tokenizer) - 2, len(tokenizer) - 1]
    ids = tokenizer("zebra über 日本!").input_ids
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == "zebraüber日本!"
    assert tokenizer.pad_token_id == len(tokenizer) - 1 and tokenizer.model_max_length == 77


def test_committed_tokenizer_is_the_generated_one(tmp_path: Path) -> None:
    base_tokenizer.write_tokenizer(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (DEMO / "model" / base_models.TOKENIZER_NAME / path.name).read_bytes(), path.name


def test_latents_are_normalised_without_changing_pictures() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(32, 32, 32, 32), layers_per_block=1, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4).eval()
    vae.quant_conv.bias.data[:4] += torch.tensor([3.0, -2.0, 0.5, 1.0])
    batch = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(batch).latent_dist.mean).sample
    fold_normalisation(vae, 64)
    with torch.no_grad():
        after = vae.decode(vae.encode(batch).latent_dist.mean).sample
    cache = posteriors(vae, 64)
    variance = cache.mean.var((0, 2, 3)) + cache.deviation.pow(2).mean((0, 2, 3))
    assert isinstance(cache, LatentCache)
    assert torch.allclose(before, after, atol=1e-3)
    assert cache.mean.mean((0, 2, 3)).abs().max() < 0.05
    assert (variance - 1).abs().max() < 0.05


@pytest.mark.slow
def test_the_norm_used_for_training_equals_pytorchs() -> None:
    torch.manual_seed(0)
    plain, fast = torch.nn.GroupNorm(8, 16), torch.nn.Sequential(torch.nn.GroupNorm(8, 16))
    torch.nn.init.normal_(plain.weight)
    fast[0].load_state_dict(plain.state_dict())
    fast_norm.use_fast_norm(fast)
    weights = torch.randn(2, 16, 5, 5)
    inputs = torch.randn(2, 16, 5, 5).requires_grad_()
    results = []
    for module in (plain, fast):
        inputs.grad = None
        out = module(inputs.to(memory_format=torch.channels_last))
        (out * weights).sum().backward()
        results.append((out.detach(), inputs.grad.clone()))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)


def test_captions_name_the_scene_and_strange_words_stay_outside() -> None:
    import random

    import shapes

    strange = meaningless_words(base_tokenizer.WORDS)
    assert {"sks", "star"} <= set(strange) and not {"red", "circle", "white"} & set(strange)
    rng, scene = random.Random(0), shapes.known_picture(1)[1]
    captions = [training_caption(scene, rng, strange) for _ in range(200)]
    assert sum(scene.caption() == caption for caption in captions) > 60
    assert len(set(captions)) > 30


def test_checkpoint_has_the_names_of_sd15() -> None:
    listing = DEMO.parent / "tests" / "data" / "keys_sd15.json.gz"
    tensors = load_checkpoint(CHECKPOINT, v2=False)
    assert CHECKPOINT.stat().st_size < 12_000_000
    assert len(tensors.unet.config.block_out_channels) == 4 and tensors.unet.config.attention_head_dim == 8
    if listing.exists():
        names = json.loads(gzip.decompress(listing.read_bytes()))
        from safetensors import safe_open

        with safe_open(CHECKPOINT, "pt") as file:
            assert set(file.keys()) <= set(names)


@pytest.mark.slow
def test_committed_model_draws_what_is_asked() -> None:
    modules = load_checkpoint(CHECKPOINT, v2=False, dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(CHECKPOINT.parent / base_models.TOKENIZER_NAME)
    models = base_sampling.Models(modules.unet, modules.text_encoder, modules.vae, tokenizer)
    prompts = ["a red circle on a white background", "a blue square on a grey background",
               "a green triangle on a black background", "a yellow circle on a black background",
               "a purple square on a white background", "a cyan triangle on a grey background"]
    pictures = base_sampling.sample(models, prompts, base_sampling.SamplingSettings(steps=16))
    right = [judge.agrees(judge.judge(picture), prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    assert sum(right) >= 5, right


@pytest.mark.slow
def test_vae_training_runs_and_resumes(tmp_path: Path) -> None:
    settings = base_vae.VaeSettings(minutes=0.01, batch_size=2)
    first = base_vae.train_vae(settings, tmp_path, torch.device("cpu"))
    assert (tmp_path / "vae.pt").exists()
    again = base_vae.train_vae(settings, tmp_path, torch.device("cpu"))
    for before, after in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(before, after)
