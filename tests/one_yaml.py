"""A small pipeline's YAML, and what its page consists of."""

from html.parser import HTMLParser

SMALL = """
SYSTEM: {NUM_GPUS: 0}
DATASET: {EMBEDDED: True}
PRETRAIN:
  {model_size: tiny, max_train_steps: 60, max_eval_samples: 32, logging_steps: 1, checkpointing_steps: 5,
   report_to: none}
FINETUNE: {tasks: follows, seeds: [7], max_train_samples: 64, max_eval_samples: 64}
WANDB: {API_KEY: a-key-for-no-file}
"""


def written(folder, text, name="own.yaml"):
    path = folder / name
    path.write_text(text)
    return path


class Page(HTMLParser):
    """What a page consists of. tags: (name, attributes); text: what a reader sees."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._hidden = [], "", False
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("style", "script")

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        self.text += "" if self._hidden else f" {data}"
