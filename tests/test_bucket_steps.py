"""Which `bucket_reso_steps` each script accepts."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from library.config_util import ConfigError, load_data_config
from library.launch import resolve
from library.options import make_options
from tests.training import MODEL, TOKENIZERS

UNITS = {
    "train_network": 64, "train_db": 64, "fine_tune": 64, "train_textual_inversion": 64, "train_control_net": 64,
    "sdxl_train_network": 32, "sdxl_train": 32, "sdxl_train_control_net": 32, "sdxl_train_control_net_lllite": 32,
    "sd3_train_network": 32, "sd3_train": 8, "flux_train_network": 32, "flux_train": 16, "flux_train_control_net": 16,
}  # fmt: skip


@pytest.mark.parametrize("script", UNITS)
def test_steps_are_multiples_of_the_unit_of_the_script(script: str, tmp_path: Path) -> None:
    entry = importlib.import_module(script).SCRIPT
    words = {
        "pretrained_model_name_or_path": str(MODEL), "tokenizer_cache_dir": str(TOKENIZERS), "in_json": __file__,
        "network_module": "networks.lora", "train_data_dir": str(tmp_path), "conditioning_data_dir": str(tmp_path),
        "resolution": "512", "enable_bucket": True,
    }  # fmt: skip
    options = make_options(**words)
    unit = resolve(entry.method)(options, resolve(entry.family)(options)).bucket_step
    assert unit == UNITS[script]
    (tmp_path / "1_a").mkdir()
    for steps in (unit, unit // 2, unit + 4):
        steps_options = make_options(**words, bucket_reso_steps=steps).dataset
        if steps == unit:
            [dataset] = load_data_config(steps_options, entry.data, bucket_step=unit).datasets
            assert dataset.bucket_reso_steps == unit
        else:
            with pytest.raises(ConfigError, match=f"bucket_reso_steps {steps} must be a multiple of {unit}"):
                load_data_config(steps_options, entry.data, bucket_step=unit)
