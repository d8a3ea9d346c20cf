"""A tiny model learns dialogues by heart, and says them in a conversation."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.train.chats import TEMPLATES, dialogue, write_chats
from tests.support.train.raw_files import prepare
from tests.support.train.tiny_run import Nha
from train.cli import main
from train.data.held_out import is_document_held_out
from train.data.prepare.dialogues import write_out

DIALOGUES = [
    dialogue("Red?", "A colour.", "And one?", "A number."),
    dialogue("Dog?", "It barks.", "Cat?", "It purrs.", "Cow?", "It moos."),
    dialogue("Naïve?", "É, 日本.", "More?", "No\nmore."),
    dialogue("Left?", "Right.", "Up?", "Down."),
]
SHARE = 0.02


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four dialogues to learn, and one that is held out."""
    assert not any(is_document_held_out(write_out(each), SHARE) for each in DIALOGUES)
    others = (dialogue(f"{n}?", f"{n}.") for n in range(1000))
    out = next(x for x in others if is_document_held_out(write_out(x), SHARE))
    folder = tmp_path_factory.mktemp("chats")
    raw = write_chats(folder / "a.jsonl", [*DIALOGUES, out])
    options = ("--chat", f"--chat-template={TEMPLATES / 'qwen2.jinja'}", "--workers=1")
    assert prepare(folder / "out", raw, *options, f"--held-out-fraction={SHARE}") == 0
    return folder / "out"


@pytest.mark.slow
def test_four_dialogues_are_learned_and_spoken_back(
    chats: Path,
    tmp_path: Path,
    tiny_values: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_values["model"] | {"num_layers": 2, "hidden_size": 64, "window_size": [16, None]}
    values = tiny_values | {
        "steps": 400,
        "batch_size": 2,
        "model": model,
        "data": {"corpus": str(chats), "sequence_length": 320},
        "optimizer": {"learning_rate": 5e-3, "warmup_steps": 20},
        "evaluation": {"every": 400, "sequences": 1, "final_sequences": 1},
        "checkpoint": {"every": 400},
    }
    nha = Nha(tmp_path, values)
    printed = nha.train()
    assert "tokens to learn)" in printed
    assert nha.rows()[-1]["loss"] < 0.02
    assert (nha.run / "model" / "chat_template.jinja").exists()
    for messages in DIALOGUES:
        said = [x["content"] for x in messages]
        turns = "".join(f"{text}\n" for text in said[::2]).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(turns)))
        arguments = ["--chat", "--temperature=0", "--max-new-tokens=40", "--prefill-chunk=64"]
        capsys.readouterr()
        assert main(["generate", str(nha.run), *arguments]) == 0
        output, errors = capsys.readouterr()
        assert output == "".join(f"{text}\n" for text in said[1::2])
        assert f"{len(said) // 2} answers" in errors
