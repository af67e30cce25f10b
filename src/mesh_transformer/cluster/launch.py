"""One function on the workers of a Ray cluster, or of a local one that is started for it, through Ray Train.

Ray places the workers, joins their JAX processes, replaces workers that died and brings their output here. What is
computed and what is kept of it is the function's affair. The only module that imports ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from mesh_transformer.cluster.options import ClusterOptions, check_address, prepare_environment
from mesh_transformer.cluster.platforms import Platform, platform_of, worker_environment
from mesh_transformer.cluster.worker import Worker
from mesh_transformer.config.errors import ConfigError, MeshTransformerError, RunError, UserError

_OBJECT_STORE = 256 << 20  # bytes of shared memory; nothing but a configuration goes through it
_SECONDS_BETWEEN_LOOKS = 0.5
_STOP_TIMEOUT = 300.0  # seconds that the workers have to save when they are asked to stop
_SECONDS_TO_END = 20.0  # that the others have when one worker has refused what the user gave
_SECONDS_TO_VANISH = 5.0
_LOG_HANDLER = "ray_print_logs"  # the name of Ray's own handler of worker output
_WORKER = "worker "


def run_on_workers(function: Callable[[Worker], Any], options: ClusterOptions, note: Callable[[str], None]) -> Any:
    """Calls the function in every worker at once and gives what worker 0 returned; their output goes to stderr.

    JAX's processes are joined before. When a worker dies, hangs or raises, all are replaced and the function is called
    again. A UserError is not tried again. SIGINT and SIGTERM set `Worker.stop` in all workers; the function is then
    expected to return within five minutes, and a second signal ends the workers at once. Nothing is left running.

    Args:
        function: can be pickled, and so can what it returns.
        note: told in one line of failures.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers at the address.
        UserError: the function raised it in some worker.
        RunError: workers failed more often than allowed, or did not stop.
        KeyboardInterrupt: a second signal came.
    """
    _check_installed()
    if options.address is not None:
        check_address(options.address)
    prepare_environment(options)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(_Signals())
        # Not the user's temporary directory: Ray's sockets lie in it, whose paths must be short.
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="mt-ray-", dir="/tmp"))
        stack.enter_context(_cluster(options, scratch))
        signals.take()  # from Ray, which ends the process on SIGTERM
        with _loss_of_the_cluster():
            return _supervise(function, options, scratch, signals, note)


def _check_installed() -> None:
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "launch needs Ray, which is not installed\nto install it: pip install 'mesh-transformer[cluster]'"
        )


@contextlib.contextmanager
def _loss_of_the_cluster() -> Iterator[None]:
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise RunError(
            f"the connection with the Ray cluster was lost: {_first_line(error)}\n"
            "the same command goes on from the newest checkpoint"
        ) from error


@contextlib.contextmanager
def _cluster(options: ClusterOptions, scratch: str) -> Iterator[None]:
    """Connected to a cluster. A local one and all its processes end with the block, and so does the job on another."""
    import psutil  # Ray brings it along
    import ray
    from ray._private.ray_logging import global_worker_stdstream_dispatcher

    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": True}
    try:
        if options.address is not None:
            ray.init(address=options.address, **quiet)
        else:
            ray.init(
                address="local",
                num_cpus=options.workers,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE,
                _temp_dir=f"{scratch}/s",
                **quiet,
            )
    except (ConnectionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--address {options.address}: cannot be used as a Ray cluster: {reason}") from error
    try:
        global_worker_stdstream_dispatcher.remove_handler(_LOG_HANDLER)
        global_worker_stdstream_dispatcher.add_handler(_LOG_HANDLER, _print_output)
        yield
    finally:
        global_worker_stdstream_dispatcher.remove_handler(_LOG_HANDLER)
        ours = psutil.Process().children(recursive=True) if options.address is None else []
        ray.shutdown()
        # Workers see that the cluster is gone a little later, and not while they hang.
        _, alive = psutil.wait_procs(ours, timeout=_SECONDS_TO_VANISH)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=_SECONDS_TO_VANISH)


def _print_output(output: dict[str, Any]) -> None:
    """Shows what a worker printed; Ray's other actors talk of its inner affairs."""
    name = output.get("actor_name") or ""
    if name.startswith(_WORKER):
        for line in output.get("lines", []):
            print(f"{name}: {line}", file=sys.stderr, flush=True)


class _Signals:
    """Notes SIGINT and SIGTERM while active; a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.take()
        return self

    def take(self) -> None:
        """Takes the signals, again after another took them."""
        for number in self._before:
            signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number


class _Board:
    """Where the workers, Ray Train's controller and this process leave word for each other; lives in an actor."""

    def __init__(self) -> None:
        self._stop: int | None = None
        self._refusal: tuple[type[UserError], str] | None = None
        self._news: list[str] = []

    def ask_to_stop(self, number: int) -> None:
        self._stop = number

    def asked_to_stop(self) -> int | None:
        return self._stop

    def refuse(self, kind: type[UserError], message: str) -> None:
        self._refusal = self._refusal or (kind, message)

    def tell(self, news: str) -> None:
        self._news.append(news)

    def look(self) -> tuple[tuple[type[UserError], str] | None, list[str]]:
        """What was refused, and the news since the last look."""
        news, self._news = self._news, []
        return self._refusal, news


def _supervise(
    function: Callable[[Worker], Any],
    options: ClusterOptions,
    scratch: str,
    signals: _Signals,
    note: Callable[[str], None],
) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(num_cpus=0)(_Board).options(scheduling_strategy=here).remote()
    training = _Training(lambda: _trainer(function, options, scratch, board).fit().return_value)
    asked_at: float | None = None
    refused_at: float | None = None
    while True:
        training.join(_SECONDS_BETWEEN_LOOKS)
        refusal, news = ray.get(board.look.remote())
        for line in news:
            note(line)
        now = time.monotonic()
        if refusal is not None:
            refused_at = refused_at or now
            if not training.is_alive() or now - refused_at > _SECONDS_TO_END:
                kind, message = refusal
                raise kind(message)
        if not training.is_alive():
            return training.result(options)
        if signals.number is not None and asked_at is None:
            asked_at = now
            note(f"signal {signals.number}: the workers save and stop; a second signal ends them at once")
            ray.get(board.ask_to_stop.remote(signals.number))
        if asked_at is not None and now - asked_at > _STOP_TIMEOUT:
            raise RunError(
                f"the workers did not stop within {_STOP_TIMEOUT:.0f} s and were ended\n"
                "the same command goes on from the newest checkpoint"
            )


class _Training(threading.Thread):
    """Ray Train's `fit` on a thread of its own: on the main thread it would take over SIGINT."""

    def __init__(self, fit: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._fit = fit
        self._value: Any = None
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._fit()
        except Exception as error:  # raised again by `result`
            self._error = error

    def result(self, options: ClusterOptions) -> Any:
        """What worker 0 returned. Raises RunError: the workers failed for good."""
        if self._error is None:
            return self._value
        failures: dict[int, Exception] = getattr(self._error, "worker_failures", {})
        reason = _reasons(failures) or _first_line(getattr(self._error, "controller_failure", self._error))
        raise RunError(
            f"{reason}; --max-failures {options.max_failures} allows no further attempt\n"
            "the same command goes on from the newest checkpoint"
        ) from self._error


def _reasons(failures: dict[int, Exception]) -> str:
    return "; ".join(f"{_WORKER}{number}: {_reason(error)}" for number, error in sorted(failures.items()))


def _reason(error: Exception) -> str:
    import ray

    # The exception itself stands in an attribute of what Ray Train wraps it in.
    cause = getattr(error, "health_check_failure", None) or getattr(error, "_base_exc", None) or error
    if isinstance(cause, ray.exceptions.RayActorError):
        return "its process died"
    return f"{type(cause).__name__}: {_first_line(cause)}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _trainer(function: Callable[[Worker], Any], options: ClusterOptions, scratch: str, board: Any) -> Any:
    import ray
    from ray.train.v2.api.callback import UserCallback
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.jax import JaxTrainer

    class TellOfFailures(UserCallback):
        """In the controller: failures are news as soon as they are seen."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            ray.get(board.tell.remote(_reasons(worker_exceptions)))

    platform = platform_of(options, ray.cluster_resources(), ray.nodes())
    directory = os.getcwd()
    failures = options.max_failures
    return JaxTrainer(
        lambda: _work(function, board, directory),
        jax_config=_jax_config(platform, options.worker_timeout),
        scaling_config=ScalingConfig(**platform.scaling),
        run_config=RunConfig(
            name="launch",
            storage_path=f"{scratch}/storage",
            failure_config=FailureConfig(
                max_failures=failures, controller_failure_limit=failures, max_preemption_failures=failures
            ),
            callbacks=[TellOfFailures()],
            worker_runtime_env={"env_vars": worker_environment(platform, options, os.environ)},
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )


def _jax_config(platform: Platform, timeout: float) -> Any:
    """How Ray joins the JAX processes of its workers: its own way, except on CPU, which it has none for."""
    import ray
    from ray.train._internal.utils import get_address_and_port
    from ray.train.v2.jax import JaxConfig

    if platform.name != "cpu":
        return JaxConfig(use_gpu=platform.name == "gpu", use_tpu=platform.name == "tpu")
    own_backend: Any = JaxConfig().backend_cls

    class Backend(own_backend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            host, port = worker_group.execute_single(0, get_address_and_port)
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            count = len(worker_group)
            ray.get([worker_group.execute_single_async(i, _join, address, count, i, timeout) for i in range(count)])

        def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
            """The processes end: parting would have to wait for those that died."""

    @dataclasses.dataclass
    class CpuConfig(JaxConfig):
        @property
        def backend_cls(self) -> type:
            return Backend

    return CpuConfig()


def _join(address: str, count: int, number: int, timeout: float) -> None:
    """In a worker, before its function: meets the others. Process 0 listens on its node's own address alone."""
    _name_output(number)
    import jax

    jax.distributed.initialize(
        address,
        count,
        number,
        cluster_detection_method="deactivate",
        coordinator_bind_address=address,
        heartbeat_timeout_seconds=max(1, round(timeout)),
        initialization_timeout=max(1, round(timeout)),
    )


def _name_output(number: int) -> None:
    """Ray names what this process prints from now on after it."""
    for stream in (sys.stdout, sys.stderr):
        print(f":actor_name:{_WORKER}{number}", file=stream, flush=True)


def _work(function: Callable[[Worker], Any], board: Any, directory: str) -> Any:
    """In a worker: calls the function; what is the user's mistake is not tried again."""
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    from mesh_transformer.train.loop import StopRequest

    number = ray.train.get_context().get_world_rank()
    _name_output(number)
    if os.path.isdir(directory):  # where the command was given: what an index names may be relative to it
        os.chdir(directory)
    stop = StopRequest()
    threading.Thread(target=_listen, args=(board, stop), daemon=True).start()
    try:
        return function(Worker(number=number, stop=stop, from_first=broadcast_from_rank_zero))
    except UserError as error:
        ray.get(board.refuse.remote(type(error), str(error)))
        return None
    except MeshTransformerError:
        raise
    except Exception:
        traceback.print_exc()
        raise


def _listen(board: Any, stop: Any) -> None:
    import ray

    with contextlib.suppress(ray.exceptions.RayError):  # the cluster ends, and this worker with it
        while stop.signal is None:
            stop.signal = ray.get(board.asked_to_stop.remote())
            time.sleep(_SECONDS_BETWEEN_LOOKS)
