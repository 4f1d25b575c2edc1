"""Whatever a file or prompt holds, reading it ends in a result or in one of the project's own sentences."""

import base64
import contextlib
import dataclasses
import inspect
import io
import json
import pickle
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from jaxdiff.cli.errors import UsageError
from jaxdiff.cli.flags import parse
from jaxdiff.config import ControlNetConfig, SchedulerConfig
from jaxdiff.diffusion.times import default_scheduler, time_grid
from jaxdiff.errors import JaxdiffError
from jaxdiff.io import taesd
from jaxdiff.io.configs import NETWORKS, VAES, read_config
from jaxdiff.io.controlnet import PREFIXES, check_controlnet
from jaxdiff.io.diffusers_folder import model_index, read_index
from jaxdiff.io.embedding_images import CHUNK, open_image_embedding
from jaxdiff.io.infer_config import Shapes, as_weights_error, detect, infer_configs
from jaxdiff.io.infer_diffusers import controlnet_config, controlnet_shapes, vae_from_names
from jaxdiff.io.lora import read_lora
from jaxdiff.io.pickles import GLOBALS
from jaxdiff.io.tensor_files import TensorSource, named_tensors, open_tensors
from jaxdiff.io.textual_inversion import read_textual_inversion
from jaxdiff.io.vae import check_tiny_vae, check_vae
from jaxdiff.models.controlnet import ControlNet, example_inputs
from jaxdiff.models.model import Model
from jaxdiff.text.chunks import tokens
from jaxdiff.text.prompt_files import read_prompts
from jaxdiff.text.styles import read_styles
from jaxdiff.text.tokenizer import Tokenizer
from jaxdiff.text.wildcards import expand
from jaxdiff.typing import Params
from tests.support import tiny as small
from tests.support.comparison import drawn
from tests.support.published import tensors_of

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

EXAMPLES = 10  # of each kind in `make test`
MINUTES = 10  # of all kinds in `make test-all`

# What the readers know, so that the guesses come far.
WORDS = (  # noqa: SIM905
    "model.diffusion_model input_blocks output_blocks middle_block down_blocks up_blocks mid_block first_stage_model "
    "encoder decoder conv_in conv_out cond_stage_model.transformer.text_model cond_stage_model.model conditioner "
    "embedders embeddings token_embedding position_embedding layers resblocks attentions transformer_blocks attn1 "
    "to_q to_out.0 proj_in resnets conv1 in_layers.2 out_layers.3 0.op label_emb.0.0 lora_unet lora_te lora_down "
    "lora_up lora_A lora_B alpha dora_scale control_model input_hint_block controlnet_cond_embedding zero_convs "
    "adapter body string_to_param clip_l clip_g emb_params taesd model_ema text_projection weight bias 0 1 2 17 "
).split()
number = st.one_of(st.integers(-3, 3), st.integers(), st.floats(), st.sampled_from([0, 2**31, 2**63, 10**30, 1e300]))
text = st.one_of(st.text(max_size=12), st.sampled_from(WORDS), st.sampled_from(["1000", "true", "null", "\0", "../x"]))
value = st.recursive(
    st.one_of(st.none(), st.booleans(), number, text),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(text, inner, max_size=3)),
    max_leaves=8,
)
name = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=4)), min_size=1, max_size=6).map(".".join)
shape = st.lists(st.integers(0, 9), max_size=5)


def rewritten(base: dict) -> st.SearchStrategy:
    """A dictionary with some values replaced, some keys left out, and some new."""
    changed = st.dictionaries(st.sampled_from(sorted(base)), value, max_size=3)
    removed = st.sets(st.sampled_from(sorted(base)), max_size=2)
    more = st.dictionaries(text, value, max_size=2)
    return st.builds(
        lambda c, r, m: {k: v for k, v in {**base, **m, **c}.items() if k not in r}, changed, removed, more
    )


def damaged(content: bytes) -> st.SearchStrategy:
    """Bytes with some of them replaced, and perhaps an end missing."""
    places = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)

    def apply(changes: list, end: int) -> bytes:
        found = bytearray(content)
        for at, byte in changes:
            found[at] = byte
        return bytes(found[:end])

    return st.builds(apply, places, st.one_of(st.just(len(content)), st.integers(0, len(content))))


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


# Readers of a file of tensors, whatever it is.


def read_all(path: Path) -> None:
    source = open_tensors(path)
    for tensor in source.shapes:
        source.read(tensor)
    interpret(source)


def interpret(source: TensorSource) -> None:
    """Ask every reader of names and shapes what it makes of them."""
    readers = [
        lambda: infer_configs(source, detect(source)),
        lambda: infer_configs(source, "sdxl"),
        lambda: vae_from_names(source),
        lambda: controlnet_config(source, controlnet_shapes(source)),
        *(lambda p=p: controlnet_config(source, Shapes(source, p)) for p in PREFIXES),
        lambda: tiny_vae(source),
    ]
    for reader in readers:
        survive(reader)


def tiny_vae(source: TensorSource) -> None:
    with as_weights_error(source):
        taesd.infer_config(source)


def survive(action, *args) -> None:
    """Run it; one of the project's own errors is as good as a result."""
    with contextlib.suppress(JaxdiffError):
        action(*args)


def entries(dtypes=("F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "C64", "U16")):
    offsets = st.tuples(st.integers(-1, 40), st.integers(0, 64)).map(list)
    entry = st.fixed_dictionaries({"dtype": st.sampled_from(dtypes), "shape": shape, "data_offsets": offsets})
    whole = st.fixed_dictionaries({"dtype": st.just("F32"), "shape": st.just([4]), "data_offsets": st.just([0, 16])})
    return st.one_of(entry, whole, value)


header = st.dictionaries(st.one_of(name, st.just("__metadata__")), entries(), max_size=4).map(json.dumps)


def safetensors(head: str, end: bytes, length: int, path: Path) -> None:
    head_bytes = head.encode()
    content = struct.pack("<Q", max(0, len(head_bytes) + length)) + head_bytes + end
    for suffix in (".safetensors", ".ckpt"):
        survive(read_all, written(path.with_suffix(suffix), content))


class Known:
    """Names and shapes of the files that the readers know, made once."""

    def __init__(self, model: Model, params: Params) -> None:
        self.model, self.params = model, params
        hints = {"conditioning_embedding_out_channels": (8, 16)}
        net = ControlNet(ControlNetConfig.from_dict(dataclasses.asdict(model.unet.config) | hints))
        controlnet = drawn(net, example_inputs(net.config))["params"]
        self.files = [
            {n: x.shape for n, x in tensors_of(self.model, self.params).items()},
            {n: x.shape for n, x in named_tensors(self.params["vae"])},
            {n: x.shape for n, x in named_tensors(controlnet)},
        ]

    def shapes(self) -> st.SearchStrategy:
        """The shapes of such a file, some of them others, some missing, and some of other names beside."""

        def changed(base: dict) -> st.SearchStrategy:
            names = st.sampled_from(sorted(base))
            parts = st.dictionaries(names, shape, max_size=3), st.sets(names, max_size=3), st.dictionaries(name, shape)
            return st.builds(lambda c, r, m: {k: v for k, v in {**base, **c, **m}.items() if k not in r}, *parts)

        return st.one_of(st.dictionaries(name, shape, max_size=12), *map(changed, self.files))


@pytest.fixture(scope="module")
def known(tiny):
    return Known(*tiny)


def tensor_names(shapes: dict, path: Path, known: Known) -> None:
    save_file({n: np.zeros(s, np.float32) for n, s in shapes.items()}, path.with_suffix(".safetensors"))
    source = open_tensors(path.with_suffix(".safetensors"))
    interpret(source)
    for check in (check_controlnet, check_vae, check_tiny_vae):
        survive(check, source.path)
    survive(read_lora, known.model, source.path)
    survive(read_textual_inversion, known.model, [(source.path, None)])


def pickled(content: bytes, path: Path) -> None:
    survive(read_all, written(path.with_suffix(".bin"), content))


def zipped(program: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", bytes(16))
    return data.getvalue()


def programs() -> st.SearchStrategy:
    """Programs of pickles: plain values, damaged ones, and instructions as they come."""
    codes = [c.encode("latin-1") for c in map(chr, range(256))]
    globals_ = [b"c" + b"\n".join(n.rpartition(".")[::2][i].encode() for i in (0, 1)) + b"\n" for n in GLOBALS]
    short = st.text(max_size=3).map(lambda s: b"X" + struct.pack("<I", len(s.encode())) + s.encode())
    one = st.one_of(st.sampled_from(codes), st.sampled_from(globals_), short, st.sampled_from([b"}", b"(", b"t", b"R"]))
    loose = st.lists(one, max_size=25).map(lambda parts: b"\x80\x02" + b"".join(parts) + b".")
    values = value.map(lambda v: pickle.dumps({"a": v}, 2))
    honest = pickle.dumps({"state_dict": {"a": [1, 2.0, None, ("b",)]}, "epoch": 3}, 4)
    return st.one_of(loose, values, damaged(honest))


def archives() -> st.SearchStrategy:
    start = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    legacy = programs().map(lambda p: start + p + pickle.dumps([], 2))
    return st.one_of(programs().map(zipped), legacy, damaged(zipped(pickle.dumps({"a": 1}, 2))), st.binary(max_size=60))


def png_metadata(content: str, path: Path) -> None:
    info = PngInfo()
    info.add_text("jaxdiff", content)
    Image.new("RGB", (1, 1)).save(path.with_suffix(".png"), pnginfo=info)
    survive(parse, ["sample.py", f"--from_png={path.with_suffix('.png')}"])


def png_embedding(content: bytes | dict, damage: int, path: Path) -> None:
    """What the web UI writes into a PNG, or something like it, with a byte of the file changed."""
    info = PngInfo()
    held = content if isinstance(content, bytes) else json.dumps(content).encode()
    info.add_text(CHUNK, base64.b64encode(held).decode(), zip=bool(damage % 2))
    file = path.with_suffix(".png")
    Image.new("RGB", (1, 1)).save(file, pnginfo=info)
    whole = bytearray(file.read_bytes())
    if damage:
        whole[damage % len(whole)] ^= 1 + damage % 255
    source, word = open_image_embedding(written(file, bytes(whole)))
    assert word
    for tensor in source.shapes:
        assert list(source.read(tensor).shape) == source.shapes[tensor]


numbers = st.recursive(number, lambda inner: st.lists(inner, max_size=3), max_leaves=9)
embedding = rewritten(
    {"string_to_param": {"*": {"TORCHTENSOR": [[0.5, 1.0]]}}, "string_to_token": {"*": 265}, "name": "cat"}
)
tensor = st.builds(lambda x, n: {"string_to_param": {"*": {"TORCHTENSOR": x}}, "name": n}, numbers, value)

FLAGS = (  # noqa: SIM905
    "prompt negative_prompt seed steps lora controlnet control_image guidance_interval outpaint image hires "
).split()
metadata = st.one_of(
    st.dictionaries(st.one_of(st.sampled_from(FLAGS), text), value, max_size=5).map(json.dumps),
    value.map(json.dumps),
    st.text(max_size=20),
).map(lambda s: s.encode("utf-8", "replace").decode())
marks = st.sampled_from([*"()[]{}|\\:_,<> ", "__a__", "BREAK", "(a:1.3)", "(a:nan)", "(a:1e99)", "cat"])
prompt = st.lists(st.one_of(marks, st.text(max_size=5)), max_size=14).map("".join)


def read_prompt(words: str, known: Known) -> None:
    survive(expand, words)
    survive(tokens, known.model, [words])


def prompts_file(content: str, path: Path) -> None:
    for suffix in (".txt", ".jsonl"):
        survive(read_prompts, written(path.with_suffix(suffix), content))
    survive(read_styles, written(path.with_suffix(".json"), content))


lines = st.lists(
    st.one_of(prompt, value.map(json.dumps), st.fixed_dictionaries({"prompt": prompt, "seed": value}).map(json.dumps)),
    max_size=4,
).map("\n".join)


def scheduler_config(values: dict, path: Path) -> None:
    config = SchedulerConfig.load(written(path.with_suffix(".json"), json.dumps(values)))
    try:
        time_grid(config, 4, default_scheduler(config))
    except ValueError as e:  # as the command does
        raise UsageError(str(e)) from None


def network_config(values: dict, path: Path) -> None:
    written(path.with_suffix(".json"), json.dumps(values))
    for classes in (*((cls,) for cls in NETWORKS.values()), VAES, (ControlNetConfig,)):
        survive(read_config, path.with_suffix(".json"), *classes)


def index(values: dict, path: Path) -> None:
    written(path.parent / "model_index.json", json.dumps(values))
    read_index(path.parent)


def tokenizer_files(config: dict, words: object, path: Path) -> None:
    small.tokenizer().save(path.parent / "tokenizer")
    written(path.parent / "tokenizer/tokenizer_config.json", json.dumps(config))
    survive(Tokenizer.load, path.parent / "tokenizer")
    written(path.parent / "tokenizer/vocab.json", json.dumps(words))
    survive(Tokenizer.load, path.parent / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (path.parent / "tokenizer" / name).unlink()
    written(path.parent / "tokenizer/tokenizer.json", json.dumps({"model": words}))
    survive(Tokenizer.load, path.parent / "tokenizer")


VOCABULARY = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "b": 3, "ab": 4}
TOKENIZER = {"bos_token": "<|startoftext|>", "eos_token": {"content": "<|endoftext|>"}, "model_max_length": 77}


KINDS = {  # what is made up -> strategies of its parts, and what reads it
    "safetensors": lambda known: (
        (header, st.binary(max_size=40), st.sampled_from([0, 0, 0, -3, 5, 2**40])),
        safetensors,
    ),
    "tensor names": lambda known: ((known.shapes(),), tensor_names),
    "pickles": lambda known: ((archives(),), pickled),
    "PNG metadata": lambda known: ((metadata,), png_metadata),
    "embeddings in PNGs": lambda known: (
        (st.one_of(embedding, tensor, st.binary(max_size=30)), st.one_of(st.just(0), st.integers(0, 2**20))),
        png_embedding,
    ),
    "prompts": lambda known: ((prompt,), read_prompt),
    "prompt files": lambda known: ((st.one_of(lines, value.map(json.dumps), st.text()),), prompts_file),
    "scheduler configs": lambda known: (
        (rewritten(dataclasses.asdict(small.SCHEDULER) | {"_class_name": "DDIMScheduler"}),),
        scheduler_config,
    ),
    "network configs": lambda known: (
        (st.one_of(*(rewritten(module.config.to_dict()) for module in known.model.modules.values())),),
        network_config,
    ),
    "tokenizer files": lambda known: (
        (
            rewritten(TOKENIZER),
            st.one_of(rewritten(VOCABULARY), rewritten({"vocab": VOCABULARY, "merges": ["a b", ["a", "b"]]}), value),
        ),
        tokenizer_files,
    ),
    "model indices": lambda known: ((rewritten(model_index(known.model)),), index),
}


def fuzz(kind: str, known: Known, folder: Path, examples: int, seed: int) -> None:
    strategies, read = KINDS[kind](known)
    more = {"known": known, "path": folder / "x"}
    more = {n: x for n, x in more.items() if n in inspect.signature(read).parameters}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(st.tuples(*strategies))
    def check(given):
        survive(lambda: read(*given, **more))

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_ends_in_a_result_or_a_sentence(kind, known, tmp_path):
    fuzz(kind, known, tmp_path, EXAMPLES, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_input_of_many_minutes_ends_in_a_result_or_a_sentence(kind, known, tmp_path):
    end, seed = time.monotonic() + 60 * MINUTES / len(KINDS), 0
    while time.monotonic() < end:
        seed += 1
        fuzz(kind, known, tmp_path, 200, seed)
