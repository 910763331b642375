"""The study: rows that were finished are not run again, and the table says what the results say."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgefuse import checkpoint as checkpoints
from edgefuse import cli
from edgefuse.bench.turns import Turns
from edgefuse.errors import BadConfig, MissingFile, Refused, TrainingDiverged, UsageError
from edgefuse.model import Encoder, EncoderConfig
from edgefuse.model.architecture import encoder_config, norm_of, read_architecture
from edgefuse.pipeline import silent
from edgefuse.study.bars import BARS, BOTH, CLAIMS
from edgefuse.study.costs import measure, renewed
from edgefuse.study.page import page
from edgefuse.study.results import Outcome, Results, collect, outcome_path, read_results, write_json, write_results
from edgefuse.study.rows import Plan, Row, read_plan, require_built
from edgefuse.study.run import gpu_rows, report, train_rows
from edgefuse.train.module import draw_depth
from edgefuse.train.recipe import Recipe
from edgefuse.train.train import fit
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
    monkeypatch.setattr("edgefuse.study.run.train_row", lambda *_: pytest.fail("it was finished"))
    assert train_rows(plan, corpus, tmp_path, seeds=(1,), say=lambda _: None) == found


def test_a_finished_row_of_another_recipe_is_refused(tmp_path: Path) -> None:
    plan = Plan(QUICK, (LN,))
    told = {**Outcome("conformer", 1, "trained", {"epochs": 9}, "fp32").to_json()}
    write_json(outcome_path(tmp_path, "conformer", 1), told)
    with pytest.raises(UsageError, match="another recipe: other epochs"):
        train_rows(plan, tmp_path, tmp_path, seeds=(1,), say=lambda _: None)


def test_an_interrupted_row_goes_on_from_its_last_epoch(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumed: list[bool] = []
    whole = fit

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
    def failing(*given: Any, **_: Any) -> Any:
        config: EncoderConfig = given[4]
        raise (TrainingDiverged if config.norm == "layer" else Refused)("The loss of step 7 is nan.", hint="")

    monkeypatch.setattr("edgefuse.study.train.fit", failing)
    plan = Plan(QUICK, (FUSED, LN))
    with pytest.raises(Refused, match="1 of 2 trainings could not be run: fusionformer"):
        train_rows(plan, corpus, tmp_path, seeds=(1,), say=lambda _: None)
    (found,) = collect(tmp_path).outcomes
    assert (found.row, found.status, found.told) == ("conformer", "diverged", "The loss of step 7 is nan.")
    assert "1 seed diverged: The loss of step 7 is nan." in (tmp_path / "STUDY.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [row.name for row in read_plan().rows])
def test_every_row_of_the_study_can_be_trained_and_heard(corpus: Path, tmp_path: Path, name: str) -> None:
    row = read_plan().row(name)
    small = {"dimension": 16, "heads": 2, "feed_forward": 16, "kernel": 3, "subsampling_channels": 4}
    before = (read_plan().row(row.converts),) if row.converts else ()
    plan = Plan(QUICK, tuple(replace(each, architecture={**each.architecture, **small}) for each in (*before, row)))
    (found,) = train_rows(plan, corpus, tmp_path, seeds=(1,), say=lambda _: None).of(name)
    parts = {"shared-sampled": ["", "4 layers"], "cascade": ["first pass", "second pass"]}
    assert (found.status, list(found.errors)) == ("trained", parts.get(name, [""]))


def errors(wrong: int) -> WordErrors:
    """So many of 1,000 words."""
    return WordErrors(wrong, 0, 0, 1000, 10)


def some_results() -> Results:
    """Two rows with two seeds, one that diverged with both, and costs."""
    rates = {"conformer": (100, 120), "fusionformer": (101, 123), "best": (150, 150)}
    outcomes = [
        Outcome(row, seed, "trained", {}, "fp32", steps=3, errors={"": {name: errors(count) for name in (*BOTH, "seen, 640 ms")}})
        for row, both in rates.items()
        for seed, count in enumerate(both, start=1)
    ]
    outcomes += [Outcome("no-norm", seed, "diverged", {}, "fp32", told="The loss of step 5 is inf.") for seed in (1, 2)]
    ratios = {"conformer": 1.0, "fusionformer": 0.9, "best": 0.3, "shared-sampled": 0.9, "shared-sampled, 4 layers": 0.54}
    latencies = {row: {"ratio": ratio} for row, ratio in ratios.items()}
    return Results(
        tuple(outcomes),
        {
            "host": {"cpu": "a CPU", "threads": 1, "rounds": 40},
            "sizes": {
                "conformer": {"parameters": 1_234_567, "block_parameters": 1000, "macs_per_second": 47e6, "stays": 41},
                "fusionformer": {
                    "parameters": 9,
                    "block_parameters": 800,
                    "macs_per_second": 46e6,
                    "stays": 0,
                    "pte_bytes": 5_120_000,
                },
                "shared": {"parameters": 2, "block_parameters": 100, "macs_per_second": 46e6, "stays": 0},
            },
            "refused": {"cascade": "It cannot be lowered."},
            "latency": {"executorch": dict.fromkeys(("offline", "streaming"), latencies)},
            "step": {"conformer": {"ratio": 1.0}, "shared": {"ratio": 0.9}, "shared-sampled": {"ratio": 0.585}},
            "instructions": {"device": "arm64:cortex-a53", "lacks": "It has not been set up."},
        },
    )


def bar(words: str) -> Any:
    """The one bar that is told in such words."""
    (found,) = (each for each in BARS if words in each.told)
    return found


def test_a_word_error_rate_is_the_mean_of_the_seeds_and_told_with_their_spread() -> None:
    found = some_results().wer("conformer", "", ("seen",))
    assert found is not None
    assert (found.mean, str(found)) == (11.0, "11.0 (10.0 to 12.0)")
    assert some_results().wer("conformer", "", ("unseen, 640 ms",)) is None


@pytest.mark.parametrize(
    ("words", "value", "verdict"),
    [
        ("FusionFormer C above", "0.20 points", "holds"),
        ("best combination above", "4.00 points", "missed"),
        ("Unified Normalization above", "not run", "not run"),
        ("faster offline", "3.33x", "holds"),
        ("block parameters", "8.00x", "holds"),
        ("sampled depth", "0.65", "holds"),
    ],
)
def test_a_bar_is_held_against_what_was_measured(words: str, value: str, verdict: str) -> None:
    assert (bar(words).value(some_results()), bar(words).verdict(some_results())) == (value, verdict)


def test_a_claim_is_told_beside_the_nearest_figure() -> None:
    told = {each.told: each.value(some_results()) for each in CLAIMS}
    assert told["37.7 % inference time saved"] == "40.0 %"
    assert told["41.9 % training time saved"] == "35.0 %"
    assert told["about 10 % faster than the LayerNorm Conformer"] == "10.0 %"
    assert told["about 18 % less memory on a GPU"] == "not run"


def test_what_a_gpu_saves_is_told_with_the_gpu() -> None:
    saved = {"latency_saved_percent": 10.02, "memory_saved_percent": 13.74}
    results = Results((), {"gpu": {"device": "A card", "utterances": 32, "seconds": 10, "unified": saved}})
    told = {each.told: each.value(results) for each in CLAIMS}
    assert (told["about 31 % faster inference on a GPU"], told["about 18 % less memory on a GPU"]) == ("10.0 %", "13.7 %")
    assert "The GPU: A card; 32 utterances of 10 s at once, float32, folded where it folds." in page(read_plan(), results)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured_on_one(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no GPU"):
        gpu_rows(read_plan(), tmp_path, Turns(rounds=2))
    assert not list(tmp_path.iterdir())


def test_costs_that_are_measured_apart_leave_the_others_as_they_are() -> None:
    before = {"sizes": {"a": 1}, "refused": {"b": "No."}, "gpu": {"device": "old"}}
    assert renewed(before, {"gpu": {"device": "new"}}) == {**before, "gpu": {"device": "new"}}


def test_the_table_says_what_was_measured_and_what_was_not() -> None:
    lines = page(read_plan(), some_results()).splitlines()
    quality = next(line for line in lines if line.startswith("| FusionFormer C |"))
    rate = "11.2 (10.1 to 12.3)"
    assert quality == f"| FusionFormer C | {rate} | {rate} | {rate} | not run | {rate} | +0.2 |"
    assert any(line.startswith("| no norm | 2 seeds diverged: The loss of step 5 is inf. |") for line in lines)
    assert any(line.startswith("| FusionFormer C | 9 | 5.12 | 46.0 | not run | 0.90 | 0.90 | not run |") for line in lines)
    assert "- cascade: It cannot be lowered." in lines
    tried = lines[lines.index("What was tried for those that are missed:") + 2 :]
    assert tried[0].startswith("- WER of the best combination above the LayerNorm Conformer's: its parts one by one")
    assert tried[1] == ""
    assert "- arm64:cortex-a53: It has not been set up." in lines


def test_every_line_is_timed_in_turns_with_the_base_and_what_cannot_be_built_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {"norm": "batch", **TINY, "layers": 3, "shared_blocks": True}
    rows = (
        LN,
        FUSED,
        Row("shared", "", "", "", "", "", shared, {"sampled_depth": True}, depths=(2,)),
        Row("cascade", "", "", "", "", "", {"norm": "batch", **TINY, "layers": 2, "second_pass": 1}),
    )

    def built(config: EncoderConfig) -> Encoder:
        if config.second_pass:
            raise Refused("Not here.", hint="")
        return require_built(config)

    monkeypatch.setattr("edgefuse.study.costs.require_built", built)
    found = measure(Plan(QUICK, rows), rows, ("reference",), Turns(rounds=2, warm_up=0), tell=silent)
    lines = {"conformer", "fusionformer", "shared", "shared, 2 layers", "cascade, first pass"}
    assert found["sizes"].keys() == found["step"].keys() == lines
    assert found["refused"] == {"cascade": "Not here."}
    assert found["sizes"]["shared"]["block_parameters"] == found["sizes"]["shared, 2 layers"]["block_parameters"]
    assert found["sizes"]["conformer"]["stays"] > found["sizes"]["fusionformer"]["stays"] == 0
    for mode in ("offline", "streaming"):
        timed = found["latency"]["reference"][mode]
        assert timed.keys() == lines
        assert timed["conformer"]["ratio"] == 1.0


def test_costs_that_are_measured_again_replace_their_own_and_what_was_refused() -> None:
    before = {
        "sizes": {"a": 1, "b": 2},
        "refused": {"b, tflite": "no", "c": "never"},
        "latency": {"t": {"offline": {"a": 1, "b": 2}}},
    }
    now = {"sizes": {"b": 3}, "refused": {}, "latency": {"t": {"offline": {"b": 3}}}}
    assert renewed(before, now) == {
        "sizes": {"a": 1, "b": 3},
        "refused": {"c": "never"},
        "latency": {"t": {"offline": {"a": 1, "b": 3}}},
    }


def test_a_table_is_written_again_from_results_and_not_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["study", "--report-only", "-o", str(tmp_path / "study")]) == MissingFile.exit_code
    told = capsys.readouterr().err
    assert "holds no results of a study" in told
    assert "edgefuse study --speech CORPUS" in told
    assert not (tmp_path / "study").exists()
    write_results(tmp_path / "results.json", some_results())
    assert cli.run(["study", "--report-only", "-o", str(tmp_path)]) == 0
    assert (tmp_path / "STUDY.md").read_text(encoding="utf-8") == page(read_plan(), some_results())


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", some_results())
    assert page(read_plan(), read_results(tmp_path / "results.json")) == page(read_plan(), some_results())


def test_the_published_table_is_that_of_the_published_results(tmp_path: Path) -> None:
    published = read_results(ROOT / "edgefuse" / "study" / "results.json")
    assert (ROOT / "STUDY.md").read_text(encoding="utf-8") == page(read_plan(), published)
    report_of_nothing = report(read_plan(), tmp_path)
    assert report_of_nothing == Results()
    assert "| LayerNorm Conformer | not run |" in (tmp_path / "STUDY.md").read_text(encoding="utf-8")


def test_all_rows_are_trained_alike_but_for_what_they_say() -> None:
    plan = read_plan()
    base = plan.recipe_of(plan.row("conformer"), 1)
    for row in plan.rows:
        told = {"norm", "architecture", *row.recipe}
        recipe = plan.recipe_of(row, 1).to_json()
        assert {name: value for name, value in recipe.items() if name not in told} == {
            name: value for name, value in base.to_json().items() if name not in told
        }
    assert plan.config_of(plan.row("unified"), 128) == replace(plan.config_of(plan.row("conformer"), 128), norm="unified")


def test_an_encoder_that_ignores_its_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = encoder_config("study", "batch", 29, {**TINY, "layers": 2, "shared_blocks": True})

    class Deaf(torch.nn.Module):
        """One that is always the same."""

        def __init__(self, config: EncoderConfig) -> None:
            super().__init__()
            self.config = config

        def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return features[:, ::4], lengths // 4

    monkeypatch.setattr("edgefuse.study.rows.Encoder", Deaf)
    with pytest.raises(Refused, match="the same with shared_blocks and without it"):
        require_built(config)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("subsampling = 5", "subsampling is 5"),
        ("colour = 1", "unknown keys: 'colour'"),
        ("folded = true", "does not say folded"),
        ("vocabulary_size = 9", "does not say vocabulary_size"),
        ("[[stages]]\nlayers = 3", "3 layers together, not 8"),
        ("layers =", "is not TOML"),
    ],
)
def test_an_architecture_that_cannot_be_is_refused_by_the_name_of_its_file(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(BadConfig, match=sentence) as refused:
        read_architecture(file, "study")
    assert str(file) in refused.value.sentence


def test_an_architecture_replaces_fields_of_its_norms_preset() -> None:
    told: Mapping[str, Any] = {"norm": "layer", "layers": 3, "stages": [{"layers": 1, "attention": "none"}, {"layers": 2}]}
    recipe = Recipe(preset="study", norm="layer", architecture=told)
    config = recipe.encoder(29)
    assert (config.activation, config.layers, [stage.attention for stage in config.stages]) == ("swish", 3, ["none", "softmax"])
    assert recipe.to_json()["architecture"] == told
    with pytest.raises(BadConfig, match="--norm is 'batch'"):
        norm_of(told, "batch")
    assert (norm_of(told, None), norm_of({}, "batch"), norm_of({}, None)) == ("layer", "batch", None)


def test_a_new_checkpoint_has_the_architecture_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, made = tmp_path / "mine.toml", tmp_path / "made"
    file.write_text('norm = "layer"\nlayers = 2\nsubsampling = 8\n')
    asked = ["new", "--preset", "study", "--architecture", str(file), "-o", str(made)]
    assert cli.run([*asked, "--norm", "batch"]) == BadConfig.exit_code
    assert "The architecture's norm is 'layer', and --norm is 'batch'." in capsys.readouterr().err
    assert cli.run(asked) == 0
    config = checkpoints.read(made).config
    assert (config.norm, config.layers, config.subsampling, config.dimension) == ("layer", 2, 8, 96)


def test_the_study_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["study", "-o", str(tmp_path)]) == UsageError.exit_code
    assert "--speech CORPUS" in capsys.readouterr().err
    assert cli.run(["study", "-o", str(tmp_path), "--speech", str(tmp_path), "--row", "nothing"]) == UsageError.exit_code
    assert "no row 'nothing'" in capsys.readouterr().err


def test_a_sampled_depth_is_uniform_and_the_same_for_the_same_step() -> None:
    recipe = Recipe(sampled_depth=True, seed=3)
    drawn = [draw_depth(recipe, 4, step) for step in range(2000)]
    assert drawn == [draw_depth(recipe, 4, step) for step in range(2000)]
    assert {depth: round(drawn.count(depth) / 500, 1) for depth in (1, 2, 3, 4)} == pytest.approx(
        dict.fromkeys((1, 2, 3, 4), 1.0), abs=0.11
    )
    assert draw_depth(Recipe(), 4, 0) is None
