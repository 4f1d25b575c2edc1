"""For the tests of jaxdiff.evaluation: a small random CLIP as folders of both kinds, a captioned data set, images."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from safetensors.numpy import save_file

from jaxdiff.config import CLIPTextConfig, CLIPVisionConfig
from jaxdiff.io.modules import write_json
from jaxdiff.io.tensor_files import named_tensors, save_tensors
from jaxdiff.io.torch_names import from_torch_layout, tensor_name, to_torch_layout
from jaxdiff.models.clip import CLIPTextModel, CLIPVisionModel
from tests.support import networks, tiny

PROMPTS = ["a castle", "a red dragon", "a (blue:1.2) house"]
DRAW = ("--prompts=prompts.txt", "--steps=2", "--num_images=2", "--batch_size=4")
SIZE = 16  # pixels that the encoder reads
WIDTH = 6  # numbers of a feature
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 200), "grey": (120, 120, 120)}


def text_config() -> dict:
    ids = {"bos_token_id": tiny.tokenizer().bos_id, "eos_token_id": tiny.tokenizer().eos_id}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    length = {"vocab_size": tiny.tokenizer().vocab_size, "max_position_embeddings": tiny.MAX_LENGTH}
    return {**ids, **sizes, **length, "projection_dim": WIDTH}


def vision_config() -> dict:
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**sizes, "image_size": SIZE, "patch_size": 4, "projection_dim": WIDTH}


def modules() -> dict:
    text = CLIPTextConfig.from_dict({**text_config(), "with_projection": True})
    return {"text_encoder": CLIPTextModel(text), "vision_encoder": CLIPVisionModel(CLIPVisionConfig(**vision_config()))}


def params() -> dict:
    """Of both encoders, drawn by their PyTorch names."""
    inputs = {"text_encoder": np.zeros((1, 2), np.int32), "vision_encoder": np.zeros((1, SIZE, SIZE, 3), np.float32)}
    found = {}
    for name, module in modules().items():
        shapes = jax.eval_shape(lambda m=module, x=inputs[name]: m.init(jax.random.key(0), x)["params"])
        leaves = {}
        for path, leaf in flatten_dict(shapes).items():
            shape = to_torch_layout(path, np.broadcast_to(0, leaf.shape)).shape
            leaves[path] = from_torch_layout(path, networks.draw(f"{name}.{tensor_name(path)}", shape))
        found[name] = unflatten_dict(leaves)
    return found


def clip_model_folder(folder: Path) -> Path:
    """As transformers' CLIPModel.save_pretrained writes it, with a tokenizer."""
    tiny.tokenizer().save(folder)
    config = {"model_type": "clip", "projection_dim": WIDTH, "text_config": text_config()}
    write_json(folder / "config.json", {**config, "vision_config": vision_config()})
    tree = params()
    tensors = {"logit_scale": np.array(2.6592, np.float32)}
    tensors |= dict(named_tensors(tree["text_encoder"], prefix="text_model."))
    for name, x in named_tensors(tree["vision_encoder"]):
        tensors[name if name.startswith("visual_projection") else f"vision_model.{name}"] = x
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def parts_folder(folder: Path) -> Path:
    """As a jaxdiff model's folder that has a vision encoder, without the networks that draw."""
    tiny.tokenizer().save(folder / "tokenizer")
    tree = params()
    for name, module in modules().items():
        write_json(folder / name / "config.json", module.config.to_dict())
        save_tensors(folder / name / "model.safetensors", tree[name], None, "text_model." * name.startswith("text"))
    return folder


def image(colour: str, rng: np.random.Generator, side: int = 20) -> Image.Image:
    """A rectangle of a colour on white, at random."""
    pixels = np.full((side, side, 3), 255, np.uint8)
    left, top = rng.integers(0, side // 2, 2)
    width, height = rng.integers(4, side // 2, 2)
    pixels[top : top + height, left : left + width] = COLOURS[colour] + rng.integers(-25, 25, 3)
    return Image.fromarray(pixels)


def write_split(folder: Path, images: list[Image.Image], subjects: list[str]) -> None:
    folder.mkdir(parents=True)
    lines = []
    for i, (image, subject) in enumerate(zip(images, subjects, strict=True)):
        image.save(folder / f"{i:03d}.png")
        lines.append(
            {"file_name": f"{i:03d}.png", "text": [f"a {subject} house", f"{subject} {i}"], "subject": subject}
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def data_folder(folder: Path, train: int = 48, held_out: int = 28) -> Path:
    """Splits "train" and "test" of rectangles, whose subjects are colours."""
    rng = np.random.default_rng(0)
    for name, count in (("train", train), ("test", held_out)):
        subjects = [list(COLOURS)[i % len(COLOURS)] for i in range(count)]
        write_split(folder / name, [image(s, rng) for s in subjects], subjects)
    return folder


def blank(path: str) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Image.new("RGB", (16, 16)).save(path)


def copies(given: Path, count: int = 24) -> None:
    """A folder of training images as if they were drawn, each of its own caption."""
    shutil.copytree(given / "data/train", "drawn")
    path = Path("drawn/metadata.jsonl")
    path.write_text("\n".join(path.read_text().splitlines()[:count]))
