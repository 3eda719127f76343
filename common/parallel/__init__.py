"""Turns the YAML in force into a working accelerator; the only folder that knows how processes talk to each other."""

from common.parallel.configs import launched_sharding
from common.parallel.launch import (
    check_flags,
    check_launch,
    check_micro_batches,
    check_optimizer,
    launched_data_ranks,
    launched_engine,
    launched_machines,
    launcher_started,
    refuse_delay,
    restarts,
)
from common.parallel.parts import load_shapes
from common.parallel.processes import (
    agree_max,
    data_rank,
    main_first,
    on_main,
    raise_together,
    seed_dropout,
    shut_down,
    start_tracker,
)
from common.parallel.strategies import (
    builder,
    check_cut,
    compiles,
    describe,
    limit_memory,
    loader,
    make_accelerator,
    set_accumulation,
    set_batch,
)

__all__ = [
    "agree_max",
    "builder",
    "check_flags",
    "check_launch",
    "check_micro_batches",
    "check_optimizer",
    "check_cut",
    "compiles",
    "data_rank",
    "describe",
    "launched_data_ranks",
    "launched_engine",
    "launched_machines",
    "launched_sharding",
    "launcher_started",
    "limit_memory",
    "load_shapes",
    "loader",
    "main_first",
    "make_accelerator",
    "on_main",
    "raise_together",
    "refuse_delay",
    "restarts",
    "seed_dropout",
    "set_accumulation",
    "set_batch",
    "shut_down",
    "start_tracker",
]
