"""What students of the tiny model learn from."""

import numpy as np

from jaxdiff.config import SchedulerConfig
from tests.support.tiny import LATENT, tokenizer

ZERO_SNR = SchedulerConfig(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
)  # fmt: skip
FIXED = {"guidance_min": 3.0, "guidance_max": 3.0, "tangent_warmup": 2}
TEXTS = ["a castle", "a red dragon", "a blue house", "blurry"]


def eight() -> dict[str, np.ndarray]:
    """Latents and captions [8, ...]."""
    latents = np.random.default_rng(0).standard_normal((8, *LATENT)).astype(np.float32)
    return {"latents": latents, "tokens": np.asarray(tokenizer()(TEXTS * 2))}
