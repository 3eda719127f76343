"""Objectives beside plain masking, in whole runs: they learn, and a continued run equals the uninterrupted one."""

import shutil

from pretraining import assert_same_run, losses, small_run


def assert_continues(harness, words_for, whole, continued, step):
    """Go back to a checkpoint in a copy of a finished run's folder, and make the same again."""
    shutil.copytree(whole, continued)
    resume = ["--resume_from_checkpoint", continued / f"step_{step}"]
    assert "continuing from" in harness.run(*words_for(continued), *resume).check().stdout
    assert_same_run(whole, continued)


def test_a_masking_rate_that_falls_is_learned_from_and_continued(harness, tiny_corpus, cache, tmp_path):
    flags = ["--mlm_probability", 0.3, "--final_mlm_probability", 0.15, "--masking", "ngram", "--learning_rate", 5e-3]
    flags += ["--checkpointing_steps", 6, "--init_output_bias", "zeros", "--save_total_limit", 9]
    words_for = lambda out: small_run(tiny_corpus, cache, out, *flags, steps=20)  # noqa: E731
    harness.run(*words_for(tmp_path / "whole")).check()
    course = list(losses(tmp_path / "whole").values())
    assert sum(course[-5:]) < sum(course[:5]) - 1
    assert_continues(harness, words_for, tmp_path / "whole", tmp_path / "continued", 6)
