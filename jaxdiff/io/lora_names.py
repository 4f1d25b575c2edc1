"""The names of layers in LoRA files.

Names are not parsed: every spelling of every layer is generated from the model's parameters, and a file's names are
looked up among them. The spellings of the UNet's `down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q`:

    diffusers, peft      unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q
    attention processor  unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.processor.to_q
    kohya                lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q
    kohya, SDXL          lora_unet_input_blocks_2_1_transformer_blocks_0_attn1_to_q
    OneTrainer (OMI)     unet.input_blocks.2.1.transformer_blocks.0.attn1.to_q
    ComfyUI              diffusion_model.input_blocks.2.1.transformer_blocks.0.attn1.to_q
    peft                 base_model.model.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q
    diffusers' trainers  unet.base_model.model.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q
    SimpleTuner          lycoris_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q

and of the text encoder's `encoder.layers.0.self_attn.q_proj`:

    diffusers, peft      text_encoder.text_model.encoder.layers.0.self_attn.q_proj
    attention processor  text_encoder.text_model.encoder.layers.0.self_attn.to_q
    kohya                lora_te_text_model_encoder_layers_0_self_attn_q_proj (SDXL: lora_te1_, lora_te2_)
    OneTrainer (OMI)     clip_l.text_model.encoder.layers.0.self_attn.q_proj (SDXL: clip_l, clip_g)
    ComfyUI              text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj
    peft                 base_model.model.text_model.encoder.layers.0.self_attn.q_proj (of either encoder)
    LyCORIS              lycoris_text_model_encoder_layers_0_self_attn_q_proj (of either encoder)

Files of cloneofsimo/lora have no names, but list the layers in the order in which PyTorch visits them: `list_orders`.
"""

import dataclasses
import re
from collections.abc import Iterator

from jaxdiff.errors import WeightsError
from jaxdiff.io import kinds, lycoris
from jaxdiff.io.lora_layers import Layer
from jaxdiff.io.original_layout import Table, place
from jaxdiff.io.tensor_files import TensorSource
from jaxdiff.io.transformer_layout import family_of

Tensors = dict[str, str]  # "down", "up" or another of ROLES -> the tensor's name in the file

KOHYA = {  # prefixes by module; the first is written
    "unet": ("lora_unet_",),
    "transformer": ("lora_transformer_", "lora_unet_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
T5 = ("lora_te3_",)  # also in FLUX.1, where T5 is the second text encoder
# peft may insert the adapter's name, as in `lora_A.default_0.weight`.
ROLES = {  # role of a LoRA's tensor -> pattern at the end of its name
    "down": r"\.(?:lora_A(?:\.[^.]+)?|lora_down|lora_linear_layer\.down)\.weight|[._]lora\.down\.weight",
    "up": r"\.(?:lora_B(?:\.[^.]+)?|lora_up|lora_linear_layer\.up)\.weight|[._]lora\.up\.weight",
    "alpha": r"\.alpha",
    "mid": r"\.lora_mid\.weight",  # LoCon's, between down and up
    "magnitude": r"\.dora_scale|\.lora_magnitude_vector(?:\.[^.]+){0,2}",
    "bias": r"\.diff_b|\.b_norm",
    "up_bias": r"\.(?:lora_B(?:\.[^.]+)?|lora_up|lora_linear_layer\.up)\.bias|[._]lora\.up\.bias",  # added by `up`
    lycoris.SCALAR: r"\.scalar",
    **lycoris.ROLES,
}
BIASES = ("bias", "up_bias")  # roles
LORA = re.compile("(.+?)(?:" + "|".join(f"(?P<{role}>{ending})" for role, ending in ROLES.items()) + ")")
OTHER_ADAPTERS = {  # pattern in a tensor's name -> the unsupported kind of adapter
    r"\.oft_(?!blocks$|R\b)": "OFT (early, or of embeddings)",  # `oft_diag` meant three things in turn
    r"\.am\.weight$": "GLoRA (with three matrices over the inputs)",
    r"\.set_weight$": "ComfyUI (whole weights)",
    r"\.reshape_weight$": "LoRA (layer of another size)",
    r"lora_embedding_": "LoRA (table of embeddings)",
    r"lora_E$|ranknum$": "AdaLoRA",
    r"vera_lambda": "VeRA",
    r"trainable_tokens|token_adapter": "LoRA (trained tokens)",
    r"modules_to_save": "LoRA (whole modules beside it)",
    r"^base_model\.model\.(?!.*\.(?:lora|oft)_).*\.(weight|bias)$": "LoRA (whole layers or biases beside it)",
    r"\.(glora|fourierft|hra|vblora|randlora|bone|miss|shira|c3a|waveft|ln_tuning|road)_": "peft (other than LoRA)",
}
CLIP = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",)}  # in OneTrainer and ComfyUI
PROCESSOR = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
BUNDLED = "bundle_emb."  # prefix of bundled embeddings: see `textual_inversion.bundled`

FAMILIES = {  # width of the text that the UNet attends to -> family
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "SDXL",
    1280: "the SDXL refiner",
}
PARTS_OF_FAMILIES = {  # part of a tensor's name -> family
    "te2_": "SDXL",
    "text_encoder_2": "SDXL",
    "clip_g": "SDXL",
    "joint_blocks": "Stable Diffusion 3",
    "double_blocks": "Flux",
    "single_transformer_blocks": "Flux",
    "layers.0.attention": "Z-Image",
    "layers_0_attention": "Z-Image",
    "noise_refiner": "Z-Image",
}
TRANSFORMERS = {"flux": "Flux", "sd3": "Stable Diffusion 3", "z_image": "Z-Image", "flux2": "Flux 2"}


def layer_name(layer: Layer, layout: str, *, two_text_encoders: bool) -> str:
    """The name of a layer in the layout of diffusers or kohya."""
    if layout == "diffusers":
        return spellings(layer)[0]
    return spellings(layer)[2 if two_text_encoders and layer.module == "text_encoder" else 1]


def spellings(layer: Layer, original: Table | None = None) -> list[str]:
    """All names of a layer in files: first diffusers', then kohya's. `original` is from `unet_table`."""
    module, name = layer.module, layer.name.removeprefix(f"{layer.module}.")
    if module == "unet":
        processor_name = re.sub(r"\.(attn\d)\.(\w+)(\.0)?$", r".\1.processor.\2", name)
        full_name, others = name, [processor_name, f"unet.{processor_name}"]
        if original_place := place(name, original or {}, ""):
            others += [
                f"{prefix}{original_place.name}" for prefix in ("unet.", "diffusion_model.", "model.diffusion_model.")
            ]
            others += [f"{prefix}{original_place.name.replace('.', '_')}" for prefix in ("lora_unet_", "oft_unet_")]
    elif module == "transformer":
        full_name, others = name, [f"diffusion_model.{name}"]
    elif name.startswith("encoder.block."):
        full_name, others = name, []
    else:
        stem, _, last = name.rpartition(".")
        full_name = name if name == "text_projection" else f"text_model.{name}"
        others = [layer.name, f"{module}.text_model.{stem}.{PROCESSOR.get(last, last)}", f"base_model.model.{name}"]
        others += [
            f"{prefix}{full_name}"
            for clip in CLIP.get(module, ())
            for prefix in (f"{clip}.", f"text_encoders.{clip}.transformer.")
        ]
    kohya = T5 if name.startswith("encoder.block.") else KOHYA[module]
    prefixes = (*kohya, "lycoris_") + (("oft_unet_",) if module in ("unet", "transformer") else ())
    underscored = [prefix + full_name.replace(".", "_") for prefix in prefixes]
    of_peft = (f"base_model.model.{full_name}", f"{module}.base_model.model.{full_name}")
    return [f"{module}.{full_name}", *underscored, full_name, *of_peft, *others]


def split(path: object, name: str) -> tuple[str, str]:
    """Split a tensor's name in a LoRA's file into the file's name of the layer and the tensor's role, see `ROLES`.

    Raises:
        WeightsError: the tensor belongs to no LoRA, or to an unsupported kind of adapter.

    >>> split("x", "lora_unet_conv_in.lora_down.weight"), split("x", "attn1.processor.to_q_lora.up.weight")
    (('lora_unet_conv_in', 'down'), ('attn1.processor.to_q', 'up'))
    """
    if kind := next((kind for pattern, kind in OTHER_ADAPTERS.items() if re.search(pattern, name)), None):
        article = "an" if kind.startswith(("A", "O", "(I")) else "a"
        raise WeightsError(f"{path} is {article} {kind} adapter (tensor {name}): give a {lycoris.OPEN}.")
    match = LORA.fullmatch(name)
    if match is None or match.lastgroup is None:
        raise WeightsError(f"{path}: tensor {name} is not part of a LoRA: is this a LoRA file?")
    return match[1], match.lastgroup


def _ia3_of(source: TensorSource, name: str) -> str | None:
    """The layer of an (IA)³'s weight, which is recognized by the layer's `on_input`; None for other tensors."""
    stem = name.removesuffix(".weight")
    return stem if stem != name and f"{stem}.on_input" in source.shapes else None


def find_layers(
    source: TensorSource, model: list[Layer], original: Table, module: str | None = None
) -> list[tuple[Layer, Tensors]]:
    """The layers of a model that a file changes, with the tensors of each, whose shapes are checked.

    Args:
        source: the file.
        model: the model's layers.
        original: the UNet's names in the original layout, from `unet_table`.
        module: the only module that the file applies to, if known from elsewhere than its names.

    Raises:
        WeightsError: a tensor is not of a LoRA, or not of one for this model; the message names the first such tensor.
    """
    changes = _find_unnamed(source, model) or _find_named(source, model, original, module)
    if not changes:
        raise WeightsError(f"{source.path} holds no LoRA: no tensor is of one.")
    return changes


def _find_named(
    source: TensorSource, model: list[Layer], original: Table, module: str | None
) -> list[tuple[Layer, Tensors]]:
    """`find_layers` for files with names."""
    _check_kind(source)
    by_spelling: dict[str, list[Layer]] = {}  # peft calls the layers of both text encoders alike
    for layer in model:
        for spelling in dict.fromkeys(spellings(layer, original)):
            by_spelling.setdefault(spelling, []).append(layer)
    by_stem: dict[str, Tensors] = {}  # by what the file calls the layer
    for tensor in sorted(source.shapes):
        if tensor.startswith(BUNDLED):
            continue
        ia3 = _ia3_of(source, tensor)
        stem, role = split(source.path, tensor) if ia3 is None else (ia3, "ia3_weight")
        if other := by_stem.setdefault(stem, {}).get(role):
            raise WeightsError(f"{source.path} holds several adapters, with {other} and {tensor}: keep one of them.")
        by_stem[stem][role] = tensor
    stems: dict[Layer, str] = {}
    for stem, tensors in by_stem.items():
        if stem not in by_spelling:
            raise _misfit(source, model, f"it changes {stem}, which the model does not have")
        tensors = by_stem[stem] = lycoris.current_names(tensors, source.shapes)
        if len(adapters := lycoris.kinds(tensors.keys())) > 1:
            raise WeightsError(f"{source.path} changes {stem} in several ways, {' and '.join(adapters)}: keep one.")
        if {"bias", "up_bias"} <= tensors.keys():
            both = f"{tensors['bias']} and {tensors['up_bias']}"
            raise WeightsError(f"{source.path} changes the bias of {stem} in several ways, {both}: keep one.")
        if missing := _missing(tensors):
            raise WeightsError(f"{source.path} has no {missing} matrix for {stem}: the file is incomplete.")
        fitting = [layer for layer in by_spelling[stem] if _fits(source, layer, tensors)]
        layer = next((x for x in fitting if x.module == module), (fitting or by_spelling[stem])[0])
        if not fitting:
            raise _misfit(source, model, _mismatch(source, layer, tensors))
        if other := stems.get(layer):
            raise WeightsError(f"{source.path} changes {layer.name} twice, as {other} and {stem}: keep one of them.")
        stems[layer] = stem
    return [(layer, by_stem[stem]) for layer, stem in stems.items()]


def _check_kind(source: TensorSource) -> None:
    """Raise a WeightsError that says what the file is, if most of its tensors are not of adapters."""
    adapters = re.compile("|".join(OTHER_ADAPTERS))
    unknown = {
        name: shape
        for name, shape in source.shapes.items()
        if not (name.startswith(BUNDLED) or LORA.fullmatch(name) or adapters.search(name) or _ia3_of(source, name))
    }
    if 2 * len(unknown) > len(source.shapes):
        kinds.refuse(dataclasses.replace(source, shapes=unknown), "a LoRA")


def parts_of(tensors: Tensors) -> Tensors:
    """The tensors of a layer that belong to LyCORIS' adapters other than LoRA; empty for a LoRA."""
    parts = {role: name for role, name in tensors.items() if role in lycoris.PARTS}
    extra = [lycoris.SCALAR] * bool(parts) + ["alpha"] * ("oft_blocks" in parts)  # OFT's alpha is a constraint
    return parts | {role: tensors[role] for role in extra if role in tensors}


def _missing(tensors: Tensors) -> str | None:
    """A role that is missing from a layer's tensors, or None."""
    if parts := parts_of(tensors):
        return lycoris.missing(set(parts))
    if "bias" in tensors and tensors.keys() <= {"bias", "alpha"}:
        return None
    return min({"down", "up"} - tensors.keys(), default=None)


def _torch_shape(kernel: tuple[int, ...]) -> tuple[int, ...]:
    return (kernel[3], kernel[2], *kernel[:2]) if len(kernel) == 4 else kernel[::-1]


def _fits(source: TensorSource, layer: Layer, tensors: Tensors) -> bool:
    """Whether the shapes fit: down [rank, in, …] and up [out, rank], where dense layers may be 1x1 convolutions.

    With mid [rank, rank, …] down is [rank, in, 1, 1]; magnitudes are [out] or [1, in], possibly with further axes of 1.
    """

    def stripped(shape) -> tuple[int, ...]:
        return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)

    parts = {role: source.shapes[name] for role, name in parts_of(tensors).items()}
    weight_shape = stripped(_torch_shape(layer.shape))
    biases = [tuple(source.shapes[tensors[role]]) for role in BIASES if role in tensors]
    if biases and (biases[0] != weight_shape[:1] or not layer.has_bias):
        return False
    if len(layer.shape) == 1:
        return tensors.keys() <= {"diff", "bias", "alpha"} and all(tuple(x) == weight_shape for x in parts.values())
    if parts or "down" not in tensors:
        parts_fit = not parts or lycoris.fits(parts, _torch_shape(layer.shape))
        return parts_fit and _fits_magnitude(source, tensors, weight_shape)
    down, up = (stripped(source.shapes[tensors[role]]) for role in ("down", "up"))
    if "mid" in tensors:
        mid = tuple(source.shapes[tensors["mid"]])
        if len(down) != 2 or len(mid) != 4 or mid[1] != down[0]:
            return False
        down = stripped((mid[0], down[1], *mid[2:]))
    return (
        _fits_magnitude(source, tensors, weight_shape)
        and len(up) == 2
        and up[1] > 0
        and down == (up[1], *weight_shape[1:])
        and up[0] == weight_shape[0]
    )


def _fits_magnitude(source: TensorSource, tensors: Tensors, weight_shape: tuple[int, ...]) -> bool:
    if "magnitude" not in tensors:
        return True
    size = tuple(source.shapes[tensors["magnitude"]])
    ones = (1,) * (len(size) - 1)
    allowed = [(weight_shape[0], *ones), (1, weight_shape[0], *ones[1:])]
    if tensors["magnitude"].endswith("dora_scale"):
        allowed.append((1, weight_shape[1], *ones[1:]))
    return size in allowed


def _mismatch(source: TensorSource, layer: Layer, tensors: Tensors) -> str:
    if not layer.has_bias and tensors.keys() & set(BIASES):
        return f"it changes the bias of {layer.name}, which has none"
    roles = [role for role in ("down", "mid", "up", *lycoris.PARTS, "magnitude", *BIASES) if role in tensors]
    shapes = " and ".join(str(list(source.shapes[tensors[role]])) for role in roles)
    expected = list(_torch_shape(layer.shape))
    return f"for {layer.name} it has matrices of shapes {shapes}, the model a weight of {expected}"


def _find_unnamed(source: TensorSource, model: list[Layer]) -> list[tuple[Layer, Tensors]]:
    """`find_layers` for the numbered tensors of cloneofsimo/lora; empty if the file has names."""
    matched: list[tuple[Layer, Tensors]] = []
    for module, parts in _numbered(source).items():
        orders = [o for o in list_orders(model) if len(o) == len(parts) and module in ("", o[0].module)]
        misfits = []
        for order in orders:
            pairs = list(zip(order, parts, strict=True))
            unfit = [pair for pair in pairs if not _fits(source, *pair)]
            if not unfit:
                matched += pairs
                break
            misfits.append(_mismatch(source, *unfit[0]))
        else:
            no_match = f"it lists {len(parts)} layers, which matches the attention layers of no part of this model"
            raise _misfit(source, model, misfits[0] if misfits else no_match)
    return matched


def _numbered(source: TensorSource) -> dict[str, list[Tensors]]:
    """Pairs in a file without names by module, or "" if unknown: `0`, `1`, … or `unet:0:up`, `unet:0:down`, …

    Such files may also hold embeddings: see `load_textual_inversion`.
    """
    names = set(source.shapes)
    if names and names == {str(i) for i in range(len(names))}:
        return {"": [{"up": str(i), "down": str(i + 1)} for i in range(0, len(names) - 1, 2)]}
    lists: dict[str, list[Tensors]] = {}
    for module in KOHYA:
        while {up := f"{module}:{len(lists.get(module, ()))}:up", down := up.removesuffix("up") + "down"} <= names:
            lists.setdefault(module, []).append({"up": up, "down": down})
    return lists


def list_orders(model: list[Layer]) -> Iterator[list[Layer]]:
    """The layers in each order in which a file of cloneofsimo/lora may list them (its `_find_modules_v2`).

    The UNet's middle block comes last, as PyTorch registers it last. A transformer block has the attentions with or
    without the gated feed-forward, which old versions of diffusers registered between them and new ones after them;
    the shapes decide. CLIP's attention has keys and values before queries.
    """
    blocks = ("down_blocks", "up_blocks", "mid_block")
    projections = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj")
    for inner in (("attn1", "attn2"), ("attn1", "ff", "attn2"), ("attn1", "attn2", "ff")):
        yield _sorted(model, r"unet\.(\w+)(.*)\.(attn1|attn2|ff)\.(.*)", (blocks, None, inner, projections))
    for module in ("text_encoder", "text_encoder_2"):
        yield _sorted(model, rf"{module}\.(.*)\.(\w+)", (None, ("k_proj", "v_proj", "q_proj", "out_proj")))


def _sorted(model: list[Layer], pattern: str, orders: tuple[tuple[str, ...] | None, ...]) -> list[Layer]:
    """Layers whose names match, sorted by each group's index in its order, or by the numbers in it if that is None."""
    keyed = []
    for layer in model:
        match = re.fullmatch(pattern, layer.name)
        pairs = list(zip(match.groups(), orders, strict=True)) if match else []
        if pairs and all(order is None or group in order for group, order in pairs):
            key = [order.index(g) if order else [int(n) for n in re.findall(r"\d+", g)] for g, order in pairs]
            keyed.append((key, layer))
    return [layer for _, layer in sorted(keyed)]


def _misfit(source: TensorSource, model: list[Layer], reason: str) -> WeightsError:
    """The error for a LoRA of another model, with a guess of its family."""
    family = next((FAMILIES.get(layer.shape[0]) for layer in model if layer.name.endswith("attn2.to_k")), None)
    names = [layer.name.removeprefix("transformer.") + "." for layer in model if layer.module == "transformer"]
    family = TRANSFORMERS.get(family_of(names) or "", family)
    other_family = guess_family(source)
    if other_family is None or other_family in (family or ""):  # Flux's and Flux 2's layers are called alike
        return WeightsError(f"{source.path} does not fit this model: {reason}.")
    expected = family or "of another family"
    return WeightsError(f"{source.path} is a LoRA for {other_family}, this model is {expected}: {reason}.")


def guess_family(source: TensorSource) -> str | None:
    """The family that a LoRA seems to be for, by its names or by the text's width, which is only ever an input."""
    for part, family in PARTS_OF_FAMILIES.items():
        if any(part in name for name in source.shapes):
            return family
    excluded = {n for n in source.shapes if (m := LORA.fullmatch(n)) and m.lastgroup in lycoris.NEEDED}
    shapes = {n: s for n, s in source.shapes.items() if len(s) >= 2 and not n.startswith(BUNDLED) and n not in excluded}
    unet = [s for n, s in shapes.items() if not n.startswith(("text_encoder", "lora_te", "clip_"))]
    matrices = unet or list(shapes.values())
    inputs = {shape[1] for shape in matrices if shape[0] < shape[1]}
    outputs = {shape[0] for shape in matrices if shape[0] > shape[1]}
    # A text encoder's widths are inputs and outputs, and none is less than that of its text.
    widths = inputs - outputs or {min(inputs, default=0)}
    return next((FAMILIES[width] for width in (2048, 1024, 768, 1280) if width in widths), None)
