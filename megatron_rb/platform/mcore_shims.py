"""Lets unmodified megatron-core run where there is no CUDA: one rule, applied to a fixed list of its modules.

The rule: inside those modules the word "cuda" means the platform's device. `torch.cuda.synchronize()` becomes
`torch.<device>.synchronize()`, `tensor.cuda()` becomes `tensor.<device>()`, the literals "cuda" and
"torch.cuda.FloatTensor" become those of the device. This is done by replacing names and constants in the code objects
of these modules, so torch itself stays as it is for all other code in the process. On CUDA nothing is rewritten.
Everything is undone by `ShimHandle.undo`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch

from megatron_rb.platform import multi_tensor
from megatron_rb.platform.base import Platform
from megatron_rb.platform.group_step_adamw import GroupStepAdamW
from megatron_rb.platform.mcore_version import ON_THE_INDEX, found_version, version_fault
from megatron_rb.platform.planning_trees import PlanningTrees
from megatron_rb.platform.write_results import write_results

HANDLE_ATTRIBUTE = "_megatron_rb_shims"
"""The handle of the installed shims is kept on `megatron.core` itself: they belong to that module's state."""

DEVICE_MODULES = (
    "parallel_state",
    "timers",
    "utils",
    "tensor_parallel.cross_entropy",
    "tensor_parallel.data",
    "tensor_parallel.layers",
    "tensor_parallel.mappings",
    "tensor_parallel.random",
    "tensor_parallel.utils",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
    "distributed.distributed_data_parallel",
    "distributed.finalize_model_grads",
    "distributed.param_and_grad_buffer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.grad_scaler",
    "optimizer.optimizer",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.state_dict_saver",
    "transformer.module",
    "transformer.utils",
)
"""Modules of megatron.core on the training path that name CUDA."""

NEEDLESS_WARNINGS = (
    ("full scope is deprecated", r"megatron\.core"),
    ("Apex is not installed", r"megatron\.core"),
    (r"The \.grad attribute of a Tensor that is not a leaf", r"megatron\.core"),
    ("`load_state_dict` is deprecated", r"megatron\.core"),
    (r"`torch\.distributed\.\w+` is deprecated", r"torch\.distributed"),
)
"""Message and module, as regular expressions."""
NEEDLESS_LOG_LINES = (
    ("distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not provided"),
    ("dist_checkpointing.strategies.common", "load_common is deprecated"),
    ("dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
)
"""Module of megatron.core and how a line of its log begins, in releases from 0.17 on; no user can change anything."""
NEEDLESS_WITHOUT_CUDA = (
    (r"When using (sequence parallelism|tensor parallelism|async grad allreduce) it is recommended", r"megatron\.core"),
)

GROUP_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What tells the parameter groups of a checkpoint apart. From 0.19 on megatron-core asks for equal learning rates too,
which checkpoints of other releases lack and a resumed run may change."""


class ShimHandle:
    """Undo record of an installation."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self._undo: list[Callable[[], Any]] = []

    def set(self, owner: Any, attribute: str, value: Any) -> None:
        """Set an attribute that must already exist, and remember the old value."""
        if not hasattr(owner, attribute):
            raise _lacks(f"{owner.__name__}.{attribute}")
        old = getattr(owner, attribute)
        setattr(owner, attribute, value)
        self._undo.append(lambda: setattr(owner, attribute, old))

    def add_undo(self, undo: Callable[[], Any]) -> None:
        self._undo.append(undo)

    def undo(self) -> None:
        """Restore megatron-core. Functions that were to be compiled at its import stay uncompiled."""
        while self._undo:
            self._undo.pop()()


def install_mcore_shims(platform: Platform) -> ShimHandle:
    """Import megatron.core and adapt it to `platform`; a second call returns the first handle.

    Call it before anything imports megatron.core: what is compiled at import cannot be changed later.
    Raises:
        ValueError: there is no megatron-core, or one of a release that is not supported.
        RuntimeError: shims of another device are installed, or megatron-core lacks something that they adapt.
    """
    fault = version_fault()
    if fault:
        raise ValueError(fault)
    core = _import_core(plain=platform.device_type != "cuda")
    installed = getattr(core, HANDLE_ATTRIBUTE, None)
    if installed is not None:
        if installed.device_type != platform.device_type:
            raise RuntimeError(
                f"megatron-core is adapted to {installed.device_type} in this process; undo that before using it "
                f"on {platform.device_type}"
            )
        return installed
    handle = ShimHandle(platform.device_type)
    setattr(core, HANDLE_ATTRIBUTE, handle)
    handle.add_undo(lambda: delattr(core, HANDLE_ATTRIBUTE))
    try:
        _install_group_step_adamw(handle)
        _install_multi_tensor(handle)
        _install_group_identity(handle)
        _install_planning_trees(handle)
        _install_write_results(handle)
        _install_log_filters(handle, NEEDLESS_LOG_LINES)
        _install_warning_filters(handle, NEEDLESS_WARNINGS)
        if platform.device_type != "cuda":
            _install_device(handle, platform)
    except BaseException:
        handle.undo()
        raise
    return handle


def _lacks(name: str) -> RuntimeError:
    return RuntimeError(
        f"megatron-core {found_version()} has no {name}, which megatron-rb adapts; "
        f"run `pip install 'megatron-core=={ON_THE_INDEX}'`"
    )


def _import_core(plain: bool) -> types.ModuleType:
    """Import megatron.core quietly; `plain` leaves the functions it would compile at import as they are."""
    if not plain:
        with _without_import_warnings():
            return importlib.import_module("megatron.core")
    if "megatron.core" in sys.modules:
        if importlib.import_module("megatron.core.jit").jit_fuser is not _leave_plain:
            raise RuntimeError("megatron.core was imported before install_mcore_shims; call install_mcore_shims first")
        return sys.modules["megatron.core"]
    compile_function = torch.compile
    torch.compile = _leave_plain  # type: ignore[assignment]
    try:
        with _without_import_warnings():
            return importlib.import_module("megatron.core")
    finally:
        torch.compile = compile_function


def _leave_plain(function: Callable | None = None, **options: Any) -> Callable:
    """Stands in for torch.compile: returns the function itself."""
    return _leave_plain if function is None else function


@contextlib.contextmanager
def _without_import_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        yield


def _install_warning_filters(handle: ShimHandle, needless: tuple[tuple[str, str], ...]) -> None:
    """Drop the warnings that megatron-core raises in normal use and that a user can do nothing about."""
    for message, module in needless:
        warnings.filterwarnings("ignore", message=message, module=module)
        handle.add_undo(partial(_remove_warning_filter, warnings.filters[0]))


def _remove_warning_filter(entry: tuple) -> None:
    filters = cast(list, warnings.filters)
    if entry in filters:
        filters.remove(entry)


def _install_group_step_adamw(handle: ShimHandle) -> None:
    """Where there is no fused Adam, let megatron-core take GroupStepAdamW for one."""
    optimizers = importlib.import_module("megatron.core.optimizer")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    if distributed.HAVE_APEX_OR_TE:
        return
    handle.set(optimizers, "Adam", GroupStepAdamW)
    handle.set(optimizers, "USING_PYTORCH_OPTIMIZER", False)
    handle.set(distributed, "Adam", GroupStepAdamW)
    handle.set(distributed, "HAVE_APEX_OR_TE", True)
    handle.set(distributed, "USING_APEX_OPTIMIZER", True)


def _install_multi_tensor(handle: ShimHandle) -> None:
    """Exchange megatron-core's own functions on lists of tensors, which are there where no library brings others."""
    clipping = importlib.import_module("megatron.core.optimizer.clip_grads")
    utils = importlib.import_module("megatron.core.utils")
    for name, own, better in (
        ("l2_norm_impl", utils.local_multi_tensor_l2_norm, multi_tensor.l2_norm),
        ("multi_tensor_scale_impl", utils.local_multi_tensor_scale, multi_tensor.scale),
    ):
        if getattr(clipping, name) is own:
            handle.set(clipping, name, better)


def _install_group_identity(handle: ShimHandle) -> None:
    for name in ("optimizer", "distrib_optimizer"):
        module = importlib.import_module(f"megatron.core.optimizer.{name}")
        handle.set(module, "param_group_identifier_keys", GROUP_IDENTITY)


def _install_planning_trees(handle: ShimHandle) -> None:
    """Rank 0 would hold a connection to every rank after the first checkpoint."""
    saver = importlib.import_module("megatron.core.dist_checkpointing.strategies.state_dict_saver")
    handle.set(saver, "_DistWrapper", PlanningTrees)


def _install_write_results(handle: ShimHandle) -> None:
    """Every rank would start an interpreter at its first save, for one small message per checkpoint."""
    writers = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    names = ("_get_write_results_queue", "get_write_results_queue")  # the second from 0.17 on
    handle.set(writers, next((name for name in names if hasattr(writers, name)), names[0]), write_results)


def _install_log_filters(handle: ShimHandle, needless: tuple[tuple[str, str], ...]) -> None:
    for module, beginning in needless:
        logger = logging.getLogger(f"megatron.core.{module}")
        log_filter = partial(_says_more_than, beginning)
        logger.addFilter(log_filter)
        handle.add_undo(partial(logger.removeFilter, log_filter))


def _says_more_than(beginning: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(beginning)


def _install_device(handle: ShimHandle, platform: Platform) -> None:
    facade = _TorchFacade(platform)
    for name in DEVICE_MODULES:
        try:
            module = importlib.import_module(f"megatron.core.{name}")
        except ModuleNotFoundError as error:
            raise _lacks(f"megatron.core.{name}") from error
        for function in _functions_of(module):
            _rewrite_function(handle, function, platform.device_type)
        for function in _autocast_wrappers_of(module):
            _bind_autocast(handle, function, platform.device_type)
        if isinstance(module.__dict__.get("torch"), types.ModuleType):
            handle.set(module, "torch", facade)
    _install_warning_filters(handle, NEEDLESS_WITHOUT_CUDA)
    _install_rng(handle, platform)
    _install_type_tuples(handle)


def _install_rng(handle: ShimHandle, platform: Platform) -> None:
    """megatron-core reaches for the generators of torch.cuda by index; the platform knows its own."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")

    def get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return platform.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        platform.set_rng_state(new_state)

    handle.set(random, "_get_cuda_rng_state", get_rng_state)
    handle.set(random, "_set_cuda_rng_state", set_rng_state)
    if platform.device_type == "cpu":
        # Host and device share one generator here, so the tracker's warning about it would come with every fork.
        _install_log_filters(handle, (("tensor_parallel.random", "CPU RNG state changed"),))


def _install_type_tuples(handle: ShimHandle) -> None:
    """Float16Module casts by tensor type; the legacy type classes know only CPU and CUDA."""
    module = importlib.import_module("megatron.core.transformer.module")
    handle.set(module, "_FLOAT_TYPES", (_tensors_of(torch.float32),))
    handle.set(module, "_HALF_TYPES", (_tensors_of(torch.float16),))
    handle.set(module, "_BF16_TYPES", (_tensors_of(torch.bfloat16),))


def _tensors_of(dtype: torch.dtype) -> type:
    """A class whose instances are, for isinstance, the tensors of `dtype` on any device."""

    class OfDtype(type):
        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, torch.Tensor) and value.dtype is dtype

    return OfDtype(f"TensorsOf_{dtype}", (), {})


class _TorchFacade:
    """`torch` as the rewritten modules see it: `torch.<device type>` answers from the platform first."""

    def __init__(self, platform: Platform) -> None:
        setattr(self, platform.device_type, _RuntimeFacade(platform))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _RuntimeFacade:
    """The part of torch.cuda that megatron-core uses, answered by a platform, the rest by `torch.<device type>`."""

    def __init__(self, platform: Platform) -> None:
        self._device_type = platform.device_type
        self.current_device = platform.current_device
        self.device_count = platform.device_count
        self.set_device = platform.set_device
        self.synchronize = lambda device=None: platform.synchronize()
        self.manual_seed = platform.seed
        self.get_rng_state = lambda device=None: platform.get_rng_state()
        self.set_rng_state = lambda state, device=None: platform.set_rng_state(state)
        self.empty_cache = platform.empty_cache

    def is_available(self) -> bool:
        """False: megatron-core asks this to learn whether it may use CUDA events and libraries."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(torch, self._device_type), name)


def _functions_of(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """All functions whose source is the module's file: top level, methods, and what decorators wrap."""
    seen: set[int] = set()
    pending: list[Any] = list(vars(module).values())
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, staticmethod | classmethod):
            pending.append(item.__func__)
        elif isinstance(item, property):
            pending += [item.fget, item.fset, item.fdel]
        elif isinstance(item, type) and item.__module__ == module.__name__:
            pending += vars(item).values()
        elif isinstance(item, types.FunctionType):
            pending.append(getattr(item, "__wrapped__", None))
            if item.__code__.co_filename == module.__file__:
                yield item


def _autocast_wrappers_of(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """What torch.amp.custom_fwd and custom_bwd made of the forward and backward methods of the module's functions."""
    for owner in vars(module).values():
        if isinstance(owner, type) and owner.__module__ == module.__name__:
            for member in vars(owner).values():
                function = member.__func__ if isinstance(member, staticmethod) else member
                if isinstance(function, types.FunctionType) and "device_type" in function.__code__.co_freevars:
                    yield function


def _bind_autocast(handle: ShimHandle, function: types.FunctionType, device_type: str) -> None:
    """The wrapper keeps the device type it was made with at import; without this one, the backward pass of a region
    under autocast meets gradients in another type than its weights."""
    assert function.__closure__ is not None
    cell = function.__closure__[function.__code__.co_freevars.index("device_type")]
    if cell.cell_contents == "cuda":
        cell.cell_contents = device_type
        handle.add_undo(lambda: setattr(cell, "cell_contents", "cuda"))


def _rewrite_function(handle: ShimHandle, function: types.FunctionType, device_type: str) -> None:
    old_code, old_defaults, old_kwdefaults = function.__code__, function.__defaults__, function.__kwdefaults__
    code = _rewrite_code(old_code, device_type)
    if code is not old_code:
        function.__code__ = code
        handle.add_undo(lambda: setattr(function, "__code__", old_code))
    if old_defaults and "cuda" in [value for value in old_defaults if isinstance(value, str)]:
        function.__defaults__ = tuple(_rewrite_constant(value, device_type) for value in old_defaults)
        handle.add_undo(lambda: setattr(function, "__defaults__", old_defaults))
    if old_kwdefaults and "cuda" in [value for value in old_kwdefaults.values() if isinstance(value, str)]:
        function.__kwdefaults__ = {key: _rewrite_constant(value, device_type) for key, value in old_kwdefaults.items()}
        handle.add_undo(lambda: setattr(function, "__kwdefaults__", old_kwdefaults))


def _rewrite_code(code: types.CodeType, device_type: str) -> types.CodeType:
    """The same code with `cuda` as a name or device literal replaced; the identical object when there is none."""
    names = tuple(device_type if name == "cuda" else name for name in code.co_names)
    constants = tuple(_rewrite_constant(constant, device_type) for constant in code.co_consts)
    unchanged = all(new is old for new, old in zip(constants, code.co_consts, strict=True))
    if unchanged and names == code.co_names:
        return code
    return code.replace(co_names=names, co_consts=constants)


def _rewrite_constant(constant: Any, device_type: str) -> Any:
    if isinstance(constant, types.CodeType):
        return _rewrite_code(constant, device_type)
    if isinstance(constant, tuple):
        items = tuple(_rewrite_constant(item, device_type) for item in constant)
        return constant if all(new is old for new, old in zip(items, constant, strict=True)) else items
    if constant == "cuda" and isinstance(constant, str):
        return device_type
    if isinstance(constant, str) and constant.startswith("torch.cuda.") and constant.endswith("Tensor"):
        package = "torch" if device_type == "cpu" else f"torch.{device_type}"
        return package + constant.removeprefix("torch.cuda")
    return constant
