"""Options for models that are trained on straight paths from noise to image (flow matching)."""

from __future__ import annotations

from dataclasses import dataclass

from library.options.declare import option

WEIGHTING_SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")


@dataclass(frozen=True)
class FlowOptions:
    weighting_scheme: str = option(
        "how timesteps are drawn (logit_normal, mode) or weighted (sigma_sqrt, cosmap)",
        "uniform",
        choices=WEIGHTING_SCHEMES,
    )
    logit_mean: float = option("mean of --weighting_scheme logit_normal", 0.0, type="float")
    logit_std: float = option("standard deviation of --weighting_scheme logit_normal", 1.0, type="float")
    mode_scale: float = option("scale of --weighting_scheme mode", 1.29, type="float")
    timestep_sampling: str = option(
        "how timesteps are drawn: sigma follows --weighting_scheme, flux_shift the image size",
        "sigma",
        choices=("sigma", "uniform", "sigmoid", "shift", "flux_shift"),
    )
    sigmoid_scale: float = option("width of the draws of sigmoid, shift and flux_shift", 1.0, type="float")
    model_prediction_type: str = option(
        "what is compared with the target; raw is the model's own output and usually the right choice",
        "sigma_scaled",
        choices=("raw", "additive", "sigma_scaled"),
    )
    discrete_flow_shift: float = option(
        "above 1: more training at high noise (timestep sampling shift and sigma)", 3.0, type="float"
    )
    training_shift: float = option("above 1: more training at high noise", 1.0, type="float")
    guidance_scale: float = option("guidance value that the model is told while training", 3.5, type="float")
