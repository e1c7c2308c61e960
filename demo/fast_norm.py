"""Optional faster GroupNorm for training on a CPU.

PyTorch's GroupNorm backward is slow on a CPU for channels-last tensors (more than half of a training step of the
demo's VAE). This module compiles a small C++ kernel when a compiler is present; without one, or on a GPU,
nothing changes. The mathematics is the same: statistics in float32, normalise, scale and shift.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import nn

logger = logging.getLogger(__name__)

_SOURCE = r"""
#include <torch/extension.h>
#include <cstdint>
#include <cmath>
#include <cstring>
#include <vector>

static inline float load(const float* p) { return *p; }
static inline float load(const uint16_t* p) {
    uint32_t bits = (uint32_t)(*p) << 16; float value; std::memcpy(&value, &bits, 4); return value;
}
static inline void store(float* p, float value) { *p = value; }
static inline void store(uint16_t* p, float value) {
    uint32_t bits; std::memcpy(&bits, &value, 4);
    *p = (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// x, y: [N, P, C]; mean, inverse: [N, G]
template <typename T>
static void forward_kernel(const T* x, T* y, const float* w, const float* b, float* mean, float* inverse,
                           int64_t N, int64_t P, int64_t C, int64_t G, float eps) {
    int64_t D = C / G;
    std::vector<float> s(C), q(C), scale(C), shift(C);
    float* sp = s.data(); float* qp = q.data(); float* scalep = scale.data(); float* shiftp = shift.data();
    for (int64_t n = 0; n < N; n++) {
        const T* xn = x + n * P * C; T* yn = y + n * P * C;
        for (int64_t c = 0; c < C; c++) { sp[c] = 0; qp[c] = 0; }
        for (int64_t p = 0; p < P; p++) {
            const T* row = xn + p * C;
            #pragma GCC ivdep
            for (int64_t c = 0; c < C; c++) { float v = load(row + c); sp[c] += v; qp[c] += v * v; }
        }
        for (int64_t g = 0; g < G; g++) {
            double sum = 0, square = 0;
            for (int64_t d = 0; d < D; d++) { sum += sp[g * D + d]; square += qp[g * D + d]; }
            double m = sum / (D * P); double variance = square / (D * P) - m * m;
            float r = (float)(1.0 / std::sqrt((variance > 0 ? variance : 0) + eps));
            mean[n * G + g] = (float)m; inverse[n * G + g] = r;
            for (int64_t d = 0; d < D; d++) {
                int64_t c = g * D + d; scalep[c] = r * w[c]; shiftp[c] = b[c] - (float)m * scalep[c];
            }
        }
        for (int64_t p = 0; p < P; p++) {
            const T* row = xn + p * C; T* out = yn + p * C;
            #pragma GCC ivdep
            for (int64_t c = 0; c < C; c++) store(out + c, load(row + c) * scalep[c] + shiftp[c]);
        }
    }
}

template <typename T>
static void backward_kernel(const T* grad, const T* x, T* dx, const float* w, const float* mean, const float* inverse,
                            float* dw, float* db, int64_t N, int64_t P, int64_t C, int64_t G) {
    int64_t D = C / G;
    std::vector<float> s(C), q(C), c1(C), c2(C), c3(C);
    float* sp = s.data(); float* qp = q.data(); float* a1 = c1.data(); float* a2 = c2.data(); float* a3 = c3.data();
    for (int64_t n = 0; n < N; n++) {
        const T* xn = x + n * P * C; const T* gn = grad + n * P * C; T* on = dx + n * P * C;
        for (int64_t c = 0; c < C; c++) { sp[c] = 0; qp[c] = 0; }
        for (int64_t p = 0; p < P; p++) {
            const T* xr = xn + p * C; const T* gr = gn + p * C;
            #pragma GCC ivdep
            for (int64_t c = 0; c < C; c++) { float g = load(gr + c); sp[c] += g; qp[c] += g * load(xr + c); }
        }
        for (int64_t g = 0; g < G; g++) {
            float m = mean[n * G + g], r = inverse[n * G + g];
            double first = 0, second = 0;
            for (int64_t d = 0; d < D; d++) {
                int64_t c = g * D + d; float normal = (qp[c] - m * sp[c]) * r;
                dw[c] += normal; db[c] += sp[c];
                first += sp[c] * w[c]; second += normal * w[c];
            }
            float A = (float)(first / (D * P)), B = (float)(second / (D * P));
            for (int64_t d = 0; d < D; d++) {
                int64_t c = g * D + d;
                a1[c] = r * w[c]; a2[c] = -r * r * B; a3[c] = -r * A + r * r * B * m;
            }
        }
        for (int64_t p = 0; p < P; p++) {
            const T* xr = xn + p * C; const T* gr = gn + p * C; T* out = on + p * C;
            #pragma GCC ivdep
            for (int64_t c = 0; c < C; c++) store(out + c, load(gr + c) * a1[c] + load(xr + c) * a2[c] + a3[c]);
        }
    }
}

std::vector<torch::Tensor> norm_forward(torch::Tensor x, torch::Tensor w, torch::Tensor b, int64_t G, double eps) {
    int64_t N = x.size(0), P = x.size(1), C = x.size(2);
    auto y = torch::empty_like(x); auto mean = torch::empty({N, G}, w.options());
    auto inverse = torch::empty_like(mean);
    if (x.scalar_type() == torch::kBFloat16)
        forward_kernel((const uint16_t*)x.data_ptr(), (uint16_t*)y.data_ptr(), w.data_ptr<float>(), b.data_ptr<float>(),
                       mean.data_ptr<float>(), inverse.data_ptr<float>(), N, P, C, G, (float)eps);
    else
        forward_kernel(x.data_ptr<float>(), y.data_ptr<float>(), w.data_ptr<float>(), b.data_ptr<float>(),
                       mean.data_ptr<float>(), inverse.data_ptr<float>(), N, P, C, G, (float)eps);
    return {y, mean, inverse};
}

std::vector<torch::Tensor> norm_backward(torch::Tensor grad, torch::Tensor x, torch::Tensor w, torch::Tensor mean,
                                         torch::Tensor inverse, int64_t G) {
    int64_t N = x.size(0), P = x.size(1), C = x.size(2);
    auto dx = torch::empty_like(x); auto dw = torch::zeros_like(w); auto db = torch::zeros_like(w);
    if (x.scalar_type() == torch::kBFloat16)
        backward_kernel((const uint16_t*)grad.data_ptr(), (const uint16_t*)x.data_ptr(), (uint16_t*)dx.data_ptr(),
                        w.data_ptr<float>(), mean.data_ptr<float>(), inverse.data_ptr<float>(),
                        dw.data_ptr<float>(), db.data_ptr<float>(), N, P, C, G);
    else
        backward_kernel(grad.data_ptr<float>(), x.data_ptr<float>(), dx.data_ptr<float>(),
                        w.data_ptr<float>(), mean.data_ptr<float>(), inverse.data_ptr<float>(),
                        dw.data_ptr<float>(), db.data_ptr<float>(), N, P, C, G);
    return {dx, dw, db};
}
"""


@functools.cache
def _kernel():  # noqa: ANN202 - a module compiled at run time
    """The compiled kernel, or None where it cannot be built."""
    try:
        from torch.utils.cpp_extension import load_inline

        return load_inline(
            "demo_fast_norm", [_SOURCE], functions=["norm_forward", "norm_backward"],
            extra_cflags=["-O3", "-march=native", "-ffast-math"],
        )
    except Exception as error:  # any failure of the tool chain only costs speed
        logger.warning("no C++ tool chain for the fast GroupNorm (%s); using PyTorch's", type(error).__name__)
        return None


class _GroupNormFunction(torch.autograd.Function):
    """GroupNorm of x [N, C, ...] through the kernel, which sees the memory as [N, P, C]."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):  # noqa: ANN001, ANN205 - signature given by PyTorch
        flat = x.movedim(1, -1).contiguous()
        rows = flat.view(x.shape[0], -1, x.shape[1])
        out, mean, inverse = _kernel().norm_forward(rows, weight, bias, groups, eps)
        ctx.save_for_backward(rows, weight, mean, inverse)
        ctx.groups = groups
        return out.view(flat.shape).movedim(-1, 1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # noqa: ANN001, ANN205
        rows, weight, mean, inverse = ctx.saved_tensors
        flat = grad.movedim(1, -1).contiguous()
        same = flat.view(rows.shape).to(rows.dtype)
        dx, dweight, dbias = _kernel().norm_backward(same, rows, weight, mean, inverse, ctx.groups)
        return dx.view(flat.shape).movedim(-1, 1), dweight, dbias, None, None


class FastGroupNorm(nn.GroupNorm):
    """GroupNorm that uses the compiled kernel for float32 and bfloat16 tensors on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [N, C, ...]."""
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
            return super().forward(x)
        return _GroupNormFunction.apply(x, self.weight, self.bias, self.num_groups, self.eps)


def use_fast_norm(model: nn.Module) -> None:
    """Switch every GroupNorm of a model on the CPU to the fast one; parameters and state-dict keys stay."""
    if next(model.parameters()).device.type != "cpu" or _kernel() is None:
        return
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = FastGroupNorm
