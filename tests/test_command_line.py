"""The way from a command line to a running script: files of options, failures, exit statuses, messages."""

from __future__ import annotations

import importlib
import json
import logging
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train_network
from library import launch, logs, tool_launch
from library.config_util import SupportedKinds
from library.options import Options, non_default
from library.options.console import ConsoleOptions
from library.options.errors import UserError
from library.options.family_scripts import SCRIPTS
from networks import merge_lora
from tests.test_cli_parity import SCRIPTS as ENTRY_SCRIPTS
from tests.test_cli_parity import TRAINING

ROOT = Path(__file__).resolve().parent.parent
HERE = "tests.test_command_line"
SCRIPT = replace(train_network.SCRIPT, family="builtins:int", method="builtins:str", run=f"{HERE}:remember")
seen: list[tuple[Options, Any, Any, SupportedKinds]] = []


def remember(options: Options, family: Any, method: Any, kinds: SupportedKinds) -> None:
    """Stands where the training loop stands."""
    seen.append((options, family, method, kinds))


def refuse(options: Options, family: Any, method: Any, kinds: SupportedKinds) -> None:
    raise ValueError(f"--seed {options.training.seed} is not liked")


def refuse_twice(options: Options, family: Any, method: Any, kinds: SupportedKinds) -> None:
    raise ValueError("this is wrong\nthat is wrong")


def refuse_in_a_worker(options: Options, family: Any, method: Any, kinds: SupportedKinds) -> None:
    raise UserError(
        'Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File "x.py"\n'
        "library.options.errors.UserError: a.png is broken\nb.png is broken\n"
    )


def fail_elsewhere(options: Options, family: Any, method: Any, kinds: SupportedKinds) -> None:
    json.loads("{")


def need_package(options: Options, family: Any, method: Any, kinds: SupportedKinds) -> None:
    import package_that_nobody_has  # noqa: F401


def break_down(options: Options, family: Any, method: Any, kinds: SupportedKinds) -> None:
    raise RuntimeError("broken")


def interrupt(options: Options, family: Any, method: Any, kinds: SupportedKinds) -> None:
    raise KeyboardInterrupt


def terminate(options: Options, family: Any, method: Any, kinds: SupportedKinds) -> None:
    signal.raise_signal(signal.SIGTERM)
    time.sleep(5)


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    seen.clear()
    yield
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line with which nothing is wrong; the working directory is an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "model.ckpt").touch()
    (tmp_path / "data.toml").write_text(
        '[general]\nresolution = 64\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "images"\n', "utf-8"
    )
    return (
        "--pretrained_model_name_or_path model.ckpt --dataset_config data.toml --output_dir out "
        "--network_module networks.lora"
    ).split()


def failure(capsys: pytest.CaptureFixture[str], argv: list[str], script: launch.Script = SCRIPT) -> list[str]:
    """The lines on standard error of a script that ends with status 2; each is `<script>: error: <text>`."""
    with pytest.raises(SystemExit) as stop:
        launch.main(script, argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    prefix = "train_network.py: error: "
    assert lines and all(line.startswith(prefix) for line in lines), lines
    assert not seen
    return [line.removeprefix(prefix) for line in lines]


# --- what reaches the run ------------------------------------------------------------------------------------
def test_run_gets_options_family_and_method(arguments: list[str]) -> None:
    words = ["--seed", "3", "--network_args", "conv_dim=1", "conv_alpha=2", "--cache_latents_to_disk"]
    launch.main(SCRIPT, [*arguments, *words])
    [(options, family, method, kinds)] = seen
    assert (family, method) == (int, str)
    assert kinds.dreambooth and not kinds.controlnet
    assert options.training.seed == 3
    assert options.network.network_args == ("conv_dim=1", "conv_alpha=2")
    assert options.cache.cache_latents  # implied


def test_none_is_a_choice_where_the_default_can_be_chosen(arguments: list[str]) -> None:
    launch.main(SCRIPT, [*arguments, "--save_precision", "None", "--max_token_length", "none"])
    assert seen[0][0].saving.save_precision is None


# --- mistakes ------------------------------------------------------------------------------------------------
def test_unknown_option_suggests_the_nearest(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert failure(capsys, [*arguments, "--lerning_rate", "1e-4"]) == [
        "unknown option --lerning_rate; did you mean --learning_rate?"
    ]


def test_all_mistakes_are_reported_together(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    (Path.cwd() / "data.toml").write_text(
        '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "images"\nflip_ag = true\n', "utf-8"
    )
    lines = failure(capsys, [*arguments, "--seed", "x", "--loss_type", "l3", "--vae", "no.pt", "--fp8_base"])
    wanted = ("--seed: 'x'", "--loss_type: 'l3'", "--vae: there", "flip_ag", "--fp8_base needs", "not supported yet")
    assert [part for part in wanted if not any(part in line for line in lines)] == []


def test_option_without_its_value_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert failure(capsys, [*arguments, "--seed"]) == ["argument --seed: expected one argument."]


def test_not_yet_supported_option_exits_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    [line] = failure(capsys, [*arguments, "--deepspeed"])
    assert line.startswith("--deepspeed:") and "not supported yet" in line


def test_missing_data_is_reported_once(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    lines = failure(capsys, [word for word in arguments if word not in ("--dataset_config", "data.toml")])
    assert len(lines) == 1 and "--dataset_config" in lines[0]
    [line] = failure(capsys, [*arguments, "--dataset_config", "absent.toml"])
    assert "absent.toml" in line


def test_mistake_found_while_running_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    script = replace(SCRIPT, run=f"{HERE}:refuse")
    assert failure(capsys, [*arguments, "--seed", "4"], script) == ["--seed 4 is not liked"]


def test_several_mistakes_found_while_running_are_one_line_each(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    script = replace(SCRIPT, run=f"{HERE}:refuse_twice")
    assert failure(capsys, arguments, script) == ["this is wrong", "that is wrong"]
    script = replace(SCRIPT, run=f"{HERE}:refuse_in_a_worker")
    assert failure(capsys, arguments, script) == ["a.png is broken", "b.png is broken"]


def test_mistake_from_another_package_says_where(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    [line] = failure(capsys, arguments, replace(SCRIPT, run=f"{HERE}:fail_elsewhere"))
    assert re.search(r"JSONDecodeError in .*decoder.py:\d+; --console_log_level DEBUG", line)


def test_missing_package_says_how_to_install(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    [line] = failure(capsys, arguments, replace(SCRIPT, run=f"{HERE}:need_package"))
    assert "package_that_nobody_has" in line and "python quickstart.py" in line


def test_debug_level_shows_the_traceback(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        launch.main(replace(SCRIPT, run=f"{HERE}:refuse"), [*arguments, "--console_log_level", "DEBUG"])
    assert "Traceback" in capsys.readouterr().err


def test_failure_while_running_keeps_its_exception(arguments: list[str]) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        launch.main(replace(SCRIPT, run=f"{HERE}:break_down"), arguments)


@pytest.mark.parametrize(("run", "status"), [("interrupt", 130), ("terminate", 143)])
def test_signals_have_their_own_status(arguments: list[str], run: str, status: int) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        launch.main(replace(SCRIPT, run=f"{HERE}:{run}"), arguments)
    assert stop.value.code == status
    assert signal.getsignal(signal.SIGTERM) is handler


# --- --config_file -------------------------------------------------------------------------------------------
def test_command_line_wins_over_file_over_default(arguments: list[str]) -> None:
    Path("c.toml").write_text(
        '[any]\nseed = 5\nnetwork_dim = 8\nresolution = 640\n[other]\nnetwork_dim = 16\nlr_scheduler = "cosine"\n'
        'lr_warmup_steps = "10%"\nnetwork_args = ["conv_dim=1"]\ntext_encoder_lr = 1e-5\ncache_latents = true\n',
        "utf-8",
    )
    launch.main(SCRIPT, [*arguments, "--config_file", "c", "--seed", "6", "--network_args", "conv_alpha=2"])
    options = seen[0][0]
    assert options.training.seed == 6
    assert options.network.network_dim == 16  # the later table
    assert options.dataset.resolution == (640, 640)
    assert options.optimizer.lr_warmup_steps == 0.1
    assert options.network.network_args == ("conv_alpha=2",)
    assert options.network.text_encoder_lr == (1e-5,)
    assert options.cache.cache_latents
    assert options.config_file.config_file == "c"


def test_command_line_wins_even_with_the_default_value(arguments: list[str]) -> None:
    Path("c.toml").write_text("max_train_steps = 10\n", "utf-8")
    launch.main(SCRIPT, [*arguments, "--config_file", "c.toml", "--max_train_steps", "1600"])
    assert seen[0][0].training.max_train_steps == 1600


def test_unknown_keys_warn_once_together(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.toml").write_bytes('\ufeffsead = 1\nfancy_gui_key = "x"\n'.encode())
    launch.main(SCRIPT, [*arguments, "--config_file", "c.toml"])
    [line] = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert "sead (did you mean seed?)" in line and "fancy_gui_key" in line


def test_bad_values_of_a_file_name_file_and_key(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    Path("c.toml").write_text(
        'loss_type = "l3"\nseed = 1.5\ncache_latents = 2\nresolution = [1, 2, 3]\nnetwork_dim = [4]\n'
        "learning_rate = true\n",
        "utf-8",
    )
    lines = failure(capsys, [*arguments, "--config_file", "c.toml"])
    keys = ("loss_type", "seed", "cache_latents", "resolution", "network_dim", "learning_rate")
    assert [line.split(": ")[:2] for line in lines] == [["c.toml", key] for key in keys]


def test_missing_and_broken_files_are_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert failure(capsys, ["--config_file", "absent", "--sead", "1"]) == [
        "unknown option --sead; did you mean --seed?",
        "--config_file: there is no file absent.toml",
    ]
    Path("broken.toml").write_text("seed = \n", "utf-8")
    [line] = failure(capsys, ["--config_file", "broken.toml"])
    assert "broken.toml cannot be read as TOML" in line


def test_output_config_writes_what_differs_and_can_be_read_back(arguments: list[str]) -> None:
    extra = [
        *["--seed", "7", "--resolution", "512,768", "--learning_rate", "1e-4"],
        *["--network_args", "conv_dim=4", "conv_alpha=2", "--training_comment", 'a="ä"\\n'],
        *["--lr_warmup_steps", "10%", "--loss_type", "l2", "--flip_aug", "--lr_scheduler", "cosine"],
        *["--wandb_api_key", "secret", "--huggingface_token", "secret", "--text_encoder_lr", "1e-5", "0.5"],
    ]
    launch.main(SCRIPT, [*arguments, *extra, "--config_file", "c", "--output_config"])
    assert not seen
    content = tomllib.loads(Path("c.toml").read_text("utf-8"))
    assert content == {
        "pretrained_model_name_or_path": "model.ckpt", "dataset_config": "data.toml", "output_dir": "out",
        "network_module": "networks.lora", "seed": 7, "resolution": "512,768", "learning_rate": 1e-4,
        "network_args": ["conv_dim=4", "conv_alpha=2"], "training_comment": 'a="ä"\\n', "lr_warmup_steps": 0.1,
        "flip_aug": True, "lr_scheduler": "cosine",
        "text_encoder_lr": [1e-5, 0.5],
    }  # fmt: skip
    launch.main(SCRIPT, ["--config_file", "c"])
    assert seen[0][0].dataset.resolution == (512, 768) and seen[0][0].dataset.dataset_config == Path("data.toml")


def test_output_config_needs_a_name_and_never_overwrites(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert "needs --config_file" in failure(capsys, ["--output_config"])[0]
    Path("c.toml").write_text("seed = 1\n", "utf-8")
    assert "exists already" in failure(capsys, ["--config_file", "c", "--output_config"])[0]
    assert Path("c.toml").read_text("utf-8") == "seed = 1\n"


# --- messages ------------------------------------------------------------------------------------------------
def test_messages_go_where_the_options_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("test_messages")
    logs.set_up(ConsoleOptions())
    logger.info("to stderr")
    logger.debug("hidden")
    logs.set_up(ConsoleOptions(console_log_simple=True, console_log_level="WARNING"))
    logger.info("hidden")
    logger.warning("bare")
    file = tmp_path / "log.txt"
    file.write_text("old")
    logs.set_up(ConsoleOptions(console_log_file=str(file)))
    logger.info("to the file: ä")
    out, err = capsys.readouterr()
    assert err.rstrip().endswith("INFO     to stderr")
    assert out == "bare\n"
    assert file.read_text("utf-8").rstrip().endswith("to the file: ä")


def test_other_processes_show_only_errors(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    logs.set_up(ConsoleOptions())
    logging.getLogger("test_ranks").warning("hidden")
    logging.getLogger("test_ranks").error("shown")
    assert capsys.readouterr().err.rstrip().endswith("shown")


def test_warn_once_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("test_once")
    for text in ("first rain", "first rain", "second rain"):
        logs.warn_once(logger, text)
    assert [record.getMessage() for record in caplog.records] == ["first rain", "second rain"]


# --- real processes ------------------------------------------------------------------------------------------
def run_script(*argv: str) -> tuple[subprocess.CompletedProcess[str], float]:
    begin = time.monotonic()
    result = subprocess.run(
        [sys.executable, "train_network.py", *argv], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    return result, time.monotonic() - begin


def test_missing_file_ends_quickly_with_status_2_and_a_line_each() -> None:
    result, seconds = run_script(
        *"--pretrained_model_name_or_path absent.safetensors --train_data_dir tests --resolution 512".split(),
        *"--network_module networks.lora --output_dir out --dataset_config absent.toml".split(),
    )
    assert result.returncode == 2 and result.stdout == ""
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == ["error", "error", "warning"]
    assert "Traceback" not in result.stderr
    assert seconds < 2


def test_setup_parser_is_an_ordinary_parser() -> None:
    parser = train_network.setup_parser()
    namespace = parser.parse_args(["--seed", "3"])
    assert namespace.seed == 3 and namespace.max_train_steps == 1600
    with pytest.raises(UserError, match="invalid choice: 'l3'"):
        parser.parse_args(["--loss_type", "l3"])


# --- what unknown names may mean -----------------------------------------------------------------------------
def test_the_table_of_scripts_has_every_script_with_its_own_options() -> None:
    assert set(SCRIPTS) <= {f"{name}.py" for name in TRAINING} | set(ENTRY_SCRIPTS) | {"sd3_minimal_inference.py"}
    old_names = {"train_controlnet.py", "sdxl_train_control_net_lllite_old.py"}
    assert {f"{name}.py" for name in TRAINING} | set(ENTRY_SCRIPTS) <= set(SCRIPTS) | old_names
    for name, row in SCRIPTS.items():
        module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
        if hasattr(module, "SCRIPT"):
            assert module.SCRIPT.name == name
            assert module.SCRIPT.options is (launch.resolve(row) if isinstance(row, str) else row), name
        else:
            [tool] = [value for value in vars(module).values() if isinstance(value, tool_launch.Tool)]
            assert (tool.name, tool.options) == (name, launch.resolve(row) if isinstance(row, str) else row)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cache_text_encoder_outputs"], "an option of sdxl_, sd3_ and flux_train_network.py."),
        (["--clip_g", "x"], "an option of sd3_train_network.py."),
        (["--train_text_encoder"], "an option of fine_tune.py, sdxl_ and sd3_train.py."),
        (["--outdir", "x"], "an option of gen_img.py, sdxl_gen_img.py and gen_img_diffusers.py."),
        (["--save_to", "x"], "an option of networks/merge_lora.py."),
        (["--cache_text_encoder_output"], "did you mean --cache_text_encoder_outputs, an option of sdxl_, sd3_ and"),
        (["--nothing_like_it_anywhere"], "unknown option --nothing_like_it_anywhere."),
    ],
)
def test_an_option_of_other_scripts_is_answered_with_their_names(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str], message: str
) -> None:
    [line] = failure(capsys, [*arguments, *words])
    assert message in line and line.startswith(f"unknown option {words[0]}")


def test_a_key_of_other_scripts_is_answered_with_their_names(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("c.toml").write_text("cache_text_encoder_outputs = true\nblocks_to_swapp = 0\n", "utf-8")
    launch.main(SCRIPT, [*arguments, "--config_file", "c.toml"])
    [line] = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert "cache_text_encoder_outputs (an option of sdxl_, sd3_ and flux_train_network.py)" in line
    assert "blocks_to_swapp (did you mean blocks_to_swap, an option of sd3_ and flux_train_network.py?)" in line


def test_tools_know_the_options_of_other_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--network_dim; an option of train_network.py"):
        tool_launch.parse(merge_lora.TOOL, ["--network_dim", "4"])


# --- hints and errors together -------------------------------------------------------------------------------
def test_warnings_that_may_explain_an_error_are_shown_with_it(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    Path("c.toml").write_text('dataset_confg = "data.toml"\nseed = 1.5\n', "utf-8")
    (Path.cwd() / "folders" / "cats").mkdir(parents=True)
    argv = [*arguments[:2], *arguments[4:], "--train_data_dir", "folders", "--config_file", "c.toml"]
    with pytest.raises(SystemExit) as stop:
        launch.main(SCRIPT, argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    kinds = [line.split(": ")[1] for line in lines]
    assert kinds == ["error", "error", "warning", "warning"]
    assert "seed: 1.5" in lines[0].replace("'", "") and "No data found" in lines[1]
    assert "dataset_confg (did you mean dataset_config?)" in lines[2]
    assert "cats ignored: its name does not begin with a number" in lines[3]


# --- values that programs write ------------------------------------------------------------------------------
def test_a_file_of_options_is_read_as_programs_write_it(arguments: list[str]) -> None:
    Path("c.toml").write_text(
        'persistent_data_loader_workers = 0\ncache_latents = 1\ngradient_checkpointing = "true"\n'
        'no_half_vae = "False"\nvae = ""\nreg_data_dir = ""\nlr_scheduler_args = []\nnetwork_args = [""]\n'
        'clip_skip = "2"\nseed = "7.0"\n'
        'learning_rate = "1e-4"\ntext_encoder_lr = "1e-5 2e-5"\nunet_lr = "1e-4"\noutput_name = 2024\n'
        'max_token_length = 75\ndynamo_backend = "no"\nnoise_offset = false\nmultires_noise_discount = 0\n'
        'save_precision = "None"\nlog_with = "none"\nmin_snr_gamma = "None"\nsave_n_epoch_ratio = 0\n'
        "vae_batch_size = 0\nmax_train_epochs = 0\n[a.b.c]\nnetwork_dim = 8.0\nnetwork_alpha = 4\n",
        "utf-8",
    )
    launch.main(SCRIPT, [*arguments, "--config_file", "c.toml"])
    given = dict(non_default(seen[0][0]))
    for name in ("pretrained_model_name_or_path", "dataset_config", "output_dir", "network_module", "config_file"):
        del given[name]
    assert given == {
        "cache_latents": True, "gradient_checkpointing": True, "clip_skip": 2, "seed": 7, "learning_rate": 1e-4,
        "text_encoder_lr": [1e-5, 2e-5], "unet_lr": 1e-4, "output_name": "2024", "multires_noise_discount": 0,
        "network_dim": 8, "network_alpha": 4, "save_n_epoch_ratio": 0,
    }  # fmt: skip


def test_an_empty_word_on_the_command_line_takes_back_what_the_file_says(arguments: list[str]) -> None:
    Path("c.toml").write_text('vae = "absent.pt"\nseed = 3\nnetwork_args = ["a=1"]\nmax_token_length = 150\n', "utf-8")
    taken_back = ["--vae", "", "--seed=", "--network_args", "", "--max_token_length", "75", "--log_with", "None"]
    launch.main(SCRIPT, [*arguments, "--config_file", "c.toml", *taken_back])
    options = seen[0][0]
    assert (options.model.vae, options.training.seed, options.network.network_args) == (None, None, None)
    assert (options.model.max_token_length, options.logging.log_with) == (None, None)


# --- what does not work yet -------------------------------------------------------------------------------------
@pytest.mark.parametrize("level", ["general", "dataset", "subset"])
def test_a_validation_split_in_a_dataset_file_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], level: str
) -> None:
    line = {place: "validation_split = 0.5\n" if place == level else "" for place in ("general", "dataset", "subset")}
    text = (
        f"[general]\nresolution = 64\n{line['general']}[[datasets]]\n{line['dataset']}"
        f'[[datasets.subsets]]\nimage_dir = "images"\n{line["subset"]}'
    )
    Path("data.toml").write_text(text, "utf-8")
    [message] = failure(capsys, arguments)
    assert "data.toml, datasets[0].subsets[0]: validation_split = 0.5: validation is not supported yet" in message
    Path("data.toml").write_text(text.replace("0.5", "0"), "utf-8")
    launch.main(SCRIPT, arguments)
