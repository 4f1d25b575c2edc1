"""How far two outputs are apart, and weights to compare networks on."""

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdiff.io.torch_names import from_torch_layout, tensor_name, to_torch_layout
from tests.support import networks

# Each float32 operation errs by 2**-24 relatively; some hundred in a row, with sums of a hundred terms, give about
# 1e-6. 1e-4 is the bound for a real checkpoint; the small networks have to stay ten times below it.
TOLERANCE = 1e-5


def error(ours, reference) -> float:
    """Relative L2 error."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def shapes_of(module, args):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *args)["params"])


def drawn(module, args):
    """The parameters that the PyTorch network of the same config gets from `networks.draw`."""
    params = {}
    for path, leaf in flatten_dict(shapes_of(module, args)).items():
        shape = to_torch_layout(path, np.broadcast_to(0, leaf.shape)).shape
        params[path] = from_torch_layout(path, networks.draw(tensor_name(path), shape))
    return {"params": unflatten_dict(params)}


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def levels(a, b) -> int:
    """Largest difference of two sets of images, of 255."""
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())
