"""Effects that repaint a drawing in another style, alpha included: RGBA [S, S, 4] uint8 -> the same.

They are deterministic: irregularities of paint and paper come from a generator that the caller seeds.
"""

import cv2
import numpy as np
from PIL import Image

Pixels = np.ndarray  # [S, S, 4] uint8, straight (not premultiplied) alpha


def _on_white(image: Pixels) -> np.ndarray:
    """[S, S, 3] uint8: the drawing on white paper."""
    alpha = image[..., 3:].astype(np.float32) / 255
    return np.round(image[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def _with_alpha(rgb: np.ndarray, alpha: np.ndarray) -> Pixels:
    """Join colours [S, S, 3] and alpha [S, S] in [0, 255]. Fully transparent pixels become 0, which compresses well."""
    image = np.dstack([rgb, alpha])
    image = np.clip(np.round(image), 0, 255).astype(np.uint8)
    image[image[..., 3] == 0] = 0
    return image


def _clouds(rng: np.random.Generator, size: int, scale: float) -> np.ndarray:
    """Smooth noise [size, size] of mean 0 and unit deviation whose features are `scale` pixels wide."""
    noise = cv2.GaussianBlur(rng.standard_normal((size, size)).astype(np.float32), (0, 0), scale)
    return (noise - noise.mean()) / (noise.std() + 1e-6)


def watercolor(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Washes with wobbly, darker rims, pigment that pools, and paper grain."""
    size = image.shape[0]
    unit = size / 128
    grid = np.indices((size, size), dtype=np.float32)
    distorted = [grid[i] + 1.3 * unit * _clouds(rng, size, 4 * unit) for i in (0, 1)]
    warped = cv2.remap(np.dstack([_on_white(image), image[..., 3]]), distorted[1], distorted[0], cv2.INTER_LINEAR)
    alpha = cv2.GaussianBlur(warped[..., 3], (0, 0), 0.8 * unit)
    wash = cv2.edgePreservingFilter(np.ascontiguousarray(warped[..., :3]), flags=1, sigma_s=12 * unit, sigma_r=0.5)
    wash = wash.astype(np.float32) / 255
    # Where pigment is thin or thick, colours move towards or away from the paper's white.
    density = 0.88 + 0.12 * _clouds(rng, size, 7 * unit) + 0.04 * _clouds(rng, size, 0.7 * unit)
    rim = cv2.GaussianBlur(alpha, (0, 0), 2.5 * unit).astype(np.float32) / 255
    density += 0.5 * (1 - rim)
    wash = np.clip(wash, 0.02, 1) ** np.clip(density, 0.45, 1.7)[..., None]
    return _with_alpha(255 * wash, alpha)


def _spread(image: Pixels, reach: int) -> np.ndarray:
    """[S, S, 3] uint8: the drawing's colours extended by `reach` pixels, so that no white mixes in at its rim."""
    alpha = image[..., 3:].astype(np.float32) / 255
    blurred_alpha = cv2.GaussianBlur(alpha, (0, 0), reach / 2)[..., None]
    blurred_color = cv2.GaussianBlur(image[..., :3] * alpha, (0, 0), reach / 2) / np.maximum(blurred_alpha, 1e-3)
    return np.clip(image[..., :3] * alpha + blurred_color * (1 - alpha), 0, 255).astype(np.uint8)


def _stroke(rng: np.random.Generator, length: int) -> np.ndarray:
    """[length, length]: a line of sum 1 through the centre, in a random direction."""
    angle = rng.uniform(0, np.pi)
    half = (length // 2) * np.array([np.cos(angle), np.sin(angle)])
    ends = [tuple(int(v) for v in np.round(length // 2 + sign * half)) for sign in (-1, 1)]
    kernel = cv2.line(np.zeros((length, length), np.float32), ends[0], ends[1], 1.0)
    return kernel / kernel.sum()


def oil(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Thick strokes of few colours that stand out in relief, on a woven canvas."""
    size = image.shape[0]
    unit = size / 128
    radius = max(2, round(3 * unit))
    painted = cv2.xphoto.oilPainting(_spread(image, 2 * radius), radius, 1)
    alpha = cv2.medianBlur(np.ascontiguousarray(image[..., 3]), 2 * (radius // 2) + 3)
    # Strokes: noise smeared along a direction, lit from one side.
    strokes = cv2.filter2D(rng.standard_normal((size, size)).astype(np.float32), -1, _stroke(rng, int(9 * unit) | 1))
    relief = strokes - np.roll(strokes, (1, 1), (0, 1))
    y, x = np.indices((size, size))
    weave = np.sin(np.pi * x / (1.5 * unit)) * np.sin(np.pi * y / (1.5 * unit))
    lit = painted + (6 * relief / (relief.std() + 1e-6) + 4 * weave)[..., None]
    return _with_alpha(lit, alpha)


def pencil(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Graphite lines and hatched shading on white paper inside the drawing's outline."""
    size = image.shape[0]
    unit = size / 128
    gray = cv2.cvtColor(_on_white(image), cv2.COLOR_RGB2GRAY).astype(np.float32)
    lines = np.minimum(255, gray * 255 / (cv2.GaussianBlur(gray, (0, 0), 3 * unit) + 1))
    grain = rng.standard_normal((size, size)).astype(np.float32)
    kernel = np.eye(int(7 * unit) | 1, dtype=np.float32)[::-1]
    hatch = cv2.filter2D(grain, -1, kernel / kernel.sum())
    shade = 1 - (255 - gray) / 255 * (0.42 + 0.75 * hatch)
    graphite = lines * np.clip(shade, 0.25, 1)
    edge = cv2.morphologyEx(image[..., 3], cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8)).astype(np.float32)
    graphite = np.minimum(graphite, 255 - 0.75 * edge)
    return _with_alpha(np.repeat(graphite[..., None], 3, 2), image[..., 3])


def pixel(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Square blocks, 32 to a side, of at most 16 colours."""
    del rng
    size = image.shape[0]
    small = Image.fromarray(image).resize((32, 32), Image.Resampling.BOX)
    alpha = np.where(np.asarray(small)[..., 3] >= 128, 255, 0).astype(np.uint8)
    colors = small.convert("RGB").quantize(16, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    blocks = _with_alpha(np.asarray(colors), alpha)
    return np.asarray(Image.fromarray(blocks).resize((size, size), Image.Resampling.NEAREST))


def line(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Black ink lines along the edges, white inside (an extended difference of Gaussians)."""
    del rng
    size = image.shape[0]
    unit = size / 128
    rgb = cv2.bilateralFilter(np.ascontiguousarray(_on_white(image)), 5, 40, 3 * unit).astype(np.float32)
    edges = np.zeros((size, size), np.float32)
    for channel in (rgb[..., 0], rgb[..., 1], rgb[..., 2], image[..., 3].astype(np.float32)):
        edges = np.maximum(edges, cv2.morphologyEx(channel, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)))
    ink = np.clip((cv2.GaussianBlur(edges, (0, 0), 0.6 * unit) - 22) / 25, 0, 1)
    return _with_alpha(np.repeat(255 * (1 - ink)[..., None], 3, 2), image[..., 3])


def fill(image: Pixels, color: tuple[int, int, int]) -> Pixels:
    """The drawing's alpha filled with one sRGB colour: a silhouette, or a one-colour drawing in another colour."""
    return _with_alpha(np.broadcast_to(np.array(color, np.float32), (*image.shape[:2], 3)), image[..., 3])


def tint(image: Pixels, color: tuple[int, int, int]) -> Pixels | None:
    """The drawing with its main colour changed to another; white, black and other colours stay as they are.

    Returns:
        None when it has no main colour, or has that one already.
    """
    solid = image[..., 3] > 128
    lab = cv2.cvtColor(image[..., :3].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)  # L in [0, 100], a and b about 0
    target = cv2.cvtColor(np.array([[color]], np.float32) / 255, cv2.COLOR_RGB2LAB)[0, 0]
    chroma = np.hypot(lab[..., 1], lab[..., 2])
    hue = np.arctan2(lab[..., 2], lab[..., 1])
    vivid = solid & (chroma > 15)
    if vivid.sum() < 0.5 * solid.sum():
        return None
    # The main hue: the circular mean, weighted by chroma, about the fullest of 24 bins.
    bins = np.histogram(hue[vivid], 24, (-np.pi, np.pi), weights=chroma[vivid])[0]
    peak = (bins.argmax() + 0.5) / 24 * 2 * np.pi - np.pi
    main = vivid & (np.abs(_angle(hue - peak)) < np.pi / 5)
    if main.sum() < 0.5 * solid.sum():
        return None
    main_color = np.array([np.median(lab[..., i][main]) for i in range(3)])
    if np.linalg.norm(main_color - target) < 45:  # perceptually the same colour
        return None
    # 1 near the main hue, fading out to both sides, so that no seam shows.
    weights = np.clip((np.pi / 3.2 - np.abs(_angle(hue - peak))) / (np.pi / 9), 0, 1) * np.clip((chroma - 8) / 10, 0, 1)
    gain = min(np.hypot(*target[1:]) / max(np.hypot(*main_color[1:]), 1), 3)
    towards = np.arctan2(target[2], target[1])
    changed = np.dstack(
        [lab[..., 0] + 0.85 * (target[0] - main_color[0]), *(gain * chroma * f(towards) for f in (np.cos, np.sin))]
    )
    changed[..., 0] = np.clip(changed[..., 0], 3, 97)
    mixed = lab + weights[..., None] * (changed - lab)
    rgb = cv2.cvtColor(mixed.astype(np.float32), cv2.COLOR_LAB2RGB)
    return _with_alpha(255 * np.clip(rgb, 0, 1), image[..., 3])


def _angle(radians: np.ndarray) -> np.ndarray:
    """The same angles within [-pi, pi)."""
    return (radians + np.pi) % (2 * np.pi) - np.pi


EFFECTS = {"watercolor": watercolor, "oil": oil, "pencil": pencil, "pixel": pixel, "line": line}
