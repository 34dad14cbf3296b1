"""Tables in the README and the model card come from the committed reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import readme_table

MUSIC = {
    "chord_chance": 0.0417,
    "settings": {"n_songs": 3, "song_s": None, "steps": 60, "flow_steps": 20},
    "summary": {
        **{f"chord_match{k}": v for k, v in {"": 0.31, "_codec": 0.4, "_truth": 0.8, "_shuffled": 0.05}.items()},
        **{f"onset_f1{k}": v for k, v in {"": 0.7, "_codec": 0.84, "_truth": 1.0, "_shuffled": 0.5}.items()},
        "chord_match_of_codec": 0.75,
        "chord_match_of_shuffled": None,
        "onset_f1_of_codec": 0.83,
        "onset_f1_of_shuffled": 1.4,
        "style_accuracy": 0.9,
        "style_accuracy_codec": 0.95,
        "style_accuracy_truth": 1.0,
        "intro_level_db": -1.26,
        "interlude_level_db": 2.0,
    },
}


def test_the_music_table_says_what_the_report_says() -> None:
    text = readme_table.music_table(MUSIC)
    assert "| beats in the right chord | 0.31 | 0.40 | 0.80 | 0.05 | 0.75 |  |" in text
    assert "| onset F1, 50 ms | 0.70 | 0.84 | 1.00 | 0.50 | 0.83 | 1.40 |" in text
    assert "| style heard as asked | 0.90 | 0.95 | 1.00 |" in text
    assert "3 unseen songs of 40 to 60 s, 60 steps" in text
    assert "chance (0.04)" in text
    assert "intro -1.3 dB, interlude +2.0 dB" in text


def test_only_what_is_between_the_markers_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- music: begin -->\nold\n<!-- music: end -->\nbelow\n")
    new = readme_table.replaced(page, "music", "new")
    assert new == "above\n<!-- music: begin -->\nnew\n<!-- music: end -->\nbelow\n"
    with pytest.raises(SystemExit, match="expected the markers"):
        readme_table.replaced(page, "table", "new")


def test_the_committed_pages_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert readme_table.main(["--check"]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["reports"]
