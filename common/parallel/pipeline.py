"""Pipeline parallelism: each process holds some of the layers, and a batch goes through them in micro-batches.

`model(**batch)` in training runs forward and backward passes of the whole batch, by a schedule; in evaluation it runs
the batch through and every process gets the result. B rows, S sequence, H hidden size, k predicted positions.
"""

import contextlib

import torch
import torch.distributed as dist

from common.models.head_loss import HeadLoss
from common.models.stages import check_stages, drop_unused, used_parameters
from common.parallel.dealt import Dealt
from common.parallel.delayed import Delayed, DelayedOptimizer
from common.parallel.exchange import Exchange
from common.parallel.flushed import Flushed
from common.parallel.launch import DELAYED, check_micro_batches, check_optimizer
from common.parallel.plain import PlainAccelerator
from common.parallel.processes import derive_seed
from common.parallel.stage_states import StageStates
from common.parallel.stage_times import StageTimes

NAMES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "interleaved 1F1B",
    "2bw": "PipeDream-2BW",
    "2bw_corrected": "PipeDream-2BW with corrected updates",
}

LESS_DELAYED = (
    "PipeDream-2BW applies each gradient one step late, which costs {} more loss than Muon or Lion: compare "
    "--optimizer_type muon, schedule=2bw_corrected in the YAML's role, which makes up for most of it, or "
    "accelerate_configs/pipeline_1f1b.yaml, which has no delay"
)


class PipelineAccelerator(PlainAccelerator):
    """Stages of a model on the processes of a pipeline, and copies of the pipeline that read different rows.

    Args:
        launch: common.parallel.launch.Launch; settings: of accelerate.Accelerator.
    """

    def __init__(self, launch, **settings):
        super().__init__(launch, **settings)
        self.pipe, self.states, self.pipeline = launch.pipe, StageStates(self), None
        self._per_device, self.max_grad_norm = 0, 0.0

    @property
    def delayed(self):
        """Whether updates come a step late."""
        return self.pipe.schedule in DELAYED

    @property
    def steps_behind(self):
        """How many steps the loss and the norm that a step returns are older than it."""
        return int(self.delayed)

    @property
    def data_rank(self):
        """As PlainAccelerator's: all stages of a pipeline look at the same rows."""
        return self.pipe.seat(self.process_index)[0], self.num_processes // self.pipe.processes

    @property
    def checkpoint_part(self):
        """(number of the part of a checkpoint that this process writes, or None; number of parts)."""
        copy, place = self.pipe.seat(self.process_index)
        writes = copy == 0 and place == self.pipe.place(self.pipe.numbers(place)[0])
        return (self.pipe.part(place) if writes else None), self.pipe.parts

    def place_of(self, rank):
        """As PlainAccelerator's: the stages of a process, and its copy of the pipeline."""
        copy, place = self.pipe.seat(rank)
        numbers = self.pipe.numbers(place)
        named, alike = ", ".join(str(number + 1) for number in numbers), self.pipe.places(numbers[0])
        where = f" in copy {copy + 1}" if self.data_rank[1] > 1 else ""
        where += f", its process {alike.index(place) + 1} of {len(alike)}" if len(alike) > 1 else ""
        return f" (stage {named} of {self.pipe.stages}{where})"

    def record_passes(self):
        """As PlainAccelerator's."""
        self.pipeline.times = StageTimes(self.device)
        self.pipeline.times.of_updates(self.pipeline.runner)

    def passes(self, about):
        """As PlainAccelerator's. Args: about: dict of this process."""
        stage = ", ".join(str(number) for number in self.pipeline.stages)
        return self.pipeline.times.gather({"stage": stage, "copy": self.pipeline.exchange.copy, **about})

    def describe_strategy(self):
        """Schedule, stages, micro-batches and copies, for people."""
        schedule, stages, micro_batches, stage_map = self.pipe
        copies, cut = self.data_rank[1], f" of {stage_map.path}" if stage_map else ""
        text = f"pipeline, {NAMES[schedule]}, {stages} stages{cut}, {micro_batches} micro-batches"
        if self.pipe.deals:
            text += f", dealt out to {', '.join(str(number) for number in self.pipe.dealt)} processes"
        return text + (f", {copies} copies" if copies > 1 else "")

    def follow_command_line(self, per_device, accumulation, max_grad_norm):
        """As PlainAccelerator's.

        Raises:
            UserError: as check_micro_batches.
        """
        self._per_device, self.max_grad_norm = per_device, max_grad_norm
        super().follow_command_line(per_device, accumulation, max_grad_norm)  # which sets the accumulation

    def set_accumulation(self, accumulation):
        """As PlainAccelerator's.

        Raises:
            UserError: as follow_command_line.
        """
        check_micro_batches(self.pipe, self._per_device, accumulation)
        super().set_accumulation(accumulation)

    def prepare(self, *objects, **options):
        """As accelerate's, for a model alone or with its optimizer, which has not stepped yet."""
        (model,) = (thing for thing in objects if isinstance(thing, torch.nn.Module))
        optimizers = [thing for thing in objects if isinstance(thing, torch.optim.Optimizer)]
        for optimizer in optimizers:
            check_optimizer("pipeline", optimizer)
        self.pipeline = Pipeline(self, model)
        prepared = []
        for thing in objects:
            if thing is model:
                prepared.append(self.pipeline)
                continue
            held = set(self.pipeline.held.values())
            for group in thing.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter in held]
            thing.param_groups[:] = [group for group in thing.param_groups if group["params"]]
            prepared.append(self._prepare_optimizer(thing))
        return prepared[0] if len(prepared) == 1 else tuple(prepared)

    def _prepare_optimizer(self, optimizer):
        if self.pipe.schedule == "2bw" and "adam" in type(optimizer).__name__.lower():
            self.print(f"note: {LESS_DELAYED.format(type(optimizer).__name__)}", flush=True)
        if not self.delayed:
            self.pipeline.runner = (Dealt if self.pipe.deals else Flushed)(self.pipeline, optimizer)
            return self.prepare_optimizer(optimizer, device_placement=False)
        self.pipeline.runner = Delayed(self.pipeline, optimizer)
        return DelayedOptimizer(self.pipeline.runner)

    def backward(self, loss, **_):
        """The passes are made already; here gradients are put together."""
        if self.sync_gradients:
            self.pipeline.runner.put_together()

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        """As accelerate's, over all stages. Returns: the norm before, of a batch whose gradients are complete."""
        return self.pipeline.runner.clip(max_norm)


class Pipeline(torch.nn.Module):
    """The stages of a model that this process has, and their connections to the others.

    Args:
        accelerator: PipelineAccelerator; model: whole stock model with run_part() and called_layers().
    Attributes:
        module: the model, of which only the parameters of these stages are left.
        names: all parameters of the whole model, by name, with their shapes; aliases: first names of all names.
        held: dict of this process's parameters by their names in the whole model.
        stages: dict of ranges of layers by the numbers of the stages here.
        runner: of batches in training; None where nothing is trained.
        times: StageTimes; None where nothing is measured.
    Raises:
        UserError: a model that cannot be cut so.
    """

    def __init__(self, accelerator, model):
        super().__init__()
        pipe = accelerator.pipe
        check_stages(model, pipe)
        self.accelerator, self.pipe, self.runner, self.times = accelerator, pipe, None, None
        named = dict(model.named_parameters())
        first = {parameter: name for name, parameter in named.items()}
        self.aliases = {alias: first[p] for alias, p in model.named_parameters(remove_duplicate=False)}
        self.names = {name: parameter.shape for name, parameter in named.items()}
        layers = pipe.layers(len(model.called_layers()))
        places = range(pipe.processes)
        numbers = [pipe.numbers(place) for place in places]
        used = [set().union(*(used_parameters(model, layers[n]) for n in numbers[place])) for place in places]
        owners = {name: tuple(p for p in places if parameter in used[p]) for name, parameter in named.items()}
        self.exchange = Exchange(pipe, accelerator.process_index, accelerator.num_processes, owners)
        here = self.exchange.place
        self.stages = {number: layers[number] for number in numbers[here]}
        drop_unused(model, used[here])
        self.module = model.to(accelerator.device)
        self.held = {name: parameter for name, parameter in named.items() if parameter in used[here]}

    def forward(self, **batch):
        """Output of a batch: in training the loss alone, as the runner tells it; else what was predicted, alone."""
        if self.training:
            return HeadLoss(loss=self.runner.run(batch))
        return self._judge(batch)

    def train(self, mode=True):
        """As torch's; whoever evaluates sees the weights of the last step."""
        if self.runner is not None:
            self.runner.drain()
            self.runner.set_mode(mode)
        return super().train(mode)

    def compute(self, module, number, batch, hidden, seed, micro_batch=None):
        """A stage's forward pass.

        Args:
            module: model with the weights to use; number: of the stage; batch: micro-batch; hidden: [b, S, H] or None.
            seed: of what this micro-batch drops; each stage drops something else.
            micro_batch: its number in the run; None of one that is not measured.
        Returns:
            [b, S, H] float32, or the output of the last stage.
        """
        if module.training:
            torch.manual_seed(derive_seed(seed, number))
        with self.timed("forward", number, micro_batch), self.accelerator.autocast():
            output = module.run_part(batch, hidden, self.stages[number])
        return output.float() if torch.is_tensor(output) else output

    def timed(self, kind, stage, micro_batch):
        """Context in which a pass is measured, where that is asked for. Args: as those of stage_times.Pass."""
        if self.times is None or micro_batch is None:
            return contextlib.nullcontext()
        return self.times.of(kind, stage, micro_batch)

    def hidden_shape(self, batch):
        """Of what goes from stage to stage."""
        return (*batch["input_ids"].shape, self.module.config.hidden_size)

    def cut(self, batch):
        """A batch's micro-batches, each with such a denominator that the mean of their losses is the batch's."""
        count = self.pipe.micro_batches
        parts = {name: tensor.chunk(count) for name, tensor in batch.items() if tensor.dim()}
        whole = {name: tensor / count for name, tensor in batch.items() if not tensor.dim()}
        numbers = range(len(parts["input_ids"]))
        return [{name: tensors[number] for name, tensors in parts.items()} | whole for number in numbers]

    @torch.no_grad()
    def _judge(self, batch):
        exchange, place, outputs, sent = self.exchange, self.pipe.place, [], []
        here = [number for number in self.stages if place(number) == exchange.place]  # none is dealt out
        for part in self.cut(batch):
            for number in here:
                hidden = None
                if number:
                    hidden = torch.empty(self.hidden_shape(part), device=self.accelerator.device)
                    dist.recv(hidden, exchange.rank(place(number - 1)), group=exchange.forward)
                output = self.compute(self.module, number, part, hidden, 0)
                if torch.is_tensor(output):
                    after = exchange.rank(place(number + 1))
                    sent.append((dist.isend(output, after, group=exchange.forward), output))
                else:
                    outputs.append(output)
        for work, _ in sent:
            work.wait()
        return self._tell_all(outputs)

    def _tell_all(self, outputs):
        """A batch's output on every process. Args: outputs: of its micro-batches, where the last stage is."""
        box, device = [None], self.accelerator.device
        if outputs:
            kept = {name: value for name, value in outputs[0].items() if value.dim()}
            joined = {name: torch.cat([output[name] for output in outputs]).cpu() for name in kept}
            box = [(type(outputs[0]), joined)]
        source = self.exchange.rank(self.pipe.place(self.pipe.stages - 1))
        dist.broadcast_object_list(box, source, group=self.exchange.group, device=device)
        kind, told = box[0]
        return kind(**{name: value.to(device) for name, value in told.items()})
