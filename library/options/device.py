"""Options for number formats, attention, compilation and several devices."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option

DYNAMO_BACKENDS = (
    "eager", "aot_eager", "inductor", "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt", "onnxrt",
    "tensort", "ipex", "tvm",
)  # fmt: skip


@dataclass(frozen=True)
class DeviceOptions:
    mixed_precision: str = option("number format of the computation", "no", choices=("no", "fp16", "bf16"))
    full_fp16: bool = flag("keep trained weights and gradients in fp16 too")
    full_bf16: bool = flag("keep trained weights and gradients in bf16 too")
    fp8_base: bool = flag("keep the frozen base model in 8-bit floating point")
    fp8_base_unet: bool = flag("keep only the frozen denoiser in 8-bit floating point")
    mem_eff_attn: bool = flag("attention in slices: least memory, slowest")
    xformers: bool = flag("attention of the xformers package")
    sdpa: bool = flag("PyTorch's own fused attention (the default)")
    torch_compile: bool = flag("compile the model before training")
    dynamo_backend: str = option("compiler for --torch_compile", "inductor", choices=DYNAMO_BACKENDS, off=("no",))
    ddp_timeout: int | None = option("minutes until waiting for another process fails", type="int")
    ddp_gradient_as_bucket_view: bool = flag("several devices: share memory between gradients and messages")
    ddp_static_graph: bool = flag("several devices: promise that every step uses the same parameters")
