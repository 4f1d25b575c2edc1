"""Syntax of other programs in prompts: tags such as <lora:add_detail:0.7>, and operators."""

import functools
import re
from typing import NamedTuple

from absl import logging

from jaxdiff.text.prompt_files import PromptError
from jaxdiff.text.schedule import parse_schedule

HYPERNET = "hypernet"
_TAG = re.compile(rf"<(lora|lyco|{HYPERNET}):([^<>:]+)((?::[^<>:]*)*)>", re.IGNORECASE)
_WEIGHT = re.compile(r"\s*[+-]?(\d{1,9}\.?\d*|\.\d+)\s*")
_OPERATORS = {
    r"\w\W*\bAND(_PERP|_SALT|_TOPK)?\b\W*\w": "in other programs AND joins prompts",
    r"\b(ADDCOMM|ADDBASE|ADDCOL|ADDROW)\b": "it divides a prompt among regions in other programs",
    r"\b(COUPLE|MASK|AREA|FEATHER|STYLE|SHUFFLE|SHIFT)\(": "it is a function of a program of ComfyUI's",
    r"<\w+(\[[^<>\]]*\])?:[^<>]+>": "it is a tag of another program",
    r"\bembedding:\w": "it names a file in ComfyUI; give --embedding here, and write its token",
    r"(\)|[^\W\d_]{2})(\++|--+)(?=\s|,|$)": "it is a weight in InvokeAI; write (word:1.1) here",
    r"[\w)\"]\.(swap|blend|and)\(": "it is an operator of InvokeAI; write [cat:dog:0.5] or [cat|dog] here",
    r"(?<!\\)\{[^{}]*\|[^{}]*\}": "it is a choice; --matrix draws each of its alternatives",
    r"(?<![\w\\])__[^\W_][\w/-]*?__(?!\w)": "it is a wildcard; --wildcards names the folder of its file",
    r"(?<!\\)\{[^{}|]+\}": "it is a weight in NovelAI; write (word:1.05) here",
    r"\w::(-?\d*\.?\d+)?(?=\s|,|$)": "it is a weight in Midjourney; write (word:1.1) here",
    r"(?<!\S)--[a-zA-Z]\w*": "it looks like a flag, which goes beside --prompt",
    r"<(?i:lora|lyco|hypernet):[^<>]*$": "it is a tag whose > is missing",
    r"\bNegative prompt:": "give --negative_prompt, and the settings as flags; --from_png reads them from an image",
}
# Brackets like those of editing by step that are none.
_EDITING = {r"(?<!\\)\[[^\[\]]*:\s*\d[^\[\]:]*\]": "editing by step is [cat:dog:0.5], two texts and a number"}
_ONLY_UNETS = "it is for Stable Diffusion 1.x, 2.x and XL; this model reads prompts as they are"
_NOT_OF_TRANSFORMERS = dict.fromkeys(
    (
        r"(?<!\\)\([^()]*:\s*[+-]?(\d+\.?\d*|\.\d+)\s*\)",  # (word:1.3)
        r"(?<!\\)\[[^\[\]]*(\|[^\[\]]*|:\s*[+-]?(\d+\.?\d*|\.\d+)\s*)\]",  # [cat|dog], [cat:dog:0.5]
        r"\bBREAK\b",
    ),
    _ONLY_UNETS,
)


class LoraTag(NamedTuple):
    """A LoRA that a prompt names, with its weights."""

    name: str
    text_encoder: float
    unet: float


def split_tags(prompt: str) -> tuple[str, list[LoraTag]]:
    """A prompt without its LoRA tags, and the tags; tags of other kinds stay in the prompt.

    As in the AUTOMATIC1111 web UI, <lora:name:0.7> has one weight, and <lora:name:0.5:0.8>, or
    <lora:name:te=0.5:unet=0.8>, one of the text encoders and one of the UNet. <lyco:…> is the same.

    Raises:
        PromptError: a weight is not a number.

    >>> split_tags("a cat <lora:detail:0.7>, big <hypernet:x:1>")
    ('a cat , big <hypernet:x:1>', [LoraTag(name='detail', text_encoder=0.7, unet=0.7)])
    """
    tags = [match for match in _TAG.finditer(prompt) if match[1].lower() != HYPERNET]
    return _TAG.sub(lambda m: m[0] if m[1].lower() == HYPERNET else "", prompt), list(map(_parse_lora, tags))


def _parse_lora(tag: re.Match) -> LoraTag:
    values = tag[3].split(":")[1:]
    keywords = {key: value for key, equals, value in (w.partition("=") for w in values) if equals}
    positional = [w for w in values if "=" not in w]
    text_encoder = keywords.get("te", positional[0] if positional else "1")
    unet = keywords.get("unet", positional[1] if len(positional) > 1 else text_encoder)
    if (
        len(positional) > 2
        or set(keywords) - {"te", "unet"}
        or not (_WEIGHT.fullmatch(text_encoder) and _WEIGHT.fullmatch(unet))
    ):
        raise PromptError(f"{tag[0]} has weights that cannot be read: write <{tag[1]}:{tag[2]}:0.8>.")
    return LoraTag(tag[2].strip(), float(text_encoder), float(unet))


@functools.lru_cache(maxsize=4096)
def only_words(prompt: str) -> str:
    """A prompt without tags; warns, once a prompt, of tags and of operators that only other programs know."""
    for tag in _TAG.finditer(prompt):
        reason = (
            "hypernetworks are not supported"
            if tag[1].lower() == HYPERNET
            else "sample.py applies it if it is in --prompt and --lora_dir is given"
        )
        logging.warning("The prompt %.60r has %s, which is left out: %s.", prompt, tag[0], reason)
    text = _TAG.sub("", prompt)
    _warn(prompt, text, _OPERATORS)
    _warn(prompt, "".join(part for part in parse_schedule(text) if isinstance(part, str)), _EDITING)
    return text


@functools.lru_cache(maxsize=4096)
def read_as_it_is(prompt: str) -> str:
    """`only_words` for a model without emphasis and editing by step; warns of these too."""
    text = only_words(prompt)
    _warn(prompt, text, _NOT_OF_TRANSFORMERS)
    return text


def _warn(prompt: str, text: str, patterns: dict[str, str]) -> None:
    for pattern, explanation in patterns.items():
        if match := re.search(pattern, text):
            logging.warning("The prompt %.60r has %r, drawn as words: %s.", prompt, match[0].strip(), explanation)
