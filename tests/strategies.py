"""What the tests of strategies share: what every YAML must say and hold, and a small run under it.

Steps of 16 rows, cut so that every row accumulates 2 micro-batches, with clipping active and dropout 0.
"""

from typing import NamedTuple

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from causal import OVERRIDES, causal_run
from harness import REPOSITORY
from pretraining import fp32_copy, small_run


class Case(NamedTuple):
    """strategy: what the run must say it is; ranks; parameters and optimizer: the share of them on each rank; slices:
    of each layer, where only layers are cut into that many, before the shares."""

    strategy: str
    ranks: int
    parameters: float = 1.0
    optimizer: float = 1.0
    slices: int = 1

    @property
    def readers(self):
        """Ranks that read different rows."""
        return self.ranks // self.slices


CASES = {
    "ddp": Case("data parallel (DDP)", 2),
    "zero1": Case("DeepSpeed ZeRO-1", 2, optimizer=1 / 2),
    "zero2": Case("DeepSpeed ZeRO-2", 2, optimizer=1 / 2),
    "zero3": Case("DeepSpeed ZeRO-3", 2, 1 / 2, 1 / 2),
    "zero2_offload": Case("DeepSpeed ZeRO-2 (optimizer on cpu)", 2, optimizer=1 / 2),
    "zero3_offload": Case("DeepSpeed ZeRO-3 (optimizer on cpu, parameters on cpu)", 2, 1 / 2, 1 / 2),
    "fsdp": Case("FSDP2, cut in 2", 2, 1 / 2, 1 / 2),
    "fsdp_offload": Case("FSDP2, cut in 2, parameters and optimizer on the CPU", 2, 1 / 2, 1 / 2),
    "hsdp": Case("HSDP, 2 copies cut in 2", 4, 1 / 2, 1 / 2),
    "tensor_parallel": Case("tensor parallel, layers in 2 slices", 2, slices=2),
    "tensor_parallel_fsdp": Case("tensor parallel, layers in 2 slices, FSDP2, cut in 2", 4, 1 / 2, 1 / 2, slices=2),
    "colossalai_ddp": Case("Colossal-AI data parallel (DDP)", 2),
    "colossalai_zero1": Case("Colossal-AI ZeRO-1", 2, optimizer=1 / 2),
    "colossalai_zero2": Case("Colossal-AI ZeRO-2", 2, optimizer=1 / 2),
}
IN_BF16 = [name for name in CASES if not name.startswith("colossalai_zero")]  # by autocast; see test_colossalai.py
ALONE = dict.fromkeys(("cpu", "single_gpu"), Case("single process", 1))  # BERT's rows are in test_parity.py
MODELS = {
    "bert": AutoModelForMaskedLM,
    "opt": AutoModelForCausalLM,
    "pre-norm": AutoModelForMaskedLM,
    "llama": AutoModelForCausalLM,
}
SCRIPTS = {name: "run_clm.py" if name in ("opt", "llama") else "run_pretraining.py" for name in MODELS}
FIRST = ("zero2", "fsdp", "tensor_parallel")  # whose other rows are not left to the exhaustive suite either
LLAMA = (
    "hidden_size=32,num_hidden_layers=2,num_attention_heads=4,num_key_value_heads=2,head_dim=8,intermediate_size=64"
)


def command(model, corpus, cache, out, readers, *flags, dropout=0.0, steps=20):
    """Steps of 16 rows in 2 micro-batches on each of `readers` processes, or of the slices of one."""
    flags = ["--per_device_train_batch_size", 8 // readers, "--learning_rate", 3e-3, *flags]
    flags = ["--optimizer_type", "adamw", "--max_grad_norm", 0.2, *flags]
    if model in ("bert", "pre-norm"):
        flags += ["--hidden_dropout_prob", dropout, "--attention_probs_dropout_prob", dropout]
        flags += ["--encoder_ln_mode", "pre-ln"] if model == "pre-norm" else []
        return small_run(corpus, cache, out, *flags, steps=steps, batch=16)
    overrides = f"{OVERRIDES},dropout={dropout},attention_dropout={dropout}"
    if model == "llama":
        flags += ["--model_type", "llama"]
        overrides = f"{LLAMA},max_position_embeddings=128,attention_dropout={dropout}"
    return causal_run(corpus, cache, out, *flags, steps=steps, batch=16, overrides=overrides)


def launch(harness, name, tmp_path, words):
    """Run a YAML's ranks to their end. Returns: what rank 0 printed."""
    config = fp32_copy(f"accelerate_configs/{name}.yaml", tmp_path)
    ranks = harness.launch(*words, config=config, num_processes=None)
    for rank in ranks:
        rank.check()
    assert len(ranks) == (CASES | ALONE)[name].ranks and not any(rank.stdout for rank in ranks[1:])
    return ranks[0].stdout


def small_chunks(name, folder):
    """A user's copy of a YAML whose chunks are as small as the largest matrix. Returns: its Path."""
    text = (REPOSITORY / "accelerate_configs" / f"{name}.yaml").read_text()
    copy = folder / "small.yaml"
    copy.write_text(text.replace("min_chunk_size_m=32 search_range_m=32", "min_chunk_size_m=0 search_range_m=0"))
    assert (copy.read_text() == text) == ("gemini" not in name)
    return copy
