"""Prompt editing: hand-made schedules by the AUTOMATIC1111 web UI's documentation, and images that follow them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff
from jaxdiff.diffusion.base import Scheduler, State
from jaxdiff.diffusion.schedulers import get_scheduler
from jaxdiff.diffusion.schedules import Time
from jaxdiff.models.conditioning import Conditioning
from jaxdiff.sampling.inputs import text_by_step
from jaxdiff.sampling.noise import image_keys
from jaxdiff.sampling.resolve import resolve_images, resolve_settings
from jaxdiff.sampling.texts import expand_edits
from jaxdiff.text.chunks import tokens
from jaxdiff.text.other_programs import LoraTag, only_words, read_as_it_is, split_tags
from jaxdiff.text.prompt_files import PromptError
from jaxdiff.text.schedule import parse_schedule, text_at
from tests.support.tiny import LATENT, tiny_model


def texts(prompt: str, steps: int = 4, stage: int = 0) -> list[str]:
    parts = parse_schedule(prompt)
    return [text_at(parts, step, steps, stage) for step in range(steps)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a [cat:dog:3]", ["a cat", "a cat", "a cat", "a dog"]),
        ("a [cat:dog:0.5]", ["a cat", "a cat", "a dog", "a dog"]),
        ("[cat:dog: .25 ]", ["cat", "dog", "dog", "dog"]),
        ("a[ dog:1]", ["a", "a dog", "a dog", "a dog"]),
        ("a[ cat::1]", ["a cat", "a", "a", "a"]),
        ("[cat:dog:0]", ["dog"] * 4),
        ("[cat:dog:9]", ["cat"] * 4),
        ("[cat:dog:1]", ["cat", "dog", "dog", "dog"]),  # a step
        ("[cat:dog:1.0]", ["cat"] * 4),  # all of the steps
        ("[cat:dog:-1]", ["dog"] * 4),
        ("[cat:dog:1e999]", ["cat"] * 4),
        ("[cat|dog]", ["cat", "dog", "cat", "dog"]),
        ("[cat|dog|cow] [a|]", ["cat a", "dog ", "cow a", "cat "]),
        ("[(cat:1.2):[dog]:2]", ["(cat:1.2)", "(cat:1.2)", "[dog]", "[dog]"]),
        ("[a:[b:c:3]:1]", ["a", "b", "b", "c"]),
        ("[[a|b]:c:3]", ["a", "b", "a", "c"]),
        ("([a:b:2]:1.3)", ["(a:1.3)", "(a:1.3)", "(b:1.3)", "(b:1.3)"]),
        (r"[a\|b|c\:d]", ["a|b", "c:d", "a|b", "c:d"]),
        # What means nothing here stays for emphasis.
        ("[cat] (dog:1.3) [[cow]]", ["[cat] (dog:1.3) [[cow]]"] * 4),
        ("[a:b:c:3] [a|b:3] [a:b] a|b", ["[a:b:c:3] [a|b:3] [a:b] a|b"] * 4),
        (r"\[a:b:2] a\|b", [r"\[a:b:2] a\|b"] * 4),
        ("(a] [b:c:2", ["(a] [b:c:2"] * 4),
        ("a) [b:c:2] (", ["a) b (", "a) b (", "a) c (", "a) c ("]),
    ],
)
def test_when_a_prompt_changes(prompt, expected):
    assert texts(prompt) == expected


def test_the_second_stage_goes_on_counting():
    assert texts("[a:b:0.5] [c:d:1.5] [e:f:5] [g|h]", stage=0) == ["a c e g", "a c e h", "b c e g", "b c e h"]
    assert texts("[a:b:0.5] [c:d:1.5] [e:f:5] [g|h]", stage=1) == ["b c e g", "b c f h", "b d f g", "b d f h"]


def test_brackets_without_end():
    for prompt in ("[" * 1000 + "a" + ":1]" * 1000, "[(" * 1000, "a]" * 1000):
        assert isinstance(texts(prompt)[0], str)


def test_which_text_each_step_attends_to():
    columns, picks = expand_edits([["a [b|c]", "d"], [None, "[e:f:1]"]], 3, 1)
    assert columns == [["a b", "a c", "d", "d"], [None, None, "e", "f"]]
    assert picks.tolist() == [[[0, 1, 0]], [[0, 1, 1]]]
    assert expand_edits([["[a|a]", "b"]], 3, 2) == ([["a", "b"]], None)
    plain = [["a [b]", r"\|"]]
    assert expand_edits(plain, 3, 1)[0] is plain


def test_steps_left_out_are_not_counted():
    """The third and fourth of four steps are the first two taken."""

    def step(denoise, state, times, i, keys):
        return State(10 * state.x + denoise(state.x, None), state.x)

    conds = (Conditioning(jnp.asarray([[1.0, 2.0], [3.0, 4.0]])), None)
    picks = jnp.asarray([[0, 1, 1, 1], [1, 0, 0, 0]])
    steps = text_by_step(
        Scheduler(lambda x: State(x, x), step), picks, jnp.asarray(2), conds, lambda c, _: lambda *a: c.embeddings
    )
    times = Time(*(jnp.zeros(5) for _ in range(3)))
    x = jaxdiff.sample(None, jnp.zeros(2), times, steps, image_keys(0, 2), start=jnp.asarray(2))
    assert x.tolist() == [12, 43]


@pytest.mark.slow
def test_an_image_follows_its_schedule(tiny, compilations):
    """Equal to two steps with one prompt and two with the other; other prompts of four texts compile nothing."""
    model, params = tiny
    options = {"steps": 4, "guidance_scale": 3.0}
    drawn = jaxdiff.generate(model, params, ["a [castle:dragon:0.5]", "a house"], "[blurry|red]", seed=5, **options)
    compilations.clear()
    jaxdiff.generate(model, params, ["[a|b|c|d]", "a [house]"], ["", "(x:1.2)"], seed=1, **options)
    assert not any("program" in name for name in compilations)

    settings, keys = resolve_settings(model, **options), image_keys(5, 1)
    method, times = get_scheduler(settings.scheduler, model.scheduler), settings.call.times

    @jax.jit
    def reference(params, tokens, x):
        cond = jaxdiff.encode_text(model, params, tokens)
        for i, (text, negative) in enumerate(((0, 2), (0, 3), (1, 2), (1, 3))):
            a, b = (jax.tree.map(lambda leaf, n=n: leaf[n : n + 1], cond) for n in (text, negative))
            denoise = jaxdiff.denoiser(model, params, a, b, 3.0)
            x = jaxdiff.sample(denoise, x, times, method, keys, start=i, stop=i + 1)
        return jaxdiff.decode(model, params, x)

    four = jaxdiff.tokenize(model, ["a castle", "a dragon", "blurry", "red"])
    x = settings.call.noise_scale * jaxdiff.initial_noise(keys, LATENT)
    expected = np.round(255 * np.asarray(reference(params, four, x)[0]))
    assert np.abs(drawn[0] - expected).max() <= 1


def test_without_editing_the_program_is_as_it_was():
    model = tiny_model()
    settings = resolve_settings(model)
    assert resolve_images(model, settings, ["a (cat:1.1)", "[b]"], "c").images.picks is None
    words = resolve_images(model, settings, "[a|b] <lora:x:1>", emphasis=False).images
    assert words.picks is None
    np.testing.assert_array_equal(words.tokens.ids, tokens(model, ["[a|b] <lora:x:1>"], emphasis=False).ids)


# What other programs write.


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("<lora:detail>", LoraTag("detail", 1.0, 1.0)),
        ("<lora:a b/c.d:0.7>", LoraTag("a b/c.d", 0.7, 0.7)),
        ("<LORA:x: -.5 >", LoraTag("x", -0.5, -0.5)),
        ("<lyco:x:0.5:0.8>", LoraTag("x", 0.5, 0.8)),
        ("<lora:x:0.5:unet=0.8>", LoraTag("x", 0.5, 0.8)),
        ("<lora:x:te=0.5>", LoraTag("x", 0.5, 0.5)),
    ],
)
def test_tags_of_loras(tag, expected):
    assert split_tags(f"a {tag}cat") == ("a cat", [expected])


@pytest.mark.parametrize("tag", ["<lora:x:much>", "<lora:x:nan>", "<lora:x:1:2:3>", "<lora:x:1:lbw=IN>", "<lora:x:>"])
def test_tags_with_other_weights_are_refused(tag):
    with pytest.raises(PromptError, match=f"^{tag} has weights that cannot be read: write <lora:x:0.8>"):
        split_tags(f"a {tag}")


@pytest.mark.parametrize(
    ("prompt", "words", "said"),
    [
        (
            "a cat <lora:detail:0.7>",
            "a cat ",
            "<lora:detail:0.7>, which is left out: sample.py applies it if it is in --prompt and --lora_dir is given",
        ),
        ("a <hypernet:x:1>cat", "a cat", "<hypernet:x:1>, which is left out: hypernetworks are not supported"),
        ("a cat AND a dog :0.5", None, "in other programs AND joins prompts"),
        ("<fromto[0.5]:cat,dog>", None, "it is a tag of another program"),
        ("<wildcard:colour> cat", None, "it is a tag of another program"),
        ("a embedding:neg.pt", None, "--embedding"),
        ("a (big)++ cat", None, "InvokeAI"),
        ('("a","b").blend(1,1)', None, "InvokeAI"),
        ("a cat, AND, a dog", None, "AND joins prompts"),
        ("a cat AND_PERP a dog", None, "AND joins prompts"),
        ("a cat ADDCOMM a dog", None, "it divides a prompt among regions"),
        ("a cat COUPLE(0 0.5) a dog", None, "it is a function of a program of ComfyUI's"),
        ("a cat++, red", None, "InvokeAI"),
        ("a {red|blue} cat", None, "--matrix draws each"),
        ("a __colour__ cat", None, "--wildcards names the folder"),
        ("a {{red}} cat", None, "NovelAI"),
        ("a cat::2 a dog::1", None, "Midjourney"),
        ("a cat --ar 16:9", None, "it looks like a flag"),
        ("a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, Seed: 1", None, "give --negative_prompt"),
        ("hot:: dog", None, "Midjourney"),
        ("a cat <lora:detail:0.7", None, "whose > is missing"),
        ("a [red:blue:green:0.5] cat", None, "editing by step is [cat:dog:0.5], two texts and a number"),
        ("[a:b:2] [cat:dog::0.5]", None, "'[cat:dog::0.5]', drawn as words"),
        ("a [cat:dog:50%]", None, "editing by step is"),
        (r"a \[x:y:z:1\] [[old]] [a|b] [c:d:.5] (e:1.2) BREAK f", None, ""),
        (r"a \{red|blue\} cat, [cat::10], [a::0.5] snake_case well-known 16:9 e.g. 18+", None, ""),
        ("a cat, AND", None, ""),
        ("I <3 cats > dogs, C++", None, ""),
    ],
)
def test_what_is_drawn_as_words_is_said(prompt, words, said, caplog):
    only_words.cache_clear()
    assert only_words(prompt) == (prompt if words is None else words)
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


@pytest.mark.parametrize(
    ("prompt", "words", "said"),
    [
        ("a (red:1.3) cat", None, "'(red:1.3)', drawn as words: it is for Stable Diffusion 1.x, 2.x and XL"),
        ("a [cat:dog:0.5]", None, "'[cat:dog:0.5]', drawn as words"),
        ("a [cat|dog]", None, "'[cat|dog]', drawn as words"),
        ("a cat BREAK a dog", None, "'BREAK', drawn as words"),
        ("a cat <lora:detail:0.7>", "a cat ", "<lora:detail:0.7>, which is left out"),
        ("a cat AND a dog", None, "AND joins prompts"),
        (r"a (small) cat [in ink], \(x:1.2\), at 12:30 (see: page 2)", None, ""),
    ],
)
def test_what_models_with_a_transformer_draw_as_words_is_said(prompt, words, said, caplog):
    only_words.cache_clear()
    read_as_it_is.cache_clear()
    assert read_as_it_is(prompt) == (prompt if words is None else words)
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)
