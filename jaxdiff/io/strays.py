"""Tensors in a file of weights that do not belong to its networks: skipped with a warning, or refused."""

import dataclasses
import re
from collections.abc import Iterable

from flax.traverse_util import flatten_dict

from jaxdiff.errors import say_once
from jaxdiff.io import tensor_files
from jaxdiff.io.tensor_files import TensorSource
from jaxdiff.io.torch_names import current_name, tensor_name
from jaxdiff.typing import Params

# Tensors in published files that do not belong to the networks and are not needed.
IGNORED = re.compile(
    r"""
    model_ema\..*                                             # the moving average of the UNet
    | ((low_scale_model|noise_augmentor)\.)?(betas|\w*alphas_cumprod(_prev)?|posterior_\w+|logvar|lvlb_weights)
    | denoiser\.\w+ | global_step | scale_factor              # the noise schedule and other values of training
    | v_pred | ztsnr                                          # markers, read by `infer_configs`
    | (first_stage_model\.)?(loss|model_ema)\..*              # the autoencoder's discriminator and moving average
    | embedding_manager\..*                                   # of the original textual inversion code
    | .*\.(position_ids|logit_scale)                          # 0, 1, 2 …; CLIP's temperature
    | (cond_stage_model|conditioner\.embedders\.0)\.(.*\.)?text_projection(\.weight)?  # where it is not applied
    | (cond_stage_model|conditioner\.embedders\.0)\.model\.transformer\.resblocks\.23\..*  # SD 2.x: the unused last one
    """,
    re.VERBOSE,
)
# Tensors that other programs leave among a network's own: of LoRAs and of CLIP's image encoder.
STRAY = re.compile(r"\.alpha$|\.lora_|\.dora_scale$|\.(vision_model|visual)\.|\.num_batches_tracked$")
# Parts that only some configs of a network have. They are not strays, but mean that the config is wrong.
PARTS = re.compile(
    r"(class|add|time)_embedding|add_time_proj|encoder_hid_proj|label_emb|controlnet_\w+|(post_)?quant_conv|(en|de)coder|"
    r"(down|mid|up)_blocks?|(input|output)_blocks|middle_block(_out)?|zero_convs|input_hint_block"
)


def warn_skipped(source: TensorSource, strays: Iterable[str], note: str = "") -> None:
    """Warn of tensors that are not read, naming the first of each group; `note` ends the sentence."""
    if strays := sorted(strays):
        groups = list({n.partition(".")[0]: n for n in strays[::-1]}.values())[::-1]
        summary = f"{len(strays)} tensors that drawing does not need are passed over, such as {', '.join(groups[:5])}"
        say_once(f"{source.path}: {summary}{note}.")


def drop_strays(source: TensorSource, unused: Iterable[str], used: Iterable[str], prefix: str = "") -> list[str]:
    """The unused tensors that seem to belong to the network; warns of the others.

    Args:
        used: names of the network's tensors in the file, which start with `prefix`.
    """

    def first_part(name: str) -> str:
        return name.removeprefix(prefix).partition(".")[0]

    parts, unused = set(map(first_part, used)), [n for n in unused if not IGNORED.fullmatch(n)]
    belonging = [
        n for n in unused if (first_part(n) in parts or PARTS.fullmatch(first_part(n))) and not STRAY.search(n)
    ]
    warn_skipped(source, set(unused) - set(belonging))
    return belonging


def without_strays(source: TensorSource, target: Params) -> TensorSource:
    """A network's file in diffusers' names without stray tensors; `load_tensors` rejects other unknown ones."""
    expected = {tensor_name(path) for path in flatten_dict(target)}
    used = [name for name in source.shapes if current_name(name) in expected or name.endswith(tensor_files.IGNORED)]
    names = {*used, *drop_strays(source, source.shapes.keys() - set(used), expected)}
    return dataclasses.replace(source, shapes={name: x for name, x in source.shapes.items() if name in names})
