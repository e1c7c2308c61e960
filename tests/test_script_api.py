"""Other programs import parsers, config reading and trainers from the scripts; what they call is the script."""

from __future__ import annotations

import argparse
import importlib
import logging
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from library import flux_train_utils, flux_utils, huggingface_util, sd3_train_utils, sdxl_train_util, train_util
from library.checkpoints.tensors import load_tensors
from library.options.errors import UserError
from tests.training import MODEL, PHOTOS, TOKENIZERS, clean_process, train, write_config

ROOT = Path(__file__).resolve().parent.parent
TRAINERS = {
    "train_network": "NetworkTrainer", "sdxl_train_network": "SdxlNetworkTrainer",
    "flux_train_network": "FluxNetworkTrainer", "sd3_train_network": "Sd3NetworkTrainer",
    "train_textual_inversion": "TextualInversionTrainer",
    "sdxl_train_textual_inversion": "SdxlTextualInversionTrainer",
}  # fmt: skip
FUNCTIONS = (
    "fine_tune", "flux_train", "flux_train_control_net", "sd3_train", "sdxl_train", "sdxl_train_control_net",
    "sdxl_train_control_net_lllite", "sdxl_train_control_net_lllite_old", "train_control_net", "train_controlnet",
    "train_db", "train_textual_inversion_XTI",
)  # fmt: skip


def config_file(folder: Path, dataset: Path, **further: object) -> Path:
    """What the notebook's wrapper is started with: tables, values that the command line may override."""
    values = {
        "pretrained_model_name_or_path": str(MODEL), "tokenizer_cache_dir": str(TOKENIZERS),
        "network_module": "networks.lora", "network_dim": 2, "learning_rate": 1e-3, "max_train_steps": 2, "seed": 42,
        "max_data_loader_n_workers": 0, "output_dir": str(folder), "dataset_config": str(dataset),
        "output_name": "from_file", **further,
    }  # fmt: skip
    lines = [f"{name} = {value!r}".replace("True", "true") for name, value in values.items()]
    path = folder / "training_config.toml"
    path.write_text("[additional_network_arguments]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_wrapper_trains_as_the_script_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_config(tmp_path, PHOTOS)
    (tmp_path / "script").mkdir()
    expected = train("--dataset_config", dataset, "--max_train_steps", "2", output_dir=tmp_path / "script")
    config = config_file(tmp_path, dataset)
    monkeypatch.setattr(sys, "argv", ["wrapper.py", f"--config_file={config}", "--output_name", "wrapped"])

    from library.train_util import read_config_from_file
    from train_network import NetworkTrainer, setup_parser

    parser = setup_parser()
    args = parser.parse_args()
    train_util.verify_command_line_training_args(args)
    args = read_config_from_file(args, parser)
    assert (args.network_dim, args.output_name) == (2, "wrapped")
    with clean_process():
        NetworkTrainer().train(args)
    written, straight = load_tensors(tmp_path / "wrapped.safetensors"), load_tensors(expected)
    assert written.keys() == straight.keys()
    assert all((written[key] == straight[key]).all() for key in written)


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    from train_network import setup_parser

    config = config_file(tmp_path, tmp_path / "d.toml", network_dimm=3)
    parser = setup_parser()
    args = parser.parse_args(["--config_file", str(config), "--network_dim", "9", "--network_args", "conv_dim=4"])
    args = train_util.read_config_from_file(args, parser)
    assert (args.network_dim, args.max_train_steps, args.network_args) == (9, 2, ["conv_dim=4"])
    assert args.config_file == str(config.with_suffix(""))


def test_unknown_keys_and_bad_values_of_the_file_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from train_network import setup_parser

    parser = setup_parser()
    config = config_file(tmp_path, tmp_path / "d.toml", network_dimm=3)
    with caplog.at_level(logging.WARNING):
        train_util.read_config_from_file(parser.parse_args(["--config_file", str(config)]), parser)
    assert "network_dimm" in caplog.text
    config = config_file(tmp_path, tmp_path / "d.toml", max_train_epochs="ten")
    with pytest.raises(UserError, match="max_train_epochs"):
        train_util.read_config_from_file(parser.parse_args(["--config_file", str(config)]), parser)


def test_output_config_writes_and_ends(tmp_path: Path) -> None:
    from train_network import setup_parser

    parser = setup_parser()
    words = ["--config_file", str(tmp_path / "c"), "--output_config", "--network_dim", "7", "--wandb_api_key", "secret"]
    with pytest.raises(SystemExit) as stop:
        train_util.read_config_from_file(parser.parse_args(words), parser)
    assert stop.value.code == 0
    assert tomllib.loads((tmp_path / "c.toml").read_text("utf-8")) == {"network_dim": 7}


@pytest.mark.parametrize("script", TRAINERS)
def test_a_trainer_checks_as_its_script_does(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(script)
    args = module.setup_parser().parse_args([])
    args.mixed_precision = "fp99"
    with pytest.raises(SystemExit) as stop:
        getattr(module, TRAINERS[script])().train(args)
    told = capsys.readouterr().err
    assert stop.value.code == 2
    assert f"{script}.py: error: --mixed_precision: 'fp99' is not one of" in told
    assert "--output_dir is missing" in told


@pytest.mark.parametrize("script", FUNCTIONS)
def test_a_train_function_checks_as_its_script_does(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop:
        module.train(module.setup_parser().parse_args(["--seed", "1"]))
    assert stop.value.code == 2
    assert f"{script}.py: error: --output_dir is missing" in capsys.readouterr().err


def test_every_training_script_can_be_called() -> None:
    scripts = {path.stem for path in ROOT.glob("*.py") if "method=" in path.read_text("utf-8")}
    old_names = {"train_controlnet", "sdxl_train_control_net_lllite_old"}
    assert scripts | old_names == {*TRAINERS, *FUNCTIONS}


def test_overriding_an_inner_step_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from train_network import NetworkTrainer, setup_parser

    class Mine(NetworkTrainer):
        def load_target_model(self) -> None:
            """Would never be called."""

        def _helper(self) -> None:
            """Its own."""

    with pytest.raises(SystemExit) as stop:
        Mine().train(setup_parser().parse_args([]))
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "Mine.load_target_model" in told and "_helper" not in told


def test_arguments_are_added_to_the_parser_of_another_program() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    flux_train_utils.add_flux_train_arguments(parser)
    args = parser.parse_args(["--ae", "ae.sft", "--timestep_sampling", "shift"])
    assert (args.ae, args.timestep_sampling, args.guidance_scale, args.t5xxl) == ("ae.sft", "shift", 1.0, None)
    assert not hasattr(args, "training_shift") and not hasattr(args, "blocks_to_swap")

    parser = argparse.ArgumentParser()
    sdxl_train_util.add_sdxl_training_arguments(parser)
    assert parser.parse_args(["--cache_text_encoder_outputs"]).cache_text_encoder_outputs
    parser = argparse.ArgumentParser()
    sdxl_train_util.add_sdxl_training_arguments(parser, support_text_encoder_caching=False)
    assert not hasattr(parser.parse_args([]), "cache_text_encoder_outputs")
    parser = argparse.ArgumentParser()
    sd3_train_utils.add_sd3_training_arguments(parser)
    assert parser.parse_args(["--clip_g", "g.safetensors"]).clip_g == "g.safetensors"


def test_parts_of_flux_are_loaded_by_their_old_names() -> None:
    folder = MODEL.parent
    is_schnell, transformer = flux_utils.load_flow_model(folder / "flux_tiny.safetensors", None, "cpu")
    assert not is_schnell and type(transformer).__name__ == "Flux"
    assert flux_utils.load_ae(folder / "flux_ae_tiny.safetensors", None, "cpu").config.latent_channels == 16
    assert flux_utils.load_clip_l(folder / "clip_l_tiny.safetensors", None, "cpu").text_model is not None
    assert next(flux_utils.load_t5xxl(folder / "t5xxl_tiny.safetensors", None, "cpu").parameters()) is not None


def test_names_of_the_hub_say_that_they_do_not_work_yet() -> None:
    with pytest.raises(UserError, match="not supported yet"):
        huggingface_util.exists_repo("owner/name", "model")
    with pytest.raises(UserError, match="not supported yet"):
        huggingface_util.upload(argparse.Namespace(), "folder")


@pytest.mark.slow
def test_the_project_installs_as_an_editable_package(tmp_path: Path) -> None:
    modules = set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["py-modules"])
    assert modules == {path.stem for path in ROOT.glob("*.py")} - {"quickstart", "run_tests"}
    copy = tmp_path / "copy"
    copy.mkdir()
    for folder in ("library", "networks", "tools", "finetune"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), *(ROOT / name for name in ("pyproject.toml", "requirements.txt", "LICENSE"))):
        shutil.copy(path, copy)
    place = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-t", place]
    result = subprocess.run([*command, "-e", copy], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    code = f"import site; site.addsitedir({str(place)!r}); import train_network; print(train_network.__file__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert Path(found.stdout.strip()) == copy / "train_network.py"
