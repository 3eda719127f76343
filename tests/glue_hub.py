"""A folder with the layout of the hub's repository of GLUE, for the tests."""

from datasets import ClassLabel, Dataset, Features, Value

# What the hub's dataset card says of each configuration: columns of text, names of the classes in their order.
PAIR = ("sentence1", "sentence2")
CONFIGURATIONS = {
    "cola": (("sentence",), ("unacceptable", "acceptable")),
    "sst2": (("sentence",), ("negative", "positive")),
    "mrpc": (PAIR, ("not_equivalent", "equivalent")),
    "stsb": (PAIR, None),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate")),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment")),
    "rte": (PAIR, ("entailment", "not_entailment")),
    "wnli": (PAIR, ("not_entailment", "entailment")),
    "ax": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
}
SPLITS = {
    "mnli": ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"),
    "ax": ("test",),
}


def hub_folder(folder, card=True, rows=4, classes=None):
    """Write parquet files as the hub's repository of GLUE has them, with or without its card.

    Args:
        classes: their names, instead of the configuration's.
    Returns:
        the folder.
    """
    configs = []
    for config, (columns, names) in CONFIGURATIONS.items():
        names = classes or names
        features = Features(
            {name: Value("string") for name in columns}
            | {"label": ClassLabel(names=list(names)) if names else Value("float32"), "idx": Value("int32")}
        )
        files = []
        for split in SPLITS.get(config, ("train", "validation", "test")):
            place = f"{config}/{split}-00000-of-00001.parquet"
            labels = [-1 if split.startswith("test") else number % len(names or range(6)) for number in range(rows)]
            table = {name: [f"{split} {name} {number}" for number in range(rows)] for name in columns}
            table |= {"label": labels, "idx": list(range(10, 10 + rows))}
            (folder / config).mkdir(parents=True, exist_ok=True)
            Dataset.from_dict(table, features=features).to_parquet(folder / place)
            files += [f"  - split: {split}", f"    path: {place}"]
        configs += [f"- config_name: {config}", "  data_files:", *files]
    if card:
        (folder / "README.md").write_text("\n".join(["---", "configs:", *configs, "---", "# GLUE", ""]))
    return folder
