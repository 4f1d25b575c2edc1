"""What a file of tensors is, by the names of its tensors: which part of a LoRA each is, and what the whole file is."""

import re
from collections.abc import Iterable

from jaxdiff.errors import WeightsError

# peft may put the adapter's name between, as in `lora_A.default_0.weight`.
ROLES = {  # of a LoRA's tensor -> how its name ends
    "down": r"\.(?:lora_A(?:\.[^.]+)?|lora_down|lora_linear_layer\.down)\.weight|[._]lora\.down\.weight",
    "up": r"\.(?:lora_B(?:\.[^.]+)?|lora_up|lora_linear_layer\.up)\.weight|[._]lora\.up\.weight",
    "alpha": r"\.alpha",
    "mid": r"\.lora_mid\.weight",  # LoCon's, between down and up
    "magnitude": r"\.dora_scale|\.lora_magnitude_vector(?:\.[^.]+){0,2}",
}
LORA = re.compile("(.+?)(?:" + "|".join(f"(?P<{role}>{ending})" for role, ending in ROLES.items()) + ")")
OTHER_ADAPTERS = {  # pattern in a tensor's name -> the kind of adapter that has it
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.b?oft_": "OFT",
    r"ia3_l|\.on_input$": "(IA)³",
    r"\.[ab][12m]\.weight$": "GLoRA",
    r"\.[wb]_norm$": "LyCORIS (changed norms)",
    r"\.scalar$": "LyCORIS (learned scale)",
    r"\.(diff(_b)?|set_weight)$": "LyCORIS (full difference)",
    r"\.reshape_weight$": "LoRA (layer of another size)",
    r"lora_(B|up)(\.[^.]+)?\.bias$": "LoRA-with-bias",
    r"lora_embedding_": "LoRA (table of embeddings)",
    r"lora_E$|ranknum$": "AdaLoRA",
    r"vera_lambda": "VeRA",
    r"trainable_tokens|token_adapter": "LoRA (trained tokens)",
    r"modules_to_save": "LoRA (whole modules beside it)",
    r"\.(fourierft|hra|vblora|randlora|bone|miss|shira|c3a|waveft|ln_tuning|road)_": "peft (other than LoRA)",
}
KINDS = {  # what a file is -> pattern in the name of one of its tensors; a file may be several
    "a Control-LoRA": r"^lora_controlnet$",
    "a ControlNet": r"(^|\.)(zero_convs|input_hint_block|controlnet_\w+)\.",
    "an IP-Adapter": r"^(ip_adapter|image_proj)\.",
    "a T2I-Adapter": r"^(adapter\.)?body\.\d+\.",
    "a textual inversion": r"^(emb_params|clip_[lg]|text_encoders_\d|string_to_param\..*|<[^<>]+>)$|^bundle_emb\.",
    "a whole model": r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.",
    "an autoencoder": r"^((encoder|decoder)\.(conv_in|down|up|mid)|post_quant_conv\.)",
}
NUMBERED = re.compile(r"\w+:\d+:(up|down)")  # cloneofsimo/lora


def kinds(names: Iterable[str]) -> list[str]:
    """What a file with tensors of these names is, the likeliest first; empty where that is not known.

    >>> kinds(["bundle_emb.cat.clip_l", "lora_unet_conv_in.lora_up.weight"]), kinds(["weight"])
    (['a LoRA', 'a textual inversion'], [])
    """
    names = list(names)
    adapter = [n for n in names if NUMBERED.fullmatch(n) or LORA.fullmatch(n) or _adapter(n)]
    rest = set(names).difference(adapter)
    found = [kind for kind, pattern in KINDS.items() if any(re.search(pattern, name) for name in rest)]
    if not adapter:
        return found
    return ["a LoRA", *found] if len(adapter) >= len(rest) else [*found, "a LoRA"]  # a stray alpha makes no LoRA


def _adapter(name: str) -> str | None:
    return next((kind for pattern, kind in OTHER_ADAPTERS.items() if re.search(pattern, name)), None)


def split(path: object, name: str) -> tuple[str, str]:
    """A tensor's name in a LoRA's file -> what the file calls the layer, and the tensor's role: see `ROLES`.

    Raises:
        WeightsError: the tensor belongs to no LoRA, or to a kind of adapter that is not built here.

    >>> split("x", "lora_unet_conv_in.lora_down.weight"), split("x", "attn1.processor.to_q_lora.up.weight")
    (('lora_unet_conv_in', 'down'), ('attn1.processor.to_q', 'up'))
    """
    if kind := _adapter(name):
        article = "an" if kind.startswith(("A", "O", "(I")) else "a"
        raise WeightsError(f"{path} is {article} {kind} adapter (tensor {name}): give a LoRA, LoCon or DoRA.")
    match = LORA.fullmatch(name)
    if match is None or match.lastgroup is None:
        raise WeightsError(f"{path}: tensor {name} is not part of a LoRA: is this a LoRA file?")
    return match[1], match.lastgroup
