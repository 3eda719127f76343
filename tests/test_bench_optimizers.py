"""The race of optimizers: equal tokens repeat exactly, equal time stops the clocks of those that wait."""

import json

import pytest

from benchmarks import bench_optimizers


@pytest.fixture
def race(tiny_corpus, cache, monkeypatch):
    data = f"--train_file {tiny_corpus} --cache_dir {cache} --tokenizer_train_vocab_size 600"
    recipe = f"{data} --train_batch_size 8 --max_eval_samples 16 --fp32"
    monkeypatch.setattr(bench_optimizers, "RECIPE", recipe)
    return bench_optimizers.Race()


def test_a_small_race(race, tmp_path):
    names = ("adamw", "sophia", "schedulefree")
    grids = {name: bench_optimizers.search(race, name, tokens=16 * 8 * 64) for name in names}
    for name, found in grids.items():
        best = bench_optimizers.best_rate(found)
        again = race.equal_tokens(name, best, 16 * 8 * 64)
        losses = [[loss for _, _, loss in racer.curve] for racer in (found[best], again)]
        assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
        assert again.steps == 16 and again.tokens == 16 * 8 * 64 == again.curve[-1][0]
        inside = min(found) < best < max(found)
        assert inside or len(found) == len(bench_optimizers.ENTRIES[name][1]) + bench_optimizers.MOST_MORE
    timed = race.equal_time({name: bench_optimizers.best_rate(found) for name, found in grids.items()}, 2)
    for racer in timed.values():
        assert racer.seconds == pytest.approx(sum(racer.step_seconds))
        assert 2 <= racer.seconds <= 2 + max(racer.step_seconds)
        assert racer.curve[-1][0] == racer.tokens and racer.curve[0][0] == 0
    rows = [bench_optimizers.row(name, grids[name], timed[name]) for name in names]
    assert rows[0].keys() == rows[1].keys() and "--lr_scheduler_type constant" in rows[-1]["optimizer"]
    best = {name: found[bench_optimizers.best_rate(found)] for name, found in grids.items()}
    bench_optimizers.plot(best, timed, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    json.loads(json.dumps(bench_optimizers.points(best["adamw"]), allow_nan=False))
