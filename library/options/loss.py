"""Options for the loss and its weights."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import flag, option


@dataclass(frozen=True)
class LossOptions:
    loss_type: str = option("kind of loss", "l2", choices=("l1", "l2", "huber", "smooth_l1"))
    huber_schedule: str = option(
        "how the Huber parameter depends on the timestep", "snr", choices=("constant", "exponential", "snr")
    )
    huber_c: float = option("Huber parameter: smaller is closer to l1", 0.1, type="float")
    huber_scale: float = option("factor on the Huber parameter", 1.0, type="float")
    prior_loss_weight: float = option("weight of regularisation images", 1.0, type="float")
    min_snr_gamma: float | None = option("limit the weight of easy timesteps (min-SNR), e.g. 5", type="float")
    scale_v_pred_loss_like_noise_pred: bool = flag("v-prediction: weight the loss as if noise were predicted")
    v_pred_like_loss: float | None = option(
        "noise prediction: add this much of the loss weighted as for v-prediction", type="float"
    )
    debiased_estimation_loss: bool = flag("weight the loss by 1/sqrt(SNR) (debiased estimation)")
