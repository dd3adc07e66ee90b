import pytest

from probllm.training import Run


def test_a_run_comes_back_from_its_file(tmp_path):
    run = Run(history=[{"epoch": 1, "loss": 0.1 + 0.2}], best_epoch=1, best_value=0.5, tokens=100, training_seconds=4.0)
    run.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == run
    assert (run.epochs, run.tokens_per_second) == (1, 25.0)
    assert Run().tokens_per_second == 0


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"history": [], "surprise": 1}'])
def test_what_is_no_run_is_refused_by_name(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"run\.json: "):
        Run.load(path)
