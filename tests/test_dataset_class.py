"""`--dataset_class`: a third party's ten lines train a network through the whole script."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library.data.custom_group import CustomGroup, load_dataset_class
from library.data.loader import make_loader
from library.data.minimal_dataset import list_order
from library.data.records import LatentSpec
from library.options import make_options
from library.options.errors import UserError
from library.train_util import MinimalDataset
from tests.flux_tiny import train_flux
from tests.training import train

pytestmark = pytest.mark.slow  # trains often; `--quick` leaves it out

SPEC = LatentSpec(channels=4, downsample=8, bucket_step=64, scale=1.0, shift=0.0, cache_suffix="_sd.npz")
THIRD_PARTY = """
    import torch
    from library.train_util import MinimalDataset

    class Stripes(MinimalDataset):
        def __init__(self, tokenizer, max_token_length, resolution, debug_dataset):
            super().__init__(resolution, 1.0, debug_dataset)
            self.num_train_images = 6

        def __len__(self):
            return 3

        def __getitem__(self, index):
            images = torch.rand(2, 3, self.height, self.width) * 2 - 1
            return {"images": images, "captions": ["stripes", f"number {index}"], "loss_weights": torch.ones(2)}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory with the class of a third party; its name is never used twice."""
    name = f"stripes_{random.SystemRandom().randrange(10**12)}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(THIRD_PARTY), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def tokenize(captions: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[[len(caption)] * 77] for caption in captions])}


class Squares(MinimalDataset):
    """Batches of two squares; a subclass says what else is in them."""

    extra: Mapping[str, Any] = {}

    def __init__(self, tokenizer: None, max_token_length: int | None, resolution: Any, debug_dataset: bool) -> None:
        super().__init__(resolution or (16, 8), 0.5, debug_dataset)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "images": torch.full((2, 3, self.height, self.width), index / 10), "captions": ["a", "bcd"], **self.extra,
        }  # fmt: skip


def group_of(dataset_class: type[MinimalDataset], monkeypatch: pytest.MonkeyPatch, **values: Any) -> CustomGroup:
    monkeypatch.setitem(globals(), "Tested", dataset_class)
    return load_dataset_class(
        make_options(dataset_class=f"{__name__}.Tested", **values), spec=SPEC, tokenize=tokenize, seed=7,
        bucket_step=64, caption_replacements={"cat": "dog"},
    )


# --- the whole script -----------------------------------------------------------------------------------------


def test_a_third_party_class_trains_a_network(module: str, tmp_path: Path) -> None:
    common = ["--dataset_class", f"{module}.Stripes", "--resolution", "64"]
    straight = train(*common, "--max_train_epochs", "2", "--save_state", "--save_every_n_steps", "4",
                     output_dir=tmp_path / "straight")
    resumed = train(*common, "--max_train_epochs", "2", "--resume", tmp_path / "straight" / "run-step00000004-state",
                    output_dir=tmp_path / "resumed")
    workers = train(*common, "--max_train_epochs", "2", "--max_data_loader_n_workers", "2",
                    output_dir=tmp_path / "workers")
    tensors = load_file(straight)
    assert any(tensor.abs().max() > 0 for key, tensor in tensors.items() if "lora_up" in key)
    for other in (resumed, workers):  # what the class draws depends on seed, epoch and batch only
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in load_file(other).items())
    with safe_open(straight, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_dataset_class"] == f"{module}.Stripes"
    assert (metadata["ss_num_train_images"], metadata["ss_steps"]) == ("6", "6")


OWN_TOKENS = """
    from {module} import Stripes

    class Tokenized(Stripes):
        def __getitem__(self, index):
            batch = super().__getitem__(index)
            return batch | {"input_ids_list": self.tokenize_strategy.tokenize(batch["captions"])}
"""


def test_a_class_may_tokenize_by_itself_for_models_of_several_encoders(module: str, tmp_path: Path) -> None:
    code = textwrap.dedent(OWN_TOKENS).replace("{module}", module)
    (tmp_path / f"{module}_tokenized.py").write_text(code, encoding="utf-8")
    common = ["--network_module", "networks.lora_flux", "--network_dim", "2", "--resolution", "64", "--seed", "1",
              "--max_train_steps", "1", "--max_data_loader_n_workers", "0"]
    plain, own = (
        load_file(train_flux("flux_train_network", "--dataset_class", name, *common, output_dir=tmp_path / name))
        for name in (f"{module}.Stripes", f"{module}_tokenized.Tokenized")
    )
    assert plain.keys() == own.keys()
    assert all(torch.equal(tensor, own[key]) for key, tensor in plain.items())


def test_the_dataset_is_shown_without_training(module: str, tmp_path: Path) -> None:
    train("--dataset_class", f"{module}.Stripes", "--resolution", "64", "--debug_dataset", output_dir=tmp_path / "out")
    text = (tmp_path / "out" / "debug_dataset" / "samples.txt").read_text(encoding="utf-8")
    assert text.count("caption: stripes") == 3
    assert Image.open(tmp_path / "out" / "debug_dataset" / "contact_sheet.png").width > 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--dataset_class", "gone.Stripes"], "gone cannot be imported"),
        (["--dataset_class", "Stripes"], "give package.module.Class"),
        (["--dataset_class", "{module}.Gone"], "there is no such class"),
        (["--dataset_class", "pathlib.Path"], "does not derive from MinimalDataset"),
        (["--dataset_class", "{module}.Stripes", "--cache_latents"], "--cache_latents cannot be used"),
        (["--dataset_class", "{module}.Stripes"], "Stripes[0] failed"),  # its height needs --resolution
        (["--dataset_class", "{module}.Stripes", "--resolution", "60"], "multiples of 8"),
    ],
)
def test_mistakes_end_with_status_2(
    words: list[str], expected: str, module: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        train(*(word.format(module=module) for word in words), "--max_train_steps", "1", output_dir=tmp_path / "out")
    assert caught.value.code == 2
    message = capfd.readouterr().err
    assert "--dataset_class" in message
    assert expected in message if "[0]" not in expected else "Stripes[" in message and "failed: TypeError" in message


# --- batches --------------------------------------------------------------------------------------------------


def test_missing_keys_are_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_of(Squares, monkeypatch)
    batches = list(make_loader(group, epoch=1))
    order = [round(batch.images[0, 0, 0, 0].item() * 10) for batch in batches]
    assert sorted(order) == [0, 1, 2, 3]
    assert [f"{number}" for number in order] == [keys[0] for _, keys in group.epoch_plan(1)]
    assert group.epoch_plan(1) != group.epoch_plan(2)
    batch = batches[0]
    assert torch.equal(batch.tokens["input_ids"], tokenize(["a", "bcd"])["input_ids"])
    assert batch.loss_weights.tolist() == [1.0, 1.0]
    assert batch.network_multipliers.tolist() == [0.5, 0.5]
    assert batch.target_sizes_hw.tolist() == batch.original_sizes_hw.tolist() == [[8, 16], [8, 16]]
    assert batch.crop_top_lefts.tolist() == [[0, 0], [0, 0]]
    assert (batch.flippeds, batch.custom_attributes) == ([False, False], [{}, {}])


def test_ids_come_before_masks_in_the_list_of_tokens() -> None:
    names = ["clip_l", "clip_l_mask", "clip_g", "clip_g_mask", "t5xxl", "t5xxl_mask"]
    assert list_order(dict.fromkeys(names)) == names[::2] + names[1::2]


@pytest.mark.parametrize("key", ["input_ids_list", "input_ids"])
@pytest.mark.parametrize("windows", [True, False])
def test_tokens_of_the_class_are_used_under_both_names(
    key: str, windows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(154).reshape((2, 1, 77) if windows else (2, 77))

    class Own(Squares):
        extra = {key: [ids] if key == "input_ids_list" else ids, "loss_weights": [0.5, 2]}

    batch = next(make_loader(group_of(Own, monkeypatch), epoch=1))
    assert torch.equal(batch.tokens["input_ids"], ids.reshape(2, 1, 77))
    assert batch.loss_weights.tolist() == [0.5, 2.0]


def test_latents_masks_and_sizes_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {
        "images": None, "latents": torch.ones(2, 4, 3, 2), "alpha_masks": np.ones((2, 24, 16)),
        "original_sizes_hw": [[30, 20], [31, 21]], "crop_top_lefts": torch.tensor([[1, 2], [3, 4]]),
        "custom_attributes": [{"diff_output_preservation": True}, {}], "image_keys": ["x", "y"], "flippeds": [True, 0],
    }  # fmt: skip
    dataset_class = type("Own", (Squares,), {"extra": extra, "is_latent_cacheable": lambda self: True})
    batch = next(make_loader(group_of(dataset_class, monkeypatch, cache_latents=True), epoch=1))
    assert batch.images is None
    assert batch.latents.shape == (2, 4, 3, 2)
    assert batch.target_sizes_hw.tolist() == [[24, 16]] * 2
    assert batch.original_sizes_hw.tolist() == [[30, 20], [31, 21]]
    assert batch.crop_top_lefts.tolist() == [[1, 2], [3, 4]]
    assert batch.alpha_masks.dtype == torch.float32
    assert (batch.image_keys, batch.flippeds) == (["x", "y"], [True, False])
    assert batch.custom_attributes[0] == {"diff_output_preservation": True}


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"captions": None}, "`captions` must be"),
        ({"captions": "ab"}, "`captions` must be"),
        ({"captions": ["one"]}, "`images` has shape [2, 3, 8, 16], expected [1,3"),
        ({"images": None}, "either `images`"),
        ({"latents": torch.ones(2, 4, 1, 2)}, "either `images`"),
        ({"images": "pictures"}, "`images` cannot be made a tensor"),
        ({"images": torch.zeros(2, 3, 9, 16)}, "multiples of 8"),
        ({"loss_weights": torch.ones(3)}, "`loss_weights` has shape [3], expected [2]"),
        ({"input_ids": torch.zeros(2, 5)}, "input_ids has shape [2, 5], not [2, 1, 77]"),
        ({"input_ids_list": [torch.zeros(2, 77)] * 2}, "must hold 1 tensors (input_ids)"),
        ({"text_encoder_outputs_list": [torch.zeros(2, 77, 8)]}, "`text_encoder_outputs_list` must be None"),
        ({"alpha_masks": torch.ones(1, 8, 16)}, "`alpha_masks` has shape"),
        ({"flippeds": [True]}, "`flippeds` has 1 entries"),
    ],
)
def test_a_bad_batch_names_class_batch_and_key(
    extra: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = group_of(type("Own", (Squares,), {"extra": extra}), monkeypatch)
    with pytest.raises(UserError, match=r"--dataset_class: batch .*Tested\[\d\]: ") as caught:
        next(make_loader(group, epoch=1))
    assert expected in str(caught.value)


# --- what a class is told, and what it may draw ---------------------------------------------------------------


def test_the_class_knows_epoch_step_seed_and_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Squares):
        def __getitem__(self, index: int) -> dict[str, Any]:
            assert self.tokenize_strategy is not None
            told = f"{self.seed} {self.current_epoch} {self.current_step} {self.max_train_steps}"
            captions = [told, self.process_caption(self, "one cat")]
            ids = self.tokenize_strategy.tokenize(captions)
            return super().__getitem__(index) | {"captions": captions, "input_ids_list": ids}

    group = group_of(Own, monkeypatch)
    group.max_train_steps = 9
    batch = next(make_loader(group, epoch=3, first_step=5))
    assert batch.captions == ["7 3 5 9", "one dog"]
    assert batch.tokens["input_ids"][:, 0, 0].tolist() == [7, 7]


def test_what_a_class_draws_is_derived_and_leaves_the_generators_of_training_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Own(Squares):
        shuffle_caption = True

        def __getitem__(self, index: int) -> dict[str, Any]:
            noise = torch.rand(2, 3, 8, 16) + random.random() + float(np.random.rand())
            words = ",".join("abcdefgh")
            return {"images": noise, "captions": [self.process_caption(self, words) for _ in range(2)]}

    def state() -> tuple[Any, ...]:
        return random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()

    before = state()
    first = list(make_loader(group_of(Own, monkeypatch), epoch=2))
    random.random(), torch.rand(1), np.random.rand()
    moved = state()
    rest = list(make_loader(group_of(Own, monkeypatch), epoch=2, start=2))
    assert before != moved == state()
    for one, other in zip(first[2:], rest, strict=True):
        assert torch.equal(one.images, other.images)
        assert one.captions == other.captions
    assert len({caption for batch in first for caption in batch.captions}) == 8
    assert not torch.equal(first[0].images, first[1].images)


def test_helpers_of_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Squares(None, None, (16, 8), False)
    picture = Image.new("L", (4, 2), 255)
    assert torch.equal(dataset.image_transforms(picture), torch.ones(3, 2, 4))
    assert torch.equal(dataset.image_transforms(np.zeros((2, 4, 3), np.uint8)), -torch.ones(3, 2, 4))
    assert dataset.get_resolutions() == []
    assert not dataset.is_latent_cacheable()
    with pytest.raises(ValueError, match=r"needs self.tokenizers"):
        dataset.get_input_ids("a cat")


def test_ids_by_a_tokenizer_of_the_class() -> None:
    from transformers import CLIPTokenizer

    from tests.training import TOKENIZERS

    folder = next(path for path in TOKENIZERS.iterdir() if "clip-vit-large" in path.name)
    dataset = Squares(None, None, None, False)
    dataset.tokenizers = [CLIPTokenizer.from_pretrained(str(folder))]
    dataset.tokenizer_max_length = 77
    short = dataset.get_input_ids("a cat")
    assert short.shape == (1, 77)
    assert torch.equal(short[0], dataset.tokenizers[0]("a cat", padding="max_length", return_tensors="pt").input_ids[0])
    dataset.tokenizer_max_length = 227
    assert dataset.get_input_ids("a cat").shape == (3, 77)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"__init__": lambda self, *words: None}, "must call super().__init__"),
        ({"__init__": lambda self: None}, "failed: TypeError"),
        ({"__len__": MinimalDataset.__len__}, "must define __len__"),
        ({"__len__": lambda self: 0}, "it has no batches"),
    ],
)
def test_a_class_that_is_no_dataset_is_refused(
    members: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as caught:
        group_of(type("Own", (Squares,), members), monkeypatch)
    assert expected in str(caught.value)


@pytest.mark.parametrize("option", [{"cache_text_encoder_outputs": True}, {"validation_split": 0.1}])
def test_options_that_need_the_trainers_own_records_are_refused(
    option: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(option))} cannot be used with --dataset_class"):
        group_of(Squares, monkeypatch, **option)
