"""Every option of every training script does something: a run with it differs from the same run without it.

`tests/option_cases.py` says for each option where. Everywhere an option may instead be refused, or a warning may name
it: what must not be is an option that is accepted in silence and ignored.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFilter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library import train_util
from library.options.not_yet import NOT_YET
from tests import option_cases as cases
from tests.golden import FOLDER
from tests.option_cases import CASES
from tests.test_cli_parity import CONDITIONED, METADATA, TRAINING
from tests.test_every_script_learns import CASES as SCRIPTS
from tests.test_every_script_learns import OLD_NAMES
from tests.training import TOKENIZERS, run_script

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

BASE = "train_network"
#: options that families and methods answer for each on its own, so that every script is asked
ASKED_EVERYWHERE = ("loss_type", "min_snr_gamma", "noise_offset", "max_timestep", "mixed_precision", "caption_prefix")
#: values with which a switch asks for what does not work yet, where its own case has others
SWITCHED_ON: dict[str, tuple[str, ...]] = {"log_with": ("wandb",), "resume": ("{data}",)}
#: metadata that differs between two equal runs
TIMES = ("ss_session_id", "ss_training_started_at", "ss_training_finished_at", "ss_output_name", "sshs_model_hash",
         "sshs_legacy_hash", "modelspec.date", "modelspec.hash_sha256")  # fmt: skip


@dataclass
class Outcome:
    """What a run of a script left and said."""

    status: int
    said: str
    losses: list[float] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)  # digests by name
    formats: set[str] = field(default_factory=set)
    files: dict[str, int] = field(default_factory=dict)  # number of files by name
    metadata: dict[str, str] = field(default_factory=dict)

    def shows(self, where: str) -> Any:
        """The part that an option with this case changes."""
        return {
            cases.NUMBERS: (self.losses, self.weights), cases.SAME: (self.losses, self.weights),
            cases.FILES: self.files, cases.METADATA: self.metadata, cases.FORMAT: self.formats,
            cases.MESSAGES: self.said,
        }[where]  # fmt: skip


def specs_of(script: str) -> dict[str, Any]:
    return importlib.import_module(script).SCRIPT.options.specs()


class Bench:
    """Small data and models in a folder, and the runs of scripts on them; a run is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: dict[tuple[str, ...], Outcome] = {}
        make_pictures(folder)
        make_models(folder)
        (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --d 7\n")
        (folder / "tracker.toml").write_text("[tensorboard]\nmax_queue = 3\n")
        (folder / "config.toml").write_text("loss_type = 'l1'\n")

    def words(self, script: str, left_out: str = "") -> list[str]:
        """The command line of the script's plain run."""
        given: dict[str, list[str]] = {}
        kinds = TRAINING[script]
        data: tuple[object, ...] = ("--train_data_dir", "{data}/train")
        if kinds in (METADATA, CONDITIONED):
            data = ("--train_data_dir", "{data}/plain")
            data += (
                ("--in_json", "{data}/metadata.json")
                if kinds is METADATA
                else ("--conditioning_data_dir", "{data}/hints")
            )
        own = [
            str(word) for word in SCRIPTS[OLD_NAMES.get(script, script)].words if word != "--cache_text_encoder_outputs"
        ]
        every = (
            "--tokenizer_cache_dir",
            TOKENIZERS,
            "--learning_rate",
            "1e-3",
            "--resolution",
            64,
            "--seed",
            42,
            "--train_batch_size",
            2,
            "--max_data_loader_n_workers",
            0,
            "--max_train_steps",
            2,
            "--save_model_as",
            "safetensors",
            "--output_name",
            "run",
            *data,
        )
        name = ""
        for word in [*map(str, every), *own]:
            if word.startswith("--"):
                name = word
                given[name] = []
            else:
                given[name].append(word)
        given.pop(f"--{left_out}", None)
        return [word for option, values in given.items() for word in (option, *values)]

    def run(self, script: str, *further: object, left_out: str = "") -> Outcome:
        """The script's plain run with further options; without `output_dir` when that is left out."""
        words = [*self.words(script, left_out), *map(str, further)]
        key = (script, left_out, *words)
        if key not in self.runs:
            self.runs[key] = self._run(script, words, left_out)
        return self.runs[key]

    def _run(self, script: str, words: list[str], left_out: str) -> Outcome:
        out = self.folder / "out"
        words = [
            word.format(data=self.folder, script=script, tokenizers=TOKENIZERS)
            if "{data}" in word or "{tokenizers}" in word
            else word
            for word in words
        ]
        before = set(self.folder.rglob("*"))
        words += [] if left_out == "output_dir" else ["--output_dir", str(out)]
        status, said, losses = start(script, words)
        outcome = Outcome(status, said.replace(str(self.folder), ""), losses)
        self._read(outcome, out)
        new = sorted(set(self.folder.rglob("*")) - before)
        outcome.files = {re.sub(r"\d{10,}", "", str(path.relative_to(self.folder))): _size(path) for path in new}
        for path in reversed(new):
            path.rmdir() if path.is_dir() else path.unlink()
        return outcome

    @staticmethod
    def _read(outcome: Outcome, out: Path) -> None:
        for path in sorted(out.glob("*.safetensors"))[-1:]:
            with safe_open(path, "pt") as file:
                entries = file.metadata() or {}
            outcome.metadata = {name: value for name, value in entries.items() if name not in TIMES}
            for name, tensor in load_file(path).items():
                outcome.weights[name] = hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()
                outcome.formats.add(str(tensor.dtype))

    def prepare(self, script: str) -> None:
        """What the plain run of a script saves, for options that go on from it."""
        target = self.folder / "state" / script
        if not target.exists():
            words = ["--output_dir", str(target), "--save_state", "--max_train_steps", "1"]
            plain = [word.replace("{data}", str(self.folder)) for word in self.words(script)]
            status, said, _ = start(script, [*plain, *words])
            assert status == 0, said


def _size(path: Path) -> int:
    """The size of pictures and logs; of other files only that they are there."""
    return path.stat().st_size if path.is_file() and (path.suffix == ".png" or "tfevents" in path.name) else 0


def start(script: str, words: list[str]) -> tuple[int, str, list[float]]:
    """(exit status, what was said, loss of every batch) of a run in this process."""
    losses: list[float] = []
    step = train_util.Run.step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        outcome = step(self, *args, **kwargs)
        losses.append(outcome.loss)
        return outcome

    said, status = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setattr(train_util.Run, "step", watched)
        try:
            run_script(script, *words)
        except SystemExit as stop:
            status = int(stop.code or 0)
    lines = [line for line in re.split(r"[\r\n]", said.getvalue()) if "it/s" not in line and "s/it" not in line]
    return status, re.sub(r"\d+[.:]\d+(\S*)", "", "\n".join(lines)), losses


CAPTIONS = {
    "a": "mychar, a (cat:1.4), {red|blue} house ||| tall, old; green ;;; sky",
    "b": "mychar, two dogs; small, grey ||| wide, (new:0.6) ;;; sea",
}


def make_pictures(folder: Path) -> None:
    """Two pictures of different shapes, one with alpha, as folder, with metadata, with hints, and with faces."""
    for name in ("train/1_mychar", "plain", "hints", "reg/1_thing", "faces/1_mychar"):
        (folder / name).mkdir(parents=True)
    metadata = {}
    for name, size in (("a", (160, 64)), ("b", (80, 130))):
        with Image.open(FOLDER / "dataset" / f"{name}1.png") as opened:
            picture = opened.convert("RGB").resize(size)
        picture.putalpha(picture.convert("L").point(lambda level: 255 if level > 100 else 60))
        plain = picture.convert("RGB")
        plain.filter(ImageFilter.FIND_EDGES).save(folder / "hints" / f"{name}.png")
        plain.save(folder / "plain" / f"{name}.png")
        plain.save(folder / "faces" / "1_mychar" / f"{name}_40_30_20_20.png")
        picture.save(folder / "train" / "1_mychar" / f"{name}.png")
        for place in ("train/1_mychar", "plain"):
            (folder / place / f"{name}.caption").write_text(CAPTIONS[name])
            (folder / place / f"{name}.txt").write_text("another text")
        metadata[str(folder / "plain" / f"{name}.png")] = {"caption": CAPTIONS[name]}
    shutil.copy(folder / "plain" / "a.png", folder / "reg" / "1_thing")
    (folder / "metadata.json").write_text(json.dumps(metadata))
    (folder / "other.toml").write_text(
        f"[[datasets]]\nresolution = 128\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = {str(folder / 'plain')!r}\n"
    )


def make_models(folder: Path) -> None:
    """A VAE and a T5 that are not those of the plain runs."""
    weights = load_file(FOLDER / "models" / "sd1_tiny.safetensors")
    prefix = "first_stage_model."
    vae = {name.removeprefix(prefix): tensor * 1.1 for name, tensor in weights.items() if name.startswith(prefix)}
    save_file({name: tensor.contiguous() for name, tensor in vae.items()}, folder / "vae.safetensors")
    t5 = load_file(FOLDER / "models" / "t5xxl_tiny.safetensors")
    save_file({name: tensor * 1.1 for name, tensor in t5.items()}, folder / "t5xxl.safetensors")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    gc.freeze()  # the run's own collections stay short
    yield Bench(tmp_path_factory.mktemp("options"))
    gc.unfreeze()


# --- the rule --------------------------------------------------------------------------------------------------
def names_option(outcome: Outcome, option: str) -> bool:
    """Whether the run's warnings or errors name the option."""
    return re.search(rf"--{option}\b", outcome.said) is not None


def is_refusal_of(outcome: Outcome, option: str) -> bool:
    """Whether the script refuses the option."""
    return outcome.status == 2 and re.search(rf"\b{option}\b", outcome.said) is not None


def check(bench: Bench, script: str, option: str) -> None:
    case = CASES[option]
    if case.shows == cases.NEEDED:
        outcome = bench.run(script, left_out=option)
        assert outcome.status == 2
        assert names_option(outcome, option) or "image" in outcome.said
        return
    if any("{script}" in str(word) for word in (*case.words, *case.also)):
        bench.prepare(script)
    also = () if option == "learning_rate_te" else case.also  # train_db always trains its text encoder
    switches = NOT_YET[option].part_of if option in NOT_YET else ()
    if switches:  # alone it switches nothing on; with its switch that is named
        switch = switches[0]
        on = SWITCHED_ON.get(switch, CASES[switch].words)
        changed = bench.run(script, f"--{option}", *case.words, f"--{switch}", *on)
        assert is_refusal_of(changed, switch if switch in NOT_YET else option), changed.said
        return
    changed = bench.run(script, *also, f"--{option}", *case.words)
    if changed.status == 2 or case.shows == cases.REFUSED or option in NOT_YET and option != "log_with":
        assert changed.status == 0 and names_option(changed, option) or is_refusal_of(changed, option), changed.said
        return
    assert changed.status == 0, changed.said[-500:]
    plain = bench.run(script, *also)
    if plain.status == 2:
        return  # what the option belongs to cannot be without it
    if names_option(changed, option) and not names_option(plain, option):
        return  # a warning says what becomes of it
    if case.shows == cases.SAME:
        assert changed.losses == pytest.approx(plain.losses, rel=1e-4)
        assert changed.weights.keys() == plain.weights.keys()
    else:
        assert changed.shows(case.shows) != plain.shows(case.shows), f"--{option} changes nothing"


def chosen() -> list[tuple[str, str]]:
    """Every option on one script that has it, and on every script what its family and method answer for."""
    pairs: list[tuple[str, str]] = []
    asked: set[str] = set()
    for script in TRAINING:
        if script not in OLD_NAMES:
            options = [option for option in specs_of(script) if option not in asked or option in ASKED_EVERYWHERE]
            pairs += [(script, option) for option in options]
            asked |= set(options)
    return pairs


def test_every_option_of_every_script_has_a_case() -> None:
    declared = {option for script in TRAINING for option in specs_of(script)}
    assert declared == set(CASES)
    assert {option for _, option in chosen()} == declared


@pytest.mark.slow
@pytest.mark.parametrize(("script", "option"), [pytest.param(*pair, id="-".join(pair)) for pair in chosen()])
def test_an_option_shows_where_it_should(script: str, option: str, bench: Bench) -> None:
    check(bench, script, option)


@pytest.mark.slow
def test_equal_runs_are_equal(bench: Bench) -> None:
    first = bench.run(BASE)
    bench.runs.clear()
    again = bench.run(BASE)
    assert len(first.losses) == 2 and all(torch.tensor(first.losses).isfinite())
    for where in (cases.NUMBERS, cases.FILES, cases.METADATA, cases.FORMAT, cases.MESSAGES):
        assert first.shows(where) == again.shows(where)
