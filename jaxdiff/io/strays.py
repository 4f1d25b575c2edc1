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

# Tensors beside those of the networks, which published files hold and drawing does not need.
IGNORED = re.compile(
    r"""
    model_ema\..*                                             # a second copy of the UNet: its moving average
    | ((low_scale_model|noise_augmentor)\.)?(betas|\w*alphas_cumprod(_prev)?|posterior_\w+|logvar|lvlb_weights)
    | denoiser\.\w+ | global_step | scale_factor              # the noise schedule and what else training knew
    | v_pred | ztsnr                                          # marks, read by `infer_configs`
    | (first_stage_model\.)?(loss|model_ema)\..*              # the autoencoder's discriminator, its average
    | embedding_manager\..*                                   # of textual inversion's own program
    | .*\.(position_ids|logit_scale)                          # counts 0, 1, 2 …; CLIP's temperature
    | (cond_stage_model|conditioner\.embedders\.0)\.(.*\.)?text_projection(\.weight)?  # where it is not applied
    | (cond_stage_model|conditioner\.embedders\.0)\.model\.transformer\.resblocks\.23\..*  # SD 2.x: the last, passed by
    """,
    re.VERBOSE,
)
# Tensors in a network's own place that other programs leave there: of a LoRA, and of CLIP's image side.
STRAY = re.compile(r"\.alpha$|\.lora_|\.dora_scale$|\.(vision_model|visual)\.|\.num_batches_tracked$")
# Parts that only some configs of a network have. They are not strays, but show that the config is another one.
PARTS = re.compile(
    r"(class|add|time)_embedding|add_time_proj|encoder_hid_proj|label_emb|controlnet_\w+|(post_)?quant_conv|(en|de)coder|"
    r"(down|mid|up)_blocks?|(input|output)_blocks|middle_block(_out)?|zero_convs|input_hint_block"
)


def pass_over(source: TensorSource, strays: Iterable[str], more: str = "") -> None:
    """Warn of tensors that are not read, naming the first of each group; `more` ends the sentence."""
    if strays := sorted(strays):
        groups = list({n.partition(".")[0]: n for n in strays[::-1]}.values())[::-1]
        passed = f"{len(strays)} tensors that drawing does not need are passed over, such as {', '.join(groups[:5])}"
        say_once(f"{source.path}: {passed}{more}.")


def only_own(source: TensorSource, unused: Iterable[str], used: Iterable[str], prefix: str = "") -> list[str]:
    """The unused tensors that seem to belong to the network; the others are named in a warning.

    Args:
        used: names of the network's tensors in the file, each behind `prefix`.
    """

    def part(name: str) -> str:
        return name.removeprefix(prefix).partition(".")[0]

    parts, unused = set(map(part, used)), [n for n in unused if not IGNORED.fullmatch(n)]
    own = [n for n in unused if (part(n) in parts or PARTS.fullmatch(part(n))) and not STRAY.search(n)]
    pass_over(source, set(unused) - set(own))
    return own


def without_strays(source: TensorSource, target: Params) -> TensorSource:
    """A network's file in diffusers' names without stray tensors; `load_tensors` refuses other unknown ones."""
    own = {tensor_name(path) for path in flatten_dict(target)}
    used = [name for name in source.shapes if current_name(name) in own or name.endswith(tensor_files.IGNORED)]
    kept = {*used, *only_own(source, source.shapes.keys() - set(used), own)}
    return dataclasses.replace(source, shapes={name: x for name, x in source.shapes.items() if name in kept})
