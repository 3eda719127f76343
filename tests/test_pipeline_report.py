"""The page of a pipeline: what it says, that it stands alone, how a browser shows it."""

import html
import json
import shutil
import subprocess
from statistics import median, stdev

import pytest

from common.errors import UserError
from common.pipeline import report
from common.pipeline.collect import collect
from common.pipeline.plan import Stage
from common.pipeline.run import Stamps
from one_yaml import SMALL, Page, written
from pretraining import results, small_run

FOLLOWS = {"pretrained": {1: 0.61, 2: 0.59, 3: 0.6025}, "random": {1: 0.55, 2: 0.54, 3: 0.56}}


@pytest.fixture(scope="module")
def folder(harness, tiny_corpus, cache, tmp_path_factory):
    """A pipeline's folder, of a real pretraining and of scores whose medians are known; another run's beside it."""
    out = tmp_path_factory.mktemp("pipelines") / "mine"
    harness.run(*small_run(tiny_corpus, cache, out / "pretrain", "--eval_steps", 10, steps=20)).check()
    harness.run(*small_run(tiny_corpus, cache, out.parent / "theirs", "--learning_rate", 1e-4, steps=10)).check()
    for weights, seeds in FOLLOWS.items():
        for seed, accuracy in seeds.items():
            run = out / "finetune" / f"{weights}-seed{seed}"
            run.mkdir(parents=True)
            (run / "all_results.json").write_text(json.dumps({"task": "own", "eval_accuracy": accuracy}))
    (out / "results.json").write_text(json.dumps(collect(out / "finetune")))
    commands = {"pretrain": ["bash scripts/run_pretraining.sh cpu '' '' <b>&amp;"]}
    facts = {"config": "configs/a.yaml", "text": "a small text", "commands": commands}
    facts |= {"pretrained": str(out / "pretrain")}
    (out / "plan.json").write_text(json.dumps(facts))
    (out / "pipeline.yaml").write_text(SMALL)
    Stamps(out).finish(Stage("pretrain", "", (), out, 1.0), 83.0)
    return out


@pytest.fixture(scope="module")
def page(folder):
    run, other = (report.read_run(path) for path in (folder, folder.parent / "theirs"))
    return report.render(run, other)


def test_the_page_says_what_the_runs_say(page, folder):
    mine, theirs = results(folder / "pretrain"), results(folder.parent / "theirs")
    seen = Page(page).text
    for value in (mine["eval_loss"], mine["unigram_loss"], theirs["eval_loss"]):
        assert f"{value:.3f}" in seen
    scores = list(FOLLOWS["pretrained"].values())
    assert "follows, median of 3 seeds" in seen and f"{100 * median(scores):.2f}" in seen
    assert f"{100 * stdev(scores):.2f}" in seen and "1: 61.00, 2: 59.00, 3: 60.25" in seen and "55.00" in seen
    assert f"{mine['train_tokens']:,} tokens in 20 steps" in seen and "was trained on a small text for" in seen
    assert "learning_rate 0.002 0.0001" in seen and "max_train_steps 20 10" in seen
    assert "bash scripts/run_pipeline.sh configs/a.yaml" in seen and "<b>&amp;" in html.unescape(page)
    assert "pretrain 1:23" in seen and "torch" in seen and "[MASK]" in seen


def test_the_page_stands_alone_and_is_accessible(page):
    tags = Page(page).tags
    assert not {"script", "link", "iframe", "object"} & {name for name, _ in tags}
    assert "url(" not in page and "@import" not in page
    images = [attributes for name, attributes in tags if name == "img"]
    assert len(images) == 4
    for image in images:
        assert image["src"].startswith("data:image/svg+xml;base64,") and len(image["alt"]) > 40
    assert all("scope" in attributes for name, attributes in tags if name == "th")
    count = [name for name, _ in tags].count
    assert count("table") == count("caption") and count("h1") == count("main") == 1
    assert ("html", {"lang": "en"}) in tags and any(attrs.get("name") == "viewport" for _, attrs in tags)


def test_a_page_of_a_run_that_has_only_begun(tmp_path):
    with pytest.raises(UserError, match="neither a pipeline's folder"):
        report.read_run(tmp_path)
    facts = {"config": "configs/a.yaml", "commands": {}, "pretrained": str(tmp_path / "pretrain")}
    (tmp_path / "plan.json").write_text(json.dumps(facts))
    assert "Nothing has been trained yet." in Page(report.render(report.read_run(tmp_path))).text


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Runs a headless browser on a page with some flags. Returns: (stdout, stderr)."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser on PATH (looked for {', '.join(BROWSERS)})")
    profile = tmp_path_factory.mktemp("profile")

    def browse(path, *flags):
        words = [
            program,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        ]
        words += ["--enable-logging=stderr", "--v=0", *flags, path.as_uri()]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return browse


def test_the_page_in_a_real_browser(browser, page, folder, tmp_path):
    import matplotlib.image

    path = written(tmp_path, page, "report.html")
    dom, log = browser(path, "--dump-dom")
    assert f"{results(folder / 'pretrain')['eval_loss']:.3f}" in dom and "60.25" in dom
    assert "CONSOLE" not in log
    picture = tmp_path / "page.png"
    browser(path, "--window-size=1000,1600", f"--screenshot={picture}")
    image = matplotlib.image.imread(picture)[..., :3]
    assert image.shape[:2] == (1600, 1000) and image[:600].std() > 0.02
    # the pictures are drawn: blue lines are somewhere in the upper half of the page
    blue = (image[..., 2] - image[..., 0] > 0.3).sum()
    assert blue > 500
    # on a phone nothing is wider than the screen
    frame = f'<iframe id="f" style="width:360px;height:640px;border:0" srcdoc="{html.escape(page)}"></iframe>'
    probe = "onload = () => { document.title = 'width ' + f.contentDocument.documentElement.scrollWidth }"
    dom, _ = browser(written(tmp_path, f"{frame}<script>{probe}</script>", "phone.html"), "--dump-dom")
    assert "<title>width 360</title>" in dom
