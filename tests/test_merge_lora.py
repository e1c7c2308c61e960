"""networks/merge_lora.py and tools/show_metadata.py: merged equals hooked, exact sums, and what the files say."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from library import model_util, tool_launch
from networks import merge_lora
from networks.merging import LoraModule, WeightedLora, lora_modules, merge_loras, to_tensors
from tests.lora_files import (
    answers,
    assert_equal_answers,
    assert_other_answers,
    hook,
    picture,
    tiny_family,
    tiny_model,
    write_lora,
)
from tests.sd2_tiny import sd2_tensors
from tests.training import MODEL
from tools import show_metadata

ROOT = Path(__file__).resolve().parent.parent
TOOLS = {"networks/merge_lora.py": merge_lora.TOOL, "tools/show_metadata.py": show_metadata.TOOL}


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two LoRA files, one with convolutions and other ranks."""
    folder = tmp_path_factory.mktemp("loras")
    host = tiny_model()
    sd1 = {"ss_v2": "False", "ss_base_model_version": "sd_v1", "modelspec.title": "Linear one"}
    write_lora(folder / "linear.safetensors", host, 1, metadata=sd1)
    write_lora(folder / "conv.safetensors", host, 2, rank=6, alpha=3.0, conv_dim="3", conv_alpha="1")
    write_lora(folder / "linear2.safetensors", host, 3, alpha=1.0)
    return folder


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return answers(tiny_model())


def run(tool: tool_launch.Tool, *words: object) -> None:
    """What the tool does with this command line; a mistake is an error."""
    tool.run(tool_launch.parse(tool, [str(word) for word in words]))


def merge(*words: object) -> None:
    run(merge_lora.TOOL, *words)


def failure(capsys: pytest.CaptureFixture[str], tool: tool_launch.Tool, *words: object) -> list[str]:
    """The lines on standard error of a tool that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        tool_launch.main(tool, [str(word) for word in words])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert lines and all(line.startswith(f"{tool.name}: error: ") for line in lines)
    return [line.removeprefix(f"{tool.name}: error: ") for line in lines]


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def changes(path: Path) -> dict[str, Tensor]:
    """Module name -> what the file adds to the layer's weight, computed from the formula."""
    tensors = {key: value.double() for key, value in load_file(path).items()}
    names = {key.partition(".")[0] for key in tensors}
    result = {}
    for name in names:
        up, down = tensors[f"{name}.lora_up.weight"].flatten(1), tensors[f"{name}.lora_down.weight"].flatten(1)
        result[name] = float(tensors[f"{name}.alpha"]) / down.shape[0] * up @ down
    return result


# --- command line --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TOOLS)
def test_help_is_quick_and_leaves_torch_out(name: str, tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / name)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    print('status', stop.code, [n for n in ('torch', 'numpy', 'diffusers') if n in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "status 0 []", result.stderr
    assert result.stdout.startswith(f"usage: {name}")


def test_mistakes_are_reported_together_and_nothing_is_written(capsys, folder, tmp_path) -> None:
    out = tmp_path / "out.safetensors"
    lines = failure(capsys, merge_lora.TOOL, "--models", folder / "linear.safetensors", "absent.safetensors",
                    "--ratios", "1")
    assert [part for part in ("--ratios", "absent.safetensors", "--save_to") if not any(part in x for x in lines)] == []
    [line] = failure(capsys, merge_lora.TOOL, "--modle", "x")
    assert "unknown option --modle" in line and "--models" in line
    [line] = failure(capsys, merge_lora.TOOL, "--precision", "int8")
    assert "int8" in line
    assert not out.exists()


# --- into a model --------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_merged_model_answers_as_the_hooked_one(folder, plain, tmp_path) -> None:
    out = tmp_path / "new" / "merged.safetensors"
    merge("--sd_model", MODEL, "--models", folder / "linear.safetensors", folder / "conv.safetensors",
          "--ratios", "0.8", "-0.5", "--save_to", out)
    hooked = tiny_model()
    hook(hooked, folder / "linear.safetensors", 0.8)
    hook(hooked, folder / "conv.safetensors", -0.5)
    assert_other_answers(answers(hooked), plain)
    assert_equal_answers(answers(tiny_model(out)), answers(hooked))


@pytest.mark.slow
def test_merged_model_draws_the_image_of_the_hooked_one(folder, tmp_path) -> None:
    out = tmp_path / "merged.safetensors"
    merge("--sd_model", MODEL, "--models", folder / "conv.safetensors", folder / "linear.safetensors",
          "--ratios", "0.3", "0.4", "--save_to", out)
    family = tiny_family(MODEL)
    without = picture(family)
    hook(family.modules, folder / "conv.safetensors", 0.3)
    hook(family.modules, folder / "linear.safetensors", 0.4)
    hooked = picture(family)
    assert float((hooked - without).abs().mean()) > 0.01
    assert float((picture(tiny_family(out)) - hooked).abs().max()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "saved"), [("float", "fp16"), ("bf16", None), ("fp16", "float")])
def test_precisions_of_a_merged_model(precision, saved, folder, tmp_path) -> None:
    dtypes = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    common = ["--sd_model", MODEL, "--models", folder / "linear.safetensors", "--ratios", "0.5"]
    out = tmp_path / "merged.safetensors"
    merge(*common, "--precision", precision, *(["--save_precision", saved] if saved else []), "--save_to", out)
    stored, before = load_file(out), load_file(MODEL)
    assert {value.dtype for value in stored.values()} == {dtypes[saved or precision]}
    merge(*common, "--save_to", tmp_path / "exact.safetensors")
    exact = load_file(tmp_path / "exact.safetensors")
    rounding = 2.0 ** (-7 if precision == "bf16" else -10)
    for key, value in exact.items():
        assert torch.allclose(stored[key].float(), value, rtol=rounding, atol=rounding * 0.1), key
    assert sum(not torch.allclose(before[key].float(), exact[key]) for key in exact) == 204


@pytest.mark.slow
def test_pickles_and_diffusers_folders(folder, tmp_path) -> None:
    scheduler = model_util.scheduler_config(v_parameterization=False)
    model_util.save_diffusers_folder(tmp_path / "model", tiny_model(), scheduler=scheduler)
    expected = tiny_model()
    hook(expected, folder / "linear.safetensors", 0.7)
    common = ["--models", folder / "linear.safetensors", "--ratios", "0.7"]
    merge("--sd_model", tmp_path / "model", *common, "--save_to", tmp_path / "merged.ckpt")
    assert_equal_answers(answers(tiny_model(tmp_path / "merged.ckpt")), answers(expected))
    merge("--sd_model", tmp_path / "merged.ckpt", "--models", folder / "linear.safetensors", "--ratios", "-0.7",
          "--save_to", tmp_path / "back.safetensors")
    assert_equal_answers(answers(tiny_model(tmp_path / "back.safetensors")), answers(tiny_model()))


@pytest.mark.slow
@pytest.mark.parametrize("as_convolution", [False, True])
def test_sd2_projections_take_both_shapes(as_convolution, tmp_path) -> None:
    model = tmp_path / "sd2.safetensors"
    save_file(sd2_tensors(load_file(MODEL)), model)
    host = tiny_model(model, v2=True)
    path = write_lora(tmp_path / "lora.safetensors", host, 5)
    tensors = load_file(path)
    projections = [key for key in tensors if "proj_in.lora_" in key or "proj_out.lora_" in key and "unet" in key]
    assert len(projections) > 8 and all(tensors[key].dim() == 2 for key in projections)
    if as_convolution:
        tensors.update({key: tensors[key][:, :, None, None].clone() for key in projections})
        save_file(tensors, path)
    out = tmp_path / "merged.safetensors"
    merge("--v2", "--sd_model", model, "--models", path, "--ratios", "0.6", "--save_to", out)
    before = answers(host)
    hook(host, path, 0.6)
    assert_other_answers(answers(host), before)
    assert_equal_answers(answers(tiny_model(out, v2=True)), answers(host))
    assert metadata_of(out)["modelspec.architecture"] == "stable-diffusion-v2-768-v"

    out = tmp_path / "both.safetensors"
    merge("--models", path, path, "--ratios", "0.5", "0.5", "--concat", "--v2", "--save_to", out)
    both = load_file(out)
    assert all(both[key].dim() == 2 for key in projections)


@pytest.mark.slow
def test_metadata_of_a_merged_model(folder, tmp_path) -> None:
    out = tmp_path / "merged.safetensors"
    common = ["--sd_model", MODEL, "--models", folder / "linear.safetensors", folder / "conv.safetensors", "--ratios",
              "1", "1", "--save_to", out]
    merge(*common)
    metadata = metadata_of(out)
    assert metadata["modelspec.title"] == "merged"
    assert metadata["modelspec.merged_from"] == "sd1_tiny, Linear one, conv"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    merge(*common, "--no_metadata")
    assert not [key for key in metadata_of(out) if key.startswith("modelspec")]


@pytest.mark.parametrize(("model_says", "lora_says", "v2", "expected", "is_guessed"), [
    ("epsilon", "sd_v2_768_v", True, "epsilon", False), ("v", "sd_v1", False, "v", False),
    ("", "sd_v2_768_v", True, "v", False), ("", "sd_v2", True, "epsilon", False),
    ("", "", True, "v", True), ("", "", False, "epsilon", False),
])  # fmt: skip
def test_a_merged_model_predicts_what_it_said_then_what_the_files_say(
    model_says, lora_says, v2, expected, is_guessed, tmp_path, caplog
) -> None:
    tensors = load_file(MODEL)
    model, lora, out = (tmp_path / f"{name}.safetensors" for name in ("model", "lora", "out"))
    save_file(sd2_tensors(tensors) if v2 else tensors, model,
              {"modelspec.prediction_type": model_says} if model_says else {})  # fmt: skip
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    width = len(tensors["model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"])
    save_file({f"{name}.lora_down.weight": torch.ones(1, width), f"{name}.lora_up.weight": torch.ones(width, 1)}, lora,
              {"ss_base_model_version": lora_says} if lora_says else {})  # fmt: skip
    merge("--sd_model", model, "--models", lora, "--ratios", "1", "--save_to", out, *["--v2"] * v2)
    assert metadata_of(out)["modelspec.prediction_type"] == expected
    assert ("does not say what it predicts" in caplog.text) == is_guessed


@pytest.mark.slow
def test_files_for_other_models_are_refused(capsys, folder, tmp_path) -> None:
    out = tmp_path / "out.safetensors"
    tensors = load_file(folder / "linear.safetensors")
    foreign = {
        "loha": {"lora_unet_x.hada_w1_a": torch.ones(2, 2), "lora_unet_x.alpha": torch.tensor(1.0)},
        "dora": tensors | {"lora_te_text_model_encoder_layers_0_mlp_fc1.dora_scale": torch.ones(4)},
        "unrelated": {key.replace("down_blocks", "blocks").replace("up_blocks", "blocks").replace("mid_block", "m")
                      .replace("te_text", "x"): value for key, value in tensors.items()},
        "wide": {key: torch.ones(*value.shape[:1], 7) if "attn2_to_k.lora_down" in key else value
                 for key, value in tensors.items()},
    }  # fmt: skip
    for name, content in foreign.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(content, path)
        [line] = failure(capsys, merge_lora.TOOL, "--sd_model", MODEL, "--models", path, "--ratios", "1",
                         "--save_to", out)
        assert path.name in line, line
    assert not out.exists()


# --- with each other -----------------------------------------------------------------------------------------
def test_concatenation_is_exact_for_any_ranks_alphas_and_ratios(folder, tmp_path) -> None:
    paths = [folder / f"{name}.safetensors" for name in ("linear", "conv", "linear2")]
    ratios = [0.7, -0.4, 1.3]
    out = tmp_path / "out.safetensors"
    merge("--models", *paths, "--ratios", *ratios, "--concat", "--save_to", out)
    parts, merged = [changes(path) for path in paths], changes(out)
    assert set(merged) == set().union(*parts)
    for name, change in merged.items():
        expected = sum(ratio * part[name] for ratio, part in zip(ratios, parts, strict=True) if name in part)
        assert torch.allclose(change, expected, rtol=1e-5, atol=1e-6), name
    stored = load_file(out)
    assert stored["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"].shape[0] == 4 + 6 + 4
    assert stored["lora_unet_mid_block_resnets_0_conv1.lora_down.weight"].shape[0] == 3
    assert len({float(value) for key, value in stored.items() if key.endswith(".alpha")}) == 1


@pytest.mark.slow
def test_concatenated_file_answers_as_both_hooked(folder, tmp_path) -> None:
    out = tmp_path / "out.safetensors"
    merge("--models", folder / "linear.safetensors", folder / "conv.safetensors", "--ratios", "0.8", "-0.5", "--concat",
          "--shuffle", "--save_to", out)
    one, two = tiny_model(), tiny_model()
    hook(one, out)
    hook(two, folder / "linear.safetensors", 0.8)
    hook(two, folder / "conv.safetensors", -0.5)
    assert_equal_answers(answers(one), answers(two))


@pytest.mark.parametrize("ratio", [1.0, 0.3, -0.6, 0.0])
def test_strength_follows_the_ratio_without_concatenation(ratio, folder, tmp_path) -> None:
    out = tmp_path / "out.safetensors"
    merge("--models", folder / "conv.safetensors", "--ratios", ratio, "--save_to", out)
    before, after = changes(folder / "conv.safetensors"), changes(out)
    for name in before:
        assert torch.allclose(after[name], ratio * before[name], rtol=1e-5, atol=1e-6), name


def test_plain_merge_adds_factors_up_and_respects_alphas(folder, tmp_path) -> None:
    out = tmp_path / "out.safetensors"
    merge("--models", folder / "linear.safetensors", folder / "linear2.safetensors", "--ratios", "0.5", "-0.2",
          "--save_to", out)
    first, second, merged = (load_file(path) for path in (folder / "linear.safetensors",
                                                          folder / "linear2.safetensors", out))
    for name in {key.partition(".")[0] for key in first}:
        down, up = f"{name}.lora_down.weight", f"{name}.lora_up.weight"
        strength = (0.2 * 1.0 / 2.0) ** 0.5  # alphas 1 and 2
        assert torch.allclose(merged[down], 0.5**0.5 * first[down] - strength * second[down], atol=1e-6)
        assert torch.allclose(merged[up], 0.5**0.5 * first[up] + strength * second[up], atol=1e-6)
        assert float(merged[f"{name}.alpha"]) == 2.0


def test_different_ranks_need_concatenation(capsys, folder, tmp_path) -> None:
    [line] = failure(capsys, merge_lora.TOOL, "--models", folder / "linear.safetensors", folder / "conv.safetensors",
                     "--ratios", "1", "1", "--save_to", tmp_path / "out.safetensors")
    assert "--concat" in line and "rank 4" in line and "rank 6" in line
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("shapes", [((4, 6), (7, 4)), ((4, 5), (8, 4)), ((4, 5, 3, 3), (7, 4, 1, 1))])
def test_layers_of_different_size_are_refused_with_both_files(shapes: tuple[tuple[int, ...], ...]) -> None:
    module = LoraModule(torch.randn(4, 5), torch.randn(7, 4), 2.0)
    other = LoraModule(torch.randn(shapes[0]), torch.randn(shapes[1]), 2.0)
    loras = [WeightedLora("one.safetensors", {"m": module}, 1.0), WeightedLora("two.safetensors", {"m": other}, 1.0)]
    for concat in (True, False):
        with pytest.raises(ValueError, match=r"^m is for layers of different size in one\.safetensors .*two\.s"):
            merge_loras(loras, concat=concat)


@pytest.mark.parametrize("concat", [True, False])
def test_matrices_and_small_convolutions_are_the_same_layer(concat: bool) -> None:
    module = LoraModule(torch.randn(4, 5), torch.randn(7, 4), 2.0)
    as_convolution = LoraModule(module.down[:, :, None, None], module.up[:, :, None, None], 2.0)
    for first, second in ((module, as_convolution), (as_convolution, module)):
        loras = [WeightedLora("a", {"m": first}, 0.25), WeightedLora("b", {"m": second}, 0.25)]
        merged = merge_loras(loras, concat=concat)["m"]
        assert merged.down.dim() == first.down.dim()
        factor = 0.5 if concat else 4 * 0.25  # without concatenation cross terms are part of the sum
        assert torch.allclose(merged.change(), factor * module.change(), atol=1e-5)


def test_shuffling_moves_ranks_and_changes_nothing_else() -> None:
    module = LoraModule(torch.randn(8, 5), torch.randn(7, 8), 3.0)
    lora = WeightedLora("a", {"m": module}, 1.0)
    merged = merge_loras([lora], concat=True, shuffle=True, generator=torch.Generator().manual_seed(1))["m"]
    straight = merge_loras([lora], concat=True)["m"]
    assert not torch.equal(merged.down, straight.down)
    assert torch.equal(merged.down.sort(0).values, straight.down.sort(0).values)
    assert torch.allclose(merged.change(), module.change(), atol=1e-5)


def test_zero_and_missing_alphas_are_the_rank() -> None:
    weights = {"a.lora_down.weight": torch.ones(2, 3), "a.lora_up.weight": torch.ones(4, 2),
               "b.lora_down.weight": torch.ones(5, 3), "b.lora_up.weight": torch.ones(4, 5), "b.alpha": torch.tensor(0)}
    modules = lora_modules(weights, source="x")
    assert (modules["a"].scale, modules["b"].scale) == (1.0, 1.0)


@pytest.mark.parametrize(("weights", "said"), [
    ({"a.lora_down.weight": torch.ones(2, 3), "a.alpha": torch.tensor(1.0)}, r"missing: a\.lora_up\.weight\."),
    ({"a.lora_up.weight": torch.ones(3, 2)}, r"missing: a\.lora_down\.weight\."),
    ({"a.alpha": torch.tensor(1.0)}, r"missing: a\.lora_down\.weight, a\.lora_up\.weight\."),
    ({}, "it is empty"),
    ({"a.lora_down.weight": torch.ones(2, 3), "a.lora_up.weight": torch.ones(4, 3)}, "a have ranks 3 and 2"),
])  # fmt: skip
def test_modules_without_both_factors_are_named(weights: dict[str, Tensor], said: str) -> None:
    whole = {"b.lora_down.weight": torch.ones(2, 3), "b.lora_up.weight": torch.ones(4, 2)}
    for tensors in (weights, weights | whole) if weights else (weights,):
        with pytest.raises(ValueError, match=rf"^x\.safetensors: .*{said}"):
            lora_modules(tensors, source="x.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_alphas_keep_the_strength(dtype) -> None:
    module = LoraModule(torch.randn(3, 5), torch.randn(7, 3), 301.0)
    modules = lora_modules(to_tensors({"m": module}, dtype), source="x")
    assert torch.allclose(modules["m"].change(), module.change(), rtol=0.05, atol=0.02 * 301)
    assert modules["m"].alpha == float(torch.tensor(301.0, dtype=dtype))


@pytest.mark.parametrize(("precision", "saved", "dtype"), [
    ("float", "bf16", torch.bfloat16), ("bf16", None, torch.bfloat16), ("fp16", "float", torch.float32),
])  # fmt: skip
def test_hashes_are_those_of_the_written_tensors(precision, saved, dtype, folder, tmp_path) -> None:
    out = tmp_path / "out.safetensors"
    words = ["--save_precision", saved] if saved else []
    merge("--models", folder / "linear.safetensors", "--ratios", "0.5", "--precision", precision, *words,
          "--save_to", out)
    assert {value.dtype for value in load_file(out).values()} == {dtype}
    content = out.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata_of(out)["sshs_model_hash"] == hashlib.sha256(data).hexdigest()


def test_metadata_of_a_merged_lora(folder, tmp_path, caplog) -> None:
    out = tmp_path / "out.safetensors"
    common = ["--models", folder / "linear2.safetensors", folder / "linear.safetensors", "--ratios", "1", "1",
              "--concat", "--save_to", out]
    merge(*common)
    metadata = metadata_of(out)
    assert {key: metadata[key] for key in metadata if key.startswith("ss_")} == {
        "ss_v2": "False", "ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora",
        "ss_network_dim": "8", "ss_network_alpha": "8.0",
    }  # fmt: skip
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.merged_from"] == "linear2, Linear one"
    assert metadata["modelspec.title"] == "out"
    merge(*common, "--no_metadata")
    kept = metadata_of(out)
    assert not [key for key in kept if key.startswith("modelspec")]
    assert kept["ss_network_dim"] == "8" and kept["sshs_model_hash"] == metadata["sshs_model_hash"]

    tensors = load_file(folder / "linear.safetensors")
    save_file(tensors, tmp_path / "v.safetensors", {"ss_v2": "True", "ss_base_model_version": "sd_v2_v"})
    merge("--models", tmp_path / "v.safetensors", folder / "linear.safetensors", "--ratios", "1", "1", "--save_to", out)
    metadata = metadata_of(out)
    assert (metadata["ss_v2"], metadata["ss_base_model_version"]) == ("True", "sd_v2_v")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert (metadata["modelspec.resolution"], metadata["modelspec.prediction_type"]) == ("768x768", "v")
    assert "different models: sd_v2_v, sd_v1" in caplog.text


def test_pickled_loras_are_read_and_written(folder, tmp_path) -> None:
    torch.save(load_file(folder / "linear.safetensors"), tmp_path / "a.pt")
    merge("--models", tmp_path / "a.pt", "--ratios", "1", "--save_to", tmp_path / "b.pt")
    written, source = torch.load(tmp_path / "b.pt", weights_only=True), load_file(folder / "linear.safetensors")
    assert written.keys() == source.keys()
    assert all(torch.allclose(written[key], source[key], atol=1e-6) for key in source)


# --- show_metadata -------------------------------------------------------------------------------------------
def shown(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    capsys.readouterr()
    run(show_metadata.TOOL, *words)
    return capsys.readouterr().out


def test_metadata_is_printed_sorted_and_decoded_if_wanted(capsys, folder, tmp_path) -> None:
    metadata = {"b": '{"x": [1, 2]}', "a": "12", "c": "None"}
    save_file({"t": torch.zeros(1)}, tmp_path / "m.safetensors", metadata)
    text = shown(capsys, "--model", tmp_path / "m.safetensors")
    assert text.splitlines()[1] == '    "a": "12",' and json.loads(text) == metadata
    decoded = json.loads(shown(capsys, "--model", tmp_path / "m.safetensors", "--decode"))
    assert decoded == {"a": "12", "b": {"x": [1, 2]}, "c": "None"}


def test_files_without_metadata_and_missing_files(capsys, tmp_path) -> None:
    save_file({"t": torch.zeros(1)}, tmp_path / "m.safetensors")
    assert shown(capsys, "--model", tmp_path / "m.safetensors") == "No metadata found\n"
    torch.save({"t": torch.zeros(1)}, tmp_path / "m.pt")
    assert shown(capsys, "--model", tmp_path / "m.pt") == "No metadata found\n"
    [line] = failure(capsys, show_metadata.TOOL, "--model", tmp_path / "no.safetensors")
    assert "no.safetensors" in line
    [line] = failure(capsys, show_metadata.TOOL)
    assert "--model" in line
    shutil.copy(tmp_path / "m.pt", tmp_path / "pickle.safetensors")
    assert shown(capsys, "--model", tmp_path / "pickle.safetensors") == "No metadata found\n"
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes()[:-1])
    [line] = failure(capsys, show_metadata.TOOL, "--model", tmp_path / "broken.safetensors")
    assert "broken.safetensors is incomplete" in line


# --- families --------------------------------------------------------------------------------------------------
SDXL_KEY = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"


def lora_file(path: Path, *modules: str, metadata: dict[str, str] | None = None) -> Path:
    """A LoRA of rank 2 with ones for layers of width 4."""
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 4) for name in modules}
    save_file(tensors | {f"{name}.lora_up.weight": torch.ones(4, 2) for name in modules}, path, metadata or {})
    return path


@pytest.mark.parametrize(("modules", "module", "version", "architecture"), [
    ([SDXL_KEY, "lora_te2_text_model_encoder_layers_0_mlp_fc1"], "lora", "sdxl_base_v1-0",
     "stable-diffusion-xl-v1-base"),
    (["lora_unet_joint_blocks_0_x_block_attn_proj"], "lora_sd3", "medium", "stable-diffusion-3-medium"),
    (["lora_unet_single_blocks_0_linear2"], "lora_flux", "flux1", "flux-1-dev"),
])  # fmt: skip
def test_every_family_is_merged_and_recorded(modules, module, version, architecture, tmp_path) -> None:
    path, out = lora_file(tmp_path / "a.safetensors", *modules), tmp_path / "out.safetensors"
    merge("--models", path, path, "--ratios", "0.5", "1", "--concat", "--save_to", out)
    metadata = metadata_of(out)
    assert metadata["ss_network_module"] == f"networks.{module}"
    assert metadata["ss_base_model_version"] == version
    assert metadata["modelspec.architecture"] == f"{architecture}/lora"
    assert {key.partition(".")[0] for key in load_file(out)} == set(modules)


def test_two_namings_become_one(tmp_path) -> None:
    text = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
    other = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
    theirs = lora_file(tmp_path / "theirs.safetensors", other, text)
    ours = lora_file(tmp_path / "ours.safetensors", SDXL_KEY)
    out = tmp_path / "out.safetensors"
    merge("--models", ours, theirs, "--ratios", "1", "0.5", "--concat", "--save_to", out)
    merged = changes(out)
    assert set(merged) == {SDXL_KEY, "lora_te2_text_model_encoder_layers_0_mlp_fc1"}
    assert torch.allclose(merged[SDXL_KEY], torch.full((4, 4), 3.0, dtype=merged[SDXL_KEY].dtype))


def test_families_are_not_mixed_nor_merged_into_another_model(capsys, tmp_path) -> None:
    sdxl = lora_file(tmp_path / "xl.safetensors", SDXL_KEY)
    flux = lora_file(tmp_path / "fl.safetensors", "lora_unet_single_blocks_0_linear2")
    out = tmp_path / "out.safetensors"
    [line] = failure(capsys, merge_lora.TOOL, "--models", sdxl, flux, "--ratios", "1", "1", "--save_to", out)
    assert "xl.safetensors is for SDXL" in line and "fl.safetensors is for FLUX.1" in line
    [line] = failure(capsys, merge_lora.TOOL, "--sd_model", MODEL, "--models", flux, "--ratios", "1", "--save_to", out)
    assert "--sd_model" in line and "fl.safetensors is a LoRA for FLUX.1" in line
    assert not out.exists()
