"""Mistakes are told before anything slow: together, with names, in seconds, with no model and no picture read."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from library import launch, preflight
from library.checkpoints import tensors
from library.options.optimizer import OptimizerOptions
from library.preflight.optimizer import trial_optimizer
from tests.golden import FOLDER
from tests.training import TOKENIZERS, clean_process

ROOT = Path(__file__).resolve().parent.parent
MODELS = FOLDER / "models"
SECONDS = 3.0

opened: list[str] = []
is_watching = False


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if is_watching and event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        opened.append(os.fspath(arguments[0]))


sys.addaudithook(_watch)  # stays for the life of the process


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures that are none, files of every kind of model and network, and places that take nothing."""
    folder = tmp_path_factory.mktemp("preflight")
    (folder / "pictures" / "1_cat").mkdir(parents=True)
    (folder / "pictures" / "1_cat" / "a.png").write_bytes(b"no picture")
    weights = load_file(MODELS / "sd1_lora_start.safetensors")
    save_file(weights, folder / "sd_lora.safetensors")
    key = "lora_unet_{}_blocks_0_img_attn_proj.lora_down.weight"
    down = next(value for name, value in weights.items() if "lora_down" in name)
    flux = {key.format(side): down.clone() for side in ("double", "single")}
    save_file(flux, folder / "flux_lora.safetensors")
    (folder / "cut.safetensors").write_bytes((MODELS / "sd1_tiny.safetensors").read_bytes()[:500_000])
    (folder / "file").write_text("not a folder")
    (folder / "taken" / "run.safetensors").mkdir(parents=True)
    (folder / "prompts.txt").write_text("a --ss eular\n# nothing\nb --d 99999999999999999999\n")
    return folder


@pytest.fixture
def _nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reading a tensor fails; files that are opened are in `opened`."""
    global is_watching

    def refuse(self: tensors.SafetensorsFile, key: str) -> None:
        raise AssertionError(f"{self.source}: {key} was read")

    monkeypatch.setattr(tensors.SafetensorsFile, "__getitem__", refuse)
    opened.clear()
    is_watching = True
    yield
    is_watching = False


SD, SDXL, SD3, FLUX = (f"{MODELS}/{name}_tiny.safetensors" for name in ("sd1", "sdxl", "sd3", "flux"))
PARTS = [f"--{name}={MODELS}/{file}_tiny.safetensors" for name, file in
         (("clip_l", "clip_l"), ("t5xxl", "t5xxl"), ("ae", "flux_ae"))]  # fmt: skip
#: the words of a complete command of each script, without model, pictures and output
COMPLETE: dict[str, tuple[str, list[str]]] = {
    "train_network": (SD, ["--network_module=networks.lora"]),
    "sdxl_train_network": (SDXL, ["--network_module=networks.lora"]),
    "sd3_train_network": (SD3, ["--network_module=networks.lora_sd3", *PARTS[:2],
                                f"--clip_g={MODELS}/clip_g_tiny.safetensors"]),
    "flux_train_network": (FLUX, ["--network_module=networks.lora_flux", *PARTS]),
    "train_db": (SD, []),
    "sdxl_train": (SDXL, []),
    "flux_train": (FLUX, PARTS),
    "train_textual_inversion": (SD, ["--token_string=mycat"]),
}  # fmt: skip

#: (script, words with the mistake, words of the report)
MISTAKES: list[tuple[str, str, tuple[str, ...]]] = [
    # optimizer
    ("train_network", "--optimizer_type AdamW8", ("--optimizer_type AdamW8", "AdamW8bit?")),
    ("sdxl_train", "--optimizer_type adafactr", ("adafactr", "Adafactor?")),
    ("flux_train_network", "--optimizer_args foo=1", ("--optimizer_args", "foo", "betas")),
    ("train_db", "--optimizer_args weight_decy=0.1", ("weight_decy", "did you mean weight_decay?")),
    ("train_network", "--optimizer_args weight_decay=abc", ("--optimizer_args", "weight_decay=abc")),
    ("train_network", "--optimizer_args betas=0.9", ("--optimizer_args", "betas=0.9")),
    ("train_network", "--optimizer_args weight_decay=-1", ("weight_decay=-1", "--optimizer_args")),
    ("sdxl_train", "--optimizer_type LBFGS", ("LBFGS", "closure")),
    ("train_network", "--optimizer_type SparseAdam", ("SparseAdam", "sparse")),
    ("train_network", "--optimizer_type no_such_package.Lion", ("no_such_package", "install")),
    # schedule
    ("train_network", "--lr_scheduler cosin", ("--lr_scheduler cosin", "cosine?")),
    ("flux_train", "--lr_scheduler piecewise_constant", ("piecewise_constant", "step_rules")),
    ("train_network", "--lr_scheduler cosine_with_min_lr", ("--lr_scheduler_min_lr_ratio",)),
    ("train_db", "--lr_scheduler_args num_cycle=2 --lr_scheduler cosine", ("num_cycle", "num_cycles")),
    ("train_network", "--lr_scheduler polynomial --lr_scheduler_args power='x'", ("polynomial", "--lr_scheduler_args")),
    ("train_network", "--lr_scheduler_type StepLR", ("StepLR", "step_size")),
    # networks
    ("train_network", "--network_args conv_dimm=4", ("conv_dimm", "did you mean conv_dim?")),
    ("sdxl_train_network", "--network_args conv_dim=undefined", ("conv_dim=undefined", "whole number")),
    ("train_network", "--network_args rank_dropout=abc", ("rank_dropout=abc", "a number")),
    ("sdxl_train_network", "--network_args block_dims=1,2", ("block_dims", "23")),
    ("train_network", "--network_args module_dropout=1", ("module_dropout=1", "nothing would be trained")),
    ("train_network", "--network_args train_t5xxl=True", ("train_t5xxl", "networks.lora_flux and networks.lora_sd3")),
    ("flux_train_network", "--network_args split_qkv=True", ("split_qkv=True", "does not support it yet")),
    ("sd3_train_network", "--network_args img_attn_dim=4", ("img_attn_dim", "networks.lora_flux")),
    ("train_network", "--network_dropout 1", ("--network_dropout 1", "below 1")),
    ("flux_train_network", "--network_module networks.lora", ("networks.lora", "FLUX.1", "networks.lora_flux")),
    ("train_network", "--network_weights {place}/flux_lora.safetensors", ("flux_lora", "flux_train_network.py")),
    ("flux_train_network", "--base_weights {place}/sd_lora.safetensors", ("--base_weights", "train_network.py")),
    ("sdxl_train_network", f"--network_weights {SDXL}", ("--network_weights", "an SDXL checkpoint")),
    # model files
    ("train_network", f"--pretrained_model_name_or_path {SDXL}", ("SDXL", "sdxl_train_network.py")),
    ("sdxl_train", f"--pretrained_model_name_or_path {SD}", ("Stable Diffusion 1.x", "fine_tune.py")),
    ("flux_train_network", f"--pretrained_model_name_or_path {SD3}", ("Stable Diffusion 3", "sd3_train_network.py")),
    ("train_textual_inversion", "--pretrained_model_name_or_path {place}/sd_lora.safetensors", ("LoRA",)),
    ("train_network", "--v2", ("Stable Diffusion 1.x", "remove --v2")),
    ("train_network", "--pretrained_model_name_or_path {place}/cut.safetensors", ("cut.safetensors", "incomplete")),
    ("train_network", "--clip_skip 5", ("--clip_skip 5", "2 layers")),
    # numbers
    ("train_network", "--loss_type huber --huber_c 0", ("--huber_c 0", "above 0")),
    # places
    ("train_network", "--output_dir {place}/file/out", ("--output_dir", "is a file")),
    ("train_network", "--output_name " + "n" * 240, ("--output_name", "too many")),
    ("train_network", "--output_dir {place}/taken --output_name run", ("run.safetensors", "is a folder")),
    ("sdxl_train", "--logging_dir {place}/file", ("--logging_dir", "is a file")),
    # prompts
    ("train_network", "--sample_at_first --sample_prompts {place}/prompts.txt", ("line 1", "eular", "line 3")),
    # rooms
    ("flux_train", "--mixed_precision fp16", ("--mixed_precision fp16", "--full_fp16")),
]  # fmt: skip


def command(script: str, place: Path, words: str) -> list[str]:
    """A complete command line of a script, and `words` after it (the last of an option counts)."""
    model, needed = COMPLETE[script]
    usual = [
        f"--pretrained_model_name_or_path={model}", f"--train_data_dir={place}/pictures", "--resolution=64",
        f"--output_dir={place}/out", f"--tokenizer_cache_dir={TOKENIZERS}", *needed,
    ]  # fmt: skip
    return [*usual, *(word.replace("{place}", str(place)) for word in words.split())]


def report(script: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The mistakes that the script names."""
    with clean_process(), pytest.raises(SystemExit) as stop:
        launch.main(importlib.import_module(script).SCRIPT, words)
    assert stop.value.code == 2
    prefix = f"{script}.py: error: "
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(prefix) for line in lines), lines
    return [line.removeprefix(prefix) for line in lines]


def test_there_are_enough_mistakes() -> None:
    assert len(MISTAKES) >= 30 and len({script for script, _, _ in MISTAKES}) >= 5


@pytest.fixture(scope="module")
def _packages() -> None:
    """What every run imports: seconds that a process spends once."""
    for check in preflight.PROBLEMS:
        preflight.resolve(check.function)
    for script in (importlib.import_module(name).SCRIPT for name in COMPLETE):
        launch.resolve(script.family), launch.resolve(script.method)
    trial_optimizer(OptimizerOptions())


@pytest.mark.usefixtures("_packages", "_nothing_is_read")
@pytest.mark.parametrize(("script", "words", "told"), MISTAKES, ids=[f"{s} {w[:60]}" for s, w, _ in MISTAKES])
def test_a_mistake_is_told_at_once_and_nothing_is_read(
    script: str, words: str, told: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = time.monotonic()
    lines = report(script, command(script, place, words), capsys)
    assert time.monotonic() - begin < SECONDS
    text = "\n".join(lines)
    assert all(word in text for word in told), text
    assert len(lines) == 1 + text.count("--sample_prompts: ") - ("--sample_prompts: " in text), lines
    assert [name for name in opened if name.endswith((".png", ".npz"))] == []
    assert not (place / "out").exists()


@pytest.mark.usefixtures("_packages", "_nothing_is_read")
def test_all_mistakes_are_told_together(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--seeed 1 --optimizer_type AdamW8 --lr_scheduler cosin --network_args conv_dimm=4 rank_dropout=x "
        f"--network_dropout 1 --pretrained_model_name_or_path {SDXL} --network_weights {{place}}/flux_lora.safetensors "
        "--logging_dir {place}/file --output_dir {place}/taken --output_name run --save_precision fp17 "
        "--loss_type huber --huber_c 0 --train_data_dir {place}/nowhere --sample_at_first "
        "--sample_prompts {place}/no.txt"
    )
    text = "\n".join(report("train_network", command("train_network", place, words), capsys))
    for told in (
        "--seeed", "AdamW8bit?", "cosine?", "conv_dimm", "rank_dropout=x", "--network_dropout", "sdxl_train_network.py",
        "flux_lora", "--logging_dir", "run.safetensors", "--save_precision", "--huber_c", "nowhere", "no.txt",
    ):  # fmt: skip
        assert told in text, told


def test_one_complaint_per_option() -> None:
    known = ["--clip_skip 0 is not allowed."]
    assert preflight._new(["--clip_skip 0: another view", "--v2 is wrong", "nothing to train"], known) == [
        "--v2 is wrong", "nothing to train",
    ]  # fmt: skip


def test_a_typing_error_is_told_without_torch(place: Path) -> None:
    words = command("train_network", place, "--seeed 1")
    code = (
        "import sys, train_network\nfrom library import launch\n"
        f"try:\n    launch.main(train_network.SCRIPT, {words!r})\n"
        "except SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["2", "False"]


# --- places ----------------------------------------------------------------------------------------------------
def test_a_probe_leaves_no_trace_and_spares_what_is_there(tmp_path: Path) -> None:
    from library.preflight.outputs import problem_with

    (tmp_path / "kept").write_text("mine")
    assert problem_with(tmp_path / "new" / "deep", "x") is None
    assert problem_with(tmp_path, "kept") is None
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept").read_text() == "mine"


@pytest.mark.parametrize("number", ["ENOSPC", "EROFS", "EACCES"])
def test_a_full_or_closed_disk_is_named(number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from library.preflight import outputs

    def full(descriptor: int) -> None:
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(outputs.os, "fsync", full)
    assert os.strerror(getattr(errno, number)) in str(outputs.problem_with(tmp_path, "x"))
    assert list(tmp_path.iterdir()) == []


# --- models ----------------------------------------------------------------------------------------------------
def test_markers_of_a_v_prediction_model_ask_for_their_options(tmp_path: Path) -> None:
    import torch

    import sdxl_train_network

    path = tmp_path / "v.safetensors"
    save_file({**load_file(SDXL), "v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, path)
    words = [f"--pretrained_model_name_or_path={path}", "--network_module=networks.lora", f"--output_dir={tmp_path}"]
    for given, missing in (
        ([], "--v_parameterization --zero_terminal_snr"), (["--v_parameterization"], "add --zero_terminal_snr"),
        (["--v_parameterization", "--zero_terminal_snr"], None),
    ):  # fmt: skip
        options = launch.read_command_line(sdxl_train_network.SCRIPT, [*words, *given]).options
        told = preflight.warnings(options, sdxl_train_network.SCRIPT)
        assert [missing in text for text in told] == ([True] if missing else [])


def test_a_folder_says_what_it_is_and_how_many_layers_it_has(tmp_path: Path) -> None:
    from library.checkpoints.lineages import kind_of_model, text_layers
    from library.checkpoints.recognition import ModelKind

    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps({"hidden_act": "gelu", "num_hidden_layers": 23}))
    assert (kind_of_model(tmp_path), text_layers(tmp_path)) == (ModelKind.SD2, 23)
    shutil.rmtree(tmp_path / "text_encoder")
    assert (kind_of_model(tmp_path), text_layers(tmp_path)) == (None, None)
