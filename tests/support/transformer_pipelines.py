"""Small pipelines of the transformer families as PyTorch diffusers builds them, with drawn weights.

Imported only by tests that have asked for torch with `pytest.importorskip`.
"""

import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.loaders import single_file_utils
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

import jaxdiff
from jaxdiff.config import VAEConfig
from jaxdiff.io.model_paths import BUNDLED
from jaxdiff.io.original_layout import UNET_PREFIX, VAE_PREFIX, place, vae_table
from jaxdiff.io.transformer_layout import pieces, swap_halves
from jaxdiff.models import text_encoding
from tests.support import oracle
from tests.support.pipelines import PROJECTION, TEXT_WIDTH, open_clip, text_encoder, tokenizer

FACTOR = 2  # of the autoencoder
PUBLISHED_LAYERS = text_encoding.FLUX2_LAYERS  # of Qwen3, which FLUX.2 reads
text_encoding.FLUX2_LAYERS = (1, 2, 3)  # all of this process, so that four layers are enough
CORPUS = ["a castle at night with two towers", "the red fox and a blue dog, on the hill", "<think>user assistant"] * 9
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
VAE = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CHANNELS = VAE["latent_channels"]
T5_WIDTH = 40


def t5_tokenizer(folder: Path) -> Any:
    """A tokenizer of T5's kind: pieces of words, an end token, padding of id 0."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5TokenizerFast", "extra_ids": 0, "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<unk>"}))
    return transformers.AutoTokenizer.from_pretrained(folder)


def qwen_tokenizer(folder: Path) -> Any:
    """A tokenizer of Qwen's kind: bytes, marks of turns, and a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return transformers.AutoTokenizer.from_pretrained(folder)


def t5() -> torch.nn.Module:
    sizes = {"d_model": T5_WIDTH, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3}
    config = transformers.T5Config(vocab_size=100, feed_forward_proj="gated-gelu", **sizes)
    return oracle.drawn(transformers.T5EncoderModel(config))


def qwen3(layers: int, width: int) -> torch.nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}
    config = transformers.Qwen3Config(
        vocab_size=340, hidden_size=width, intermediate_size=40, num_hidden_layers=layers,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **heads,
    )  # fmt: skip
    return oracle.drawn(transformers.Qwen3ForCausalLM(config))


def scheduler(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def autoencoder() -> torch.nn.Module:
    return oracle.drawn(diffusers.AutoencoderKL(**VAE, scaling_factor=0.36, shift_factor=0.11))


def flux(folder: Path, dev: bool) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4 * CHANNELS, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=T5_WIDTH, pooled_projection_dim=TEXT_WIDTH, guidance_embeds=dev, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if dev else {"shift": 1.0}
    return diffusers.FluxPipeline(
        scheduler(**shift), autoencoder(), text_encoder(), tokenizer(folder / "clip"), t5(),
        t5_tokenizer(folder / "t5"), oracle.drawn(transformer),
    )  # fmt: skip


def sd3(folder: Path, with_t5: bool) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=T5_WIDTH, caption_projection_dim=32,
        pooled_projection_dim=2 * PROJECTION, pos_embed_max_size=12, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    third = (t5(), t5_tokenizer(folder / "t5")) if with_t5 else (None, None)
    first = text_encoder(transformers.CLIPTextModelWithProjection)
    return diffusers.StableDiffusion3Pipeline(
        oracle.drawn(transformer), scheduler(shift=3.0), autoencoder(), first, tokenizer(folder / "clip"),
        open_clip(), tokenizer(folder / "second", "!"), *third,
    )  # fmt: skip


def sd3_of_published_proportions() -> Any:
    """SD 3 without T5, and with what no tensor tells as in the published one: widths of heads, groups, scales."""
    clips = []
    for width, projection, act in ((16, 16, "quick_gelu"), (24, 20, "gelu")):
        sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 1}
        ids = {"bos_token_id": 49406, "eos_token_id": 49407}
        config = transformers.CLIPTextConfig(**sizes, **ids, projection_dim=projection, hidden_act=act)
        clips.append(oracle.drawn(transformers.CLIPTextModelWithProjection(config)))
    with torch.no_grad():
        clips[0].text_projection.weight.copy_(torch.eye(16))
    words = BUNDLED / "clip_tokenizer"
    tokenizers = [transformers.CLIPTokenizer.from_pretrained(words, pad_token=pad) for pad in ("<|endoftext|>", "!")]
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=3, attention_head_dim=64,
        num_attention_heads=1, joint_attention_dim=40, caption_projection_dim=64, pooled_projection_dim=36,
        pos_embed_max_size=12, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    sizes = {"block_out_channels": (32, 64), "norm_num_groups": 32, "sample_size": 256}
    vae = diffusers.AutoencoderKL(**{**VAE, **sizes}, scaling_factor=1.5305, shift_factor=0.0609)
    pipe = diffusers.StableDiffusion3Pipeline(
        oracle.drawn(transformer), scheduler(shift=3.0), oracle.drawn(vae), clips[0], tokenizers[0], clips[1],
        tokenizers[1], None, None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def one_file(pipe: Any) -> dict[str, np.ndarray]:
    """A pipeline of SD 3 as ComfyUI's one file has it, which holds no projection of CLIP-L."""

    def own(name: str) -> dict[str, np.ndarray]:
        return {n: x.numpy() for n, x in getattr(pipe, name).state_dict().items()}

    tensors = {f"{UNET_PREFIX}{n}": x for n, x in original("sd3", own("transformer")).items()}
    vae = vae_table(VAEConfig.from_dict(dict(pipe.vae.config)))
    for n, x in own("vae").items():
        at = place(n, vae, VAE_PREFIX)
        tensors[at.name] = x[..., None, None] if at.squeezed else x
    for name, clip in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        for n, x in own(name).items():
            if n != "text_projection.weight" or clip == "clip_g":
                within = n if n.startswith(("text_model.", "text_projection.")) else f"text_model.{n}"
                tensors[f"text_encoders.{clip}.transformer.{within}"] = x
    return tensors


def z_image(folder: Path) -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=CHANNELS, dim=48, n_layers=2, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=24,
        axes_dims=[4, 6, 6], axes_lens=[600, 32, 32],
    )  # fmt: skip
    tokens = qwen_tokenizer(folder / "qwen")
    return diffusers.ZImagePipeline(
        scheduler(shift=3.0), autoencoder(), qwen3(3, 24), tokens, oracle.drawn(transformer)
    )


def flux2(folder: Path, distilled: bool) -> Any:
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=4 * CHANNELS, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * 24, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = oracle.drawn(diffusers.AutoencoderKLFlux2(**VAE))
    generator = torch.Generator().manual_seed(0)
    vae.bn.running_mean.copy_(torch.randn(4 * CHANNELS, generator=generator))
    vae.bn.running_var.copy_(1 + torch.rand(4 * CHANNELS, generator=generator))
    return diffusers.Flux2KleinPipeline(
        scheduler(shift=3.0, use_dynamic_shifting=True), vae, qwen3(4, 24), qwen_tokenizer(folder / "qwen"),
        oracle.drawn(transformer), is_distilled=distilled,
    )  # fmt: skip


def pipeline(family: str, folder: Path) -> Any:
    """The pipeline of a family by its name below; the folder takes its tokenizers."""
    made = {
        "flux": lambda: flux(folder, True),
        "schnell": lambda: flux(folder, False),
        "sd3": lambda: sd3(folder, True),
        "sd3_without_t5": lambda: sd3(folder, False),
        "z_image": lambda: z_image(folder),
        "flux2": lambda: flux2(folder, False),
        "flux2_distilled": lambda: flux2(folder, True),
    }[family]()
    made.set_progress_bar_config(disable=True)
    return made


class Made:
    """Pipelines and our models of them, each made once a session. Neither they nor their folders are to be changed.

    Args:
        factory: pytest's `tmp_path_factory`.
    """

    def __init__(self, factory: Any) -> None:
        self.factory, self.pipes, self.models = factory, dict[str, Any](), dict[str, Any]()

    def pipe(self, family: str) -> tuple[Any, Path]:
        """PyTorch's pipeline of a family, see `pipeline`, and the folder that it is saved in."""
        if family not in self.pipes:
            place = self.factory.mktemp(family)
            made = pipeline(family, place / "tokenizers")
            made.save_pretrained(place / "model")
            self.pipes[family] = made, place / "model"
        return self.pipes[family]

    def model(self, family: str) -> tuple[Any, Any]:
        """Our model of that folder, and its parameters."""
        if family not in self.models:
            self.models[family] = jaxdiff.load(self.pipe(family)[1])
        return self.models[family]


def latents(pipe: Any, noise: np.ndarray) -> torch.Tensor:
    """Unit noise [B, h, w, C] as the pipeline takes it."""
    x = torch.tensor(noise).permute(0, 3, 1, 2)
    if isinstance(pipe, diffusers.FluxPipeline):
        return pipe._pack_latents(x, *x.shape)
    return pipe._patchify_latents(x) if isinstance(pipe, diffusers.Flux2KleinPipeline) else x


def draw(pipe: Any, prompts: list[str], noise: np.ndarray, steps: int, guidance: float, **more: Any) -> np.ndarray:
    """Images [B, H, W, 3] in [0, 1]."""
    height, width = (FACTOR * side for side in noise.shape[1:3])
    if isinstance(pipe, diffusers.Flux2KleinPipeline):
        more["text_encoder_out_layers"] = text_encoding.FLUX2_LAYERS
    out = pipe(
        prompt=list(prompts), height=height, width=width, num_inference_steps=steps, guidance_scale=guidance,
        latents=latents(pipe, noise), output_type="np", **more,
    )  # fmt: skip
    return np.asarray(out.images)


MASK = np.zeros((16, 24), bool)
MASK[4:12, 8:24] = True


def redraw(pipe: Any, prompts: list[str], images: np.ndarray, noise: np.ndarray, monkeypatch, mask: bool) -> np.ndarray:
    """Images [B, H, W, 3] in [0, 1], half redrawn in five steps; of the autoencoder's Gaussian the mean is taken."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    x = torch.tensor(noise).permute(0, 3, 1, 2)
    monkeypatch.setattr(sys.modules[type(pipe).__module__], "randn_tensor", lambda shape, **how: x.reshape(shape))
    more = {"mask_image": torch.tensor(MASK)[None, None].float()} if mask else {}
    forgets = isinstance(pipe, diffusers.StableDiffusion3InpaintPipeline)  # the shift, when it decodes
    out = pipe(
        prompt=list(prompts), image=torch.tensor(images).permute(0, 3, 1, 2), strength=0.5, num_inference_steps=5,
        guidance_scale=2.0, height=images.shape[1], width=images.shape[2],
        output_type="latent" if forgets else "np", **more,
    )  # fmt: skip
    if not forgets:
        return np.asarray(out.images)
    z = out.images / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    with torch.no_grad():
        return (pipe.vae.decode(z).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def original(
    family: str, tensors: Mapping[str, Any], concatenate: Callable = np.concatenate, swap: Callable = swap_halves
) -> dict[str, Any]:
    """A transformer's tensors in their authors' layout, as PyTorch's converters show that it is.

    Args:
        tensors: by diffusers' names, arrays of NumPy.
        concatenate, swap: of other arrays, such as PyTorch's without memory.
    """
    rows = {name.rpartition(".")[0] or name: x.shape[0] for name, x in tensors.items()}
    places, found = pieces(family, rows), dict[str, list]()
    for name, x in tensors.items():
        layer, dot, last = name.rpartition(".")
        piece = places[layer or name]
        if name == "pos_embed.pos_embed" or not dot:
            found["pos_embed" if dot else name] = [(0, x)]
            continue
        if re.search("(query|key)_norm", piece.name):
            last = "scale"
        found.setdefault(f"{piece.name}{dot}{last}", []).append((piece.start, swap(x) if piece.swapped else x))
    in_order = {name: sorted(parts, key=lambda part: part[0]) for name, parts in found.items()}
    return {name: concatenate([x for _, x in parts]) for name, parts in in_order.items()}


def converter(family: str, width: int) -> Callable:
    """PyTorch's function from the authors' layout to diffusers'; FLUX.1's knows one width."""
    name = f"convert_{family}_transformer_checkpoint_to_diffusers"
    source = inspect.getsource(getattr(single_file_utils, name)).replace("inner_dim = 3072", f"inner_dim = {width}")
    namespace = dict(vars(single_file_utils))
    exec(source, namespace)
    return namespace[name]


@torch.no_grad()
def velocity(
    family: str,
    net: torch.nn.Module,
    x: np.ndarray,
    t: np.ndarray,
    text: np.ndarray,
    pooled: np.ndarray | None = None,
    guidance: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
) -> np.ndarray:
    """What PyTorch's transformer says of latents [B, h, w, C] at times [B] in training steps: [B, h, w, C].

    Args:
        text, pooled, guidance: as our networks have them.
        lengths: of Z-Image's prompts in tokens; by default all of `text`.
    """
    b, h, w, c = x.shape
    images, times, words = torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(text)
    vector, told = (None if value is None else torch.tensor(value) for value in (pooled, guidance))
    if family == "sd3":
        return net(images, words, vector, times).sample.permute(0, 2, 3, 1).numpy()
    if family == "z_image":
        own = [rows if lengths is None else rows[: int(lengths[i])] for i, rows in enumerate(words)]
        out = net(list(images[:, :, None]), (1000 - times) / 1000, own, return_dict=False)[0]
        return -torch.stack(list(out)).squeeze(2).permute(0, 2, 3, 1).numpy()
    packed = diffusers.FluxPipeline._pack_latents(images, b, c, h, w)
    if family == "flux":
        ids = diffusers.FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32)
        out = net(packed, words, vector, times / 1000, ids, torch.zeros(text.shape[1], 3), told).sample
    else:
        ids = diffusers.Flux2KleinPipeline._prepare_latent_ids(torch.zeros(b, 4 * c, h // 2, w // 2))
        out = net(packed, words, times / 1000, ids, diffusers.Flux2KleinPipeline._prepare_text_ids(words), told).sample
    return diffusers.FluxPipeline._unpack_latents(out, 8 * h, 8 * w, 8).permute(0, 2, 3, 1).numpy()
