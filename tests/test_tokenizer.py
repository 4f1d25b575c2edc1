"""The tokenizer against transformers' own, in every form its folder has had, and the vocabularies trained here."""

import collections
import itertools
import json
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxdiff.config import ConfigError
from jaxdiff.text.tokenizer import BOS, EOS, Tokenizer, train_bpe

CORPUS = [
    "a photo of a cat",
    "a photo of a dog, on a blue background",
    "A Castle with two towers, 3d",
    "the castle's cat; it's 12 o'clock!",
    "a pixel house, flat icon, café",
] * 3
TRICKY = [
    "",
    "   ",
    "A PHOTO of a Cat",
    "it's I'm we've they'll I'd don't CAN'T",
    "12345 3.14 1,000",
    "日本語 のテスト",
    "🎉👩‍👩‍👧 party!!",
    "e\u0301 vs é ǅ İstanbul ß",
    "tab\tnew\nline  \u00a0nbsp",
    "!!! ... ?! wow!",
    "<|endoftext|> in <|startoftext|> it",
    "\x00 null",
    "snake_case-and#hash @you",
    "½ ² Ⅷ",
    "x" * 200,
    "word " * 100,
]


@pytest.fixture(scope="module")
def trained():
    return train_bpe(CORPUS, 640, 32)


def old_folder(tokenizer, folder, pad):
    """The files as transformers 4 wrote them: the padding token stands in special_tokens_map.json only."""
    tokenizer.save(folder)
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    bos, eos = {"content": BOS, **token}, {"content": EOS, **token}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        "bos_token": {"__type": "AddedToken", **bos},
        "eos_token": {"__type": "AddedToken", **eos},
        "unk_token": {"__type": "AddedToken", **eos},
        "pad_token": EOS,
    }
    special = {"bos_token": bos, "eos_token": eos, "unk_token": eos, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


def oracle(folder, texts, length):
    from transformers import CLIPTokenizer

    clip = CLIPTokenizer.from_pretrained(folder)
    return clip(texts, padding="max_length", max_length=length, truncation=True, return_tensors="np")["input_ids"]


@pytest.mark.parametrize("pad", [EOS, "!"])
def test_equals_transformers(trained, tmp_path, pad):
    from transformers import CLIPTokenizer

    old = old_folder(trained, tmp_path / "old", pad)
    new = tmp_path / "new"
    CLIPTokenizer.from_pretrained(old).save_pretrained(new)  # transformers 5: tokenizer.json alone
    assert not (new / "vocab.json").exists()
    for folder in (old, new):
        tokenizer = Tokenizer.load(folder)
        ids = tokenizer(TRICKY)
        assert ids.dtype == np.int32
        assert ids.shape == (len(TRICKY), 77)
        np.testing.assert_array_equal(ids, oracle(folder, TRICKY, 77))
        assert tokenizer.pad_id == (0 if pad == "!" else tokenizer.eos_id)
        tokenizer.save(tmp_path / "again")
        assert Tokenizer.load(tmp_path / "again") == tokenizer
        np.testing.assert_array_equal(oracle(tmp_path / "again", TRICKY, 77), ids)


KEPT = """
import json, sys
from pathlib import Path
from jaxdiff.text.tokenizer import Tokenizer
tokenizer = Tokenizer.load(sys.argv[1])
tokenizer = Tokenizer(tokenizer.files, 77, Path(sys.argv[2]))
texts = json.loads(sys.stdin.read())
found = {"ids": tokenizer(texts).tolist(), "words": tokenizer.encode_words(texts), "added": tokenizer.added_ids("<x>")}
print(json.dumps(found | {"size": tokenizer.vocab_size, "imported": "transformers" in sys.modules}))
"""


@pytest.mark.parametrize("split", [False, True])
def test_a_kept_backend_gives_the_same_ids_without_transformers(trained, tmp_path, split, caplog):
    with_words = trained.with_word("<x>", 3).with_word("art")
    config = json.loads(with_words.files["tokenizer_config.json"]) | {"split_special_tokens": split}
    files = {**with_words.files, "tokenizer_config.json": json.dumps(config).encode()}
    Tokenizer(files).save(tmp_path / "tokenizer")
    texts = [*TRICKY, "an <x> of Art, party <X>"]
    (tmp_path / "kept").mkdir()
    first = Tokenizer(files, 77, tmp_path / "kept")
    ids = first(texts)
    np.testing.assert_array_equal(ids, Tokenizer(files, 77)(texts))
    np.testing.assert_array_equal(ids[: len(TRICKY)], oracle(tmp_path / "tokenizer", TRICKY, 77))
    found = subprocess.run(
        [sys.executable, "-c", KEPT, tmp_path / "tokenizer", tmp_path / "kept"],
        input=json.dumps(texts), capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = {"ids": ids.tolist(), "words": first.encode_words(texts), "added": first.added_ids("<x>")}
    assert json.loads(found.stdout) == expected | {"size": first.vocab_size, "imported": False}
    assert pickle.loads(pickle.dumps(first)) == first

    (file,) = (tmp_path / "kept").iterdir()
    file.write_text("{")
    np.testing.assert_array_equal(Tokenizer(files, 77, tmp_path / "kept")(texts), ids)
    assert "written again" in caplog.text
    assert json.loads(file.read_text())["split"] is split


def test_rows_start_end_and_are_padded(trained):
    (row, empty) = trained(["a cat", ""])
    end = list(row).index(trained.eos_id)
    assert row[0] == trained.bos_id
    assert end > 1
    assert set(row[end:]) == {trained.pad_id}
    assert list(empty[:2]) == [trained.bos_id, trained.eos_id]
    assert trained([]).shape == (0, 32)


def test_content_is_identity(trained, tmp_path):
    trained.save(tmp_path / "a")
    first, second = Tokenizer.load(tmp_path / "a"), Tokenizer.load(tmp_path / "a")
    assert first == second == trained
    assert hash(first) == hash(second)
    second(["opened"])  # holds transformers' object now; neither identity nor pickling may see it
    assert first == second == pickle.loads(pickle.dumps(second))
    assert train_bpe(CORPUS, 560, 32) != trained
    assert train_bpe(CORPUS, 640, 31) != trained
    traces = []
    double = jax.jit(lambda tokenizer, x: traces.append(tokenizer) or 2 * x, static_argnums=0)
    assert double(first, 1.0) == double(second, 1.0) == 2
    assert len(traces) == 1


def test_too_long_is_cut_with_one_warning(trained, caplog):
    prompt = " ".join(["cat"] * 30) + " The Lost End"  # one token a word: start, 30, more, end are over 32
    ids = trained([prompt, prompt, "a cat"])
    trained([prompt])
    assert ids[0, -1] == trained.eos_id
    assert list(ids[0]) == list(ids[1])
    (record,) = caplog.records
    assert repr("The Lost End") in record.getMessage()
    assert "32 tokens" in record.getMessage()


def test_undecodable_bytes_of_a_command_line_are_no_crash(trained):
    assert list(trained(["a \udcff cat"])[0]) == list(trained(["a ? cat"])[0])


@pytest.mark.parametrize("prompts", ["a cat", [None], [b"a cat"]])
def test_prompts_must_be_strings(trained, prompts):
    with pytest.raises(TypeError, match="list of strings"):
        trained(prompts)


def damage(folder, name, text):
    path = folder / name
    path.unlink() if text is None else path.write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("vocab.json", None, "holds no CLIP vocabulary"),
        ("merges.txt", None, "holds no CLIP vocabulary"),
        ("vocab.json", '{"a": 0,', "vocab.json cannot be read as JSON"),
        ("vocab.json", '["a"]', "vocab.json holds list"),
        ("vocab.json", '{"a": "b"}', "vocab.json is not a CLIP vocabulary"),
        ("vocab.json", '{"a": 0, "b": 0}', "gives one id to several"),
        ("vocab.json", '{"a": 0, "b": 1}', "lacks the bos_token"),
        ("merges.txt", "a b c", "The merge 'a b c' in .*merges.txt does not fit"),
        ("merges.txt", "q 日", "does not fit the vocabulary"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read"),
    ],
)
def test_damaged_folders_are_named(trained, tmp_path, name, text, message):
    trained.save(tmp_path)
    damage(tmp_path, name, text)
    with pytest.raises(ConfigError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert str(error.value).count("\n") == 0


def test_missing_folder_and_foreign_vocabulary(tmp_path):
    with pytest.raises(ConfigError, match="holds no CLIP vocabulary"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": [["<pad>", 0.0]]}}')
    with pytest.raises(ConfigError, match="is not a CLIP vocabulary"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("value", "expected"), [(32, 32), (10**30, 77), (1e30, 77), (None, 77), ("x", 77)])
def test_max_length_of_the_config(trained, tmp_path, value, expected):
    trained.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": value}))
    assert Tokenizer.load(tmp_path).max_length == expected
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.load(tmp_path).max_length == 77


def test_save_replaces_what_lay_there(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "added_tokens.json").write_text('{"<other>": 9}')
    trained.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merges.txt", "tokenizer_config.json", "vocab.json"]


def test_trained_vocabulary_has_the_form_of_clips(trained, tmp_path):
    trained.save(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    assert list(vocab.values()) == list(range(len(vocab)))
    assert list(vocab)[-2:] == [BOS, EOS]
    assert list(vocab)[:3] == ["!", '"', "#"]
    assert vocab["!</w>"] == 256
    assert trained.vocab_size == len(vocab) <= 640
    assert (trained.bos_id, trained.eos_id, trained.pad_id) == (len(vocab) - 2, len(vocab) - 1, len(vocab) - 1)
    np.testing.assert_array_equal(oracle(tmp_path, TRICKY, 32), trained(TRICKY))


def test_every_text_has_an_encoding(trained):
    rng = np.random.default_rng(0)
    points = [p for p in rng.integers(32, 0x110000, 400) if not 0xD800 <= p < 0xE000]
    tokens = [row[1 : list(row).index(trained.eos_id, 1)] for row in trained([chr(p) for p in points])]
    assert all(t.max(initial=0) < trained.bos_id for t in tokens)  # an unknown token would be the end token
    assert sum(len(t) > 0 for t in tokens) > 0.99 * len(points)  # all but white space


def test_merges_are_the_most_frequent_pairs(tmp_path):
    """Sennrich et al. 2016, algorithm 1: each merge is a pair that no other exceeds in count."""
    words = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3
    train_bpe([" ".join(words)], 514 + 9, 16).save(tmp_path)
    merges = [tuple(line.split()) for line in (tmp_path / "merges.txt").read_text().splitlines()[1:]]
    assert len(merges) == 9
    splits = {w: [*w[:-1], w[-1] + "</w>"] for w in set(words)}
    for merge in merges:
        counts = collections.Counter()
        for word in words:
            counts.update(itertools.pairwise(splits[word]))
        assert counts[merge] == max(counts.values())
        for parts in splits.values():
            while merge in (pairs := list(itertools.pairwise(parts))):
                i = pairs.index(merge)
                parts[i : i + 2] = ["".join(merge)]


def test_training_is_reproducible_and_bounded():
    assert train_bpe(CORPUS, 560, 16).digest == train_bpe(iter(CORPUS), 560, 16).digest
    assert train_bpe(CORPUS, 560, 16).vocab_size == 560
    assert train_bpe(["ab"], 10_000, 16).vocab_size == 514  # no pair occurs twice
    with pytest.raises(ConfigError, match="vocab_size must be 514"):
        train_bpe(CORPUS, 513, 16)
    with pytest.raises(ConfigError, match="max_length must be 3"):
        train_bpe(CORPUS, 600, 2)


ADDED = ["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "Easy-Negative"]


@pytest.fixture(scope="module", params=["vocab.json", "tokenizer.json"])
def extended(trained, request, tmp_path_factory):
    """(tokenizer, the same with more tokens, transformers' with the same tokens), from either form of a folder."""
    from transformers import CLIPTokenizer

    folder = old_folder(trained, tmp_path_factory.mktemp("tokenizer"), "!")
    if request.param == "tokenizer.json":
        CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
        for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
            (folder / name).unlink()
    clip = CLIPTokenizer.from_pretrained(folder)
    clip.add_tokens(ADDED)
    tokenizer = Tokenizer.load(folder)
    return tokenizer, tokenizer.with_word("<cat-toy>", 3).with_word("Easy-Negative"), clip


def test_added_tokens_equal_transformers(extended, tmp_path):
    old, new, clip = extended
    assert new.vocab_size == old.vocab_size + 4
    assert (new.bos_id, new.eos_id, new.pad_id) == (old.bos_id, old.eos_id, old.pad_id)
    np.testing.assert_array_equal(new(TRICKY), old(TRICKY))
    prompts = ["a <cat-toy>, easy-negative", "a<Cat-Toy>b EASY-NEGATIVE.", "<cat-toy>_1 alone"]
    # What diffusers hands to transformers for a token of several vectors.
    written_out = [p.replace("toy>,", "toy> <cat-toy>_1 <cat-toy>_2,") for p in prompts]
    written_out[1] = written_out[1].replace("Toy>", "Toy> <cat-toy>_1 <cat-toy>_2 ")
    expected = clip(written_out, padding="max_length", max_length=77, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(new(prompts), expected)
    assert new.encode(prompts[:1]) == [[int(i) for i in expected[0, 1:] if i][:-1]]
    assert new.added_ids("<cat-toy>") == [old.vocab_size, old.vocab_size + 1, old.vocab_size + 2]
    assert new.added_ids("<dog>") == []
    new.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again == new != old
    np.testing.assert_array_equal(again(prompts), new(prompts))
    np.testing.assert_array_equal(oracle(tmp_path, written_out, 77), expected)  # and PyTorch's side opens it


def test_tokens_are_added_to_added_ones(extended):
    old, new, _ = extended
    more = new.with_word("<dog>")
    prompt = ["<dog> <cat-toy>"]
    assert list(more(prompt)[0][1:5]) == [old.vocab_size + i for i in (4, 0, 1, 2)]
    np.testing.assert_array_equal(more(TRICKY), new(TRICKY))


def test_several_vectors_count_when_a_prompt_is_cut(extended, caplog):
    _, new, _ = extended
    short = Tokenizer(new.files, 6)
    prompt = f"a <cat-toy> castle {len(new.files)}"  # not one that has been warned of
    row = short([prompt])[0]
    assert list(row[2:5]) == new.added_ids("<cat-toy>")
    assert row[5] == short.eos_id
    assert "'castle" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("a</w>", "has a token 'a</w>' already"),
        ("<cat-toy>", "has a token '<cat-toy>' already"),
        ("<CAT-toy>", "has a token '<CAT-toy>' already"),
        ("easy-negative", "has a token 'easy-negative' already"),
        (" ", "' ' cannot be a token"),
        ("", "'' cannot be a token"),
        ("a\nb", "cannot be a token"),
    ],
)
def test_words_that_cannot_be_added(extended, word, message):
    with pytest.raises(ConfigError, match=message):
        extended[1].with_word(word)


SIZES = {"qzfoo": 2, "qzfoo_1": 1, "Qzfoo_1_1": 3, "<s>": 2, "<s>_1": 2}


@pytest.mark.parametrize(
    "order", [list(SIZES), list(reversed(SIZES)), ["qzfoo_1", "<s>_1", "qzfoo", "Qzfoo_1_1", "<s>"]]
)
def test_no_word_swallows_another_in_any_order(order, trained, tmp_path):
    from transformers import CLIPTokenizer

    tokenizer, ids = trained, {}
    for word in order:
        first = tokenizer.vocab_size
        tokenizer, ids[word] = tokenizer.with_word(word, SIZES[word]), list(range(first, first + SIZES[word]))
    tokenizer.save(tmp_path)
    for opened in (tokenizer, Tokenizer.load(tmp_path)):
        assert opened == tokenizer
        assert {word: opened.added_ids(word) for word in order} == ids
        prompt = ", ".join(order).upper()
        assert [i for i in opened.encode([prompt])[0] if i >= trained.vocab_size] == [i for w in order for i in ids[w]]
        # What is written as a part of another word is not found there, what is in brackets of its own is.
        for text in ("qzfoobar", "aqzfoo", "qzfoo_2", "qzfoo2"):
            assert opened.encode([text]) == trained.encode([text])
        assert opened.encode(["a<s>b (qzfoo)"])[0][1:3] == ids["<s>"]
        assert opened.encode(["(qzfoo)"])[0][1:3] == ids["qzfoo"]
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    assert {word: theirs.convert_tokens_to_ids(word) for word in order} == {word: ids[word][0] for word in order}


def test_words_beside_those_of_a_folder_of_diffusers(trained, tmp_path):
    """Such a folder has names alone, by which the ids of a word are found; one may become another word's name."""
    trained.save(tmp_path)
    first = trained.vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<cat>": first, "<cat>_1": first + 1, "<dog>": first + 2}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.added_ids("<cat>") == [first, first + 1]
    tokenizer = tokenizer.with_word("<cat>_1", 2)
    assert tokenizer.added_ids("<cat>") == [first, first + 1]
    assert tokenizer.added_ids("<cat>_1") == [first + 3, first + 4]
    assert tokenizer.encode(["<dog> <cat>"])[0] == [first + 2, first, first + 1]


def test_words_of_scripts_without_spaces(trained):
    tokenizer = trained.with_word("猫")
    assert trained.vocab_size in tokenizer.encode(["一只猫在"])[0]


def test_damaged_words_of_a_folder(trained, tmp_path):
    trained.with_word("<cat>", 2).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for value in (3, {"<cat>": 0}, {"<cat>": "2"}, {"<cat>": 10**9}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"word_vectors": value}))
        with pytest.raises(ConfigError, match=r"word_vectors must be words|gives '<cat>' 1000000000 ids"):
            Tokenizer.load(tmp_path).encode(["<cat>"])
