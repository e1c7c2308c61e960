"""Makes the demo's base model from nothing: VAE, then U-Net and text encoder, then one SD 1.x checkpoint file.

    python demo/train_base.py --output demo/model --minutes-vae 27 --minutes-decoder 10 --minutes-denoiser 60

Everything is drawn and trained on the spot; nothing is downloaded. A second start with the same --work folder goes on
where the first one stopped. On one core of a current CPU the times above suffice; a GPU is used when there is one.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from base_denoiser import BaseModel, DenoiserSettings, fold_normalisation, train_denoiser  # noqa: E402
from base_models import TOKENIZER_NAME, BaseSize, save_single_file  # noqa: E402
from base_sampling import Models, SamplingSettings, tally_known  # noqa: E402
from base_tokenizer import write_tokenizer  # noqa: E402
from base_vae import VaeSettings, build_vae, held_out_psnr, train_vae  # noqa: E402
from fast_norm import use_fast_norm  # noqa: E402
from grid import loss_chart, picture_grid, read_loss_log  # noqa: E402
from training_tools import save_state  # noqa: E402

logger = logging.getLogger("train_base")


def trained_vae(minutes: float, decoder_minutes: float, work: Path, device: torch.device) -> AutoencoderKL:
    """The VAE with normalised latents, trained now or taken from the work folder.

    First everything is trained, then the decoder alone, which sharpens the pictures without moving the latents.
    """
    path = work / "vae_normalised.pt"
    if path.exists():
        vae = build_vae().to(device, memory_format=torch.channels_last)
        vae.load_state_dict(torch.load(path, map_location=device, weights_only=True)["model"])
        use_fast_norm(vae)
        return vae.eval().requires_grad_(False)
    vae = train_vae(VaeSettings(minutes=minutes), work, device)
    fold_normalisation(vae)
    if decoder_minutes > 0:
        polish = VaeSettings(minutes=decoder_minutes, learning_rate=4e-4, decoder_only=True, seed=7)
        vae = train_vae(polish, work, device, start=vae)
    logger.info("VAE: PSNR on held-out pictures %s", {k: round(v, 2) for k, v in held_out_psnr(vae).items()})
    save_state(path, model=vae.state_dict())
    return vae


def main() -> None:
    """Command line: train, save, show."""
    parser = argparse.ArgumentParser(description="train the demo's base model from nothing")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint and the tokenizer")
    parser.add_argument("--work", type=Path, default=Path("demo/work"), help="folder for states, logs and pictures")
    parser.add_argument("--minutes-vae", type=float, default=27.0, help="training time of the VAE")
    parser.add_argument("--minutes-decoder", type=float, default=10.0, help="further training of its decoder alone")
    parser.add_argument("--minutes-denoiser", type=float, default=60.0, help="training time of U-Net and text encoder")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (more than the free cores is very slow)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work, output = arguments.work, arguments.output
    work.mkdir(parents=True, exist_ok=True)
    write_tokenizer(output / TOKENIZER_NAME)
    tokenizer = CLIPTokenizer.from_pretrained(output / TOKENIZER_NAME)
    vae = trained_vae(arguments.minutes_vae, arguments.minutes_decoder, work, device)

    def evaluate(model: BaseModel) -> float:
        """Draw all known prompts, save checkpoint and picture grid, return the share of right pictures."""
        save_single_file(output, model.unet, model.text_encoder, vae)
        tally = tally_known(Models(model.unet, model.text_encoder, vae, tokenizer), SamplingSettings())
        logger.info("right %.3f (shape %.3f, colour %.3f, background %.3f)",
                    tally.right, tally.shape, tally.colour, tally.background)
        picture_grid(tally.pictures, 18).save(work / "known.png")
        return tally.right

    settings = DenoiserSettings(minutes=arguments.minutes_denoiser)
    evaluate(train_denoiser(settings, BaseSize(), vae, tokenizer, work, device, evaluate))
    for name in ("vae_loss", "denoiser_loss"):
        if (work / f"{name}.csv").exists():
            loss_chart(read_loss_log(work / f"{name}.csv")).save(work / f"{name}.png")


if __name__ == "__main__":
    main()
