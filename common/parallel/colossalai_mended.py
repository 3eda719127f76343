"""Colossal-AI 0.5.0 as it is used here: imported without the packages that it imports in vain, and mended.

What is mended, and why: see docs/upstream_issues.md.
"""

import contextlib
import sys
import types
import warnings

import torch
from torch.utils._pytree import tree_map_only

warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)
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
    from colossalai.booster.plugin import gemini_plugin
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
