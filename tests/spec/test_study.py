"""The study: rows that were finished are not run again, and the table says what the results say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edgefuse.errors import Refused, TrainingDiverged, UsageError
from edgefuse.model import EncoderConfig
from edgefuse.study import run as runner
from edgefuse.study.results import Outcome, collect, outcome_path, read_results
from edgefuse.study.rows import Plan, Row
from edgefuse.study.run import train_rows
from edgefuse.train.recipe import Recipe
from edgefuse.verify.wer import WordErrors
from tests.spec.test_training import NO_AUGMENTATION, write_corpus

ROOT = Path(__file__).parents[2]
TINY = {"dimension": 16, "layers": 1, "heads": 2, "feed_forward": 16, "kernel": 3, "subsampling_channels": 4}
QUICK = Recipe(
    preset="study",
    norm="layer",
    vocabulary_size=29,
    epochs=1,
    batch_seconds=8.0,
    characters_first=0.0,
    augmentation=NO_AUGMENTATION,
)
LN = Row("conformer", "LN", "", "", "", "", {"norm": "layer", **TINY})
FUSED = Row("fusionformer", "FF", "", "", "", "", {"norm": "batch", **TINY})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four utterances to learn, one to test on."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, words in (("train", ["abc", "bad cab", "cad", "dab a"]), ("dev", ["abc"]), ("seen", ["abc"]), ("unseen", ["cad"])):
        write_corpus(folder, name, words)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the study runs."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_row_is_trained_once_and_its_errors_are_those_of_both_sets_whole_and_in_chunks(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(QUICK, (LN, FUSED))
    found = train_rows(plan, corpus, tmp_path, seeds=(1,), say=lambda _: None)
    assert {(each.row, each.seed, each.status) for each in found.outcomes} == {
        ("conformer", 1, "trained"),
        ("fusionformer", 1, "trained"),
    }
    assert set(found.of("conformer")[0].errors[""]) == {"seen", "unseen", "seen, 640 ms", "unseen, 640 ms"}
    assert read_results(tmp_path / "results.json") == found
    monkeypatch.setattr(runner, "train_row", lambda *_: pytest.fail("it was finished"))
    assert train_rows(plan, corpus, tmp_path, seeds=(1,), say=lambda _: None) == found


def test_a_finished_row_of_another_recipe_is_refused(tmp_path: Path) -> None:
    plan = Plan(QUICK, (LN,))
    told = {**Outcome("conformer", 1, "trained", {"epochs": 9}).to_json()}
    runner.write_json(outcome_path(tmp_path, "conformer", 1), told)
    with pytest.raises(UsageError, match="another recipe"):
        train_rows(plan, tmp_path, tmp_path, seeds=(1,), say=lambda _: None)


def test_an_interrupted_row_goes_on_from_its_last_epoch(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumed: list[bool] = []
    whole = runner.train_row.__globals__["fit"]

    def cut(*given: Any, resume: bool, **told: Any) -> Any:
        resumed.append(resume)
        training = whole(*given, resume=resume, **told)
        if not resume:
            raise KeyboardInterrupt
        return training

    monkeypatch.setattr("edgefuse.study.train.fit", cut)
    plan = Plan(QUICK, (FUSED,))
    with pytest.raises(KeyboardInterrupt):
        train_rows(plan, corpus, tmp_path, seeds=(1,), say=lambda _: None)
    found = train_rows(plan, corpus, tmp_path, seeds=(1,), say=lambda _: None)
    assert resumed == [False, True]
    assert [each.status for each in found.outcomes] == ["trained"]


def test_a_loss_that_is_no_number_is_a_result_and_a_row_that_cannot_be_built_does_not_stop_the_others(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*given: Any, **_: Any) -> Any:
        config: EncoderConfig = given[4]
        raise (TrainingDiverged if config.norm == "layer" else Refused)("The loss of step 7 is nan.", hint="")

    monkeypatch.setattr("edgefuse.study.train.fit", fit)
    plan = Plan(QUICK, (FUSED, LN))
    with pytest.raises(Refused, match="1 of 2 trainings could not be run: fusionformer"):
        train_rows(plan, corpus, tmp_path, seeds=(1,), say=lambda _: None)
    (found,) = collect(tmp_path).outcomes
    assert (found.row, found.status, found.told) == ("conformer", "diverged", "The loss of step 7 is nan.")
    assert "1 seed diverged: The loss of step 7 is nan." in (tmp_path / "STUDY.md").read_text(encoding="utf-8")


def errors(wrong: int) -> WordErrors:
    """So many of 1,000 words."""
    return WordErrors(wrong, 0, 0, 1000, 10)
