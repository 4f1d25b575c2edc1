"""The folder of a report while it is made, and models that are none."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdiff.cli.errors import Failure
from jaxdiff.evaluation import command, outputs


def test_one_process_at_a_time_makes_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    work, taken = Path("new/.report.partial").absolute(), "--output new/report is being made by another process"

    def refused() -> None:
        with pytest.raises(Failure, match=taken), outputs.locked(work, "new/report"):
            pass

    with outputs.locked(work, "new/report"):
        refused()
        code = command.main(["evaluation", "--prompts=p.txt", "--output=new/report"])
        assert (code, taken in capsys.readouterr().err) == (1, True)
        assert list(work.iterdir()) == []
    assert not Path("new").exists()
    with outputs.locked(work, "new/report"):
        outputs.begin(work, {"seed": 1})
        (work / "images").mkdir()
        outputs.begin(work, {"seed": 2})
        assert [p.name for p in work.iterdir()] == ["settings.json"]
        refused()  # though it has been emptied
        outputs.publish(work, Path("new/report"), overwrite=False)
        with outputs.locked(work, "new/report"):  # the next one
            outputs.begin(work, {"seed": 3})
    assert sorted(p.name for p in Path("new").iterdir()) == [".report.partial", "report"]


@pytest.mark.parametrize("model", ["none.safetensors", "lora.safetensors", "nowhere", "folder"])
def test_a_model_that_is_none_names_the_flag_before_weights_are_read(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "load_encoder", lambda folder: pytest.fail("weights were read"))
    save_file({"lora_unet_x.lora_up.weight": np.zeros(1, np.float32)}, "lora.safetensors")
    Path("folder").mkdir()
    Path("p.txt").write_text("a castle")
    code = command.main(["evaluation", f"--model={model}", "--prompts=p.txt", "--encoder=folder", "--output=new/x"])
    assert code == 2
    assert f"error: --model: {'The model' if model == 'none.safetensors' else model}" in capsys.readouterr().err
    assert not Path("new").exists()
