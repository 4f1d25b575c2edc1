"""Moving averages of any length after training, from snapshots of two (Karras et al. 2024, section 3).

The average of length gamma weighs the parameters theta(tau) of each time by a power,

    p(tau; t, gamma) = (gamma + 1) tau^gamma / t^(gamma + 1),   0 <= tau <= t                                 (1)
    theta_hat <- beta theta_hat + (1 - beta) theta,   beta = (1 - 1/t)^(gamma + 1)                            (2)

whose deviation, as a share of the training, is sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)). Snapshots i of it,
taken at times t_i, are combined so that their weighted profiles come nearest to that of another length: with

    <p_i, p_j> = (gamma_i + 1)(gamma_j + 1) min(t_i, t_j)^(gamma_i + gamma_j + 1)
                 / ((gamma_i + gamma_j + 1) t_i^(gamma_i + 1) t_j^(gamma_j + 1))                              (3)

the weights x solve  sum_j <p_i, p_j> x_j = <p_i, p>  (their appendix C.2, algorithm 3). Two lengths and some ten
snapshots are enough for any length between.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdiff import parallel, stores
from jaxdiff.config import ConfigError
from jaxdiff.io.tensor_files import open_tensors, write_tensors
from jaxdiff.typing import Array, Params


class PowerAverages(NamedTuple):
    """The averages of equation (2), part of the optimizer's state."""

    updates: Array  # [] int32, t: the number of updates
    averages: tuple[Params, ...]  # one for each length


def gamma(sigma: float) -> float:
    """The exponent of the average whose deviation is `sigma` of the training.

    >>> [round(gamma(sigma), 2) for sigma in (0.05, 0.1)]
    [16.97, 6.94]

    Raises:
        ConfigError: sigma is not between 0 and 0.289, the value of a plain mean.
    """
    if not 0 < sigma < 12**-0.5:
        raise ConfigError(f"the length {sigma} of an average must be above 0 and below {12**-0.5:.3f}.")
    return float(np.roots([1, 7, 16 - sigma**-2, 12 - sigma**-2]).real.max())


def track(sigmas: Sequence[float]) -> optax.GradientTransformation:
    """Tracks averages of these lengths and leaves updates unchanged. It must come last in a chain."""
    powers = [gamma(sigma) + 1 for sigma in sigmas]

    def init(params: Params) -> PowerAverages:
        return PowerAverages(jnp.zeros((), jnp.int32), tuple(jax.tree.map(jnp.copy, params) for _ in powers))

    def update(updates: Params, state: PowerAverages, params: Params | None = None) -> tuple[Params, PowerAverages]:
        count = state.updates + 1
        new = optax.apply_updates(params, updates)

        def update_average(average: Params, power: float) -> Params:
            beta = (1 - 1 / count) ** power
            return jax.tree.map(lambda a, p: p + beta * (a - p), average, new)

        return updates, PowerAverages(count, tuple(map(update_average, state.averages, powers)))

    return optax.GradientTransformation(init, update)


class Snapshots:
    """Writes the averages that an optimizer's state holds to `folder`/<updates>.safetensors. A context manager.

    Files are written in the background, one at a time; leaving waits for the last.

    Raises:
        WeightsError: one cannot be written; by the next call, or on leaving.
    """

    def __init__(self, folder: Path, sigmas: Sequence[float]) -> None:
        self._folder, self._sigmas = folder, sigmas
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future | None = None

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(self, kind: Any, *exception: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self._wait()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def lacks(self, opt_state: Any) -> bool:
        """Whether there is no file of these averages, neither here nor in the store that the folder belongs to."""
        path = self._path(_averages(opt_state))
        url = stores.behind(path)
        return not (path.exists() or (url and stores.exists(url)))

    def save(self, opt_state: Any) -> None:
        """Call it on every host; the first one writes."""
        self._wait()
        state = parallel.fetch(_averages(opt_state))
        if jax.process_index() == 0:
            self._writing = self._pool.submit(self._write, state)

    def _write(self, state: PowerAverages) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{sigma}:{path}": np.asarray(value)
            for sigma, average in zip(self._sigmas, state.averages, strict=True)
            for path, value in _flatten(average)
        }
        write_tensors(self._path(state), tensors)

    def _path(self, state: PowerAverages) -> Path:
        return self._folder / f"{int(state.updates)}.safetensors"


def _averages(opt_state: Any) -> PowerAverages:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, PowerAverages))
    return next(x for x in leaves if isinstance(x, PowerAverages))


def _flatten(tree: Params) -> list[tuple[str, Any]]:
    """The arrays of a tree by their paths, such as unet/conv_in/kernel."""
    return [(parallel.path_name(path), value) for path, value in jax.tree_util.tree_leaves_with_path(tree)]


def inner(t: np.ndarray, g: np.ndarray, t_2: np.ndarray, g_2: np.ndarray) -> np.ndarray:
    """Inner products of profiles, equation (3); [I], [I], [J], [J] float64 -> [I, J]."""
    t, g = t[:, None], g[:, None]
    earlier = np.minimum(t, t_2)
    return (g + 1) * (g_2 + 1) / (g + g_2 + 1) * (earlier / t) ** g * (earlier / t_2) ** g_2 * earlier / (t * t_2)


def weights(times: np.ndarray, gammas: np.ndarray, time: float, exponent: float) -> np.ndarray:
    """Weights of the snapshots [N] that combine to the average of this exponent at `time`."""
    times, gammas = np.asarray(times, np.float64), np.asarray(gammas, np.float64)
    products = inner(times, gammas, np.asarray([time], np.float64), np.asarray([exponent]))
    return np.linalg.lstsq(inner(times, gammas, times, gammas), products[:, 0], rcond=None)[0]


def reconstruct(folder: str | Path, sigma: float, params: Params, updates: int | None = None) -> Params:
    """The parameters, with the trained ones replaced by an average of another length (post-hoc EMA).

    Args:
        folder: the snapshots, a run's folder `ema`.
        sigma: standard deviation of the average's profile, as a share of the training.
        params: all parameters of the run; the values of trained ones do not matter.
        updates: number of updates at which the average ends; by default that of the last snapshot.

    Returns:
        The same tree, with trained parameters as float32 numpy arrays.

    Raises:
        ConfigError: there are no snapshots up to there, they do not fit `params`, or `sigma` is out of range.
    """
    files = sorted(Path(folder).glob("*.safetensors"), key=lambda p: int(p.stem))
    files = [p for p in files if updates is None or int(p.stem) <= updates]
    exponent = gamma(sigma)
    if not files:
        raise ConfigError(f"{folder} holds no snapshots of averages: set ema_sigmas when training.")
    sources = [open_tensors(p) for p in files]
    names = sorted({name.split(":")[0] for name in sources[0].shapes})
    times = np.repeat([int(p.stem) for p in files], len(names))
    gammas = np.tile([gamma(float(name)) for name in names], len(sources))
    snapshot_weights = iter(weights(times, gammas, times[-1] if updates is None else updates, exponent))
    averages: dict[str, np.ndarray] = {}
    for source in sources:
        for name in names:
            weight = next(snapshot_weights)
            for tensor in (t for t in source.shapes if t.startswith(f"{name}:")):
                path = tensor.split(":", 1)[1]
                averages[path] = averages.get(path, 0.0) + weight * np.asarray(source.read(tensor), np.float64)
    leaves = [averages.pop(path).astype(np.float32) if path in averages else value for path, value in _flatten(params)]
    if averages:
        raise ConfigError(f"The snapshots of {folder} are of another model: it has no {next(iter(averages))}.")
    return jax.tree.unflatten(jax.tree.structure(params), leaves)
