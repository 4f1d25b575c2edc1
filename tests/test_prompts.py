"""Prompts: emphasis, chunks, two encoders, and text that nobody should have written."""

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest

import jaxdiff
from jaxdiff.text.chunks import BACKTRACK, MAX_CHUNKS, tokens
from jaxdiff.text.emphasis import MAX_WEIGHT, parse_emphasis
from jaxdiff.text.tokenizer import train_bpe

LENGTH = 77
CORPUS = ["a photo of a red castle, a green dragon and a blue house", "word at night"] * 3
HOSTILE = {
    "nothing": "",
    "blanks": " \t\n\u00a0 ",
    "emoji": "🎉👩‍👩‍👧🏳️‍🌈" * 20,
    "brackets": "([)]]((" * 50,
    "deep": "(a" * 3000 + ")" * 3000,
    "open": "(" * 3000 + "a",
    "weights": "(a:99999999999999999999)" + "(b:-7)" + "(c:" + "9" * 400 + ")" + "(d:1.2.3)" + "(e:)",
    "zero times much": "((a:0):" + "9" * 400 + ")",
    "nul": "a \x00 (castle\x00:1.2)",
    "surrogates": "a \udcff ([\ud800])",
    "backslashes": "\\" * 501 + "(a)\\",
    "colons": ":1" * 3000 + ":" + " " * 20000 + "1" * 20000,
    "breaks": "BREAK " * 100 + "(BREAK:1.3)",
    "specials": "<|endoftext|> (<|startoftext|>)",
}


def model(tokenizer, tokenizer_2=None, force=True):
    return SimpleNamespace(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=None,
        transformer=None,
        options=SimpleNamespace(force_zeros_for_empty_prompt=force),
    )


@pytest.fixture(scope="module")
def clip():
    return train_bpe(CORPUS, 640, LENGTH)


def content(clip, given, row=0) -> list[list[int]]:
    """Token ids of each chunk of a prompt between its start and its end; checks both, and the padding."""
    chunks = []
    for chunk in given.ids[row].reshape(-1, clip.max_length).tolist():
        end = chunk.index(clip.eos_id)
        assert chunk[0] == clip.bos_id
        assert set(chunk[end + 1 :]) <= {clip.pad_id}
        chunks.append(chunk[1:end])
    return chunks


# Emphasis


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a castle", [("a castle", 1)]),
        ("a (castle)", [("a ", 1), ("castle", 1.1)]),
        ("((castle)) [at [night]]", [("castle", 1.21), (" ", 1), ("at ", 1 / 1.1), ("night", 1 / 1.21)]),
        ("(red:1.3) (green: .5 )(blue:-2.)", [("red", 1.3), (" ", 1), ("green", 0.5), ("blue", -2)]),
        ("(a (red:2) castle:0.5)", [("a ", 0.5), ("red", 1.0), (" castle", 0.5)]),
        ("([castle])", [("castle", 1)]),
        ("cas(tle)(s)", [("cas", 1), ("tles", 1.1)]),
        (r"\(red\) \[castle\] (\)\\:1.2)", [("(red) [castle] ", 1), (")\\", 1.2)]),
        ("time 10:30) (ratio 4:3:2)", [("time 10:30) ", 1), ("ratio 4:3", 2)]),
        ("(a:b:1.5) (c:1.5", [("a:b", 1.5), (" ", 1), ("c:1.5", 1.1)]),
        ("castle] at) night", [("castle] at) night", 1)]),
        ("red [green:1.5] blue", [("red ", 1), ("green:1.5", 1 / 1.1), (" blue", 1)]),
        ("a (red castle", [("a ", 1), ("red castle", 1.1)]),
        ("red BREAK blue BREAKS", [("red ", 1), (None, 1), (" blue BREAKS", 1)]),
        ("(red BREAK blue:1.5)", [("red ", 1.5), (None, 1), (" blue", 1.5)]),
        (r"back\slash \\ a", [(r"back\slash \\ a", 1)]),
        ("()", []),
        ("", []),
    ],
)
def test_emphasis(prompt, pieces):
    ours = parse_emphasis(prompt)
    assert [p.text for p in ours] == [text for text, _ in pieces]
    np.testing.assert_allclose([p.weight for p in ours], [weight for _, weight in pieces])


def characters(prompt: str) -> list[tuple[str, float]]:
    """The rule of emphasis written once more: character by character, each with the product of its brackets."""
    out: list[list] = []
    starts = {"(": [], "[": []}
    i = 0

    def close(bracket, factor):
        for item in out[starts[bracket].pop() :]:
            item[1] *= factor

    while i < len(prompt):
        c = prompt[i]
        if c == "\\" and prompt[i + 1 : i + 2] and prompt[i + 1] in "()[]\\":
            out.append([prompt[i + 1], 1.0])
            i += 2
            continue
        if c == ":" and ")" in prompt[i:]:
            inside, number = prompt[i + 1 : i + prompt[i:].index(")")], None
            if set(inside) <= set("0123456789.+- ") and any(d.isdigit() for d in inside):
                try:
                    number = float(inside)
                except ValueError:
                    number = None
            if number is not None:
                if starts["("]:
                    close("(", number)
                else:
                    out.extend([d, 1.0] for d in f":{inside})")
                i += len(inside) + 2
                continue
        if c in starts:
            starts[c].append(len(out))
        elif c == ")" and starts["("]:
            close("(", 1.1)
        elif c == "]" and starts["["]:
            close("[", 1 / 1.1)
        else:
            out.append([c, 1.0])
        i += 1
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        while starts[bracket]:
            close(bracket, factor)
    return [(c, w) for c, w in out]


def test_emphasis_equals_the_rule_written_once_more():
    rng = np.random.default_rng(0)
    parts = ["(", "(", ")", ")", "[", "]", "a", "b ", ":", ":1.3)", ":0.5)", ": 2 )", "\\", ", ", "1", ".5"]
    for _ in range(3000):
        prompt = "(" * int(rng.integers(2)) + "".join(rng.choice(parts, rng.integers(1, 14))) + "()"
        ours = [(c, p.weight) for p in parse_emphasis(prompt) for c in p.text]
        reference = characters(prompt)
        assert [c for c, _ in ours] == [c for c, _ in reference], prompt
        np.testing.assert_allclose([w for _, w in ours], [w for _, w in reference], err_msg=prompt)


def test_weights_stand_at_their_tokens(clip):
    given = tokens(model(clip), ["a (red:1.5) castle, [green] dragon", "a house"])
    ids = clip(["a red castle, green dragon", "a house"])
    np.testing.assert_array_equal(given.ids, ids)
    expected = np.ones((2, LENGTH), np.float32)
    sizes = [len(clip.encode([text])[0]) for text in ("a", "red", "castle,", "green")]
    starts = np.cumsum([1, *sizes])
    expected[0, starts[1] : starts[2]] = 1.5
    expected[0, starts[3] : starts[4]] = 1 / 1.1
    np.testing.assert_allclose(given.weights, expected, rtol=1e-6)


@pytest.mark.parametrize("text", ["", "a castle", "it's 12 o'clock, café!", "日本語 🎉", "back\\slash \\\\", "x" * 60])
def test_text_without_brackets_is_plain(clip, text):
    for emphasis in (True, False):
        given = tokens(model(clip), [text], emphasis=emphasis)
        np.testing.assert_array_equal(given.ids, clip([text]))
        assert given[1:] == (None,) * 6


def test_emphasis_off_is_plain_text(clip):
    text = r"a (red:1.3) [castle] \(photo\) BREAK night"
    given = tokens(model(clip), [text], emphasis=False)
    np.testing.assert_array_equal(given.ids, clip([text]))
    assert given.weights is None


# Chunks


def test_a_long_prompt_goes_on_in_the_next_chunk(clip):
    words = ["castle", "dragon", "house", "night"] * 50
    given = tokens(model(clip), [" ".join(words), "a"])
    (ids,) = clip.encode([" ".join(words)])
    first, second = content(clip, given), content(clip, given, 1)
    assert list(itertools.chain(*first)) == ids
    assert [len(c) for c in first[:-1]] == [LENGTH - 2] * (len(first) - 1)
    assert second == [clip.encode(["a"])[0], *[[]] * (len(first) - 1)]
    assert given.weights is None


def test_a_prompt_attends_to_its_own_chunks(clip):
    """As many as the longer of the two texts that SDXL's encoders read; BREAKs with nothing between count too."""
    given = tokens(model(clip, clip), ["a", "a BREAK b", "a BREAK BREAK b"], ["a BREAK b", None, None])
    np.testing.assert_array_equal(given.attention_mask.reshape(3, 3, LENGTH)[..., 0], [[1, 1, 0], [1, 1, 0], [1, 1, 1]])
    assert given.attention_mask.reshape(9, LENGTH).std(-1).max() == 0
    assert tokens(model(clip), ["a", "b"]).attention_mask is None
    np.testing.assert_array_equal(tokens(model(clip), ["a"], chunks=2).attention_mask, [[1] * LENGTH + [0] * LENGTH])


def test_exactly_one_chunk_is_one_chunk(clip):
    (one,) = clip.encode(["a"])
    assert len(one) == 1
    assert tokens(model(clip), ["a " * 75]).ids.shape == (1, LENGTH)
    assert tokens(model(clip), ["a " * 76]).ids.shape == (1, 2 * LENGTH)


@pytest.mark.parametrize(
    ("before", "kept"),  # single tokens before the only comma; tokens of the first chunk
    [(73, 74), (75 - BACKTRACK, 76 - BACKTRACK), (74 - BACKTRACK, 75), (74, 75), (75, 75)],
)
def test_a_chunk_is_cut_after_a_comma_near_its_end(clip, before, kept):
    chunks = content(clip, tokens(model(clip), ["a " * before + ", " + "a " * 75]))
    assert len(chunks[0]) == kept
    assert sum(map(len, chunks)) == before + 1 + 75


def test_a_phrase_that_just_fits_is_not_cut_for_the_comma_after_it(clip):
    chunks = content(clip, tokens(model(clip), ["a " * 60 + ", " + "a " * 14 + ", a"]))
    assert [len(c) for c in chunks] == [75, 2]


@pytest.mark.parametrize(
    ("before", "sizes"),  # single tokens before a word of four vectors; tokens of each chunk
    [(71, [75, 1]), (72, [72, 5]), (74, [74, 5]), (75, [75, 5]), (76, [75, 6])],
)
def test_a_word_of_several_vectors_stays_in_one_chunk(clip, before, sizes):
    """As in the web UI: where it does not fit, the next chunk begins with it."""
    own = clip.with_word("<cat>", 4)
    chunks = content(own, tokens(model(own), ["a " * before + "<cat> a"]))
    assert [len(c) for c in chunks] == sizes
    word = own.added_ids("<cat>")
    assert len(word) == 4
    assert sum(chunk[i : i + 4] == word for chunk in chunks for i in range(len(chunk))) == 1
    weights = tokens(model(own), ["a " * before + "(<cat>:1.5) a"]).weights
    assert (weights.reshape(-1, LENGTH) == 1.5).sum(1).max() == 4


def test_a_comma_moves_a_phrase_with_its_word_of_several_vectors(clip):
    own = clip.with_word("<cat>", 4)
    chunks = content(own, tokens(model(own), ["a " * 68 + ", <cat> a a a"]))
    assert [len(c) for c in chunks] == [69, 7]
    assert chunks[1][:4] == own.added_ids("<cat>")


def test_a_word_of_more_vectors_than_a_chunk_holds_fills_several(clip):
    own = clip.with_word("<cat>", 80)
    chunks = content(own, tokens(model(own), ["a <cat> a"]))
    assert [len(c) for c in chunks] == [1, 75, 6]
    assert chunks[1] + chunks[2][:5] == own.added_ids("<cat>")


def test_a_word_of_several_vectors_that_does_not_fit_the_last_chunk_is_left_out(clip):
    own = clip.with_word("<cat>", 2)
    given = tokens(model(own), ["a " * 74 + "<cat>"], chunks=1)
    assert content(own, given) == own.encode(["a " * 74])


def test_break_starts_a_chunk(clip):
    chunks = content(clip, tokens(model(clip), ["red castle BREAK blue BREAK(green:1.2)"]))
    assert chunks == clip.encode(["red castle", "blue", "green"])


def test_chunks_asked_for(clip):
    assert tokens(model(clip), ["a"], chunks=3).ids.shape == (1, 3 * LENGTH)
    for wrong in (0, MAX_CHUNKS + 1):
        with pytest.raises(ValueError, match=f"chunks {wrong} must be 1 to {MAX_CHUNKS}"):
            tokens(model(clip), ["a"], chunks=wrong)


def test_one_chunk_cuts_where_the_tokenizer_does(clip, caplog):
    text = "a " * 70 + ", " + "castle " * 20
    np.testing.assert_array_equal(tokens(model(clip), [text], chunks=1).ids, clip([text]))
    assert "after the first 1 is left out: " in caplog.records[0].getMessage()


def test_ten_thousand_words_are_cut_with_one_warning(clip, caplog):
    text = "a castle, " * 5000
    begin = time.process_time()
    for _ in range(2):
        given = tokens(model(clip, clip), [text, text])
    assert time.process_time() - begin < 10
    assert given.ids.shape == given.ids_2.shape == (2, MAX_CHUNKS * LENGTH)
    (record,) = caplog.records
    assert f"after the first {MAX_CHUNKS} is left out: a castle , a castle" in record.getMessage()
    assert len(record.getMessage()) < 400  # of the text left out, its beginning and its end


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_gives_tokens_and_finite_weights(clip, name):
    begin = time.process_time()
    given = tokens(model(clip), [HOSTILE[name], "a"])
    assert time.process_time() - begin < 5
    assert given.ids.shape[1] % LENGTH == 0
    assert given.ids.min() >= 0
    assert given.ids.max() < clip.vocab_size
    if given.weights is not None:
        assert np.all(np.abs(given.weights) <= MAX_WEIGHT)  # false for NaN


# Two encoders


def test_second_prompts_go_to_the_second_encoder(clip):
    short = train_bpe(CORPUS, 600, 20)
    given = tokens(model(clip, short), ["red castle", "(house)", None], ["a (dragon:1.2)", None, None])
    np.testing.assert_array_equal(given.ids, clip(["red castle", "house", ""]))
    np.testing.assert_array_equal(given.ids_2, short(["a dragon", "house", ""]))
    assert given.weights[0].max() == 1
    assert given.weights_2[0].max() == np.float32(1.2)
    assert given.zeros.tolist() == [False, False, True]


def test_both_encoders_have_the_same_number_of_chunks(clip):
    given = tokens(model(clip, clip), ["a"], ["a BREAK castle BREAK house"])
    assert given.ids.shape == given.ids_2.shape == (1, 3 * LENGTH)


def test_the_refiner_reads_the_first_prompts(clip):
    given = tokens(model(None, clip, force=False), ["red castle"], ["a dragon"])
    np.testing.assert_array_equal(given.ids, clip(["red castle"]))
    assert given.ids_2 is None
    assert given.zeros is None


def test_zeros_are_for_two_encoders_that_want_them(clip):
    assert tokens(model(clip), [None]).zeros is None
    assert tokens(model(clip, clip, force=False), [None]).zeros is None
    assert tokens(model(clip, clip), [""]).zeros.tolist() == [False]


@pytest.mark.parametrize("wrong", ["a castle", [1], [b"a"], None])
def test_prompts_must_be_strings(clip, wrong):
    with pytest.raises(TypeError):
        tokens(model(clip), wrong)


def test_second_prompts_are_as_many(clip):
    with pytest.raises(ValueError, match="prompts_2 holds 2 for 1 prompts"):
        tokens(model(clip, clip), ["a"], ["a", "b"])


def test_tokenize_takes_one_prompt_and_every_keyword(clip):
    np.testing.assert_array_equal(jaxdiff.tokenize(model(clip), "a castle"), clip(["a castle"]))
    prompts = ["a (red) castle", None]
    given = jaxdiff.tokenize(model(clip, clip), prompts, "a dragon", emphasis=False, chunks=2)
    expected = tokens(model(clip, clip), prompts, ["a dragon"] * 2, emphasis=False, chunks=2)
    for ours, theirs in zip(given, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert given.ids.shape == (2, 2 * LENGTH)
    with pytest.raises(ValueError, match="prompts_2 are for the second text encoder of SDXL"):
        jaxdiff.tokenize(model(clip), "a", "b")
