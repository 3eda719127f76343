"""Colossal-AI: low-level ZeRO, whose optimizer is cut, and Gemini, whose chunks of parameters move between processes.

Its Booster does the work; here it follows the loop of every other strategy, and states go to whole tensors and back.
Parameters and gradients are in bf16 or fp16 where that is asked for, and the optimizer's fp32 copies, its masters, are
cut.
What is mended of Colossal-AI 0.5.0: colossalai_mended.py. States: colossalai_parts.py.
Sources: Rajbhandari et al. 2020 (arXiv:1910.02054); Fang et al. 2021 (arXiv:2108.05818, chunks).
"""

import contextlib
import dataclasses
import io
import math
from functools import partial

import torch
import torch.distributed as dist

from common.errors import UserError
from common.memory_settings import giving_back_memory
from common.parallel.colossalai_mended import Adam, stand_ins
from common.parallel.colossalai_parts import GeminiParts, ZeroParts
from common.parallel.draws import build_parts
from common.parallel.launch import check_optimizer
from common.parallel.parts import load_parts, replace, whole_numbers
from common.parallel.plain import PlainAccelerator
from common.parallel.tensors import follow

with stand_ins():
    from colossalai.accelerator import get_accelerator
    from colossalai.booster import Booster
    from colossalai.booster.plugin import GeminiPlugin, LowLevelZeroPlugin, TorchDDPPlugin
    from colossalai.legacy.utils import memory

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OF_LOSS_SCALE = ("_growth_step", "_hysteresis_step")  # beside the scale


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
