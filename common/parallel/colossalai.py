"""Colossal-AI: low-level ZeRO, whose optimizer is cut, and Gemini, whose chunks of parameters move between processes.

Its Booster does the work; here it follows the loop of every other strategy, and states go to whole tensors and back.
Parameters and gradients are in bf16 or fp16 where that is asked for, and the optimizer's fp32 copies, its masters, are
cut.
What is mended of Colossal-AI 0.5.0: see docs/upstream_issues.md.
Sources: Rajbhandari et al. 2020 (arXiv:1910.02054); Fang et al. 2021 (arXiv:2108.05818, chunks).
"""

import contextlib
import dataclasses
import io
import math
import sys
import types
import warnings
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from common.errors import UserError
from common.memory_settings import giving_back_memory
from common.parallel.draws import build_parts
from common.parallel.launch import check_optimizer
from common.parallel.parts import load_parts, replace, whole_numbers
from common.parallel.plain import PlainAccelerator
from common.parallel.tensors import first_names, follow, saved_settings

warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OF_LOSS_SCALE = ("_growth_step", "_hysteresis_step")  # beside the scale
# Imported by Colossal-AI, and called only by optimizers that are not used here: bitsandbytes is 125 MB.
STAND_INS = {
    "galore_torch": ("GaLoreAdafactor", "GaLoreAdamW"),
    "bitsandbytes": (),
    "bitsandbytes.optim": (),
    "bitsandbytes.optim.optimizer": ("Optimizer2State",),
}


@contextlib.contextmanager
def stand_ins():
    """Context in which empty packages stand for those that Colossal-AI imports in vain."""
    import peft  # noqa: F401, looks for bitsandbytes and is to find what is really there

    missing = {name: names for name, names in STAND_INS.items() if name not in sys.modules}
    for name, names in missing.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(dict.fromkeys(names, object))
    try:
        with warnings.catch_warnings(action="ignore"):  # of packages for speed that it looks for
            yield
    finally:
        for name in missing:
            del sys.modules[name]


with stand_ins():
    from colossalai.accelerator import get_accelerator
    from colossalai.booster import Booster
    from colossalai.booster.plugin import GeminiPlugin, LowLevelZeroPlugin, TorchDDPPlugin, gemini_plugin
    from colossalai.legacy.utils import memory
    from colossalai.nn.optimizer import HybridAdam
    from colossalai.tensor.param_op_hook import ColoParamOpHookManager
    from colossalai.zero.gemini import gemini_ddp, gemini_optimizer

# A batch's only fractions are the weights of its losses, which stay in fp32.
gemini_ddp._cast_float = lambda value, dtype: value


def _without_views(after):
    """What Gemini does after each operation on parameters, for one that has only given another view of them: a copy,
    as the chunk in which they lie is gone when the view is looked at."""

    def call(parameters, output):
        there = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        own = lambda value: value.clone() if value.untyped_storage().data_ptr() in there else value  # noqa: E731
        return after(parameters, tree_map_only(torch.Tensor, own, output))

    return call


ColoParamOpHookManager.post_op = staticmethod(_without_views(ColoParamOpHookManager.post_op))


class Adam(HybridAdam):
    """Colossal-AI's, which forgets to clip gradients in bf16 that it updates in the host's memory."""

    def step(self, closure=None, div_scale=-1):
        """As HybridAdam's. Args: div_scale: what the gradients are to be divided by, -1 for nothing."""
        self._div_scale = div_scale
        return super().step(closure, div_scale)

    def torch_adam_update(self, data, grad, *rest):
        """As CPUAdam's, of gradients in bf16 alone."""
        grad = grad.to(data.dtype)
        super().torch_adam_update(data, grad if self._div_scale == -1 else grad / self._div_scale, *rest)


gemini_optimizer._AVAIL_OPTIM_LIST.add(Adam)


class Gemini(gemini_ddp.GeminiDDP):
    """Colossal-AI's; where a parameter has no numbers yet, they come when it goes into a chunk.

    Its masters are made of what is rounded to bf16; here they are what was there before.
    """

    def _preprocess_param(self, p):
        if numbers := getattr(p, "numbers", None):
            p.data = numbers()
            del p.numbers
        self._exact = p.data.float()
        super()._preprocess_param(p)

    def _init_chunks(self, *args, **options):
        register = self.chunk_manager.register_tensor

        def register_exactly(tensor, group_type, **rest):
            if group_type == "fp32_param":
                tensor.data = self._exact
            register(tensor, group_type, **rest)

        self.chunk_manager.register_tensor = register_exactly
        super()._init_chunks(*args, **options)
        del self.chunk_manager.register_tensor
        self._exact = None


gemini_plugin.GeminiDDP = Gemini


class ColossalAccelerator(PlainAccelerator):
    """Colossal-AI's plugins with the command line's batch, accumulation, clipping and precision.

    Args:
        launch: common.parallel.launch.Launch; settings: of accelerate.Accelerator.
    """

    def __init__(self, launch, **settings):
        self._engine, self._options, self._on_cpu = launch.engine, launch.options, launch.cpu
        self._plugin, self._capacity, self._norm = launch.options["plugin"], None, None
        self._precision, self._dtype = launch.precision, DTYPES.get(launch.precision, torch.float32)
        # in fp16 accelerate would scale the losses, too
        super().__init__(dataclasses.replace(launch, precision="no") if self._scales else launch, **settings)
        if not dist.is_initialized():  # a process alone
            dist.init_process_group("gloo" if launch.cpu else "nccl", store=dist.HashStore(), rank=0, world_size=1)
        if launch.cpu:
            from common.parallel.colossalai_cpu import substitute

            substitute()
            self.print(
                "Colossal-AI: no CUDA, so the processor stands for the device (common/parallel/colossalai_cpu.py)"
            )

    @property
    def mixed_precision(self):
        """The precision of matrix products: "bf16", "fp16" or "no"."""
        return self._precision

    @property
    def _scales(self):
        return self._precision == "fp16"

    def describe_strategy(self):
        """Plugin, placement and what is offloaded, for people."""
        options, of = self._options, "Colossal-AI"
        if self._plugin == "ddp":
            return f"{of} data parallel (DDP)"
        if self._plugin != "gemini":
            on_host = " (optimizer on cpu)" if options["cpu_offload"] == "yes" else ""
            return f"{of} ZeRO-{self._plugin[-1]}{on_host}"
        parts = {"optimizer": options.get("offload_optim_frac"), "parameters": options.get("offload_param_frac")}
        offloaded = ", ".join(f"{share:.0%} of {what} on cpu" for what, share in parts.items() if share)
        return f"{of} Gemini, {options['placement_policy']} placement" + (f" ({offloaded})" if offloaded else "")

    def follow_command_line(self, per_device, accumulation, max_grad_norm):
        """As PlainAccelerator's. Before prepare(): the plugins are told the largest norm when they are made."""
        super().follow_command_line(per_device, accumulation, max_grad_norm)
        self._most, self._max_norm = accumulation, max_grad_norm

    def limit_memory(self, cap_gb):
        """As PlainAccelerator's: what automatic placement takes for the device's memory."""
        self._capacity = cap_gb * 1e9

    def prepare(self, *objects, **options):
        """As accelerate's; a model without an optimizer is only to be judged, and stays whole."""
        optimizers = [thing for thing in objects if isinstance(thing, torch.optim.Optimizer)]
        if not optimizers:
            return super().prepare(*objects, **options)
        (model,), (optimizer,) = (thing for thing in objects if thing not in optimizers), optimizers
        check_optimizer(self._engine, optimizer)
        if self._plugin == "gemini":
            optimizer = _gemini_adam(optimizer)
        wrapped = self._boost(model, optimizer)
        if self._plugin == "gemini":
            wrapped.train = model.train  # its own passes over the model itself, and eval() with it
        if self._options.get("placement_policy") == "auto":
            self._watch(wrapped)
        prepared = self.prepare_optimizer(self._optimizer, device_placement=False)
        return tuple(prepared if isinstance(thing, torch.optim.Optimizer) else wrapped for thing in objects)

    def load_pretrained(self, auto_class, name, **options):
        """As PlainAccelerator's; prepare() reads a tensor at a time, where the files let it."""
        if self._plugin == "ddp":
            return super().load_pretrained(auto_class, name, **options)
        return load_parts(self, auto_class, name, **options)

    def build(self, make):
        """As PlainAccelerator's; prepare() draws a tensor at a time."""
        return super().build(make) if self._plugin == "ddp" else build_parts(self, make)

    def _boost(self, model, optimizer):
        if self._plugin == "ddp":
            if self.mixed_precision == "bf16":  # Booster's own cannot be made
                model.forward = torch.autocast(self.device.type, torch.bfloat16)(model.forward)
            wrapped, self._optimizer, *_ = Booster(plugin=self._make_plugin()).boost(model, optimizer)
            return wrapped.module  # torch's
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with self._numbers(model, optimizer) as read:
            wrapped, self._optimizer, *_ = Booster(plugin=self._make_plugin()).boost(model, optimizer)
            for name, buffer in model.named_buffers():  # rotary frequencies among them
                buffer.data = buffers[name].to(buffer.device)
            self.states = (GeminiParts if self._plugin == "gemini" else ZeroParts)(self._optimizer)
            if self._plugin != "gemini":
                self.states.set_whole_weights(model, read)  # which Booster has rounded for the masters, too
        return wrapped

    @contextlib.contextmanager
    def _numbers(self, model, optimizer):
        """A function of a parameter's name giving its whole tensor as it was at first, in fp32.

        A model without numbers gets them, under ZeRO in the precision in which it computes, under Gemini when they go
        into a chunk.
        """
        if not hasattr(model, "places"):
            weights = {} if self._plugin == "gemini" else {n: p.data for n, p in model.named_parameters()}
            yield weights.__getitem__
            return
        before = {parameter: name for name, parameter in model.named_parameters()}
        with giving_back_memory(), whole_numbers(model) as read:
            if self._plugin == "gemini":
                after = {p: torch.nn.Parameter(torch.empty(1).expand(p.shape), p.requires_grad) for p in before}
                for parameter, name in before.items():
                    after[parameter].numbers = partial(read, name)
            else:
                how = {"device": self.device, "dtype": self._dtype, "copy": True}
                after = {p: torch.nn.Parameter(read(name).to(**how), p.requires_grad) for p, name in before.items()}
            replace(model, after)
            follow(optimizer, before, model)
            yield read

    def _make_plugin(self):
        named = {name: value for name, value in self._options.items() if name not in ("plugin", "cpu_offload")}
        beside = not self._on_cpu  # communication beside computation, which takes CUDA's streams
        if self._plugin == "ddp":
            return TorchDDPPlugin(broadcast_buffers=False, gradient_as_bucket_view=True)
        common = {"precision": {"no": "fp32"}.get(self._precision, self._precision), "max_norm": self._max_norm}
        if self._plugin == "gemini":
            accumulates = {"enable_gradient_accumulation": self._most > 1}
            return GeminiPlugin(**named, **common, **accumulates, enable_async_reduce=beside, pin_memory=beside)
        on_host = self._options["cpu_offload"] == "yes"
        stage = {"stage": int(self._plugin[-1]), "cpu_offload": on_host, "overlap_communication": beside}
        return LowLevelZeroPlugin(**named, **common, **stage, cast_inputs=False)

    def _watch(self, model):
        """Let automatic placement know the memory that there is, and on a CPU what of it is used."""
        policy, collector = model.gemini_manager._placement_policy, model.gemini_manager._mem_stats_collector
        if self._on_cpu:
            from common.parallel.colossalai_cpu import HostMonitor, host_share

            collector._mem_monitor = HostMonitor(model.chunk_manager)
            self._capacity = self._capacity or host_share()
        if self._capacity:
            memory.colo_device_memory_capacity = lambda device: self._capacity
        collector.finish_collection = _quietly(collector.finish_collection)
        policy.evict_tensors = self._or_refuse(policy.evict_tensors)
        model.forward = _judges_before_it_trains(model, model.forward)
        largest = max(model.chunk_manager.get_chunk(p).chunk_mem for p in model.parameters())
        room = memory.colo_device_memory_capacity(get_accelerator().get_current_device())
        if largest > room * (1 - self._options["warmup_non_model_data_ratio"]):
            raise UserError(self._too_small())

    def _or_refuse(self, evict):
        def call(**options):
            try:
                return evict(**options)
            except RuntimeError as error:
                raise UserError(self._too_small()) from error

        return call

    def _too_small(self):
        capacity = memory.colo_device_memory_capacity(get_accelerator().get_current_device()) / 1e9
        return (
            f"Gemini's chunks do not fit the {capacity:.3g} GB that it may use: raise --mem_cap, lower the YAML's "
            "min_chunk_size_m or warmup_non_model_data_ratio, or take "
            "accelerate_configs/colossalai_gemini_offload.yaml"
        )

    def backward(self, loss, **options):
        """As accelerate's."""
        self._optimizer.backward(loss / self.gradient_accumulation_steps)

    @contextlib.contextmanager
    def no_sync(self, model):
        """Gradients stay where they are until the last micro-batch of a step, where the plugin can wait."""
        kept = {"ddp": lambda: model.no_sync(), "zero1": lambda: self._optimizer.no_sync()}
        with kept.get(self._plugin, contextlib.nullcontext)():
            yield

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        """As accelerate's; the plugins clip in the step, which is when the norm is known.

        Returns:
            scalar tensor, which the step fills in.
        """
        if self._plugin == "ddp":
            return super().clip_grad_norm_(parameters, max_norm, norm_type)
        self._norm = torch.zeros((), device=self.device)
        return self._norm

    def prepare_optimizer(self, optimizer, device_placement=None):
        """As PlainAccelerator's; a step says its norm, and whether an overflow in fp16 has prevented it."""
        prepared = super().prepare_optimizer(optimizer, device_placement)
        step = prepared.step

        def step_and_say(closure=None):
            scale = self._loss_scale.loss_scale if self._scales else 1.0  # of these gradients; the next may differ
            step(closure)
            if not self.sync_gradients:
                return
            prepared._is_overflow = self._scales and self._loss_scale.found_overflow.item() > 0
            if prepared._is_overflow and self._plugin == "gemini":  # or they would be added to
                optimizer.chunk_manager.accumulating_grads = False
            if self._norm is not None:
                self._norm.fill_(math.nan if prepared._is_overflow else optimizer._current_grad_norm / scale)
                self._norm = None

        prepared.step = step_and_say
        return prepared

    @property
    def _loss_scale(self):
        """What Colossal-AI scales the losses with in fp16."""
        return (
            self._optimizer.mix_precision_mixin if self._plugin == "gemini" else self._optimizer.mixed_precision_mixin
        )

    def loss_scale_state(self, optimizer):
        """As PlainAccelerator's, of Colossal-AI's own loss scale, which forgets how long ago it changed."""
        if not self._scales:
            return {}
        scaler = self._loss_scale.grad_scaler
        return {"scale": scaler.scale.item()} | {name: getattr(scaler, name) for name in OF_LOSS_SCALE}

    def set_loss_scale_state(self, optimizer, saved):
        """As PlainAccelerator's."""
        scaler = self._loss_scale.grad_scaler
        scaler._scale = torch.full_like(scaler.scale, saved["scale"])
        for name in OF_LOSS_SCALE:
            setattr(scaler, name, saved.get(name, getattr(scaler, name)))


def _gemini_adam(optimizer):
    """Gemini's Adam in the place of torch's, with its groups and settings."""
    settings = ("params", "lr", "betas", "eps", "weight_decay")
    groups = [{name: group[name] for name in settings} for group in optimizer.param_groups]
    return Adam(groups, adamw_mode=isinstance(optimizer, torch.optim.AdamW))


def _judges_before_it_trains(model, forward):
    """Gemini's forward pass, which with automatic placement cannot judge before it has measured a step."""

    def call(*args, **options):
        if torch.is_grad_enabled() or not model.gemini_manager.is_warmup():
            return forward(*args, **options)
        for chunk in model.chunk_manager.get_chunks(model.fp16_params):
            model.chunk_manager.access_chunk(chunk)
        output = model.module(*args, **options)
        model._post_forward()
        return output

    return call


def _quietly(function):
    def call():
        with contextlib.redirect_stdout(io.StringIO()):
            return function()

    return call


class Part(NamedTuple):
    """What this process holds of a parameter's master.

    numbers: fp32, in a row, perhaps none; begin: where they begin in the whole; key: by which the optimizer has their
    state, None where there are none; whole: whether every process has all of them.
    """

    numbers: torch.Tensor
    begin: int
    key: torch.Tensor | None
    whole: bool


class Parts:
    """States in parts that lie in a row, as common.parallel.state asks for them.

    Args:
        optimizer: as Booster returned it.
    """

    first_names = staticmethod(first_names)

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def rest(self, model):
        """Colossal-AI lets go of whole tensors by itself."""

    def whole_weights(self, model):
        """Yield (name, fp32 tensor on the CPU) of every parameter. Every process iterates."""
        for name, parameter in model.named_parameters():
            part = self.part(parameter)
            yield name, self._assemble(part.numbers, part, parameter.shape)

    @torch.no_grad()
    def set_whole_weights(self, model, weights):
        """Give a prepared model other weights. Args: weights: function of a name giving its whole tensor."""
        for name, parameter in model.named_parameters():
            whole, part = weights(name), self.part(parameter)
            part.numbers.copy_(whole.flatten()[part.begin : part.begin + len(part.numbers)])
            self.spread(parameter, whole)

    def whole_optimizer_state(self, optimizer, names):
        """The optimizer's state by name, with whole tensors. Every process calls it.

        Args:
            optimizer: Colossal-AI's; names: dict of parameters to names.
        Returns:
            dict: state (dict of names to dicts of tensors on the CPU and numbers), param_groups.
        """
        parts = {name: self.part(parameter) for parameter, name in names.items()}
        held = {name: self._state(part) for name, part in parts.items()}
        found = [None] * dist.get_world_size()
        mine = {n: {k: None if v.ndim else v.cpu() for k, v in values.items()} for n, values in held.items() if values}
        dist.all_gather_object(found, mine)
        layout, state = {name: values for other in found for name, values in other.items()}, {}
        for parameter, name in names.items():
            if name in layout:
                none = torch.empty(0, device=parts[name].numbers.device)
                state[name] = {
                    key: self._assemble(held[name].get(key, none), parts[name], parameter.shape)
                    if number is None
                    else number
                    for key, number in layout[name].items()
                }
        groups = [
            {
                **{key: value for key, value in group.items() if key != "params"},
                "params": [names[p] for p in parameters],
            }
            for group, parameters in zip(self.optimizer.param_groups, self.grouped(), strict=True)
        ]
        return {"state": state, "param_groups": groups}

    def set_whole_optimizer_state(self, optimizer, saved, names):
        """Take over what whole_optimizer_state returned, or the like of another strategy."""
        for parameter, name in names.items():
            part, values = self.part(parameter), saved["state"].get(name)
            if part.key is None or values is None:
                continue
            self.optimizer.optim.state[part.key] = {
                key: self._cut(value, part) if value.shape == parameter.shape and key != "step" else self.number(value)
                for key, value in ((key, torch.as_tensor(value)) for key, value in values.items())
            }
        for group, parameters in zip(self.optimizer.param_groups, self.grouped(), strict=True):
            group.update(saved_settings(saved, names[parameters[0]]))

    def held_state(self, optimizer):
        """The tensors of the optimizer's state that this process holds."""
        states = self.optimizer.optim.state.values()
        return [value for state in states for value in state.values() if torch.is_tensor(value)]

    def _state(self, part):
        values = {} if part.key is None else self.optimizer.optim.state.get(part.key, {})
        return {
            key: torch.as_tensor(value, dtype=None if torch.is_tensor(value) else torch.float32)
            for key, value in values.items()
        }

    def _cut(self, value, part):
        cut = torch.zeros_like(self.like(part))
        mine = value.flatten()[part.begin : part.begin + len(part.numbers)]
        cut[: len(mine)] = mine
        return cut

    def _assemble(self, numbers, part, shape):
        """A whole tensor out of what the processes hold of it, those of a state perhaps with a filled-up end."""
        if part.whole:
            return numbers.cpu().clone().view(shape)
        whole = torch.zeros(shape.numel(), device=get_accelerator().get_current_device())
        mine = numbers[: len(part.numbers)]
        whole[part.begin : part.begin + len(mine)] = mine
        dist.all_reduce(whole)  # of zeros, elsewhere
        return whole.view(shape).cpu()


class ZeroParts(Parts):
    """Of low-level ZeRO: equal parts of every parameter."""

    def part(self, parameter):
        """The Part of a parameter."""
        master = self.optimizer.working_to_master_param[id(parameter)]
        begin = dist.get_rank() * len(master)
        there = max(0, min(len(master), parameter.numel() - begin))
        return Part(master[:there], begin, master, whole=False)

    def like(self, part):
        """A tensor with the length and device of a state."""
        return part.key

    def number(self, value):
        """A number of a state, as the optimizer has it."""
        return value.clone()

    def spread(self, parameter, whole):
        """Give the model what its master has been given."""
        parameter.data.copy_(whole)

    def grouped(self):
        """The parameters of each group."""
        return list(self.optimizer._working_param_groups.values())

    def held_weights(self, model):
        """The parts of the weights that this process holds."""
        return [parameter.detach() for parameter in model.parameters()]


class GeminiParts(Parts):
    """Of Gemini: what of a parameter lies in this process's part of its chunk."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self._keys = {p: optimizer.id_to_fake_params.get(n) for n, p in optimizer.id_to_real_params.items()}

    def part(self, parameter):
        """As ZeroParts's."""
        chunk = self.optimizer.chunk_manager.get_chunk(parameter)
        place, payload = chunk.tensors_info[parameter], chunk.paired_chunk.payload
        first = 0 if chunk.keep_gathered else chunk.shard_begin
        begin, end = max(place.offset, first), min(place.end, first + len(payload))
        numbers = payload[begin - first : max(begin, end) - first]
        return Part(numbers, begin - place.offset, self._keys[parameter], chunk.keep_gathered)

    def like(self, part):
        """As ZeroParts's."""
        return part.numbers

    def number(self, value):
        """As ZeroParts's."""
        return value.item()

    def spread(self, parameter, whole):
        """As ZeroParts's."""
        chunk = self.optimizer.chunk_manager.get_chunk(parameter)
        chunk.payload.copy_(chunk.paired_chunk.payload)
        chunk.cpu_vis_flag = False  # what is pinned in the host's memory is old

    def grouped(self):
        """As ZeroParts's."""
        by_number = self.optimizer.id_to_real_params
        return [[by_number[number] for number in group["params"]] for group in self.optimizer.param_groups_backup]

    def held_weights(self, model):
        """As ZeroParts's: the masters, as what is in bf16 comes and goes."""
        return [self.part(parameter).numbers for parameter in model.parameters()]
