"""From the spool to MLflow, group by group; what is sent twice after a crash is one group."""

from collections import deque
from threading import Event
from typing import Any

from trainers.tracking.downsampling import NOTE, Sampler
from trainers.tracking.mlflow_store import MlflowStore, is_final
from trainers.tracking.operation_log import Spool, batches


class Sender:
    """Sends a spool in its order. After an error it goes on with the operation that failed."""

    def __init__(self, spool: Spool, store: MlflowStore) -> None:
        self._spool, self._store = spool, store
        self._sampler = Sampler()
        self._noted: set[str] = set()
        self._group: deque[dict[str, Any]] = deque()
        self._end = spool.sent
        store.made = self._made

    def _made(self, key: str, run_id: str) -> None:
        """Keep MLflow's name for a run: should it have made two of them, this is the one."""
        self._spool.append({"do": "made", "key": key, "id": run_id})

    def remember(self, operation: dict[str, Any], sent: bool) -> None:
        """Take note of an operation in the spool, and of whether MLflow has been told of it."""
        if operation["do"] == "start":
            self._store.identities[operation["key"]] = operation["id"]
        elif operation["do"] == "made":
            self._store.run_ids[operation["key"]] = operation["id"]
        elif sent and operation["do"] == "log":
            self._sampler.take(operation["run"], [tuple(row) for row in operation["rows"]])

    def send(self, closed: Event) -> None:
        """Send all there is, or up to the group in which `closed` is set; raises as MLflow does."""
        while not closed.is_set():
            if not self._group:
                operations, self._end = next(batches(self._spool.read(self._end)), ([], self._end))
                self._group.extend(self._sampled(operations))
                if not operations:
                    return
            while self._group:
                self._say(self._group[0])
                self._group.popleft()
            self._spool.commit(self._end)

    def send_rest(self) -> None:
        """Send the newest points of very long series, too."""
        for run in self._sampler.runs:
            for operation in self._rest(run):
                self._say(operation)

    def _rest(self, run: str) -> list[dict[str, Any]]:
        rows = self._sampler.rest(run)
        return [{"do": "log", "run": run, "rows": rows}] if rows else []

    def _sampled(self, operations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The operations with what of their metrics is to be sent."""
        result = []
        for operation in operations:
            run = operation.get("run", "")
            if operation["do"] == "finish":
                result += self._rest(run)
            if operation["do"] != "log":
                result.append(operation)
                continue
            rows = self._sampler.take(run, [tuple(row) for row in operation["rows"]])
            if self._sampler.thinned(run) and run not in self._noted:
                self._noted.add(run)
                result.append({"do": "tag", "run": run, "tags": {"heliostat.sampled": NOTE}})
            if rows:
                result.append({**operation, "rows": rows})
        return result

    def _say(self, operation: dict[str, Any]) -> None:
        try:
            self._store.send(operation)
        except Exception as error:
            if not is_final(error):
                raise
            names = {row[0] for row in operation.get("rows", ())}
            if len(names) < 2:
                self._give_up(operation, error)
            for name in sorted(names) if len(names) > 1 else ():
                rows = [row for row in operation["rows"] if row[0] == name]
                self._say({**operation, "rows": rows})

    def _give_up(self, operation: dict[str, Any], error: Exception) -> None:
        """Trying again cannot help, and must not hold up what comes after; the run says so."""
        what = "".join(sorted({f" {row[0]}" for row in operation.get("rows", ())}))
        reason = str(error).splitlines()[0]
        print(f"tracking: {operation['do']}{what} dropped: {reason}", flush=True)
        run = operation.get("run", operation.get("key"))
        tags = {f"heliostat.refused.{operation['do']}": f"{what.strip()}: {reason}"[:4000]}
        try:
            self._store.send({"do": "tag", "run": run, "tags": tags})
        except Exception as again:
            if not is_final(again):
                raise
