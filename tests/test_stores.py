"""Paths, models, images and compiled programs in object stores: one in memory, and a server that speaks S3."""

from pathlib import Path

import jax
import numpy as np
import pytest

import jaxdiff
from jaxdiff import stores
from jaxdiff.config import ConfigError
from jaxdiff.errors import WeightsError
from jaxdiff.io import cache
from jaxdiff.io.images import read_metadata
from tests.support.commands import CASTLE, STEPS
from tests.support.line import same
from tests.support.store_server import BUCKET

# --- paths


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("foo://bucket/x", "is of an unknown kind: known are gs:// and s3://"),
        ("gs:/bucket/x", "has one slash after gs: and would be a folder of this machine: write gs://bucket/x."),
        ("s3://", "has an empty part"),
        ("s3://bucket//x", "has an empty part"),
        ("s3://bucket/../x", "has an empty part, or . or .."),
        ("C:/x", None),
        ("a/s3://x", None),
        ("style.safetensors:0.8", None),
    ],
)
def test_what_is_no_path_is_said(path, says):
    reason = stores.wrong(path)
    assert reason == says if says is None else says in reason


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # by which ml_collections loads configs
@pytest.mark.parametrize("path", ["foo://bucket/x", "gs:/bucket/x"])
def test_commands_refuse_such_paths_before_anything_else(path, sample_cli, train_cli, tmp_path):
    for flag in ("--model", "--output", "--cache_dir", "--lora"):
        code, _, error = sample_cli(CASTLE, f"{flag}={path}", model="nowhere")
        assert code == 2
        assert f"{flag}={path} " in error
    code, _, error = train_cli("--config=lora", f"--workdir={path}")
    assert code == 2
    assert f"--workdir={path} " in error
    for name in ("data.path", "init_from.model", "latents.path"):
        code, _, error = train_cli("--config=lora", f"--workdir={tmp_path}/run", f"--config.{name}={path}")
        assert code == 2
        assert f"config.{name} {path} " in error
    assert not (tmp_path / "run").exists()
    for refused in (lambda: jaxdiff.load(path), lambda: jaxdiff.save(path, None, {})):
        with pytest.raises((ConfigError, WeightsError), match=path):
            refused()


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # by which ml_collections loads configs
def test_a_package_that_is_missing_is_named(sample_cli, train_cli, monkeypatch):
    monkeypatch.setattr(stores.importlib.util, "find_spec", lambda name: None)
    code, _, error = sample_cli(CASTLE, "--output=gs://bucket/x")
    assert code == 2
    assert "--output=gs://bucket/x needs the package gcsfs: pip install 'jaxdiff[stores]'." in error
    code, _, error = train_cli("--config=lora", "--workdir=s3://bucket/x")
    assert code == 2
    assert "--workdir=s3://bucket/x needs the package s3fs: pip install 'jaxdiff[stores]'." in error


def test_flags_that_take_no_stores_say_so(memory, sample_cli):
    code, _, error = sample_cli(CASTLE, f"--lora={memory}/x.safetensors")
    assert code == 2
    assert "--lora" in error
    assert "this flag takes only paths on this machine" in error


def test_places_and_paths_stand_for_each_other(memory):
    place = stores.place(f"{memory}/a/b", stores.FETCHED)
    assert stores.behind(place) == stores.behind(place, stores.FETCHED) == f"{memory}/a/b"
    assert stores.behind(place, stores.OUTPUTS) is None
    assert stores.behind("a/b") is None
    assert stores.shown(f"The folder {place} is empty.") == f"The folder {memory}/a/b is empty."


# --- reading


def test_only_what_has_changed_is_copied(bucket, monkeypatch):
    for name in ("a.txt", "sub/b.txt", "sub/.hidden"):
        stores.write(f"{bucket}/data/{name}", name.encode())
    stores.write(f"{bucket}/data-2/c.txt", b"of another folder")
    folder = stores.fetch(f"{bucket}/data/")
    assert stores.files(folder) == ["a.txt", "sub/b.txt"]
    assert (folder / "sub" / ".hidden").read_bytes() == b"sub/.hidden"
    copied = []
    real = stores.download
    monkeypatch.setattr(stores, "download", lambda url, to, names: (copied.extend(names), real(url, to, names)))
    stores.write(f"{bucket}/data/a.txt", b"A.TXT")  # of the same size
    stores.remove(f"{bucket}/data/sub/b.txt", f"{bucket}/data/gone")
    assert stores.fetch(f"{bucket}/data") == folder
    assert copied == ["a.txt"]
    assert (folder / "a.txt").read_bytes() == b"A.TXT"
    assert stores.files(folder) == ["a.txt"]
    (folder / "a.txt").unlink()
    assert stores.fetch(f"{bucket}/data/a.txt").read_bytes() == b"A.TXT"


def test_names_with_numbers_are_copied_together(memory):
    for name in ("a-00.tar", "a-01.tar", "b.tar"):
        stores.write(f"{memory}/{name}", b"")
    found = stores.fetch(f"{memory}/a-{{00..01}}.tar")
    assert found.name == "a-{00..01}.tar"
    assert stores.files(found.parent) == ["a-00.tar", "a-01.tar"]


def test_names_that_lead_elsewhere_are_left_out(memory, caplog):
    from fsspec.implementations.memory import MemoryFileSystem

    stores.write(f"{memory}/data/a", b"")
    MemoryFileSystem.store[f"/{BUCKET}/data/../../x"] = MemoryFileSystem.store[f"/{BUCKET}/data/a"]
    assert list(stores.listing(f"{memory}/data")) == ["a"]
    assert "is left out" in caplog.text


def test_what_is_not_there_is_said(bucket):
    with pytest.raises(stores.StoreError, match=f"{bucket}/nothing does not exist"):
        stores.fetch(f"{bucket}/nothing")
    with pytest.raises(ConfigError, match=f"{bucket}/nothing does not exist"):
        jaxdiff.load(f"{bucket}/nothing")


# --- models


def test_a_model_is_saved_and_loaded(bucket, tiny, machine):
    model, params = tiny
    stores.write(f"{bucket}/model/README.md", b"a card")
    with pytest.raises(WeightsError, match="is not the folder of a model"):
        jaxdiff.save(f"{bucket}/model", model, params)
    stores.remove(f"{bucket}/model/README.md")
    stores.write(f"{bucket}/model/unet/old.bin", b"of an upload that was killed")
    jaxdiff.save(f"{bucket}/model", model, params)
    assert not stores.exists(f"{bucket}/model/unet/old.bin")
    stores.write(f"{bucket}/model/README.md", b"a card")
    stores.write(f"{bucket}/model/safety_checker/model.bin", b"is not copied")
    jaxdiff.save(f"{bucket}/model/", model, params)
    jaxdiff.save(f"{bucket}/one.safetensors", model, params)
    machine()
    assert same(jaxdiff.load(f"{bucket}/one.safetensors")[1], params)
    found, read = jaxdiff.load(f"{bucket}/model")
    assert found == model
    assert same(read, params)
    copy = stores.place(f"{bucket}/model", stores.FETCHED)
    assert not (copy / "safety_checker").exists()
    assert stores.exists(f"{bucket}/model/README.md")


def test_a_model_of_which_a_part_was_uploaded_is_none(memory, tiny, monkeypatch):
    jaxdiff.save(f"{memory}/model", *tiny)
    real = stores.put

    def killed(path, url):
        if "vae" in url:
            raise KeyboardInterrupt
        real(path, url)

    monkeypatch.setattr(stores, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        jaxdiff.save(f"{memory}/model", *tiny)
    with pytest.raises(ConfigError, match=r"model_index.json"):
        jaxdiff.load(f"{memory}/model")
    monkeypatch.setattr(stores, "put", real)
    jaxdiff.save(f"{memory}/model", *tiny)
    assert same(jaxdiff.load(f"{memory}/model")[1], tiny[1])


# --- images


def test_images_are_drawn_from_and_into_a_store(bucket, tiny, tiny_folder, sample_cli, tmp_path):
    jaxdiff.save(f"{bucket}/model", *tiny)
    args = [CASTLE, STEPS, "--num_images=2", "--grid"]
    code, here, _ = sample_cli(*args, "--output=here")
    assert code == 0
    for overwrite, names in ((False, "{}"), (True, "{}"), (False, "{}-2")):
        more = ["--overwrite"] if overwrite else []
        code, there, error = sample_cli(*args, *more, f"--output={bucket}/out", model=f"{bucket}/model")
        assert code == 0, error
        assert there == [f"{bucket}/out/{names.format(Path(name).stem)}.png" for name in here]
    drawn = [read_metadata(stores.fetch(there[0])), read_metadata(here[0])]
    assert drawn[0].pop("model") == f"{bucket}/model"
    assert drawn[1].pop("model") == str(tiny_folder)
    assert drawn[0] == drawn[1]
    assert not stores.files(stores.copies() / stores.OUTPUTS)
    assert not Path(f"{bucket.partition('://')[0]}:").exists()


def test_a_bucket_that_is_not_there_is_said_before_drawing(s3, sample_cli):
    code, out, error = sample_cli(CASTLE, STEPS, "--output=s3://no-such-bucket/out")
    assert (code, out) == (1, [])
    assert "s3://no-such-bucket/out cannot be written: there is no such bucket" in error


# --- compiled programs


@pytest.mark.slow
def test_compiled_programs_are_kept_in_a_store(s3, compilations):
    settings = ("jax_compilation_cache_dir", "jax_persistent_cache_enable_xla_caches")
    before = {name: getattr(jax.config, name) for name in settings}
    from jax.experimental.compilation_cache import compilation_cache

    def trebled(x):
        return x * 3 + 1

    compiled = 0
    try:
        compilation_cache.reset_cache()
        assert cache.cache_compilations(f"{s3[0]}/programs") == f"{s3[0]}/programs"
        for _ in range(2):
            jax.clear_caches()
            assert jax.jit(trebled)(np.float32(1)) == 4
            compiled = compiled or len(stores.listing(f"{s3[0]}/programs"))
        assert len(stores.listing(f"{s3[0]}/programs")) == compiled > 0
        assert cache.cache_compilations("s3://no-such-bucket/programs") is None
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert not Path("s3:").exists()


# --- errors


def test_rights_that_are_missing_are_said_at_once(memory, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    calls = []

    def refused(*args, **kwargs):
        calls.append(args)
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refused)
    with pytest.raises(stores.StoreError, match=r"cannot be read or written \(Access Denied\)"):
        stores.probe(f"{memory}/x")
    assert len(calls) == 1  # it is not tried again
