"""Dataset configuration: fallback order, kinds, and reports that name file and key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from library.config_schema import DATASET_KEYS, SUBSET_KEYS
from library.config_util import ConfigError, DataConfig, SupportedKinds, describe, load_data_config
from library.data.records import ImageRecord
from library.options import make_options
from library.options.dataset import DatasetOptions

ALL = SupportedKinds(controlnet=True)
BUCKETS = json.loads((Path(__file__).parent / "data" / "buckets.json").read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with empty directories `a`, `b`, `masks` and a metadata file."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "meta.json").write_text("{}", encoding="utf-8")
    return tmp_path


def load(content: dict[str, Any] | None, supported: SupportedKinds = ALL, **values: Any) -> DataConfig:
    """The configuration of a JSON file with this content (none: from folders) under these options."""
    split = {name: values.pop(name, None) for name in ("validation_split", "validation_seed")}
    step = values.pop("bucket_step", 64)
    if content is not None:
        Path("data.json").write_text(json.dumps(content), encoding="utf-8")
        values["dataset_config"] = "data.json"
    return load_data_config(make_options(**values).dataset, supported, bucket_step=step, **split)


def problems(content: dict[str, Any] | None, supported: SupportedKinds = ALL, **values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(content, supported, **values)
    return list(caught.value.problems)


def with_subset(general: dict[str, Any] | None = None, dataset: dict[str, Any] | None = None, **subset: Any) -> Any:
    """One dataset with one subset on directory `a`."""
    entry = {"resolution": 512} | (dataset or {}) | {"subsets": [{"image_dir": "a"} | subset]}
    return {"general": general or {}, "datasets": [entry]}


# value at one level, the effective value, and an option that says otherwise
VALUES: dict[str, tuple[Any, Any, Any]] = {
    "resolution": ([640, 512], (640, 512), "256"),
    "batch_size": (3, 3, 7),
    "enable_bucket": (False, False, True),
    "min_bucket_reso": (128, 128, 192),
    "max_bucket_reso": (2048, 2048, 1536),
    "bucket_reso_steps": (128, 128, 64),
    "bucket_no_upscale": (False, False, True),
    "network_multiplier": (2, 2.0, None),
    "validation_split": (1, 1.0, 0.5),
    "validation_seed": (0, 0, 5),
    "resize_interpolation": ("box", "box", "area"),
    "num_repeats": (0, 0, 4),
    "class_tokens": ("", "", None),
    "caption_extension": ("txt", ".txt", ".cap"),
    "cache_info": (False, False, True),
    "alpha_mask": (False, False, True),
    "is_reg": (True, True, None),
    "shuffle_caption": (False, False, True),
    "caption_separator": (";", ";", "|"),
    "keep_tokens": (0, 0, 2),
    "keep_tokens_separator": ("", "", "|||"),
    "secondary_separator": ("", "", ";;;"),
    "enable_wildcard": (False, False, True),
    "caption_prefix": ("", "", "prefix"),
    "caption_suffix": ("", "", "suffix"),
    "color_aug": (False, False, True),
    "flip_aug": (False, False, True),
    "random_crop": (False, False, True),
    "face_crop_aug_range": ([2, 4], (2.0, 4.0), "1.0,3.0"),
    "token_warmup_min": (0, 0, 3),
    "token_warmup_step": (0, 0, 0.5),
    "caption_dropout_rate": (0, 0.0, 0.5),
    "caption_dropout_every_n_epochs": (0, 0, 2),
    "caption_tag_dropout_rate": (0, 0.0, 0.5),
    "custom_attributes": ({}, {}, None),
}
PLACES = ("image_dir", "metadata_file", "conditioning_data_dir")


def at_level(level: str, key: str, value: Any) -> dict[str, Any]:
    content = with_subset()
    if key == "resolution":
        del content["datasets"][0]["resolution"]
    {"general": content["general"], "dataset": content["datasets"][0], "subset": content["datasets"][0]["subsets"][0]}[
        level
    ][key] = value
    return content


def test_the_table_covers_every_key() -> None:
    assert set(VALUES) | set(PLACES) == set(DATASET_KEYS) | set(SUBSET_KEYS)


@pytest.mark.parametrize("level", ["general", "dataset", "subset"])
@pytest.mark.parametrize("key", VALUES)
def test_a_key_beats_the_command_line_at_its_levels_and_is_refused_elsewhere(
    folder: Path, level: str, key: str
) -> None:
    value, effective, option = VALUES[key]
    spec = (DATASET_KEYS | SUBSET_KEYS)[key]
    options = {} if option is None else {spec.option: option}
    content = at_level(level, key, value)
    if level not in spec.levels:
        path = {"general": "general", "dataset": "datasets[0]", "subset": "datasets[0].subsets[0]"}[level]
        assert any(line.startswith(f"data.json: {path}.{key}: extra keys not allowed") for line in problems(content))
        return
    dataset = load(content, **options).datasets[0]
    if key in SUBSET_KEYS:
        assert getattr(dataset.subsets[0], key) == effective
    if key in DATASET_KEYS and level != "subset":
        assert getattr(dataset, key) == effective


@pytest.mark.parametrize("key", [key for key, (_, _, option) in VALUES.items() if option is not None])
def test_the_command_line_is_used_when_the_file_is_silent(folder: Path, key: str) -> None:
    spec = (DATASET_KEYS | SUBSET_KEYS)[key]
    option = VALUES[key][2]
    content = with_subset()
    if key == "resolution":
        del content["datasets"][0]["resolution"]
    dataset = load(content, **{spec.option: option}).datasets[0]
    wanted = {"resolution": (256, 256), "face_crop_aug_range": (1.0, 3.0)}.get(key, option)
    assert getattr(dataset.subsets[0] if key in SUBSET_KEYS else dataset, key) == wanted


def test_the_nearest_level_wins(folder: Path) -> None:
    content = with_subset({"keep_tokens": 1, "flip_aug": True}, {"keep_tokens": 2}, keep_tokens=3)
    content["datasets"][0]["subsets"].append({"image_dir": "b", "keep_tokens": None})
    content["datasets"].append({"resolution": 512, "subsets": [{"image_dir": "a"}]})
    first, second = load(content, keep_tokens=4).datasets
    assert [subset.keep_tokens for subset in (*first.subsets, *second.subsets)] == [3, 2, 1]
    assert all(subset.flip_aug for subset in first.subsets)


def test_custom_attributes_are_not_merged_across_levels(folder: Path) -> None:
    content = with_subset({"custom_attributes": {"x": 1}}, None, custom_attributes={"y": 2})
    assert load(content).datasets[0].subsets[0].custom_attributes == {"y": 2}


def test_defaults(folder: Path) -> None:
    dataset = load(with_subset()).datasets[0]
    subset = dataset.subsets[0]
    assert (dataset.batch_size, dataset.enable_bucket, dataset.min_bucket_reso, dataset.max_bucket_reso) == (
        1, False, 256, 1024,
    )
    assert (subset.caption_extension, subset.caption_separator, subset.num_repeats) == (".caption", ",", 1)
    assert not subset.keep_tokens_separator
    assert subset.class_tokens is None


def test_misspelt_caption_extention_wins(folder: Path) -> None:
    subset = load(with_subset(), caption_extension=".a", caption_extention="b").datasets[0].subsets[0]
    assert subset.caption_extension == ".b"


# --- kinds ----------------------------------------------------------------------------------------------------


def test_kinds_are_recognised_per_dataset(folder: Path) -> None:
    content = {
        "general": {"resolution": 512, "caption_extension": ".txt"},
        "datasets": [
            {"subsets": [{"image_dir": "a"}]},
            {"subsets": [{"metadata_file": "meta.json"}]},
            {"subsets": [{"image_dir": "a", "conditioning_data_dir": "masks"}]},
        ],
    }
    config = load(content, alpha_mask=True)
    assert [dataset.kind for dataset in config.datasets] == ["dreambooth", "fine_tuning", "controlnet"]
    assert [dataset.subsets[0].alpha_mask for dataset in config.datasets] == [True, True, False]


@pytest.mark.parametrize(
    ("supported", "subset", "expected"),
    [
        (SupportedKinds(), {"image_dir": "a", "conditioning_data_dir": "masks"}, "_dir needs --masked_loss"),
        (SupportedKinds(fine_tuning=False), {"image_dir": "a", "metadata_file": "meta.json"}, "does not train"),
        (SupportedKinds(dreambooth=False), {"image_dir": "a"}, "metadata_file: required key not provided"),
        (SupportedKinds(), {}, "subsets[0].image_dir: required key not provided"),
        (SupportedKinds(), {"metadata_file": "meta.json", "caption_extension": ".txt"}, "extra keys not allowed"),
        (SupportedKinds(), {"metadata_file": "meta.json", "is_reg": True}, "extra keys not allowed"),
        (SupportedKinds(caption_dropout=False), {"image_dir": "a", "caption_dropout_rate": 0.1}, "no caption dropout"),
        (ALL, {"image_dir": "a", "conditioning_data_dir": "masks", "alpha_mask": True}, "extra keys not allowed"),
        (ALL, {"image_dir": "a", "conditioning_data_dir": "masks", "random_crop": True}, "random_crop cannot"),
    ],
)
def test_what_a_script_does_not_support_is_refused(
    folder: Path, supported: SupportedKinds, subset: dict[str, Any], expected: str
) -> None:
    found = problems({"datasets": [{"resolution": 512, "subsets": [subset]}]}, supported)
    assert len(found) == 1
    assert expected in found[0]


def test_masks_and_plain_folders_stand_side_by_side_without_metadata_support(folder: Path) -> None:
    content = with_subset()
    content["datasets"].append({"resolution": 512, "subsets": [{"image_dir": "b", "conditioning_data_dir": "masks"}]})
    config = load(content, SupportedKinds(fine_tuning=False, controlnet=True))
    assert [dataset.kind for dataset in config.datasets] == ["dreambooth", "controlnet"]


@pytest.mark.parametrize(("key", "value"), [("metadata_file", "meta.json"), ("conditioning_data_dir", "masks")])
def test_mixed_subsets_must_be_separated(folder: Path, key: str, value: str) -> None:
    content = with_subset()
    content["datasets"][0]["subsets"].append({"image_dir": "b", key: value})
    found = problems(content)
    assert len(found) == 1
    assert found[0].startswith(f"data.json: datasets[0]: some subsets have {key}")


# --- reports --------------------------------------------------------------------------------------------------


def test_all_problems_are_reported_at_once_with_their_paths(folder: Path) -> None:
    content = {
        "foo": {},
        "general": {"resolution": 512.0, "alpha_mask": True, "flip_aug": 1},
        "datasets": [
            {"batch_size": 0, "prior_loss_weight": 1.0, "subsets": [
                {"image_dir": "a", "keep_token": 1, "batch_size": 2}, {"image_dir": "nowhere", "num_repeats": "3"},
            ]},
            {"resolution": [512], "subsets": []},
        ],
    }
    found = problems(content, SupportedKinds(fine_tuning=False))
    assert [line.split(": ", 2)[:2] for line in found] == [
        ["data.json", "foo"],
        ["data.json", "general.resolution"],
        ["data.json", "general.alpha_mask"],
        ["data.json", "general.flip_aug"],
        ["data.json", "datasets[0].batch_size"],
        ["data.json", "datasets[0].prior_loss_weight"],
        ["data.json", "datasets[0].subsets[0].keep_token"],
        ["data.json", "datasets[0].subsets[0].batch_size"],
        ["data.json", "datasets[0].subsets[1].num_repeats"],
        ["data.json", "datasets[1]"],
        ["data.json", "datasets[1].resolution"],
        ["data.json, datasets[0].subsets[1].image_dir", "there is no such directory"],
    ]
    text = "\n".join(found)
    for phrase in (
        "flip_aug: expected bool for dictionary value", "resolution: expected int", "did you mean keep_tokens (valid",
        "valid only in [[datasets.subsets]]", "valid only in [general] and [[datasets]]", "as --prior_loss_weight",
        "datasets[1]: the dataset has no subsets",
    ):
        assert phrase in text


@pytest.mark.parametrize("content", [{}, {"datasets": []}, {"datasets": None}])
def test_no_dataset_is_an_error(folder: Path, content: dict[str, Any]) -> None:
    assert "datasets: required key not provided" in problems(content)[0]


@pytest.mark.parametrize("content", [{"datasets": {"subsets": []}}, {"datasets": [3]}, {"general": 1, "datasets": []}])
def test_wrong_structure_is_a_type_error_of_its_place(folder: Path, content: dict[str, Any]) -> None:
    assert "for dictionary value" in problems(content)[0]


def test_an_option_name_in_the_file_is_translated(folder: Path) -> None:
    assert "this is batch_size (valid in [general] and [[datasets]])" in problems(
        with_subset(None, {"train_batch_size": 2})
    )[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resolution", [0, 512]), ("batch_size", True), ("batch_size", 1.5), ("bucket_reso_steps", 0),
        ("num_repeats", -1), ("keep_tokens", -1), ("token_warmup_step", -0.1), ("caption_dropout_rate", 1.5),
        ("caption_tag_dropout_rate", -0.1), ("validation_split", 2), ("face_crop_aug_range", [4, 2]),
        ("face_crop_aug_range", [0, 2]), ("face_crop_aug_range", [1]), ("resize_interpolation", "magic"),
        ("caption_separator", ""), ("token_warmup_min", -1), ("caption_dropout_every_n_epochs", -1),
        ("caption_extension", 3), ("custom_attributes", []), ("network_multiplier", "1"), ("flip_aug", "true"),
    ],
)
def test_values_out_of_range_are_refused(folder: Path, key: str, value: Any) -> None:
    level = "dataset" if key in DATASET_KEYS else "subset"
    path = "datasets[0]" if level == "dataset" else "datasets[0].subsets[0]"
    assert [line.startswith(f"data.json: {path}.{key}: ") for line in problems(at_level(level, key, value))] == [True]


def test_options_out_of_range_name_the_option(folder: Path) -> None:
    assert problems(with_subset(), keep_tokens=-1) == ["--keep_tokens: the value must be at least 0, got -1"]


# --- sources --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data.toml", "DATA.TOML"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_toml_with_and_without_byte_order_mark(folder: Path, name: str, mark: str) -> None:
    text = mark + '[general]\nresolution = [768, 512]\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\n'
    Path(name).write_text(text, encoding="utf-8")
    config = load(None, dataset_config=name)
    assert config.datasets[0].resolution == (768, 512)
    assert config.from_file
    assert config.datasets[0].subsets[0].location == f"{name}, datasets[0].subsets[0]"


def test_json_is_read_as_utf8(folder: Path) -> None:
    content = with_subset(None, None, class_tokens="猫")
    Path("data.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(content, ensure_ascii=False).encode())
    assert load(None, dataset_config="data.json").datasets[0].subsets[0].class_tokens == "猫"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("missing.toml", None, "no such file"),
        ("data.yaml", "", ".toml or .json"),
        ("data.toml", "a = ", "not valid TOML"),
        ("data.json", "{", "not valid JSON"),
        ("data.json", '{"general": {}, "general": {}}', "repeated key: general"),
        ("data.json", "[]", "must hold a table"),
    ],
)
def test_unusable_files_are_named(folder: Path, name: str, text: str | None, expected: str) -> None:
    if text is not None:
        Path(name).write_text(text, encoding="utf-8")
    found = problems(None, dataset_config=name)
    assert len(found) == 1
    assert name in found[0]
    assert expected in found[0]


def test_folder_names_give_repeats_and_class_tokens(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("5_a_b", "10_sks dog", "x_y", "0_z", "7", "3_狗 [x]", "3_deep/4_nested"):
        (folder / "train" / name).mkdir(parents=True)
    (folder / "train" / "1_file").touch()
    (folder / "reg" / "2_dog").mkdir(parents=True)
    config = load(None, train_data_dir="train", reg_data_dir="reg", resolution="512", dataset_repeats=9)
    subsets = config.datasets[0].subsets
    assert [(subset.num_repeats, subset.class_tokens, subset.is_reg) for subset in subsets] == [
        (10, "sks dog", False), (3, "deep", False), (3, "狗 [x]", False), (5, "a_b", False), (7, "", False),
        (2, "dog", True),
    ]
    assert not config.from_file
    for name in ("x_y", "0_z", "train/7"):
        assert any(name in message for message in caplog.messages)


def test_images_directly_in_train_data_dir_are_no_data(folder: Path) -> None:
    (folder / "a" / "image.png").touch()
    assert "No data found in --train_data_dir a" in problems(None, train_data_dir="a", resolution="512")[0]


@pytest.mark.parametrize("values", [{}, {"train_data_dir": "gone"}, {"train_data_dir": "a", "reg_data_dir": "gone"}])
def test_missing_directories_are_errors(folder: Path, values: dict[str, Any]) -> None:
    assert any("--train_data_dir" in line or "--reg_data_dir gone" in line for line in problems(None, **values))


def test_metadata_option_makes_one_fine_tuning_subset(folder: Path) -> None:
    config = load(None, in_json="meta.json", train_data_dir="a", resolution="512", dataset_repeats=3)
    subset = config.datasets[0].subsets[0]
    assert (config.datasets[0].kind, subset.image_dir, subset.metadata_file) == ("fine_tuning", "a", "meta.json")
    assert subset.num_repeats == 3


def test_metadata_option_is_not_used_by_a_script_without_support(folder: Path) -> None:
    (folder / "train" / "1_x").mkdir(parents=True)
    config = load(
        None, SupportedKinds(fine_tuning=False), in_json="meta.json", train_data_dir="train", resolution="512"
    )
    assert config.datasets[0].kind == "dreambooth"


def test_controlnet_scripts_take_images_directly(folder: Path) -> None:
    supported = SupportedKinds(dreambooth=False, fine_tuning=False, controlnet=True)
    values = {"train_data_dir": "a", "conditioning_data_dir": "masks", "resolution": "512", "dataset_repeats": 5}
    subset = load(None, supported, caption_extension=".txt", **values).datasets[0].subsets[0]
    assert (subset.kind, subset.num_repeats, subset.caption_extension) == ("controlnet", 1, ".txt")
    assert "--conditioning_data_dir" in problems(None, supported, train_data_dir="a")[0]


def test_masked_loss_without_a_file_needs_alpha_masks(folder: Path) -> None:
    (folder / "train" / "1_x").mkdir(parents=True)
    values = {"masked_loss": True, "train_data_dir": "train", "resolution": "512"}
    assert "--masked_loss without a config file needs --alpha_mask" in problems(None, **values)[0]
    assert "mask images need --dataset_config" in problems(
        None, alpha_mask=True, conditioning_data_dir="masks", **values
    )[0]
    assert load(None, alpha_mask=True, **values).datasets[0].subsets[0].alpha_mask


def test_folder_options_beside_a_file_are_ignored_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(with_subset(), train_data_dir="gone", in_json="gone.json")
    assert any("--train_data_dir, --in_json ignored" in message for message in caplog.messages)


# --- checks of sizes ------------------------------------------------------------------------------------------


def test_resolution_is_required_for_every_kind(folder: Path) -> None:
    content = {"datasets": [{"subsets": [{"image_dir": "a"}]}, {"subsets": [{"metadata_file": "meta.json"}]}]}
    found = problems(content)
    assert [line.split(":")[0] for line in found] == ["data.json, datasets[0]", "data.json, datasets[1]"]
    assert all("resolution is required" in line for line in found)


@pytest.mark.parametrize("case", BUCKETS["min_max_adjustment"])
def test_bucket_limits_become_multiples(folder: Path, case: dict[str, Any]) -> None:
    names = ("resolution", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
    content = with_subset(None, {"enable_bucket": True} | {name: case[name] for name in names})
    if "error" in case:
        assert case["error"].split()[0] in problems(content)[0]
    else:
        dataset = load(content).datasets[0]
        assert [dataset.min_bucket_reso, dataset.max_bucket_reso] == case["adjusted"]


def test_no_upscale_does_not_check_unused_limits(folder: Path) -> None:
    values = {"enable_bucket": True, "bucket_no_upscale": True, "resolution": 1536}
    assert load(with_subset(None, values)).datasets[0].resolution == (1536, 1536)
    assert "max_bucket_reso 1024" in problems(with_subset(None, values | {"bucket_no_upscale": False}))[0]


@pytest.mark.parametrize(("unit", "is_accepted"), [(64, False), (32, True)])
def test_bucket_steps_fit_the_model_for_every_kind(folder: Path, unit: int, *, is_accepted: bool) -> None:
    subset = {"image_dir": "a", "conditioning_data_dir": "masks"}
    dataset = {"resolution": 512, "enable_bucket": True, "bucket_reso_steps": 96, "subsets": [subset]}
    if is_accepted:
        assert load({"datasets": [dataset]}, bucket_step=unit).datasets[0].bucket_reso_steps == 96
    else:
        assert f"bucket_reso_steps 96 must be a multiple of {unit}" in problems({"datasets": [dataset]})[0]


def test_unbucketed_resolution_must_be_divisible_by_eight(folder: Path) -> None:
    assert "500x512 must be divisible by 8" in problems(with_subset(None, {"resolution": [500, 512]}))[0]


def test_one_directory_twice_is_an_error_for_conditioning(folder: Path) -> None:
    subsets = [{"image_dir": name, "conditioning_data_dir": "masks"} for name in ("a", "a/")]
    assert "duplicate image_dir a/" in problems({"datasets": [{"resolution": 512, "subsets": subsets}]})[0]


def test_face_crop_with_buckets_is_refused(folder: Path) -> None:
    content = with_subset({"enable_bucket": True}, None, face_crop_aug_range=[1, 2])
    assert "enable_bucket = false" in problems(content)[0]


def test_kept_tokens_without_tag_processing_warn(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(with_subset(None, None, keep_tokens=1, shuffle_caption=True))
    assert not caplog.messages
    load(with_subset(None, None, keep_tokens_separator="|||"))
    assert "keep_tokens_separator do nothing" in caplog.text


def test_validation_of_a_subset_beats_its_dataset(folder: Path) -> None:
    content = with_subset(None, {"validation_split": 0.5}, validation_split=0.25)
    content["datasets"][0]["subsets"].append({"image_dir": "b"})
    subsets = load(content, validation_split=0.1, validation_seed=7).datasets[0].subsets
    assert [(subset.validation_split, subset.validation_seed) for subset in subsets] == [(0.25, 7), (0.5, 7)]


# --- the summary, and the price of importing ------------------------------------------------------------------


def test_summary_names_settings_options_and_counts(folder: Path) -> None:
    config = load(with_subset({"enable_bucket": True}, {"batch_size": 4}, num_repeats=10, flip_aug=True))
    text = describe(config, [[ImageRecord(str(n), None, "", 0) for n in range(3)]])
    for part in ("batch_size: 4", "512x512", "256 to 1024", "3 images x 10 repeats in a", "flip_aug: True"):
        assert part in text


def test_importing_is_free_of_heavy_packages() -> None:
    code = "import sys, library.config_util; print([m for m in ('torch', 'numpy', 'PIL', 'cv2') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("supported", "values", "expected"),
    [
        (SupportedKinds(), {"in_json": "gone.json"}, "--in_json: there is no such file: gone.json"),
        (SupportedKinds(), {"in_json": "meta.json", "train_data_dir": "x"}, "--train_data_dir: there is no such dir"),
        (
            SupportedKinds(dreambooth=False, fine_tuning=False, controlnet=True),
            {"train_data_dir": "a", "conditioning_data_dir": "x"},
            "--conditioning_data_dir: there is no such directory: x",
        ),
    ],
)
def test_missing_places_of_the_command_line_name_the_option(
    folder: Path, supported: SupportedKinds, values: dict[str, Any], expected: str
) -> None:
    [problem] = problems(None, supported, resolution="512", **values)
    assert problem.startswith(expected)


# --- what a message says --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("Flip-Aug", "did you mean flip_aug (valid in [general], [[datasets]] and [[datasets.subsets]])?"),
        ("KEEP_TOKEN", "did you mean keep_tokens"),
        ("learning_rate", "allowed in [[datasets.subsets]]: image_dir, num_repeats, is_reg, class_tokens, "),
        ("a\nb", "extra keys not allowed"),
    ],
)
def test_unknown_keys_are_answered_with_known_ones(folder: Path, key: str, expected: str) -> None:
    content = with_subset(**{key: 1})
    for kind in ("resolution", "metadata_file", "conditioning_data_dir"):
        assert kind not in content["datasets"][0]["subsets"][0]
    [problem] = problems(content, SupportedKinds())
    assert expected in problem.replace("validation_split, validation_seed, resize_interpolation, ", "")
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_repeats", 10**400, "the value must be at most 1000000"),
        ("num_repeats", 1 << 20000, "got a number with too many digits"),
        ("network_multiplier", 10**400, "the value must be a finite number"),
        ("token_warmup_step", float("nan"), "the value must be a finite number"),
        ("resolution", 10**9, "both sides must be at most 65536"),
        ("image_dir", "a\0b", "a path cannot hold a zero character"),
        ("caption_prefix", "\ud800", "half of a surrogate pair"),
        ("class_tokens", ["x" * 5000], "got ['xxx"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_odd_values_get_short_answers(
    folder: Path, key: str, value: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("library.config_util.read_dataset_file", lambda path: content)
    content = with_subset()
    dataset = content["datasets"][0]
    (dataset["subsets"][0] if "subset" in (SUBSET_KEYS | DATASET_KEYS)[key].levels else dataset)[key] = value
    with pytest.raises(ConfigError) as caught:
        load_data_config(make_options(dataset_config="data.json").dataset, ALL, bucket_step=64)
    assert any(expected in problem and key in problem for problem in caught.value.problems)
    assert max(map(len, caught.value.problems)) < 300


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("deep.json", b"[" * 100000, "nested too deeply"),
        ("deep.toml", b"a = " + b"[" * 100000, "nested too deeply"),
        ("digits.json", b'{"general":\n{"keep_tokens": ' + b"9" * 5000 + b"}}", "too many digits (line 2)"),
        ("end.toml", b'[general]\ncaption_prefix = """x', "line 2"),
        ("bytes.toml", b"[general]\n\ncaption_prefix = '\xff'", "line 3: the file is not UTF-8"),
    ],
)
def test_unreadable_text_is_answered_with_its_line(folder: Path, name: str, content: bytes, expected: str) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_data_config(make_options(dataset_config=name).dataset, ALL, bucket_step=64)
    [problem] = caught.value.problems
    assert problem.startswith(name)
    assert expected in problem


def test_an_option_that_the_dataset_file_overrules_is_named(tmp_path, caplog):
    path = tmp_path / "data.toml"
    subset = f"[[datasets.subsets]]\nimage_dir = {str(tmp_path)!r}\n"
    general = "[general]\nresolution = 64\nflip_aug = true\n"
    path.write_text(f"{general}[[datasets]]\n{subset}keep_tokens = 2\n{subset}", "utf-8")
    given = DatasetOptions(dataset_config=path, resolution=(128, 128), keep_tokens=1, flip_aug=True, train_batch_size=2)
    load_data_config(given, SupportedKinds(), bucket_step=64)
    [message] = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    assert message == f"--resolution has no effect: {path} sets it, which counts"
