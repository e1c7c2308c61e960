"""The scripts that draw, from command line to files, on the tiny model."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library import launch
from library.generation.pictures import read_texts
from library.generation.recorded import recorded_prompt
from library.generation.request import ImageRequest
from library.generation.writer import Writer, save_image
from tests.generation import difference, generate, pixels_of, texts_of, write_lora
from tests.test_third_party_networks import lycoris_presets  # noqa: F401 (a fixture)
from tests.training import MODEL, TOKENIZERS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tmp_path_factory.mktemp("lora") / "style.safetensors")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = torch.rand(70, 100, 3, generator=torch.Generator().manual_seed(3))
    Image.fromarray((pixels * 255).to(torch.uint8).numpy()).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path, **settings: Any) -> str:
    """The error lines of a command line that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        generate(*arguments, **settings)
    assert stop.value.code == 2
    return capsys.readouterr().err


# --- prompts and seeds ----------------------------------------------------------------------------------------
def test_one_prompt_gives_one_image_that_says_how_it_was_made(tmp_path: Path) -> None:
    (path,) = generate("--prompt", "a cat --n dog --l 5", "--seed", "42", "--sampler", "euler", outdir=tmp_path / "o")
    assert re.fullmatch(r"im_\d{14}_000_42\.png", path.name)
    with Image.open(path) as image:
        assert image.size == (64, 64) and image.mode == "RGB"
    assert texts_of(path) == {
        "prompt": "a cat", "negative-prompt": "dog", "seed": "42", "sampler": "euler", "steps": "2", "scale": "5.0",
        "raw-prompt": "a cat --n dog --l 5", "size": "64x64", "model": "sd1_tiny.safetensors",
    }  # fmt: skip
    assert pixels_of(path).std() > 0.03


def test_both_scripts_draw_the_same_image(tmp_path: Path) -> None:
    (one,) = generate("--prompt", "a cat --d 3", outdir=tmp_path / "a")
    (other,) = generate("--prompt", "a cat --d 3", outdir=tmp_path / "b", script="gen_img")
    assert difference(one, other) == 0


@pytest.mark.slow
def test_a_file_of_prompts_is_drawn_in_batches_that_change_nothing(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "# comment\n\na cat --d 1 --n blurry\na dog --d 2,3\na {e$$red|blue} fox --d 4 --w 128\n", encoding="utf-8"
    )
    batched = generate(
        "--from_file", prompts, "--images_per_prompt", "2", "--batch_size", "3", "--sampler", "euler_a",
        "--vae_batch_size", "0.5", outdir=tmp_path / "a",
    )  # fmt: skip
    single = generate(
        "--from_file", prompts, "--images_per_prompt", "2", "--sampler", "euler_a", outdir=tmp_path / "b"
    )
    assert [texts_of(path)["seed"] for path in batched] == ["1", "1", "2", "3", "4", "4"]
    assert [texts_of(path)["prompt"] for path in batched][4:] == ["a red fox", "a blue fox"]
    assert [texts_of(path)["negative-prompt"] for path in batched] == ["blurry"] * 2 + [""] * 4
    assert [texts_of(path)["size"] for path in batched] == ["64x64"] * 4 + ["128x64"] * 2
    for one, other in zip(batched, single, strict=True):
        assert texts_of(one) == texts_of(other)
        assert difference(one, other) <= 1


def test_iterations_share_a_seed_when_asked_and_never_names(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n", encoding="utf-8")
    files = generate(
        "--from_file", prompts, "--n_iter", "2", "--iter_same_seed", "--seed", "7", "--steps", "1",
        "--sequential_file_name", "--shuffle_prompts", outdir=tmp_path / "o",
    )  # fmt: skip
    seeds = [texts_of(path)["seed"] for path in files]
    assert seeds[0] == seeds[1] and seeds[2] == seeds[3] and seeds[0] != seeds[2]
    assert [path.name for path in files] == [f"im_00000{number}.png" for number in (1, 2, 3, 4)]
    (more,) = generate("--prompt", "a cat", "--steps", "1", "--sequential_file_name", outdir=tmp_path / "o")
    assert more.name == "im_000005.png"


PROMPTER = '''
class Prompter:
    def __init__(self, args): self.args, self.calls = args, []
    def __len__(self): return 2
    def __call__(self, args, pipe, seed_random, iter_seed, prompt_index, global_step):
        self.calls.append((prompt_index, global_step))
        with open(args.prompter_module_args, "a") as file:
            file.write(f"{prompt_index} {global_step} {type(pipe).__name__} {iter_seed} {seed_random.random() < 1}\\n")
        return None if prompt_index == 2 else f"number {prompt_index} --d {prompt_index}"

def get_prompter(args, pipe, networks):
    assert networks == []
    return Prompter(args)
'''


def test_prompts_come_from_a_module(tmp_path: Path) -> None:
    (tmp_path / "prompter.py").write_text(PROMPTER)
    files = generate(
        "--from_module", tmp_path / "prompter.py", "--prompter_module_args", tmp_path / "calls.txt", "--steps", "1",
        "--images_per_prompt", "2", "--n_iter", "2", outdir=tmp_path / "o", script="gen_img",
    )  # fmt: skip
    assert [texts_of(path)["prompt"] for path in files] == ["number 0"] * 2 + ["number 1"] * 2 + ["number 0"] * 2 + [
        "number 1"
    ] * 2
    calls = [line.split() for line in (tmp_path / "calls.txt").read_text().splitlines()]
    assert [call[:2] for call in calls] == [["0", "0"], ["1", "2"], ["2", "4"]] * 2
    assert calls[0][2:] == ["StableDiffusion", "None", "True"]


def test_lines_of_standard_input_are_drawn_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lines = "a cat --d 1\n\na dog --d 1+2\na fox --f sub/fox --d 3\na wolf --n no"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    with caplog.at_level(logging.INFO):
        files = generate("--interactive", "--no_preview", "--batch_size", "4", "--n_iter", "3", outdir=tmp_path / "o")
    assert [texts_of(path)["prompt"] for path in files] == ["a cat", "a fox", "a wolf"]
    assert files[1] == tmp_path / "o" / "sub" / "fox.png"
    assert "'1+2'" in caplog.text and f"seed {texts_of(files[2])['seed']}" in caplog.text
    assert "--n_iter has no effect" in caplog.text


def test_a_single_prompt_with_a_mistake_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'1+2'" in refused(capsys, "--prompt", "a cat --d 1+2", outdir=tmp_path / "o")
    assert "'..'" in refused(capsys, "--prompt", "a cat --f ../../x.png", outdir=tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_prompts_come_from_images(tmp_path: Path, picture: Path, caplog: pytest.LogCaptureFixture) -> None:
    (drawn,) = generate("--prompt", "a cat --n dog --f a.png", "--steps", "1", outdir=tmp_path / "source")
    (compressed,) = generate("--prompt", "a fox --f b.webp", "--steps", "1", outdir=tmp_path / "source")
    recorded = recorded_prompt(drawn), recorded_prompt(compressed)
    assert [(one.prompt, one.negative_prompt) for one in recorded] == [("a cat", "dog"), ("a fox", "")]
    Image.open(picture).save(tmp_path / "source" / "aa_silent.png")
    files = generate(
        "--image_path", tmp_path / "source", "--images_per_prompt", "2", "--strength", "0.5",
        "--use_original_file_name", outdir=tmp_path / "o",
    )  # fmt: skip
    assert [path.name for path in files] == ["a.png", "a_001.png", "b.png", "b_001.png"]
    assert [texts_of(path)["prompt"] for path in files] == ["a cat"] * 2 + ["a fox"] * 2
    assert [texts_of(path)["init-image"] for path in files] == ["a.png"] * 2 + ["b.webp"] * 2
    assert "aa_silent.png" in caplog.text


@pytest.mark.slow
def test_long_prompts_weights_and_breaks_reach_the_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = " ".join(["red"] * 80) + " BREAK blue --d 1 --f {}.png"
    whole, cut, weighted, plain = (
        generate("--prompt", text, *more, outdir=tmp_path / "o")[0]
        for text, more in (
            (long.format("whole"), ("--max_embeddings_multiples", "3")),
            (long.format("cut"), ()),
            ("a (red:1.5) cat --d 1 --f weighted.png", ()),
            ("a red cat --d 1 --f plain.png", ()),
        )
    )
    assert difference(whole, cut) > 2 and difference(weighted, plain) > 2
    assert "--max_embeddings_multiples 3" in caplog.text


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (("--clip_skip", "2"), True),
        (("--v_parameterization",), True),
        (("--zero_terminal_snr", "--v_parameterization"), True),
        (("--negative_scale", "0.5"), True),
        (("--scale", "1.0"), True),
        (("--force_scheduler_zero_steps_offset",), True),
        (("--bf16",), True),
        (("--sdpa",), False),
        (("--opt_channels_last",), False),
        (("--vae_slices", "16"), False),
        (("--vae", MODEL), False),
        (("--no_half_vae",), False),
    ],
)
def test_options_that_change_the_image_and_options_that_do_not(
    tmp_path: Path, options: tuple[str, ...], changes: bool
) -> None:
    line = ("--prompt", "a (red:1.4) cat --n dog --d 5", "--W", "128")
    (plain,) = generate(*line, outdir=tmp_path / "a", script="gen_img")
    (other,) = generate(*line, *options, outdir=tmp_path / "b", script="gen_img")
    assert (difference(plain, other) > 1) is changes


# --- pictures and masks ---------------------------------------------------------------------------------------
def test_image_to_image_takes_the_size_of_the_picture(
    tmp_path: Path, picture: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.generation import SMALL

    common = ("--prompt", "a cat --d 1", "--image_path", picture, "--steps", "4", "--use_original_file_name")
    sized = generate(*common, "--strength", "0.5", outdir=tmp_path / "a")
    assert texts_of(sized[0])["size"] == "64x64" and texts_of(sized[0])["strength"] == "0.5"
    saved = {name: SMALL.pop(name) for name in ("--W", "--H")}
    try:
        (own,) = generate(*common, "--strength", "0", outdir=tmp_path / "b")
    finally:
        SMALL.update(saved)
    assert texts_of(own)["size"] == "96x64" and own.name == "photo.png"
    assert "instead of 100x70" in caplog.text
    with Image.open(picture) as image:
        expected = np.asarray(image.resize((96, 64), Image.Resampling.LANCZOS)).astype("float32") / 255
    assert abs(pixels_of(own).mean() - expected.mean()) < 0.25  # through a tiny VAE


@pytest.mark.slow
def test_a_batch_from_pictures_equals_single_images(tmp_path: Path, picture: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, angle in (("one.png", 0), ("two.png", 180)):
        Image.open(picture).rotate(angle).save(folder / name)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --d 1\na dog --d 2\n", encoding="utf-8")
    common = ("--from_file", prompts, "--image_path", folder, "--sampler", "dpm_2_a", "--steps", "3")
    batch = generate(*common, "--batch_size", "2", "--use_original_file_name", outdir=tmp_path / "a")
    single = generate(*common, "--use_original_file_name", outdir=tmp_path / "b")
    assert [path.name for path in batch] == ["one.png", "two.png"]
    assert all(difference(*pair) <= 1 for pair in zip(batch, single, strict=True))


@pytest.mark.slow
def test_masks_choose_what_is_repainted(tmp_path: Path, picture: Path) -> None:
    half = np.zeros((64, 64), dtype=np.uint8)
    half[:, 32:] = 255
    common = ("--prompt", "a cat --d 1", "--image_path", picture, "--steps", "4")
    drawn = {}
    for name, mask in {"nothing": half * 0, "half": half, "all": half * 0 + 255}.items():
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
        options = ("--mask_path", tmp_path / f"{name}.png", "--strength", "0.9")
        (drawn[name],) = generate(*common, *options, outdir=tmp_path / name)
    (whole,) = generate(*common, "--strength", "0.9", outdir=tmp_path / "b")
    (encoded,) = generate(*common, "--strength", "0", outdir=tmp_path / "c")
    assert difference(drawn["nothing"], encoded) <= 1
    assert difference(drawn["all"], whole) <= 1
    changes = (pixels_of(drawn["half"]) - pixels_of(encoded)).abs()
    assert changes[:, :24].mean() < 0.7 * changes[:, 40:].mean()  # the VAE's norms mix all pixels a little


def test_masks_of_another_size_are_refused(
    tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests import generation

    monkeypatch.setattr(generation, "SMALL", {k: v for k, v in generation.SMALL.items() if k not in ("--W", "--H")})
    Image.new("L", (64, 64)).save(tmp_path / "mask.png")
    text = refused(
        capsys, "--prompt", "a cat", "--image_path", picture, "--mask_path", tmp_path / "mask.png", outdir=tmp_path
    )
    assert "64x64" in text and "96x64" in text


# --- networks -------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_hooked_merged_and_folded_networks_draw_the_same(tmp_path: Path, lora_file: Path) -> None:
    other = write_lora(tmp_path / "other.safetensors", seed=1)
    networks = ("--network_module", "networks.lora", "networks.lora", "--network_weights", lora_file, other,
                "--network_mul", "0.7", "0.4")  # fmt: skip
    line = ("--prompt", "a cat --d 1")
    (plain,) = generate(*line, outdir=tmp_path / "plain")
    drawn = {
        way: generate(*line, *networks, *options, outdir=tmp_path / way)[0]
        for way, options in {
            "hooked": (), "merged": ("--network_merge",), "folded": ("--network_pre_calc",),
            "both": ("--network_merge_n_models", "1", "--network_pre_calc"),
        }.items()
    }  # fmt: skip
    assert difference(plain, drawn["hooked"]) > 5
    for way in ("merged", "folded", "both"):
        assert difference(drawn["hooked"], drawn[way]) <= 1, way
        assert texts_of(drawn[way])["networks"] == "style.safetensors:0.7, other.safetensors:0.4"


@pytest.mark.slow
@pytest.mark.parametrize("folded", [False, True])
def test_strengths_of_a_line_hold_for_that_line(tmp_path: Path, lora_file: Path, folded: bool) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --d 1 --am 0\na cat --d 1 --am 0.5\na cat --d 1\n", encoding="utf-8")
    network = ("--network_module", "networks.lora", "--network_weights", lora_file)
    off, half, full = generate(
        "--from_file", prompts, *network, *["--network_pre_calc"] * folded, "--batch_size", "3", outdir=tmp_path / "a"
    )
    (plain,) = generate("--prompt", "a cat --d 1", outdir=tmp_path / "b")
    (expected,) = generate("--prompt", "a cat --d 1", *network, "--network_mul", "0.5", outdir=tmp_path / "c")
    assert difference(off, plain) <= 1 and difference(half, expected) <= 1
    assert difference(full, half) > 2 and difference(half, off) > 2
    assert [texts_of(path)["networks"] for path in (off, half, full)] == [
        f"style.safetensors:{strength}" for strength in ("0", "0.5", "1")
    ]


def test_metadata_of_networks_is_shown(
    tmp_path: Path, lora_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate("--prompt", "a cat", "--network_module", "networks.lora", "--network_weights", lora_file,
             "--network_show_meta", outdir=tmp_path)  # fmt: skip
    assert '"ss_network_module": "networks.lora"' in capsys.readouterr().out


def test_a_file_of_another_family_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    save_file({"lora_unet_nothing.lora_down.weight": torch.zeros(2, 4),
               "lora_unet_nothing.lora_up.weight": torch.zeros(4, 2)}, tmp_path / "bad.safetensors")  # fmt: skip
    text = refused(capsys, "--prompt", "a cat", "--network_module", "networks.lora", "--network_weights",
                   tmp_path / "bad.safetensors", outdir=tmp_path)  # fmt: skip
    assert "bad.safetensors" in text


@pytest.mark.slow
def test_networks_of_lycoris_draw(tmp_path: Path, lycoris_presets: None, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    from lycoris import kohya

    from library.model_util import load_checkpoint

    host = load_checkpoint(MODEL, v2=False, dtype=torch.float32)
    network = kohya.create_network(1.0, 4, 2, host.vae, host.text_encoder, host.unet, algo="lokr", factor=4)
    network.apply_to(host.text_encoder, host.unet, True, True)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    network.save_weights(str(tmp_path / "lokr.safetensors"), torch.float32, {})
    options = ("--network_module", "lycoris.kohya", "--network_weights", tmp_path / "lokr.safetensors")
    (plain,) = generate("--prompt", "a cat --d 1", outdir=tmp_path / "a")
    (hooked,) = generate("--prompt", "a cat --d 1", *options, outdir=tmp_path / "b")
    (merged,) = generate("--prompt", "a cat --d 1", *options, "--network_merge", outdir=tmp_path / "c")
    (weak,) = generate("--prompt", "a cat --d 1", *options, "--network_mul", "0.5", outdir=tmp_path / "d")
    (off,) = generate("--prompt", "a cat --d 1 --am 0", *options, "--network_pre_calc", outdir=tmp_path / "e")
    assert difference(hooked, plain) > 5 and difference(hooked, merged) == 0
    assert difference(off, plain) <= 1 and difference(weak, hooked) > 2 and difference(weak, plain) > 2
    assert "cannot be merged exactly" in caplog.text and "--network_pre_calc has no effect" in caplog.text


def test_preview_without_a_screen_warns_once(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    import cv2

    from library.generation.interactive import Preview

    def no_screen(*arguments: object) -> None:
        raise cv2.error("The function is not implemented. Rebuild the library with GTK+ support")

    monkeypatch.setattr(cv2, "imshow", no_screen)
    preview = Preview()
    for _ in range(2):
        preview.show(Image.new("RGB", (8, 8)), "a cat")
    assert caplog.text.count("cannot open windows") == 1


# --- files ----------------------------------------------------------------------------------------------------
def test_names_of_lines_are_below_the_folder_and_unique(tmp_path: Path) -> None:
    outdir = tmp_path / "o"
    files = generate("--prompt", "a cat --f sub/cat.webp", "--images_per_prompt", "2", "--steps", "1", outdir=outdir)
    assert [path.relative_to(outdir).as_posix() for path in files] == ["sub/cat.webp", "sub/cat_001.webp"]
    assert read_texts(files[1])["prompt"] == "a cat"


def test_a_file_never_takes_the_place_of_another(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    writer = Writer(tmp_path)
    same = [writer.write(image, ImageRequest("a", seed=1), {}, index=0) for _ in range(3)]
    assert len(set(same)) == 3
    original = Writer(tmp_path, keeps_original_names=True)
    (tmp_path / "x.png").write_bytes(b"the picture itself")
    request = ImageRequest("a", init_image=tmp_path / "x.png")
    assert [original.write(image, request, {}, index=0).name for _ in range(2)] == ["x_001.png", "x_002.png"]
    assert (tmp_path / "x.png").read_bytes() == b"the picture itself"
    named = ImageRequest("a", output_name="y.png")
    for one in (Writer(tmp_path), Writer(tmp_path)):
        assert one.write(image, named, {}, index=0).name == "y.png"  # a new run draws it again


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
def test_texts_survive_in_every_format(tmp_path: Path, ending: str) -> None:
    texts = {"prompt": "a cät 猫 \U0001f63a", "seed": "1"}
    save_image(Image.new("RGB", (8, 8), "red"), tmp_path / f"a.{ending}", texts)
    assert read_texts(tmp_path / f"a.{ending}") == texts


def test_pictures_of_other_programs_hold_no_prompt(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    assert read_texts(tmp_path / "a.jpg") == {} and recorded_prompt(tmp_path / "a.jpg") is None
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + zlib.compress(b"x"))
    with pytest.raises(ValueError, match="b.png"):
        read_texts(tmp_path / "b.png")


# --- mistakes -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is nothing to draw"),
        (("--prompt", "a", "--ckpt", "nothing.safetensors"), "--ckpt: there is no file or folder nothing.safetensors"),
        (("--prompt", "a", "--ckpt", str(MODEL.parent / "*.none")), "fits no file"),
        (("--prompt", "a", "--ckpt", str(MODEL.parent / "*")), "files:"),
        (("--prompt", "a", "--W", "100"), "--W 100 is not allowed: it must be a multiple of 8"),
        (("--prompt", "a", "--strength", "1.5"), "--strength 1.5"),
        (("--prompt", "a", "--sampler", "eular"), "'eular' is not one of"),
        (("--prompt", "a", "--mask_path", str(MODEL)), "--mask_path needs --image_path"),
        (("--prompt", "a", "--image_path", __file__), "test_gen_img.py"),
        (("--from_file", "nothing.txt"), "--from_file: there is no file nothing.txt"),
        (("--prompt", "a", "--network_module", "networks.lora"), "1 and --network_weights 0 entries"),
        (("--prompt", "a", "--network_mul", "1"), "--network_mul has more entries"),
        (("--prompt", "a", "--network_args", "x"), "not of the form key=value"),
        (("--prompt", "a", "--highres_fix_scale", "0.5"), "--highres_fix_scale: drawing in two passes is not"),
        (("--prompt", "a --dsd1 3"), "Deep Shrink is not supported yet"),
        (("--prompt", "a AND b"), "AND needs a region mask"),
        (("--prompt", "a", "--zero_terminal_snr", "--sampler", "heun"), "'heun' cannot start from zero terminal SNR"),
        (("--prompt", "a", "--v2"), "looks like a Stable Diffusion 1.x checkpoint"),
        (("--prompt", "a", "--vae_batch_size", "0"), "above 0"),
        (("--prompt", "a", "--outdir_", "x"), "unknown option --outdir_; did you mean --outdir?"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    text = refused(capsys, *arguments, outdir=tmp_path / "o")
    assert message in text
    assert len(text.strip().splitlines()) <= 2
    assert "--pretrained_model_name_or_path" not in text
    assert not (tmp_path / "o").exists()


def test_models_of_other_families_are_told_by_their_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    keys = {
        "model.diffusion_model.input_blocks.0.0.weight": (32, 4, 3, 3),
        "model.diffusion_model.label_emb.0.0.weight": (32, 2816),
    }
    save_file({key: torch.zeros(shape) for key, shape in keys.items()}, tmp_path / "xl.safetensors")
    text = refused(capsys, "--prompt", "a", "--ckpt", tmp_path / "xl.safetensors", outdir=tmp_path)
    assert "an SDXL checkpoint" in text and "gen_img.py draws with both" in text
    text = refused(capsys, "--prompt", "a", "--sdxl", outdir=tmp_path, script="gen_img")
    assert "looks like a Stable Diffusion 1.x checkpoint, but the command expects an SDXL checkpoint" in text
    assert "cannot be combined" in refused(capsys, "--prompt", "a", "--v1", "--v2", outdir=tmp_path, script="gen_img")


def test_stable_diffusion_2_is_told_by_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    from tests.sd2_tiny import sd2_tensors

    model = tmp_path / "two.safetensors"
    save_file({key: value.contiguous() for key, value in sd2_tensors(load_file(MODEL)).items()}, model)
    shutil.copytree(TOKENIZERS / "openai_clip-vit-large-patch14", tmp_path / "tokenizer")
    line = ("--prompt", "a cat --d 1", "--ckpt", model)
    (guessed,) = generate(*line, outdir=tmp_path / "a", script="gen_img")
    (told,) = generate(*line, "--v2", outdir=tmp_path / "b")
    assert difference(guessed, told) == 0 and pixels_of(told).std() > 0.02
    assert "Add --v2" in refused(capsys, *line, outdir=tmp_path)
    assert "Add --v2" in refused(capsys, *line, "--v1", outdir=tmp_path, script="gen_img")


def test_inpainting_models_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(MODEL)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[key] = torch.cat([tensors[key]] * 3, dim=1)[:, :9].contiguous()
    save_file(tensors, tmp_path / "inpainting.safetensors")
    text = refused(capsys, "--prompt", "a", "--ckpt", tmp_path / "inpainting.safetensors", outdir=tmp_path)
    assert "9 input channels" in text and "--ckpt" in text


def test_options_are_read_into_their_groups() -> None:
    import gen_img

    argv = ["--ckpt", str(MODEL.parent / "sd1_tiny.s*"), "--prompt", "x", "--diffusers_xformers", "--clip_skip", "2"]
    argv += ["--interactive", "--n_iter", "4", "--noise_offset_range", "0", "1"]
    command_line = launch.read_command_line(gen_img.SCRIPT, argv)
    assert command_line.options.image.noise_offset_range == (0.0, 1.0)
    checked = launch.resolve(gen_img.SCRIPT.options.check)(command_line.options, gen_img.SCRIPT.options)
    assert checked.problems == ()
    assert checked.options.model.ckpt == str(MODEL) and checked.options.prompts.n_iter == 1
    family = checked.options.for_family()
    assert family.model.pretrained_model_name_or_path == str(MODEL)
    assert family.device.xformers and family.model.clip_skip == 2
    assert json.dumps(family.flat()["clip_skip"]) == "2"
