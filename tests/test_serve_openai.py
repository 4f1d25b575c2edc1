"""OpenAI's images API, asked by OpenAI's own client over HTTP."""

import base64
import concurrent.futures
import io

import numpy as np
import pytest
from PIL import Image

import jaxdiff
from jaxdiff.io.edges import canny
from jaxdiff.io.images import extend, read_metadata
from tests.support.comparison import levels
from tests.support.tiny import SIDE, tiny_controlnet

openai = pytest.importorskip("openai", reason="needs the packages of the extra test")
httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from jaxdiff.serving.requests import QueueFull  # noqa: E402
from tests.support.server import NAME, STEPS, serving  # noqa: E402

SIZE = f"{SIDE}x{SIDE}"
OWN = {"seed": 7}


@pytest.fixture(scope="module")
def server(tiny):
    with serving(tiny) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def source():
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def pixels(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)))


def decoded(entry) -> np.ndarray:
    return pixels(base64.b64decode(entry.b64_json))


def png(array: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    file.seek(0)
    file.name = "image.png"
    return file


def test_generation(tiny, client):
    """As `jaxdiff.generate` draws it, and the PNG says how."""
    answer = client.images.generate(model=NAME, prompt="a castle", n=2, size=SIZE, extra_body=OWN)
    drawn = np.stack([decoded(entry) for entry in answer.data])
    assert levels(drawn, jaxdiff.generate(*tiny, ["a castle"] * 2, seed=7, steps=STEPS)) <= 1
    kept = read_metadata(io.BytesIO(base64.b64decode(answer.data[1].b64_json)))
    assert kept["prompt"] == "a castle"
    assert kept["seed"] == 8
    assert (kept["width"], kept["height"], kept["steps"], kept["model"]) == (SIDE, SIDE, STEPS, NAME)
    assert (answer.size, answer.output_format, answer.quality) == (SIZE, "png", "medium")


@pytest.mark.slow
def test_own_fields_and_quality(tiny, client):
    own = OWN | {"negative_prompt": "blurry", "guidance_scale": 3.0, "scheduler": "euler"}
    answer = client.images.generate(prompt="a castle", quality="low", style="watercolor", extra_body=own)
    kept = read_metadata(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
    assert kept["steps"] == STEPS // 2
    more = {"seed": 7, "steps": STEPS // 2, "guidance_scale": 3.0, "scheduler": "euler"}
    alone = jaxdiff.generate(*tiny, kept["prompt"], kept["negative_prompt"], **more)
    assert "watercolor" in kept["prompt"]
    assert levels(decoded(answer.data[0])[None], alone) <= 1


def test_urls_and_formats(client):
    answer = client.images.generate(
        prompt="a castle", response_format="url", output_format="jpeg", output_compression=90, extra_body=OWN
    )
    found = httpx.get(answer.data[0].url)
    assert found.headers["content-type"] == "image/jpeg"
    assert pixels(found.content).shape == (SIDE, SIDE, 3)
    assert httpx.get(answer.data[0].url.replace(".jpeg", ".png")).status_code == 404


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "jaxdiff"
    with pytest.raises(openai.NotFoundError, match="draws with 'tiny'"):
        client.models.retrieve("dall-e-3")
    with pytest.raises(openai.NotFoundError, match="draws with 'tiny'"):
        client.images.generate(model="gpt-image-1", prompt="a castle")


def test_streaming(client):
    """Partial images come one by one, ever nearer to the finished one, which is that of an ordinary answer."""
    more = {"prompt": "a castle", "extra_body": OWN | {"steps": 12}}
    events = list(client.images.generate(stream=True, partial_images=3, **more))
    assert [event.type.split(".")[1] for event in events] == ["partial_image"] * 3 + ["completed"]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1, 2]
    whole = decoded(client.images.generate(**more).data[0])
    np.testing.assert_array_equal(decoded(events[-1]), whole)
    distances = [levels(decoded(event), whole) for event in events]
    assert distances[0] > distances[2] > distances[3] == 0


def test_edit_redraws_what_is_transparent_in_the_mask(tiny, client, source):
    mask = np.full((SIDE, SIDE, 4), 255, np.uint8)
    mask[:, : SIDE // 2, 3] = 0
    answer = client.images.edit(image=png(source), mask=png(mask), prompt="a castle", extra_body=OWN)
    more = {"seed": 7, "steps": STEPS, "image": source, "mask": mask[..., 3] == 0}
    assert levels(decoded(answer.data[0])[None], jaxdiff.generate(*tiny, "a castle", **more)) <= 1
    hole = np.concatenate([source, mask[..., 3:]], -1)
    again = client.images.edit(image=png(hole), prompt="a castle", extra_body=OWN)  # the image's own transparency
    assert decoded(again.data[0]).shape == (SIDE, SIDE, 3)


def test_edit_without_a_mask_redraws_the_image(tiny, client, source):
    events = list(
        client.images.edit(image=[png(source)], prompt="a castle", extra_body=OWN | {"strength": 0.5}, stream=True)
    )
    assert [event.type for event in events] == ["image_edit.completed"]
    alone = jaxdiff.generate(*tiny, "a castle", seed=7, steps=STEPS, image=source, strength=0.5)
    assert levels(decoded(events[0])[None], alone) <= 1


def test_outpaint(tiny, client, source):
    """As `sample.py --outpaint` does it, by a field of this server's own."""
    half = source[:, : SIDE // 2]
    more = {"prompt": "a castle", "size": SIZE}
    own = OWN | {"outpaint": f"0,0,{SIDE // 2},0"}
    answer = client.images.edit(image=png(half), extra_body=own, **more)
    canvas, mask = extend(half, 0, 0, SIDE // 2, 0)
    alone = jaxdiff.generate(*tiny, "a castle", seed=7, steps=STEPS, image=canvas, mask=mask > 0)
    assert levels(decoded(answer.data[0])[None], alone) <= 1
    for wrong in ("1,2,3", "0,0,0,0", "-1,0,0,0", "0,0,99999,99999", "a,b,c,d"):
        with pytest.raises(openai.BadRequestError) as e:
            client.images.edit(image=png(half), extra_body={"outpaint": wrong}, **more)
        assert e.value.param == "outpaint"
    with pytest.raises(openai.BadRequestError, match="give one of them"):
        client.images.edit(image=png(half), mask=png(half), extra_body=own, **more)


def test_a_matrix_of_prompts(client):
    """`revised_prompt` says which of the alternatives an image shows, and so does its PNG."""
    more = {"prompt": "a {red dragon|castle}", "extra_body": OWN | {"matrix": True}}
    answer = client.images.generate(**more)
    assert [entry.revised_prompt for entry in answer.data] == ["a red dragon", "a castle"]
    kept = read_metadata(io.BytesIO(base64.b64decode(answer.data[1].b64_json)))
    assert (kept["prompt"], kept["seed"]) == ("a castle", 8)
    events = list(client.images.generate(stream=True, **more))
    assert [event.revised_prompt for event in events] == ["a red dragon", "a castle"]


def test_control_images(tiny, source):
    """From text, in base64, and with an image, as a file; only where the server has a ControlNet."""
    with serving(jaxdiff.with_controlnets(*tiny, tiny_controlnet(tiny[0])), start=False) as (address, engine, _):
        asked = []

        def submit(request, **more):
            asked.append(request)
            raise QueueFull(9)

        engine.submit = submit
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            text = base64.b64encode(png(source).getvalue()).decode()
            own = {"control_images": [text], "control_edges": True, "controlnet_scale": 0.7}
            with pytest.raises(openai.RateLimitError):
                client.images.generate(prompt="a castle", extra_body=own)
            with pytest.raises(openai.BadRequestError) as e:
                client.images.generate(prompt="a castle", extra_body={"control_images": ["/etc/passwd"]})
            assert e.value.param == "control_images"
        files = {"image": ("a.png", png(source)), "control_image": ("b.png", png(source))}
        answer = httpx.post(f"{address}/v1/images/edits", files=files, data={"prompt": "a castle"})
        assert answer.status_code == 429
    np.testing.assert_array_equal(asked[0].control_images[0], canny(source))
    assert asked[0].controlnet_scale == 0.7
    np.testing.assert_array_equal(asked[1].control_images[0], source)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"size": "1024x1024"}, "size"),
        ({"size": "huge"}, "size"),
        ({"n": 100}, "n"),
        ({"n": -1}, "n"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 40_000}, "prompt"),
        ({"background": "transparent"}, "background"),
        ({"output_format": "gif"}, "output_format"),
        ({"style": "vivid"}, None),
        ({"partial_images": 2}, "partial_images"),
        ({"extra_body": {"steps": 61}}, "steps"),
        ({"extra_body": {"matrix": True}, "prompt": "{a|b"}, "prompt"),
        ({"extra_body": {"controlnet_scale": -1}}, "controlnet_scale"),
        ({"extra_body": {"control_images": [""]}}, "control_images"),
        ({"extra_body": {"steps": 10**30}}, "steps"),
        ({"extra_body": {"seed": -1}}, "seed"),
        ({"extra_body": {"guidance_scale": 1e300}}, "guidance_scale"),
        ({"extra_body": {"image": "/etc/passwd"}}, "image"),
        ({"extra_body": {"scheduler": "../euler"}}, "scheduler"),
    ],
)
def test_errors_name_the_parameter(client, more, named):
    with pytest.raises(openai.BadRequestError) as e:
        client.images.generate(**({"prompt": "a castle"} | more))
    assert e.value.body["type"] == "invalid_request_error"
    assert e.value.param == named
    assert e.value.body["message"]


def test_errors_of_edits(client, source):
    for more, named in (
        ({"mask": png(source)}, "mask"),  # nowhere transparent
        ({"mask": png(np.zeros((SIDE, 2 * SIDE, 4), np.uint8))}, "mask"),
        ({"image": [png(source), png(source)]}, "image"),
        ({"image": io.BytesIO(b"no image")}, "image"),
        ({"extra_body": {"strength": 2}}, "strength"),
        ({"input_fidelity": "high"}, "input_fidelity"),
    ):
        with pytest.raises(openai.BadRequestError) as e:
            client.images.edit(**({"image": png(source), "prompt": "a castle"} | more))
        assert e.value.param == named


@pytest.mark.slow
def test_requests_at_once_share_batches(tiny, server, client):
    """Eight clients: none lost, each its own image, in fewer batches than images."""
    before = httpx.get(f"{server[0]}/metrics").text

    def one(seed):
        return decoded(client.images.generate(prompt="a castle", extra_body={"seed": seed}).data[0])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        drawn = np.stack(list(pool.map(one, range(8))))
    assert levels(drawn, jaxdiff.generate(*tiny, ["a castle"] * 8, seed=0, steps=STEPS)) <= 1
    after = httpx.get(f"{server[0]}/metrics").text

    def number(text, name):
        return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"{name} ")))

    assert number(after, "jaxdiff_images_total") - number(before, "jaxdiff_images_total") == 8
    assert number(after, "jaxdiff_batch_images_count") - number(before, "jaxdiff_batch_images_count") < 8
    assert number(after, "jaxdiff_queue_images") == 0
