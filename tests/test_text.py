"""Text to embeddings: equal to what diffusers' pipelines encode, and emphasis and chunks by their rules."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.config import CLIPTextConfig, PipelineOptions
from jaxdiff.io.tensor_files import load_tensors
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.models.model import build, param_shapes
from jaxdiff.models.text_encoding import encode_text as eager_encode_text
from jaxdiff.text.chunks import Tokens, tokens
from jaxdiff.text.emphasis import apply_emphasis
from jaxdiff.text.tokenizer import Tokenizer
from tests.support import tiny

# Float32 rounding of some hundred operations, each with sums of tens of terms: 1e-6, with a margin of ten.
TOLERANCE = 1e-5
PROMPTS = ["a red castle", "blue!", ""]
NEGATIVE = ["blurry", "", "a house"]


def error(ours, reference) -> float:
    """Relative L2 error."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


@pytest.fixture(scope="session")
def openclip_tokenizer(tmp_path_factory) -> Tokenizer:
    """The tiny tokenizer, padding with an exclamation mark as OpenCLIP's does."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "!"}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.pad_id == 0
    return tokenizer


def text_config(**changes) -> CLIPTextConfig:
    return dataclasses.replace(tiny.text_config(), num_hidden_layers=3, **changes)


encode_text = jax.jit(eager_encode_text, static_argnums=0, static_argnames="clip_skip")

SECOND = {"hidden_size": 24, "projection_dim": 20, "with_projection": True, "hidden_act": "gelu"}


@pytest.fixture(scope="session")
def models(openclip_tokenizer):
    """family -> model with the text encoders of that family; the other networks are never run."""
    rest = (tiny.UNET, tiny.VAE)
    second = {"text_2": text_config(**SECOND), "tokenizer_2": openclip_tokenizer}
    plain = {"options": PipelineOptions(force_zeros_for_empty_prompt=False)}
    return {
        "sd1": build(text_config(), *rest, tiny.tokenizer(), tiny.SCHEDULER),
        "sd2": build(text_config(hidden_act="gelu"), *rest, openclip_tokenizer, tiny.SCHEDULER),
        "sdxl": build(text_config(), *rest, tiny.tokenizer(), tiny.SCHEDULER, **second),
        "sdxl_plain": build(text_config(), *rest, tiny.tokenizer(), tiny.SCHEDULER, **second, **plain),
        "sdxl_refiner": build(None, *rest, None, tiny.SCHEDULER, **second, **plain),
    }


def encoders(model) -> dict:
    return {name: module for name, module in model.modules.items() if name.startswith("text_encoder")}


@functools.cache
def random_params(model):
    return {name: p for name, p in tiny.tiny_params(model).items() if name in encoders(model)}


@pytest.fixture(scope="session")
def oracles(models, tmp_path_factory):
    """family -> (encode_prompt of diffusers' pipeline of the same encoders and tokenizers, its weights as params)."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig as Config
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from tests.support import oracle

    made = {}
    for family, model in models.items():
        parts, params = {}, {}
        for name, module in encoders(model).items():
            folder = tmp_path_factory.mktemp(family)
            values = dataclasses.asdict(module.config)
            cls = CLIPTextModelWithProjection if values.pop("with_projection") else CLIPTextModel
            parts[name] = oracle.drawn(cls(Config(**values)))
            params[name] = load_tensors(oracle.save(parts[name], folder), param_shapes(model)[name], jnp.float32)
            tokenizer = name.replace("text_encoder", "tokenizer")
            getattr(model, tokenizer).save(folder / "tokenizer")
            parts[tokenizer] = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        if "text_encoder_2" in parts:
            parts |= {n: None for n in ("text_encoder", "tokenizer") if n not in parts}
            pipe = diffusers.StableDiffusionXLPipeline(
                None,
                **parts,
                unet=None,
                scheduler=None,
                add_watermarker=False,
                force_zeros_for_empty_prompt=model.options.force_zeros_for_empty_prompt,
            )
        else:
            # Where transformers 4 had the norm that diffusers looks for when layers are skipped.
            object.__setattr__(parts["text_encoder"], "text_model", parts["text_encoder"])
            pipe = diffusers.StableDiffusionPipeline(
                None,
                **parts,
                unet=None,
                scheduler=None,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        made[family] = torch.no_grad()(pipe.encode_prompt), params
    return made


def encode(model, params, prompts, prompts_2=None, **kwargs) -> Conditioning:
    return encode_text(model, params, tokens(model, prompts, prompts_2, emphasis=False, chunks=1), **kwargs)


@pytest.mark.parametrize("clip_skip", [0, 1, 3])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_one_encoder_equals_diffusers(models, oracles, family, clip_skip):
    model, (oracle, params) = models[family], oracles[family]
    given, without = oracle(PROMPTS, "cpu", 1, True, NEGATIVE, clip_skip=clip_skip or None)
    assert error(encode(model, params, PROMPTS, clip_skip=clip_skip).embeddings, given) < TOLERANCE
    # There, the negative prompt never skips a layer.
    assert error(encode(model, params, NEGATIVE).embeddings, without) < TOLERANCE


@pytest.mark.parametrize("clip_skip", [0, 2])
@pytest.mark.parametrize("second", [None, ["a dragon", "castle", "a"]])
@pytest.mark.parametrize("family", ["sdxl", "sdxl_refiner"])
def test_sdxl_equals_diffusers(models, oracles, family, second, clip_skip):
    model, (oracle, params) = models[family], oracles[family]
    reference = oracle(PROMPTS, second, "cpu", 1, True, NEGATIVE, second and second[::-1], clip_skip=clip_skip or None)
    for ours, (embeddings, pooled) in (
        (encode(model, params, PROMPTS, second, clip_skip=clip_skip), reference[::2]),
        (encode(model, params, NEGATIVE, second and second[::-1]), reference[1::2]),
    ):
        assert error(ours.embeddings, embeddings) < TOLERANCE
        assert error(ours.pooled, pooled) < TOLERANCE


@pytest.mark.parametrize("family", ["sdxl", "sdxl_plain", "sdxl_refiner"])
def test_no_negative_prompt_equals_diffusers(models, oracles, family):
    model, (oracle, params) = models[family], oracles[family]
    _, embeddings, _, pooled = oracle(PROMPTS, None, "cpu", 1, True, None)
    ours = encode(model, params, [None] * 3)
    np.testing.assert_allclose(ours.embeddings, embeddings, atol=TOLERANCE * float(abs(embeddings).max()))
    np.testing.assert_allclose(ours.pooled, pooled, atol=TOLERANCE * float(abs(pooled).max()))
    assert (float(abs(embeddings).max()) == 0) == (family == "sdxl")


def test_only_none_is_zeros(models):
    model = models["sdxl"]
    cond = encode(model, random_params(model), [None, "", "a castle"])
    for array in (cond.embeddings, cond.pooled):
        assert not np.any(array[0])
        assert np.all(np.any(array[1:].reshape(2, -1), -1))


@pytest.mark.parametrize("family", ["sd1", "sdxl_refiner"])
def test_plain_ids_serve_a_model_of_one_encoder(models, family):
    model = models[family]
    params = random_params(model)
    ids = (model.tokenizer or model.tokenizer_2)(PROMPTS)
    for ours, same in zip(encode_text(model, params, ids), encode(model, params, PROMPTS), strict=True):
        assert same is None or np.array_equal(ours, same)
    assert encode_text(model, params, ids[:, :7]).embeddings.shape[1] == 7


def test_plain_ids_do_not_serve_two_encoders(models):
    with pytest.raises(ValueError, match=r"this model has two: make them with jaxdiff\.tokenize"):
        encode_text(models["sdxl"], random_params(models["sdxl"]), tiny.tokenizer()(PROMPTS))


@pytest.mark.parametrize(("family", "most"), [("sd1", 3), ("sdxl", 2)])
def test_clip_skip_is_bounded(models, family, most):
    model = models[family]
    params = random_params(model)
    states = [np.asarray(encode(model, params, PROMPTS, clip_skip=n).embeddings) for n in range(most + 1)]
    assert all(error(a, b) > 0.01 for a, b in itertools.pairwise(states))
    for wrong in (-1, most + 1):
        with pytest.raises(ValueError, match=f"clip_skip {wrong} must be 0 to {most}"):
            encode(model, params, PROMPTS, clip_skip=wrong)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sdxl_refiner"])
def test_each_chunk_is_encoded_alone(models, family):
    model = models[family]
    params = random_params(model)
    long = encode_text(model, params, tokens(model, ["a castle BREAK blue house"]))
    for i, text in enumerate(["a castle", "blue house"]):
        alone = encode(model, params, [text])
        length = alone.embeddings.shape[1]
        assert error(long.embeddings[:, i * length : (i + 1) * length], alone.embeddings) < TOLERANCE
        assert alone.pooled is None or (error(long.pooled, alone.pooled) < TOLERANCE) == (i == 0)


def test_tokens_that_do_not_fill_chunks_are_refused(models):
    ids = np.zeros((1, tiny.MAX_LENGTH + 1), np.int32)
    with pytest.raises(ValueError, match=r"13 tokens are not a multiple of 12"):
        encode_text(models["sd1"], random_params(models["sd1"]), ids)


def weighted(states: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The rule of emphasis for one chunk, [L, D] and [L], in plain numpy."""
    scaled = np.stack([vector * w for vector, w in zip(states, weights, strict=True)])
    return scaled * states.sum() / scaled.sum()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_emphasis_scales_tokens_and_keeps_each_chunks_mean(models, family):
    model = models[family]
    params = random_params(model)
    second = ["a (dragon) BREAK house", "blue"] if family == "sdxl" else None
    given = tokens(model, ["(a:1.5) [red] BREAK (castle:0.3)", "blue"], second)
    assert given.weights is not None
    assert (given.weights_2 is not None) == (family == "sdxl")
    plain = encode_text(model, params, given._replace(weights=None, weights_2=None))
    cond = encode_text(model, params, given)
    length, first = tiny.MAX_LENGTH, 16
    for row in range(2):
        for chunk in range(2):
            at = row, slice(chunk * length, (chunk + 1) * length)
            halves = [(slice(0, first), given.weights), (slice(first, None), given.weights_2)]
            for channels, weights in halves[: 1 + (family == "sdxl")]:
                states = np.asarray(plain.embeddings, np.float64)[at][:, channels]
                assert error(cond.embeddings[at][:, channels], weighted(states, weights[at])) < TOLERANCE
    if family == "sdxl":
        assert error(cond.pooled, plain.pooled) < TOLERANCE  # two programs: the same numbers, not the same bits


def test_emphasis_does_not_depend_on_the_batch(models):
    model = models["sd1"]
    params = random_params(model)
    prompts = ["(a:1.5) castle", "[[blue]] house"]
    both = encode_text(model, params, tokens(model, prompts)).embeddings
    for i, prompt in enumerate(prompts):
        assert error(both[i : i + 1], encode_text(model, params, tokens(model, [prompt])).embeddings) < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_of_one_change_nothing(dtype):
    """Not a bit: a chunk without emphasis is as it would be had no prompt any."""
    states = jax.random.normal(jax.random.key(0), (64, 154, 96), dtype)
    weights = np.ones((64, 154), np.float32)
    weights[1, 3] = 1.2
    for function in (apply_emphasis, jax.jit(apply_emphasis, static_argnums=2)):
        ours = function(states, weights, 77)
        changed = (ours != states).reshape(64, 2, -1).any(-1)
        assert np.argwhere(changed).tolist() == [[1, 0]]
    assert apply_emphasis(states, None, 77) is states


def test_emphasis_of_vectors_without_a_mean_is_finite():
    states = jnp.array([[[1.0, -1.0], [2.0, -2.0]]])
    np.testing.assert_array_equal(apply_emphasis(states, np.array([[2.0, 1.0]], np.float32), 2), [[[2, -2], [2, -2]]])


def test_emphasis_is_computed_in_float32_and_keeps_the_type():
    states = jax.random.normal(jax.random.key(0), (1, 4, 8)).astype(jnp.bfloat16)
    weights = np.array([[1, 1.3, 0.9, 1]], np.float32)
    ours = apply_emphasis(states, weights, 4)
    assert ours.dtype == jnp.bfloat16
    exact = weighted(np.asarray(states[0], np.float64), weights[0])
    assert error(ours[0], exact) < float(jnp.finfo(jnp.bfloat16).eps)


@pytest.mark.slow
def test_tokens_go_through_jit_and_values_do_not_recompile(models):
    model = models["sdxl"]
    params = random_params(model)
    traces = []

    @jax.jit
    def encoded(given: Tokens):
        traces.append(given)
        return eager_encode_text(model, params, given)

    for prompts in (["a", None], ["(red)", "blue"], ["(a:0)", "[dragon]"]):
        given = tokens(model, prompts)
        assert error(encoded(given).embeddings, encode_text(model, params, given).embeddings) < TOLERANCE
    assert len(traces) == 2  # with weights and without
