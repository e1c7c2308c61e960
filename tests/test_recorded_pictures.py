"""Prompts that pictures hold: of these scripts, of A1111 and its relatives, of ComfyUI; pictures that hold none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from library.generation.recorded import RecordedPrompt, recorded_prompt
from tests.generation import SMALL, difference, generate, texts_of

PARAMETERS = (
    "a (red:1.2) cat {on} a mat, <lora:style:0.8>\nsecond line\nNegative prompt: blurry, {dark}\nugly\n"
    "Steps: 3, Sampler: DPM++ 2M Karras, CFG scale: 4.5, Seed: 77, Size: 64x72, Model hash: 1a2b, Clip skip: 2, "
    'Lora hashes: "style: 1a, Seed: 5", Version: v1.9'
)


def write_png(path: Path, texts: Mapping[str, str], size: tuple[int, int] = (64, 72)) -> Path:
    chunks = PngInfo()
    for key, text in texts.items():
        chunks.add_itxt(key, text) if not text.isascii() else chunks.add_text(key, text)
    Image.new("RGB", size, "grey").save(path, pnginfo=chunks)
    return path


def graph(**changes: Any) -> dict[str, Any]:
    """A plain graph; `changes` replace nodes."""
    nodes: dict[str, Any] = {
        "3": node(
            "KSampler", seed=8, steps=4, cfg=3.5, sampler_name="euler_ancestral", scheduler="normal", denoise=1,
            model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0],
        ),
        "4": node("CheckpointLoaderSimple", ckpt_name="x.safetensors"),
        "5": node("EmptyLatentImage", width=64, height=72, batch_size=1),
        "6": node("CLIPTextEncode", text="a {red} fox", clip=["4", 1]),
        "7": node("CLIPTextEncode", text=["12", 0], clip=["4", 1]),
        "12": node("PrimitiveString", value="bad"),
    }  # fmt: skip
    return {key: value for key, value in {**nodes, **changes}.items() if value is not None}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def of_graph(folder: Path, nodes: Mapping[str, Any]) -> RecordedPrompt | None:
    return recorded_prompt(write_png(folder / "comfy.png", {"prompt": json.dumps(nodes), "workflow": "{}"}))


# --- other programs -------------------------------------------------------------------------------------------
def test_parameters_of_a1111_are_read(tmp_path: Path) -> None:
    record = recorded_prompt(write_png(tmp_path / "a.png", {"parameters": PARAMETERS}))
    assert record is not None
    assert record.prompt == "a (red:1.2) cat {on} a mat, \nsecond line"
    assert record.negative_prompt == "blurry, {dark}\nugly"
    assert record.seed == 77
    assert record.values == {"steps": 3, "scale": 4.5, "sampler": "dpmsolver++", "clip_skip": 2}
    (remark,) = record.remarks
    assert "<lora:style:0.8>" in remark


@pytest.mark.parametrize("encoded", [
    b"UNICODE\0" + PARAMETERS.encode("utf-16-be"), b"UNICODE\0" + PARAMETERS.encode("utf-16-le"),
    b"ASCII\0\0\0" + PARAMETERS.encode(),
])  # fmt: skip
@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_parameters_in_exif_are_read(tmp_path: Path, encoded: bytes, ending: str) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = encoded
    Image.new("RGB", (64, 64)).save(tmp_path / f"a.{ending}", exif=exif)
    record = recorded_prompt(tmp_path / f"a.{ending}")
    assert record is not None and record.seed == 77 and record.negative_prompt.startswith("blurry")


def test_a_plain_graph_of_comfyui_is_read(tmp_path: Path) -> None:
    wanted = RecordedPrompt("a {red} fox", "bad", 8, {"steps": 4, "scale": 3.5, "sampler": "euler_a"})
    assert of_graph(tmp_path, graph()) == wanted
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + json.dumps(graph())
    Image.new("RGB", (64, 64)).save(tmp_path / "a.webp", exif=exif)
    assert recorded_prompt(tmp_path / "a.webp") == wanted


def test_a_graph_with_a_second_pass_gives_the_settings_of_the_first(tmp_path: Path) -> None:
    second = node("KSampler", **{**graph()["3"]["inputs"], "seed": 9, "steps": 2, "latent_image": ["3", 0]})
    record = of_graph(tmp_path, {"1": second, **graph()})
    assert record is not None and (record.seed, record.values["steps"]) == (8, 4)


def test_a_graph_of_flux_is_read(tmp_path: Path) -> None:
    nodes = {
        "1": node("SamplerCustomAdvanced", noise=["2", 0], guider=["3", 0], sampler=["4", 0], sigmas=["5", 0],
                  latent_image=["6", 0]),
        "2": node("RandomNoise", noise_seed=["10", 0]),
        "3": node("BasicGuider", model=["9", 0], conditioning=["7", 0]),
        "4": node("KSamplerSelect", sampler_name="euler"),
        "5": node("BasicScheduler", steps=20, scheduler="simple", denoise=1, model=["9", 0]),
        "6": node("EmptySD3LatentImage", width=64, height=64),
        "7": node("FluxGuidance", guidance=3.5, conditioning=["8", 0]),
        "8": node("CLIPTextEncode", text="a hare", clip=["9", 0]),
        "10": node("PrimitiveInt", value=12),
    }  # fmt: skip
    assert of_graph(tmp_path, nodes) == RecordedPrompt(
        "a hare", "", 12, {"steps": 20, "scale": 1.0, "sampler": "euler"}
    )


@pytest.mark.parametrize("texts", [
    {}, {"parameters": "{\"prompt\": \"of another program\"}"}, {"Description": "a cat"}, {"prompt": ""},
    {"prompt": json.dumps(graph(**{"3": None}))},
    {"prompt": json.dumps(graph(**{"6": node("Combine", conditioning_1=["7", 0], conditioning_2=["7", 0])}))},
    {"prompt": json.dumps(graph(**{"6": node("CLIPTextEncode", text=["6", 0])}))},
    {"prompt": json.dumps(graph(**{"9": node("KSampler", positive=["7", 0], negative=["7", 0])}))},
    {"prompt": json.dumps(graph(**{"3": {"class_type": "KSampler", "inputs": None}}))},
])  # fmt: skip
def test_pictures_without_a_clear_prompt_hold_none(tmp_path: Path, texts: dict[str, str]) -> None:
    assert recorded_prompt(write_png(tmp_path / "a.png", texts)) is None


def test_what_cannot_be_used_is_told_and_left_out(tmp_path: Path) -> None:
    texts = {"prompt": "a cat", "seed": "1e9", "steps": "0", "scale": "nan", "sampler": "unipc", "negative-scale": "x"}
    record = recorded_prompt(write_png(tmp_path / "a.png", texts))
    assert record is not None and record.seed is None and record.values == {}
    assert [remark.split()[1] for remark in record.remarks] == ["seed", "steps", "scale", "sampler", "negative_scale"]


# --- drawing again --------------------------------------------------------------------------------------------
@pytest.fixture
def only_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("--W", "--H", "--steps"):
        monkeypatch.delitem(SMALL, name)


@pytest.mark.usefixtures("only_the_model")
def test_our_own_pictures_come_back_as_they_were_drawn(tmp_path: Path) -> None:
    line = r"a \{red|blue\} cat --n \{dim\} --d 5 --s 3 --l 4 --w 72 --h 64 --nl 0.5"
    (drawn,) = generate("--prompt", line, "--sampler", "euler_a", "--clip_skip", "2", outdir=tmp_path / "a")
    (again,) = generate("--image_path", drawn, "--strength", "1", outdir=tmp_path / "b")
    texts, others = texts_of(drawn), texts_of(again)
    assert texts["prompt"] == "a {red|blue} cat"
    for key in (
        "prompt", "negative-prompt", "seed", "sampler", "steps", "scale", "size", "negative-scale", "clip-skip"
    ):
        assert others[key] == texts[key], key


@pytest.mark.usefixtures("only_the_model")
def test_the_command_line_wins_over_a_picture(tmp_path: Path) -> None:
    picture = write_png(tmp_path / "a.png", {"parameters": PARAMETERS})
    options = ("--steps", "2", "--seed", "4", "--sampler", "euler", "--scale", "2")
    (drawn,) = generate("--image_path", picture, *options, outdir=tmp_path / "b")
    texts = texts_of(drawn)
    assert [texts[key] for key in ("steps", "seed", "sampler", "scale")] == ["2", "4", "euler", "2.0"]
    assert texts["size"] == "64x72" and texts["prompt"].startswith("a (red:1.2) cat {on}")


@pytest.mark.usefixtures("only_the_model")
def test_further_images_of_a_picture_have_seeds_of_their_own(tmp_path: Path) -> None:
    picture = write_png(tmp_path / "a.png", {"prompt": json.dumps(graph())})
    first, second = generate("--image_path", picture, "--images_per_prompt", "2", outdir=tmp_path / "b")
    assert texts_of(first)["seed"] == "8" != texts_of(second)["seed"] and difference(first, second) > 1


@pytest.mark.usefixtures("only_the_model")
def test_a_sampler_that_the_model_cannot_have_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = write_png(tmp_path / "a.png", {"prompt": "a cat", "sampler": "lms", "steps": "2"})
    options = ("--v_parameterization", "--zero_terminal_snr")
    (drawn,) = generate("--image_path", picture, *options, outdir=tmp_path / "b")
    assert texts_of(drawn)["sampler"] == "ddim" and "sampler 'lms' cannot start from" in caplog.text


def test_pictures_without_a_prompt_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    silent = write_png(tmp_path / "in" / "silent.png", {"prompt": json.dumps(graph(**{"3": None}))})
    with pytest.raises(SystemExit) as stop:
        generate("--image_path", silent, outdir=tmp_path / "o")
    assert stop.value.code == 2 and "no prompt in this picture" in capsys.readouterr().err
    write_png(tmp_path / "in" / "b.png", {"parameters": PARAMETERS})
    (drawn,) = generate("--image_path", tmp_path / "in", "--steps", "1", outdir=tmp_path / "o")
    assert texts_of(drawn)["init-image"] == "b.png"
    assert "silent.png: no prompt in this picture; it is skipped" in caplog.text
