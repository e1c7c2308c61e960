"""Options for DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option

OFFLOAD_DEVICES = (None, "cpu", "nvme")


@dataclass(frozen=True)
class DeepSpeedOptions:
    deepspeed: bool = flag("train with DeepSpeed")
    zero_stage: int = option("how much is split over devices (ZeRO stage)", 2, type="int", choices=(0, 1, 2, 3))
    offload_optimizer_device: str | None = option("where the optimizer's state is kept", choices=OFFLOAD_DEVICES)
    offload_optimizer_nvme_path: str | None = option("folder for an optimizer state kept on nvme")
    offload_param_device: str | None = option("ZeRO 3: where weights are kept", choices=OFFLOAD_DEVICES)
    offload_param_nvme_path: str | None = option("ZeRO 3: folder for weights kept on nvme")
    zero3_init_flag: bool = flag("ZeRO 3: split weights while the model is built")
    zero3_save_16bit_model: bool = flag("ZeRO 3: save weights in 16 bits")
    fp16_master_weights_and_gradients: bool = flag("ZeRO 2 with offload: keep master weights and gradients in fp16")
