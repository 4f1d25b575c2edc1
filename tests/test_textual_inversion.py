"""Learned words: every form of their files, against PyTorch diffusers."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdiff.errors import WeightsError
from jaxdiff.io.pretrained import load, save
from jaxdiff.io.textual_inversion import TABLE, load_textual_inversion, save_textual_inversion
from jaxdiff.models.model import apply, param_shapes
from tests.support import tiny as small
from tests.support.comparison import assert_equal

PROMPTS = ["a photo of <cat> on a red house", "<cat>", "a castle, <dog>", "a castle"]


def vectors(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def file_of(path, **tensors):
    save_file(tensors, path)
    return path


@pytest.fixture
def cat(tmp_path):
    """A word of three vectors, in diffusers' form."""
    return file_of(tmp_path / "cat.safetensors", **{"<cat>": vectors(3, 16)})


def table(params, encoder="text_encoder"):
    return np.asarray(params[encoder][TABLE]["embedding"])


@pytest.mark.filterwarnings("ignore")  # diffusers' own
def test_equals_diffusers(tiny, tiny_folder, cat, tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    dog = file_of(tmp_path / "dog.safetensors", **{"<dog>": vectors(16)})
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder)
    model, params = tiny
    for file in (cat, dog):
        pipe.load_textual_inversion(str(file.parent), weight_name=file.name)
        model, params = load_textual_inversion(model, params, file)
    written_out = pipe.maybe_convert_prompt(PROMPTS, pipe.tokenizer)
    ids = pipe.tokenizer(
        written_out, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    ).input_ids
    np.testing.assert_array_equal(model.tokenizer(PROMPTS), ids)
    theirs = pipe.text_encoder.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(table(params), theirs)
    assert model.text_encoder.config.vocab_size == len(theirs)
    ours = apply(model, params, "text_encoder", model.tokenizer(PROMPTS)).last_hidden_state
    with torch.no_grad():
        expected = pipe.text_encoder(ids).last_hidden_state.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-5)  # one layer of 16 values near 1, at 6e-8 each


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_new_words_is_saved_and_opened(tiny, cat, tmp_path):
    model, params = load_textual_inversion(*tiny, cat)
    save(tmp_path / "model", model, params)
    again, read = load(tmp_path / "model")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, read, params)
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    ids = pipe.tokenizer(["a <cat> <cat>_1 <cat>_2"], padding="max_length", max_length=12).input_ids
    np.testing.assert_array_equal(model.tokenizer(["a <cat>"]), ids)
    np.testing.assert_array_equal(table(params), pipe.text_encoder.get_input_embeddings().weight.detach().numpy())


def test_what_was_there_stays(tiny, cat):
    model, params = tiny
    before = jax.tree.map(np.array, params)
    new_model, new_params = load_textual_inversion(model, params, cat)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert new_model != model
    assert jax.tree.map(np.shape, new_params) == jax.tree.map(np.shape, param_shapes(new_model))
    np.testing.assert_array_equal(table(new_params)[: len(table(params))], table(params))
    np.testing.assert_array_equal(table(new_params)[len(table(params)) :], vectors(3, 16))
    prompts = ["a castle", "a red dragon"]
    np.testing.assert_array_equal(new_model.tokenizer(prompts), model.tokenizer(prompts))


def test_spare_rows_of_a_table_are_used_first(tiny, cat):
    model, params = tiny
    size = model.text_encoder.config.vocab_size
    long = model.text_encoder.copy(config=dataclasses.replace(model.text_encoder.config, vocab_size=size + 2))
    rows = np.concatenate([table(params), np.zeros((2, 16), np.float32)])
    params = {**params, "text_encoder": {**params["text_encoder"], TABLE: {"embedding": jax.numpy.asarray(rows)}}}
    model, params = load_textual_inversion(dataclasses.replace(model, text_encoder=long), params, cat)
    assert model.text_encoder.config.vocab_size == size + 3
    np.testing.assert_array_equal(table(params)[size:], vectors(3, 16))


def test_old_end_of_text_id(tiny, cat):
    """With eos_token_id 2 the highest id marks a prompt's end; a new token's must not."""
    model, params = tiny
    old = model.text_encoder.copy(config=dataclasses.replace(model.text_encoder.config, eos_token_id=2))
    model = dataclasses.replace(model, text_encoder=old)
    expected = apply(model, params, "text_encoder", model.tokenizer(["a castle"])).pooled
    model, params = load_textual_inversion(model, params, cat)
    out = apply(model, params, "text_encoder", model.tokenizer(["a castle", "a <cat>"]))
    np.testing.assert_array_equal(out.pooled[:1], expected)
    end = list(model.tokenizer(["a <cat>"])[0]).index(model.tokenizer.eos_id)
    np.testing.assert_array_equal(out.pooled[1], out.last_hidden_state[1, end])


@pytest.mark.parametrize(
    ("tensors", "token", "word", "count"),
    [
        ({"<cat>": (2, 16)}, None, "<cat>", 2),
        ({"<cat>": (16,)}, None, "<cat>", 1),
        ({"<cat>": (2, 16)}, "<dog>", "<dog>", 2),
        ({"emb_params": (4, 16)}, None, "my-style", 4),
        ({"emb_params": (4, 16)}, "<style>", "<style>", 4),
        ({"clip_l": (1, 16)}, None, "my-style", 1),
        ({"<cat>": (16,), "unet:0:up": (4, 1), "unet:0:down": (1, 4)}, None, "<cat>", 1),
    ],
)
def test_forms_of_files(tensors, token, word, count, tiny, tmp_path):
    file = file_of(tmp_path / "my-style.safetensors", **{name: vectors(*shape) for name, shape in tensors.items()})
    model, params = load_textual_inversion(*tiny, file, token)
    size = tiny[0].tokenizer.vocab_size
    assert model.tokenizer.added_ids(word) == list(range(size, size + count))
    first = next(iter(tensors.values()))
    np.testing.assert_array_equal(table(params)[size:], vectors(*first).reshape(count, 16))


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
@pytest.mark.parametrize("form", ["diffusers", "web ui"])
def test_pickled_files(form, suffix, tiny, tmp_path):
    torch = pytest.importorskip("torch")
    rows = torch.from_numpy(vectors(2, 16))
    extras = {"name": "other", "step": 3, "sd_checkpoint": None}
    web_ui = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.nn.Parameter(rows)}, **extras}
    file = tmp_path / f"style{suffix}"
    torch.save({"<cat>": rows} if form == "diffusers" else web_ui, file)
    model, params = load_textual_inversion(*tiny, file)
    size = tiny[0].tokenizer.vocab_size
    assert model.tokenizer.added_ids("<cat>" if form == "diffusers" else "style") == [size, size + 1]
    np.testing.assert_array_equal(table(params)[size:], rows)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_files_of_the_first_trainers(protocol, half, legacy, tiny, tmp_path):
    """A ParameterDict, ids of words as tensors, half precision, and PyTorch's format before 1.6 (no zip)."""
    torch = pytest.importorskip("torch")
    rows = torch.from_numpy(vectors(2, 16))
    rows = rows.half() if half else rows
    words = torch.nn.ParameterDict({"*": torch.nn.Parameter(rows)})
    content = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": words}
    file = tmp_path / "style.pt"
    torch.save(content, file, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    assert (file.read_bytes()[:2] == b"PK") != legacy
    model, params = load_textual_inversion(*tiny, file)
    size = tiny[0].tokenizer.vocab_size
    assert model.tokenizer.added_ids("style") == [size, size + 1]
    np.testing.assert_array_equal(table(params)[size:], rows.float())


def test_a_folder_of_diffusers(tiny, tmp_path):
    with pytest.raises(WeightsError, match=r"holds no learned_embeds\.safetensors: give the file of the textual"):
        load_textual_inversion(*tiny, tmp_path)
    torch = pytest.importorskip("torch")
    torch.save({"<cat>": torch.from_numpy(vectors(2, 16))}, tmp_path / "learned_embeds.bin")
    model, params = load_textual_inversion(*tiny, tmp_path)
    np.testing.assert_array_equal(table(params)[model.tokenizer.added_ids("<cat>")], vectors(2, 16))


def test_several_words_of_a_first_trainers_file(tiny, tmp_path):
    torch = pytest.importorskip("torch")
    content = {name: {"cat": torch.from_numpy(vectors(2, 16)), "<dog>": torch.from_numpy(vectors(1, 16))} for name in
               ("string_to_token", "string_to_param")}  # fmt: skip
    torch.save(content, tmp_path / "pets.pt")
    with pytest.raises(WeightsError, match="holds 2 tokens"):
        load_textual_inversion(*tiny, tmp_path / "pets.pt", "pets")
    model, params = load_textual_inversion(*tiny, tmp_path / "pets.pt")
    np.testing.assert_array_equal(table(params)[model.tokenizer.added_ids("cat")], vectors(2, 16))
    np.testing.assert_array_equal(table(params)[model.tokenizer.added_ids("<dog>")], vectors(1, 16))


def test_several_words_of_one_file(tiny, tmp_path):
    file = file_of(tmp_path / "two.safetensors", **{"<s1>": vectors(16), "<s2>": vectors(2, 16)})
    model, params = load_textual_inversion(*tiny, file)
    (one, *two) = model.tokenizer(["<s1><s2>"])[0][1:4]
    np.testing.assert_array_equal(table(params)[one], vectors(16))
    np.testing.assert_array_equal(table(params)[two], vectors(2, 16))
    with pytest.raises(WeightsError, match="holds 2 tokens, but `token` names only one"):
        load_textual_inversion(*tiny, file, "<s>")


@pytest.fixture(scope="module")
def double():
    """(model, params) with two text encoders, the second wider."""
    return small.with_two_text_encoders()


def test_two_text_encoders(double, tmp_path):
    file = file_of(tmp_path / "xl.safetensors", clip_l=vectors(2, 16), clip_g=vectors(2, 24))
    model, params = load_textual_inversion(*double, file)
    size = small.tokenizer().vocab_size
    assert model.tokenizer.added_ids("xl") == model.tokenizer_2.added_ids("xl") == [size, size + 1]
    np.testing.assert_array_equal(table(params)[size:], vectors(2, 16))
    np.testing.assert_array_equal(table(params, "text_encoder_2")[size:], vectors(2, 24))
    assert model.text_encoder_2.config.vocab_size == model.text_encoder.config.vocab_size == size + 2
    save_textual_inversion(tmp_path / "again.safetensors", model, params, "xl")
    assert {n: x.tolist() for n, x in load_file(tmp_path / "again.safetensors").items()} == {
        n: x.tolist() for n, x in load_file(file).items()
    }


@pytest.mark.parametrize("suffix", [".safetensors", ".pti", ".pt"])
def test_two_text_encoders_by_their_numbers(suffix, double, tmp_path):
    """cog-sdxl's names."""
    tensors = {"text_encoders_0": vectors(2, 16), "text_encoders_1": vectors(2, 24)}
    file = tmp_path / f"xl{suffix}"
    if suffix == ".pt":
        torch = pytest.importorskip("torch")
        torch.save({name: torch.from_numpy(x).half() for name, x in tensors.items()}, file)
    else:
        save_file(tensors, file)
    model, params = load_textual_inversion(*double, file)
    ids = model.tokenizer.added_ids("xl")
    for encoder, rows in zip(("text_encoder", "text_encoder_2"), tensors.values(), strict=True):
        np.testing.assert_allclose(table(params, encoder)[ids], rows, rtol=1e-3 if suffix == ".pt" else 0)


def halves(folder, steps="", **words):
    """What diffusers' trainer writes for SDXL: a file for each text encoder."""
    folder.mkdir()
    words = words or {"<cat>": 2}
    return [
        file_of(folder / f"learned_embeds{n}{steps}.safetensors", **{w: vectors(k, d) for w, k in words.items()})
        for n, d in (("", 16), ("_2", 24))
    ]


@pytest.mark.parametrize("steps", ["", "-steps-500"])
def test_a_file_for_each_text_encoder(steps, double, tmp_path):
    """As a folder, one file of two side by side, or both, in any order and under any name."""
    first, second = halves(tmp_path / "cat", steps=steps, **{"<cat>": 2, "<dog>": 1})
    (tmp_path / "apart").mkdir()
    apart = [shutil.copy(file, tmp_path / "apart" / f"{i}.safetensors") for i, file in enumerate((first, second))]
    folders = [] if steps else [tmp_path / "cat"]
    for given in (first, [second], [second, first], apart, *folders):
        model, params = load_textual_inversion(*double, given)
        for word, count in (("<cat>", 2), ("<dog>", 1)):
            ids = model.tokenizer.added_ids(word)
            assert ids == model.tokenizer_2.added_ids(word)
            np.testing.assert_array_equal(table(params)[ids], vectors(count, 16))
            np.testing.assert_array_equal(table(params, "text_encoder_2")[ids], vectors(count, 24))


def test_half_of_an_embedding_says_what_is_missing(double, tiny, tmp_path):
    first, second = halves(tmp_path / "cat")
    alone = [shutil.copy(file, tmp_path / file.name) for file in (first, second)]
    alone[1] = shutil.move(alone[1], tmp_path / "x_2.safetensors")
    for file, has, lacks, name in (
        (alone[0], "text_encoder", "text_encoder_2", "learned_embeds_2"),
        (alone[1], "text_encoder_2", "text_encoder", "x"),
    ):
        with pytest.raises(WeightsError) as error:
            load_textual_inversion(*double, file)
        assert f"has '<cat>' for {has}; this model has text_encoder and text_encoder_2" in str(error.value)
        assert f"give the file for {lacks} too, or put it beside as {name}.safetensors" in str(error.value)
    model, _ = load_textual_inversion(*tiny, tmp_path / "cat")  # has no use for the other half
    assert len(model.tokenizer.added_ids("<cat>")) == 2
    file = file_of(tmp_path / "xl.safetensors", clip_l=vectors(2, 16))
    with pytest.raises(WeightsError, match="give the file for text_encoder_2 too"):
        load_textual_inversion(*double, file)


def test_halves_equal_one_file(double, tmp_path):
    """As the same vectors in the form of the web UI, and of cog-sdxl in a folder."""
    one = file_of(tmp_path / "<cat>.safetensors", clip_l=vectors(2, 16), clip_g=vectors(2, 24))
    (tmp_path / "advanced").mkdir()
    file_of(tmp_path / "advanced/<cat>_emb.safetensors", text_encoders_0=vectors(2, 16), text_encoders_1=vectors(2, 24))
    halves(tmp_path / "cat")
    expected = load_textual_inversion(*double, one)
    for given, token in ((tmp_path / "cat", None), (tmp_path / "advanced", "<cat>")):
        model, params = load_textual_inversion(*double, given, token)
        assert model == expected[0]
        assert_equal(params, expected[1])


def test_words_of_others_are_left_alone(tiny, tmp_path):
    """One word begins with the other, in either order; each stands for its own vectors."""
    short = file_of(tmp_path / "qzfoo.safetensors", emb_params=vectors(2, 16))
    long = file_of(tmp_path / "qzfoo_1.safetensors", emb_params=vectors(3, 16))
    for files in ((short, long), (long, short)):
        model, params = tiny
        for file in files:
            model, params = load_textual_inversion(model, params, file)
        (ids,) = model.tokenizer.encode(["qzfoo qzfoo_1"])
        np.testing.assert_array_equal(table(params)[ids], np.concatenate([vectors(2, 16), vectors(3, 16)]))


def test_saving_gives_the_same_bytes(tiny, cat, tmp_path):
    model, params = load_textual_inversion(*tiny, cat)
    save_textual_inversion(tmp_path / "again.safetensors", model, params, "<cat>")
    (name, read), *rest = load_file(tmp_path / "again.safetensors").items()
    assert (name, rest) == ("<cat>", [])
    np.testing.assert_array_equal(read, vectors(3, 16))
    with pytest.raises(WeightsError, match="has no token '<dog>' of its own"):
        save_textual_inversion(tmp_path / "dog.safetensors", model, params, "<dog>")


def test_a_token_is_loaded_once(tiny, cat):
    model, params = load_textual_inversion(*tiny, cat)
    for token in (None, "<CAT>", "a", "a</w>"):
        with pytest.raises(WeightsError, match=r"cat\.safetensors: the tokenizer has a token .* already"):
            load_textual_inversion(model, params, cat, token)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no embeddings"),
        ({"unet:0:up": (4, 1)}, "holds no embeddings"),
        ({"<cat>": (2, 24)}, r"<cat> has shape \[2, 24\], where vectors of this model's text_encoder have 16 values"),
        ({"<cat>": (2, 2, 16)}, r"<cat> has shape \[2, 2, 16\]"),
        ({"<cat>": (0, 16)}, r"<cat> has shape \[0, 16\]"),
        (
            {"unet.conv_in.lora_A.weight": (4, 16), "unet.conv_in.lora_B.weight": (32, 4)},
            "it is not a textual inversion",
        ),
        ({"clip_l": (2, 16), "clip_g": (2, 24)}, "for text_encoder and text_encoder_2; this model has text_encoder:"),
        ({" ": (2, 16)}, "' ' cannot be a token"),
        ({"clip_l": (2, 16), "clip_l_out": (2, 16)}, r"output embeddings for 'bad' \(clip_l_out\), which are not"),
        ({"clip_l": (2, 16), "emb_params": (2, 16)}, r"has several embeddings for 'bad' \(clip_l, emb_params\)"),
    ],
)
def test_files_that_do_not_fit(tensors, message, tiny, tmp_path):
    file = file_of(
        tmp_path / "bad.safetensors", **{name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    )
    with pytest.raises(WeightsError, match=message) as error:
        load_textual_inversion(*tiny, file)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_one_vector_for_two_encoders_is_refused(double, cat):
    with pytest.raises(WeightsError, match="for text_encoder; this model has text_encoder and text_encoder_2"):
        load_textual_inversion(*double, cat)
