"""DeepSpeed's ZeRO: an accelerator that follows the command line, and whole states out of partitioned ones and back.

A partition is what one process holds of tensors laid end to end. Source: Rajbhandari et al. 2020 (arXiv:1910.02054).
"""

import contextlib
import io
import logging
import sys
import warnings

import deepspeed
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from common.errors import UserError
from common.memory import BUCKET
from common.parallel.extensions import build_extension
from common.parallel.launch import check_optimizer
from common.parallel.parts import fill_in_turn, load_parts
from common.parallel.plain import PlainAccelerator
from common.parallel.tensors import first_names as first_names  # one of the states
from common.parallel.tensors import follow, saved_settings

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
OF_LOSS_SCALE = ("cur_iter", "last_overflow_iter", "cur_hysteresis")  # beside the scale
warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")


class ZeroAccelerator(PlainAccelerator):
    """accelerate's DeepSpeed with the command line's batch, accumulation, clipping and precision.

    bf16 is torch's autocast over fp32 weights, as under every other strategy: DeepSpeed's own computes in weights of
    bf16, and its losses are rounded to them. An optimizer that is offloaded to the CPU is DeepSpeed's where the model
    is on a GPU, and torch's where all is on the CPU already.

    Args:
        launch: common.parallel.launch.Launch; settings: of accelerate.Accelerator.
    Raises:
        UserError: an extension that cannot be built.
    """

    def __init__(self, launch, **settings):
        self.states = sys.modules[__name__]
        self._precision = launch.precision
        plugin = DeepSpeedPlugin()
        config = plugin.deepspeed_config
        if not plugin.zero_stage:
            raise UserError(
                "the YAML's zero_stage 0 cuts nothing: give 1, 2 or 3, or choose accelerate_configs/ddp.yaml"
            )
        if unknown := {plugin.offload_optimizer_device, plugin.offload_param_device} - {"none", "cpu"}:
            raise UserError(f"the YAML offloads to {unknown.pop()}, which is not supported: give cpu or none")
        if plugin.zero3_init_flag:
            raise UserError("the YAML's zero3_init_flag is not supported: set it to false, models are built whole")
        if config.get("gradient_accumulation_steps") == 1:  # what accelerate puts where the YAML says nothing
            config["gradient_accumulation_steps"] = "auto"
        config["zero_optimization"].setdefault("reduce_bucket_size", BUCKET)
        handlers = []
        if launch.cpu:
            handlers = [InitProcessGroupKwargs(backend="gloo")]
            config["zero_force_ds_cpu_optimizer"] = False
        if launch.precision == "bf16":
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        mixed_precision = "fp16" if launch.precision == "fp16" else "no"
        offloaded = plugin.offload_optimizer_device != "none"
        if launch.cpu:
            build_extension("deepspeed_shm_comm")  # which DeepSpeed would build in the middle of its start
        elif offloaded:
            build_extension("cpu_adam")
        with contextlib.redirect_stdout(io.StringIO()):  # every process would say that its extension was loaded
            Accelerator.__init__(  # without what data parallelism asks for
                self, mixed_precision=mixed_precision, deepspeed_plugin=plugin, kwargs_handlers=handlers, **settings
            )
        plugin.dschf = None  # by which transformers would cut whatever model it loads, on one process alone, too

    @property
    def mixed_precision(self):
        """The precision of matrix products: "bf16", "fp16" or "no"."""
        return self._precision

    def describe_strategy(self):
        """Stage and what is offloaded, for people."""
        plugin = self.deepspeed_plugin
        devices = {"optimizer": plugin.offload_optimizer_device, "parameters": plugin.offload_param_device}
        offloaded = [f"{what} on {device}" for what, device in devices.items() if device not in (None, "none")]
        return f"DeepSpeed ZeRO-{plugin.zero_stage}" + (f" ({', '.join(offloaded)})" if offloaded else "")

    def follow_command_line(self, per_device, accumulation, max_grad_norm):
        """As PlainAccelerator's; it goes into DeepSpeed's configuration.

        Raises:
            UserError: the YAML says something else.
        """
        super().follow_command_line(per_device, accumulation, max_grad_norm)
        config = self.deepspeed_plugin.deepspeed_config
        wanted = {
            "train_micro_batch_size_per_gpu": (per_device, "--per_device_train_batch_size"),
            "gradient_accumulation_steps": (accumulation, "the accumulation that follows from --train_batch_size"),
            "gradient_clipping": (float(max_grad_norm), "--max_grad_norm"),
        }
        for key, (value, flag) in wanted.items():
            if config.get(key, "auto") not in ("auto", value):
                raise UserError(f"the YAML's {key} {config[key]} contradicts {flag}, {value}: remove it from the YAML")
            config[key] = value

    def set_accumulation(self, accumulation):
        """As PlainAccelerator's; DeepSpeed divides the losses."""
        super().set_accumulation(accumulation)
        if self.deepspeed_engine_wrapped:
            engine = self.deepspeed_engine_wrapped.engine
            engine.set_train_batch_size(accumulation * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)

    def load_pretrained(self, auto_class, name, **options):
        """As PlainAccelerator's; under stage 3 prepare() reads a matrix at a time, where the files let it."""
        if self.deepspeed_plugin.zero_stage < 3 or self._precision == "fp16":  # its fp32 copies are cut from the whole
            return super().load_pretrained(auto_class, name, **options)
        return load_parts(self, auto_class, name, **options)

    def loss_scale_state(self, optimizer):
        """As PlainAccelerator's, of DeepSpeed's own loss scale."""
        scaler = optimizer.optimizer.loss_scaler
        if not scaler.dynamic:
            return {}
        return {"scale": scaler.cur_scale} | {name: getattr(scaler, name) for name in OF_LOSS_SCALE}

    def set_loss_scale_state(self, optimizer, saved):
        """As PlainAccelerator's."""
        scaler = optimizer.optimizer.loss_scaler
        scaler.cur_scale = saved["scale"]
        for name in OF_LOSS_SCALE:
            setattr(scaler, name, saved.get(name, getattr(scaler, name)))

    def prepare(self, *objects, **options):
        """As accelerate's; a model without an optimizer is only to be judged, and stays whole."""
        optimizers = [thing for thing in objects if isinstance(thing, torch.optim.Optimizer)]
        for optimizer in optimizers:
            check_optimizer("deepspeed", optimizer)
        if not optimizers:
            (model,) = objects
            if self._precision == "bf16":
                model.forward = torch.autocast(self.device.type, torch.bfloat16)(model.forward)
            return model.to(self.device)
        (model,) = (thing for thing in objects if isinstance(thing, torch.nn.Module))
        if hasattr(model, "places"):
            before = {parameter: name for name, parameter in model.named_parameters()}
            fill_in_turn(model, self._partition)
            for optimizer in optimizers:
                follow(optimizer, before, model)
        model, *_ = prepared = super().prepare(*objects, **options)
        model.optimizer.loss_scaler.raise_error_at_min_scale = False  # when fp16 is hopeless, the loop says
        return prepared

    def _partition(self, module):
        """Cut a module's parameters as stage 3 would cut those of a whole model."""
        settings = self.deepspeed_plugin.deepspeed_config["zero_optimization"]
        known = {key: value for key, value in settings.items() if value != "auto"}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": known}
        deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=torch.float32)


def rest(model):
    """DeepSpeed lets go of whole tensors by itself."""


def whole_weights(model):
    """Yield (name, tensor on the CPU) of every parameter. Every process iterates.

    Args:
        model: a module that DeepSpeed has prepared.
    """
    for name, parameter in model.named_parameters():
        cut = hasattr(parameter, "ds_id")  # under stage 3
        with deepspeed.zero.GatheredParameters([parameter]) if cut else contextlib.nullcontext():
            yield name, parameter.detach().cpu().clone()


def set_whole_weights(model, weights):
    """Give a prepared model other weights, and the optimizer's fp32 copies with them. Every process calls it.

    Args:
        weights: function of a name giving its whole tensor.
    """
    for name, parameter in model.named_parameters():
        whole = weights(name)
        if hasattr(parameter, "ds_id"):
            part = _part(parameter, whole)
            parameter.ds_tensor.data.copy_(part)
            safe_set_local_fp32_param(parameter, part)
            if parameter.data.numel():  # a small one, which stays whole everywhere
                parameter.data.copy_(whole)
        else:
            parameter.data.copy_(whole)
            safe_set_full_fp32_param(parameter, whole.to(parameter.device))


def whole_optimizer_state(optimizer, names):
    """The optimizer's state by name, with whole tensors. Every process calls it.

    Args:
        optimizer: DeepSpeed's; names: dict of parameters to names.
    Returns:
        dict: state (dict of names to dicts of tensors on the CPU and numbers), param_groups (their `params` names).
    """
    state = {}
    _link(optimizer)
    for _, flat, parameters in _groups(optimizer):
        values = optimizer.optimizer.state.get(flat, {})
        for parameter in parameters:
            state[names[parameter]] = {
                key: safe_get_full_optimizer_state(parameter, key).view(_shape(parameter)).cpu()
                if _is_cut(value, flat)
                else _copy(value)  # each its own number of steps, which a plain optimizer counts up by itself
                for key, value in values.items()
            }
    groups = [
        {**{key: value for key, value in group.items() if key != "params"}, "params": [names[p] for p in parameters]}
        for group, parameters in zip(optimizer.optimizer.param_groups, _grouped(optimizer), strict=True)
    ]
    return {"state": {name: values for name, values in state.items() if values}, "param_groups": groups}


def set_whole_optimizer_state(optimizer, saved, names):
    """Take over what whole_optimizer_state returned, or the like of another strategy. Every process calls it."""
    for _, flat, parameters in _groups(optimizer):
        first = saved["state"].get(names[parameters[0]])
        if first is None:  # before the first step
            continue
        shape = _shape(parameters[0])
        optimizer.optimizer.state[flat] = {
            key: torch.zeros_like(flat.data) if _is_whole(value, shape, key) else _copy(value)
            for key, value in first.items()
        }
    _link(optimizer)
    for _, flat, parameters in _groups(optimizer):
        for parameter in parameters:
            for key, value in saved["state"].get(names[parameter], {}).items():
                if not _is_whole(value, _shape(parameter), key):
                    continue
                if hasattr(parameter, "ds_id"):
                    safe_set_local_optimizer_state(parameter, _part(parameter, value), key)
                else:
                    safe_set_full_optimizer_state(parameter, value.to(flat.device), key)
    for group, parameters in zip(optimizer.optimizer.param_groups, _grouped(optimizer), strict=True):
        group.update(saved_settings(saved, names[parameters[0]]))


def held_weights(model):
    """The parts of the weights that this process holds."""
    return [getattr(parameter, "ds_tensor", parameter).detach() for parameter in model.parameters()]


def held_state(optimizer):
    """The tensors of the optimizer's state that this process holds."""
    states = optimizer.optimizer.state.values()
    return [value for state in states for value in state.values() if torch.is_tensor(value)]


def _groups(optimizer):
    """(number of the parameter group, flat partition, parameters in it) of each piece that DeepSpeed steps at once."""
    if hasattr(optimizer, "bit16_groups"):  # stages 1 and 2
        flats = optimizer.single_partition_of_fp32_groups
        return list(zip(range(len(flats)), flats, optimizer.bit16_groups, strict=True))
    numbers = (optimizer.sub_group_to_group_id[piece] for piece in range(len(optimizer.fp16_groups)))
    return list(zip(numbers, optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True))


def _link(optimizer):
    """Let parameters of stages 1 and 2 find their state: DeepSpeed does so after the first group's step alone."""
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _grouped(optimizer):
    """The parameters of each parameter group."""
    groups = [[] for _ in optimizer.optimizer.param_groups]
    for number, _, parameters in _groups(optimizer):
        groups[number] += parameters
    return groups


def _shape(parameter):
    return getattr(parameter, "ds_shape", parameter.shape)


def _part(parameter, whole):
    """This process's part of a tensor that stage 3 cuts, the last one filled up with zeros."""
    size = parameter.ds_tensor.numel()
    begin = size * torch.distributed.get_rank(parameter.ds_process_group)
    part = torch.zeros(size, dtype=parameter.ds_tensor.dtype)
    mine = whole.flatten()[begin : begin + size]
    part[: len(mine)] = mine
    return part.to(parameter.ds_tensor.device)


def _is_cut(value, flat):
    return torch.is_tensor(value) and value.shape == flat.shape


def _is_whole(value, shape, key):
    return torch.is_tensor(value) and value.shape == shape and key != "step"


def _copy(value):
    return value.clone() if torch.is_tensor(value) else value
