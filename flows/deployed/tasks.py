"""Steps of a run as Prefect task runs: their names, tags, retries, timeouts and limits.

Prefect caches nothing: its default key holds the run id, and what is finished is decided by the stores. Results are small
records that stay in the flow run's process; weights never travel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

from prefect import get_client, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import ConcurrencyLeaseHolder, FlowRunPolicy, State, TaskRun
from prefect.concurrency.sync import concurrency
from prefect.runtime import flow_run
from prefect.states import Cancelled as CancelledState
from prefect.tasks import Task, exponential_backoff

from flows.deployed.artifacts import show_plan
from flows.deployed.reporting import FlowReporter
from flows.run import INGEST, Conductor, is_wrong_input
from pipeline.engine import Cancelled
from pipeline.job import Job
from storage.errors import SourceError, StoreBusyError, StoreError

_WARNING = "Timeouts in worker threads cannot interrupt"
logging.getLogger("prefect.task_runs").addFilter(  # said of every task in a thread; these wait in turns, and can be
    lambda record: _WARNING not in record.getMessage()
)
logging.getLogger("prefect._internal.concurrency").addFilter(  # a turn that was waited for in vain is no error
    lambda record: "ConcurrencySlotAcquisition" not in record.getMessage()
)
TAG = "channel-merging"
DOWNLOAD = "download"
"""Held while an expert is fetched: ``prefect gcl create download --limit 4`` lets four be, over all runs."""
TURN_S = 5.0
"""How long a download waits for its turn before it asks whether its run goes on. By a tag Prefect would not ask."""
CLUSTER_LIMIT = "merge-cluster"
"""Held by a run while it computes: ``prefect gcl create merge-cluster --limit 1`` lets one run at a time have the cluster."""
LEASE_S = 60.0
"""How long a run that was killed, and so could not give back the cluster, seems to hold it. A run at work renews its lease."""
RETRIES = 3
BACK_OFF_S = 5
"""Before the second attempt of a task, then doubled. Clients of stores and of the Hub have retried before."""
HOUR = 3600.0
TIMEOUTS = {"resolve": HOUR, "plan": HOUR, "queries": 12 * HOUR, "router": 12 * HOUR, "report": HOUR, "publish": 6 * HOUR}
LONGEST = 48 * HOUR
"""Stages that wait for each other's waves may take as long as all of them together."""
PASSING = (SourceError, StoreError, StoreBusyError)
"""What a task may meet once and not twice. A cluster that is lost is lost for all stages: the flow run is retried."""
ONCE = ("similarity", "merge", "pack")
"""Their blocks are retried on other workers; after that the flow run is."""

Result = TypeVar("Result")


def may_pass(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a task that failed may do better the next time."""
    try:
        state.result()
    except PASSING:
        return True
    except Exception:  # a wrong recipe stays wrong
        return False
    return False


def last_word(error: BaseException) -> None:
    """Let a flow run end here when its input is wrong: no retry makes it right."""
    if is_wrong_input(error) and flow_run.id:
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, empirical_policy=FlowRunPolicy(retries=0, retry_delay=0))


def _holding(limit: str, timeout_seconds: float | None = None) -> AbstractContextManager[None]:
    """A slot of a limit, held in the name of the flow run."""
    holder = ConcurrencyLeaseHolder(type="flow_run", id=flow_run.id) if flow_run.id else None
    return concurrency(limit, occupy=1, timeout_seconds=timeout_seconds, lease_duration=LEASE_S, holder=holder)


class TaskConductor(Conductor):
    """Makes a task run of each step, and shows the plan."""

    def __init__(self, recipe: str, reporter: FlowReporter, timeouts: Mapping[str, float] = TIMEOUTS) -> None:
        self._recipe = recipe
        self._reporter = reporter
        self._timeouts = timeouts

    def step(self, name: str, body: Callable[[], Result], check: Callable[[], None] = lambda: None) -> Result:
        """Run a step as a task run of its name.

        Raises what the body raises, TimeoutError when it takes too long. A step that another one's failure ends is shown as
        cancelled.
        """

        def run_step() -> Any:  # without arguments: Prefect would walk through them and hash them
            try:
                with self.turn(name, check):
                    return body()
            except Cancelled:
                return CancelledState(message="given up: another step has failed, or the run was interrupted")

        made = task(
            name=name.partition(" ")[0],
            task_run_name=name,
            description=f"{name} of {self._recipe}",
            tags=[TAG],
            cache_policy=NO_CACHE,
            persist_result=False,
            retries=0 if name in ONCE else RETRIES,
            retry_delay_seconds=exponential_backoff(BACK_OFF_S),
            retry_jitter_factor=0.5,
            retry_condition_fn=may_pass,
            timeout_seconds=self._timeouts.get(name, LONGEST),
        )(run_step)
        state: State[Any] = made(return_state=True)
        if state.is_cancelled():
            raise Cancelled
        result: Result = state.result()
        return result

    @contextmanager
    def turn(self, name: str, check: Callable[[], None]) -> Iterator[None]:
        """Hold a slot if the step fetches an expert; what ``check`` raises ends the wait for one."""
        with ExitStack() as held:
            while name.startswith(INGEST):
                try:
                    held.enter_context(_holding(DOWNLOAD, timeout_seconds=TURN_S))
                    break
                except TimeoutError:
                    check()
            yield

    def cluster(self) -> AbstractContextManager[None]:
        return _holding(CLUSTER_LIMIT)

    def planned(self, job: Job) -> None:
        self._reporter.expected = show_plan(job)
        get_run_logger().info("%s: %d tensors of %d experts", job.recipe.name, len(job.plan.tensors), len(job.experts))
