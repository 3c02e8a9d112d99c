"""Whatever is written for others names no folder, no user and no host of this machine."""

import getpass
import platform
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, EncoderDecoderModel
from typer.testing import CliRunner

from hf_lowrank import CompressionConfig, compress, write_html_report
from hf_lowrank.cli import app
from hf_lowrank.publishing.model_card import record
from tests.support import tiny_models

MARK = "home-of-the-author"
QUICK = ["--samples", "2", "--sequence-length", "16"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / MARK
    tiny_models.saved(tiny_models.llama(num_hidden_layers=1), folder / "dense")
    (folder / "text.txt").write_text("\n".join(tiny_models.text(40)))
    monkeypatch.setenv("HOME", str(folder))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    words = [str(argument) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["hf-lowrank", *words])
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output


def assert_public(*places: Path) -> None:
    """Compare every byte of every file with what identifies the author."""
    marks = [MARK, "~/", "file://"]
    # Shorter names, and that of the superuser, are parts of words.
    marks += [name for name in (platform.node(), getpass.getuser()) if len(name) > 4]
    files = [file for place in places for file in [place, *place.rglob("*")] if file.is_file()]
    assert files
    for file in files:
        content = file.read_bytes()
        found = [mark for mark in marks if mark.encode() in content and file.suffix not in (".py", ".safetensors")]
        assert not found and MARK.encode() not in content, (file, found)


def test_no_command_writes_a_path(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given absolute, in a home folder, or relative, behind an option or joined to it."""
    dense, text, out = home / "dense", home / "text.txt", home / "outputs"
    calibrated = ["--method", "wanda", "--ratio", "0.4", f"--calibration={text}", *QUICK]
    refined = ["--refinement-steps", "1", f"--work-dir={home}/work"]
    run(monkeypatch, "compress", f"{dense}/", f"-o{out}/first", *refined, *calibrated)
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "compress", f"./{MARK}/dense", "-o", f"{MARK}/outputs/relative", *calibrated)
    run(monkeypatch, "compress", f"{MARK}/dense", "-o", f"{MARK}/outputs/like-an-id", *calibrated)
    monkeypatch.chdir(home)
    run(monkeypatch, "evaluate", out / "first", "--text", text, "--max-windows", "2", "--reference", dense, "--card")
    run(monkeypatch, "dense", out / "first", "-o", out / "dense")
    training = ["--teacher", dense, "--text", text, "--steps", "1", "--sequence-length", "16"]
    run(monkeypatch, "distill", out / "first", "-o", out / "distilled", *training)
    assert_public(out)
    card = (out / "first" / "README.md").read_text()
    assert "hf-lowrank compress dense -ofirst" in card and "calibration=text.txt" in card and "`dense`" in card
    for name in ("first", "distilled"):
        assert AutoModelForCausalLM.from_pretrained(out / name).is_quantized


def test_no_save_in_python_writes_a_path(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = (kind.from_pretrained(home / "dense") for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.init_kwargs["special_tokens_map_file"] = str(home / "special_tokens_map.json")  # as old versions have it
    config = CompressionConfig("sola", 0.3, calibration=str(home / "text.txt"), samples=2, sequence_length=16)
    model.config.notes = {"made from": [str(home / "dense")]}
    compress(model, config, tokenizer, progress=False).save_pretrained(home / "new" / "first")
    record(home / "new" / "first", command=f"python {home}/script.py --model ~/dense")
    again = AutoModelForCausalLM.from_pretrained(home / "new" / "first")
    again.save_pretrained(home / "new" / "second")
    adapted = peft.get_peft_model(again, peft.LoraConfig(target_modules=["q_proj"], r=2))
    merged = adapted.merge_and_unload()
    merged.save_pretrained(home / "new" / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(home / "dense", quantization_config=config)
    loaded.save_pretrained(home / "new" / "on-load")
    run(monkeypatch, "recompress", home / "new" / "merged", "-o", home / "new" / "recompressed")
    write_html_report(home / "new" / "merged", home / "new" / "report.html")
    assert_public(home / "new")


def test_a_model_of_two_loaded_models_names_neither_folder(home: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=64, **sizes)).save_pretrained(home / "encoder")
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(str(home / "encoder"), str(home / "encoder"))
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    ids = torch.arange(16)[None]
    calibration = [{"input_ids": ids, "decoder_input_ids": ids}]
    compress(model, CompressionConfig("magnitude", 0.4), calibration=calibration, progress=False)
    model.save_pretrained(home / "new")
    assert_public(home / "new")
