"""Small, degraded images for training an upscaler: blur, resizing, noise and JPEG, in two rounds.

(Wang et al. 2021, Real-ESRGAN, section 3.)
"""

import dataclasses
import io
import zlib

import numpy as np
from PIL import Image

RADIUS = 7  # of blur kernels, in pixels of the large image
FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
SINC_SHARE = 0.1  # share of blurs that ring, like sharpening
BEST_JPEG = 95
MIN_RESIZE = 0.5  # smallest side after the first round's resizing, as a share of the final one
SECOND = 0.5  # strength of the second round
GREY_NOISE = 0.4  # share of noise that is the same in all channels


@dataclasses.dataclass(frozen=True)
class Degradation:
    """A function from an image uint8 [H, W, 3] to a small, degraded one, uint8 [H / scale, W / scale, 3].

    The result depends only on the seed and the pixels, so that it is the same in every process and after a restart.
    """

    scale: int
    seed: int = 0
    clean: float = 0.3  # share of images that are only resized
    blur: float = 2.0  # maximum standard deviation of a kernel, in pixels of the large image
    noise: float = 0.06  # maximum standard deviation, for values in [0, 1]
    jpeg: int = 40  # minimum quality
    second: float = 0.5  # share of degraded images that go through a second round

    def __call__(self, image: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng([self.seed, zlib.crc32(np.ascontiguousarray(image).tobytes())])
        size = image.shape[1] // self.scale, image.shape[0] // self.scale
        if rng.random() < self.clean:
            return np.asarray(Image.fromarray(image).resize(size, FILTERS[rng.integers(1, len(FILTERS))]))
        x = self._degrade(image, rng, 1.0, size)
        if rng.random() < self.second:
            x = self._degrade(x, rng, SECOND, size)
        # The last resizing comes before or after the last compression.
        if rng.random() < 0.5:
            return self._compress(resize(x, rng, size), rng)
        return resize(self._compress(x, rng), rng, size)

    def _degrade(self, x: np.ndarray, rng: np.random.Generator, strength: float, size: tuple[int, int]) -> np.ndarray:
        """One round of blur, resizing, noise and JPEG."""
        x = blur(x, random_kernel(rng, strength * self.blur))
        min_factor, max_factor = MIN_RESIZE * size[0] / x.shape[1], 1.2
        factor = np.exp(rng.uniform(np.log(min(max(min_factor, 0.05), 1.0)), np.log(max_factor)))
        width, height = (max(n // 2, round(side * factor)) for n, side in zip(size, x.shape[1::-1], strict=True))
        x = resize(x, rng, (width, height))
        return self._compress(add_noise(x, rng, strength * self.noise), rng)

    def _compress(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Encode and decode as JPEG."""
        file = io.BytesIO()
        Image.fromarray(x).save(file, format="jpeg", quality=int(rng.integers(self.jpeg, BEST_JPEG + 1)))
        return np.asarray(Image.open(file).convert("RGB"))


def resize(x: np.ndarray, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Resize to (width, height) by a random filter."""
    return np.asarray(Image.fromarray(x).resize(size, FILTERS[rng.integers(len(FILTERS))]))


def random_kernel(rng: np.random.Generator, max_sigma: float) -> np.ndarray:
    """A blur kernel [2 RADIUS + 1] * 2 of sum 1: a rotated Gaussian, or a low-pass filter that rings."""
    y, x = np.mgrid[-RADIUS : RADIUS + 1, -RADIUS : RADIUS + 1].astype(np.float64)
    if rng.random() < SINC_SHARE:
        cutoff = rng.uniform(0.3, 0.9)  # of the highest frequency
        weights = np.sinc(cutoff * x) * np.sinc(cutoff * y)
    else:
        sigma_u, sigma_v = rng.uniform(0.1, max(max_sigma, 0.1), 2)
        angle = rng.uniform(0, np.pi)
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        weights = np.exp(-0.5 * ((u / sigma_u) ** 2 + (v / sigma_v) ** 2))
    return weights / weights.sum()


def blur(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve an image uint8 [H, W, 3], mirrored at its border, with a kernel."""
    padded = np.pad(x.astype(np.float64), ((RADIUS, RADIUS), (RADIUS, RADIUS), (0, 0)), "reflect")
    size = padded.shape[:2]
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel, size)[..., None]
    return to_uint8(np.fft.irfft2(spectrum, size, axes=(0, 1))[2 * RADIUS :, 2 * RADIUS :])


def add_noise(x: np.ndarray, rng: np.random.Generator, max_deviation: float) -> np.ndarray:
    """Add Gaussian noise, or an approximation of shot noise, which grows with brightness."""
    deviation = 255.0 * rng.uniform(0, max_deviation)
    shape = (*x.shape[:2], 1 if rng.random() < GREY_NOISE else 3)
    noise = deviation * rng.standard_normal(shape)
    if rng.random() < 0.5:
        noise = noise * np.sqrt(x / 255.0)
    return to_uint8(x + noise)


def to_uint8(x: np.ndarray) -> np.ndarray:
    return np.clip(np.round(x), 0, 255).astype(np.uint8)
