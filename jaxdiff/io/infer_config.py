"""Inferring the configs of a checkpoint from its tensors.

Sizes follow from shapes. Everything else (the number of heads, activations, the noise schedule) is as in the published
Stable Diffusion model of the same family.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

from jaxdiff.config import CLIPTextConfig, PipelineOptions, SchedulerConfig, SD3Config, UNetConfig, VAEConfig
from jaxdiff.config.networks import Flux2VAEConfig
from jaxdiff.errors import WeightsError
from jaxdiff.io import kinds
from jaxdiff.io.original_layout import UNET_PREFIX, VAE_PREFIX
from jaxdiff.io.tensor_files import TensorSource
from jaxdiff.io.transformer_folder import GUIDANCE, text_widths

# family -> prefixes of its text encoders
TEXTS: dict[str, dict[str, str]] = {
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.text_model.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sdxl_refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
    "sd2": {"text_encoder": "cond_stage_model.model."},  # and "upscaler"
    "sd1": {"text_encoder": "cond_stage_model.transformer.text_model."},
    "sd3": {"text_encoder": "text_encoders.clip_l.transformer.", "text_encoder_2": "text_encoders.clip_g.transformer."},
}
TURBO = {"text_encoder": "conditioner.embedders.0.model."}  # SD-Turbo: "sd2" in SDXL's layout
SAMPLE_SIZES = {"sd1": 64, "sd2": 64}  # latents along a side
SAMPLE_SIZES |= dict.fromkeys(("sdxl", "sdxl_refiner", "upscaler", "sd3", "flux", "z_image", "flux2"), 128)
SCALING = {"sdxl": 0.13025, "sdxl_refiner": 0.13025, "upscaler": 0.08333, "sd3": 1.5305}
SCALING |= {"flux": 0.3611, "z_image": 0.3611}
SHIFTS = {"sd3": 0.0609, "flux": 0.1159, "z_image": 0.1159}
CHANNELS = {"sd3": 16, "flux": 16, "z_image": 16, "flux2": 32}  # of latents, if not 4
MIDDLE, SIDES = "UNetMidBlock2DCrossAttn", ("encoder", "decoder")
HEAD_WIDTH, CLIP_HEAD_WIDTH = 64, 64
USED_LAYERS = 23  # of OpenCLIP-H's 24, in SD 2.x
_SD: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_WIDE = _SD | {"beta_start": 0.0001, "beta_end": 0.02}
SCHEDULERS: dict[str, dict[str, Any]] = {  # scheduler_config.json of the published folders
    "sd1": _SD | {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    "sd2": _SD | {"_class_name": "DDIMScheduler"},
    "turbo": _SD | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
    "sdxl": _SD | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    "sdxl_refiner": _SD | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    "lcm": _SD | {"_class_name": "LCMScheduler", "set_alpha_to_one": True, "steps_offset": 0},
    "upscaler": _WIDE | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "sd3": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
}
LOW_RES = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "clip_sample": True,
    "variance_type": "fixed_small",
}


class Shapes(dict[str, list[int]]):
    """The shapes of one network's tensors by their names without a prefix; looking up a missing one raises an error."""

    def __init__(self, source: TensorSource, prefix: str):
        super().__init__((n.removeprefix(prefix), s) for n, s in source.shapes.items() if n.startswith(prefix))
        self.path, self.prefix = source.path, prefix

    def __missing__(self, name: str) -> list[int]:
        raise WeightsError(
            f"{self.path} lacks the tensor {self.prefix}{name}: is it a whole Stable Diffusion checkpoint in the "
            "original layout?"
        )

    def count(self, pattern: str) -> int:
        """How many consecutive numbers 0, 1, 2 … in place of {} make `pattern` the prefix of a name."""
        starts = (pattern.format(i) for i in itertools.count())
        return next(i for i, start in enumerate(starts) if not any(n.startswith(start) for n in self))


@contextlib.contextmanager
def as_weights_error(source: TensorSource) -> Iterator[None]:
    """Turn the errors that unexpected shapes raise into a WeightsError that names the file."""
    try:
        yield
    except (IndexError, ZeroDivisionError, ValueError) as e:
        if isinstance(e, WeightsError):
            raise
        raise WeightsError(f"{source.path} has tensors of unexpected shapes ({e}): fetch it again.") from None


def detect(source: TensorSource, *, without_vae: bool = False) -> str:
    """The family of a one-file checkpoint, as in `Model.family`, by its tensors' names.

    Args:
        without_vae: whether it may lack an autoencoder.

    Raises:
        WeightsError: it is not a complete checkpoint; the message says what it seems to be.
    """
    shapes = source.shapes
    has_unet = any(n.startswith(UNET_PREFIX) for n in shapes)
    sd3 = any(n.startswith(f"{UNET_PREFIX}joint_blocks.") for n in shapes)
    kinds.refuse_family(source, "Stable Diffusion 3" if sd3 else "") if has_unet else kinds.refuse(source)
    families = [family for family in TEXTS if (family == "sd3") == sd3]
    for family in sorted(families, key=lambda f: not all(_has_tokens(source, p) for p in TEXTS[f].values())):
        prefixes = TEXTS[family]
        if all(any(n.startswith(p.removesuffix("text_model.")) for n in shapes) for p in prefixes.values()):
            if not (without_vae or has_vae(source)):
                raise WeightsError(
                    f"{source.path} has no autoencoder ({VAE_PREFIX}…): it was pruned, fetch the whole file, or give "
                    "an autoencoder's file as --vae (`vae` of jaxdiff.load)."
                )
            if family == "sdxl_refiner" and f"{UNET_PREFIX}label_emb.0.0.weight" not in shapes:
                return "sd2"  # SD-Turbo, whose UNet takes no sizes
            is_upscaler = family == "sd2" and f"{UNET_PREFIX}label_emb.weight" in shapes
            return "upscaler" if is_upscaler else family
    if sd3:
        missing = next(p for p in TEXTS["sd3"].values() if not any(n.startswith(p) for n in shapes))
        raise WeightsError(
            f"{source.path} is of Stable Diffusion 3 and lacks a text encoder ({missing}…): fetch the file that "
            "includes both CLIPs, or give a diffusers folder of the model as --model, and this file as --transformer "
            "(`transformer` of jaxdiff.load)."
        )
    Shapes(source, UNET_PREFIX)["input_blocks.0.0.weight"]  # raises if the file is something else
    no_vae = "" if has_vae(source) else " and no autoencoder"
    raise WeightsError(
        f"{source.path} has no text encoder of Stable Diffusion 1.x, 2.x or XL{no_vae}: it was pruned, fetch the whole "
        "file."
    )


def _has_tokens(source: TensorSource, prefix: str) -> bool:
    """Whether there is a text encoder at a prefix, rather than a stray tensor."""
    starts = (prefix, f"{prefix}embeddings.", f"{prefix.removesuffix('text_model.')}embeddings.")
    return any(f"{start}token_embedding.weight" in source.shapes for start in starts)


def has_vae(source: TensorSource) -> bool:
    """Whether a one-file checkpoint holds an autoencoder, and not just some tensors of one."""
    return all(f"{VAE_PREFIX}{side}.conv_{end}.weight" in source.shapes for side in SIDES for end in ("in", "out"))


def text_prefixes(source: TensorSource, family: str) -> dict[str, str]:
    """The prefix of each text encoder in this file; some files omit transformers' `text_model.`."""
    prefixes = TURBO if is_turbo(source, family) else TEXTS["sd2" if family == "upscaler" else family]
    return {
        n: p if any(s.startswith(p) for s in source.shapes) else p.removesuffix("text_model.")
        for n, p in prefixes.items()
    }


def is_turbo(source: TensorSource, family: str) -> bool:
    """Whether this is SD-Turbo: SD 2.1 distilled to few steps, in the layout of SDXL."""
    return family == "sd2" and any(n.startswith(TURBO["text_encoder"]) for n in source.shapes)


def infer_configs(source: TensorSource, family: str, prediction_type: str | None = None) -> dict[str, Any]:
    """The configs of the networks, "scheduler" and "options", by name.

    Args:
        prediction_type: of the UNet, "epsilon" or "v_prediction", which cannot be inferred. By default that of the
            published models: v for SD 2.x (except its 512-pixel base, inpainting and SD-Turbo) and the upscaler, else
            epsilon.

    Raises:
        WeightsError: a tensor is missing or has the wrong number of axes.
    """
    if family == "sd3":
        return _sd3_configs(source, prediction_type)
    with as_weights_error(source):
        configs: dict[str, Any] = {
            name: text_config(Shapes(source, prefix), openclip=prefix.endswith(".model."), project=name.endswith("2"))
            for name, prefix in text_prefixes(source, family).items()
        }
        pooled = configs["text_encoder_2"].projection_dim if "text_encoder_2" in configs else None
        unet = unet_config(Shapes(source, UNET_PREFIX), family, pooled)
        vae = vae_config(Shapes(source, VAE_PREFIX), family) if has_vae(source) else published_vae(family)
    has_v_mark = "v_pred" in source.shapes  # an empty tensor in fine-tuned SDXL models
    turbo = is_turbo(source, family)
    is_v_family = family == "sd2" and not turbo and unet.in_channels == vae.latent_channels
    if prediction_type is None and (has_v_mark or is_v_family):
        prediction_type = "v_prediction"
    if family == "sd2" and prediction_type == "v_prediction":
        unet = dataclasses.replace(unet, sample_size=96)  # 768 pixels
    published = "turbo" if turbo else family if unet.time_cond_proj_dim is None else "lcm"
    return configs | {
        "unet": unet,
        "vae": vae,
        "scheduler": scheduler_config(published, prediction_type, zero_snr="ztsnr" in source.shapes),
        "options": pipeline_options(family),
    }


def _sd3_configs(source: TensorSource, prediction_type: str | None) -> dict[str, Any]:
    """The configs of Stable Diffusion 3 and 3.5 without T5."""
    configs: dict[str, Any] = {}
    with as_weights_error(source):
        for name, prefix in TEXTS["sd3"].items():
            config = text_config(Shapes(source, f"{prefix}text_model."), openclip=False, project=False)
            configs[name] = dataclasses.replace(
                config,
                hidden_act="gelu" if name == "text_encoder_2" else "quick_gelu",
                projection_dim=Shapes(source, prefix)["text_projection.weight"][0],
                with_projection=True,
            )
        configs["transformer"] = sd3_config(Shapes(source, UNET_PREFIX))
        configs["vae"] = vae_config(Shapes(source, VAE_PREFIX), "sd3") if has_vae(source) else published_vae("sd3")
    for name, expected, actual in text_widths("sd3", configs | {"text_encoder_3": None}):
        if expected != actual:
            raise WeightsError(
                f"{source.path} has a transformer that reads texts of {name} {expected} and text encoders that make "
                f"{actual}: they are of different models, fetch the file again."
            )
    scheduler, options = scheduler_config("sd3", prediction_type), PipelineOptions(guidance_scale=GUIDANCE["sd3"])
    return configs | {"scheduler": scheduler, "options": options}


def sd3_config(shapes: Shapes) -> SD3Config:
    """The config of Stable Diffusion 3's transformer from the shapes of its tensors in the original layout."""
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    layers = shapes.count("joint_blocks.{}.")
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    head = shapes[norm][0] if norm in shapes else HEAD_WIDTH
    return SD3Config(
        sample_size=SAMPLE_SIZES["sd3"],
        patch_size=patch,
        in_channels=channels,
        num_layers=layers,
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=shapes["context_embedder.weight"][1],
        caption_projection_dim=shapes["context_embedder.weight"][0],
        pooled_projection_dim=shapes["y_embedder.mlp.0.weight"][1],
        out_channels=shapes["final_layer.linear.weight"][0] // patch**2,
        pos_embed_max_size=math.isqrt(shapes["pos_embed"][1]),
        dual_attention_layers=tuple(i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes),
        qk_norm="rms_norm" if norm in shapes else None,
    )


def scheduler_config(family: str, prediction_type: str | None = None, *, zero_snr: bool = False) -> SchedulerConfig:
    """The noise schedule and default sampler of a published family, or of the distilled "turbo" and "lcm"."""
    values = SCHEDULERS[family] | ({"prediction_type": prediction_type} if prediction_type else {})
    return SchedulerConfig.from_dict(values | ({"rescale_betas_zero_snr": True} if zero_snr else {}))


def pipeline_options(family: str) -> PipelineOptions:
    """The options in a published family's model_index.json."""
    refines = family == "sdxl_refiner"
    low_res = SchedulerConfig.from_dict(LOW_RES) if family == "upscaler" else None
    return PipelineOptions(
        force_zeros_for_empty_prompt=not refines, requires_aesthetics_score=refines, low_res_scheduler=low_res
    )


def _collapse(values: Iterable[Any]) -> Any:
    """A per-level setting, collapsed to one value if all are equal, as in the published configs."""
    values = tuple(values)
    return values[0] if len(set(values)) == 1 else values


def unet_config(shapes: Shapes, family: str, pooled: int | None = None) -> UNetConfig:
    """The UNet's config from the shapes of its tensors; `pooled` is the width of SDXL's pooled text."""
    levels: list[list[int]] = [[]]  # the blocks of each level
    for block in itertools.count(1):
        if f"input_blocks.{block}.0.op.weight" in shapes:
            levels.append([])
        elif f"input_blocks.{block}.0.in_layers.2.weight" in shapes:
            levels[-1].append(block)
        else:
            break
    if not levels[-1]:
        _ = shapes[f"input_blocks.{block}.0.in_layers.2.weight"]  # raises
    parts = [f"input_blocks.{blocks[0]}" for blocks in levels]
    widths = tuple(shapes[f"{part}.0.out_layers.3.weight"][0] for part in parts)
    attends = [f"{part}.1.proj_in.weight" in shapes for part in parts]
    depths = [shapes.count(f"{part}.1.transformer_blocks.{{}}.") or 1 for part in parts]
    inner = {name.split(".")[1] for name in shapes if name.startswith("middle_block.")}
    middle = MIDDLE if "1" in inner else "UNetMidBlock2D" if inner else None
    blocks_attend = zip(("middle_block", *parts), (middle == MIDDLE, *attends), strict=True)
    attention_block = next((f"{block}.1" for block, attends_here in blocks_attend if attends_here), None)
    if middle == MIDDLE and not attends[-1]:  # the middle block uses the last level's depth
        depths[-1] = shapes.count("middle_block.1.transformer_blocks.{}.")
    only_cross = [
        attends_here and shapes[f"{part}.1.transformer_blocks.0.attn1.to_k.weight"][1] != width
        for part, attends_here, width in zip(parts, attends, widths, strict=True)
    ]
    linear, text_width = (True, 2048) if family == "sdxl" else (False, 768)  # if nothing attends to the text
    if attention_block is not None:
        linear = len(shapes[f"{attention_block}.proj_in.weight"]) == 2
        text_width = shapes[f"{attention_block}.transformer_blocks.0.attn2.to_k.weight"][1]
    return UNetConfig(
        sample_size=SAMPLE_SIZES[family],
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        down_block_types=tuple("CrossAttnDownBlock2D" if attends_here else "DownBlock2D" for attends_here in attends),
        mid_block_type=middle,
        up_block_types=tuple("CrossAttnUpBlock2D" if attends_here else "UpBlock2D" for attends_here in attends[::-1]),
        block_out_channels=widths,
        layers_per_block=_collapse(len(blocks) for blocks in levels),
        transformer_layers_per_block=_collapse(depths),
        attention_head_dim=_collapse(max(1, w // HEAD_WIDTH) for w in widths) if linear and family != "upscaler" else 8,
        only_cross_attention=_collapse(only_cross),
        cross_attention_dim=text_width,
        use_linear_projection=linear,
        **_extra_embeddings(shapes, family, pooled),
    )


def _extra_embeddings(shapes: Shapes, family: str, pooled: int | None) -> dict[str, Any]:
    """Config values of the embeddings added to the time: noise levels, sizes and crops, guidance."""
    extra: dict[str, Any] = {}
    if "label_emb.weight" in shapes:
        extra["num_class_embeds"] = shapes["label_emb.weight"][0]
    if "label_emb.0.0.weight" in shapes:
        width = shapes["label_emb.0.0.weight"][1]
        extra["projection_class_embeddings_input_dim"] = width
        if pooled is None:
            extra["class_embed_type"] = "projection"
        else:
            numbers = 5 if family == "sdxl_refiner" else 6  # sizes and crops, each as sinusoids
            extra |= {"addition_embed_type": "text_time", "addition_time_embed_dim": (width - pooled) // numbers}
    if "time_embed.cond_proj.weight" in shapes:
        extra["time_cond_proj_dim"] = shapes["time_embed.cond_proj.weight"][1]
    return extra


def vae_config(shapes: Shapes, family: str) -> VAEConfig:
    """The autoencoder's config from the shapes of its tensors."""
    levels = shapes.count("encoder.down.{}.")
    widths = tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels))
    return VAEConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=shapes.count("encoder.down.0.block.{}."),
        latent_channels=shapes["decoder.conv_in.weight"][1],
        sample_size=SAMPLE_SIZES[family] * 2 ** (levels - 1),
        scaling_factor=SCALING.get(family, 0.18215),
        shift_factor=SHIFTS.get(family),
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
        mid_block_add_attention="encoder.mid.attn_1.q.weight" in shapes,
    )


def published_vae(family: str) -> VAEConfig:
    """The autoencoder that a published family was trained with."""
    levels = 3 if family == "upscaler" else 4
    return (Flux2VAEConfig if family == "flux2" else VAEConfig)(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(128, 256, 512, 512)[:levels],
        layers_per_block=2,
        latent_channels=CHANNELS.get(family, 4),
        sample_size=SAMPLE_SIZES[family] * 2 ** (levels - 1),
        scaling_factor=SCALING.get(family, 0.18215),
        shift_factor=SHIFTS.get(family),
        use_quant_conv=family not in SHIFTS,
        use_post_quant_conv=family not in SHIFTS,
    )


def text_config(shapes: Shapes, *, openclip: bool, project: bool) -> CLIPTextConfig:
    """A text encoder's config from the shapes of its tensors."""
    token = "token_embedding.weight" if openclip else "embeddings.token_embedding.weight"
    position = "positional_embedding" if openclip else "embeddings.position_embedding.weight"
    layer = "transformer.resblocks.{}." if openclip else "encoder.layers.{}."
    mlp = "mlp.c_fc.weight" if openclip else "mlp.fc1.weight"
    (vocab_size, width), layers = shapes[token], shapes.count(layer)
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=shapes[layer.format(0) + mlp][0],
        num_hidden_layers=min(layers, USED_LAYERS) if openclip and not project else layers,
        num_attention_heads=max(1, width // CLIP_HEAD_WIDTH),
        max_position_embeddings=shapes[position][0],
        hidden_act="gelu" if openclip else "quick_gelu",
        projection_dim=shapes["text_projection"][1] if project else width,
        with_projection=project,
    )
