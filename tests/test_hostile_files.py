"""Files of tensors that are hostile or damaged: refused, and nothing of them is run."""

import contextlib
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.errors import WeightsError
from jaxdiff.io.pickles import GLOBALS
from jaxdiff.io.tensor_files import open_tensors
from tests.support.written import entry, safetensors

# Hostile pickles.


def torch_zip(program: bytes, storages: dict[str, bytes] | None = None, compression=zipfile.ZIP_STORED) -> bytes:
    """A file as PyTorch writes it, with a program of ours."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        for key, content in (storages or {"0": bytes(16)}).items():
            archive.writestr(f"archive/data/{key}", content)
    return data.getvalue()


def tensor_program(*, offset=0, shape=(4,), strides=(1,), count=4, key="0") -> bytes:
    """The program of {"x": a tensor of float32}, which may lie about its storage."""

    def short(text):
        return b"X" + struct.pack("<I", len(text)) + text.encode()

    def number(n):
        return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + short("storage") + b"ctorch\nFloatStorage\n" + short(key) + short("cpu") + number(count) + b"tQ"
    arguments = b"(" + storage + number(offset) + numbers(shape) + numbers(strides) + b"\x89}t"
    return b"\x80\x02}" + short("x") + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


class Runs:
    """Pickled, it calls a function when it is read."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class State:
    """Pickled, it calls what its class says with a state."""

    def __reduce__(self):
        return (list, (), {"state": Runs(os.system, "touch ran")})


def programs() -> dict[str, bytes]:
    touch = "__import__('pathlib').Path('ran').touch()"
    spoilt = b"\x80\x02ccollections\nOrderedDict\n}X\x08\x00\x00\x00__code__Nsb."  # sets an attribute of a function
    return {
        "system": pickle.dumps({"x": Runs(os.system, "touch ran")}, 2),
        "eval": pickle.dumps({"x": Runs(eval, touch)}, 2),
        "exec": pickle.dumps({"x": Runs(exec, touch)}, 4),
        "nested": pickle.dumps({"state_dict": {"x": [({"y": Runs(exec, touch)},)]}}, 5),
        "as a key": pickle.dumps({Runs(os.system, "touch ran"): 1}, 3),
        "getattr": pickle.dumps(Runs(getattr, Path("ran"), "touch"), 4),
        "dotted": b"\x80\x04\x8c\x0bcollections\x8c\x1aOrderedDict.fromkeys.x\x93)R."[:-3] + b".",
        "state": pickle.dumps({"x": State()}, 4),
        "instance": b"(S'touch ran'\nios\nsystem\n.",
        "object": b"(cos\nsystem\nS'touch ran'\no.",
        "new object": b"\x80\x02cos\nsystem\nX\x09\x00\x00\x00touch ran\x85\x81.",
        "through numpy": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n.",
        "registered": b"\x80\x02\x82\x01.",
        "spoilt function": spoilt,
        "call of text": b"\x80\x02X\x01\x00\x00\x00a)R.",
        "call of a type": b"\x80\x02ctorch\nFloatStorage\n)R.",
    }


def legacy(program: bytes) -> bytes:
    start = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join([*start, program, pickle.dumps([], 2)])


@pytest.mark.parametrize("kind", programs())
@pytest.mark.parametrize("pack", [torch_zip, legacy])
def test_a_hostile_pickle_is_not_run(kind, pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    path = tmp_path / "x.ckpt"
    path.write_bytes(pack(programs()[kind]))
    with pytest.raises(WeightsError, match=r"x\.ckpt (holds|is damaged)") as error:
        open_tensors(path)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir()) == ["x.ckpt"]
    assert {m for m in set(sys.modules) - modules if not m.startswith("encodings.")} == set()


def test_the_hostile_pickles_would_run(tmp_path, monkeypatch):
    """Python's own reader runs them: the test above tests something."""
    monkeypatch.chdir(tmp_path)
    for kind in ("system", "eval", "exec", "nested", "state", "instance", "object"):
        with contextlib.suppress(TypeError, AttributeError):
            pickle.loads(programs()[kind])
        assert Path("ran").exists(), kind
        Path("ran").unlink()


def test_the_refused_name_is_told(tmp_path):
    (tmp_path / "x.bin").write_bytes(torch_zip(pickle.dumps({"x": Runs(os.system, "true")}, 2)))
    with pytest.raises(WeightsError, match=r"it asks for (posix|nt)\.system, which is not run; .* convert it"):
        open_tensors(tmp_path / "x.bin")


def test_no_name_means_anything_outside_the_reader():
    for name, meaning in GLOBALS.items():
        kind = meaning if isinstance(meaning, type) else type(meaning)
        ours = getattr(meaning, "__module__", kind.__module__)
        assert isinstance(meaning, np.dtype) or ours == "jaxdiff.io.pickles", name


def test_what_lightning_leaves_is_passed_over(tmp_path):
    """The published files of SD 1.x hold the state of a callback, and a number of numpy's."""
    program = b"\x80\x02}(X\x09\x00\x00\x00callbacks}cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
    program += b"cnumpy.core.multiarray\nscalar\n)RsX\x0a\x00\x00\x00state_dict" + tensor_program()[2:-1] + b"u."
    (tmp_path / "x.ckpt").write_bytes(torch_zip(program))
    assert open_tensors(tmp_path / "x.ckpt").shapes == {"x": [4]}


# Damaged files.


def test_tensors_of_containers_in_one_another(tmp_path):
    """A hypernetwork's file holds pairs of dictionaries by number. What stands in two places is read once."""
    torch = pytest.importorskip("torch")
    layer = {"linear.0.weight": torch.zeros(3, 2)}
    torch.save({320: (layer, {"linear.1.weight": torch.zeros(1)}), "again": layer, "step": 1}, tmp_path / "x.pt")
    assert open_tensors(tmp_path / "x.pt").shapes == {"320.0.linear.0.weight": [3, 2], "320.1.linear.1.weight": [1]}
    deep = b"\x80\x02}X\x01\x00\x00\x00a" + b"(" * 5000 + b"l" * 5000 + b"s."
    (tmp_path / "deep.pt").write_bytes(torch_zip(deep))
    with pytest.raises(WeightsError, match="no dictionary of tensors"):
        open_tensors(tmp_path / "deep.pt")


def test_the_honest_tensor_is_read(tmp_path):
    (tmp_path / "x.pt").write_bytes(torch_zip(tensor_program(), {"0": np.arange(4, dtype="<f4").tobytes()}))
    np.testing.assert_array_equal(open_tensors(tmp_path / "x.pt").read("x"), [0, 1, 2, 3])


@pytest.mark.parametrize(
    "lie",
    [
        {"count": 5},  # the member has 4
        {"count": 2**40},
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**62},
        {"shape": (5,)},
        {"shape": (2**40,), "strides": (0,)},  # terabytes out of one number
        {"shape": (2, 2), "strides": (3, 1)},
        {"strides": (2,)},
        {"strides": (-1,)},
        {"shape": (-4,)},
        {"shape": (2, 2), "strides": (1,)},
        {"key": "1"},
        {"key": "../../etc/passwd"},
    ],
    ids=str,
)
def test_tensors_beyond_their_storage(lie, tmp_path):
    (tmp_path / "x.pt").write_bytes(torch_zip(tensor_program(**lie)))
    with pytest.raises(WeightsError, match=r"x\.pt is damaged or not a PyTorch file"):
        open_tensors(tmp_path / "x.pt")


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    """PyTorch compresses nothing: a compressed member is refused before it is read."""
    packed = torch_zip(tensor_program(count=2**24, shape=(2**24,)), {"0": bytes(2**26)}, zipfile.ZIP_DEFLATED)
    assert len(packed) < 2**18
    (tmp_path / "x.ckpt").write_bytes(packed)
    with pytest.raises(WeightsError, match="is a compressed zip file"):
        open_tensors(tmp_path / "x.ckpt")


@pytest.mark.parametrize("pack", [lambda p: torch_zip(p, {"0": bytes(16)}), legacy])
def test_every_truncation_is_refused(pack, tmp_path):
    whole = pack(tensor_program())
    path = tmp_path / "x.ckpt"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"x\.ckpt is damaged|x\.ckpt holds more than tensors"):
            open_tensors(path)


def test_every_changed_byte_is_read_or_refused(tmp_path):
    """A file with any one byte changed gives tensors or one sentence, never another error."""
    path, rng, read, refused = tmp_path / "x.ckpt", np.random.default_rng(0), 0, 0
    for whole in (torch_zip(tensor_program()), legacy(tensor_program())):
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                source = open_tensors(path)
                [source.read(name) for name in source.shapes]
                read += 1
            except WeightsError:
                refused += 1
    assert read  # what is changed in a tensor's own bytes cannot be told
    assert refused


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02X\xff\xff\xff\xffabc.",  # a text of four gigabytes
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"\x80\x02}r\xff\xff\xff\x7f.",  # the two-thousand-millionth thing to remember
        b"\x80\x02)" + b"\x86" * 10,
        b"\x80\x02(" + b"q\x00h\x00\x86" * 60 + b".",
        b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"Ns.",  # a key that takes 2**60 steps to hash
    ],
)
def test_programs_that_want_much(program, tmp_path):
    """Of memory or time: refused at once."""
    (tmp_path / "x.bin").write_bytes(torch_zip(program))
    with pytest.raises(WeightsError):
        open_tensors(tmp_path / "x.bin")


def test_big_endian_is_refused(tmp_path):
    data = io.BytesIO(torch_zip(tensor_program()))
    with zipfile.ZipFile(data, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    (tmp_path / "x.bin").write_bytes(data.getvalue())
    with pytest.raises(WeightsError, match="another byte order"):
        open_tensors(tmp_path / "x.bin")


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_truncated_safetensors(cut, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros((10, 10))}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(WeightsError, match=r"x\.safetensors is damaged or not a safetensors file"):
        open_tensors(path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 8), "b": entry(4, 12)},  # overlapping
        {"a": entry(0, 8), "b": entry(0, 8)},
        {"a": entry(-8, 0)},
        {"a": entry(8, 0)},
        {"a": entry(8, 16)},  # a hole before it
        {"a": entry(0, 8)},  # bytes of no tensor
        {"a": entry(0, 16, (3,))},
        {"a": entry(0, 2**62, (2**60,))},
        {"a": entry(0, 16, (2**33, 2**33))},
    ],
    ids=str,
)
def test_lying_headers_of_safetensors(header, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(safetensors(header))
    with pytest.raises(WeightsError, match=r"x\.safetensors is damaged or not a safetensors file"):
        open_tensors(tmp_path / "x.safetensors")


def test_a_name_twice_in_a_header_is_one_tensor_or_refused(tmp_path):
    one, two = (json.dumps(entry(*at)) for at in ((0, 8), (8, 16)))
    (tmp_path / "x.safetensors").write_bytes(safetensors(f'{{"a": {one}, "a": {two}}}'.encode()))
    with pytest.raises(WeightsError, match=r"x\.safetensors is damaged or not a safetensors file"):
        open_tensors(tmp_path / "x.safetensors")
