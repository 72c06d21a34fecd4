"""What a program's time and memory went into: per op, per module, per kernel.

    with xc.profile(model) as profile:
        loss = model(batch)
        loss.backward()
    print(profile.table())
    profile.page("profile.html")          # a picture: modules over time, memory below
    profile.chrome_trace("trace.json")    # for chrome://tracing or ui.perfetto.dev

While no ``profile`` is open the engine pays nothing for it: opening one puts stopwatches around every op,
module and kernel, and closing it takes them off again.
"""

import json
import os
import threading
import weakref
from bisect import bisect_left
from collections import namedtuple
from time import perf_counter_ns

import numpy as np

from xuracore import jit, profile_page
from xuracore.autograd import recording
from xuracore.nn.module import Module
from xuracore.ops.registry import close_instrument, note, open_instrument

# kind: "forward", "backward", "module", "kernel" or "compile".  Times in ns from the start of the profile; path
# is that of the module at work; size is the bytes made by an op, saved those it keeps for its vjp.
Event = namedtuple("Event", "kind name start end thread path size saved", defaults=(0, 0))


class profile:
    """Context manager that records the ops, modules and kernels of all threads while it is open.

    model : names the modules by their paths in this one; without it by what calls them.
    ``events`` is the list of :class:`Event`; ``memory`` of (ns, bytes of the arrays made by ops and alive).
    """

    def __init__(self, model=None, name=None):
        self.name = name or ("profile" if model is None else type(model).__name__)
        self.events, self.memory, self.seconds = [], [], 0.0
        self._paths = {}
        if model is not None:
            self._paths = {id(m): f"{self.name}.{path}" if path else self.name for path, m in model.named_modules()}
        self._model, self._seen, self._stacks, self._alive, self._live = model, [], {}, {}, 0

    # ------------------------------------------------------------------ switching on and off
    def __enter__(self):
        self._start = perf_counter_ns()
        self._call, self._kernel = Module.__call__, {k: vars(jit.Kernel)[k] for k in ("__call__", "sized", "split")}
        Module.__call__ = self._timed_module(self._call)
        jit.Kernel.__call__ = self._timed_kernel(self._kernel["__call__"])
        for name in ("sized", "split"):
            setattr(jit.Kernel, name, self._chosen_kernel(self._kernel[name]))
        self._instrument = self._around_op
        open_instrument(self._instrument)
        return self

    def __exit__(self, *_):
        close_instrument(self._instrument)
        Module.__call__ = self._call
        for name, function in self._kernel.items():
            setattr(jit.Kernel, name, function)
        self.seconds = self._now() / 1e9
        self._alive, self._seen, self._model = {}, [], None

    def _now(self):
        return perf_counter_ns() - self._start

    def _stack(self):
        return self._stacks.setdefault(threading.get_ident(), [])

    def _path(self):
        stack = self._stacks.get(threading.get_ident())
        return stack[-1][0] if stack else ""

    # ------------------------------------------------------------------ ops
    def _around_op(self, record, forward, vjp):
        def timed_forward(*arrays, **attributes):
            start = self._now()
            output, saved = forward(*arrays, **attributes)
            end = self._now()
            outputs = output if record.outputs > 1 else (output,)
            known = {id(_owner(x)) for x in arrays if isinstance(x, np.ndarray)}
            size, kept = self._made(outputs, known), 0
            if recording():
                kept = sum(x.nbytes for x in _arrays(saved))
                size += self._made(_arrays(saved), known)
                saved = note(saved, path=self._path())
            self._add("forward", record.name, start, end, self._path(), size, kept)
            return output, saved

        def timed_vjp(grad, saved, needs):
            known = {id(_owner(x)) for x in _arrays((saved, grad))}
            start = self._now()
            found = vjp(grad, saved, needs)
            end = self._now()
            size = self._made(_arrays(tuple(found)), known)
            self._add("backward", record.name, start, end, getattr(saved, "path", ""), size)
            return found

        return timed_forward, timed_vjp

    def _add(self, kind, name, start, end, path, size=0, saved=0):
        self.events.append(Event(kind, name, start, end, threading.get_ident(), path, size, saved))

    def _made(self, arrays, known):
        """Bytes of the memory among ``arrays`` that was not there before; it is followed until it is freed."""
        made = 0
        for array in arrays:
            if isinstance(array, np.ndarray):
                owner = _owner(array)
                key = id(owner)
                if key not in known and key not in self._alive:
                    self._alive[key] = weakref.ref(owner, lambda _, key=key, size=owner.nbytes: self._freed(key, size))
                    made += owner.nbytes
        if made:
            self._live += made
            self.memory.append((self._now(), self._live))
        return made

    def _freed(self, key, size):
        if self._alive.pop(key, None) is not None:
            self._live -= size
            self.memory.append((self._now(), self._live))

    # ------------------------------------------------------------------ modules
    def _timed_module(self, call):
        def timed_call(module, *arguments, **keywords):
            stack = self._stack()
            path = self._paths.get(id(module)) or self._named(module, stack)
            stack.append((path, module))
            start = self._now()
            try:
                return call(module, *arguments, **keywords)
            finally:
                stack.pop()
                self._add("module", type(module).__name__, start, self._now(), path)

        return timed_call

    def _named(self, module, stack):
        """The path of a module, found below the one that is at work; else the name of its class."""
        self._seen.append(module)  # so that no other module gets its id
        path = type(module).__name__
        if stack:
            above, parent = stack[-1]
            inside = {id(m): p for p, m in parent.named_modules()}
            path = f"{above}.{inside.get(id(module)) or path}"
        self._paths[id(module)] = path
        return path

    # ------------------------------------------------------------------ kernels
    def _timed_kernel(self, call):
        def timed_call(kernel, *arguments):
            stack = self._stack()
            if stack and stack[-1][1] is kernel:  # the choice below has taken the time already
                return call(kernel, *arguments)
            path, compiled = self._path(), len(jit.FIRST_CALLS)
            stack.append((path, kernel))
            start = self._now()
            try:
                return call(kernel, *arguments)
            finally:
                stack.pop()
                end = self._now()
                kind = "kernel" if len(jit.FIRST_CALLS) == compiled else "compile"
                self._add(kind, kernel.__name__, start, end, path)

        return timed_call

    def _chosen_kernel(self, choose):
        def chosen(kernel, *work):
            call = choose(kernel, *work)
            stack = self._stacks.get(threading.get_ident())
            if stack and stack[-1][1] is kernel:
                return call
            timed = self._timed_kernel(lambda _, *arguments: call(*arguments))
            return lambda *arguments: timed(kernel, *arguments)

        return chosen

    # ------------------------------------------------------------------ results
    def by_op(self):
        """{op: {"calls", "vjps", "forward", "backward", "kernel" (ns), "allocated", "saved" (bytes)}}."""
        table = {}
        kernels = sorted((e.thread, e.start, e.end) for e in self.events if e.kind in ("kernel", "compile"))
        for event in self.events:
            if event.kind not in ("forward", "backward"):
                continue
            row = table.setdefault(event.name, dict.fromkeys(
                ("calls", "forward", "vjps", "backward", "allocated", "saved", "kernel"), 0
            ))
            row["calls" if event.kind == "forward" else "vjps"] += 1
            row[event.kind] += event.end - event.start
            row["allocated"] += event.size
            row["saved"] += event.saved
            row["kernel"] += _inside(kernels, event)
        return dict(sorted(table.items(), key=lambda item: -item[1]["forward"] - item[1]["backward"]))

    def by_module(self):
        """{path: (forward ns, backward ns)}, a module's time with all that is below it; in order of first use."""
        table = {}
        for event in self.events:
            if event.kind == "module":
                table.setdefault(event.path, [0, 0])[0] += event.end - event.start
        for event in self.events:
            if event.kind == "backward":
                path = event.path
                while path:
                    if path in table:
                        table[path][1] += event.end - event.start
                    path = path.rpartition(".")[0]
        first = {}
        for event in self.events:
            if event.kind == "module":
                first[event.path] = min(event.start, first.get(event.path, event.start))
        return {path: tuple(table[path]) for path in sorted(table, key=lambda p: (first[p], len(p)))}

    @property
    def peak(self):
        """Largest number of bytes alive in arrays that ops made."""
        return max((live for _, live in self.memory), default=0)

    def table(self, rows=None):
        """The ops as text, most expensive first; ``rows`` of them at most."""
        head = (
            "op", "calls", "forward ms", "mean µs", "vjps", "backward ms", "mean µs", "kernel", "made MB", "kept MB",
        )
        lines, shown = [], self.by_op()
        for name, row in list(shown.items())[:rows]:
            total = row["forward"] + row["backward"]
            cells = [name]
            for count, time in (("calls", "forward"), ("vjps", "backward")):
                mean = row[time] / max(1, row[count])
                cells += [f"{row[count]}", f"{row[time] / 1e6:.2f}", f"{mean / 1e3:.1f}"]
            cells += [f"{row['kernel'] / max(1, total):.0%}"]
            cells += [f"{row[size] / 1e6:.2f}" for size in ("allocated", "saved")]
            lines.append(cells)
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        text = [
            "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
            for line in [head, *lines]
        ]
        return "\n".join([*text, "", *self.summary()])

    def summary(self):
        """What no row shows, as lines of text."""
        ops = sum(row["forward"] + row["backward"] for row in self.by_op().values()) / 1e9
        kernels = sum(e.end - e.start for e in self.events if e.kind == "kernel") / 1e9
        built = [e for e in self.events if e.kind == "compile"]
        lines = [
            f"{self.seconds * 1e3:.1f} ms, of which {ops * 1e3:.1f} in ops and {kernels * 1e3:.1f} in kernels; "
            f"at most {self.peak / 1e6:.1f} MB alive in arrays that ops made"
        ]
        if built:
            taken = sum(e.end - e.start for e in built) / 1e9
            lines.append(f"{len(built)} kernels compiled or read from the cache in {taken * 1e3:.0f} ms: run it twice")
        return lines

    def chrome_trace(self, path):
        """Write the events as JSON for chrome://tracing and ui.perfetto.dev."""
        process, threads = os.getpid(), {}
        events = []
        for event in sorted(self.events, key=lambda e: e.start):
            thread = threads.setdefault(event.thread, len(threads))
            details = {"module": event.path}
            details |= {k: v for k, v in (("bytes made", event.size), ("bytes kept", event.saved)) if v}
            events.append({
                "name": event.path if event.kind == "module" else event.name, "cat": event.kind, "ph": "X",
                "ts": event.start / 1e3, "dur": (event.end - event.start) / 1e3, "pid": process, "tid": thread,
                "args": details,
            })  # fmt: skip
        events += [
            {"name": "arrays", "ph": "C", "ts": t / 1e3, "pid": process, "args": {"bytes": live}}
            for t, live in self.memory
        ]
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)

    def svg(self, path):
        """Write the picture alone: modules over time, memory, time per module."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(profile_page.svg(self))

    def page(self, path):
        """Write one HTML file with the picture and the table; it needs nothing else."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(profile_page.html(self))


def _owner(array):
    while type(array.base) is np.ndarray:
        array = array.base
    return array


def _arrays(tree):
    """The arrays of a nest of tuples and lists."""
    if isinstance(tree, np.ndarray):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _arrays(part)


def _inside(intervals, event):
    """Nanoseconds of ``intervals``, sorted (thread, start, end), that lie in an event."""
    total, i = 0, bisect_left(intervals, (event.thread, event.start))
    while i < len(intervals) and intervals[i][0] == event.thread and intervals[i][1] < event.end:
        total += intervals[i][2] - intervals[i][1]
        i += 1
    return total
