"""What PipeDream-2BW is to compute, on one process and without stages: a script with the flags of an entry script.

    python tests/delayed_reference.py <rates.json> <micro-batches> <copies> <0|1> run_pretraining.py|run_clm.py <flags>

Gradients of step t are those of the weights before the last update: two models, one of them a step behind. Writes
losses.json and model.safetensors into --output_dir. rates.json: the learning rate of every step; 1: to each update is
added what it differs by from the one before.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import run_clm
import run_pretraining
from common.arguments import parse_pretraining_arguments
from common.clm_arguments import parse_clm_arguments
from common.data.batches import Masking, NextToken, TrainBatches
from common.models.causal import build_causal_lm, causal_config, fit_vocabulary, set_attention
from common.models.layers import use_attention
from common.models.mlm import build_mlm_model
from common.optimizers import build_optimizer


def masked():
    """Returns: (function that builds the model, rows, objective, training arguments)."""
    model_args, data_args, args, _ = parse_pretraining_arguments()
    corpus, _, rows, _ = run_pretraining.prepare_rows(data_args, print)

    def build():
        model = build_mlm_model(model_args, data_args, corpus.tokenizer)
        use_attention(model, "sdpa")
        return model

    return build, rows, Masking.for_tokenizer(corpus.tokenizer, data_args.mlm_probability), args


def causal():
    """Returns: as masked()."""
    model_args, data_args, args = parse_clm_arguments()
    config = causal_config(model_args, data_args)
    tokenizer, rows, _, _ = run_clm.prepare_rows(config, data_args, print)
    fit_vocabulary(config, tokenizer, model_args, data_args)

    def build():
        model = build_causal_lm(model_args, data_args, config, None)
        set_attention(model, "sdpa")
        return model

    return build, rows, NextToken(), args


def main():
    rates, micro_batches, copies = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    corrects = sys.argv[4] == "1"
    read = {"run_pretraining.py": masked, "run_clm.py": causal}[sys.argv[5]]
    del sys.argv[1:6]
    build, rows, objective, args = read()
    models = []
    for _ in range(2):
        set_seed(args.seed)
        models.append(build().train())
    newest, behind = models
    optimizer = build_optimizer(newest, args)
    per_device, calls = args.batch_ramp.cut(args.per_device_train_batch_size, copies)
    here = {"ranks": copies, "device": torch.device("cpu"), "ramp": args.batch_ramp}
    streams = [
        iter(TrainBatches(rows, objective, args.seed, per_device, calls, rank, **here)) for rank in range(copies)
    ]
    losses, last_update = [], {}
    for step, rate in enumerate(rates):
        rows_now, _ = args.batch_ramp.at(args.batch_ramp.rows_after(step))
        calls = rows_now // (per_device * copies)
        gradients, loss = [], 0.0
        for stream in streams:
            total = []
            for _ in range(calls):
                batch, _, _ = next(stream)
                for number in range(micro_batches):
                    size = len(batch["input_ids"]) // micro_batches
                    part = {k: v[number * size : (number + 1) * size] for k, v in batch.items() if v.dim()}
                    of_part = behind(**part, loss_denominator=batch["loss_denominator"] / micro_batches).loss
                    (of_part / (micro_batches * calls)).backward()
                    total.append(of_part.detach())
            gradients.append([p.grad for p in behind.parameters()])
            behind.zero_grad()
            loss += torch.stack(total).mean().item() / copies
        for parameter, *parts in zip(behind.parameters(), *gradients, strict=True):
            parameter.grad = None if parts[0] is None else sum(parts[1:], parts[0]) / copies
        if args.max_grad_norm > 0:
            assert torch.nn.utils.clip_grad_norm_(behind.parameters(), args.max_grad_norm) > args.max_grad_norm
        before = {name: tensor.clone() for name, tensor in newest.state_dict().items()}
        for parameter, other in zip(newest.parameters(), behind.parameters(), strict=True):
            parameter.grad, other.grad = other.grad, None
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for name, tensor in newest.named_parameters() if corrects else ():
            update = tensor.detach() - before[name]
            tensor.data += update - last_update.get(name, update)
            last_update[name] = update
        behind.load_state_dict(before)
        losses.append(loss)
    out = Path(args.output_dir)
    out.mkdir(parents=True)
    (out / "losses.json").write_text(json.dumps(losses))
    save_file(dict(newest.named_parameters()), out / "model.safetensors")


if __name__ == "__main__":
    main()
