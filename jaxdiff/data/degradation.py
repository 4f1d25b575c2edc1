"""Small, damaged images to learn enlarging from: blur, resizing, noise and JPEG, in two rounds.

(Wang et al. 2021, Real-ESRGAN, section 3: what a photograph has gone through before anybody enlarges it.)
"""

import dataclasses
import io
import zlib

import numpy as np
from PIL import Image

RADIUS = 7  # of blur kernels, in pixels of the large image
FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
SINC = 0.1  # share of blurs that ring, as sharpened images do
BEST_JPEG = 95
SMALLEST = 0.5  # what the first round's resizing leaves of a side, of the size wanted
SECOND = 0.5  # strength of the second round
GREY = 0.4  # share of noises that are the same in all channels


@dataclasses.dataclass(frozen=True)
class Degradation:
    """A function from an image uint8 [H, W, 3] to a small, degraded one, uint8 [H / scale, W / scale, 3].

    The result depends only on the seed and the pixels, so that it is the same in every process and after a restart.
    """

    scale: int
    seed: int = 0
    clean: float = 0.3  # share of images that are only resized
    blur: float = 2.0  # the widest kernel's deviation, in pixels of the large image
    noise: float = 0.06  # the highest deviation, of a range of 1
    jpeg: int = 40  # the lowest quality
    second: float = 0.5  # share of damaged images that go through a second round

    def __call__(self, image: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng([self.seed, zlib.crc32(np.ascontiguousarray(image).tobytes())])
        size = image.shape[1] // self.scale, image.shape[0] // self.scale
        if rng.random() < self.clean:
            return np.asarray(Image.fromarray(image).resize(size, FILTERS[rng.integers(1, len(FILTERS))]))
        x = self.damaged(image, rng, 1.0, size)
        if rng.random() < self.second:
            x = self.damaged(x, rng, SECOND, size)
        # The last resizing before or after the last compression.
        if rng.random() < 0.5:
            return self.compressed(resized(x, rng, size), rng)
        return resized(self.compressed(x, rng), rng, size)

    def damaged(self, x: np.ndarray, rng: np.random.Generator, strength: float, size: tuple[int, int]) -> np.ndarray:
        """One round of blur, resizing, noise and JPEG."""
        x = blurred(x, kernel(rng, strength * self.blur))
        least, most = SMALLEST * size[0] / x.shape[1], 1.2
        factor = np.exp(rng.uniform(np.log(min(max(least, 0.05), 1.0)), np.log(most)))
        x = resized(
            x, rng, (max(size[0] // 2, round(x.shape[1] * factor)), max(size[1] // 2, round(x.shape[0] * factor)))
        )
        return self.compressed(noisy(x, rng, strength * self.noise), rng)

    def compressed(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Through a JPEG file."""
        file = io.BytesIO()
        Image.fromarray(x).save(file, format="jpeg", quality=int(rng.integers(self.jpeg, BEST_JPEG + 1)))
        return np.asarray(Image.open(file).convert("RGB"))


def resized(x: np.ndarray, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """At (width, height), by one of several filters."""
    return np.asarray(Image.fromarray(x).resize(size, FILTERS[rng.integers(len(FILTERS))]))


def kernel(rng: np.random.Generator, widest: float) -> np.ndarray:
    """A blur: a Gaussian of any direction, or a low-pass filter that rings. [2 RADIUS + 1] * 2, of sum 1."""
    y, x = np.mgrid[-RADIUS : RADIUS + 1, -RADIUS : RADIUS + 1].astype(np.float64)
    if rng.random() < SINC:
        cutoff = rng.uniform(0.3, 0.9)  # of the highest frequency
        weights = np.sinc(cutoff * x) * np.sinc(cutoff * y)
    else:
        wide, narrow = rng.uniform(0.1, max(widest, 0.1), 2)
        angle = rng.uniform(0, np.pi)
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        weights = np.exp(-0.5 * ((u / wide) ** 2 + (v / narrow) ** 2))
    return weights / weights.sum()


def blurred(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] under a kernel; beyond its border the image is mirrored."""
    padded = np.pad(x.astype(np.float64), ((RADIUS, RADIUS), (RADIUS, RADIUS), (0, 0)), "reflect")
    size, (h, w) = padded.shape[:2], x.shape[:2]
    found = np.fft.irfft2(np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel, size)[..., None], size, axes=(0, 1))
    return as_bytes(found[2 * RADIUS : 2 * RADIUS + h, 2 * RADIUS : 2 * RADIUS + w])


def noisy(x: np.ndarray, rng: np.random.Generator, most: float) -> np.ndarray:
    """With Gaussian noise, or that of counted photons, which is stronger where it is brighter."""
    deviation = 255.0 * rng.uniform(0, most)
    shape = (*x.shape[:2], 1 if rng.random() < GREY else 3)
    noise = deviation * rng.standard_normal(shape)
    if rng.random() < 0.5:
        noise = noise * np.sqrt(x / 255.0)
    return as_bytes(x + noise)


def as_bytes(x: np.ndarray) -> np.ndarray:
    return np.clip(np.round(x), 0, 255).astype(np.uint8)
