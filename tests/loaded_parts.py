"""What a rank holds of a model, and what it took to have it there, as one line of JSON; see test_parts.py.

    python tests/loaded_parts.py folder [precision [source [class]]]

The model is the folder's, or, where source is `random`, one of its shape with random weights; class: of transformers'
auto classes, AutoModelForCausalLM where it is not given; what the folder lacks of it is random.
private: most bytes of private memory while the model was loaded, above what there was before; pages of mapped files,
which processes share, are not private, and what DeepSpeed's engine makes for itself afterwards does not count
held: bytes of the weights on this rank; whole: of all of them
equal: on the main process, whether the weights of all ranks together are what stock transformers loads, or draws from
the same random numbers, of which it leaves the next ones
"""

import json
import sys
import threading
from pathlib import Path

import torch
import transformers
from accelerate.utils import set_seed
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import parallel
from common.parallel.state import bytes_per_rank, consolidated_weights


class Watch(threading.Thread):
    """Looks at this process's private memory all the time. Attributes: most: bytes above the first look."""

    def __init__(self):
        super().__init__(daemon=True)
        self.first, self.most, self.done = self.look(), 0, threading.Event()
        self.start()

    @staticmethod
    def look():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    def run(self):
        while not self.done.wait(0.0005):
            self.most = max(self.most, self.look() - self.first)

    def end(self):
        self.done.set()
        self.join()

    def ending(self, function):
        """A function that looks no more when it is called."""

        def end_and_call(*args, **options):
            self.end()
            return function(*args, **options)

        return end_and_call


folder, precision, source, name = (*sys.argv[1:], *("no", "folder", "AutoModelForCausalLM")[len(sys.argv) - 2 :])
config, auto_class = AutoConfig.from_pretrained(folder), getattr(transformers, name)
_ = auto_class._model_mapping[type(config)]  # imported now: modules are private memory, too
accelerator = parallel.make_accelerator(precision)
watch = Watch()
if deepspeed := sys.modules.get("deepspeed"):
    deepspeed.initialize = watch.ending(deepspeed.initialize)
set_seed(0)
if source == "random":
    model = parallel.builder(accelerator)(lambda: auto_class.from_config(config, dtype=torch.float32))
else:
    model, _ = parallel.loader(accelerator)(auto_class, folder, dtype=torch.float32)
parallel.set_batch(accelerator, 1, 1, 1.0)
model, optimizer = accelerator.prepare(model.train(), torch.optim.AdamW(model.parameters()))
watch.end()
found = consolidated_weights(accelerator, model)
held, _ = bytes_per_rank(accelerator, model, optimizer)
drawn = torch.get_rng_state()
set_seed(0)
if source == "random":
    expected = auto_class.from_config(config, dtype=torch.float32)
else:
    expected = auto_class.from_pretrained(folder, dtype=torch.float32)
whole, said = 4 * expected.num_parameters(), {}
if accelerator.is_main_process:
    expected = expected.state_dict()
    equal = found.keys() == expected.keys() and all(found[key].equal(expected[key]) for key in found)
    said = {"equal": equal and drawn.equal(torch.get_rng_state())}
print(json.dumps({"private": watch.most, "held": held, "whole": whole, **said}))
parallel.shut_down(accelerator)
