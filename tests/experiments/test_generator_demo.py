"""The whole way of an image generator in one command, which goes on where it was."""

from experiments import finetune_generator
from experiments.generator_demo import is_trained, main


def test_the_demo_pretrains_fine_tunes_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SIGHTLINE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "demo"
    words = ["--run-dir", str(folder), "--preset", "debug", "--gold", "brightness"]
    with monkeypatch.context() as patch:
        patch.setattr(finetune_generator, "main", lambda flags: 0)  # as if a signal had stopped it
        assert main(words) == 130
    assert is_trained(folder / "base")
    assert main(words) == 0
    page = (folder / "tuned" / "report" / "report.md").read_text()
    assert "drawings_strict" in page
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "report:" in said
    assert "iteration" not in said
    assert main([*words, "--seed", "2"]) == 2
    assert "--seed is 2" in capsys.readouterr().err
    assert main([*words, "--gold", "symmetry"]) == 2
    assert "--gold is symmetry" in capsys.readouterr().err
