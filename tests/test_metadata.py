"""`ss_*` and `modelspec.*` metadata, against the recorded dictionary and the list of keys."""

from __future__ import annotations

import base64
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from library.config_schema import SupportedKinds
from library.config_util import load_data_config
from library.data.dataset import DatasetGroup, build_group
from library.data.discovery import discover
from library.hashes import file_sha256
from library.metadata import MINIMUM_KEYS, RunFacts, TrainingMetadata, step_metadata, training_metadata
from library.methods.network import NetworkTraining
from library.model_spec import CHECKPOINT, ModelSpec, implementation, model_spec, thumbnail_data_url
from library.options import Options, make_options
from tests.gaussian import GaussianFamily
from tests.golden import FOLDER

KEYS = json.loads((Path(__file__).parent / "data" / "metadata_keys.json").read_text(encoding="utf-8"))
ALWAYS = {entry["key"] for entry in KEYS["ss_keys"] if entry["when"] == "always (network scripts)"}
FOLDER_KEYS = {entry["key"] for entry in KEYS["ss_keys"] if entry["when"] == "without --dataset_config"}

FACTS = RunFacts(
    started_at=1700000000.123, seed=42, batches_per_epoch=4, epochs=2, max_steps=8,
    optimizer="torch.optim.adamw.AdamW", optimizer_args="", learning_rate=0.001, lr_scheduler="constant",
)  # fmt: skip
SD1 = {
    "ss_v2": False, "ss_base_model_version": "sd_v1", "architecture": "stable-diffusion-v1",
    "default_resolution": 512, "prediction_type": "epsilon",
}  # fmt: skip


def group_of(options: Options, *, in_fine_tuning: bool = True) -> DatasetGroup:
    config = load_data_config(options.dataset, SupportedKinds(fine_tuning=in_fine_tuning), bucket_step=64)
    records = [discover(dataset, index) for index, dataset in enumerate(config.datasets)]
    return build_group(config, records, spec=GaussianFamily.latent, tokenize=None, seed=0)


def options_of(record: dict[str, Any]) -> Options:
    """The recorded command line as options."""
    values: dict[str, Any] = {"output_name": record["name"]}
    name = ""
    for word in record["options"]:
        if word.startswith("--"):
            name = word.removeprefix("--")
            values[name] = True
        elif name == "network_args":
            values[name] = [*([] if values[name] is True else values[name]), word]
        else:
            values[name] = word
    return make_options(**values)


@pytest.fixture
def in_golden_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)


def saved(options: Options, group: DatasetGroup, facts: RunFacts = FACTS, **method: Any) -> dict[str, str]:
    """What is written with the final file of network training, or of another method with these attributes."""
    family: Any = SimpleNamespace(model_metadata=lambda: dict(SD1))
    trained: Any = SimpleNamespace(family=family, **method) if method else NetworkTraining(options, family)
    return TrainingMetadata(options, group, trained, facts).at(epoch=2, steps=8)


# --- against the recording ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd1_lora", "sd1_lora_conv_minsnr", "sd1_lora_continue", "sd1_lora_multires"])
def test_the_recorded_runs_metadata_is_reproduced(name: str, in_golden_folder: None) -> None:
    record = json.loads((FOLDER / "runs" / f"{name}.json").read_text(encoding="utf-8"))
    options = options_of(record)
    facts = replace(FACTS, lr_scheduler=options.optimizer.lr_scheduler)
    ours = saved(options, group_of(options), facts)
    expected = {key: value for key, value in record["saved_metadata"].items() if not key.startswith("sshs_")}
    assert set(expected) <= set(ours) <= set(expected) | FOLDER_KEYS
    expected["modelspec.resolution"] = "128x128"  # the recorded program did not look at the dataset file
    for key, value in expected.items():
        if key == "modelspec.implementation_version":
            assert ours[key].startswith("sd-scripts/")
        elif key in ("ss_datasets", "ss_tag_frequency", "ss_dataset_dirs", "ss_network_args"):
            assert json.loads(ours[key]) == json.loads(value), key
        elif value != "<varies>":
            assert ours[key] == value, key
    assert ours["ss_new_sd_model_hash"] == file_sha256("models/sd1_tiny.safetensors")
    assert ours["ss_training_started_at"] == "1700000000.123"
    assert float(ours["ss_training_finished_at"]) > 1.7e9


def test_every_listed_key_is_written_and_no_other(in_golden_folder: None) -> None:
    options = make_options(
        dataset_config="dataset.toml", pretrained_model_name_or_path="models/sd1_tiny.safetensors",
        vae="models/sd1_tiny.safetensors", network_args=["conv_dim=4"], output_name="x",
    )  # fmt: skip
    ours = {key for key in saved(options, group_of(options)) if key.startswith("ss_")}
    listed = {entry["key"] for entry in KEYS["ss_keys"]}
    assert ours >= ALWAYS
    assert ours <= listed
    others = {entry["key"] for entry in KEYS["ss_keys"] if "FLUX" in entry["when"] or "SD3" in entry["when"]}
    assert listed - ours - others == set()


# --- folders, several datasets, captions ----------------------------------------------------------------------


def make_images(folder: Path, captions: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, caption in captions.items():
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")


def test_folders_give_one_table_per_directory(tmp_path: Path) -> None:
    make_images(tmp_path / "train" / "10_sks", {"a": "SKS, Red hat,, red hat", "b": "sks"})
    make_images(tmp_path / "reg" / "1_person", {"c": "person"})
    options = make_options(
        train_data_dir=str(tmp_path / "train"), reg_data_dir=str(tmp_path / "reg"), resolution="64,64",
        caption_extension=".txt", train_batch_size=2, gradient_accumulation_steps=3, flip_aug=True, keep_tokens=1,
    )  # fmt: skip
    ours = saved(options, group_of(options), replace(FACTS, num_processes=2))
    assert ours.keys() >= FOLDER_KEYS | ALWAYS and "ss_datasets" not in ours
    assert ours["ss_resolution"] == "(64, 64)"
    assert (ours["ss_batch_size_per_device"], ours["ss_total_batch_size"]) == ("2", "12")
    assert json.loads(ours["ss_dataset_dirs"]) == {"10_sks": {"n_repeats": 10, "img_count": 2}}
    assert json.loads(ours["ss_reg_dataset_dirs"]) == {"1_person": {"n_repeats": 1, "img_count": 1}}
    assert json.loads(ours["ss_tag_frequency"])["10_sks"] == {"sks": 2, "red hat": 2}
    assert ours["ss_bucket_info"] == "null" and ours["ss_min_bucket_reso"] == "None"
    assert (ours["ss_flip_aug"], ours["ss_keep_tokens"], ours["ss_num_train_images"]) == ("True", "1", "20")


def test_equal_directory_names_are_numbered_and_tags_not_summed(tmp_path: Path) -> None:
    make_images(tmp_path / "one" / "cats", {"a": "cat, red"})
    make_images(tmp_path / "two" / "cats", {"b": "cat", "c": "cat"})
    config = tmp_path / "data.toml"
    tables = [f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{tmp_path}/{name}/cats"\n' for name in ("one", "two")]
    config.write_text('[general]\nresolution = 64\ncaption_extension = ".txt"\n' + "".join(tables), encoding="utf-8")
    options = make_options(dataset_config=str(config))
    ours = saved(options, group_of(options))
    assert json.loads(ours["ss_dataset_dirs"]) == {
        "cats": {"n_repeats": 1, "img_count": 1}, "cats (2)": {"n_repeats": 1, "img_count": 2},
    }  # fmt: skip
    assert json.loads(ours["ss_tag_frequency"]) == {"cats": {"cat": 1, "red": 1}}
    tables = json.loads(ours["ss_datasets"])
    assert [table["tag_frequency"]["cats"] for table in tables] == [{"cat": 1, "red": 1}, {"cat": 2}]
    assert FOLDER_KEYS - ours.keys() == {"ss_bucket_info"}


def test_what_all_datasets_of_a_file_share_stands_at_the_top_level(tmp_path: Path) -> None:
    make_images(tmp_path / "one", {"a": "cat"})
    make_images(tmp_path / "two", {"b": "cat", "c": "cat"})
    config = tmp_path / "data.toml"

    def entries(second: str, subset: str = "") -> dict[str, str]:
        """The last dataset has these settings."""
        config.write_text(
            f"""[general]
            caption_extension = ".txt"
            enable_bucket = true
            min_bucket_reso = 64
            caption_dropout_rate = 0.25
            [[datasets]]
            resolution = 128
            [[datasets.subsets]]
            image_dir = "{tmp_path / "one"}"
            {second}
            [[datasets.subsets]]
            image_dir = "{tmp_path / "two"}"
            {subset}""",
            encoding="utf-8",
        )
        options = make_options(dataset_config=str(config))
        return saved(options, group_of(options))

    one = entries("")
    assert (one["ss_resolution"], one["ss_enable_bucket"], one["ss_flip_aug"]) == ("(128, 128)", "True", "False")
    assert json.loads(one["ss_bucket_info"]) == json.loads(one["ss_datasets"])[0]["bucket_info"] is not None
    assert (one["ss_caption_dropout_rate"], one["modelspec.resolution"]) == ("0.25", "128x128")
    two = entries("[[datasets]]\nresolution = 192\nbatch_size = 1", "flip_aug = true\ncaption_dropout_rate = 0.5")
    assert not {"ss_resolution", "ss_bucket_info", "ss_flip_aug"} & two.keys()
    assert (two["ss_batch_size_per_device"], two["ss_caption_dropout_rate"]) == ("1", "None")
    assert two["modelspec.resolution"] == "192x192"


def test_metadata_files_count_tags_only(tmp_path: Path) -> None:
    make_images(tmp_path / "images", {"a": "", "b": ""})
    listing = tmp_path / "meta.json"
    entries = {"a.png": {"caption": "a cat", "tags": "cat, Red"}, "b.png": {"caption": "b"}}
    listing.write_text(json.dumps(entries), encoding="utf-8")
    config = tmp_path / "data.toml"
    config.write_text(
        f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{tmp_path / "images"}"\n'
        f'metadata_file = "{listing}"\nnum_repeats = 3\n',
        encoding="utf-8",
    )
    options = make_options(dataset_config=str(config))
    ours = saved(options, group_of(options))
    assert json.loads(ours["ss_tag_frequency"]) == {"meta.json": {"cat": 1, "red": 1}}
    assert json.loads(ours["ss_dataset_dirs"]) == {"meta.json": {"n_repeats": 3, "img_count": 2}}
    (table,) = json.loads(ours["ss_datasets"])
    (subset,) = table["subsets"]
    assert table["is_dreambooth"] is False
    assert (subset["metadata_file"], subset["image_dir"]) == ("meta.json", "images") and "is_reg" not in subset


# --- values ---------------------------------------------------------------------------------------------------


def test_text_encoder_rates_are_one_number_or_a_list(in_golden_folder: None) -> None:
    def rate(values: Any, **facts: Any) -> tuple[str, str]:
        options = make_options(dataset_config="dataset.toml", text_encoder_lr=values, unet_lr=1e-4)
        entries = training_metadata(options, group_of(options), replace(FACTS, **facts), {})
        return entries["ss_text_encoder_lr"], entries["ss_unet_lr"]

    assert rate([5e-5]) == ("5e-05", "0.0001")
    assert rate([5e-5, 1e-5]) == ("[5e-05, 1e-05]", "0.0001")
    assert rate([5e-5], group_learning_rates_removed=True) == ("None", "None")


def test_the_schedule_is_the_one_that_is_used(in_golden_folder: None) -> None:
    def schedule(optimizer: str = FACTS.optimizer, **values: Any) -> tuple[str, str]:
        options = make_options(dataset_config="dataset.toml", lr_warmup_steps="0.1", **values)
        facts = replace(FACTS, optimizer=optimizer, lr_scheduler=options.optimizer.lr_scheduler)
        entries = training_metadata(options, group_of(options), facts, {})
        return entries["ss_lr_scheduler"], entries["ss_lr_warmup_steps"]

    assert schedule(lr_scheduler="cosine") == ("cosine", "0.1")
    assert schedule(lr_scheduler_type="StepLR") == ("StepLR", "0.1")
    assert schedule("schedulefree.AdamWScheduleFree", lr_scheduler="cosine") == ("constant", "0")


def test_optimizer_arguments_follow_the_class(in_golden_folder: None) -> None:
    options = make_options(dataset_config="dataset.toml")
    facts = replace(FACTS, optimizer_args="weight_decay=0.1,eps=1e-06", learning_rate=None)
    entries = training_metadata(options, group_of(options), facts, {"ss_scale_weight_norms": False, "other": 1})
    assert entries["ss_optimizer"] == "torch.optim.adamw.AdamW(weight_decay=0.1,eps=1e-06)"
    assert (entries["ss_learning_rate"], entries["ss_scale_weight_norms"]) == ("None", "False")
    assert "other" not in entries and all(isinstance(value, str) for value in entries.values())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"network_args": ["a=b=c"]}, {"a": "b=c", "dropout": None}),
        ({"network_args": ["a=1"], "network_dropout": 0.1}, {"a": "1", "dropout": 0.1}),
        ({"network_args": ["dropout=0.3"], "network_dropout": 0.1}, {"dropout": "0.3"}),
        ({"network_args": ["a=1"], "dim_from_weights": True, "network_weights": "x"}, {"a": "1"}),
        ({"network_dropout": 0.1}, None),
    ],
)
def test_network_arguments_carry_the_dropout(values: dict, expected: dict | None, in_golden_folder: None) -> None:
    options = make_options(dataset_config="dataset.toml", **values)
    entries = saved(options, group_of(options))
    assert (json.loads(entries["ss_network_args"]) if expected else entries.get("ss_network_args")) == expected


def test_a_hub_name_is_kept_and_not_hashed(in_golden_folder: None) -> None:
    options = make_options(dataset_config="dataset.toml", pretrained_model_name_or_path="someone/some-model")
    entries = training_metadata(options, group_of(options), FACTS, {})
    assert entries["ss_sd_model_name"] == "someone/some-model"
    assert not {"ss_sd_model_hash", "ss_new_sd_model_hash", "ss_vae_name"} & entries.keys()


def test_a_model_folder_has_words_for_hashes(in_golden_folder: None) -> None:
    options = make_options(dataset_config="dataset.toml", pretrained_model_name_or_path="models/")
    entries = training_metadata(options, group_of(options), FACTS, {})
    assert entries["ss_sd_model_name"] == "models"
    assert entries["ss_sd_model_hash"] == entries["ss_new_sd_model_hash"] == "IsADirectory"


def test_step_metadata_changes_only_the_three() -> None:
    base = {"ss_seed": "1", "ss_steps": "x"}
    assert step_metadata(base, epoch=0, steps=50, finished_at=1.5) == {
        "ss_seed": "1", "ss_steps": "50", "ss_epoch": "0", "ss_training_finished_at": "1.5",
    }  # fmt: skip


def test_session_ids_differ_and_leave_the_generators_alone() -> None:
    random.seed(1)
    first, second = (RunFacts(1.0, 1, 1, 1, 1, "optimizer", "", 1.0, "constant").session_id for _ in range(2))
    after = random.random()
    random.seed(1)
    assert first != second and after == random.random()
    assert 0 <= first <= 2**32


def test_no_metadata_leaves_the_listed_minimum(in_golden_folder: None) -> None:
    options = make_options(dataset_config="dataset.toml", no_metadata=True, network_args=["a=1"])
    ours = saved(options, group_of(options))
    assert {key for key in ours if key.startswith("ss_")} == set(KEYS["ss_minimum_keys_with_no_metadata"])
    assert set(MINIMUM_KEYS) == set(KEYS["ss_minimum_keys_with_no_metadata"])
    assert ours["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_methods_without_training_metadata_write_the_model_spec_only(in_golden_folder: None) -> None:
    options = make_options(dataset_config="dataset.toml", output_name="full")
    ours = saved(options, group_of(options), writes_training_metadata=False, metadata=dict)
    assert {key.split(".")[0] for key in ours} == {"modelspec"}
    assert ours["modelspec.architecture"] == "stable-diffusion-v1"
    assert ours["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    nothing = saved(options, group_of(options), writes_training_metadata=False, metadata=lambda: {"model_type": None})
    assert nothing == {}


# --- model spec -----------------------------------------------------------------------------------------------


def test_model_spec_takes_the_metadata_options() -> None:
    listed = {entry["key"] for entry in KEYS["modelspec_keys"]}
    given = {name.split(".")[1] for name in listed} - {"merged_from"}
    names = {name for name in make_options().flat() if name.startswith("metadata_")}
    options = make_options(**{name: f"my {name}" for name in names - {"metadata_thumbnail"}}, resolution="640,768")
    entries = model_spec(options, SD1, "lora").entries(0.5)
    assert {f"metadata_{key.split('.')[1]}" for key in entries} & names == names - {"metadata_thumbnail"}
    assert {key.split(".")[1] for key in entries} <= given | {"merged_from"}
    assert entries["modelspec.title"] == "my metadata_title"
    assert entries["modelspec.license"] == "my metadata_license"
    assert entries["modelspec.resolution"] == "640x768"
    assert entries["modelspec.sai_model_spec"] == "1.0.1"


def test_titles_fall_back_to_name_then_time() -> None:
    def title(model_type: str, **values: Any) -> str:
        return model_spec(make_options(**values), SD1, model_type).entries(1700000000.25)["modelspec.title"]

    assert title("lora", output_name="mine") == "mine"
    assert title("lora") == "LoRA@1700000000.25"
    assert title("textual-inversion") == "TextualInversion@1700000000.25"
    assert title(CHECKPOINT) == "Checkpoint@1700000000.25"


def test_date_is_local_time_without_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    spec = ModelSpec("stable-diffusion-v1", "lora", (512, 512))
    assert spec.entries(1700000000.9)["modelspec.date"] == "2023-11-14T22:13:20"
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None), ({"min_timestep": 100}, "100,1000"), ({"max_timestep": 500}, "0,500"),
        ({"min_timestep": 0, "max_timestep": 0}, "0,0"),
    ],
)  # fmt: skip
def test_timestep_range_is_written_when_limited(values: dict[str, int], expected: str | None) -> None:
    entries = model_spec(make_options(**values), SD1, "lora").entries(0.0)
    assert entries.get("modelspec.timestep_range") == expected


@pytest.mark.parametrize("base", [entry["base"] for entry in KEYS["architectures"]])
@pytest.mark.parametrize("model_type", ["checkpoint", "lora", "textual-inversion", "controlnet", "control-net-lllite"])
def test_implementation_table(base: str, model_type: str) -> None:
    is_generative = model_type in ("checkpoint", "textual-inversion") or (
        base == "stable-diffusion-xl-v1-base" and model_type == "lora"
    )
    expected = KEYS["implementations"]["otherwise"]
    if base.startswith("flux-1"):
        expected = KEYS["implementations"]["flux"]
    elif is_generative:
        expected = KEYS["implementations"]["SDXL network, textual inversion, full checkpoints"]
    assert implementation(base, model_type) == expected


def test_unknown_prediction_types_and_pairs_of_resolutions() -> None:
    family = SD1 | {"prediction_type": None, "default_resolution": (1360, 768), "architecture": "flux-1-dev"}
    entries = model_spec(make_options(clip_skip=2), family, CHECKPOINT).entries(0.0)
    assert "modelspec.prediction_type" not in entries
    assert (entries["modelspec.resolution"], entries["modelspec.encoder_layer"]) == ("1360x768", "2")


def test_thumbnails_become_data_urls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = tmp_path / "thumb.png"
    Image.new("RGB", (2, 2), (255, 0, 0)).save(picture)
    url = thumbnail_data_url(str(picture))
    assert url is not None and url.startswith("data:image/png;base64,")
    assert base64.b64decode(url.split(",", 1)[1]) == picture.read_bytes()
    assert thumbnail_data_url("data:image/webp;base64,AA==") == "data:image/webp;base64,AA=="
    (tmp_path / "thumb.unknownkind").write_bytes(b"x")
    assert str(thumbnail_data_url(str(tmp_path / "thumb.unknownkind"))).startswith("data:application/octet-stream;")
    options = make_options(metadata_thumbnail=str(tmp_path / "none.png"))
    assert "modelspec.thumbnail" not in model_spec(options, SD1, "lora").entries(0.0)
    assert "none.png" in caplog.text
