"""Recognizing files by their tensors' names, for error messages that say which flag or function takes the file."""

import re
from collections.abc import Iterable

from jaxdiff.errors import WeightsError
from jaxdiff.io.tensor_files import TensorSource

SUPPORTED = (
    "supported are Stable Diffusion 1.x, 2.x, XL, 3 and 3.5, inpainting and LCM of the first three, XL's refiner and "
    "the x4 upscaler, and as folders FLUX.1, Z-Image and FLUX.2 klein"
)
_NET = r"^(model\.diffusion_model\.|transformer\.|unet\.)?"
FAMILIES: dict[str, str] = {  # pattern in a tensor's name -> a model without support for one-file checkpoints
    r"\.(absmax|quant_map|scale_weight|weight_scale)$|^scaled_fp8$": "a model quantised with scales of its own",
    r"^edm_mean$|^edm_vpred\.": "Playground v2.5 or CosXL (EDM's noise schedule)",
    r"\.time_(stack|mixer)\.|\.temporal_transformer_blocks\.": "Stable Video Diffusion",
    r"\.(temopral_conv|temporal_conv|temp_convs|temp_attentions)\.": "a text-to-video model",
    r"^noise_augmentor\.data_|^embedder\.model\.": "Stable unCLIP",
    r"^cc_projection\.": "Stable Zero123",
    r"position_net\.|\.fuser\.": "GLIGEN",
    rf"{_NET}(clip_txt_mapper|clip_txt_pooled_mapper|effnet_mapper|clip_mapper)\.|\.channelwise\.": "Stable Cascade",
    rf"{_NET}(joint_blocks|transformer_blocks\.0\.norm1_context)\.": "Stable Diffusion 3",
    rf"{_NET}distilled_guidance_layer\.": "Chroma",
    rf"{_NET}(txt_in\.individual_token_refiner|context_embedder\.token_refiner)\.": "Hunyuan Video",
    rf"{_NET}(single_stream_modulation|double_stream_modulation_img)\.": "Flux 2",
    rf"{_NET}(double_blocks\.0\.img_attn|single_transformer_blocks\.0)\.": "Flux",
    rf"{_NET}(double_layers|joint_transformer_blocks)\.": "AuraFlow",
    rf"{_NET}double_stream_blocks\.": "HiDream",
    rf"{_NET}(mlp_t5|text_embedding_padding)\b": "Hunyuan DiT",
    rf"{_NET}patchify_proj\.": "LTX Video",
    rf"{_NET}head\.modulation$": "Wan",
    rf"{_NET}blocks\.0\.attn\.qkv_x\.": "Mochi",
    rf"{_NET}(cap_pad_token|x_pad_token)$": "Z-Image",
    rf"{_NET}cap_embedder\.": "Lumina",
    rf"{_NET}(transformer_blocks\.0\.img_mlp|txt_in\.text_norm)\.": "Qwen Image",
    rf"{_NET}(blocks\.0\.cross_attn\.(q|kv)_linear|caption_projection|adaln_single)\.": "PixArt or Sana",
    rf"{_NET}(clip_to_seq|ln_model_n|encoder_hid_proj)\.": "Kandinsky",
    rf"{_NET}(encoder_proj|encoder_pooling)\.": "DeepFloyd IF",
    r"^cond_stage_model\.(transformer\.token_emb|roberta)\.": "a model with another text encoder than CLIP",
    r"^(model\.model\.transformer\.|conditioner\.conditioners\.)": "Stable Audio",
    rf"{_NET}(net\.)?(x_embedder|t_embedder|pos_embedder|patch_embed)\.": "a diffusion transformer",
}
DRAWN_FROM_FOLDERS = ("Stable Diffusion 3", "Flux", "Flux 2", "Z-Image")
_NO = "which is not supported: take a whole ControlNet"
CONTROLS: dict[str, tuple[str, str]] = {  # pattern of networks like ControlNets -> what it is, and how to use it
    r"^lora_controlnet$": ("a Control-LoRA", _NO),
    r"^lllite_": ("a ControlNet-LLLite", _NO),
    r"^difference$": ("a ControlNet as the difference from a model's weights", _NO),
    r"^(task_embedding$|control_add_embedding\.|transformer_layes\.)": ("a ControlNet Union", _NO),
    r"(^|\.)(base_to_ctrl|ctrl_to_base|enc_zero_convs_out)\.": ("a ControlNet-XS", _NO),
    r"^(controlnet_(blocks|x_embedder|mode_embedder|single_blocks)|pos_embed_input)\.": (
        "a ControlNet of a diffusion transformer (Stable Diffusion 3, Flux)",
        "which is not supported: take one of Stable Diffusion 1.x, 2.x or XL",
    ),
    r"motion_modules\.": ("a motion module (AnimateDiff)", "which is not supported: videos are not drawn"),
}
ADAPTERS: dict[str, tuple[str, str]] = {  # other additions to a model
    r"^(adapter\.)?body\.\d+\.(block\d|in_conv|resnets|down_opt)": ("a T2I-Adapter", _NO),
    r"^(image_proj|ip_adapter|image_proj_model|adapter_modules)\.|\.to_k_ip\.": (
        "an IP-Adapter",
        "which is not supported: leave it out",
    ),
    r"^\d+\.[01]\.linear\.\d+\.(weight|bias)$": ("a hypernetwork", "which is not supported: leave it out"),
    r"^lora_|[._]lora[._]|\.lora_(up|down|A|B|mid)\b|\.(hada_w1_a|lokr_w[12]|oft_(blocks|diag|R)|boft_R|ia3_l|on_input)\b"
    r"|\.[ab][12]\.weight$": (
        "a LoRA",
        "load a model, then give the file to jaxdiff.load_lora, or to --lora",
    ),
    r"^(emb_params$|string_to_param\b|clip_[lg]$|<.*>$)": (
        "a textual inversion",
        "load a model, then give the file to jaxdiff.load_textual_inversion, or to --embedding",
    ),
}
NETWORKS: dict[str, tuple[str, str]] = {  # parts of a model; checked after FAMILIES, which have such names too
    r"^control_model\.|^input_hint_block\.|^controlnet_cond_embedding\.": (
        "a ControlNet",
        "give it to jaxdiff.load_controlnet, or to --controlnet",
    ),
    r"^((encoder|decoder)\.layers\.)?\d+\.(conv\.\d+\.)?(weight|bias)$": (
        "a tiny autoencoder",
        "load a model, then give the file to jaxdiff.load_vae, to --vae or to --preview_vae",
    ),
    r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|up|mid|down_blocks|up_blocks|mid_block)\.": (
        "an autoencoder alone",
        "load a model, then give the file to jaxdiff.load_vae, or to --vae",
    ),
    r"^down_blocks\.": ("a UNet of a diffusers folder", "put it into one, beside the other parts"),
    r"(^|\.)vision_model\.": ("a vision encoder", "which is not needed for drawing"),
    r"^(text_model\.)?encoder\.layers\.\d+\.self_attn\.|^transformer\.resblocks\.": (
        "a text encoder",
        "put it into a diffusers folder, beside the other parts",
    ),
    r"^(params(_ema)?\.)?layers\.\d+\.residual_group\.": (
        "an image upscaler of another architecture (SwinIR)",
        "which is not supported: take one of ESRGAN or Real-ESRGAN",
    ),
    r"^(params(_ema)?\.)?(conv_first|RRDB_trunk\.|model\.1\.sub\.|body\.\d+\.rdb1)": (
        "an image upscaler (ESRGAN)",
        "give it to jaxdiff.load_upscaler, or to --upscaler",
    ),
}


def _first_match(patterns: Iterable[str], source: TensorSource) -> str | None:
    """The first pattern that matches in a tensor's name."""
    lines = "\n".join(source.shapes)
    return next((p for p in patterns if re.search(p, lines, re.MULTILINE)), None)


def refuse_family(source: TensorSource, expected: str = "") -> None:
    """Raise a WeightsError if a file is a checkpoint of a known, unsupported model other than `expected`."""
    pattern = _first_match(FAMILIES, source)
    if pattern and FAMILIES[pattern] != expected:
        family = FAMILIES[pattern]
        if family in DRAWN_FROM_FOLDERS:
            raise WeightsError(
                f"{source.path} is of {family}, whose tokenizers no file of weights holds: give a diffusers folder of "
                "the model as --model, and this file as --transformer (`transformer` of jaxdiff.load)."
            )
        raise WeightsError(f"{source.path} is of {family}, which is not supported: {SUPPORTED}.")


def _refuse_one(table: dict[str, tuple[str, str]], source: TensorSource, expected: str = "") -> None:
    pattern = _first_match(table, source)
    if pattern and table[pattern][0] != expected:
        description, advice = table[pattern]
        raise WeightsError(f"{source.path} holds {description}{', ' if advice.startswith('which') else ': '}{advice}.")


def refuse_control(source: TensorSource) -> None:
    """Raise a WeightsError if a file holds a network that resembles a ControlNet but is not one."""
    _refuse_one(CONTROLS, source)


def refuse(source: TensorSource, expected: str = "") -> None:
    """Raise a WeightsError that says what a file is, unless it is unknown or `expected`, such as "a ControlNet"."""
    _refuse_one(CONTROLS | ADAPTERS, source, expected)
    refuse_family(source)
    if expected and any(n.startswith("model.diffusion_model.") for n in source.shapes):
        advice = "give it to jaxdiff.load, or to --model"
        raise WeightsError(f"{source.path} holds a whole checkpoint, not {expected}: {advice}.")
    _refuse_one(NETWORKS, source, expected)
