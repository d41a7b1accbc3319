"""The search for a goal: on figures that are made up, so that all of it is known; and through the command line."""

import csv
import json

import numpy as np
import pytest

from onnx_ocs import quantize
from onnx_ocs.errors import BadRecipe, VerificationFailed
from onnx_ocs.recipe import Recipe
from onnx_ocs.search import Goal, LayerCost, Search, Trial, read_trials, write_trials

LAYERS = [LayerCost(f"layer{number}", 100 * (number + 1), float(number % 4 + 1)) for number in range(10)]
BYTES = {8: 1.0, 4: 0.5, 2: 0.25}


def made_up(recipe):
    """Figures of a network whose layers add their noise, as a function of their bits."""
    wide = {text.split("$")[0].removeprefix("^"): int(text.rsplit("=", 1)[1]) for text in recipe.layer}
    bits = {layer.name: wide.get(layer.name, recipe.bits) for layer in LAYERS}
    size = sum(layer.weights * BYTES[bits[layer.name]] for layer in LAYERS) * (1 + recipe.ratio)
    noise = sum(layer.noise * 4.0 ** -bits[layer.name] for layer in LAYERS) / (1 + 3 * recipe.ratio)
    sqnr = -10 * np.log10(noise)
    return Trial({}, int(size), size / 22000, float(sqnr), float(1 - min(1, noise**0.5)), float(noise))


def search(goal, measure=made_up, given=(), **more):
    return Search(goal, Recipe(), frozenset(given), LAYERS, measure, **more)


@pytest.mark.parametrize("sqnr", [5, 10, 20, 30])
def test_the_smallest_that_reaches_the_quality_is_found(sqnr):
    done = search(Goal(sqnr=sqnr, budget=60))
    best = done.run()
    assert best.sqnr_db >= sqnr
    for trial in done.trials:
        assert trial.size >= best.size or trial.sqnr_db < sqnr
    uniform = [made_up(Recipe(bits=bits)) for bits in (8, 4, 2)]
    assert best.size <= min(trial.size for trial in uniform if trial.sqnr_db >= sqnr)


def test_layers_go_down_one_by_one_between_two_widths():
    """Between 4 bits, 10.7 dB, and 8, 34.8 dB: not all layers stay wide."""
    best = search(Goal(sqnr=20, budget=60)).run()
    wide, narrow = made_up(Recipe(bits=8)), made_up(Recipe(bits=4))
    assert narrow.sqnr_db < 20 < wide.sqnr_db
    assert narrow.size < best.size < 0.95 * wide.size


@pytest.mark.parametrize("ratio", [0.08, 0.1, 0.2, 0.3])
def test_the_best_within_a_size_is_found(ratio):
    done = search(Goal(size_ratio=ratio, budget=60))
    best = done.run()
    assert best.size_ratio <= ratio
    assert all(trial.sqnr_db <= best.sqnr_db for trial in done.trials if trial.size_ratio <= ratio)


@pytest.mark.parametrize("goal", [{"sqnr": 200.0}, {"size_ratio": 1e-3}, {"sqnr": 30.0, "size_ratio": 0.02}])
def test_what_cannot_be_reached_says_so_and_how_near_it_came(goal):
    with pytest.raises(VerificationFailed, match=r"was not reached in \d+ trials; the best has .* dB SQNR"):
        search(Goal(**goal)).run()


@pytest.mark.parametrize("budget", [1, 2, 5, 9])
def test_there_are_no_more_trials_than_the_budget(budget):
    done = search(Goal(agreement=0.9, budget=budget))
    done.run()
    assert len(done.trials) <= budget


def test_no_trial_is_made_twice_and_the_front_holds_those_that_none_beats():
    done = search(Goal(sqnr=20, budget=60))
    done.run()
    texts = [json.dumps(trial.options, sort_keys=True) for trial in done.trials]
    assert len(set(texts)) == len(texts)
    front = done.front()
    assert [trial.size for trial in front] == sorted(trial.size for trial in front)
    for trial in done.trials:
        beaten = [other for other in front if other.size <= trial.size and other.sqnr_db >= trial.sqnr_db]
        assert beaten
    for trial in front:
        assert not [o for o in done.trials if o.size < trial.size and o.sqnr_db >= trial.sqnr_db]


def test_options_that_are_given_stay():
    done = search(Goal(sqnr=20, budget=40), given=("ratio", "clip"))
    done.run()
    assert all("ratio" not in trial.options and "clip" not in trial.options for trial in done.trials)


def test_naive_shares_are_rounded_to_nearest_in_every_trial(models):
    model, goal = models / "digits_mlp.onnx", Goal(sqnr=200, budget=9)
    with pytest.raises(VerificationFailed, match=r"was not reached in [2-9] trials"):
        quantize(model, split="naive", goal=goal)


def test_a_model_that_does_not_pass_is_a_trial_that_failed():
    def fragile(recipe):
        return Trial({}, failure="the outputs are not finite") if recipe.bits < 8 else made_up(recipe)

    done = search(Goal(sqnr=20), measure=fragile)
    assert done.run().options == {"bits": 8}
    with pytest.raises(VerificationFailed, match="not finite"):
        search(Goal(sqnr=20), measure=lambda recipe: Trial({}, failure="the outputs are not finite")).run()


def test_a_search_that_was_broken_off_goes_on_to_the_same_end(tmp_path):
    state, mark, calls = tmp_path / "state.json", "mark", []

    def counted(recipe):
        calls.append(recipe)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return made_up(recipe)

    whole = search(Goal(sqnr=20))
    wanted = whole.run()
    with pytest.raises(KeyboardInterrupt):
        search(Goal(sqnr=20), counted, kept=lambda trials: write_trials(state, mark, trials)).run()
    again = search(Goal(sqnr=20), counted, known=read_trials(state, mark))
    assert again.run() == wanted
    assert again.trials == whole.trials
    assert len(calls) == len(whole.trials) + 1  # three were known; the broken one was made again
    with pytest.raises(BadRecipe, match="another model, samples or recipe"):
        read_trials(state, "other")
    state.write_text("{}")
    with pytest.raises(BadRecipe, match="holds no trials"):
        read_trials(state, mark)


@pytest.mark.parametrize(
    "goal", [{}, {"agreement": 2}, {"size_ratio": 0}, {"sqnr": 1, "budget": 0}, {"sqnr": 1, "bits": (9,)}]
)
def test_a_goal_out_of_its_range_is_refused(goal):
    with pytest.raises(ValueError, match=r"target-agreement|max-size-ratio|budget|search-bits"):
        Goal(**goal)


def test_the_command_reaches_its_goal_and_the_report_runs_again_to_the_same_bytes(command, models, tmp_path):
    inputs, source = models / "digits_test.npz", models / "digits_mlp.onnx"
    out, report, front = tmp_path / "out.onnx", tmp_path / "report.json", tmp_path / "front.csv"
    state = tmp_path / "state.json"
    options = ["--target-agreement", "0.97", "--budget", "6", "--inputs", inputs, "--search-state", state]
    status, shown, _ = command(source, out, *options, "--report", report, "--front", front)
    assert status == 0
    found = json.loads(report.read_text())
    assert found["verification"]["quantized"]["top1_agreement"] >= 0.97
    assert found["search"]["trials"] <= 6
    assert "agreement" in shown
    rows = list(csv.DictReader(front.read_text().splitlines()))
    assert [int(row["size"]) for row in rows] == sorted(int(row["size"]) for row in rows)
    assert min(int(row["size"]) for row in rows if float(row["agreement"]) >= 0.97) == out.stat().st_size
    again = tmp_path / "again.onnx"
    assert command(source, again, "--recipe", report, "-q")[0] == 0
    assert again.read_bytes() == out.read_bytes()
    resumed = tmp_path / "resumed.onnx"
    assert command(source, resumed, *options, "-q")[0] == 0
    assert resumed.read_bytes() == out.read_bytes()


def test_samples_of_an_iterable_serve_all_trials_and_the_result(models):
    images = np.load(models / "digits_test.npz")
    (name,) = [name for name in images.files if images[name].dtype == np.float32]
    goal = Goal(sqnr=5, bits=(8,), budget=1)
    result = quantize(models / "digits_mlp.onnx", goal=goal, calibrate=iter(images[name][:16, None]))
    assert result.report["verification"]["samples"] == 16
    assert {row["act_bits"] for row in result.report["layers"]} == {8}


def test_a_goal_beyond_reach_writes_nothing(command, models, tmp_path):
    out = tmp_path / "out.onnx"
    options = ["--target-sqnr", "150", "--budget", "2", "--search-bits", "8,4"]
    status, _, complaint = command(models / "digits_mlp.onnx", out, *options)
    assert status == 1
    assert "was not reached in" in complaint
    assert not out.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--budget", "3"],
        ["--target-sqnr", "20", "--bits", "4"],
        ["--target-sqnr", "20", "--no-verify"],
        ["--target-sqnr", "20", "--float"],
        ["--target-agreement", "3"],
        ["--target-sqnr", "20", "--search-bits", "x"],
        ["--front", "f.csv"],
    ],
)
def test_options_that_make_no_search_are_wrong_usage(command, models, tmp_path, options):
    status, _, complaint = command(models / "digits_mlp.onnx", tmp_path / "out.onnx", *options)
    assert status == 2, complaint
