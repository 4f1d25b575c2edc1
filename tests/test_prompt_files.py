"""Files of prompts, styles, wildcards and grids."""

import contextlib
import itertools
import json
import time

import numpy as np
import pytest

from jaxdiff.text.emphasis import parse_emphasis
from jaxdiff.text.prompt_files import PromptError, PromptLine, read_prompts
from jaxdiff.text.styles import STYLES_FILE, apply_style, read_styles
from jaxdiff.text.wildcards import MAX_DEPTH, expand

# Files


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_prompts_file(tmp_path):
    text = "\ufeff# two of them\r\na castle, café \r\n\ta (dragon:1.2)\r\n\r\n"
    assert read_prompts(write(tmp_path / "p.txt", text)) == [PromptLine("a castle, café"), PromptLine("a (dragon:1.2)")]


def test_prompts_file_of_json_lines(tmp_path):
    lines = ['{"prompt": "a castle", "seed": 7}', "# none", '{"prompt": "", "negative_prompt": "blurry"}']
    assert read_prompts(write(tmp_path / "p.jsonl", "\n".join(lines))) == [
        PromptLine("a castle", None, 7),
        PromptLine("", "blurry"),
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a castle --n blurry, low quality --d 7", PromptLine("a castle", "blurry, low quality", 7)),
        ("a cat --d 0", PromptLine("a cat", None, 0)),
        ('--prompt "a castle" --negative_prompt "blurry" --seed -1', PromptLine("a castle", "blurry", None)),
        ("--seed 9 --prompt a cat, (red:1.2)", PromptLine("a cat, (red:1.2)", None, 9)),
        ("a cat --ar 16:9", PromptLine("a cat --ar 16:9")),  # drawn as words, with a warning
        ("a well--known cat --not so", PromptLine("a well--known cat --not so")),
    ],
)
def test_lines_with_settings_of_other_programs(line, expected, tmp_path):
    assert read_prompts(write(tmp_path / "p.txt", f"{line}\n")) == [expected]


@pytest.mark.parametrize("name", ["P.JSONL", "p.ndjson", "p.json"])
def test_json_lines_by_other_names(name, tmp_path):
    assert read_prompts(write(tmp_path / name, '{"prompt": "a castle", "seed": 7}')) == [
        PromptLine("a castle", None, 7)
    ]


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("p.txt", "version https://git-lfs.github.com/spec/v1\n", r"p\.txt is a Git LFS pointer, .*: fetch it again"),
        (
            "p.txt",
            "a castle\n  \na dragon\n",
            r"^Line 2 of \S*p.txt is empty: write a prompt there, or delete the line\.$",
        ),
        ("p.txt", "\na castle", r"^Line 1 of \S*p.txt is empty"),
        ("p.txt", "", r"^\S*p.txt holds no prompt: write one a line\.$"),
        ("p.txt", "# nothing\n\n\n", r"^\S*p.txt holds no prompt"),
        ("p.txt", b"a caf\xe9", r"^The prompts file \S*p.txt is not UTF-8 text \(byte 5\): save it as UTF-8\.$"),
        (
            "p.txt",
            "a cat --w 512 --h 768",
            r"^Line 1 of \S*p.txt sets --w, .*: give --width on the command line instead",
        ),
        ("p.txt", "a cat --d x", r"^Line 1 of \S*p.txt has the seed 'x', which is not a whole number\.$"),
        ("p.txt", "a cat --d -2", r"^Line 1 of \S*p.txt has the seed -2; seeds are from 0"),
        ("p.txt", "a cat --n dog --negative_prompt fox", r"^Line 1 of \S*p.txt gives negative_prompt twice\.$"),
        ("p.txt", "--seed 4", r"^Line 1 of \S*p.txt holds no prompt\.$"),
        ("p.txt", '{"prompt": "a", "seed": 1}', r"^Line 1 of \S*p.txt is JSON: name the file \.jsonl\.$"),
        (
            "p.CSV",
            "prompt,seed\na castle,1",
            r"p.CSV is of a kind whose lines are no prompts: write one a line as .txt",
        ),
        ("p.yaml", "- a castle", r"p.yaml is of a kind whose lines are no prompts"),
        ("p.jsonl", "a castle", r"^Line 1 of \S*p.jsonl is not JSON: write \{"),
        ("p.jsonl", "[" * 100_000, r"^Line 1 of \S*p.jsonl is not JSON"),
        ("p.jsonl", '["a"]', r'^Line 1 of \S*p.jsonl is not a JSON object with a text under "prompt"\.$'),
        ("p.jsonl", '{"prompt": 1}', r'not a JSON object with a text under "prompt"\.$'),
        ("p.jsonl", '{"prompt": "a", "steps": 1}', r"has the key 'steps'; known are prompt, negative_prompt, seed\.$"),
        ("p.jsonl", '{"prompt": "a", "seed": true}', r"has a seed that is not a whole number\.$"),
        ("p.jsonl", '{"prompt": "a", "negative_prompt": 1}', r"has a negative_prompt that is not text\.$"),
    ],
)
def test_unusable_prompts_file(tmp_path, name, data, sentence):
    with pytest.raises(PromptError, match=sentence):
        read_prompts(write(tmp_path / name, data))


def test_prompts_file_that_is_none(tmp_path):
    with pytest.raises(PromptError, match=r"^The prompts file \S*none.txt does not exist\.$"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(PromptError, match=r"^The prompts file \S* cannot be read"):
        read_prompts(tmp_path)
    with pytest.raises(PromptError, match="cannot be read"):
        read_prompts("a\x00b")


# Styles


def test_styles_that_come_with_the_package():
    styles = read_styles()
    assert len(styles) >= 20
    assert list(styles) == sorted(styles)
    for name, style in styles.items():
        assert name == name.lower().strip()
        assert style.prompt.count("{prompt}") == 1
        assert style.negative_prompt
        assert all(p.weight == 1 for text in style for p in parse_emphasis(text))
    assert json.loads(STYLES_FILE.read_text("utf-8")).keys() == styles.keys()


def test_apply_style(tmp_path):
    styles = {"ink": {"prompt": "ink, {prompt}, {prompt}", "negative_prompt": "photo"}, "bare": {}}
    path = write(tmp_path / "s.json", json.dumps(styles))
    assert apply_style("a {red} castle", "blurry", "ink", path) == (
        "ink, a {red} castle, a {red} castle",
        "blurry, photo",
    )
    assert apply_style("{prompt}", None, "ink", path) == ("ink, {prompt}, {prompt}", "photo")
    assert apply_style("a", None, "bare", path) == ("a", None)
    assert apply_style("a", "", "bare", path) == ("a", "")
    with pytest.raises(PromptError, match=r"^The style 'oil' is unknown; known are bare, ink\.$"):
        apply_style("a", None, "oil", path)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("", r"^The styles file \S*s.json is not JSON \("),
        ("{", r"^The styles file \S*s.json is not JSON \("),
        ("[" * 100_000, r"^The styles file \S*s.json is not JSON \("),
        ("[]", r"^The styles file \S*s.json must be a JSON object of styles"),
        ("{}", r"^The styles file \S*s.json must be a JSON object of styles"),
        ('{"a": "ink"}', r"^The style 'a' of \S*s.json must be an object of texts"),
        ('{"a": {"prompt": 1}}', r"^The style 'a' of \S*s.json must be an object of texts"),
        ('[{"prompt": "ink"}]', r"^The styles file \S*s.json must be a JSON object of styles"),
        ('[{"name": "a"}, {"name": "a"}]', r"^The styles file \S*s.json has two styles 'a': rename one"),
        ('[{"name": "a", "text": "b"}]', r"^The style 'a' of \S*s.json has the key 'text'"),
        (
            '{"a": {"name": "a"}}',
            r"^The style 'a' of \S*s.json has the key 'name'; known are prompt, negative_prompt\.",
        ),
        (b"\xff", r"^The styles file \S*s.json is not UTF-8"),
    ],
)
def test_unusable_styles_file(tmp_path, data, sentence):
    with pytest.raises(PromptError, match=sentence):
        read_styles(write(tmp_path / "s.json", data))


def test_styles_as_the_web_ui_keeps_them(tmp_path, caplog):
    table = (
        "\ufeffname,prompt,negative_prompt,notes\nNone,,,\n"
        'Ink,"ink drawing, masterpiece","photo, {prompt}",mine\nFilm,"film still of {prompt}, grain",\n'
    )
    path = write(tmp_path / "styles.csv", table)
    assert set(read_styles(path)) == {"None", "Ink", "Film"}
    assert apply_style("a castle", "blurry", "Ink", path) == ("a castle, ink drawing, masterpiece", "photo, blurry")
    assert apply_style("", None, "Ink", path) == ("ink drawing, masterpiece", "photo")
    assert apply_style("a castle", None, "Film", path) == ("film still of a castle, grain", None)
    assert apply_style("a castle", "blurry", "None", path) == ("a castle", "blurry")
    assert caplog.text.count("the column notes is not used by styles") == 1
    for bad in ("", "name;prompt\na;b\n", "title,prompt\na,b\n"):
        with pytest.raises(PromptError, match=r"styles.csv must be a table with the columns name, prompt and negative"):
            read_styles(write(path, bad))


def test_a_table_of_styles_that_is_none(tmp_path):
    with pytest.raises(PromptError, match=r"styles.csv is not a CSV table \(field larger than field limit"):
        read_styles(write(tmp_path / "styles.csv", "name,prompt\na," + 200_000 * "b"))


def test_styles_as_sdxl_has_them(tmp_path):
    styles = [{"name": "sai-ink", "prompt": "ink of {prompt} . bold", "negative_prompt": "photo"}, {"name": "bare"}]
    path = write(tmp_path / "s.json", json.dumps(styles))
    assert apply_style("a castle", "blurry", "sai-ink", path) == ("ink of a castle . bold", "blurry, photo")
    assert apply_style("a castle", None, "bare", path) == ("a castle", None)


# Wildcards and grids


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "colour.txt", "# some\nred\n\n green \nblue {x|y}\n")
    (tmp_path / "wild").mkdir()
    write(tmp_path / "wild" / "big_cat.txt", "lion\ntiger\n")
    return tmp_path


@pytest.mark.parametrize(
    ("prompt", "prompts", "axes"),
    [
        ("a castle", ["a castle"], []),
        ("", [""], []),
        ("{red|green} castle", ["red castle", "green castle"], [["red", "green"]]),
        ("{a|b}{1|2|3}", ["a1", "a2", "a3", "b1", "b2", "b3"], [["a", "b"], ["1", "2", "3"]]),
        ("a{ red|} castle", ["a red castle", "a castle"], [[" red", ""]]),
        ("{one} {}", ["one "], []),
        ("{a|{b|c} d|e}", ["a", "b d", "c d", "e"], [["a", "b d", "c d", "e"]]),
        ("a | b } c", ["a | b } c"], []),
        (r"\{a\|b\} {c\|d|e}", ["{a|b} c|d", "{a|b} e"], [["c|d", "e"]]),
        (r"\(a\) \\ \_\_x\_\_", [r"\(a\) \\ __x__"], []),
        ("snake_case __ __-x__ ___", ["snake_case __ __-x__ ___"], []),
        ("{same|same}", ["same", "same"], [["same", "same"]]),
    ],
)
def test_expand(prompt, prompts, axes):
    assert expand(prompt) == (prompts, axes)


def test_a_grid_has_the_shape_of_its_axes():
    prompts, axes = expand("a {red|green|blue} {castle|dragon} {at night|}")
    assert len(prompts) == np.prod([len(axis) for axis in axes])
    for index, labels in zip(np.ndindex(3, 2, 2), itertools.product(*axes), strict=True):
        assert prompts[np.ravel_multi_index(index, (3, 2, 2))] == "a " + " ".join(labels)


def test_wildcards_draw_a_line_by_the_seed(folder):
    lines = {"red", "green", "blue {x|y}"}
    drawn = [expand("__colour__ __colour__", folder, seed=seed) for seed in range(100)]
    assert drawn == [expand("__colour__ __colour__", folder, seed=seed) for seed in range(100)]
    assert {d.prompts[0] for d in drawn} == {f"{a} {b}" for a in lines for b in lines}
    assert all(not d.axes for d in drawn)
    assert expand("{a|b} __wild/big_cat__", folder, seed=1).prompts in (["a lion", "b lion"], ["a tiger", "b tiger"])


def test_wildcards_as_an_axis(folder):
    prompts, axes = expand("a {__wild/big_cat__|dog} __colour__", folder, matrix=True)
    assert axes == [["lion", "tiger", "dog"], ["red", "green", "blue {x|y}"]]
    assert prompts == [f"a {a} {b}" for a, b in itertools.product(*axes)]


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("{a|b", r"^The prompt has a { that is not closed: add }, or write \\{ for the character itself\.$"),
        ("{" * (MAX_DEPTH + 1) + "}" * (MAX_DEPTH + 1), f"^The prompt has braces more than {MAX_DEPTH} deep"),
        ("{" * 100_000, f"^The prompt has braces more than {MAX_DEPTH} deep"),
        ("{a|b}" * 10, r"^The prompt stands for 1024 prompts, more than 1000: leave out alternatives\.$"),
        ("{{a|b}{a|b}{a|b}|c}" * 4, r"^The prompt stands for 6561 prompts, more than 1000"),
        ("{a|b|c}" * 10_000, r"^The prompt stands for over a million million prompts, more than 1000"),
        ("__other__", r"^The wildcard file \S*other.txt does not exist\.$"),
        ("__empty__", r"^The wildcard file \S*empty.txt holds no alternative: write one a line\.$"),
        ("__latin__", r"^The wildcard file \S*latin.txt is not UTF-8"),
    ],
)
def test_what_cannot_be_expanded(folder, prompt, sentence):
    write(folder / "empty.txt", "# nothing")
    write(folder / "latin.txt", b"caf\xe9")
    with pytest.raises(PromptError, match=sentence):
        expand(prompt, folder)


def test_a_wildcard_needs_a_folder_and_stays_in_it(folder):
    with pytest.raises(PromptError, match=r"^The prompt has the wildcard __colour__ and there is no wildcards folder"):
        expand("a __colour__ castle")
    for path in ("../colour", "/etc/hosts", "wild/../colour", "colour."):
        assert expand(f"__{path}__", folder).prompts == [f"__{path}__"]


@pytest.mark.parametrize("text", ["__a" * 30_000, "__a-" * 30_000, "_" * 100_000, "\\" * 100_001, "a_" * 50_000])
def test_long_odd_text_is_expanded_in_time(folder, text):
    begin = time.process_time()
    with contextlib.suppress(PromptError):
        expand(text, folder)
    assert time.process_time() - begin < 5
