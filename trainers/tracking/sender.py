"""From the spool to MLflow, group by group; what is sent twice after a crash is one group."""

from collections import deque
from threading import Event
from typing import Any

from trainers.tracking.downsampling import DOWNSAMPLING_NOTE, Downsampler
from trainers.tracking.mlflow_store import MlflowStore, is_permanent_error
from trainers.tracking.operation_log import OperationLog, group_operations


class Sender:
    """Sends a spool in its order. After an error it goes on with the operation that failed."""

    def __init__(self, spool: OperationLog, store: MlflowStore) -> None:
        self._log, self._store = spool, store
        self._downsampler = Downsampler()
        self._downsampling_noted: set[str] = set()
        self._group: deque[dict[str, Any]] = deque()
        self._end = spool.sent_offset
        store.on_run_created = self._on_run_created

    def _on_run_created(self, key: str, run_id: str) -> None:
        """Keep MLflow's name for a run: should it have made two of them, this is the one."""
        self._log.append({"do": "made", "key": key, "id": run_id})

    def observe(self, operation: dict[str, Any], sent: bool) -> None:
        """Take note of an operation in the spool, and of whether MLflow has been told of it."""
        if operation["do"] == "start":
            self._store.run_tags[operation["key"]] = operation["id"]
        elif operation["do"] == "made":
            self._store.run_ids[operation["key"]] = operation["id"]
        elif sent and operation["do"] == "log":
            self._downsampler.add(operation["run"], [tuple(row) for row in operation["rows"]])

    def send(self, closed: Event) -> None:
        """Send all there is, or up to the group in which `closed` is set; raises as MLflow does."""
        while not closed.is_set():
            if not self._group:
                operations, self._end = next(
                    group_operations(self._log.read(self._end)), ([], self._end)
                )
                self._group.extend(self._downsampled(operations))
                if not operations:
                    return
            while self._group:
                self._send_one(self._group[0])
                self._group.popleft()
            self._log.commit(self._end)

    def send_open_windows(self) -> None:
        """Send the newest points of very long series, too."""
        for run in self._downsampler.runs:
            for operation in self._open_windows(run):
                self._send_one(operation)

    def _open_windows(self, run: str) -> list[dict[str, Any]]:
        rows = self._downsampler.open_windows(run)
        return [{"do": "log", "run": run, "rows": rows}] if rows else []

    def _downsampled(self, operations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The operations with what of their metrics is to be sent."""
        result = []
        for operation in operations:
            run = operation.get("run", "")
            if operation["do"] == "finish":
                result += self._open_windows(run)
            if operation["do"] != "log":
                result.append(operation)
                continue
            rows = self._downsampler.add(run, [tuple(row) for row in operation["rows"]])
            if self._downsampler.is_downsampled(run) and run not in self._downsampling_noted:
                self._downsampling_noted.add(run)
                result.append(
                    {"do": "tag", "run": run, "tags": {"heliostat.sampled": DOWNSAMPLING_NOTE}}
                )
            if rows:
                result.append({**operation, "rows": rows})
        return result

    def _send_one(self, operation: dict[str, Any]) -> None:
        try:
            self._store.send(operation)
        except Exception as error:
            if not is_permanent_error(error):
                raise
            names = {row[0] for row in operation.get("rows", ())}
            if len(names) < 2:
                self._drop(operation, error)
            for name in sorted(names) if len(names) > 1 else ():
                rows = [row for row in operation["rows"] if row[0] == name]
                self._send_one({**operation, "rows": rows})

    def _drop(self, operation: dict[str, Any], error: Exception) -> None:
        """Trying again cannot help, and must not hold up what comes after; the run says so."""
        what = "".join(sorted({f" {row[0]}" for row in operation.get("rows", ())}))
        reason = str(error).splitlines()[0]
        print(f"tracking: {operation['do']}{what} dropped: {reason}", flush=True)
        run = operation.get("run", operation.get("key"))
        tags = {f"heliostat.refused.{operation['do']}": f"{what.strip()}: {reason}"[:4000]}
        try:
            self._store.send({"do": "tag", "run": run, "tags": tags})
        except Exception as again:
            if not is_permanent_error(again):
                raise
